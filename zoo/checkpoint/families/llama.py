"""transformers' ``llama``, ``mistral`` and ``mixtral``: attention in every layer, and an MLP or experts."""

from typing import Any

from ..fields import Fields
from .decoder import BIASES, Decoder, Defaults

__all__ = ["Llama", "Mistral", "Mixtral", "Uniform"]


class Uniform(Decoder):
    """Base of the converters of ``llama`` and its relatives, whose layers are alike: the mixers of ``tables``, one after the other."""

    norms = ("input_layernorm", "post_attention_layernorm")
    last_norm = "model.norm"
    names = {"attention": "self_attn", "mlp": "mlp", "moe": "mlp"}

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        cfg = self.trunk(fields, [*self.tables] * fields.take("num_hidden_layers", self.defaults.n_layer))
        attention = self.attention(fields, cfg["d_model"])
        mixers = {kind: self.options(fields, kind) for kind in self.tables if kind != "attention"}
        return cfg | {"mixers": {"attention": attention, **mixers}}


class Llama(Uniform):
    """The converter of ``llama``."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    tables = {
        "attention": BIASES,
        "mlp": {"d_intermediate": ("intermediate_size", 11008), "bias": ("mlp_bias", False)},
    }

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        cfg = super().read(fields)
        heads = cfg["mixers"]["attention"]["nheads"]
        if cfg["d_model"] % heads:
            raise fields.error(
                f"hidden_size {cfg['d_model']} is not a multiple of num_attention_heads {heads}, as its class requires."
            )
        return cfg


class Mistral(Uniform):
    """The converter of ``mistral``."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    defaults = Defaults(nheads_kv=8, max_length=131072)
    tables = {
        "attention": {"window": ("sliding_window", None)},
        "mlp": {"d_intermediate": ("intermediate_size", 14336)},
    }

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        cfg = super().read(fields)
        cfg["mixers"]["attention"]["window"] = fields.nullable("sliding_window", 4096)
        return cfg


class Mixtral(Uniform):
    """The converter of ``mixtral``."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    names = {"attention": "self_attn", "moe": "block_sparse_moe"}
    expert = ("w1", "w3", "w2")
    defaults = Defaults(nheads_kv=8, theta=1e6, eps=1e-5, max_length=131072)
    fixed = {"moe": {"router": "topk_softmax"}}
    tables = {
        "attention": {"window": ("sliding_window", None)},
        "moe": {
            "d_intermediate": ("intermediate_size", 14336), "num_experts": ("num_local_experts", 8, "num_experts"),
            "top_k": ("num_experts_per_tok", 2),
        },
    }  # fmt: skip

"""transformers' ``llama``, ``mistral`` and ``mixtral``: attention in every layer, and an MLP or experts."""

from collections.abc import Iterator
from typing import Any, ClassVar

from ..family import Fields, register
from ..files import CheckpointError
from ..keys import Part, Piece, View, experts, same
from ..rotary import rotary, written_rotary
from .decoder import Decoder

__all__ = ["NO_IDS", "Llama", "Mistral", "Mixtral"]


# the ids of special tokens where a class has defaults that another vocabulary does not hold; what is known is written over these
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


@register
class Llama(Decoder):
    """The converter of ``llama``, and the base of its relatives."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    norms = ("input_layernorm", "post_attention_layernorm")
    last_norm = "model.norm"
    names = {"attention": "self_attn", "mlp": "mlp", "moe": "mlp"}  # noqa: RUF012
    # what the class takes where a config says nothing
    defaults: ClassVar[dict[str, Any]] = {"vocab": 32000, "d_model": 4096, "eps": 1e-6, "length": 2048}

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        bias = fields.take("attention_bias", False)
        mlp = {
            "type": "mlp",
            "d_intermediate": fields.take("intermediate_size", 11008),
            "bias": fields.take("mlp_bias", False),
        }
        cfg = self.uniform(fields, {"mlp": mlp}, n=32, heads=32, kv=None)
        heads = cfg["mixers"]["attention"] | {"qkv_bias": bias, "out_bias": bias}
        if cfg["d_model"] % heads["nheads"]:
            raise CheckpointError(
                f"{fields.file}: hidden_size {cfg['d_model']} is not a multiple of num_attention_heads {heads['nheads']}, "
                "as its class requires."
            )
        return cfg | {"mixers": {"attention": heads, "mlp": mlp}}

    def uniform(
        self, fields: Fields, feed_forward: dict[str, Any], n: int, heads: int, kv: int | None, **options: Any
    ) -> dict[str, Any]:
        """A config whose layers are alike; ``options`` are :func:`rotary`'s."""
        layers = ["attention", *feed_forward] * fields.take("num_hidden_layers", n)
        cfg = self.trunk(fields, layers, **self.defaults)
        attention = self.heads(fields, cfg["d_model"], heads, kv)
        attention |= rotary(fields, attention["headdim"], length=self.defaults["length"], **options)
        return cfg | {"mixers": {"attention": attention, **feed_forward}}

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a, mlp = view.first("attention"), view.first("mlp")
        return self.written_trunk(view) | self.written_heads(view) | written_rotary(a) | {
            "attention_bias": a["qkv_bias"], "intermediate_size": mlp["d_intermediate"], "mlp_bias": mlp["bias"],
        }  # fmt: skip


@register
class Mistral(Llama):
    """The converter of ``mistral``."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {"vocab": 32000, "d_model": 4096, "eps": 1e-6, "length": 131072}

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        mlp = {"type": "mlp", "d_intermediate": fields.take("intermediate_size", 14336)}
        cfg = self.uniform(fields, {"mlp": mlp}, n=32, heads=32, kv=8)
        cfg["mixers"]["attention"]["window"] = fields.nullable("sliding_window", 4096)
        return cfg

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a = view.first("attention")
        return self.written_trunk(view) | self.written_heads(view) | written_rotary(a) | {
            "sliding_window": a["window"], "intermediate_size": view.first("mlp")["d_intermediate"],
        }  # fmt: skip


@register
class Mixtral(Llama):
    """The converter of ``mixtral``."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    names = {"attention": "self_attn", "moe": "block_sparse_moe"}  # noqa: RUF012
    defaults: ClassVar[dict[str, Any]] = {"vocab": 32000, "d_model": 4096, "eps": 1e-5, "length": 131072}

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take = fields.take
        moe = {
            "type": "moe", "d_intermediate": take("intermediate_size", 14336), "num_experts": take("num_local_experts", 8, "num_experts"),
            "top_k": take("num_experts_per_tok", 2), "router": "topk_softmax", "aux_loss_coef": take("router_aux_loss_coef", 0.001),
        }  # fmt: skip
        cfg = self.uniform(fields, {"moe": moe}, n=32, heads=32, kv=8, theta=1e6)
        cfg["mixers"]["attention"]["window"] = take("sliding_window", None)
        return cfg

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a, moe = view.first("attention"), view.first("moe")
        return self.written_trunk(view) | self.written_heads(view) | written_rotary(a) | {
            "sliding_window": a["window"], "intermediate_size": moe["d_intermediate"], "num_local_experts": moe["num_experts"],
            "num_experts_per_tok": moe["top_k"],
        }  # fmt: skip

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """Experts one by one on disk; fused, under another name, in what transformers 5 holds in memory."""
        if part.type != "moe":
            yield from super().mixer(view, part, theirs)
            return
        fused = theirs.replace("block_sparse_moe", "mlp")
        is_fused = f"{fused}.experts.gate_up_proj" in view.stored
        theirs = fused if is_fused else theirs
        yield from same(view, f"{part.key}.router", f"{theirs}.gate")
        yield from experts(part, f"{theirs}.experts", "w1", "w3", "w2", is_fused)

"""transformers' ``llama``, ``mistral`` and ``mixtral``: attention in every layer, and an MLP or experts."""

from typing import Any

from ..fields import Fields
from ..keys import View
from .decoder import BIASES, Decoder, Defaults, every_second

__all__ = ["Llama", "Mistral", "Mixtral", "Uniform", "with_windows", "written_windows"]

# of layers of which some look back through a window only
_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}


class Uniform(Decoder):
    """Base of the converters of ``llama`` and its relatives, whose layers are alike: the mixers of ``tables``, one after the other."""

    norms = ("input_layernorm", "post_attention_layernorm")
    last_norm = "model.norm"
    names = {"attention": "self_attn", "mlp": "mlp", "moe": "mlp"}

    def read(self, fields: Fields) -> dict[str, Any]:
        cfg = self.trunk(fields, [*self.tables] * fields.take("num_hidden_layers", self.defaults.n_layer))
        attention = self.attention(fields, cfg["d_model"])
        mixers = {kind: self.options(fields, kind) for kind in self.tables if kind != "attention"}
        return cfg | {"mixers": {"attention": attention, **mixers}}


class Llama(Uniform):
    model_type = "llama"
    architecture = "LlamaForCausalLM"
    tables = {"attention": BIASES, "mlp": {"d_intermediate": ("intermediate_size", 11008), "bias": ("mlp_bias", False)}}

    def read(self, fields: Fields) -> dict[str, Any]:
        cfg = super().read(fields)
        heads = cfg["mixers"]["attention"]["nheads"]
        if cfg["d_model"] % heads:
            raise fields.error(
                f"hidden_size {cfg['d_model']} is not a multiple of num_attention_heads {heads}, as its class requires."
            )
        return cfg


class Mistral(Uniform):
    model_type = "mistral"
    architecture = "MistralForCausalLM"
    defaults = Defaults(nheads_kv=8, max_length=131072)
    tables = {
        "attention": {"window": ("sliding_window", None)},
        "mlp": {"d_intermediate": ("intermediate_size", 14336)},
    }

    def read(self, fields: Fields) -> dict[str, Any]:
        cfg = super().read(fields)
        cfg["mixers"]["attention"]["window"] = fields.nullable("sliding_window", 4096)
        return cfg


class Mixtral(Uniform):
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


def with_windows(
    fields: Fields, cfg: dict[str, Any], windows: list[int | None], window: int | None, turns: list[bool] | None = None
) -> dict[str, Any]:
    """Return our config, which has one attention for all layers, with a name of its own for every kind of attention.

    Each layer looks back through its one of ``windows``, unless ``layer_types`` say which have the ``window`` (None if windows are
    switched off); all layers have positions, or those that ``turns`` says.
    """
    sliding = fields.kinds(_TYPES, [], "layer_types")
    if sliding and len(sliding) != len(windows):
        raise fields.error(f"layer_types lists {len(sliding)} layers, and there are {len(windows)}. Correct the file.")
    if window is None and any(sliding):
        raise fields.error(
            "layer_types has sliding_attention, but use_sliding_window and sliding_window give it no window."
        )
    windows = [window if slides else None for slides in sliding] if sliding else windows
    names, mixers = [], dict[str, Any]()
    for reach, turned in zip(windows, turns or [True] * len(windows), strict=True):
        name = ("attention" if reach is None else "local") + ("" if turned else "_nope")
        mixers[name] = cfg["mixers"]["attention"] | {"window": reach} | ({} if turned else {"rope": None})
        names.append(name)
    mlp = {"mlp": cfg["mixers"]["mlp"]}
    return cfg | {"layers": every_second(names, ["mlp"] * len(names)), "mixers": mixers | mlp}


def written_windows(view: View) -> dict[str, Any]:
    """The reverse: ``layer_types`` and the window; that there is only one shows when the result is read back."""
    windows = [block[0]["window"] for block in view.blocks[::2]]
    some = next((window for window in windows if window is not None), None)
    return {
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": some, "use_sliding_window": some is not None,
    }  # fmt: skip

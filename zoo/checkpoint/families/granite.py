"""transformers' ``granite``, ``granitemoe`` and ``granitemoehybrid`` (ibm-granite/granite-3.*, granite-4.0-*).

Llama with factors: of embeddings, of what a layer adds and of scores, and a divisor of the logits; with experts in place of the MLP; and
with Mamba-2 in most layers and experts beside one dense MLP, where attention has no positions in the published models.
"""

from collections.abc import Iterator
from typing import Any

from ..fields import Fields, Table, used, written
from ..keys import Part, Piece, View, halves, same
from .decoder import BIASES, SSM, Decoder, every_second
from .llama import Llama, Uniform

__all__ = ["Granite", "GraniteHybrid", "GraniteMoe"]

_TYPES = {"mamba": "mamba2", "linear_attention": "mamba2", "attention": "attention", "full_attention": "attention"}
_FACTORS: Table = {
    "embedding_multiplier": ("embedding_multiplier", 1.0), "residual_multiplier": ("residual_multiplier", 1.0),
}  # fmt: skip
_ATTENTION: Table = {**BIASES, "softmax_scale": ("attention_multiplier", 1.0)}
_MOE: Table = {
    "d_intermediate": ("intermediate_size", 11008), "num_experts": ("num_local_experts", 8), "top_k": ("num_experts_per_tok", 2),
}  # fmt: skip


def _factors(fields: Fields) -> dict[str, Any]:
    divisor = fields.take("logits_scaling", 1.0)
    if not divisor:
        raise fields.error("logits_scaling is 0, and divides the logits. Correct the file.")
    return fields.options(_FACTORS) | {"logits_multiplier": 1 / divisor}


def _written_factors(view: View) -> dict[str, Any]:
    return written(view.cfg, _FACTORS) | {"logits_scaling": 1 / view.cfg.logits_multiplier}


def _experts(view: View, part: Part, theirs: str) -> Iterator[Piece]:
    """Fused on disk too, gate first; in memory under other names."""
    memory = f"{theirs}.experts.gate_up_proj" in view.stored
    names = ("experts.gate_up_proj", "experts.down_proj", "router.weight") if memory else (
        "input_linear.weight", "output_linear.weight", "router.layer.weight")  # fmt: skip
    yield from halves(f"{part.key}.experts.w1", f"{theirs}.{names[0]}", part["d_intermediate"], (slice(None),))
    yield Piece(f"{part.key}.experts.w2", f"{theirs}.{names[1]}")
    yield Piece(f"{part.key}.router.weight", f"{theirs}.{names[2]}")


class Granite(Uniform):
    model_type = "granite"
    architecture = "GraniteForCausalLM"
    tables = {"attention": _ATTENTION, "mlp": Llama.tables["mlp"]}

    def read(self, fields: Fields) -> dict[str, Any]:
        return super().read(fields) | _factors(fields)

    def write(self, view: View) -> dict[str, Any]:
        return super().write(view) | _written_factors(view)


class GraniteMoe(Granite):
    model_type = "granitemoe"
    architecture = "GraniteMoeForCausalLM"
    names = {"attention": "self_attn", "moe": "block_sparse_moe"}
    fixed = {"moe": {"router": "topk_softmax"}}
    tables = {"attention": _ATTENTION, "moe": _MOE}
    unused = ("normalization_function", "init_method", "logits_to_keep")

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """The experts are fused on disk too."""
        yield from _experts(view, part, theirs) if part.type == "moe" else super().mixer(view, part, theirs)


class GraniteHybrid(Decoder):
    model_type = "granitemoehybrid"
    architecture = "GraniteMoeHybridForCausalLM"
    norms, last_norm, fixed, unused = Granite.norms, Granite.last_norm, GraniteMoe.fixed, GraniteMoe.unused
    names = {"attention": "self_attn", "mamba2": "mamba", "mlp": "shared_mlp", "moe": "block_sparse_moe"}
    tables = {
        "mamba2": SSM, "attention": _ATTENTION, "mlp": {"d_intermediate": ("shared_intermediate_size", 1024)}, "moe": _MOE,
    }  # fmt: skip
    absent = {
        "mamba2": {}, "attention": {"qkv_bias": False, "out_bias": False, "softmax_scale": 1.0},
        "moe": {"d_intermediate": 1024, "num_experts": 0, "top_k": 1},
    }  # fmt: skip

    def read(self, fields: Fields) -> dict[str, Any]:
        n = fields.take("num_hidden_layers", 32)
        kinds = fields.kinds(_TYPES, ["mamba"] * n, "layer_types", "layers_block_type")
        moe, mlp = self.options(fields, "moe"), self.options(fields, "mlp")
        layers = every_second(kinds, ["moe + mlp" if moe["num_experts"] else "mlp"] * n)
        cfg = self.trunk(fields, layers)
        attention = self.attention(fields, cfg["d_model"])
        if fields.expect("position_embedding_type", None, "rope", "nope") != "rope":
            attention |= {"rope": None, "rope_scaling": None}
        ssm = self.ssm(fields, cfg["d_model"], cfg["norm"]["eps"])
        mixers = {"mamba2": ssm, "attention": attention, "mlp": mlp, "moe": moe}
        return cfg | {"mixers": used(mixers, layers)} | _factors(fields)

    def write(self, view: View) -> dict[str, Any]:
        config = super().write(view)
        return config | self.written_ssm(view) | _written_factors(view) | {
            "layer_types": ["linear_attention" if token == "mamba2" else "full_attention" for token in view.layout[::2]],
            "position_embedding_type": "rope" if "rope_parameters" in config else None,
        }  # fmt: skip

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """The MLP and the experts are fused on disk too, gate first."""
        if part.type == "mlp":
            yield from halves(f"{part.key}.fc1.weight", f"{theirs}.input_linear.weight", part["d_intermediate"])
            yield from same(view, f"{part.key}.fc2", f"{theirs}.output_linear")
        else:
            yield from _experts(view, part, theirs) if part.type == "moe" else super().mixer(view, part, theirs)

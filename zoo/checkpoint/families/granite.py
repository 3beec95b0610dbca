"""transformers' ``granite``, ``granitemoe`` and ``granitemoehybrid`` (ibm-granite/granite-3.*, granite-4.0-*).

Llama with factors: of embeddings, of what a layer adds and of scores, and a divisor of the logits; with experts in place of the MLP; and
with Mamba-2 in most layers and experts beside one dense MLP, where attention has no positions in the published models.
"""

from collections.abc import Iterator
from typing import Any

from ..family import Fields, register
from ..files import CheckpointError
from ..keys import Part, Piece, View, halves, same
from ..rotary import rotary, written_rotary
from .decoder import Decoder, every_second
from .llama import Llama

__all__ = ["Granite", "GraniteHybrid", "GraniteMoe"]

_TYPES = {"mamba": "mamba2", "linear_attention": "mamba2", "attention": "attention", "full_attention": "attention"}


def _factors(fields: Fields) -> dict[str, Any]:
    take, divisor = fields.take, fields.take("logits_scaling", 1.0)
    if not divisor:
        raise CheckpointError(f"{fields.file}: logits_scaling is 0, and divides the logits. Correct the file.")
    return {
        "embedding_multiplier": take("embedding_multiplier", 1.0), "residual_multiplier": take("residual_multiplier", 1.0),
        "logits_multiplier": 1 / divisor,
    }  # fmt: skip


def _written_factors(view: View) -> dict[str, Any]:
    cfg = view.cfg
    return {
        "embedding_multiplier": cfg.embedding_multiplier, "residual_multiplier": cfg.residual_multiplier,
        "logits_scaling": 1 / cfg.logits_multiplier, "attention_multiplier": view.first("attention").get("softmax_scale", 1.0),
    }  # fmt: skip


def _experts(view: View, part: Part, theirs: str) -> Iterator[Piece]:
    """Fused on disk too, gate first; in memory under other names."""
    memory = f"{theirs}.experts.gate_up_proj" in view.stored
    names = ("experts.gate_up_proj", "experts.down_proj", "router.weight") if memory else (
        "input_linear.weight", "output_linear.weight", "router.layer.weight")  # fmt: skip
    yield from halves(f"{part.key}.experts.w1", f"{theirs}.{names[0]}", part["d_intermediate"], (slice(None),))
    yield Piece(f"{part.key}.experts.w2", f"{theirs}.{names[1]}")
    yield Piece(f"{part.key}.router.weight", f"{theirs}.{names[2]}")


@register
class Granite(Llama):
    """The converter of ``granite``."""

    model_type = "granite"
    architecture = "GraniteForCausalLM"

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        return self._with_factors(fields, self._mlp(fields), n=32)

    def _mlp(self, fields: Fields) -> dict[str, Any]:
        take = fields.take
        return {
            "mlp": {"type": "mlp", "d_intermediate": take("intermediate_size", 11008), "bias": take("mlp_bias", False)}
        }

    def _with_factors(self, fields: Fields, feed_forward: dict[str, Any], n: int) -> dict[str, Any]:
        bias, scale = fields.take("attention_bias", False), fields.take("attention_multiplier", 1.0)
        cfg = self.uniform(fields, feed_forward, n=n, heads=32, kv=None) | _factors(fields)
        cfg["mixers"]["attention"] |= {"qkv_bias": bias, "out_bias": bias, "softmax_scale": scale}
        return cfg

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        return super().write(view) | _written_factors(view)


@register
class GraniteMoe(Granite):
    """The converter of ``granitemoe``."""

    model_type = "granitemoe"
    architecture = "GraniteMoeForCausalLM"
    names = {"attention": "self_attn", "moe": "block_sparse_moe"}  # noqa: RUF012

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take = fields.take
        fields.skip("normalization_function", "init_method", "logits_to_keep")
        moe = {
            "type": "moe", "d_intermediate": take("intermediate_size", 11008), "num_experts": take("num_local_experts", 8),
            "router": "topk_softmax", "top_k": take("num_experts_per_tok", 2), "aux_loss_coef": take("router_aux_loss_coef", 0.001),
        }  # fmt: skip
        return self._with_factors(fields, {"moe": moe}, n=32)

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a, moe = view.first("attention"), view.first("moe")
        return self.written_trunk(view) | self.written_heads(view) | written_rotary(a) | _written_factors(view) | {
            "attention_bias": a["qkv_bias"], "intermediate_size": moe["d_intermediate"], "num_local_experts": moe["num_experts"],
            "num_experts_per_tok": moe["top_k"],
        }  # fmt: skip

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """The experts are fused on disk too."""
        yield from _experts(view, part, theirs) if part.type == "moe" else super().mixer(view, part, theirs)


@register
class GraniteHybrid(Decoder):
    """The converter of ``granitemoehybrid``."""

    model_type = "granitemoehybrid"
    architecture = "GraniteMoeHybridForCausalLM"
    norms = ("input_layernorm", "post_attention_layernorm")
    last_norm = "model.norm"
    names = {  # noqa: RUF012
        "attention": "self_attn", "mamba2": "mamba", "mlp": "shared_mlp", "moe": "block_sparse_moe",
    }  # fmt: skip

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take, n, e, bias = (
            fields.take,
            fields.take("num_hidden_layers", 32),
            fields.take("num_local_experts", 8),
            fields.take("attention_bias", False),
        )
        kinds = fields.kinds(_TYPES, ["mamba"] * n, "layer_types", "layers_block_type")
        layers = every_second(kinds, ["moe + mlp" if e else "mlp"] * n)
        fields.skip("normalization_function", "init_method", "logits_to_keep")
        cfg = self.trunk(fields, layers, vocab=32000, d_model=4096, eps=1e-6, length=2048)
        heads = self.heads(fields, cfg["d_model"], 32, None)
        turned = rotary(fields, heads["headdim"])
        if fields.expect("position_embedding_type", None, "rope", "nope") != "rope":
            turned = {"rope": None}
        mixers = {
            "mamba2": self.ssm(fields, cfg["d_model"], cfg["norm"]["eps"]),
            "attention": heads | turned | {
                "softmax_scale": take("attention_multiplier", 1.0), "qkv_bias": bias, "out_bias": bias,
            },
            "mlp": {"type": "mlp", "d_intermediate": take("shared_intermediate_size", 1024)},
            "moe": {
                "type": "moe", "d_intermediate": take("intermediate_size", 11008), "num_experts": e, "router": "topk_softmax",
                "top_k": take("num_experts_per_tok", 2), "aux_loss_coef": take("router_aux_loss_coef", 0.001),
            },
        }  # fmt: skip
        used = " ".join(layers).split()
        return cfg | {"mixers": {name: spec for name, spec in mixers.items() if name in used}} | _factors(fields)

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a, moe = view.first("attention"), view.first("moe")
        rope = written_rotary(a)
        return self.written_trunk(view) | self.written_heads(view) | self.written_ssm(view) | rope | _written_factors(view) | {
            "layer_types": ["linear_attention" if token == "mamba2" else "full_attention" for token in view.layout[::2]],
            "position_embedding_type": "rope" if rope else None, "attention_bias": a.get("qkv_bias", False),
            "shared_intermediate_size": view.first("mlp")["d_intermediate"], "intermediate_size": moe.get("d_intermediate", 1024),
            "num_local_experts": moe.get("num_experts", 0), "num_experts_per_tok": moe.get("top_k", 1),
        }  # fmt: skip

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """The MLP and the experts are fused on disk too, gate first."""
        if part.type == "mlp":
            yield from halves(f"{part.key}.fc1.weight", f"{theirs}.input_linear.weight", part["d_intermediate"])
            yield from same(view, f"{part.key}.fc2", f"{theirs}.output_linear")
        else:
            yield from _experts(view, part, theirs) if part.type == "moe" else super().mixer(view, part, theirs)

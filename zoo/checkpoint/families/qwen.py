"""transformers' ``qwen2``, ``qwen3`` and ``qwen3_moe`` (Qwen/Qwen2.5-*, Qwen/Qwen3-*).

Qwen 2 has biases on queries, keys and values, Qwen 3 norms on queries and keys instead. Some layers may look back through a window only;
with ``qwen3_moe`` all or none do.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from ..family import Fields, register
from ..keys import Part, Piece, View, experts, same
from ..rotary import written_rotary
from .decoder import every_second
from .llama import Llama
from .windows import kinds_of_attention, written_windows

__all__ = ["Qwen2", "Qwen3", "Qwen3Moe"]


@register
class Qwen2(Llama):
    """The converter of ``qwen2``."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {"vocab": 151936, "d_model": 4096, "eps": 1e-6, "length": 32768}

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take = fields.take
        fields.expect("use_mrope", False)  # published files say so
        mlp = {"type": "mlp", "d_intermediate": take("intermediate_size", 22016)}
        cfg = self.uniform(fields, {"mlp": mlp}, n=32, heads=32, kv=32)
        n = len(cfg["layers"]) // 2
        window = fields.nullable("sliding_window", 4096)
        window = window if take("use_sliding_window", False) else None
        first = take("max_window_layers", 28)
        layers, attentions = kinds_of_attention(fields, [window if i >= first else None for i in range(n)], window)
        options = cfg["mixers"]["attention"] | self._specials(fields, cfg)
        mixers = {name: options | attentions[name] for name in attentions}
        return cfg | {"layers": every_second(layers, ["mlp"] * n), "mixers": {**mixers, "mlp": mlp}}

    def _specials(self, fields: Fields, cfg: dict[str, Any]) -> dict[str, Any]:
        return {"qkv_bias": True, "out_bias": False}

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a = view.first("attention")
        return self.written_trunk(view) | self.written_heads(view) | written_rotary(a) | written_windows(view) | {
            "max_window_layers": 0, "intermediate_size": view.first("mlp")["d_intermediate"],
        }  # fmt: skip


@register
class Qwen3(Qwen2):
    """The converter of ``qwen3``."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    head_dim: ClassVar[int | None] = 128

    def heads(self, fields: Fields, d_model: int, heads: int, kv: int | None) -> dict[str, Any]:
        """As for every decoder, but a head's size has a default of its own."""
        found = super().heads(fields, d_model, heads, kv)
        return found | ({} if self.head_dim is None or "head_dim" in fields.data else {"headdim": self.head_dim})

    def _specials(self, fields: Fields, cfg: dict[str, Any]) -> dict[str, Any]:
        bias = fields.take("attention_bias", False)
        return {"qkv_bias": bias, "out_bias": bias, "qk_norm": True, "norm_eps": cfg["norm"]["eps"]}

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a = view.first("attention")
        return super().write(view) | {"head_dim": a["headdim"], "attention_bias": a["qkv_bias"]}


@register
class Qwen3Moe(Qwen3):
    """The converter of ``qwen3_moe``."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    head_dim: ClassVar[int | None] = None
    defaults: ClassVar[dict[str, Any]] = {"vocab": 151936, "d_model": 2048, "eps": 1e-6, "length": 32768}

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take = fields.take
        mlp = {"type": "mlp", "d_intermediate": take("intermediate_size", 6144)}
        moe = {
            "type": "moe", "d_intermediate": take("moe_intermediate_size", 768),
            "num_experts": take("num_experts", 128, "num_local_experts"), "top_k": take("num_experts_per_tok", 8),
            "renormalize": take("norm_topk_prob", False), "aux_loss_coef": take("router_aux_loss_coef", 0.001),
        }  # fmt: skip
        cfg = self.uniform(fields, {"mlp": mlp, "moe": moe}, n=24, heads=32, kv=4)
        n, step = take("num_hidden_layers", 24), take("decoder_sparse_step", 1)
        dense = fields.data.get("mlp_only_layers") or []
        fields.skip("mlp_only_layers", "max_window_layers", "shared_expert_intermediate_size")
        fields.expect("qkv_bias", False), fields.expect("use_qk_norm", True)
        sparse = [moe["num_experts"] > 0 and i not in dense and (i + 1) % step == 0 for i in range(n)]
        window = fields.nullable("sliding_window", 4096)
        attention = cfg["mixers"]["attention"] | self._specials(fields, cfg)
        attention |= {"window": window if take("use_sliding_window", False) else None}
        layers = every_second(["attention"] * n, ["moe" if is_sparse else "mlp" for is_sparse in sparse])
        mixers = {"attention": attention, "mlp": mlp, "moe": moe}
        return cfg | {"layers": layers, "mixers": {name: spec for name, spec in mixers.items() if name in layers}}

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a, mlp, moe = view.first("attention"), view.first("mlp"), view.first("moe")
        config = self.written_trunk(view) | self.written_heads(view) | written_rotary(a) | {
            "use_sliding_window": a["window"] is not None, "sliding_window": a["window"], "attention_bias": a["qkv_bias"],
            "moe_intermediate_size": moe["d_intermediate"], "num_experts": moe["num_experts"], "num_experts_per_tok": moe["top_k"],
            "norm_topk_prob": moe["renormalize"], "mlp_only_layers": [i for i, token in enumerate(view.layout[1::2]) if token == "mlp"],
        }  # fmt: skip
        return config | ({"intermediate_size": mlp["d_intermediate"]} if mlp else {})

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """Experts one by one on disk, fused in memory."""
        if part.type != "moe":
            yield from super().mixer(view, part, theirs)
            return
        fused = f"{theirs}.experts.gate_up_proj" in view.stored
        yield from same(view, f"{part.key}.router", f"{theirs}.gate")
        yield from experts(part, f"{theirs}.experts", "gate_proj", "up_proj", "down_proj", fused)

"""transformers' ``jamba`` (ai21labs/Jamba-v0.1, 1.5, 1.6, 1.7, Jamba2, Jamba-Reasoning-3B).

Mamba with learned norms on dt, B and C, attention without positions at every ``attn_layer_period``-th layer, and experts in every
``expert_layer_period``-th feed-forward, weighted by a softmax over all of them. With one expert every feed-forward is dense.
"""

import math
from collections.abc import Iterator
from typing import Any

from ..family import Fields, register
from ..keys import Part, Piece, View, experts, same
from .decoder import Decoder, every_second, period_of

__all__ = ["Jamba"]


@register
class Jamba(Decoder):
    """The converter of ``jamba``."""

    model_type = "jamba"
    architecture = "JambaForCausalLM"

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take = fields.take
        n, width, e = take("num_hidden_layers", 32), take("intermediate_size", 14336), take("num_experts", 16)
        fields.skip("n_ctx")
        fields.expect("sliding_window", None)
        fields.expect("mamba_inner_layernorms", True)
        attn, expert = (
            (take(f"{kind}_layer_period", period), take(f"{kind}_layer_offset", offset))
            for kind, period, offset in (("attn", 8, 4), ("expert", 2, 1))
        )
        layers = every_second(
            ["attention" if i % attn[0] == attn[1] else "mamba" for i in range(n)],
            ["moe" if e > 1 and i % expert[0] == expert[1] else "mlp" for i in range(n)],
        )
        cfg = self.trunk(fields, layers, vocab=65536, d_model=4096, eps=1e-6, length=262144)
        rank = fields.data.get("mamba_dt_rank", "auto")
        fields.skip("mamba_dt_rank")
        mixers = {
            "mamba": {
                "type": "mamba", "d_state": take("mamba_d_state", 16), "d_conv": take("mamba_d_conv", 4), "expand": take("mamba_expand", 2),
                "dt_rank": math.ceil(cfg["d_model"] / 16) if rank == "auto" else take("mamba_dt_rank"),
                "bias": take("mamba_proj_bias", False), "conv_bias": take("mamba_conv_bias", True),
                "bcdt_norm": True, "bcdt_norm_eps": cfg["norm"]["eps"],
            },
            "attention": self.heads(fields, cfg["d_model"], 32, 8) | {"rope": None},
            "mlp": {"type": "mlp", "d_intermediate": width},
            "moe": {
                "type": "moe", "d_intermediate": width, "num_experts": e, "top_k": take("num_experts_per_tok", 2),
                "aux_loss_coef": take("router_aux_loss_coef", 0.001),
            },
        }  # fmt: skip
        return cfg | {"mixers": {name: spec for name, spec in mixers.items() if name in layers}}

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        n, layout = len(view.blocks) // 2, view.layout
        attn = period_of([i for i in range(n) if layout[2 * i] == "attention"], n)
        expert = period_of([i for i in range(n) if layout[2 * i + 1] == "moe"], n)
        mamba, moe = view.first("mamba"), view.first("moe")
        return self.written_trunk(view) | self.written_heads(view) | {
            "intermediate_size": (moe or view.first("mlp"))["d_intermediate"],
            "attn_layer_period": attn[0], "attn_layer_offset": attn[1], "expert_layer_period": expert[0], "expert_layer_offset": expert[1],
            "num_experts": moe.get("num_experts", 1), "num_experts_per_tok": moe.get("top_k", 1),
            "mamba_d_state": mamba["d_state"], "mamba_d_conv": mamba["d_conv"], "mamba_expand": mamba["expand"],
            "mamba_dt_rank": mamba["dt_rank"], "mamba_proj_bias": mamba["bias"], "mamba_conv_bias": mamba["conv_bias"],
        }  # fmt: skip

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """Experts one by one on disk, fused in memory."""
        if part.type != "moe":
            yield from super().mixer(view, part, theirs)
            return
        yield from same(view, f"{part.key}.router", f"{theirs}.router")
        fused = f"{theirs}.experts.gate_up_proj" in view.stored
        yield from experts(part, f"{theirs}.experts", "gate_proj", "up_proj", "down_proj", fused)

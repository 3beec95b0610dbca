"""transformers' ``jamba`` (ai21labs/Jamba-v0.1, 1.5, 1.6, 1.7, Jamba2, Jamba-Reasoning-3B).

Mamba with learned norms on dt, B and C, attention without positions at every ``attn_layer_period``-th layer, and experts in every
``expert_layer_period``-th feed-forward, weighted by a softmax over all of them. With one expert every feed-forward is dense.
"""

import math
from typing import Any

from ..fields import Fields, used
from ..keys import View
from .decoder import Decoder, Defaults, every_second, period_of

__all__ = ["Jamba"]


class Jamba(Decoder):
    model_type = "jamba"
    architecture = "JambaForCausalLM"
    router = "router"
    defaults = Defaults(vocab_size=65536, nheads_kv=8, max_length=262144)
    fixed = {"mamba": {"bcdt_norm": True}, "attention": {"rope": None}}
    tables = {
        "mamba": {
            "d_state": ("mamba_d_state", 16), "d_conv": ("mamba_d_conv", 4), "expand": ("mamba_expand", 2),
            "bias": ("mamba_proj_bias", False), "conv_bias": ("mamba_conv_bias", True),
        },
        "mlp": {"d_intermediate": ("intermediate_size", 14336)},
        "moe": {
            "d_intermediate": ("intermediate_size", 14336), "num_experts": ("num_experts", 16), "top_k": ("num_experts_per_tok", 2),
        },
    }  # fmt: skip
    unused = ("n_ctx",)
    absent = {"mlp": {}, "moe": {}}

    def read(self, fields: Fields) -> dict[str, Any]:
        take, n, moe = fields.take, fields.take("num_hidden_layers", 32), self.options(fields, "moe")
        fields.expect("sliding_window", None)
        fields.expect("mamba_inner_layernorms", True)
        attn = take("attn_layer_period", 8), take("attn_layer_offset", 4)
        expert = take("expert_layer_period", 2), take("expert_layer_offset", 1)
        layers = every_second(
            ["attention" if i % attn[0] == attn[1] else "mamba" for i in range(n)],
            ["moe" if moe["num_experts"] > 1 and i % expert[0] == expert[1] else "mlp" for i in range(n)],
        )
        cfg = self.trunk(fields, layers)
        mixers = {
            "mamba": self.options(fields, "mamba") | {
                "dt_rank": fields.automatic("mamba_dt_rank", math.ceil(cfg["d_model"] / 16)), "bcdt_norm_eps": cfg["norm"]["eps"],
            },
            "attention": self.heads(fields, cfg["d_model"]), "mlp": self.options(fields, "mlp"), "moe": moe,
        }  # fmt: skip
        return cfg | {"mixers": used(mixers, layers)}

    def write(self, view: View) -> dict[str, Any]:
        n, layout, moe = len(view.blocks) // 2, view.layout, view.first("moe")
        attn = period_of([i for i in range(n) if layout[2 * i] == "attention"], n)
        expert = period_of([i for i in range(n) if layout[2 * i + 1] == "moe"], n)
        return super().write(view) | {
            "attn_layer_period": attn[0], "attn_layer_offset": attn[1], "expert_layer_period": expert[0], "expert_layer_offset": expert[1],
            "num_experts": moe.get("num_experts", 1), "num_experts_per_tok": moe.get("top_k", 1),
            "mamba_dt_rank": view.first("mamba")["dt_rank"],
        }  # fmt: skip

"""A mixer's options as they take effect: derived values filled in, what decides nothing left out.

Two configs whose blocks agree in this form compute the same function of the same weights.
"""

import math
from typing import Any

__all__ = ["resolved"]

# decide initialisation, losses or speed, never what is computed
_WITHOUT_EFFECT = frozenset(
    "dt_min dt_max dt_init_floor dt_scale A_init_range chunk_size aux_loss_coef z_loss_coef backend".split()
)


def resolved(part: dict[str, Any], d_model: int) -> dict[str, Any]:
    """The options of ``{"type": ..., **options}``, complete and comparable; ``type`` stays."""
    o = {key: value for key, value in part.items() if key not in _WITHOUT_EFFECT}
    fill = {"mamba": _mamba, "mamba2": _mamba2, "attention": _attention, "mlp": _mlp, "moe": _moe}.get(part["type"])
    if fill:
        fill(o, d_model)
    return o


def _mamba(o: dict[str, Any], d: int) -> None:
    o["dt_rank"] = o["dt_rank"] or math.ceil(d / 16)
    if not o["bcdt_norm"]:
        o["bcdt_norm_affine"] = o["bcdt_norm_eps"] = None


def _mamba2(o: dict[str, Any], d: int) -> None:
    o["d_inner"] = o["d_inner"] or o["expand"] * d
    del o["expand"]
    o["d_ssm"] = o["d_ssm"] or o["d_inner"]
    o["dt_limit"] = [float(limit) for limit in o["dt_limit"]]
    o["multipliers"] = [float(factor) for factor in o["multipliers"]]
    if not o["rmsnorm"]:
        o["norm_before_gate"] = o["norm_eps"] = None


def _attention(o: dict[str, Any], d: int) -> None:
    o["nheads_kv"] = o["nheads_kv"] or o["nheads"]
    o["headdim"] = o["headdim"] or d // o["nheads"]
    o["softmax_scale"] = o["headdim"] ** -0.5 if o["softmax_scale"] is None else o["softmax_scale"]
    o["rotary_dim"] = None if o["rope"] is None else o["rotary_dim"] or o["headdim"]
    o["rope_scaling"] = o["rope_scaling"] and [float(number) for number in o["rope_scaling"]]
    if o["rope"] is None:
        o["rope_interleaved"], o["rope_scaling"] = False, None
    if not o["qk_norm"]:
        o["norm_eps"] = None


def _mlp(o: dict[str, Any], d: int) -> None:
    # the layer's own rule
    o["d_intermediate"] = o["d_intermediate"] or -(-(8 * d // 3 if o["gated"] else 4 * d) // 128) * 128


def _moe(o: dict[str, Any], d: int) -> None:
    # renormalising the softmax over all and the softmax over the best are the same weights
    if o["router"] == "softmax_topk" and o["renormalize"]:
        o["router"] = "topk_softmax"
    if o["router"] == "topk_softmax":
        o["renormalize"] = True
    if o["num_groups"] == 1:
        o["top_groups"] = 1

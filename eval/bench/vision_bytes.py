"""Bytes that the scan of an image model moves in a forward, between the map behind the convolution and the one in front of the norm.

Counted from shapes, not measured: every tensor that a kernel reads or writes counts once, in 16 bits or in the float32 that it is kept in,
and parameters do not count. What a cache holds for the next walk is counted all the same, so that ours is what they move at most.
"""

import torch

from ...kernels.scan import low_rank
from ...layers.ss2d import SS2D
from ...zoo.models.build import build
from ..result_file import Row

__all__ = ["GOAL", "least", "ours", "published", "scan_bytes"]

# times the least; the issue's
GOAL = 1.5


def scan_bytes(name: str, b: int, h: int, w: int) -> Row:
    """Count the bytes of a model's scans for images of ``(b, h, w)``: ours, of the published structure, and the fewest possible."""
    model = build(name, device="meta")
    stages: dict[int, Row] = {}
    sizes = model.grids(h, w)
    for spec, block in zip(model.specs, model.backbone.blocks, strict=True):
        if isinstance(mixer := block.mixer, SS2D):
            tokens = b * sizes[spec.stage][0] * sizes[spec.stage][1]
            facts = {"d": mixer.d_inner, "n": mixer.d_state, "r": mixer.dt_rank, "l": tokens // b}
            stage = stages.setdefault(
                spec.stage, facts | {"blocks": 0, "ours_MB": 0.0, "published_MB": 0.0, "least_MB": 0.0}
            )
            stage["blocks"] += 1
            for key, count in (("ours_MB", ours), ("published_MB", published), ("least_MB", least)):
                stage[key] += tokens * count(mixer) / 1e6
    total = {key: sum(stage[f"{key}_MB"] for stage in stages.values()) / 1e3 for key in ("ours", "published", "least")}
    shown = [
        {key: round(value, 1) if isinstance(value, float) else value for key, value in s.items()}
        for s in stages.values()
    ]
    return {
        "name": name,
        "part": "bytes",
        "op": f"scan path of a forward, {b} x {h} x {w}, counted",
        "shape": {"b": b, "h": h, "w": w},
        "dtype": "bfloat16",
        "counted": True,
        **{f"{key}_GB": round(value, 3) for key, value in total.items()},
        "to_least": round(total["ours"] / total["least"], 3),
        "goal_to_least": GOAL,
        "met": total["ours"] <= GOAL * total["least"],
        "stages": shown,
    }


def _narrow(m: SS2D) -> int:
    # numbers that the projection leaves at a token
    return len(m.directions) * (m.dt_rank + 2 * m.d_state)


def least(m: SS2D) -> int:
    """Bytes per token at the least: the map for the projection and for the scan, what is projected, both ways, and the output."""
    return 2 * (3 * m.d_inner + 2 * _narrow(m))


def ours(m: SS2D) -> int:
    """Bytes per token of our kernels: a product, then a scan per direction, and the sum so far from one to the next."""
    k, d, narrow = len(m.directions), m.d_inner, _narrow(m)
    formed = torch.empty(1, 2, narrow, dtype=torch.bfloat16).unflatten(-1, (k, -1)).permute(2, 0, 1, 3)
    aligned = all(low_rank.in_vectors(dt) for dt in formed[..., : m.dt_rank])
    facts = {"dtype": torch.bfloat16, "rank": m.dt_rank, "d_state": m.d_state, "in_vectors": aligned}
    # step sizes that the scan cannot form come out of a product, and are written and read
    steps = 0 if low_rank.refuse(facts) is None else 2 * 2 * d
    # the first writes its sum, the last reads it and writes the output
    sums = 8 * d * (k - 1)
    return 2 * (d + narrow) + k * (2 * d + steps) + 2 * narrow + sums + 2 * d


def published(m: SS2D) -> int:
    """Bytes per token of the published structure (``v05_noz``; in the first version all of it in float32 but the copies and products).

    Four copies, two grouped products on them with what they read made contiguous, a scan that writes float32, and the sum.
    """
    k, d, wide = len(m.directions), m.d_inner, 4 if m.gate else 2
    copies, products = 2 * d * (1 + k), 2 * k * d + 2 * k * d + 4 * 2 * _narrow(m)
    # operands in float32 are first converted: read in 16 bits, and written
    converted = 2 * k * d * (2 + wide) if m.gate else 0
    scan, merged = k * d * (2 * wide + 4), 4 * d * (k + 1)
    return copies + products + converted + scan + merged

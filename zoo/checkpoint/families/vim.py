"""Vim's files (arXiv:2401.09417), bimamba v2 with a class token in the middle, which hold no config.

The names of the mixer's tensors are those of ours with two directions. What tensors do not tell is as in every published file: the token's
place, outputs of both directions divided by two, and a residual stream in float32.
"""

import math
from collections.abc import Iterator
from typing import Any

from ...errors import CheckpointError
from ..family import FileFamily, Shapes
from ..keys import Piece, View, same

__all__ = ["Vim"]

# sizes of images that the published models were tuned for in steps of half a patch
_FINER = (224, 384, 448, 512)


class Vim(FileFamily):
    """The converter of Vim's files."""

    model_type = "vim"
    mark = r"layers\.0\.mixer\.A_b_log"
    configs = ("vim-*",)

    def find(self, shapes: Shapes) -> dict[str, Any]:
        """As :meth:`FileFamily.find`."""
        mixer = "layers.0.mixer"
        d, in_channels, patch, _ = shapes.of("patch_embed.proj.weight", 4)
        inner, n = shapes.of(f"{mixer}.A_log", 2)
        rank = shapes.of(f"{mixer}.dt_proj.weight", 2)[1]
        token = "cls_token" in shapes
        cfg: dict[str, Any] = {}
        if "pos_embed" in shapes:
            cfg = {"pos_embed": True, "image_size": self._image_size(shapes, patch, token)}
        norm = {"type": "layernorm" if "norm_f.bias" in shapes else "rmsnorm", "eps": 1e-5}
        mamba = {
            "type": "mamba", "d_state": n, "d_conv": shapes.of(f"{mixer}.conv1d.weight", 3)[2], "expand": max(1, inner // d),
            "dt_rank": None if rank == -(-d // 16) else rank, "conv_bias": f"{mixer}.conv1d.bias" in shapes,
            "bias": f"{mixer}.in_proj.bias" in shapes, "directions": 2, "combine_directions": "mean",
        }  # fmt: skip
        return cfg | {
            "task": "image_classification", "d_model": d, "layers": f"mamba * {shapes.count('layers')}", "mixers": {"mamba": mamba},
            "stem": {"type": "patch", "patch": patch, "norm": "patch_embed.norm.weight" in shapes}, "norm": norm,
            "residual_in_fp32": True, "class_token": "middle" if token else "none", "pool": "token" if token else "mean",
            "n_classes": self.classes(shapes), "in_channels": in_channels,
        }  # fmt: skip

    def classes(self, shapes: Shapes) -> int:
        """As :meth:`FileFamily.classes`."""
        return shapes.of("head.weight", 2)[0] if "head.weight" in shapes else 0

    def _image_size(self, shapes: Shapes, patch: int, token: bool) -> int:
        places = shapes.of("pos_embed", 3)[1] - token
        side = math.isqrt(max(places, 0))
        if side * side != places or not side:
            raise CheckpointError(
                f"{shapes.file}: tensor 'pos_embed' has {places} positions, which are no square. Say by config= of what images they are."
            )
        if patch == 16 and (finer := (side + 1) * patch // 2) in _FINER:
            raise CheckpointError(
                f"{shapes.file}: {side} x {side} positions are those of {finer} pixels in steps of {patch // 2}, patches of {patch} that "
                "overlap, which this version's stem does not have. Load the model before its finer tuning."
            )
        return side * patch

    def keys(self, view: View) -> Iterator[Piece]:
        """Ours but for the stem."""
        for ours, theirs in (("proj", "patch_embed.proj"), ("norm", "patch_embed.norm")):
            yield from same(view, f"backbone.embedding.{ours}", theirs)
        for ours, theirs in (("class_token", "cls_token"), ("pos_embed", "pos_embed")):
            if f"backbone.embedding.{ours}" in view.shapes:
                yield Piece(f"backbone.embedding.{ours}", theirs)
        for i in range(len(view.blocks)):
            yield from same(view, f"backbone.layers.{i}", f"layers.{i}")
        yield from same(view, "backbone.norm_f", "norm_f")
        yield from same(view, "head", "head")

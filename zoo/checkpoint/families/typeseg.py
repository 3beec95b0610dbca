"""typeseg's segmenter of source code (PyPI, 0.2.7, Apache-2.0): ``mamba_al.npz``, six blocks of Mamba that reads both ways.

A class for each byte of a text, of 35 languages and formats. The arrays are Flax's, under names such as
``CheckpointMambaBlock1D_0__Dense_1__kernel``, and there is no config: sizes are the arrays'. ``manifest.json`` beside them names the
classes. Both ways share all weights, so ``D`` counts twice; the convolution reads one byte before and two behind; every projection has a
bias; 1e-4 is added to the step sizes.
"""

import re
from collections.abc import Iterator
from typing import Any

from ...errors import CheckpointError, shortened
from ..family import FileFamily, Shapes
from ..files import read_json
from ..keys import Piece, View

__all__ = ["TypeSeg"]

_BLOCK = re.compile(r"CheckpointMambaBlock1D_(\d{1,4})__.+")
_FIRST = "CheckpointMambaBlock1D_0__"
# sizes that the manifest states too
_STATED = ("d_state", "d_conv", "dt_rank")
_PARTS = {
    "norm.weight": "LayerNorm_0__scale", "norm.bias": "LayerNorm_0__bias", "mixer.A_log": "A_log", "mixer.D": "D",
    "mixer.conv1d.weight": "Conv_0__kernel", "mixer.conv1d.bias": "Conv_0__bias",
} | {
    f"mixer.{ours}.{kind}": f"Dense_{i}__{theirs}"
    for i, ours in enumerate(("in_proj", "x_proj", "dt_proj", "out_proj"))
    for kind, theirs in (("weight", "kernel"), ("bias", "bias"))
}  # fmt: skip
_ENDS = {
    "backbone.embedding.weight": "Embed_0__embedding", "backbone.norm_f.weight": "LayerNorm_0__scale",
    "backbone.norm_f.bias": "LayerNorm_0__bias", "head.weight": "Dense_0__kernel", "head.bias": "Dense_0__bias",
}  # fmt: skip


class TypeSeg(FileFamily):
    """The converter of typeseg's file."""

    model_type = "typeseg"
    mark = rf"{_FIRST}A_log"
    configs = ("typeseg",)
    is_written = False

    def find(self, shapes: Shapes) -> dict[str, Any]:
        """As :meth:`FileFamily.find`."""
        vocab, d = shapes.of("Embed_0__embedding", 2)
        inner, n = shapes.of(f"{_FIRST}A_log", 2)
        if inner % d:
            raise CheckpointError(
                f"{shapes.file}: blocks are {inner} wide inside, which is no multiple of {d} outside."
            )
        mamba: dict[str, Any] = {
            "type": "mamba", "directions": 2, "tie_directions": "all", "combine_directions": "sum", "conv_padding": "same",
            "d_state": n, "d_conv": shapes.of(f"{_FIRST}Conv_0__kernel", 3)[2], "expand": inner // d,
            "dt_rank": shapes.of(f"{_FIRST}Dense_2__kernel", 2)[1], "bias": True, "conv_bias": True, "x_proj_bias": True,
            "dt_offset": 1e-4,
        }  # fmt: skip
        blocks = {found[1] for name in shapes if (found := _BLOCK.fullmatch(name))}
        sizes: dict[str, int] = {"n_layers": len(blocks), "num_classes": self.classes(shapes)} | {
            k: mamba[k] for k in _STATED
        }
        return {
            "task": "token_classification", "vocab_size": vocab, "n_classes": self.classes(shapes), "d_model": d,
            "layers": f"mamba * {len(blocks)}", "mixers": {"mamba": mamba}, "norm": {"type": "layernorm", "eps": 1e-6},
            "tokenizer": "ascii", "labels": self._labels(shapes, sizes),
        }  # fmt: skip

    def classes(self, shapes: Shapes) -> int:
        """As :meth:`FileFamily.classes`."""
        return shapes.of("Dense_0__bias", 1)[0]

    def _labels(self, shapes: Shapes, sizes: dict[str, int]) -> list[str] | None:
        """The names of the classes in the manifest beside a file, which must agree with the sizes of its arrays; ``None`` without any."""
        manifest = shapes.file.with_name("manifest.json")
        if not manifest.is_file():
            return None
        content = read_json(manifest)
        said = content.get("mamba")
        for key, value in {**content, **(said if isinstance(said, dict) else {})}.items():
            if key in sizes and value != sizes[key]:
                raise CheckpointError(
                    f"{manifest}: {key} is {value!r}, and the arrays of {shapes.file.name} make it {sizes[key]}. They are not one "
                    "model's."
                )
        labels = content.get("labels")
        if labels is None:
            return None
        if (
            not isinstance(labels, list)
            or not all(isinstance(x, str) for x in labels)
            or len(labels) != sizes["num_classes"]
        ):
            raise CheckpointError(
                f"{manifest}: labels is {shortened(labels)}, expected a list of {sizes['num_classes']} names."
            )
        return labels

    def keys(self, view: View) -> Iterator[Piece]:
        """Ours under Flax's names, which number the layers of each kind."""
        for ours, theirs in _ENDS.items():
            yield Piece(ours, theirs)
        for i in range(len(view.blocks)):
            for ours, theirs in _PARTS.items():
                yield Piece(f"backbone.layers.{i}.{ours}", f"CheckpointMambaBlock1D_{i}__{theirs}")

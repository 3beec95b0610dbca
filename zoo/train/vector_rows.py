"""Rows of vectors with their targets, from a pair of arrays or made one by one."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..digests import digest_rows
from ..terminal import counted

__all__ = ["MadeRows", "VectorExamples", "vectors_from"]


@runtime_checkable
class MadeRows(Protocol):
    """Rows that are made when they are asked for; the same ones whenever that is, in whichever process.

    Attributes:
        digest: A text that is another one for other rows.
    """

    digest: str

    def __len__(self) -> int:
        """Return their number."""

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's vectors, ``(l, inputs)``, and targets, ``(l, outputs)``, NaN where there is none."""


class _Rows:
    """Rows by number, as tensors."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        inputs, labels = (torch.from_numpy(np.array(x, dtype=np.float32)) for x in self.source[number])
        return {"inputs": inputs, "labels": labels}


class _Pair:
    """Rows of two arrays."""

    def __init__(self, inputs: np.ndarray, labels: np.ndarray):
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs[number], self.labels[number]


class VectorExamples(Dataset):
    """The rows that hold a target, ``{"inputs": (l, inputs) float32, "labels": (l, outputs) float32, "row": int64}``.

    Attributes:
        rows: All rows, by number.
        chosen: The numbers of those that are read.
        length: Places of a row.
        digest: Of what all of them hold.
        in_order: Whether they are read as they stand, since they are made when they are asked for.
        signs: Whether every target is -1 or 1, so that an answer is right or wrong; not asked of made rows.
        about: What there is to say of them, in lines.
        epoch: How often they were gone through.
    """

    def __init__(self, source: Any, chosen: Sequence[int] | np.ndarray, length: int, digest: str, signs: bool = False):
        self.rows, self.chosen, self.length, self.digest, self.epoch = _Rows(source), chosen, length, digest, 0
        self.in_order, self.signs = isinstance(chosen, range), signs
        self.about = [f"{counted(len(chosen), 'row')} of {length:,} vectors"]
        if (left := len(source) - len(chosen)) > 0:
            self.about.append(f"without a target, left out: {left:,}")

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = int(self.chosen[index])
        return self.rows[number] | {"row": torch.tensor(number)}

    def set_epoch(self, epoch: int) -> None:
        """Note which pass begins."""
        self.epoch = epoch


def vectors_from(data: Any, cfg: Any) -> VectorExamples:
    """Return the examples in some data for a model.

    Args:
        data: A pair of arrays ``(n, l, inputs)`` and ``(n, l, outputs)``, or :class:`MadeRows`.
        cfg: The model's config; its ``inputs`` and ``outputs`` are those of the data.

    Raises:
        ValueError: Data of another kind or size, with no target, or with numbers that are not finite; of made rows, the first is looked at.
    """
    if isinstance(data, tuple | list) and len(data) == 2:
        inputs, labels = map(np.asarray, data)
        _check(inputs, labels, cfg, 3)
        if (bad := ~np.isfinite(inputs).all((1, 2)) | np.isinf(labels).any((1, 2))).any():
            raise ValueError(
                f"data: row {int(bad.argmax())} has an input or a target that is infinite, or an input that is NaN, which says that there "
                "is no target, and only that. Clean the data."
            )
        chosen = np.flatnonzero(~np.isnan(labels).all((1, 2)))
        if not len(chosen):
            raise ValueError("data: no row holds a target; NaN stands for none.")
        digest = f"{digest_rows(inputs)} {digest_rows(labels)}"
        signs = bool((np.isnan(labels) | (np.abs(labels) == 1)).all())
        return VectorExamples(_Pair(inputs, labels), chosen, inputs.shape[1], digest, signs)
    if not isinstance(data, MadeRows) or not isinstance(data.digest, str):
        raise ValueError(
            f"data: expected a pair of arrays, (n, l, {cfg.inputs}) and (n, l, {cfg.outputs}), or rows made one by one (MadeRows), got "
            f"{type(data).__name__}."
        )
    if not len(data):
        raise ValueError("data: hold no row. Give one or more.")
    inputs, labels = map(np.asarray, data[0])
    _check(inputs, labels, cfg, 2)
    return VectorExamples(data, range(len(data)), len(inputs), f"{data.digest} {len(data)}")


def _check(inputs: np.ndarray, labels: np.ndarray, cfg: Any, dims: int) -> None:
    real = all(x.dtype.kind == "f" and x.ndim == dims and x.size for x in (inputs, labels))
    if not real or inputs.shape[:-1] != labels.shape[:-1]:
        letters = "n, l, " if dims == 3 else "l, "
        raise ValueError(
            f"data: expected floating-point arrays ({letters}{cfg.inputs}) and ({letters}{cfg.outputs}), got {inputs.dtype} of shape "
            f"{inputs.shape} and {labels.dtype} of shape {labels.shape}."
        )
    sizes = inputs.shape[-1], labels.shape[-1]
    if sizes != (cfg.inputs, cfg.outputs):
        raise ValueError(
            f"data: have {sizes[0]} numbers in a vector and {sizes[1]} in a target, and the config says inputs={cfg.inputs} "
            f"outputs={cfg.outputs}. Say inputs={sizes[0]} outputs={sizes[1]}."
        )

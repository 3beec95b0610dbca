"""Rows whose targets are given and need not be the tokens that follow: each label stands at the token whose logits are to say it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...layers.common import weight_dtype
from ..config.plain import first_line
from ..corpus.places import check_path
from ..corpus.rows import NO_TARGET
from ..digests import digest_rows
from ..errors import SourceError

__all__ = ["LabelledRows", "labelled_rows", "scores_of"]

# logits that are formed at once, in numbers
_AT_ONCE = 1 << 26


class LabelledRows(Dataset):
    """Training examples ``{"input_ids": (l,), "labels": (l + 1,)}`` from pairs of token ids and labels, both ``(l,)``.

    A model predicts the label behind a token, so labels are moved by one, and the one that nothing predicts is -100.

    Args:
        pairs: What gives the pair of a number, all of one length; or two tables ``(n, l)``, which are checked.
        n: Pairs.
        length: Tokens of each.
        vocab_size: Ids and labels are below it.
        digest: Of all pairs.
    """

    def __init__(self, pairs: Any, n: int, length: int, vocab_size: int, digest: str):
        self.pairs, self.n, self.length, self.vocab_size, self.digest = pairs, n, length, vocab_size, digest

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: x[0] for name, x in self.batch([index]).items()}

    def batch(self, numbers: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Return rows by their numbers, as a batch."""
        if isinstance(self.pairs, tuple):
            ids, labels = (table[numbers] for table in self.pairs)
        else:
            ids, labels = (np.stack(x) for x in zip(*map(self._made, numbers), strict=True))
            _check_ids(ids, labels, self.vocab_size)
        moved = torch.full((len(numbers), self.length + 1), NO_TARGET)
        moved[:, 1:] = torch.from_numpy(labels.astype(np.int64, copy=False))
        return {"input_ids": torch.from_numpy(ids.astype(np.int64, copy=False)), "labels": moved}

    def _made(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = (np.asarray(x) for x in self.pairs[number])
        if ids.shape != (self.length,) or labels.shape != ids.shape:
            raise ValueError(
                f"data: row {number:,} has ids of shape {ids.shape} and labels of shape {labels.shape}, and row 0 has {self.length} of "
                "both. Make all rows of one length; labels of -100 fill one up."
            )
        return ids, labels


def labelled_rows(data: Any, vocab_size: int) -> tuple[LabelledRows, Sequence[int] | np.ndarray] | None:
    """Return the rows of labelled data with the numbers of those that ask for something; ``None`` where data are of another kind.

    Args:
        data: A pair ``(input_ids, labels)`` of integers ``(n, l)``, a ``.npz`` file of two such arrays, or an object that makes rows when
            they are asked for: ``data[i]`` is a pair of arrays ``(l,)``, ``len(data)`` their number, and ``data.digest`` a text that
            says what they are. Labels are -100 where nothing is asked.
        vocab_size: Of the model.

    Raises:
        ValueError: Shapes that differ, no integers, ids outside the vocabulary, no label at all, or no digest.
    """
    if isinstance(data, str | os.PathLike):
        if Path(data).suffix.lower() != ".npz":
            return None
        data = _read_npz(check_path(data))
    if isinstance(data, tuple) and len(data) == 2 and all(np.ndim(x) == 2 for x in data):
        return _of_tables(np.asarray(data[0]), np.asarray(data[1]), vocab_size)
    if isinstance(data, Sequence | np.ndarray) or hasattr(data, "__array__"):
        return None
    missing = [name for name in ("__len__", "__getitem__", "digest") if not hasattr(data, name)]
    if missing:
        raise ValueError(
            f"data: a {type(data).__name__} has no {' and no '.join(missing)}. Rows that are made when they are asked for need a length, "
            "data[i] giving (input_ids, labels), and digest, a text that says what they are, to go on with an interrupted run."
        )
    if len(data) == 0:
        raise ValueError("data: there are no rows. Give at least one.")
    length = len(data[0][0])
    rows = LabelledRows(data, len(data), length, vocab_size, f"{data.digest} {len(data)}")
    rows[0]
    return rows, range(len(data))


def _of_tables(ids: np.ndarray, labels: np.ndarray, vocab_size: int) -> tuple[LabelledRows, np.ndarray]:
    if ids.shape != labels.shape or ids.size == 0 or {ids.dtype.kind, labels.dtype.kind} - set("iu"):
        raise ValueError(
            f"data: expected ids and labels of one shape (n, l), integers, and got {ids.dtype} {ids.shape} and {labels.dtype} "
            f"{labels.shape}. A label stands at the token whose logits are to say it, -100 where nothing is asked."
        )
    _check_ids(ids, labels, vocab_size)
    chosen = np.flatnonzero((labels != NO_TARGET).any(1))
    if not len(chosen):
        raise ValueError("data: no row asks for anything; every label is -100.")
    digest = f"{digest_rows(ids)} {digest_rows(labels)}"
    return LabelledRows((ids, labels), len(ids), ids.shape[1], vocab_size, digest), chosen


def _check_ids(ids: np.ndarray, labels: np.ndarray, vocab_size: int) -> None:
    low, high, asked = int(ids.min()), int(ids.max()), labels[labels != NO_TARGET]
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"data: token id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}. Set vocab_size."
        )
    if asked.size and not (int(asked.min()) >= 0 and int(asked.max()) < vocab_size):
        wrong = int(asked.min() if asked.min() < 0 else asked.max())
        raise ValueError(
            f"data: label {wrong} is outside the model's vocabulary of {vocab_size}, and none is -100. Set vocab_size."
        )


def _read_npz(file: Path) -> tuple[np.ndarray, np.ndarray]:
    names = ("input_ids", "labels")
    try:
        with np.load(file, allow_pickle=False) as found:
            if missing := [name for name in names if name not in found]:
                there = ", ".join(found) or "nothing"
                raise SourceError(
                    f"{file}: holds no {' and no '.join(missing)} (there is {there}). Write it with numpy.savez(file, input_ids=..., "
                    "labels=...)."
                )
            return found[names[0]], found[names[1]]
    except (OSError, SourceError):
        raise
    # a damaged archive ends in whatever the part of NumPy or of zipfile that meets it raises
    except Exception as e:
        raise SourceError(f"{file}: is no archive of NumPy arrays ({first_line(e)}). Write it with numpy.savez.") from e


def scores_of(hidden: Tensor, head: nn.Module, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Score what a model says where something is asked; logits of other tokens are not formed.

    Args:
        hidden: ``(b, l, d)``, what the head reads.
        head: The projection to logits.
        targets: ``(b, l)`` int64, -100 where nothing is asked.

    Returns:
        Per token, 0 where nothing is asked: the cross-entropy in nats, ``(b, l)`` float32, and 1 where the likeliest token is the
        target, ``(b, l)`` float32.
    """
    asked = targets != NO_TARGET
    picked, wanted = hidden[asked], targets[asked]
    nats, right = (torch.zeros(targets.shape, device=targets.device) for _ in range(2))
    size = max(1, _AT_ONCE // max(1, getattr(head, "out_features", 0) or 1))
    parts, dtype = [], weight_dtype(head)
    for h, t in zip(picked.split(size), wanted.split(size), strict=True):
        logits = head(h if dtype is None else h.to(dtype)).float()
        parts.append((F.cross_entropy(logits, t, reduction="none"), (logits.argmax(1) == t).float()))
    nats[asked], right[asked] = (torch.cat(x) for x in zip(*parts, strict=True))
    return nats, right

"""Rows of tokens for a training, from a path or a table."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..models.model import Model
from ..tokenizer import document_encoder
from .data import Rows, rows_from, rows_with_targets
from .digests import digest_rows

__all__ = ["Examples", "examples_from"]


class Examples(Dataset):
    """The rows of a table that hold something to predict, each with its number.

    Attributes:
        rows: All rows, by number.
        chosen: The numbers of those that are read, ``(n,)``.
        length: Tokens per row.
        digest: Of everything in them.
    """

    def __init__(self, table: np.ndarray):
        self.rows, self.chosen = Rows(table), rows_with_targets(table)
        self.length, self.digest = table.shape[1], digest_rows(table)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = int(self.chosen[index])
        return self.rows[number] | {"row": torch.tensor(number)}


def examples_from(data: Any, model: Model, length: int | None) -> Examples:
    """Return the examples in ``data``, a path or a table, for a model; what it cannot read is a ``ValueError``."""
    if isinstance(data, str | os.PathLike):
        default = min(512, model.cfg.max_length or 512)
        table = rows_from(Path(data), length, *document_encoder(model.tokenizer), default)
    else:
        table = np.asarray(data)
    if table.ndim != 2 or table.dtype.kind not in "iu" or table.shape[0] == 0 or table.shape[1] < 2:
        raise ValueError(
            f"data: expected a path, or a table (n, l) of integers with l >= 2, got {table.dtype} of shape {table.shape}. "
            "Use hybridzoo.zoo.train.data.pack to make one."
        )
    if (highest := max(int(table.max()), ~int(table.min()))) >= model.cfg.vocab_size:
        raise ValueError(
            f"data: token id {highest} is outside the model's vocabulary of {model.cfg.vocab_size}. Set vocab_size, or "
            f"tokenize with the config's tokenizer ({model.cfg.tokenizer})."
        )
    examples = Examples(table)
    if not len(examples):
        raise ValueError("data: no row holds anything to predict; ids below 0 stand for tokens that are only read.")
    return examples

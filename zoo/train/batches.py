"""Batches of examples: what a model takes of them, what there is to predict in them, and how they are made of one size."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...kernels.seq import Seq
from ..models.loss import IGNORE
from .examples import Examples

__all__ = ["Batch", "Whole", "filled", "model_inputs", "targets"]

Batch = dict[str, Tensor]


def model_inputs(batch: Batch, most: int | None = None) -> dict[str, Any]:
    """Return the arguments of a model for a batch, whose rows hold at most ``most`` documents."""
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "labels")}
    if (documents := batch.get("documents")) is not None:
        piece = batch["labels"].shape[1] > documents.shape[1]
        lengths, l = (documents >= 0).sum(1), documents.shape[1]
        inputs["seq"] = Seq.from_lengths(lengths, l) if piece else Seq.from_documents(documents, most=most)
    return inputs


def targets(batch: Batch) -> Tensor:
    """The tokens to predict, ``(b, l - 1)`` int64, as the model finds them; of pieces of documents, ``(b, l)``; -100 where is none."""
    following, documents = batch["labels"][:, 1:], batch.get("documents")
    if documents is None or documents.shape == following.shape:
        return following
    outside = (documents[:, 1:] != documents[:, :-1]) | (documents[:, 1:] < 0)
    return following.masked_fill(outside, IGNORE)


def filled(batch: Batch, rows: int) -> Batch:
    """Return a batch of ``rows`` rows: those of ``batch``, and its first one again, with nothing to predict in it."""
    b = batch["input_ids"].shape[0]
    more = {name: x[:1].expand(rows - b, *x.shape[1:]) for name, x in batch.items()}
    more["labels"] = torch.full_like(more["labels"], IGNORE)
    return {name: torch.cat([x, more[name]]) for name, x in batch.items()}


class Whole(Dataset):
    """Examples, and behind them rows with nothing to predict, up to a multiple of ``size``: all batches and processes have as many.

    Without them, whoever deals batches out to processes would give some rows to two of them.
    """

    def __init__(self, examples: Examples, size: int):
        self.examples, self.size = examples, size

    def __len__(self) -> int:
        return -(-len(self.examples) // self.size) * self.size

    def __getitem__(self, index: int) -> Batch:
        if index < len(self.examples):
            return self.examples[index]
        first = self.examples[0]
        return first | {"labels": torch.full_like(first["labels"], IGNORE)}

    def set_epoch(self, epoch: int) -> None:
        """Note which pass begins."""
        self.examples.set_epoch(epoch)

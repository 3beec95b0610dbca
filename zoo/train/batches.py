"""Batches of examples, and how they are made of one size."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..models.loss import IGNORE

__all__ = ["Batch", "Whole", "collated", "evaluation_batches", "filled"]

Batch = dict[str, Tensor]


def filled(batch: Batch, rows: int) -> Batch:
    """Return a batch of ``rows`` rows: those of ``batch``, and its first one again, with nothing to predict in it."""
    b = batch["labels"].shape[0]
    more = {name: x[:1].expand(rows - b, *x.shape[1:]) for name, x in batch.items()}
    # labels are numbers of classes, the probability of each, (b, n), or values along a row, (b, l, n)
    shares = more["labels"].is_floating_point() and more["labels"].dim() == 2
    more["labels"] = torch.zeros_like(more["labels"]) if shares else _nothing(more["labels"])
    return {name: torch.cat([x, more[name]]) for name, x in batch.items()}


def collated(rows: Any) -> Batch:
    """Return a list of examples as a batch; what is one already stays as it is."""
    return rows if isinstance(rows, dict) else {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Whole(Dataset):
    """Examples, and behind them rows with nothing to predict, up to a multiple of ``size``: all batches and processes have as many.

    Without them, whoever deals batches out to processes would give some rows to two of them.
    """

    def __init__(self, examples: Any, size: int):
        self.examples, self.size = examples, size

    def __len__(self) -> int:
        return -(-len(self.examples) // self.size) * self.size

    def __getitem__(self, index: int) -> Batch:
        # of examples that draw, an index beyond the last is one of a later pass
        if index >= 0 and (index < len(self.examples) or getattr(self.examples, "draws", False)):
            return self.examples[index]
        first = self.examples[0]
        return first | {"labels": _nothing(first["labels"])}

    def __getitems__(self, indices: list[int]) -> Any:
        # several at once, where the examples give them so
        several = getattr(self.examples, "__getitems__", None)
        if several is not None and 0 <= min(indices) and max(indices) < len(self.examples):
            return several(indices)
        return [self[index] for index in indices]

    def set_epoch(self, epoch: int) -> None:
        """Note which pass begins."""
        self.examples.set_epoch(epoch)


def _nothing(labels: Tensor) -> Tensor:
    """Labels of that shape which are no targets."""
    return torch.full_like(labels, math.nan if labels.is_floating_point() else IGNORE)


@contextlib.contextmanager
def evaluation_batches(trainer: Any) -> Iterator[Iterator[Batch]]:
    """The batches of a Trainer's evaluation set, on its device; within the block the model evaluates, without gradients."""
    model, size = trainer.model, trainer.args.eval_batch_size * trainer.args.world_size
    training = model.training
    model.eval()
    # the loader draws a seed; what is drawn here, training must not miss
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        yield map(trainer._prepare_inputs, trainer.get_eval_dataloader(Whole(trainer.eval_dataset, size)))
    model.train(training)

"""The order in which a training reads its rows."""

from collections.abc import Iterator, Sized
from typing import Any, Protocol

import torch
from torch.utils.data import Sampler

from ..corpus.lanes import Lanes
from .batches import Whole

__all__ = ["Epochs", "InOrder", "Shuffled", "Then", "order_of"]

_AT_ONCE = 4096


class Epochs(Sized, Protocol):
    """A data set that is told how often it was gone through: accelerate tells samplers or data sets, but not always the same of both."""

    epoch: int


def order_of(data: Epochs | Whole, seed: int) -> Sampler[int]:
    """Return the order in which a training reads its data."""
    if isinstance(data, Whole):
        return Then(order_of(data.examples, seed), len(data), _draws(data.examples))
    return InOrder(data) if isinstance(data, Lanes) or getattr(data, "in_order", False) else Shuffled(data, seed)


class Shuffled(Sampler[int]):
    """All rows in an order that follows from seed and epoch alone.

    It is that of accelerate's ``SeedableRandomSampler`` without a list of all of them, and known in every process and after a resumption,
    wherever the samplers that were wrapped around it have lost the number of the epoch. Where examples draw (images that are changed), the
    index says the epoch too: ``epoch * len(data) + number``.
    """

    def __init__(self, data: Epochs, seed: int):
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another pass."""
        self.data.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        drawn_by = torch.Generator().manual_seed(self.seed + self.data.epoch)
        first = self.data.epoch * len(self.data) if _draws(self.data) else 0
        for some in torch.randperm(len(self.data), generator=drawn_by).split(_AT_ONCE):
            yield from (first + some).tolist()


class InOrder(Sampler[int]):
    """The items of data that have an order of their own, pass after pass; those of a later pass may have numbers of their own."""

    def __init__(self, data: Epochs):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        """Go through another pass."""
        self.data.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first = self.data.epoch * len(self.data) if _draws(self.data) else 0
        return iter(range(first, first + len(self.data)))


class Then(Sampler[int]):
    """An order, and behind all of it the numbers that are left up to ``total``; or -1 as often, where numbers go on with the next pass."""

    def __init__(self, order: Any, total: int, goes_on: bool = False):
        self.order, self.total, self.goes_on = order, total, goes_on

    def __len__(self) -> int:
        return self.total

    def set_epoch(self, epoch: int) -> None:
        """Go through another pass."""
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        left = range(len(self.order), self.total)
        yield from (-1 if self.goes_on else number for number in left)


def _draws(data: Any) -> bool:
    """Return whether data are others in every pass, and told by the index which one it is: who reads ahead hears of nothing else."""
    return getattr(data, "draws", False)

"""Experts balanced over all parts of an accumulated step, as if it were one batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...layers.moe import MoE
from .batches import Batch
from .feed import Feed
from .options import TrainOptions

__all__ = ["Balance", "is_counted_first"]


def is_counted_first(model: torch.nn.Module, options: TrainOptions) -> bool:
    """Return whether the loss of a step's parts depends on how experts share the tokens of all of them."""
    if options.accumulate == 1 or options.carry_state:
        return False
    return any(isinstance(m, MoE) and m.aux_loss_coef for m in model.modules())


class Balance:
    """Counts what tokens choose in all parts of a step, in a forward of its own, before the first of them is trained on.

    The balance loss is linear in the mean probabilities, whose gradients parts can add up; the choices that they are multiplied with are
    those of the whole step, and no part knows them.

    Args:
        model: The model as transformers calls it.
        feed: What it reads.
        examples: What it is trained on.
        across: What averages choices over processes, if there are several.
    """

    def __init__(self, model: Any, feed: Feed, examples: Any, across: Callable[[Tensor], Tensor] | None):
        self.model, self.feed, self.examples, self.across = model, feed, examples, across
        # of every group of layers that are balanced together; a recorded step reads them where they are
        self.choices: list[Tensor] = []
        self.turn = 0

    def count(self, parts: list[Batch]) -> None:
        """Count the choices in the parts of a step, and have them taken in place of those of each part."""
        tokens = [self.feed.weight(part) for part in parts]
        shares = [n / sum(tokens) for n in tokens]
        # of every group, what each part chooses
        groups = zip(*map(self._of, parts), strict=True)
        total: list[Any] = [sum(x * share for x, share in zip(group, shares, strict=True)) for group in groups]
        total = total if self.across is None else [self.across(x) for x in total]
        if not self.choices:
            self.choices = total
        for kept, x in zip(self.choices, total, strict=True):
            kept.copy_(x)
        self.model.core.batch_mean = self._of_the_step

    def _of(self, part: Batch) -> list[Tensor]:
        found: list[Tensor] = []

        def note(choices: Tensor) -> Tensor:
            found.append(choices)
            return choices

        self.model.core.batch_mean = note
        inputs = self.feed.silent(part, self.examples)
        # what layers draw here, training must not miss
        with torch.random.fork_rng(_drawing(part)), torch.no_grad():
            self.model.train()
            self.model(**inputs)
        return found

    def _of_the_step(self, choices: Tensor) -> Tensor:
        self.turn = (self.turn + 1) % len(self.choices)
        return self.choices[self.turn - 1]


def _drawing(part: Batch) -> list[torch.device]:
    device = part["labels"].device
    return [device] if device.type == "cuda" else []

"""Losses as they come, on the device: their sum, what of them is not finite, and whether they rise for good."""

import dataclasses

import torch
from torch import Tensor

__all__ = ["Seen", "Told", "Watch"]

# of a mean of losses, the share of the newest one: some ten steps count
_NEWEST = 0.1
# of the rise at which a training stops, the share from which on it is known to rise
_RISING = 0.25


@dataclasses.dataclass
class Seen:
    """A step: the rows of its batches, its loss, and the norm of its gradient."""

    rows: list[Tensor]
    loss: Tensor
    norm: Tensor


@dataclasses.dataclass(frozen=True)
class Told:
    """Answers of one process.

    Attributes:
        total: The sum of the losses since the step that was logged last.
        bad: Whether a step must not be taken; ``good`` steps since the last question came before it.
        good: See ``bad``.
        wish: Whether this process is asked to stop.
        mean: Of the last losses, the newest counting most; infinite before the first.
        lowest: The least that ``mean`` has been, after step ``lowest_at``.
        lowest_at: See ``lowest``.
    """

    total: float
    bad: float
    good: float
    wish: float
    mean: float
    lowest: float
    lowest_at: float


class Watch:
    """Adds up losses and notices what must not go on, on the device; the host asks when something is logged or saved.

    From the first step on that is not finite, or whose loss has risen too far, ``bad`` is 1, and the optimiser, which reads it on the
    device, changes no weight: the model is then still the one that this step started from.

    Args:
        device: Of the losses.
        spike: Nats that the mean of the losses may rise above the lowest that it has been; 0 for any.
        start: What an earlier watch told at a checkpoint: ``total, mean, lowest, lowest_at``, the last three only if it minded rises.
        step: The step of that checkpoint.
        logged: The step that was logged last.
    """

    def __init__(
        self, device: torch.device, spike: float = 0.0, start: tuple[float, ...] = (), step: int = 0, logged: int = 0
    ):
        nowhere = float("inf")
        values = (*start, *(0.0, nowhere, nowhere, 0.0)[len(start) :])
        self.sum, self.mean, self.lowest, self.lowest_at = (torch.full((), x, device=device) for x in values)
        self.bad, self.good = (torch.zeros((), device=device) for _ in range(2))
        self.spike, self.asked, self.logged = spike, step, logged
        # since the last question
        self.steps: list[Seen] = []
        self.rows: list[Tensor] = []
        self.loss: Tensor | None = None

    def read(self, rows: Tensor, loss: Tensor) -> None:
        """Take in a batch, or a part of one."""
        self.rows.append(rows)
        self.loss = loss if self.loss is None else self.loss + loss

    def differentiated(self, norm: Tensor) -> None:
        """Take in the norm of the gradient that a step is about to use."""
        assert self.loss is not None
        self.steps.append(Seen(self.rows, self.loss, norm))
        wrong = ~(torch.isfinite(self.loss) & torch.isfinite(norm))
        if self.spike:
            wrong |= self._rises(self.loss)
        self.bad.copy_(torch.maximum(self.bad, wrong.to(self.bad.dtype)))
        self.good += 1 - self.bad
        self.sum += self.loss
        self.rows, self.loss = [], None

    def _rises(self, loss: Tensor) -> Tensor:
        mean = torch.where(torch.isinf(self.mean), loss, self.mean.lerp(loss.to(self.mean.dtype), _NEWEST))
        # what is told of a step that was not taken is of that step
        self.mean.copy_(torch.where(self.bad > 0, self.mean, mean))
        self.lowest_at.masked_fill_(self.mean < self.lowest, self.asked + len(self.steps))
        self.lowest.copy_(torch.minimum(self.mean, self.lowest))
        return self.mean > self.lowest + self.spike

    def tell(self, wish: bool) -> dict[str, Tensor]:
        """Return the fields of :class:`Told`, for the host to read."""
        wished = torch.full_like(self.sum, float(wish))
        values = (self.sum, self.bad, self.good, wished, self.mean, self.lowest, self.lowest_at)
        return {field.name: x for field, x in zip(dataclasses.fields(Told), values, strict=True)}

    def kept(self, told: Told) -> list[float]:
        """Return of an answer what a later watch starts from."""
        return [told.total, *((told.mean, told.lowest, told.lowest_at) if self.spike else ())]

    def forget(self) -> None:
        """Start anew with the steps that the next question is about."""
        self.asked += len(self.steps)
        self.steps.clear()
        self.good.zero_()

    def risen_since(self, told: list[Told]) -> int | None:
        """The step from which on the losses rise; ``None`` where they do not."""
        rising = [one for one in told if self.spike and one.mean > one.lowest + _RISING * self.spike]
        return int(min(one.lowest_at for one in rising)) if rising else None

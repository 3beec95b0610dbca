"""Going back: marks of a model's state, and the last ones of a state that is stepped on.

A mark copies what recurrent layers keep, and of attention the length: it costs what a step writes, needs nothing of a mixer, and goes back
to the very bits. To keep layers' inputs instead and to replay them would take fewer bytes, but one more way through every mixer, whose
sums are those of the first way only where both cut a row alike.
"""

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...layers.base import each_state, nbytes_of, paired, shapes
from ...layers.common import is_captured

__all__ = ["Mark", "Marks"]


@dataclass(repr=False, eq=False)
class Mark:
    """A place in what the rows of a state have read, which :meth:`ModelState.back` goes back to.

    Attributes:
        layers: What the layers need for it.
        tokens: ``(b,)`` int64, real tokens seen there by each row.
    """

    layers: tuple[Any, ...]
    tokens: Tensor
    _void: Tensor = field(init=False)  # (b,) bool, on the CPU: rows that have left the way on which it stands

    def __post_init__(self) -> None:
        self._void = torch.zeros(len(self.tokens), dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Bytes held for all layers."""
        return nbytes_of(self.layers)

    __repr__ = shapes


class Marks:
    """The marks of one state: those that were handed out, and its own of the last steps.

    Attributes:
        most: How many steps can be taken back.
    """

    def __init__(self) -> None:
        self.most = 0
        self._given: list[weakref.ref[Mark]] = []
        self._recent: deque[Mark] = deque()
        self._depth: Tensor | None = None  # (b,) steps that each row can take back

    def new(self, state: Any) -> Mark:
        """Return a mark of where the state is."""
        mark = self._copy(state)
        self._given = [ref for ref in self._given if ref() is not None] + [weakref.ref(mark)]
        return mark

    def keep(self, most: int) -> None:
        """Keep a mark in front of each of the last ``most`` steps from now on."""
        if most < 0:
            raise ValueError(f"ModelState.keep({most}): is negative. Give the steps that may be taken back, 8 say.")
        self.most, self._depth, self._recent = most, None, deque(maxlen=most)

    def before_step(self, state: Any) -> None:
        """Keep a mark, where some are to be kept."""
        if not self.most:
            return
        if is_captured(state.tokens):
            raise RuntimeError(
                f"ModelState.keep({self.most}): a CUDA graph does not keep marks when it is replayed. Use mark() between replays."
            )
        self._recent.append(self._copy(state))
        depth = torch.zeros(len(state.tokens), dtype=torch.long) if self._depth is None else self._depth
        self._depth = (depth + 1).clamp(max=self.most)

    def back(self, state: Any, mark: Mark, rows: Tensor | None) -> None:
        """Take a state back to a mark, in all rows or some."""
        here = torch.ones_like(mark._void) if rows is None else rows.cpu()
        if all(ref() is not mark for ref in self._given):
            raise ValueError(
                "mark: was taken of another state. A state goes back to its own marks; a clone or a reordered state has none yet."
            )
        if here.shape != mark._void.shape or here.dtype != torch.bool:
            raise ValueError(
                f"rows: expected {tuple(mark._void.shape)} bool, got {tuple(here.shape)} {here.dtype}. Say of every row if it goes back."
            )
        if bool((mark._void & here).any()):
            row = int((mark._void & here).nonzero()[0])
            raise ValueError(
                f"mark: row {row} has gone back to before it, or is another's by now. Go on in several ways from clones of a state."
            )
        _back(state, mark, rows)
        if self._depth is not None:
            self._depth = self._depth.masked_fill(here, 0)
        self._leave(state, here)

    def roll_back(self, state: Any, steps: int | Tensor) -> None:
        """Take back a state's last steps, as many of each row as ``steps`` says."""
        depth = torch.zeros(len(state.tokens), dtype=torch.long) if self._depth is None else self._depth
        counts = torch.as_tensor(steps).cpu()
        if counts.shape not in ((), (1,), depth.shape) or counts.dtype == torch.bool:
            raise ValueError(
                f"steps: expected a number, or {tuple(depth.shape)} integers, got {tuple(counts.shape)} {counts.dtype}. Say how many "
                "steps of each row are taken back."
            )
        counts = counts.expand(len(depth)).clone()
        if counts.is_floating_point() or bool(((counts < 0) | (counts > depth)).any()):
            row = int(((counts < 0) | (counts > depth)).nonzero()[0]) if not counts.is_floating_point() else 0
            raise ValueError(
                f"steps: {counts[row].item()} of row {row}, which can take {int(depth[row])} back. Call keep({max(8, self.most)}) or more "
                "before the steps; what a forward reads at once goes back through mark()."
            )
        past, several = list(reversed(self._recent)), bool((counts != counts[:1]).any())
        if not several and len(counts) and int(counts[0]):
            n = int(counts[0])
            _back(state, past[n - 1], None)
            self._recent = deque(reversed(past[n:]), maxlen=self.most)
        elif several:
            ways = [(n, (counts == n).to(state.tokens.device)) for n in counts.unique().tolist() if n]
            for n, rows in ways:
                _back(state, past[n - 1], rows)
            # of a row that went back n, the mark before last n others is the last
            for i, mine in enumerate(past):
                for n, rows in ways:
                    if i + n < len(past):
                        _take(mine, rows, past[i + n])
        self._depth = depth - counts
        self._leave(state, counts > 0)

    def void(self, rows: Tensor | None) -> None:
        """Let no mark be of these rows, ``(m,)`` int64, or of any: they are others' now."""
        at = slice(None) if rows is None else rows.cpu()
        for mark in filter(None, (ref() for ref in self._given)):
            mark._void[at] = True
        if self._depth is not None:
            self._depth[at] = 0

    def _leave(self, state: Any, rows: Tensor) -> None:
        tokens = state.tokens.cpu()
        for mark in filter(None, (ref() for ref in self._given)):
            mark._void |= rows & (mark.tokens.cpu() > tokens)

    @staticmethod
    def _copy(state: Any) -> Mark:
        return Mark(each_state(state.layers, lambda layer: layer.mark()), state.tokens.clone())


def _back(state: Any, mark: Mark, rows: Tensor | None) -> None:
    rows = None if rows is None else rows.to(state.tokens.device)
    for mine, theirs in paired(state.layers, mark.layers):
        mine.back(theirs, rows)
    state.tokens.copy_(mark.tokens if rows is None else torch.where(rows, mark.tokens, state.tokens))


def _take(mark: Mark, rows: Tensor, other: Mark) -> None:
    for mine, theirs in paired(mark.layers, other.layers):
        mine.take(rows, theirs)
    mark.tokens.copy_(torch.where(rows, other.tokens, mark.tokens))

"""The state that sequences leave behind in a whole model: one state per residual block, and how many tokens made it."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...layers.base import copy_state, map_state, nbytes_of, shapes, tree

__all__ = ["ModelState", "StateCache"]


@dataclasses.dataclass(repr=False)
class ModelState:
    """The state of every block after some tokens, as ``out.state`` holds it.

    Attributes:
        layers: One entry per residual block: a mixer's state, a tuple of them (parallel mixers), or ``()``.
        tokens: ``(b,)`` int64, real tokens seen so far by each row.
    """

    layers: tuple[Any, ...]
    tokens: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> "ModelState":
        """A new state with ``fn`` applied to every tensor; the batch is the first dimension of each."""
        return ModelState(map_state(self.layers, fn), fn(self.tokens))

    def detach(self) -> "ModelState":
        """The same values, cut off from the graph: for truncated backpropagation through time."""
        return self.map(torch.Tensor.detach)

    def clone(self) -> "ModelState":
        """A copy that later steps on this state do not touch."""
        return self.map(torch.Tensor.clone)

    def reorder(self, rows: Tensor) -> "ModelState":
        """The states of the given rows, ``(m,)`` int64, in that order: beam search, or a batch that changes."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def copy_(self, other: "ModelState") -> None:
        """Take over another state's values in place."""
        copy_state(self.layers, other.layers)
        self.tokens.copy_(other.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return nbytes_of(self.layers)

    __repr__ = shapes


@dataclasses.dataclass(repr=False, eq=False)
class StateCache:
    """The cache that ``generate`` hands from step to step: a :class:`ModelState`, under the name that transformers gives its caches.

    A call makes a new one and leaves the one it was given as it is, so a prompt read once can be continued in several ways.
    """

    state: ModelState | None = None
    length: int = 0

    is_compileable: ClassVar = False
    is_croppable: ClassVar = False  # tokens cannot be taken out of a state again
    is_linear: ClassVar = (False,)  # its length counts: generate passes on the columns alone that have not been read
    __repr__ = shapes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the input that have been read, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, for beam search."""
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, to continue one prompt several times."""
        if self.state is not None:
            rows = torch.arange(self.state.tokens.shape[0], device=self.state.tokens.device)
            self.reorder_cache(rows.repeat_interleave(repeats))


tree(ModelState)
tree(StateCache)

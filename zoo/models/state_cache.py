"""The cache that transformers' ``generate`` hands from step to step: a state, and the last columns of which some may be taken back."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...layers.base import shapes, tree
from .state import ModelState

__all__ = ["StateCache"]

# columns that are read again in front of the next ones; more are read by themselves
_AGAIN = 32


@dataclasses.dataclass(repr=False, eq=False)
class StateCache:
    """A :class:`ModelState`, under the name that transformers gives its caches.

    A call makes a new one and leaves the one it was given as it is, so a prompt read once can be continued in several ways. Assisted
    decoding takes columns back (:meth:`crop`): the cache keeps the state in front of them, and those that stay are read again with the
    next ones.

    Attributes:
        state: What was read, but for ``waiting``.
        length: Columns of the input that have been read, padding included.
        waiting: Ids and mask, ``(b, m)`` each, of columns behind the state that are to be read again.
        recording: Whether columns can be taken back.
        base: While recording, the state that they can be taken back to.
        since: Ids and mask of the columns behind that.
    """

    state: ModelState | None = None
    length: int = 0
    waiting: tuple[Tensor, Tensor] | None = None
    recording: bool = False
    base: ModelState | None = None
    since: tuple[Tensor, Tensor] | None = None

    is_compileable: ClassVar = False
    is_linear: ClassVar = (False,)  # its length counts: generate passes on the columns alone that have not been read
    __repr__ = shapes

    @property
    def is_croppable(self) -> bool:
        """True after :meth:`activate_past_recording`, where columns can be taken back."""
        return self.recording

    @property
    def tokens(self) -> Tensor | None:
        """Real tokens that were read of each row, ``(b,)`` int64; ``None`` before the first."""
        seen = None if self.state is None else self.state.tokens
        if self.waiting is not None:
            again = (self.waiting[1] != 0).sum(1)
            seen = again if seen is None else seen + again
        return seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the input that have been read, padding included."""
        return self.length

    def activate_past_recording(self) -> None:
        """From here on, let columns be taken back."""
        self.recording, self.base, self.since = True, self.state, self.waiting

    def crop(self, columns: int) -> None:
        """Take columns back: ``-columns`` of them, or, where it is positive, as older versions of transformers have it, all but so many.

        Nothing in front of what stays now can be taken back later.

        Raises:
            ValueError: They are not recorded.
        """
        length = columns if columns > 0 else self.length + columns
        gone = self.length - length
        behind = 0 if self.since is None else self.since[0].shape[1]
        if not self.recording or not 0 <= gone <= behind:
            raise ValueError(
                f"crop({columns}): of {self.length} columns, the last {behind if self.recording else 0} can be taken back. Call "
                "activate_past_recording() before they are read."
            )
        if gone:
            self.state, self.length = self.base, length
            self.waiting = _columns(self.since, slice(behind - gone))
        self.base, self.since = self.state, self.waiting

    def settled(self, core: Any) -> "StateCache":
        """The same with nothing waiting, read by the model ``core`` where something was."""
        if self.waiting is None:
            return self
        state = _read(core, self.waiting, self.state)
        return dataclasses.replace(self, state=state, waiting=None, base=state, since=None)

    def prepared(
        self, core: Any, ids: Tensor, mask: Tensor | None, keep: int | Tensor
    ) -> tuple["StateCache", Tensor, Tensor | None, int | Tensor]:
        """The cache to continue from when columns are to be read, these columns with those that wait, and the logits to keep."""
        again = 0 if self.waiting is None else self.waiting[0].shape[1]
        if again > _AGAIN:
            return self.settled(core), ids, mask, keep
        if self.waiting is not None:
            mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
            keep = (keep or ids.shape[1]) if isinstance(keep, int) else keep + again
            ids, mask = (
                torch.cat([old.to(new.dtype), new], 1) for old, new in zip(self.waiting, (ids, mask), strict=True)
            )
            front = dataclasses.replace(self, waiting=None, length=self.length - again, since=None)
            return front, ids, mask, keep
        first = ids.shape[1] - _AGAIN
        if self.recording and self.state is None and first > _AGAIN and isinstance(keep, int) and 0 < keep <= _AGAIN:
            # a prompt's last columns are guesses, and the others are not to be read again
            mask = torch.ones_like(ids) if mask is None else mask
            state = _read(core, (ids[:, :first], mask[:, :first]), None)
            front = dataclasses.replace(self, state=state, length=first, base=state, since=None)
            return front, ids[:, first:], mask[:, first:], keep
        return self, ids, mask, keep

    def after(self, state: ModelState, length: int, ids: Tensor | None, mask: Tensor | None) -> "StateCache":
        """The cache that follows this one, with nothing waiting, when ``length`` more columns have been read."""
        new = StateCache(state, self.length + length, recording=self.recording)
        if self.recording and ids is not None:
            columns = ids, torch.ones_like(ids) if mask is None else mask.to(ids.device)
            pairs = zip(self.since or (), columns, strict=True) if self.since else ((part,) for part in columns)
            ids, mask = (torch.cat([p.to(pair[-1].dtype) for p in pair], 1) for pair in pairs)
            new.base, new.since = self.base, (ids, mask)
        elif self.recording:
            new.base = state  # of embeddings, which are not kept
        return new

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, for beam search."""
        self.state, self.base = (None if s is None else s.reorder(beam_idx) for s in (self.state, self.base))
        self.waiting, self.since = (_columns(c, slice(None), beam_idx) for c in (self.waiting, self.since))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, to continue one prompt several times."""
        if (seen := self.tokens) is not None:
            self.reorder_cache(torch.arange(len(seen), device=seen.device).repeat_interleave(repeats))


def _columns(
    columns: tuple[Tensor, Tensor] | None, at: slice, rows: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    if columns is None or not columns[0][:, at].shape[1]:
        return None
    ids, mask = (t[:, at] if rows is None else t[:, at][rows.to(t.device)] for t in columns)
    return ids, mask


def _read(core: Any, columns: tuple[Tensor, Tensor], state: ModelState | None) -> ModelState:
    ids, mask = columns
    return core(ids, None, mask, state=state, return_state=True, logits_to_keep=1).state


tree(StateCache)

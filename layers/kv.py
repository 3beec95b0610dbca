"""The state of attention: the keys and values it may still look at, in slots that wrap around under a window."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Seq, State
from .common import is_captured

__all__ = ["AttentionMark", "AttentionState", "remember"]


@dataclass
class AttentionMark(State):
    """A place in a sequence to go back to: its length alone, unless later tokens overwrite earlier ones' slots under a window.

    Attributes:
        length: ``(b,)`` int64.
        conv: As in the state.
        k, v, pos: As in the state under a window; ``None`` without one.
        slots: The slots that the state had, and its ``bound``.
    """

    length: Tensor
    conv: Tensor | None
    k: Tensor | None
    v: Tensor | None
    pos: Tensor | None
    slots: int
    bound: int

    def take(self, rows: Tensor, other: "AttentionMark") -> None:
        """As :meth:`State.take`, from one that is no later."""
        super().take(rows, other.padded(self.slots))

    def padded(self, slots: int) -> "AttentionMark":
        """The same with more slots under a window, which are empty."""
        if self.k is None or self.v is None or self.pos is None or slots <= self.slots:
            return self
        k, v, pos = _grown(self.k, self.v, self.pos, slots - self.slots)
        return replace(self, k=k, v=v, pos=pos, slots=slots)


@dataclass
class AttentionState(State):
    """The keys and values of a sequence: position ``i`` is in slot ``i % cap``.

    A state grows as needed, up to the window if there is one; ``init_state(batch, max_len)`` reserves slots in advance.

    Attributes:
        k: ``(b, cap, h_kv, p)``, rotated.
        v: ``(b, cap, h_kv, p)``.
        pos: ``(b, cap)`` int64, the position in each slot, -1 where it is empty.
        length: ``(b,)`` int64, tokens seen.
        conv: ``(b, d_conv - 1, (h + 2 h_kv) p)``, the last inputs of the convolution; ``None`` without one.
        bound: An upper bound of ``length`` that is known without asking the device, -1 if there is none; 0 means empty.
        window: The most tokens that are looked at; 0 for all.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    length: Tensor
    conv: Tensor | None = None
    bound: int = -1
    window: int = 0

    @property
    def used(self) -> int:
        """The slots that may be taken are those below this."""
        # a replayed graph moves on without the bound
        cap = self.k.shape[1]
        return cap if self.bound < 0 or is_captured(self.k) else min(self.bound, cap)

    @property
    def longest(self) -> int:
        """Tokens of the longest row; this asks the device."""
        return int(self.length.max()) if self.length.numel() else 0

    def restarted(self, rows: Tensor) -> "AttentionState":
        """As :meth:`State.restarted`: with no key in any slot."""
        new = super().restarted(rows)
        return replace(new, pos=self.pos.masked_fill(rows[:, None], -1))

    def put(self, rows: Tensor, other: "AttentionState") -> None:
        """As :meth:`State.put`; slots that the other has not are empty, and those that it uses and this one has not are made."""
        if (more := other.used - self.k.shape[1]) > 0:
            self._grow(more)
        cap = min(other.k.shape[1], self.k.shape[1])
        for name, mine in self.tensors():
            theirs = getattr(other, name)
            if name in ("k", "v", "pos") and theirs.shape[1] != mine.shape[1]:
                empty = torch.full_like(mine[:1], -1 if name == "pos" else 0).expand(len(rows), *mine.shape[1:]).clone()
                empty[:, :cap] = theirs[:, :cap]
                theirs = empty
            mine.index_copy_(0, rows, theirs)
        self.bound = -1 if min(self.bound, other.bound) < 0 else max(self.bound, other.bound)

    def take(self, rows: Tensor, other: "AttentionState") -> None:
        """As :meth:`State.take`; slots that this one has not are made, but while a graph is captured: there they must be empty."""
        cap = self.k.shape[1]
        if (more := other.k.shape[1] - cap) > 0:
            if is_captured(self.k):
                other = replace(other, k=other.k[:, :cap], v=other.v[:, :cap], pos=other.pos[:, :cap])
            else:
                self._grow(more)
        super().take(rows, other)
        self.bound = -1 if min(self.bound, other.bound) < 0 else max(self.bound, other.bound)

    def mark(self) -> AttentionMark:
        """As :meth:`State.mark`."""
        conv = None if self.conv is None else self.conv.clone()
        k, v, pos = (t.clone() if self.window else None for t in (self.k, self.v, self.pos))
        return AttentionMark(self.length.clone(), conv, k, v, pos, self.k.shape[1], self.bound)

    def back(self, mark: AttentionMark, rows: Tensor | None = None) -> None:  # type: ignore[override]
        """As :meth:`State.back`: the keys and values behind the mark are cut off, and those that a window has overwritten are back."""
        if mark.k is None:
            length = mark.length if rows is None else torch.where(rows, mark.length, self.length)
            gone = self.pos >= length[:, None]
            # an empty slot is read with weight zero: it must not hold NaN
            self.k.masked_fill_(gone[..., None, None], 0)
            self.v.masked_fill_(gone[..., None, None], 0)
            self.pos.masked_fill_(gone, -1)
        elif rows is not None:
            mark = mark.padded(self.k.shape[1])
        if rows is None:
            if self.k.shape[1] > mark.slots:
                # as many as there were, since sums over more of them may be rounded otherwise
                self.k, self.v, self.pos = (t[:, : mark.slots].clone() for t in (self.k, self.v, self.pos))
            # graphs that were captured move on without it
            self.bound = mark.bound if self.bound >= 0 else -1
        super().back(mark, rows)

    def reserve(self, more: int) -> None:
        """As :meth:`State.reserve`; slots that a window has come round to are taken again and again."""
        cap, bound = self.k.shape[1], self.longest if self.bound < 0 else self.bound
        want = min(bound + more, self.window or bound + more)
        if bound <= cap < want:
            self._grow(want - cap)

    def piece(self, start: int) -> "AttentionState":
        """As :meth:`State.piece`: the keys and values of these tokens alone, unless a window has put them into earlier ones' slots."""
        end = self.longest
        if end > self.k.shape[1]:
            return self
        k, v, pos = (t[:, start:end].clone() for t in (self.k, self.v, self.pos))
        return replace(self, k=k, v=v, pos=pos, bound=end)

    @classmethod
    def joined(cls, pieces: Sequence["AttentionState"]) -> "AttentionState":
        """As :meth:`State.joined`."""
        last, new = pieces[-1], pieces[-1].map(lambda t: t.clone())
        before = sum(piece.k.shape[1] for piece in pieces[:-1])
        # whole where a window has come round: its first slot then holds another position, or there are more slots than tokens
        if before + last.k.shape[1] == last.longest and int(last.pos[0, 0]) == before:
            for name in ("k", "v", "pos"):
                setattr(new, name, torch.cat([getattr(piece, name) for piece in pieces], 1))
        return new

    def _grow(self, more: int) -> None:
        self.k, self.v, self.pos = _grown(self.k, self.v, self.pos, more)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Store one token per row, ``(b, 1, h_kv, p)``, in place; ``length`` is still without it."""
        slot = self.length[:, None] % self.k.shape[1]
        at = slot[..., None, None].expand_as(k)
        self.k.scatter_(1, at, k.to(self.k.dtype))
        self.v.scatter_(1, at, v.to(self.v.dtype))
        self.pos.scatter_(1, slot, self.length[:, None])

    def make_room(self, window: int | None) -> None:
        """Have a slot for one more token, and keep the bound true.

        Raises:
            RuntimeError: All slots may be taken while a graph is captured or compiled, which fixes the addresses.
        """
        cap = self.k.shape[1]
        wraps = window is not None and cap >= window
        if is_captured(self.k) or torch.compiler.is_compiling():
            if not wraps and self.bound >= cap:
                raise RuntimeError(
                    f"Attention.step: all {cap} slots of the state may be taken, and a captured graph cannot add any. "
                    f"Reserve more: init_state(batch, max_len) with max_len > {cap}."
                )
            # a replayed graph moves on without this line
            self.bound = -1
            return
        bound = self.bound
        if not wraps and (bound < 0 or bound >= cap):
            bound = self.longest
            if bound >= cap:
                more = max(cap, 16) if window is None else min(max(cap, 16), window - cap)
                self._grow(more)
        if self.bound >= 0:
            self.bound = bound + 1


def _grown(k: Tensor, v: Tensor, pos: Tensor, more: int) -> tuple[Tensor, Tensor, Tensor]:
    return F.pad(k, (0, 0, 0, 0, 0, more)), F.pad(v, (0, 0, 0, 0, 0, more)), F.pad(pos, (0, more), value=-1)


def remember(
    state: AttentionState | None,
    k: Tensor,
    v: Tensor,
    conv: Tensor | None,
    seq: Seq | None,
    length: int,
    window: int | None,
) -> AttentionState:
    """The state after ``length`` more tokens per row, padding included, as a function of the old one.

    k and v are ``(b, used + length, h_kv, p)``: the old state's used slots, then the new tokens, whose padding or packing ``seq`` tells.
    """
    if state is not None and not length:
        return state.map(Tensor.clone)
    b, total = k.shape[:2]
    old = total - length
    cap, bound = _capacity(state, length, window)
    if not old and seq is None and cap >= length:
        # the first tokens of whole rows lie in the first slots as they are
        at = torch.arange(length, device=k.device)
        k, v, pos = _grown(k, v, at.expand(b, length), cap - length)
        return AttentionState(k, v, pos, at.new_full((b,), length), conv, bound, window or 0)
    past = torch.zeros(b, dtype=torch.long, device=k.device) if state is None else state.length
    new = torch.full_like(past, length) if seq is None else seq.lengths
    skip = torch.zeros_like(past)
    if seq is not None and seq.packed:
        # only the last document goes on
        last = torch.minimum(seq.pos.gather(1, (new - 1).clamp(min=0)[:, None]).squeeze(1) + 1, new)
        skip, new = new - last, last
    # a slot holds the last position that falls on it; a gather, so that gradients pass and no two writes meet
    end = (past + new)[:, None] - 1
    pos = end - (end - torch.arange(cap, device=k.device)) % cap
    source = torch.where(pos >= past[:, None], old + skip[:, None] + pos - past[:, None], pos % max(1, old))
    source = source.clamp(min=0)[..., None, None].expand(-1, -1, *k.shape[2:])
    k, v = k.gather(1, source), v.gather(1, source)
    if seq is not None:
        # an empty slot is read with weight zero: it must not hold another document's NaN
        empty = (pos < 0)[..., None, None]
        k, v = k.masked_fill(empty, 0.0), v.masked_fill(empty, 0.0)
    return AttentionState(k, v, pos.clamp(min=-1), past + new, conv, bound, window or 0)


def _capacity(state: AttentionState | None, length: int, window: int | None) -> tuple[int, int]:
    """Slots and bound after ``length`` more tokens."""
    if state is None:
        return min(length, window or length), length
    cap, bound = state.k.shape[1], state.bound
    limit = window or cap + length
    if is_captured(state.k):
        bound = -1
    elif cap < limit and bound and (bound < 0 or bound + length > cap) and not torch.compiler.is_compiling():
        bound = state.longest
    if bound < 0:
        return min(cap + length, limit), -1
    return max(cap, min(bound + length, limit)), bound + length

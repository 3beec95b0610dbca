"""Packed documents in one matrix product: what is not finite in one of them must not reach the others through a product with zero.

Operands go into the products with zeros in the place of NaN and infinity, and what depends on these places, of a scan later tokens of
the same document and head, and earlier ones in the backward, is overwritten with NaN. A CPU looks first whether there is anything to do;
a GPU is not asked, which would make the host wait for it.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .derivatives import transformed
from .numerics import acc_dtype
from .seq import Seq

# the first and the last place of a row, (b, l) each, of every token
Range = tuple[Tensor, Tensor]


class Spoiled(NamedTuple):
    """Places that are not finite in the operands of a scan over packed documents, ``(b, l, h)`` each, head by head."""

    after: Tensor  # something at or before this token of its document
    here: Tensor  # the read-out of this very token


def finite(*tensors: Tensor | None) -> bool:
    """Tell whether all is known to be finite, which of a GPU's tensors nobody knows. A sum that overflows is a false alarm."""
    there = [x for x in tensors if x is not None and x.numel()]
    if any(x.device.type != "cpu" for x in there):
        return False
    return all(math.isfinite(x.sum(dtype=acc_dtype(x.dtype)).item()) for x in there)


def clean(x: Any) -> Any:
    """``x``, or ``None``, with zeros where it is not finite."""
    return None if x is None else torch.nan_to_num(x, 0.0, 0.0, 0.0)


def spoiled(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor | None, reset: Tensor, softplus: bool
) -> Spoiled:
    """Of ``x`` (b, l, h, p), ``dt`` (b, l, h), ``B`` and ``C`` (b, l, g, n) and the initial state (b, h, p, n)."""
    h = dt.shape[2]
    # a step whose logarithm is -inf is a step of zero
    bad = ~(dt < math.inf) if softplus else ~dt.isfinite()
    bad = bad | ~_all_finite(x, 3) | _by_heads(B, h)
    if state is not None:
        bad[:, 0] |= ~_all_finite(state, 2, 3)
    return Spoiled(_since(bad, reset), _by_heads(C, h))


def spoiled_before(here: Tensor, gout: Tensor, z: Tensor | None, glast: Tensor | None, reset: Tensor) -> Tensor:
    """Tokens (b, l, h) whose gradient comes from one that is not finite: of a later output of the document, or of the state behind it."""
    bad = here | ~_all_finite(gout, 3)
    if z is not None:
        bad = bad | ~_all_finite(z, 3)
    if glast is not None:
        bad[:, -1] |= ~_all_finite(glast, 2, 3)
    # the other way round, a document starts where the next one did
    starts = torch.cat([reset[:, 1:], reset.new_zeros(reset.shape[0], 1)], 1)
    return _since(bad.flip(1), starts.flip(1)).flip(1)


def _all_finite(x: Tensor, *dims: int) -> Tensor:
    """Tell whether all is finite along some dimensions: the largest says so, and is found in one pass that writes little."""
    return torch.linalg.vector_norm(x.detach(), math.inf, dims).isfinite()


def _by_heads(x: Tensor, h: int) -> Tensor:
    return (~_all_finite(x, 3)).repeat_interleave(h // x.shape[2], dim=2)


def _since(bad: Tensor, reset: Tensor) -> Tensor:
    """Tell whether something of (b, l, h) is bad at or before a token, in its document."""
    count = bad.cumsum(1)
    before = torch.where(reset[..., None], count - bad.long(), 0).cummax(1).values
    return count > before


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Range, seeing: Range) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*seeing)
        return _cleaned(q, k, v, seen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        gq, gk, gv, gmark = grads
        hurt = gmark > 0
        by_hurt = _between(hurt, *ctx.saved_tensors)
        return (
            *(g.masked_fill(bad[..., None, None], math.nan) for g, bad in ((gq, hurt), (gk, by_hurt), (gv, by_hurt))),
            None,
            None,
        )


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, mark: Tensor) -> Tensor:
        ctx.save_for_backward(mark)
        return y.masked_fill(mark[..., None] > 0, math.nan)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        (mark,) = ctx.saved_tensors
        bad = (mark > 0) | ~_all_finite(g, 2)
        return g.masked_fill(bad[..., None], 0.0), bad.to(mark.dtype)


def enter_attention(
    q: Tensor, k: Tensor, v: Tensor, seq: Seq, span: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operands (b, l, h, p) for attention behind a mask, which is a product with zero, and a mark for :func:`leave_attention`.

    Heads of a token are not told apart: the layer mixes them. ``span`` are the tokens before and behind it that a query sees, -1 for all
    of its document.
    """
    at, (start, end) = _places(seq.doc), ends_of(seq.doc)

    def within(before: int, behind: int) -> Range:
        first = start if before < 0 else torch.maximum(start, at - before)
        return first, end if behind < 0 else torch.minimum(end, at + behind)

    seen, seeing = within(*span), within(*span[::-1])  # by a query, a key
    return _cleaned(q, k, v, seen) if transformed() else _Enter.apply(q, k, v, seen, seeing)


def leave_attention(y: Tensor, mark: Tensor) -> Tensor:
    """The output (b, l, h p), NaN at tokens that see what is not finite; in the backward, their gradients and of what they see."""
    return y.masked_fill(mark[..., None] > 0, math.nan) if transformed() else _Leave.apply(y, mark)


def _cleaned(q: Tensor, k: Tensor, v: Tensor, seen: Range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bad_q, bad_k, bad_v = (~_all_finite(x, 2, 3) for x in (q, k, v))
    bad_k = bad_k | bad_v
    mark = bad_q | _between(bad_k, *seen)
    q, k, v = (x.masked_fill(bad[..., None, None], 0.0) for x, bad in ((q, bad_q), (k, bad_k), (v, bad_k)))
    return q, k, v, mark.to(q.dtype)


def ends_of(doc: Tensor) -> Range:
    """The first and the last place of each token's document, from its number, ``(b, l)``."""
    l, at, change = doc.shape[1], _places(doc), doc[:, 1:] != doc[:, :-1]
    # a row of no tokens has no change, and would be given one
    first, last = (F.pad(change, ends, value=True)[:, :l] for ends in ((1, 0), (0, 1)))
    start = torch.where(first, at, 0).cummax(1).values
    return start, torch.where(last, at, l).flip(1).cummin(1).values.flip(1)


def _places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand_as(x)


def _between(bad: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Tell whether something of (b, l) is bad between two places of the row, both included."""
    count = F.pad(bad.cumsum(1), (1, 0))
    return count.gather(1, last + 1) > count.gather(1, first)

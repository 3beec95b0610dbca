"""Packed documents in one matrix product: what is not finite in one of them must not reach the others through a product with zero.

Operands go into the products with zeros in the place of NaN and infinity, and what depends on these places, later tokens of the same
document and head, and earlier ones in the backward, is overwritten with NaN. A CPU looks first whether there is anything to do; a GPU is
not asked, which would make the host wait for it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Spoiled(NamedTuple):
    """What is not finite in the operands of a scan over packed documents, ``(b, l, h)`` each, head by head."""

    after: Tensor  # something at or before this token of its document
    here: Tensor  # the read-out of this very token


def finite(*tensors: Tensor | None) -> bool:
    """Whether all is known to be finite, which of a GPU's tensors nobody knows. A sum that overflows is a false alarm."""
    there = [x for x in tensors if x is not None and x.numel()]
    if any(x.device.type != "cpu" for x in there):
        return False
    return all(math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).item()) for x in there)


def clean(x: Tensor | None) -> Tensor | None:
    """``x`` with zeros where it is not finite."""
    return None if x is None else torch.nan_to_num(x, 0.0, 0.0, 0.0)


def spoiled(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor | None, reset: Tensor, softplus: bool
) -> Spoiled:
    """Of ``x`` (b, l, h, p), ``dt`` (b, l, h), ``B`` and ``C`` (b, l, g, n) and the initial state (b, h, p, n)."""
    h = dt.shape[2]
    # a step whose logarithm is -inf is a step of zero
    bad = ~(dt < math.inf) if softplus else ~dt.isfinite()
    bad = bad | ~x.isfinite().all(3) | _by_heads(B, h)
    if state is not None:
        bad[:, 0] |= ~state.isfinite().flatten(2).all(2)
    return Spoiled(_since(bad, reset), _by_heads(C, h))


def spoiled_before(here: Tensor, gout: Tensor, z: Tensor | None, glast: Tensor | None, reset: Tensor) -> Tensor:
    """Tokens (b, l, h) whose gradient comes from one that is not finite: of a later output of the document, or of the state behind it."""
    bad = here | ~gout.isfinite().all(3)
    if z is not None:
        bad = bad | ~z.isfinite().all(3)
    if glast is not None:
        bad[:, -1] |= ~glast.isfinite().flatten(2).all(2)
    # the other way round, a document starts where the next one did
    starts = torch.cat([reset[:, 1:], reset.new_zeros(reset.shape[0], 1)], 1)
    return _since(bad.flip(1), starts.flip(1)).flip(1)


def _by_heads(x: Tensor, h: int) -> Tensor:
    return (~x.isfinite().all(3)).repeat_interleave(h // x.shape[2], dim=2)


def _since(bad: Tensor, reset: Tensor) -> Tensor:
    """Whether something of (b, l, h) is bad at or before a token, in its document."""
    count = bad.cumsum(1)
    before = torch.where(reset[..., None], count - bad.long(), 0).cummax(1).values
    return count > before

"""Rows in another order of their tokens: turned around, for whoever reads them from the end, or as a walk over a map visits them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.contain import ends_of
from ..kernels.derivatives import transformed
from .base import Seq

__all__ = ["reordered", "turning"]


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor | None) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return _taken(x, order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        # torch knows of no inverse, and would add up what meets nothing, in atomic operations that 16-bit numbers are slow in
        order, inverse = ctx.saved_tensors
        other = (order, None) if inverse is None else (inverse, order)
        return _Reordered.apply(g, *other), None, None


def _taken(x: Tensor, order: Tensor) -> Tensor:
    return x.index_select(1, order) if order.dim() == 1 else x.gather(1, order[..., None].expand_as(x))


def reordered(x: Tensor, order: Tensor, inverse: Tensor | None = None) -> Tensor:
    """The tokens of ``(b, l, d)`` in another order.

    Args:
        x: ``(b, l, d)``.
        order: ``(l,)`` int64, or ``(b, l)``, one for each row: where each token comes from, every one of them once.
        inverse: The order that undoes it, in the same shape; ``None`` where that is the order itself.
    """
    # a transform wants plain operations; a compiler, in which nobody can ask for one, takes the function as it is
    plain = not torch.compiler.is_compiling() and transformed() is not None
    return _taken(x, order) if plain else _Reordered.apply(x, order, inverse)


def turning(seq: Seq | None) -> Callable[[Tensor], Tensor]:
    """The function that turns rows ``(b, l, d)`` around, each document in its own place, padding left alone; it is its own inverse."""
    if seq is None or not (seq.packed or seq.padded):
        return lambda x: x.flip(1)
    at = torch.arange(seq.doc.shape[1], device=seq.doc.device)
    order = torch.where(seq.valid, ends_of(seq.doc)[1] - seq.pos, at)
    return lambda x: reordered(x, order)

"""Two halves of a tensor's channels whose gradients are written side by side, so that nothing has to be put together.

What reads a half asks in its backward for :func:`room`: the same half of one tensor, which the node that made the halves holds until its
own backward. That passes the tensor on as it is, if it was given exactly these two; gradients that come from elsewhere, or that a hook
has replaced, are concatenated. Values do not depend on it.
"""

from typing import Any

import torch
from torch import Tensor

from ..derivatives import transformed
from .nvrtc import current_stream


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.like, ctx.whole, ctx.free = (x.shape, x.device), None, {}
        return x.chunk(2, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        whole, ctx.whole, ctx.free = ctx.whole, None, {}
        first, second = grads
        if first is None and second is None:
            return None
        first = torch.zeros_like(second) if first is None else first  # type: ignore[arg-type]
        second = torch.zeros_like(first) if second is None else second
        if whole is None or torch.is_grad_enabled():
            return torch.cat((first, second), dim=-1)
        a, b = whole.chunk(2, dim=-1)
        return whole if first.is_set_to(a) and second.is_set_to(b) else torch.cat((first, second), dim=-1)


_NODE: Any = _Halves._backward_cls


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x.chunk(2, dim=-1)`` of ``(b, l, 2 d)``."""
    plain = torch.is_grad_enabled() and x.requires_grad and type(x) is Tensor
    if torch.compiler.is_compiling() or not plain or transformed() is not None:
        return x.chunk(2, dim=-1)  # type: ignore[return-value]
    return _Halves.apply(x)


def room(edge: tuple[Any, int], dtype: torch.dtype) -> Tensor | None:
    """Where the gradient of a half may be written: ``(b, l, d)``, not initialised, unit stride along channels; ``None`` if it is no half.

    No two calls get the same memory.

    Args:
        edge: Where the gradient goes, out of ``next_functions`` of the node that computes it.
        dtype: Its type.
    """
    node, half = edge
    if not isinstance(node, _NODE):
        return None
    shape, device = node.like
    # memory belongs to the stream that it was allocated on
    stream = current_stream(device.index) if device.type == "cuda" else None
    free = node.free.pop((half, dtype, stream), None)
    if free is None:
        node.whole = torch.empty(shape, dtype=dtype, device=device)
        parts = node.whole.chunk(2, dim=-1)
        free = parts[half]
        node.free = {(1 - half, dtype, stream): parts[1 - half]}
    return free

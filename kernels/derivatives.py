"""Derivatives that a kernel does not have: of forward mode, of torch.func's transforms, and second ones.

Plain PyTorch has them all. A backend that is plain PyTorch answers wherever a transform is at work, and where a kernel was asked for, or a
second derivative turns out to be wanted only in its backward, there is an error that says what can.
"""

import functools
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .torch_private import forward_mode, name_of, transforms_active

ENV = "HYBRIDZOO_BACKEND"
_HINT = f"Use backend='reference', or {ENV}=reference: plain PyTorch."


def transformed() -> str | None:
    """Name what is at work and goes through plain PyTorch alone, if anything does."""
    if forward_mode():
        return "forward-mode derivatives (jvp, jacfwd, hessian, dual tensors)"
    if transforms_active():
        return "torch.func's transforms (grad, vmap, jacrev, ...)"
    return None


def plain() -> bool:
    """Tell whether nothing but plain PyTorch is to be used: a transform is at work, or the environment asks for it."""
    return transformed() is not None or os.environ.get(ENV) == "reference"


def refusal(name: str) -> NotImplementedError:
    """The error of a second derivative of ``name``."""
    return NotImplementedError(f"{name}: a kernel computes its gradient, which has no derivative. {_HINT}")


def differentiable_once(op: Any) -> None:
    """Have a backward, as a ``torch.library`` op, refuse to be differentiated."""
    name = name_of(op)

    def backward(ctx: Any, *grads: Any) -> tuple:
        raise refusal(name)

    op.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, x: Tensor, *anchors: Tensor) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        raise refusal(ctx.name)


def refusing(name: str, g: Tensor, *anchors: Any) -> Tensor:
    """A gradient that a kernel has formed of ``name``, no constant to whoever wants a graph of it (``create_graph=True``).

    ``anchors`` is what it was formed of, so that whoever asks for a derivative with respect to one of them comes by.
    """
    if not torch.is_grad_enabled():
        return g
    needed = [x for x in anchors if isinstance(x, Tensor) and x.requires_grad]
    return _Refused.apply(name, g.detach().requires_grad_(), *needed)


def refused_beyond(name: str, y: Tensor) -> Tensor:
    """``y``, the output of a kernel of PyTorch's that may have no second derivative; where that turns out, the error says what can."""

    def named(gradients: tuple, _: Any) -> tuple | None:
        if not torch.is_grad_enabled():
            return None
        return tuple(
            _Refused.apply(name, g) if g is not None and type(g.grad_fn).__name__ == "NotImplemented" else g
            for g in gradients
        )

    node = y.grad_fn
    while node is not None and not node.name().startswith("ScaledDotProduct"):
        # a kernel may have padded the heads
        node = node.next_functions[0][0] if node.next_functions else None
    if node is not None:
        node.register_hook(named)
    return y


def refused_after(name: str, y: Tensor) -> Tensor:
    """``y``, the output of a library's ``autograd.Function``, whose gradients would pass for constants; as :func:`refused_beyond`."""
    node: Any = y.grad_fn
    while node is not None and not isinstance(node, BackwardCFunction):
        # a view of what the function gave
        node = node.next_functions[0][0] if node.next_functions else None
    if node is None:
        return y
    held = weakref.ref(node)  # it holds the hook

    def named(gradients: tuple, outer: tuple) -> tuple | None:
        if not torch.is_grad_enabled():
            return None
        anchors = (*outer, *getattr(held(), "saved_tensors", ()))
        return tuple(refusing(name, g, *anchors) if isinstance(g, Tensor) else g for g in gradients)

    node.register_hook(named)
    return y


class _ReadOnce:
    """A node of the graph whose saved tensors may be read twice, as a recomputed node's may not."""

    def __init__(self, ctx: Any):
        self._ctx = ctx

    @functools.cached_property
    def saved_tensors(self) -> tuple:
        return self._ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once(name: str) -> Callable[[Callable], Callable]:
    """As torch's ``once_differentiable`` around an ``autograd.Function``'s backward, with an error that says what can.

    And whatever comes in: torch takes a gradient that needs none for a constant, although what the forward read is not.
    """

    def around(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> tuple:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            ctx = _ReadOnce(ctx)
            with torch.no_grad():
                out = backward(ctx, *grads)
            anchors = (*grads, *ctx.saved_tensors)
            return tuple(refusing(name, g, *anchors) if isinstance(g, Tensor) else g for g in out)

        return run

    return around

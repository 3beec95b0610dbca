"""Defines our operators: ``torch.library.custom_op``, and what operators with gradients have in common."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .numerics import blank
from .torch_private import spare_the_compiler

__all__ = ["custom_op", "filled", "like"]


def custom_op(name: str, *, mutates_args: Iterable[str] = (), schema: str | None = None) -> Callable[[Callable], Any]:
    """As the decorator ``torch.library.custom_op``; the operator's first call does not import the compiler."""

    def define(fn: Callable) -> Any:
        op = torch.library.custom_op(name, fn, mutates_args=mutates_args, schema=schema)
        spare_the_compiler(op)
        return op

    return define


def filled(grads: Iterable[Tensor | None], x: Tensor) -> tuple[Tensor, ...]:
    """Gradients as an operator returns them: empty where there is none."""
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def like(x: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Stand-ins for the gradients of ``inputs``, for an operator's fake."""
    return filled((None if m is None else blank(m) for m in inputs), x)

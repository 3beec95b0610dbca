"""A cache of launch plans: what was checked, chosen and planned for a call holds for all that differ in nothing but values and addresses.

Working it out takes the host longer than a short scan takes the GPU (NOTES.md). What is kept is how operands look, and for each look
the plan, an op's launch or launches; nothing of the tensors.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from ..derivatives import ENV, transformed
from .operands import eager

T = TypeVar("T", bound=tuple)
# more looks than a program has, unless every call has its own
MOST = 4096
_known: dict[tuple, Any] = {}


def _look(op: str, operands: tuple, options: tuple) -> tuple:
    """All that a call depends on besides values, addresses up to their alignment."""
    each = [x if x is None else (x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16 == 0) for x in operands]
    return (op, *each, *options, os.environ.get(ENV))


def _plain(x: Tensor) -> bool:
    # what is traced or transformed has no addresses
    return eager(x) and transformed() is None


def find(op: str, operands: tuple, *options: object) -> Any:
    """The plan of a call like this one, or ``None``; the first operand says whether it is one of plain tensors."""
    return _known.get(_look(op, operands, options)) if _known and _plain(operands[0]) else None


def keep(op: str, operands: tuple, plan_of: Callable[[], tuple[tuple, Any]], *options: object) -> None:
    """Keep the plan of a call that the CUDA kernels have done: ``plan_of`` tells what they used in place of the operands, and the plan."""
    if not _plain(operands[0]):
        return
    used, plan = plan_of()
    if any(a is not b for a, b in zip(used, operands, strict=True)):
        # every call converts its operands anew
        return
    if len(_known) >= MOST:
        _known.clear()
    _known[_look(op, operands, options)] = plan


def planned(op: str, operands: T, plan_of: Callable[[], tuple[T, Any]], *options: object) -> tuple[T, Any]:
    """Find, or else form and keep, the plan of a call; what the CUDA kernels read in place of the operands comes with it."""
    plan = find(op, operands, *options)
    if plan is not None:
        return operands, plan
    made = plan_of()
    keep(op, operands, lambda: made, *options)
    return made

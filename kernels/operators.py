"""Defines our operators, so that their first call does not import the compiler.

``torch.library.custom_op`` keeps ``torch.compile`` out of an operator's code by ``torch._dynamo.disable``, which it imports when the first
operator runs: 1.5 s of processor time, also in processes that never compile anything. A compiler that was not imported is not at work.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["custom_op"]


def custom_op(name: str, fn: Callable | None = None, /, *, mutates_args: Iterable[str]) -> Any:
    """As ``torch.library.custom_op``: a decorator, or the operator if ``fn`` is given."""
    if fn is None:
        return lambda fn: custom_op(name, fn, mutates_args=mutates_args)
    op = torch.library.custom_op(name, fn, mutates_args=mutates_args)
    # where torch looks for what it has disabled before; a version that looks elsewhere imports the compiler, and that is all
    for outer in getattr(op, "_backend_fns", {}).values():
        if (inner := getattr(outer, "__wrapped__", None)) is not None:
            inner.__dynamo_disable = _outside_the_compiler(inner)
    return op


def _outside_the_compiler(fn: Any) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
        if disable is None:
            return fn(*args, **kwargs)
        fn.__dynamo_disable = disable(fn, True, wrapping=False)
        return fn.__dynamo_disable(*args, **kwargs)

    return run

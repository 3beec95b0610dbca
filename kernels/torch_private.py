"""Private names of PyTorch that the package reads, as they are in 2.11 to 2.13 at least, and what each of them saves.

Where a version has no such name, what is asked for is answered in the slower or the more careful way.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable)


def forward_mode() -> bool:
    """Tell whether tangents may be about: inside ``torch.func.jvp`` and what is built on it, or a ``dual_level``."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def transforms_active() -> bool:
    """Tell whether one of ``torch.func``'s transforms is at work: a kernel of ours would drop what they follow."""
    return torch._C._are_functorch_transforms_active()


def is_wrapped(x: Tensor) -> bool:
    """Tell whether a transform has wrapped a tensor, so that the host cannot read it."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def vmapped() -> bool:
    """Tell whether ``torch.vmap`` is at work: its samples have no numbers in common that the host could read."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key().name == "Vmap" for level in levels)


def saved_tensors_are_handled() -> bool:
    """Tell whether hooks of others take care of saved tensors, or may; such hooks must see what autograd would have kept."""
    autograd: Any = torch._C._autograd
    try:
        enabled = autograd._saved_tensors_hooks_is_enabled()
        return not enabled or autograd._top_saved_tensors_default_hooks(True) is not None
    except AttributeError:
        return True


def assert_later(condition: Tensor, message: str) -> None:
    """Have a device stop where a condition does not hold, without anybody waiting for it."""
    check = getattr(torch, "_assert_async", None)
    if check is not None:
        check(condition, message)


def name_of(op: Any) -> str:
    """The name of an operator that ``torch.library.custom_op`` made, ``hybridzoo::ssd``."""
    return op._name


def current_stream(index: int | None) -> int:
    """The handle of torch's current stream, without the object round it, which costs more to make (0.9 us of a launch's 11)."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(index).cuda_stream if raw is None else raw(index)


def constant_when_compiled(fn: F) -> F:
    """Have ``torch.compile`` take a function's answer and not look inside.

    As ``torch.compiler.assume_constant_result``, which imports the compiler: 1.5 s.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def spare_the_compiler(op: Any) -> None:
    """Have the first call of an operator not import the compiler.

    ``torch.library.custom_op`` keeps ``torch.compile`` out of an operator's code by ``torch._dynamo.disable``, which it imports when the
    first operator runs: 1.5 s of processor time, also in processes that never compile anything. A compiler that was not imported is not
    at work.
    """
    # where torch looks for what it has disabled before; a version that looks elsewhere imports the compiler, and that is all
    for outer in getattr(op, "_backend_fns", {}).values():
        if (inner := getattr(outer, "__wrapped__", None)) is not None:
            inner.__dynamo_disable = _outside_the_compiler(inner)


def _outside_the_compiler(fn: Any) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
        if disable is None:
            return fn(*args, **kwargs)
        fn.__dynamo_disable = disable(fn, True, wrapping=False)
        return fn.__dynamo_disable(*args, **kwargs)

    return run

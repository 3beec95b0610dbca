"""Precision of what ops compute: step sizes, decay rates, and matrix products whose sums stay in float32."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to accumulate in, and of recurrent states: float32, or float64 for float64."""
    # of two types, it is what torch.promote_types says, which takes longer to ask
    return torch.float32 if dtype in (*HALVES, torch.float32) else torch.promote_types(dtype, torch.float32)


def autocasts(x: Tensor) -> bool:
    """Return whether autocast is on where ``x`` is."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _keeps_sums(a: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether torch's product of 16-bit operands can give out the sums as they are."""
    return a.is_cuda and torch.version.hip is None and a.dtype in HALVES and dtype == torch.float32


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b``, (m, k) by (k, n) of one type, in ``dtype``; on an NVIDIA GPU, float32 is not rounded to the operands' type on the way."""
    if _keeps_sums(a, dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out += a @ b`` in place; see :func:`product`."""
    if _keeps_sums(a, out.dtype):
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    return out.add_(torch.mm(a, b))


def step_sizes(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    valid: Tensor | None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """The step sizes as the recurrence uses them: bias, softplus, limits, and 0 where ``valid`` is false; ``dt`` is (b, l, d or h)."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit != (0.0, math.inf):
        dt = dt.clamp(*dt_limit)
    # a zero step multiplies the state by one and adds nothing
    return dt if valid is None else dt.masked_fill(~valid[..., None], 0.0)


def rates(A: Tensor, acc: torch.dtype) -> Tensor:
    """Decay rates as the recurrence uses them, finite: -inf forgets all at every step, but a step of zero leaves the state alone.

    The floor times the smallest normal number, at which decays end (:func:`exp_`), is no gradient to speak of.
    """
    return A.to(acc).clamp(min=max(-1e30, torch.finfo(acc).min))


def exp_(x: Tensor) -> Tensor:
    """``exp`` in place, of what is hardly positive; results below the smallest normal number become that number.

    Results that underflow cost 20 to 150 times as much as others in the vector library that torch calls on a CPU.
    """
    return x.clamp_(min=math.log(torch.finfo(x.dtype).tiny)).exp_()


def full_precision(op: Callable) -> Callable:
    """Run an op whose first argument is a tensor with autocast off: its matrix products keep the precision it chose."""

    @functools.wraps(op)
    def run(*args: Any) -> Any:
        device = args[0].device.type
        if not torch.amp.is_autocast_available(device):
            return op(*args)
        with torch.autocast(device, enabled=False):
            return op(*args)

    return run


def finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The skip and the gate: ``(y + D x) silu(z)``."""
    if D is not None:
        y = y + D.to(y.dtype) * x
    return y if z is None else y * F.silu(z.to(y.dtype))


def cast(x: Any, dtype: torch.dtype) -> Any:
    """``x`` in this type, or ``None``; asking here is cheaper than to ask the tensor."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


def blank(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor of x's shape and of its type, or another, in one piece, whatever x's strides are."""
    # less than half of the time that torch.empty takes to read a shape
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)

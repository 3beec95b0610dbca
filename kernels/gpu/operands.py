"""Operands in the form that the CUDA kernels read."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..numerics import HALVES, cast

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
# of the filters that there are kernels for
WIDTHS = range(2, 9)
# template flags of the sources
RESET, WALK, UNALIGNED, CUT, NARROW, LOW_RANK, OUTPUTS = 1, 2, 4, 8, 16, 32, 64


def eager(x: Tensor) -> bool:
    """Tell whether a call on ``x`` can do without its registered op: nothing is traced, and ``x`` is a tensor of torch's own."""
    return not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def in_rows(x: Any, dtype: torch.dtype) -> Any:
    """``x`` in this type with unit stride along channels, as the kernels read it."""
    if x is None:
        return None
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 and x.stride(1) < 2**31 else x.contiguous()


def in_one_piece(x: Any, dtype: torch.dtype = torch.float32, aligned: bool = False) -> Any:
    """``x`` in this type and contiguous; if ``aligned``, what is off 16-byte borders, as slices of a flat parameter may be, is copied."""
    if x is None:
        return None
    if x.dtype != dtype or not x.is_contiguous():
        x = x.to(dtype).contiguous()
    return x.clone() if aligned and x.data_ptr() % 16 else x


def same_places(read: Iterable[Tensor | None], given: Iterable[Tensor | None]) -> bool:
    """Tell whether what a kernel reads lies where the operands do, perhaps in another shape, and on 16-byte borders.

    Of what does not, a plan's key does not say how far off them it is.
    """
    return all(
        [
            a is b is None
            or (a is not None and b is not None and a.data_ptr() == b.data_ptr() and a.data_ptr() % 16 == 0)
            for a, b in zip(read, given, strict=True)
        ]
    )


def common_type(first: Tensor, *others: Tensor | None) -> torch.dtype:
    """The type that operands are read in: theirs, if it is one and the kernels have it; float32 otherwise."""
    same = first.dtype in TYPES and all([x is None or x.dtype == first.dtype for x in others])
    return first.dtype if same else torch.float32


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return (a + b - 1) // b


def refuse_tensors(facts: dict[str, Any]) -> str | None:
    """Say why the CUDA kernels cannot read tensors with these facts, or ``None`` if they can; see :class:`.dispatch.Backend`."""
    device, dtype = facts.get("device", "cpu"), facts.get("dtype", torch.float32)
    if device != "cuda":
        return f"the CUDA kernels need CUDA tensors, got {device}"
    if dtype not in TYPES:
        return f"the CUDA kernels take float32, float16 and bfloat16, got {str(dtype).removeprefix('torch.')}"
    return None


def refuse_step(facts: dict[str, Any], what: str) -> str | None:
    """Say why a kernel of one token per row, which does ``what`` of 16 bits, cannot read tensors with these facts; ``None`` if it can."""
    reason, dtype = refuse_tensors(facts), facts.get("dtype", torch.bfloat16)
    if reason is not None:
        return reason
    if dtype not in HALVES:
        return f"the CUDA kernel {what} of 16 bits, got {str(dtype).removeprefix('torch.')}"
    if facts.get("grad"):
        return "the CUDA kernel has no gradient"
    return "the CUDA kernel would break the compiled graph" if torch.compiler.is_compiling() else None


def step_limits(limits: tuple[float, float]) -> tuple[float, float]:
    """The limits of step sizes as the kernels apply them: none where they are 0 and infinity, which softplus keeps by itself."""
    return (-math.inf, math.inf) if tuple(limits) == (0.0, math.inf) else (float(limits[0]), float(limits[1]))


def in_types_of(operands: Iterable[Tensor | None], grads: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the types of what they belong to, ``None`` where there is no such operand."""
    return [None if x is None else cast(g, x.dtype) for g, x in zip(grads, operands, strict=True)]


def refuse_width(facts: dict[str, Any]) -> str | None:
    """Say why there is no kernel for a filter, or ``None`` if there is."""
    width = facts.get("width", 4)
    return None if width in WIDTHS else f"the CUDA kernels take widths {WIDTHS[0]} to {WIDTHS[-1]}, got {width}"


def alignment(x: Tensor | None) -> int:
    """The number of bytes, out of 16, 8 and 1, that the address is a multiple of."""
    if x is None:
        return 16
    off = x.data_ptr() % 16
    return 16 if off == 0 else 8 if off == 8 else 1

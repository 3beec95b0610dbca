"""Operands in the form that the CUDA kernels read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}


RESET, WALK, UNALIGNED, CUT, NARROW, LOW_RANK, OUTPUTS = 1, 2, 4, 8, 16, 32, 64


def eager(x: Tensor) -> bool:
    """Whether a call on ``x`` can do without its registered op: nothing is traced, and ``x`` is a tensor of torch's own."""
    return not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def in_rows(x: Any, dtype: torch.dtype) -> Any:
    """``x`` in this type with unit stride along channels, as the kernels read it."""
    if x is None:
        return None
    if x.dtype != dtype:
        x = x.to(dtype)
    strides = x.stride()
    return x if strides[-1] == 1 and strides[1] < 2**31 else x.contiguous()


def in_one_piece(x: Any, dtype: torch.dtype) -> Any:
    """``x`` in this type and contiguous."""
    if x is None or (x.dtype == dtype and x.is_contiguous()):
        return x
    return x.to(dtype).contiguous()


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return (a + b - 1) // b


def refuse_tensors(facts: dict[str, Any]) -> str | None:
    """Why the CUDA kernels cannot read tensors with these facts, or ``None`` if they can; see :class:`.dispatch.Backend`."""
    device, dtype = facts.get("device", "cpu"), facts.get("dtype", torch.float32)
    if device != "cuda":
        return f"the CUDA kernels need CUDA tensors, got {device}"
    if dtype not in TYPES:
        return f"the CUDA kernels take float32, float16 and bfloat16, got {str(dtype).removeprefix('torch.')}"
    return None


def in_types_of(operands: tuple, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the types of what they belong to, ``None`` where there is no such operand."""
    # strict=False: the operands go on with what has no gradient
    pairs = zip(grads, operands, strict=False)
    return [None if x is None or g is None else g if g.dtype == x.dtype else g.to(x.dtype) for g, x in pairs]


def alignment(x: Tensor | None) -> int:
    """The number of bytes, out of 16, 8 and 1, that the address is a multiple of."""
    if x is None:
        return 16
    off = x.data_ptr() % 16
    return 16 if off == 0 else 8 if off == 8 else 1


def whole(x: Tensor | None, dtype: torch.dtype = torch.float32) -> Any:
    """A parameter in this type and in one piece; one off the 16-byte borders, as slices of a flat parameter may be, is copied."""
    if x is None or (x.dtype == dtype and x.is_contiguous() and x.data_ptr() % 16 == 0):
        return x
    x = x.to(dtype).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()

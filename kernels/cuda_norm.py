"""The CUDA RMSNorm: launches of ``cuda/norm.cu``, and the ``torch.library`` ops around them.

Types are free: the input, the weight and the output may each be float32, bfloat16 or float16; sums are float32, and what is written is
rounded once.
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda_params as params
from . import nvrtc
from .cuda_backend import processors, refuse_tensors
from .cuda_call import TYPES, UNALIGNED, eager
from .cuda_conv import add_up, whole
from .cuda_shapes import ceil_div

MAX_D = 8192
# elements of one access, and accesses that a thread's registers have room for
N, VECTORS = 4, 6


class Params(ctypes.Structure):
    """``NormParams`` of ``norm.cu``."""

    _fields_ = [
        *((name, c_void_p) for name in "x weight h gh past gx part".split()),
        *((name, c_longlong) for name in "x_row gh_row past_row m".split()),
        ("eps", c_float),
        *((name, c_int) for name in "d blocks".split()),
    ]


def refuse(facts: dict[str, Any]) -> str | None:
    """Why the CUDA norm cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    reason, d = refuse_tensors(facts), facts.get("d", 1)
    for dtype in facts.get("dtypes", ()):
        reason = reason or refuse_tensors(facts | {"dtype": dtype})
    if reason is None and not 1 <= d <= MAX_D:
        return f"the CUDA kernels normalise 1 to {MAX_D} channels, got {d}"
    return reason or nvrtc.unavailable()


@dataclass(frozen=True)
class Plan:
    """A launch: the struct behind its pointers, the template arguments, blocks, and threads in each."""

    tail: bytes
    arguments: str
    blocks: int
    threads: int


@functools.lru_cache(maxsize=4096)
def plan(types: tuple, m: int, d: int, strides: tuple, aligned: bool, eps: float, count: int, backward: bool) -> Plan:
    """How m rows of d channels are cut into blocks.

    Args:
        types: Of the input, the output and the weight.
        m: Rows.
        d: Channels.
        strides: Elements from row to row of the input, and of the two gradients that come in.
        aligned: Whether addresses are multiples of the bytes of an access.
        eps: Added to the mean square.
        count: Multiprocessors.
        backward: Which of the two kernels.
    """
    vectors = ceil_div(d, N)
    lanes = next(n for n in (8, 16, 32, 64, 128, 256, 512) if n * VECTORS >= vectors)
    threads = max(lanes, 256)
    # blocks of 256 threads whose registers fit beside each other: 128 for a thread in the backward, 85 in the forward
    resident = ceil_div((2 if backward else 3) * 256, threads)
    blocks = min(ceil_div(m, threads // lanes), resident * count)
    flags = 0 if aligned and not any(s % N for s in (d, *strides)) else UNALIGNED
    x_row, gh_row, past_row = strides
    rest = Params(x_row=x_row, gh_row=gh_row, past_row=past_row, m=m, eps=eps, d=d, blocks=blocks)
    names = ", ".join(TYPES[dtype] for dtype in types)
    arguments = f"<{names}, {lanes}, {ceil_div(vectors, lanes)}, {flags}, {resident}>"
    return Plan(params.tail(rest), arguments, blocks, threads)


def _rows(x: Tensor | None, dtype: torch.dtype, m: int, d: int) -> tuple[Tensor | None, int]:
    """A tensor as rows with unit strides along the channels, in place where that can be, and the elements from one to the next."""
    if x is None:
        return None, d
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.is_contiguous():
        return x, d
    x = x.reshape(m, d)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0) if m > 1 else d


def _aligned(*tensors: Tensor | None) -> bool:
    return all(x is None or x.data_ptr() % (N * x.element_size()) == 0 for x in tensors)


def forward(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """The outputs (..., d), in ``dtype``."""
    d, device = x.shape[-1], x.device
    h = torch.empty(x.shape, dtype=dtype, device=device)
    m = h.numel() // d
    if m:
        rows, x_row = _rows(x, x.dtype, m, d)
        weight = whole(weight, weight.dtype) if weight is not None else None
        types = (x.dtype, dtype, torch.float32 if weight is None else weight.dtype)
        cut = plan(types, m, d, (x_row, d, d), _aligned(rows), eps, processors(device), False)
        packed = params.pack(cut.tail, rows, weight, h, None, None, None, None)
        nvrtc.launch("norm.cu", "norm_forward" + cut.arguments, packed, cut.blocks, cut.threads, 0, device)
    return h


def backward(
    x: Tensor, weight: Tensor | None, eps: float, gh: Tensor, past: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input, ``past`` added, and of the weight, where that is ``wanted``; in their types."""
    d, device = x.shape[-1], x.device
    gx = torch.empty(x.shape, dtype=x.dtype, device=device)
    gweight = torch.empty(d, dtype=weight.dtype, device=device) if wanted and weight is not None else None
    m = gx.numel() // d
    if not m:
        return gx, None if gweight is None else gweight.zero_()
    (rows, x_row), (gh, gh_row) = _rows(x, x.dtype, m, d), _rows(gh, gh.dtype, m, d)  # type: ignore[assignment]
    past, past_row = _rows(past, x.dtype, m, d)
    weight = whole(weight, weight.dtype) if weight is not None else None
    types = (x.dtype, gh.dtype, torch.float32 if weight is None else weight.dtype)
    strides, aligned = (x_row, gh_row, past_row), _aligned(rows, gh, past)
    cut = plan(types, m, d, strides, aligned, eps, processors(device), True)
    part = None
    if gweight is not None:
        part = torch.empty((cut.blocks, 1, d), dtype=torch.float32, device=device)
    packed = params.pack(cut.tail, rows, weight, None, gh, past, gx, part)
    nvrtc.launch("norm.cu", "norm_backward" + cut.arguments, packed, cut.blocks, cut.threads, 0, device)
    if part is not None and gweight is not None:
        add_up(part, None, gweight)
    return gx, gweight


@torch.library.custom_op("hybridzoo::rms_norm_cuda", mutates_args=())
def norm_op(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """The norm, (..., d) in ``dtype``."""
    return forward(x, weight, eps, dtype)


@norm_op.register_fake
def _norm_fake(x, weight, eps, dtype):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@torch.library.custom_op("hybridzoo::rms_norm_cuda_backward", mutates_args=())
def norm_backward_op(gh: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and the weight; the latter is empty where there is none."""
    gx, gweight = backward(x, weight, eps, gh, None, True)
    return gx, x.new_empty(0) if gweight is None else gweight


@norm_backward_op.register_fake
def _norm_backward_fake(gh, x, weight, eps):
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return gx, x.new_empty(0) if weight is None else torch.empty(weight.shape, dtype=weight.dtype, device=x.device)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gh: Tensor) -> tuple:
    # read once: activation checkpointing recomputes them at the first access and refuses a second
    x, weight = ctx.saved_tensors
    gx, gweight = torch.ops.hybridzoo.rms_norm_cuda_backward(gh, x, weight, ctx.eps)
    return gx, None if weight is None else gweight, None, None


norm_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs a small call more time than the kernel; and x on its way past it.

    An op may not return what it was given. Here it does, and so the one kernel of the backward sees both gradients of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return forward(x, weight, eps, dtype), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gh: Tensor | None, past: Tensor | None) -> tuple:
        x, weight = ctx.saved_tensors
        if gh is None:
            return past, None, None, None
        return (*backward(x, weight, ctx.eps, gh, past, ctx.needs_input_grad[1]), None, None)


def branch_rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`hybridzoo.kernels.norm.branch_rms_norm` on an NVIDIA GPU; the same arguments and results."""
    # what is traced, or is not a plain tensor, needs the registered op
    if not eager(x):
        return torch.ops.hybridzoo.rms_norm_cuda(x, weight, eps, dtype), x
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        h, past = _Eager.apply(x, weight, eps, dtype)
        return h, past if x.requires_grad else x
    return forward(x, weight, eps, dtype), x

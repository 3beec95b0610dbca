"""The CUDA RMSNorm and LayerNorm: launches of ``norm.cu``, and the ``torch.library`` ops around them.

Types are free: the input, what is added to it, the weight and the output may each be float32, bfloat16 or float16; sums are float32,
and what is written is rounded once. LayerNorm's bias has the type of its weight.
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..derivatives import differentiable_once, once
from ..dispatch import Facts
from ..gpu import nvrtc, structs
from ..gpu.device import processors
from ..gpu.operands import TYPES, UNALIGNED, ceil_div, eager, in_one_piece, refuse_tensors, same_places
from ..gpu.sums import add_up
from ..numerics import blank
from ..operators import custom_op, filled, like

MAX_D = 8192
# elements of one access, and accesses that a thread's registers have room for: fewer where there is a bias, or the sums for one
N, VECTORS, VECTORS_CENTRED = 4, 6, 4
# flags of norm.cu
ADD, CENTRED = 8, 16


class NormParams(ctypes.Structure):
    """``NormParams`` of ``norm.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "x add weight bias h sum gh past gx gadd part"),
        *structs.fields(c_longlong, "x_row add_row gh_row past_row m"),
        ("eps", c_float),
        *structs.fields(c_int, "d blocks"),
    ]


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA norm cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    reason, d = refuse_tensors(facts), facts.get("d", 1)
    for dtype in facts.get("dtypes", ()):
        reason = reason or refuse_tensors(facts | {"dtype": dtype})
    if reason is None and not 1 <= d <= MAX_D:
        return f"the CUDA kernels normalise 1 to {MAX_D} channels, got {d}"
    return reason or nvrtc.unavailable()


# x, what is added to it, the weight and the bias
Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class NormPlan:
    """A launch: the struct behind its pointers, the template arguments, blocks, and threads in each."""

    tail: bytes
    arguments: str
    blocks: int
    threads: int


@functools.lru_cache(maxsize=4096)
def plan(types: tuple, m: int, d: int, strides: tuple, flags: int, eps: float, count: int, backward: bool) -> NormPlan:
    """Cut m rows of d channels into blocks.

    Args:
        types: Of the input, what is added to it (``None``: nothing is, or its gradient has no type of its own), the output and the weight.
        m: Rows.
        d: Channels.
        strides: Elements from row to row of the input, what is added to it, and the two gradients that come in.
        flags: Flags: ``UNALIGNED`` where addresses are no multiples of the bytes of an access, ``CENTRED`` for a LayerNorm.
        eps: Added to the mean square.
        count: Multiprocessors.
        backward: Which of the two kernels.
    """
    vectors, most = ceil_div(d, N), VECTORS_CENTRED if flags & CENTRED else VECTORS
    lanes = next(n for n in (8, 16, 32, 64, 128, 256, 512) if n * most >= vectors)
    threads, each = max(lanes, 256), ceil_div(vectors, lanes)
    flags |= UNALIGNED if any(s % N for s in (d, *strides)) else 0
    flags |= ADD if types[1] is not None else 0
    resident = ceil_div(_resident(flags, each, backward) * 256, threads)
    blocks = min(ceil_div(m, threads // lanes), resident * count)
    x_row, add_row, gh_row, past_row = strides
    rest = NormParams(x_row=x_row, add_row=add_row, gh_row=gh_row, past_row=past_row, m=m, eps=eps, d=d, blocks=blocks)
    names = ", ".join(TYPES[dtype or types[0]] for dtype in types)
    return NormPlan(structs.tail(rest), f"<{names}, {lanes}, {each}, {flags}, {resident}>", blocks, threads)


def _resident(flags: int, each: int, backward: bool) -> int:
    """Blocks of 256 threads whose registers fit beside each other: 128 for a thread where there are 2, 85 where 3, 64 where 4."""
    if flags & CENTRED:
        return max((3 if backward else 4) - (each == VECTORS_CENTRED) - bool(flags & UNALIGNED), 2)
    return 2 if backward or flags == ADD | UNALIGNED else 3


def _rows(x: Tensor | None, m: int, d: int) -> tuple[Tensor | None, int]:
    """A tensor as rows with unit strides along the channels, in place where that can be, and the elements from one to the next."""
    if x is None or x.is_contiguous():
        return x, d
    x = x.reshape(m, d)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0) if m > 1 else d


def _flags(centred: bool, *tensors: Tensor | None) -> int:
    aligned = all(x is None or x.data_ptr() % (N * x.element_size()) == 0 for x in tensors)
    return (CENTRED if centred else 0) | (0 if aligned else UNALIGNED)


def plan_of(
    given: Operands, eps: float, dtype: torch.dtype, centred: bool
) -> tuple[tuple[Tensor | None, ...], NormPlan]:
    """The rows of x and of what is added, the weight and the bias as a forward reads them, and its launch."""
    x, add, weight, bias = given
    d = x.shape[-1]
    m = x.numel() // d
    (rows, x_row), (more, add_row) = _rows(x, m, d), _rows(add, m, d)
    weight, bias = (None if g is None else in_one_piece(g, g.dtype, aligned=True) for g in (weight, bias))
    types = (x.dtype, None if add is None else add.dtype, dtype, torch.float32 if weight is None else weight.dtype)
    strides, flags = (x_row, add_row, d, d), _flags(centred, rows, more)
    return (rows, more, weight, bias), plan(types, m, d, strides, flags, eps, processors(x.device), False)


def known(given: Operands, eps: float, dtype: torch.dtype, centred: bool) -> tuple[NormPlan | None]:
    """Form what :mod:`hybridzoo.kernels.gpu.launch_plans` keeps of a forward that is checked: its launch, if it copies nothing."""
    x, _, weight, bias = given
    if not x.numel() or (bias is not None and weight is not None and bias.dtype != weight.dtype):
        return (None,)
    read, cut = plan_of(given, eps, dtype, centred)
    return (cut if same_places(read, given) else None,)


def forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    add: Tensor | None = None,
    bias: Tensor | None = None,
    centred: bool = False,
    cut: NormPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """The outputs (..., d), in ``dtype``, and x, or the sum of x and ``add`` in x's type, whose norm it is.

    ``centred`` takes off the mean, and goes with a bias of the weight's type, or none. ``cut`` is what is :func:`known` of such a call.
    """
    h, past = blank(x, dtype), x if add is None else blank(x)
    if h.numel():
        read: tuple = (x, add, weight, bias)
        if cut is None:
            read, cut = plan_of(read, eps, dtype, centred)
        packed = structs.pack(cut.tail, *read, h, None if add is None else past, None, None, None, None, None)
        nvrtc.launch("norm.cu", "norm_forward" + cut.arguments, packed, cut.blocks, cut.threads, 0, x.device)
    return h, past


def backward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gh: Tensor,
    past: Tensor | None,
    wanted: bool,
    add: torch.dtype | None = None,
    centred: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, ``past`` added; of weight and, if ``centred``, bias, where ``wanted``; and of what was added, of the type ``add``."""
    d, device = x.shape[-1], x.device
    gx = blank(x)
    gadd = gx if add == x.dtype else None if add is None else torch.empty(x.shape, dtype=add, device=device)
    gweight = torch.empty(d, dtype=weight.dtype, device=device) if wanted and weight is not None else None
    gbias = None if gweight is None or not centred else torch.empty_like(gweight)
    m = gx.numel() // d
    if not m:
        return gx, *(None if g is None else g.zero_() for g in (gweight, gbias)), gadd  # type: ignore[return-value]
    (rows, x_row), (gh, gh_row), (past, past_row) = (_rows(each, m, d) for each in (x, gh, past))  # type: ignore[assignment]
    weight = None if weight is None else in_one_piece(weight, weight.dtype, aligned=True)
    added, converted = (None, None) if gadd is gx else (add, gadd)
    types = (x.dtype, added, gh.dtype, torch.float32 if weight is None else weight.dtype)
    strides, flags = (x_row, d, gh_row, past_row), _flags(centred, rows, gh, past)
    cut = plan(types, m, d, strides, flags, eps, processors(device), True)
    part = None
    if gweight is not None:
        part = torch.empty((cut.blocks, 1 + centred, d), dtype=torch.float32, device=device)
    packed = structs.pack(cut.tail, rows, None, weight, None, None, None, gh, past, gx, converted, part)
    nvrtc.launch("norm.cu", "norm_backward" + cut.arguments, packed, cut.blocks, cut.threads, 0, device)
    if part is not None and gweight is not None:
        # the sums that stand last are those of the bias, if there are two
        add_up(part, *((None, gweight) if gbias is None else (gweight, gbias)))
    return gx, gweight, gbias, gadd


@custom_op("hybridzoo::norm_cuda", mutates_args=())
def norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, centred: bool
) -> Tensor:
    """The norm, (..., d) in ``dtype``; a LayerNorm if ``centred``, an RMSNorm, without bias, otherwise."""
    return forward(x, weight, eps, dtype, None, bias, centred)[0]


@norm_op.register_fake
def _norm_fake(x, weight, bias, eps, dtype, centred):
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@custom_op("hybridzoo::norm_cuda_backward", mutates_args=())
def norm_backward_op(
    gh: Tensor, x: Tensor, weight: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the weight and the bias; empty where there is none, as of an RMSNorm's bias."""
    return filled(backward(x, weight, eps, gh, None, True, None, centred)[:3], x)  # type: ignore[return-value]


differentiable_once(norm_backward_op)


@norm_backward_op.register_fake
def _norm_backward_fake(gh, x, weight, eps, centred):
    return like(x, x, weight, weight if centred else None)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, ctx.eps, _, ctx.centred = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gh: Tensor) -> tuple:
    # read once: activation checkpointing recomputes them at the first access and refuses a second
    x, weight = ctx.saved_tensors
    gx, gweight, gbias = torch.ops.hybridzoo.norm_cuda_backward(gh, x, weight, ctx.eps, ctx.centred)
    return gx, None if weight is None else gweight, gbias if ctx.biased else None, None, None, None


norm_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs a small call more time than the kernel; and x on its way past it.

    An op may not return what it was given. Here it does, and so the one kernel of the backward sees both gradients of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        add: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        centred: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.eps, ctx.centred, ctx.add = eps, centred, None if add is None else add.dtype
        ctx.set_materialize_grads(False)
        h, past = forward(x, weight, eps, dtype, add, bias, centred)
        ctx.save_for_backward(past, weight)
        return h, past

    @staticmethod
    @once("norm")
    def backward(ctx: Any, gh: Tensor | None, past: Tensor | None) -> tuple:
        x, weight = ctx.saved_tensors
        _, weighed, biased, added, *_ = ctx.needs_input_grad
        add = ctx.add if added else None
        if gh is None:
            return past, None, None, None if add is None or past is None else past.to(add), None, None, None
        gx, gweight, gbias, gadd = backward(x, weight, ctx.eps, gh, past, weighed or biased, add, ctx.centred)
        return gx, gweight, gbias if biased else None, gadd, None, None, None


def branch_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    add: Tensor | None = None,
    cut: NormPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`.op.branch_rms_norm` on an NVIDIA GPU; the same arguments and results. ``cut`` is what is :func:`known` of such a call."""
    return _branch(x, weight, None, add, eps, dtype, False, cut)


def branch_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    add: Tensor | None = None,
    cut: NormPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`.op.branch_layer_norm` on an NVIDIA GPU; the same arguments and results. ``cut`` is what is :func:`known` of such a call."""
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        weight, bias = weight.float(), bias.float()
    return _branch(x, weight, bias, add, eps, dtype, True, cut)


def _branch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    centred: bool,
    cut: NormPlan | None = None,
) -> tuple[Tensor, Tensor]:
    # what is traced, or is not a plain tensor, needs the registered op; a compiler puts the sum where it likes
    if not eager(x) or (add is not None and not eager(add)):
        x = x if add is None else x + add
        return torch.ops.hybridzoo.norm_cuda(x, weight, bias, eps, dtype, centred), x
    passed = x.requires_grad or (add is not None and add.requires_grad)
    if torch.is_grad_enabled() and (passed or any(g is not None and g.requires_grad for g in (weight, bias))):
        h, past = _Eager.apply(x, weight, bias, add, eps, dtype, centred)
        return h, past if passed else x if add is None else past.detach()
    return forward(x, weight, eps, dtype, add, bias, centred, cut)

"""Mamba-2's norm with a gate in CUDA: launches of ``gated_norm.cu``, and the ``torch.library`` ops around them.

Types are free: input, gate and weight may each be float32, bfloat16 or float16; sums are float32, and what is written is rounded once.
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_longlong, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..derivatives import differentiable_once, once
from ..gpu import nvrtc, structs
from ..gpu.device import processors
from ..gpu.operands import TYPES, UNALIGNED, ceil_div, eager, in_one_piece, same_places
from ..gpu.sums import add_up
from ..numerics import blank, cast
from ..operators import custom_op, filled, like
from .cuda import N, NormPlan, _rows

# accesses that a thread's registers have room for, and a flag of gated_norm.cu
VECTORS, BEFORE = 4, 8


class GatedNormParams(ctypes.Structure):
    """``GatedNormParams`` of ``gated_norm.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "x z weight h gh gx gz part"),
        *structs.fields(c_longlong, "x_row z_row gh_row gz_row m"),
        ("eps", c_float),
        *structs.fields(c_int, "d groups blocks"),
    ]


class Gating(NamedTuple):
    """A norm and its gate: epsilon, channels of a group, and whether the norm comes first."""

    eps: float
    group_size: int
    before: bool


@functools.lru_cache(maxsize=4096)
def plan(
    types: tuple, m: int, d: int, strides: tuple, how: Gating, aligned: bool, count: int, backward: bool
) -> NormPlan:
    """Cut m rows of d channels into blocks, each for one group.

    Args:
        types: Of the input, the gate and the weight.
        m: Rows.
        d: Channels of all groups.
        strides: Elements from row to row of the input, the gate, the gradient that comes in, and that of the gate.
        how: The norm.
        aligned: Whether addresses are multiples of the bytes of an access.
        count: Multiprocessors.
        backward: Which of the two kernels.
    """
    size = how.group_size
    vectors = ceil_div(size, N)
    lanes = next(n for n in (8, 16, 32, 64, 128, 256, 512) if n * VECTORS >= vectors)
    threads, each = max(lanes, 256), ceil_div(vectors, lanes)
    flags = 0 if aligned and not any(s % N for s in (size, *strides)) else UNALIGNED
    flags |= BEFORE if how.before else 0
    # of 256 threads whose registers fit beside each other
    resident = ceil_div((2 if backward else 3) * 256, threads)
    groups = d // size
    blocks = min(ceil_div(m, threads // lanes), max(1, resident * count // groups))
    x_row, z_row, gh_row, gz_row = strides
    rest = GatedNormParams(
        x_row=x_row, z_row=z_row, gh_row=gh_row, gz_row=gz_row, m=m, eps=how.eps, d=size, groups=groups, blocks=blocks
    )
    names = ", ".join(TYPES[dtype] for dtype in types)
    return NormPlan(structs.tail(rest), f"<{names}, {lanes}, {each}, {flags}, {resident}>", blocks, threads)


def _aligned(*tensors: Tensor | None) -> bool:
    return all([x is None or x.data_ptr() % (N * x.element_size()) == 0 for x in tensors])


def plan_of(
    x: Tensor, z: Tensor, weight: Tensor | None, how: Gating
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], NormPlan]:
    """The rows of input and gate and the weight as a forward reads them, and its launch."""
    d = x.shape[-1]
    m = x.numel() // d
    (rows, x_row), (gates, z_row) = _rows(x, m, d), _rows(z, m, d)
    weight = None if weight is None else in_one_piece(weight, weight.dtype, aligned=True)
    types, aligned = (x.dtype, z.dtype, torch.float32 if weight is None else weight.dtype), _aligned(rows, gates)
    return (rows, gates, weight), plan(types, m, d, (x_row, z_row, d, d), how, aligned, processors(x.device), False)


def known(x: Tensor, z: Tensor, weight: Tensor | None, how: Gating) -> tuple[NormPlan | None]:
    """Form what :mod:`hybridzoo.kernels.gpu.launch_plans` keeps of a forward that is checked: its launch, if it copies nothing."""
    if not x.numel():
        return (None,)
    read, cut = plan_of(x, z, weight, how)
    return (cut if same_places(read, (x, z, weight)) else None,)


def forward(x: Tensor, z: Tensor, weight: Tensor | None, how: Gating, cut: NormPlan | None = None) -> Tensor:
    """The outputs (..., d), in x's type; ``cut`` is what is :func:`known` of such a call."""
    h = blank(x)
    if h.numel():
        read: tuple = (x, z, weight)
        if cut is None:
            read, cut = plan_of(x, z, weight, how)
        packed = structs.pack(cut.tail, *read, h, None, None, None, None)
        blocks, name = cut.blocks * (x.shape[-1] // how.group_size), "gated_norm_forward" + cut.arguments
        nvrtc.launch("gated_norm.cu", name, packed, blocks, cut.threads, 0, x.device, overlaps=True)
    return h


class Gradients(NamedTuple):
    """Gradients of input, gate and weight, and the outputs, where they were asked for."""

    x: Tensor
    z: Tensor
    weight: Tensor | None
    out: Tensor | None


def backward(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None,
    how: Gating,
    gh: Tensor,
    wanted: bool = True,
    gz: Tensor | None = None,
    out: bool = False,
) -> Gradients:
    """The gradients; the weight's only if ``wanted``, the gate's written into ``gz`` if given; and for ``out`` the outputs."""
    d, device = x.shape[-1], x.device
    gx, gz, h = blank(x), blank(z) if gz is None else gz, blank(x) if out else None
    gweight = torch.empty(d, dtype=weight.dtype, device=device) if wanted and weight is not None else None
    m = gx.numel() // d
    if not m:
        return Gradients(gx, gz, None if gweight is None else gweight.zero_(), h)
    (x, x_row), (z, z_row), (gh, gh_row) = (_rows(each, m, d) for each in (x, z, cast(gh, x.dtype)))  # type: ignore[assignment]
    weight = None if weight is None else in_one_piece(weight, weight.dtype, aligned=True)
    gz_row = gz.view(m, d).stride(0) if m > 1 else d
    types, aligned = (x.dtype, z.dtype, torch.float32 if weight is None else weight.dtype), _aligned(x, z, gh, gz)
    cut = plan(types, m, d, (x_row, z_row, gh_row, gz_row), how, aligned, processors(device), True)
    part = None if gweight is None else torch.empty((cut.blocks, 1, d), dtype=torch.float32, device=device)
    packed = structs.pack(cut.tail, x, z, weight, h, gh, gx, gz, part)
    blocks = cut.blocks * (d // how.group_size)
    nvrtc.launch("gated_norm.cu", "gated_norm_backward" + cut.arguments, packed, blocks, cut.threads, 0, device)
    if part is not None and gweight is not None:
        add_up(part, None, gweight)
    return Gradients(gx, gz, gweight, h)


@custom_op("hybridzoo::gated_norm_cuda", mutates_args=())
def gated_norm_op(x: Tensor, z: Tensor, weight: Tensor | None, eps: float, group_size: int, before: bool) -> Tensor:
    """The gated norm, (..., d) in x's type."""
    return forward(x, z, weight, Gating(eps, group_size, before))


@gated_norm_op.register_fake
def _gated_norm_fake(x, z, weight, eps, group_size, before):
    return blank(x)


@custom_op("hybridzoo::gated_norm_cuda_backward", mutates_args=())
def gated_norm_backward_op(
    gh: Tensor, x: Tensor, z: Tensor, weight: Tensor | None, eps: float, group_size: int, before: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, gate and weight."""
    return filled(backward(x, z, weight, Gating(eps, group_size, before), gh)[:3], x)  # type: ignore[return-value]


differentiable_once(gated_norm_backward_op)


@gated_norm_backward_op.register_fake
def _gated_norm_backward_fake(gh, x, z, weight, eps, group_size, before):
    return like(x, x, z, weight)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, eps, group_size, before = inputs
    ctx.how = Gating(eps, group_size, before)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gh: Tensor) -> tuple:
    # read once: activation checkpointing recomputes them at the first access and refuses a second
    x, z, weight = ctx.saved_tensors
    gx, gz, gweight = torch.ops.hybridzoo.gated_norm_cuda_backward(gh, x, z, weight, *ctx.how)
    return gx, gz, None if weight is None else gweight, None, None, None


gated_norm_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs a small call more time than the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor | None, how: Gating) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, z, weight)
        return forward(x, z, weight, how)

    @staticmethod
    @once("gated norm")
    def backward(ctx: Any, gh: Tensor) -> tuple:
        x, z, weight = ctx.saved_tensors
        found = backward(x, z, weight, ctx.how, gh, ctx.needs_input_grad[2])
        return found.x, found.z, found.weight, None


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    cut: NormPlan | None = None,
) -> Tensor:
    """:func:`.gated.gated_rms_norm` on an NVIDIA GPU; ``cut`` is what is :func:`known` of such a call."""
    how = Gating(eps, group_size, norm_before_gate)
    # what is traced, or is not a plain tensor, needs the registered op
    if not (eager(x) and eager(gate)):
        return torch.ops.hybridzoo.gated_norm_cuda(x, gate, weight, *how)
    if torch.is_grad_enabled() and any([m is not None and m.requires_grad for m in (x, gate, weight)]):
        return _Eager.apply(x, gate, weight, how)
    return forward(x, gate, weight, how, cut)

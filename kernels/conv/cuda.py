"""The CUDA causal convolution: launches of ``conv.cu``, and the ``torch.library`` ops around them.

Autocast: the op takes what it is given. Inputs and state of one 16-bit type stay in it, sums are float32, and the filter is read in the
inputs' type or in float32; anything else meets in float32. Results have the types of what they belong to.
"""

import ctypes
import functools
from ctypes import c_int, c_longlong, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..derivatives import once
from ..dispatch import Facts
from ..gpu import nvrtc, structs
from ..gpu.device import processors
from ..gpu.operands import (
    RESET,
    TYPES,
    UNALIGNED,
    WIDTHS,
    alignment,
    ceil_div,
    common_type,
    eager,
    in_one_piece,
    in_rows,
    in_types_of,
    refuse_tensors,
    refuse_width,
)
from ..gpu.sums import add_up
from ..numerics import blank, cast
from ..operators import custom_op, filled
from .inputs import BACKWARD, FORWARD, ConvInputs, connect

THREADS, SILU = 128, 8
# blocks that a multiprocessor should have to choose from, and strips of the length, longest first; see NOTES.md
BLOCKS, STRIPS = 10, (64, 32, 16, 8)


class ConvParams(ctypes.Structure):
    """``ConvParams`` of ``conv.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "x weight bias state doc out gout gx gstate part"),
        *structs.fields(c_longlong, "x_b x_l state_b state_k gout_b gout_l gx_b gx_l"),
        *structs.fields(c_int, "l d columns tiles_d tiles_l strip"),
    ]


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA convolution cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    return refuse_tensors(facts) or refuse_width(facts) or nvrtc.unavailable()


def readable(i: ConvInputs) -> ConvInputs:
    """The inputs in the form that the kernels read: unit strides along channels, one type of inputs, one of the filter."""
    dtype = common_type(i.x, i.initial_state)
    wide = i.weight.dtype if i.weight.dtype == dtype else torch.float32
    weight, bias, doc = (
        in_one_piece(m, t, aligned=True) for m, t in ((i.weight, wide), (i.bias, wide), (i.doc, torch.int64))
    )
    return ConvInputs(in_rows(i.x, dtype), weight, bias, in_rows(i.initial_state, dtype), doc)


def signature(i: ConvInputs, silu: bool, gout: Tensor | None = None, gx: Tensor | None = None) -> tuple:
    """All that the launch over readable inputs depends on besides addresses."""
    x, others = i.x, (i.initial_state, gout, gx)
    return (
        x.dtype,
        i.weight.dtype,
        x.shape,
        i.weight.shape[1],
        x.stride(),
        *((0, 0) if m is None else m.stride() for m in others),
        min(map(alignment, (x, *others))),
        i.doc is not None,
        silu,
    )


@dataclass(frozen=True)
class ConvPlan:
    """A launch: the struct behind its pointers, the template arguments, blocks, and rows of partial sums."""

    tail: bytes
    arguments: str
    blocks: int
    rows: int


@functools.lru_cache(maxsize=4096)
def plan(signature: tuple, count: int, backward: bool, strip: int | None = None) -> ConvPlan:
    """Cut a convolution into blocks; ``count`` multiprocessors, ``strip`` fixes what would be chosen."""
    dtype, wide, (b, l, d), k, x, state, gout, gx, aligned, packed, silu = signature
    steps = [s for pair in (x, state, gout, gx) for s in pair[:2]] + [d]
    # bytes that one access moves: what rows and addresses allow, and registers have room for
    bytes_ = next((n for n in (16, 8) if n <= aligned and all(s * dtype.itemsize % n == 0 for s in steps)), None)
    flags = packed * RESET | (bytes_ is None) * UNALIGNED | silu * SILU
    narrow = backward or k > 4 or bytes_ != 16
    lanes = (8 if narrow else 16) // dtype.itemsize
    if backward and packed and bytes_ is None and k == WIDTHS[-1]:
        lanes = 2  # the widest filter, its sums, documents and single elements: no registers for more
    vectors = ceil_div(d, lanes)
    # a warp stands side by side where that leaves few of its threads without channels
    columns = next((c for c in (32, 16, 8) if ceil_div(vectors, c) * c <= 1.15 * vectors), 4)
    tiles_d, deep = ceil_div(vectors, columns), THREADS // columns
    if strip is None:
        enough = (s for s in STRIPS if b * ceil_div(l, deep * s) * tiles_d >= BLOCKS * count)
        strip = next(enough, STRIPS[-1])
    tiles_l = ceil_div(l, deep * strip)
    strides = structs.strides(x=x[:2], gout=gout[:2], gx=gx[:2]) | {"state_b": state[0], "state_k": state[1]}
    rest = ConvParams(**strides, l=l, d=d, columns=columns, tiles_d=tiles_d, tiles_l=tiles_l, strip=strip)
    spilling = k > 4 or (backward and packed and bytes_ is None)
    blocks = 2 if spilling else 3 if backward or packed else 4
    arguments = f"<{TYPES[dtype]}, {TYPES[wide]}, {k}, {lanes}, {flags}, {blocks}>"
    return ConvPlan(structs.tail(rest), arguments, b * tiles_l * tiles_d, b * tiles_l)


def plan_of(i: ConvInputs, silu: bool) -> tuple[ConvInputs, ConvPlan]:
    """The inputs that a convolution reads in place of these, and its plan, for :mod:`hybridzoo.kernels.gpu.launch_plans`."""
    i = readable(i)
    return i, plan(signature(i, silu), processors(i.x.device), False)


def forward(i: ConvInputs, silu: bool, strip: int | None = None, cut: ConvPlan | None = None) -> Tensor:
    """The outputs (b, l, d) of readable inputs, in their type; ``cut`` is the plan of another call that looks like this one."""
    x, out = i.x, blank(i.x)
    if out.numel():
        cut = cut or plan(signature(i, silu), processors(x.device), False, strip)
        packed = structs.pack(cut.tail, *i, out, None, None, None, None)
        nvrtc.launch("conv.cu", "conv_forward" + cut.arguments, packed, cut.blocks, THREADS, 0, x.device)
    return out


def backward(i: ConvInputs, silu: bool, gout: Tensor, strip: int | None = None, gx: Tensor | None = None) -> ConvInputs:
    """Gradients of readable inputs in their types, that of x written into ``gx`` if given."""
    x, weight, device = i.x, i.weight, i.x.device
    d, k = weight.shape
    gx = blank(x) if gx is None else gx
    gweight, gbias = weight.new_empty((d, k)), weight.new_empty(d)
    gstate = None if i.initial_state is None else blank(i.initial_state)
    if not gx.numel():
        return ConvInputs(gx, gweight.zero_(), gbias.zero_(), None if gstate is None else gstate.zero_())
    gout = in_rows(gout, x.dtype)
    cut = plan(signature(i, silu, gout, gx), processors(device), True, strip)
    part = torch.empty((cut.rows, k + 1, d), dtype=torch.float32, device=device)
    packed = structs.pack(cut.tail, *i, None, gout, gx, gstate, part)
    nvrtc.launch("conv.cu", "conv_backward" + cut.arguments, packed, cut.blocks, THREADS, 0, device)
    add_up(part, gweight, gbias)
    return ConvInputs(gx, gweight, gbias, gstate)


@custom_op("hybridzoo::causal_conv1d_cuda", schema=FORWARD)
def conv_op(*operands: Any) -> Tensor:
    """The convolution, (b, l, d) in x's dtype."""
    *tensors, silu = operands
    return _forward(ConvInputs(*tensors), silu)


def _forward(i: ConvInputs, silu: bool, cut: ConvPlan | None = None) -> Tensor:
    return forward(i, silu, cut=cut) if cut is not None else cast(forward(readable(i), silu), i.x.dtype)


@custom_op("hybridzoo::causal_conv1d_cuda_backward", schema=BACKWARD)
def conv_backward_op(gout: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and the initial state; empty where there is no such input."""
    *tensors, silu = operands
    return filled(_gradients(gout, ConvInputs(*tensors), silu)[:-1], gout)


def _gradients(gout: Tensor, i: ConvInputs, silu: bool) -> list[Tensor | None]:
    return in_types_of(i, backward(readable(i), silu, gout))


connect(conv_op, conv_backward_op)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs a small call more time than the kernel."""

    @staticmethod
    def forward(ctx: Any, silu: bool, cut: ConvPlan | None, *tensors: Any) -> Tensor:
        ctx.silu = silu
        ctx.save_for_backward(*tensors)
        return _forward(ConvInputs(*tensors), silu, cut)

    @staticmethod
    @once("causal_conv1d")
    def backward(ctx: Any, gout: Tensor) -> tuple:
        return (None, None, *_gradients(gout, ConvInputs(*ctx.saved_tensors), ctx.silu))


def causal_conv1d(i: ConvInputs, silu: bool, cut: ConvPlan | None = None) -> Tensor:
    """:func:`.reference.causal_conv1d` on an NVIDIA GPU; the same arguments and result.

    ``cut`` is the plan of a call like this (:mod:`hybridzoo.kernels.gpu.launch_plans`).
    """
    # what is traced, or is not a plain tensor, needs the registered op
    if not eager(i.x):
        return torch.ops.hybridzoo.causal_conv1d_cuda(*i, silu)
    if torch.is_grad_enabled() and any([m is not None and m.requires_grad for m in i]):
        return _Eager.apply(silu, cut, *i)
    return _forward(i, silu, cut)

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

from ..derivatives import differentiable_once, once
from ..gpu import nvrtc, structs
from ..gpu.device import processors
from ..gpu.operands import RESET, TYPES, UNALIGNED, alignment, ceil_div, eager, in_types_of, refuse_tensors, whole
from ..gpu.sums import add_up
from ..operators import custom_op

WIDTHS = range(2, 9)
THREADS, SILU = 128, 8
# blocks that a multiprocessor should have to choose from, and strips of the length, longest first; see NOTES.md
BLOCKS, STRIPS = 10, (64, 32, 16, 8)


class Params(ctypes.Structure):
    """``ConvParams`` of ``conv.cu``."""

    _fields_ = [
        *((name, c_void_p) for name in "x weight bias state doc out gout gx gstate part".split()),
        *((name, c_longlong) for name in "x_b x_l state_b state_k gout_b gout_l gx_b gx_l".split()),
        *((name, c_int) for name in "l d columns tiles_d tiles_l strip".split()),
    ]


def refuse(facts: dict[str, Any]) -> str | None:
    """Why the CUDA convolution cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    return refuse_tensors(facts) or refuse_width(facts) or nvrtc.unavailable()


def refuse_width(facts: dict[str, Any]) -> str | None:
    """Why there is no kernel for a filter, or ``None`` if there is."""
    width = facts.get("width", 4)
    return None if width in WIDTHS else f"the CUDA kernels take widths {WIDTHS[0]} to {WIDTHS[-1]}, got {width}"


@dataclass
class Call:
    """One convolution's operands in the form that the kernels read: unit strides along channels, one type of inputs, one of the filter."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor | None
    doc: Tensor | None
    silu: bool

    @classmethod
    def of(cls, x, weight, bias, state, doc, silu) -> "Call":
        """From the op's arguments."""
        dtype = x.dtype if x.dtype in TYPES and (state is None or state.dtype == x.dtype) else torch.float32
        wide = weight.dtype if weight.dtype == dtype else torch.float32
        weight, bias, doc = whole(weight, wide), whole(bias, wide), whole(doc, torch.int64)
        return cls(_rows(x, dtype), weight, bias, _rows(state, dtype), doc, silu)  # type: ignore[arg-type]

    def signature(self, gout: Tensor | None, gx: Tensor | None) -> tuple:
        """What the launch depends on besides addresses."""
        x, others = self.x, (self.state, gout, gx)
        return (
            x.dtype,
            self.weight.dtype,
            x.shape,
            self.weight.shape[1],
            x.stride(),
            *((0, 0) if m is None else m.stride() for m in others),
            min(map(alignment, (x, *others))),
            self.doc is not None,
            self.silu,
        )


def _rows(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if x is None:
        return None
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Plan:
    """A launch: the struct behind its pointers, the template arguments, blocks, and rows of partial sums."""

    tail: bytes
    arguments: str
    blocks: int
    rows: int


@functools.lru_cache(maxsize=4096)
def plan(signature: tuple, count: int, backward: bool, strip: int | None = None) -> Plan:
    """How a convolution is cut into blocks; ``count`` multiprocessors, ``strip`` fixes what would be chosen."""
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
    rest = Params(**strides, l=l, d=d, columns=columns, tiles_d=tiles_d, tiles_l=tiles_l, strip=strip)
    spilling = k > 4 or (backward and packed and bytes_ is None)
    blocks = 2 if spilling else 3 if backward or packed else 4
    arguments = f"<{TYPES[dtype]}, {TYPES[wide]}, {k}, {lanes}, {flags}, {blocks}>"
    return Plan(structs.tail(rest), arguments, b * tiles_l * tiles_d, b * tiles_l)


def plan_of(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool) -> tuple[tuple, Plan]:
    """What a convolution of one document per row uses in place of its operands, and its launch; see :mod:`..gpu.launch_plans`."""
    call = Call.of(x, weight, bias, state, None, silu)
    return (call.x, call.weight, call.bias, call.state), plan(call.signature(None, None), processors(x.device), False)


def forward(call: Call, strip: int | None = None, cut: Plan | None = None) -> Tensor:
    """The outputs (b, l, d), in the type that the inputs are read in; ``cut`` is the plan of another call that looks like this one."""
    x = call.x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        cut = cut or plan(call.signature(None, None), processors(x.device), False, strip)
        packed = structs.pack(cut.tail, x, call.weight, call.bias, call.state, call.doc, out, None, None, None, None)
        nvrtc.launch("conv.cu", "conv_forward" + cut.arguments, packed, cut.blocks, THREADS, 0, x.device)
    return out


def backward(
    call: Call, gout: Tensor, strip: int | None = None, gx: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, written into ``gx`` if given, weight, bias and the initial state, in the types that those are read in."""
    x, weight, device = call.x, call.weight, call.x.device
    d, k = weight.shape
    gx = torch.empty(x.shape, dtype=x.dtype, device=device) if gx is None else gx
    gweight, gbias = weight.new_empty((d, k)), weight.new_empty(d)
    gstate = None if call.state is None else torch.empty(call.state.shape, dtype=x.dtype, device=device)
    if not gx.numel():
        return gx, gweight.zero_(), gbias.zero_(), None if gstate is None else gstate.zero_()
    gout = _rows(gout, x.dtype)  # type: ignore[assignment]
    cut = plan(call.signature(gout, gx), processors(device), True, strip)
    part = torch.empty((cut.rows, k + 1, d), dtype=torch.float32, device=device)
    inputs = (x, weight, call.bias, call.state, call.doc)
    packed = structs.pack(cut.tail, *inputs, None, gout, gx, gstate, part)
    nvrtc.launch("conv.cu", "conv_backward" + cut.arguments, packed, cut.blocks, THREADS, 0, device)
    add_up(part, gweight, gbias)
    return gx, gweight, gbias, gstate


@custom_op("hybridzoo::causal_conv1d_cuda", mutates_args=())
def conv_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, doc: Tensor | None, silu: bool
) -> Tensor:
    """The convolution, (b, l, d) in x's dtype."""
    return _forward((x, weight, bias, initial_state, doc, silu))


def _forward(operands: tuple, cut: Plan | None = None) -> Tensor:
    if cut is not None:
        return forward(Call(*operands), cut=cut)
    out, dtype = forward(Call.of(*operands)), operands[0].dtype
    return out if out.dtype == dtype else out.to(dtype)


@conv_op.register_fake
def _conv_fake(x, weight, bias, initial_state, doc, silu):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@custom_op("hybridzoo::causal_conv1d_cuda_backward", mutates_args=())
def conv_backward_op(
    gout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    doc: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial state; empty where there is no such input."""
    grads = _gradients(gout, (x, weight, bias, initial_state, doc, silu))
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


def _gradients(gout: Tensor, operands: tuple) -> list[Tensor | None]:
    return in_types_of(operands, backward(Call.of(*operands), gout))


differentiable_once(conv_backward_op)


@conv_backward_op.register_fake
def _conv_backward_fake(gout, x, weight, bias, initial_state, doc, silu):
    inputs = (x, weight, bias, initial_state)
    return tuple(x.new_empty(0) if m is None else torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in inputs)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gout: Tensor) -> tuple:
    # read once: activation checkpointing recomputes them at the first access and refuses a second
    *inputs, doc = ctx.saved_tensors
    grads = torch.ops.hybridzoo.causal_conv1d_cuda_backward(gout, *inputs, doc, ctx.silu)
    return (*(None if x is None else g for g, x in zip(grads, inputs, strict=True)), None, None)


conv_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs a small call more time than the kernel."""

    @staticmethod
    def forward(ctx: Any, silu: bool, cut: Plan | None, *tensors: Tensor | None) -> Tensor:
        ctx.silu = silu
        ctx.save_for_backward(*tensors)
        return _forward((*tensors, silu), cut)

    @staticmethod
    @once("causal_conv1d")
    def backward(ctx: Any, gout: Tensor) -> tuple:
        return (None, None, *_gradients(gout, (*ctx.saved_tensors, ctx.silu)), None)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    doc: Tensor | None,
    silu: bool,
    cut: Plan | None = None,
) -> Tensor:
    """:func:`.reference.causal_conv1d` on an NVIDIA GPU; the same arguments and result.

    ``cut`` is the plan of a call like this (:mod:`hybridzoo.kernels.gpu.launch_plans`).
    """
    tensors = (x, weight, bias, initial_state, doc)
    # what is traced, or is not a plain tensor, needs the registered op
    if not eager(x):
        return torch.ops.hybridzoo.causal_conv1d_cuda(*tensors, silu)
    if torch.is_grad_enabled() and any([m is not None and m.requires_grad for m in tensors]):
        return _Eager.apply(silu, cut, *tensors)
    return _forward((*tensors, silu), cut)

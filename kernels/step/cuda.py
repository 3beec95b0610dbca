"""One token at a time on an NVIDIA GPU: launches of ``update.cu``, and ``torch.library`` ops around them for compiled programs.

A step is one launch. Operands of one 16-bit type stay in it, operands of different types meet in float32; the recurrent state is
float32 or bfloat16, the convolution's is of the inputs' type or float32.
"""

import ctypes
import functools
import math
from ctypes import c_float, c_int, c_longlong, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import Facts
from ..gpu import nvrtc, structs
from ..gpu.device import processors
from ..gpu.operands import (
    TYPES,
    UNALIGNED,
    alignment,
    ceil_div,
    common_type,
    in_one_piece,
    in_rows,
    refuse_tensors,
    refuse_width,
    step_limits,
)
from ..gpu.tickets import tickets
from ..numerics import blank, cast
from ..operators import custom_op
from .chunked import spelled_out
from .inputs import ConvStep, ScanStep, StepOptions

HEADS, SPLIT, LOW_DT, NORMS = 8, 16, 32, 64
THREADS = 128
STATES = (torch.float32, torch.bfloat16)
# step sizes are formed here up to this rank and of so many rows of the batch, of more by a product in front, which reads its weight once
MAX_RANK, LOW_ROWS = 512, 8
# by d_state, rounded up to the next one here: lanes that share a channel, and how many times four states each of them has
LANES = {4: (1, 1), 8: (2, 1), 16: (2, 2), 32: (4, 2), 64: (8, 2), 128: (8, 4), 256: (16, 4)}
# blocks that every multiprocessor should have, for the widest blocks that leave so many
BLOCKS = 8


class ConvUpdateParams(ctypes.Structure):
    """``ConvUpdateParams`` of ``update.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "x state weight bias rows out"),
        *structs.fields(c_longlong, "x_b state_b state_k"),
        *structs.fields(c_int, "d tiles silu wide_rows total"),
    ]


class StateUpdateParams(ctypes.Structure):
    """``StateUpdateParams`` of ``update.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "state x dt B C z A D bias dt_weight dt_gain B_gain C_gain"),
        *structs.fields(c_void_p, "rows conv_state conv_weight conv_bias tickets out"),
        *structs.fields(c_longlong, "state_b x_b dt_b B_b B_g C_b C_g z_b conv_b conv_k"),
        *structs.fields(c_int, "d n p groups tiles span D_head D_channel softplus silu wide_rows total log_rates rank"),
        *structs.fields(c_float, "low high eps"),
    ]


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA kernels cannot do a step, or ``None`` if they can; see :class:`.dispatch.Backend`."""
    reason, dtype = refuse_tensors(facts), facts.get("dtype", torch.float32)
    if reason is not None:
        return reason
    if facts.get("grad"):
        return "the CUDA kernels have no gradient of a single step"
    if facts.get("state_dtype", torch.float32) not in STATES:
        return f"the CUDA kernels keep the state in float32 or bfloat16, got {str(facts['state_dtype']).removeprefix('torch.')}"
    if facts.get("conv_dtype", dtype) not in (dtype, torch.float32):
        return f"the CUDA kernels keep the convolution's inputs in their type or in float32, got {facts['conv_dtype']}"
    if not (facts.get("whole_rows", True) and facts.get("whole_channels", True)):
        return "the CUDA kernels need rows of the state to lie in one piece"
    if facts.get("d_state", 16) > max(LANES):
        return f"the CUDA kernels hold up to d_state = {max(LANES)}, got {facts['d_state']}"
    return refuse_width(facts) or nvrtc.unavailable()


def _changed(*states: Tensor) -> None:
    # as an in-place operation of torch would: who saved a state for a backward is told
    for state in states:
        if not state.is_inference():
            torch.autograd.graph.increment_version(state)


def update(conv: ConvStep | None, scan: ScanStep | None, options: StepOptions) -> Tensor:
    """One step of a convolution, of a scan, or of one after the other, in one launch."""
    ops = torch.ops.hybridzoo if torch.compiler.is_compiling() else None
    if scan is None:
        assert conv is not None
        return ops.causal_conv1d_update_cuda(*conv, options.silu) if ops else _conv(conv, options.silu)
    if ops is None:
        return _scan(conv, scan, options)
    scan, (low, high) = spelled_out(scan), step_limits(options.dt_limit)
    A = -scan.A.float().exp() if options.log_rates else scan.A
    if conv is None:
        return ops.state_update_cuda(*scan[:3], A, *scan[4:10], options.dt_softplus, low, high)
    behind = (scan.state, scan.dt, A, scan.D, scan.z, scan.dt_bias, scan.rows)
    return ops.conv_ssd_update_cuda(*conv[:4], *behind, options.groups, options.silu, options.dt_softplus, low, high)


def _conv(i: ConvStep, silu: bool) -> Tensor:
    x, state = in_rows(i.x, i.x.dtype), i.state
    wide = i.weight.dtype if i.weight.dtype == x.dtype else torch.float32
    weight, bias = (in_one_piece(m, wide, aligned=True) for m in (i.weight, i.bias))
    out = blank(x)
    if not out.numel():
        return out
    types, aligned = (x.dtype, state.dtype, weight.dtype), min(alignment(x), alignment(state))
    numbers = (*x.shape, weight.shape[1], silu, i.rows is not None and i.rows.dtype == torch.int64, state.shape[0])
    tail, name, blocks = _conv_launch(types, aligned, numbers, (x.stride(0), *state.stride()[:2]))
    packed = structs.pack(tail, x, state, weight, bias, i.rows, out)
    nvrtc.launch("update.cu", name, packed, blocks, THREADS, 0, x.device, overlaps=True)
    _changed(state)
    return out


@functools.lru_cache(maxsize=4096)
def _conv_launch(types: tuple, aligned: int, numbers: tuple, strides: tuple) -> tuple[bytes, str, int]:
    b, d, k, silu, wide_rows, total = numbers
    x_b, state_b, state_k = strides
    # four elements at a time
    whole = all(s % 4 == 0 for s in (d, *strides)) and aligned >= 4 * max(types[0].itemsize, types[1].itemsize)
    tiles = ceil_div(d, 4 * THREADS)
    flags = 0 if whole else UNALIGNED
    rest = ConvUpdateParams(
        x_b=x_b, state_b=state_b, state_k=state_k, d=d, tiles=tiles, silu=silu, wide_rows=wide_rows, total=total
    )
    name = f"conv_update<{', '.join(TYPES[t] for t in types)}, {k}, {flags}>"
    return structs.tail(rest), name, b * tiles


def _formed_here(i: ScanStep, b: int, dtype: torch.dtype) -> bool:
    weight = i.dt_weight
    if weight is None or b > LOW_ROWS or weight.shape[1] > MAX_RANK or weight.shape[1] % 8:
        return False
    return weight.dtype == dtype and weight.is_contiguous() and weight.data_ptr() % 16 == 0


def _scan(conv: ConvStep | None, i: ScanStep, options: StepOptions) -> Tensor:
    b, first = (i.x if conv is None else conv.x).shape[0], i.x if conv is None else conv.x
    dtype = common_type(first, i.dt, i.B, i.C, i.z)
    state, _, dt, A, B, C, D, z, dt_bias, rows, dt_weight, norms = i if _formed_here(i, b, dtype) else spelled_out(i)
    x, sizes = first, state.shape
    out = torch.empty((b, *sizes[1:-1]), dtype=dtype, device=x.device)
    if out.numel():
        x, z = x if x.dim() == 2 else x.flatten(1), z if z is None or z.dim() == 2 else z.flatten(1)
        x, dt, B, C, z = [in_rows(m, dtype) for m in (x, dt, B, C, z)]
        A, D, dt_bias = [in_one_piece(m, aligned=True) for m in (A, D, dt_bias)]
        gains = (None,) * 3 if norms is None else [in_one_piece(m, dtype) for m in norms[1:]]
        types, width, strides = (dtype, dtype, dtype, state.dtype), 0, _row_strides(state, x, dt, B, C, z) + (0, 0)
        convolved: Any = (None, None, None)
        if conv is not None:
            wide = dtype if conv.weight.dtype == dtype else torch.float32
            weight, bias = [in_one_piece(m, wide, aligned=True) for m in (conv.weight, conv.bias)]
            types = (dtype, conv.state.dtype, wide, state.dtype)
            width, convolved = weight.shape[1], (conv.state, weight, bias)
            strides = strides[:-2] + conv.state.stride()[:2]
        heads = sizes[1] if dt_weight is not None else dt.shape[1]
        look = ScanLook(
            types,
            width,
            (b, math.prod(sizes[1:-1]), sizes[-1], heads, options.groups if B is None else B.shape[1]),
            strides,
            (alignment(state), min(alignment(B), alignment(C))),
            A.dim() == 1,
            _skip(D),
            (options.dt_softplus, options.silu, rows is not None and rows.dtype == torch.int64, sizes[0]),
            step_limits(options.dt_limit),
            options.log_rates,
            0 if dt_weight is None else dt_weight.shape[1],
            None if norms is None else norms.eps,
        )
        tail, name, blocks, tiles = _scan_launch(look, processors(x.device))
        drawn = tickets(conv.state, (conv.state.shape[0], options.groups)) if conv is not None and tiles > 1 else None
        of_dt = (dt_bias, dt_weight, *gains, rows)
        packed = structs.pack(tail, state, x, dt, B, C, z, A, D, *of_dt, *convolved, drawn, out)
        nvrtc.launch("update.cu", name, packed, blocks, THREADS, 0, x.device, overlaps=True)
        _changed(state, *(() if conv is None else (conv.state,)))
    return cast(out, first.dtype)


class ScanLook(NamedTuple):
    """All that a launch of ``state_update`` depends on besides addresses."""

    types: tuple[
        torch.dtype, torch.dtype, torch.dtype, torch.dtype
    ]  # of inputs, the convolution's state, its filter, the state
    width: int  # of the filter, 0 without a convolution
    sizes: tuple[int, int, int, int, int]  # b, d, n, h, g
    strides: tuple[int, ...]
    aligned: tuple[int, int]  # the state; B and C
    one_A: bool
    skip: tuple[int, int]
    options: tuple[bool, bool, bool, int]  # softplus, silu, int64 rows, rows of the state
    limits: tuple[float, float]
    log_rates: bool = False
    rank: int = 0  # of step sizes in low-rank form, 0 without
    eps: float | None = None  # of norms of these, B and C


def _row_strides(
    state: Tensor, x: Tensor, dt: Tensor, B: Tensor | None, C: Tensor | None, z: Tensor | None
) -> tuple[int, ...]:
    none = (0, 0)
    bc = (none if B is None else B.stride()[:2]) + (none if C is None else C.stride()[:2])
    return (state.stride(0), x.stride(0), dt.stride(0), *bc, 0 if z is None else z.stride(0))


def _skip(D: Tensor | None) -> tuple[int, int]:
    """Strides of D along heads and their channels."""
    if D is None:
        return 0, 0
    return (1, 0) if D.dim() == 1 else (D.shape[1], 1)


@functools.lru_cache(maxsize=4096)
def _scan_launch(look: ScanLook, count: int) -> tuple[bytes, str, int, int]:
    """The struct behind its pointers, the kernel, its blocks, and how many of them share a group; ``count`` multiprocessors."""
    b, d, n, h, g = look.sizes
    softplus, silu, wide_rows, total = look.options
    lanes, vectors = next(shape for size, shape in LANES.items() if size >= n)
    if look.rank:
        # more lanes share out the products of a channel, and more blocks the channels
        shares = lanes * vectors
        lanes = min(32, shares)
        vectors = shares // lanes
    # as many bytes on their way of a state in 16 bits
    at_once, most = THREADS // lanes, 1 if look.rank else max(1, 16 // (vectors * look.types[3].itemsize))
    # wide blocks read B and C, or convolve them, less often, narrow ones fill the chip
    spans = [s for s in (512, 256, 128, 64, 32) if at_once < s <= max(128, at_once * most)]
    span = next((s for s in spans if b * g * ceil_div(d // g, s) >= BLOCKS * count), at_once)
    per = min(most, span // at_once)
    tiles = ceil_div(d // g, span)
    state_b, _, _, B_b, B_g, C_b, C_g, *_ = look.strides
    whole = n % 4 == 0
    flags = HEADS if look.one_A else 0
    flags |= (LOW_DT if look.rank else 0) | (0 if look.eps is None else NORMS)
    if not whole or state_b % 4 or look.aligned[0] < 4 * look.types[3].itemsize:
        flags |= UNALIGNED
    if not whole or any(s % 4 for s in (B_b, B_g, C_b, C_g)) or look.aligned[1] < 4 * look.types[0].itemsize:
        flags |= SPLIT
    rest = StateUpdateParams(
        **dict(zip("state_b x_b dt_b B_b B_g C_b C_g z_b conv_b conv_k".split(), look.strides, strict=True)),
        d=d,
        n=n,
        p=d // h,
        groups=g,
        tiles=tiles,
        span=span,
        D_head=look.skip[0],
        D_channel=look.skip[1],
        softplus=softplus,
        silu=silu,
        wide_rows=wide_rows,
        total=total,
        low=look.limits[0],
        high=look.limits[1],
        log_rates=look.log_rates,
        rank=look.rank,
        eps=look.eps or 0.0,
    )
    types = ", ".join(TYPES[t] for t in look.types)
    name = f"state_update<{types}, {look.width}, {lanes}, {vectors}, {per}, {flags}>"
    return structs.tail(rest), name, b * g * tiles, tiles


@custom_op(
    "hybridzoo::causal_conv1d_update_cuda",
    schema="(Tensor x, Tensor(a1!) state, Tensor weight, Tensor? bias, Tensor? rows, bool silu) -> Tensor",
    mutates_args=("state",),
)
def conv_update_op(*operands: Any) -> Tensor:
    """One step of the convolution, (b, d) in x's dtype."""
    *tensors, silu = operands
    return _conv(ConvStep(*tensors), silu)


@custom_op(
    "hybridzoo::state_update_cuda",
    schema="(Tensor(a0!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? rows, bool softplus, float low, float high) -> Tensor",
    mutates_args=("state",),
)
def state_update_op(*operands: Any) -> Tensor:
    """One step of a scan, in x's shape and dtype."""
    *tensors, softplus, low, high = operands
    return _scan(None, ScanStep(*tensors), StepOptions(False, softplus, (low, high)))


@custom_op(
    "hybridzoo::conv_ssd_update_cuda",
    schema="(Tensor xBC, Tensor(a1!) conv_state, Tensor weight, Tensor? bias, Tensor(a4!) state, Tensor dt, Tensor A, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, Tensor? rows, SymInt groups, bool silu, bool softplus, float low, float high) -> Tensor",
    mutates_args=("conv_state", "state"),
)
def conv_ssd_update_op(*operands: Any) -> Tensor:
    """One step of both, (b, h, p) in xBC's dtype."""
    *conv, state, dt, A, D, z, dt_bias, rows = operands[:11]
    groups, silu, softplus, low, high = operands[11:]
    scan = ScanStep(state, None, dt, A, None, None, D, z, dt_bias, rows)
    return _scan(ConvStep(*conv), scan, StepOptions(silu, softplus, (low, high), groups))


conv_update_op.register_fake(lambda x, *_: blank(x))
state_update_op.register_fake(lambda state, x, *_: blank(x))


@conv_ssd_update_op.register_fake
def _conv_ssd_fake(xBC, conv_state, weight, bias, state, *_):
    return torch.empty((xBC.shape[0], *state.shape[1:3]), dtype=xBC.dtype, device=xBC.device)

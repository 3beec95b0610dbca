"""One token at a time on an NVIDIA GPU: launches of ``update.cu``, and ``torch.library`` ops around them for compiled programs.

Every function is one launch. Operands of one 16-bit type stay in it, operands of different types meet in float32; the recurrent state is
float32, the convolution's is of the inputs' type or float32.
"""

import ctypes
import functools
import math
from ctypes import c_float, c_int, c_longlong, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..conv.cuda import refuse_width
from ..gpu import nvrtc, structs
from ..gpu.device import processors
from ..gpu.operands import TYPES, UNALIGNED, alignment, ceil_div, refuse_tensors, whole
from ..operators import custom_op
from ..scan.shapes import MAX_STATE

HEADS, SPLIT = 8, 16
THREADS = 128
# by d_state, rounded up to the next one here: lanes that share a channel, and how many times four states each of them has
LANES = {4: (1, 1), 8: (2, 1), 16: (2, 2), 32: (4, 2), 64: (8, 2), 128: (8, 4), 256: (16, 4)}
# blocks that every multiprocessor should have, for the widest blocks that leave so many
BLOCKS = 8


class ConvParams(ctypes.Structure):
    """``ConvUpdateParams`` of ``update.cu``."""

    _fields_ = [
        *((name, c_void_p) for name in "x state weight bias rows out".split()),
        *((name, c_longlong) for name in "x_b state_b state_k".split()),
        *((name, c_int) for name in "d tiles silu wide_rows total".split()),
    ]


class StateParams(ctypes.Structure):
    """``StateUpdateParams`` of ``update.cu``."""

    _fields_ = [
        *((name, c_void_p) for name in "state x dt B C z A D bias rows conv_state conv_weight conv_bias".split()),
        *((name, c_void_p) for name in "tickets out".split()),
        *((name, c_longlong) for name in "state_b x_b dt_b B_b B_g C_b C_g z_b conv_b conv_k".split()),
        *((name, c_int) for name in "d n p groups tiles span D_head D_channel softplus silu wide_rows total".split()),
        *((name, c_float) for name in "low high".split()),
    ]


def refuse(facts: dict[str, Any]) -> str | None:
    """Why the CUDA kernels cannot do a step, or ``None`` if they can; see :class:`.dispatch.Backend`."""
    reason, dtype = refuse_tensors(facts), facts.get("dtype", torch.float32)
    if reason is not None:
        return reason
    if facts.get("grad"):
        return "the CUDA kernels have no gradient of a single step"
    if facts.get("state_dtype", torch.float32) != torch.float32:
        return f"the CUDA kernels keep the state in float32, got {str(facts['state_dtype']).removeprefix('torch.')}"
    if facts.get("conv_dtype", dtype) not in (dtype, torch.float32):
        return f"the CUDA kernels keep the convolution's inputs in their type or in float32, got {facts['conv_dtype']}"
    if not (facts.get("whole_rows", True) and facts.get("whole_channels", True)):
        return "the CUDA kernels need rows of the state to lie in one piece"
    if facts.get("d_state", 16) > MAX_STATE:
        return f"the CUDA kernels hold up to d_state = {MAX_STATE}, got {facts['d_state']}"
    return refuse_width(facts) or nvrtc.unavailable()


def _in(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """The tensors in one type, their last dimension contiguous."""
    out = [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]
    return [x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in out]


def _common(first: Tensor, *others: Tensor | None) -> torch.dtype:
    return first.dtype if all(x is None or x.dtype == first.dtype for x in others) else torch.float32


def _changed(*states: Tensor) -> None:
    # as an in-place operation of torch would: who saved a state for a backward is told
    for state in states:
        if not state.is_inference():
            torch.autograd.graph.increment_version(state)


_counters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _tickets(conv_state: Tensor, groups: int) -> Tensor:
    """A counter per row and group, zero between launches, that lives as long as the state: launches that run at once must not share one."""
    counters = _counters.get(conv_state)
    if counters is None or counters.shape != (conv_state.shape[0], groups):
        counters = torch.zeros((conv_state.shape[0], groups), dtype=torch.int32, device=conv_state.device)
        # what is made while a graph is captured is zero only when the graph runs
        if not (conv_state.is_cuda and torch.cuda.is_current_stream_capturing()):
            _counters[conv_state] = counters
    return counters


def conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, rows: Tensor | None) -> Tensor:
    """:func:`.op.causal_conv1d_update`."""
    if torch.compiler.is_compiling():
        return torch.ops.hybridzoo.causal_conv1d_update_cuda(x, state, weight, bias, rows, silu)
    return _conv(x, state, weight, bias, rows, silu)


def _conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, silu: bool) -> Tensor:
    (x,) = _in(x.dtype, x)
    wide = weight.dtype if weight.dtype == x.dtype else torch.float32
    weight, bias = whole(weight, wide), whole(bias, wide)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    types, aligned = (x.dtype, state.dtype, weight.dtype), min(alignment(x), alignment(state))
    numbers = (*x.shape, weight.shape[1], silu, rows is not None and rows.dtype == torch.int64, state.shape[0])
    tail, name, blocks = _conv_launch(types, aligned, numbers, (x.stride(0), *state.stride()[:2]))
    packed = structs.pack(tail, x, state, weight, bias, rows, out)
    nvrtc.launch("update.cu", name, packed, blocks, THREADS, 0, x.device)
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
    rest = ConvParams(
        x_b=x_b, state_b=state_b, state_k=state_k, d=d, tiles=tiles, silu=silu, wide_rows=wide_rows, total=total
    )
    name = f"conv_update<{', '.join(TYPES[t] for t in types)}, {k}, {flags}>"
    return structs.tail(rest), name, b * tiles


def selective(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    rows: Tensor | None,
) -> Tensor:
    """:func:`.op.selective_state_update`."""
    run = torch.ops.hybridzoo.state_update_cuda if torch.compiler.is_compiling() else _state
    return run(state, u, dt, A, B, C, D, z, dt_bias, rows, dt_softplus, -math.inf, math.inf)


def ssd(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    rows: Tensor | None,
) -> Tensor:
    """:func:`.op.ssd_state_update`."""
    run = torch.ops.hybridzoo.state_update_cuda if torch.compiler.is_compiling() else _state
    return run(state, x, dt, A, B, C, D, z, dt_bias, rows, dt_softplus, *_range(dt_limit))


def conv_ssd(
    xBC: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    groups: int,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    rows: Tensor | None,
) -> Tensor:
    """:func:`.op.conv_ssd_update`."""
    run = torch.ops.hybridzoo.conv_ssd_update_cuda if torch.compiler.is_compiling() else _conv_ssd
    tensors = (xBC, conv_state, weight, bias, state, dt, A, D, z, dt_bias, rows)
    return run(*tensors, groups, silu, dt_softplus, *_range(dt_limit))


def _range(limit: tuple[float, float]) -> tuple[float, float]:
    return (-math.inf, math.inf) if tuple(limit) == (0.0, math.inf) else (float(limit[0]), float(limit[1]))


def _state(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    dtype, kept = _common(x, dt, B, C, z), x.dtype
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.dim() == 3:
        x, z = x.flatten(1), None if z is None else z.flatten(1)
    x, dt, B, C, z = _in(dtype, x, dt, B, C, z)
    A, D, dt_bias = whole(A), whole(D), whole(dt_bias)
    if out.numel():
        scan = Scan(
            (dtype, dtype, dtype),
            0,
            (*x.shape, state.shape[-1], dt.shape[1], B.shape[1]),
            _row_strides(state, x, dt, B, C, z) + (0, 0),
            (alignment(state), min(alignment(B), alignment(C))),
            A.dim() == 1,
            _skip(D),
            (softplus, False, rows is not None and rows.dtype == torch.int64, state.shape[0]),
            (low, high),
        )
        tail, name, blocks, _ = _scan_launch(scan, processors(x.device))
        packed = structs.pack(tail, state, x, dt, B, C, z, A, D, dt_bias, rows, None, None, None, None, out)
        nvrtc.launch("update.cu", name, packed, blocks, THREADS, 0, x.device)
        _changed(state)
    return out if dtype == kept else out.to(kept)


def _conv_ssd(
    xBC: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: Tensor | None,
    groups: int,
    silu: bool,
    softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    dtype, kept = _common(xBC, dt, z), xBC.dtype
    x, dt, z = _in(dtype, xBC, dt, None if z is None else z.flatten(1))
    wide = dtype if weight.dtype == dtype else torch.float32
    weight, bias = whole(weight, wide), whole(bias, wide)
    A, D, dt_bias = whole(A), whole(D), whole(dt_bias)
    (_, h, p, n), b = state.shape, x.shape[0]
    out = torch.empty((b, h, p), dtype=dtype, device=x.device)
    if out.numel():
        scan = Scan(
            (dtype, conv_state.dtype, wide),
            weight.shape[1],
            (b, h * p, n, h, groups),
            _row_strides(state, x, dt, None, None, z) + conv_state.stride()[:2],
            (alignment(state), 16),
            True,
            _skip(D),
            (softplus, silu, rows is not None and rows.dtype == torch.int64, state.shape[0]),
            (low, high),
        )
        tail, name, blocks, tiles = _scan_launch(scan, processors(x.device))
        tickets = _tickets(conv_state, groups) if tiles > 1 else None
        scan_inputs = (state, x, dt, None, None, z, A, D, dt_bias, rows)
        packed = structs.pack(tail, *scan_inputs, conv_state, weight, bias, tickets, out)
        nvrtc.launch("update.cu", name, packed, blocks, THREADS, 0, x.device)
        _changed(state, conv_state)
    return out if dtype == kept else out.to(kept)


class Scan(NamedTuple):
    """What a launch of ``state_update`` depends on besides addresses."""

    types: tuple[torch.dtype, torch.dtype, torch.dtype]  # of inputs, the convolution's state, its filter
    width: int  # of the filter, 0 without a convolution
    sizes: tuple[int, int, int, int, int]  # b, d, n, h, g
    strides: tuple[int, ...]
    aligned: tuple[int, int]  # the state; B and C
    one_A: bool
    skip: tuple[int, int]
    options: tuple[bool, bool, bool, int]  # softplus, silu, int64 rows, rows of the state
    limits: tuple[float, float]


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
def _scan_launch(scan: Scan, count: int) -> tuple[bytes, str, int, int]:
    """The struct behind its pointers, the kernel, its blocks, and how many of them share a group; ``count`` multiprocessors."""
    b, d, n, h, g = scan.sizes
    softplus, silu, wide_rows, total = scan.options
    lanes, vectors = next(shape for size, shape in LANES.items() if size >= n)
    at_once, most = THREADS // lanes, max(1, 4 // vectors)
    # wide blocks read B and C, or convolve them, less often, narrow ones fill the chip
    spans = [s for s in (512, 256, 128, 64, 32) if at_once < s <= max(128, at_once * most)]
    span = next((s for s in spans if b * g * ceil_div(d // g, s) >= BLOCKS * count), at_once)
    per = min(most, span // at_once)
    tiles = ceil_div(d // g, span)
    state_b, _, _, B_b, B_g, C_b, C_g, *_ = scan.strides
    whole = n % 4 == 0
    flags = HEADS if scan.one_A else 0
    if not whole or state_b % 4 or scan.aligned[0] < 16:
        flags |= UNALIGNED
    if not whole or any(s % 4 for s in (B_b, B_g, C_b, C_g)) or scan.aligned[1] < 4 * scan.types[0].itemsize:
        flags |= SPLIT
    rest = StateParams(
        **dict(zip("state_b x_b dt_b B_b B_g C_b C_g z_b conv_b conv_k".split(), scan.strides, strict=True)),
        d=d,
        n=n,
        p=d // h,
        groups=g,
        tiles=tiles,
        span=span,
        D_head=scan.skip[0],
        D_channel=scan.skip[1],
        softplus=softplus,
        silu=silu,
        wide_rows=wide_rows,
        total=total,
        low=scan.limits[0],
        high=scan.limits[1],
    )
    types = ", ".join(TYPES[t] for t in scan.types)
    name = f"state_update<{types}, {scan.width}, {lanes}, {vectors}, {per}, {flags}>"
    return structs.tail(rest), name, b * g * tiles, tiles


conv_update_op = custom_op("hybridzoo::causal_conv1d_update_cuda", _conv, mutates_args=("state",))
state_update_op = custom_op("hybridzoo::state_update_cuda", _state, mutates_args=("state",))
conv_ssd_update_op = custom_op("hybridzoo::conv_ssd_update_cuda", _conv_ssd, mutates_args=("conv_state", "state"))


@conv_update_op.register_fake
def _conv_fake(x, state, weight, bias, rows, silu):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@state_update_op.register_fake
def _state_fake(state, x, *_):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@conv_ssd_update_op.register_fake
def _conv_ssd_fake(xBC, conv_state, weight, bias, state, *_):
    return torch.empty((xBC.shape[0], *state.shape[1:3]), dtype=xBC.dtype, device=xBC.device)

"""Gradients of the CUDA SSD: how ``ssd_backward.cu`` is launched, and the ops and autograd around it.

Four launches: step sizes and their sums; the gradients of the states behind chunks, chunk after chunk from the last; all else, a block
per chunk and share of a group's heads; and the sums of what those blocks left.
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..derivatives import differentiable_once, once
from ..dispatch import Facts
from ..gpu import nvrtc, structs
from ..gpu.device import DRIVERS, processors, shared_memory
from ..gpu.operands import (
    RESET,
    TYPES,
    UNALIGNED,
    ceil_div,
    common_type,
    eager,
    in_one_piece,
    in_rows,
    in_types_of,
)
from ..operators import custom_op, filled, like
from . import cuda
from .chunked import _OPTIONS, _TENSORS
from .cuda import CHUNK, forward, saved_dtype, ssd_op
from .inputs import SsdInputs, SsdOptions

GATED = 2
# chunks that a walk over states has in shared memory
STAGES = 3
# a block's work besides that for its heads, in heads
OVERHEAD = 1.5


class SsdBackwardParams(ctypes.Structure):
    """``SsdBackwardParams`` of ``ssd_backward.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "x dt A B C D z dt_bias reset valid gout glast saved steps cuts gstates"),
        *structs.fields(c_void_p, "gx gdt gz gBC gheads ginit gB gC gA gbias gD"),
        *structs.fields(
            c_longlong, "x_b x_l x_h dt_b dt_l dt_h B_b B_l B_g C_b C_l C_g z_b z_l z_h gout_b gout_l gout_h"
        ),
        *structs.fields(c_int, "batch l h p n groups chunks D_head D_channel softplus wide_dt splits"),
        *structs.fields(c_float, "low high"),
    ]


@dataclass(frozen=True)
class ChunkShape:
    """The template arguments of ``ssd_backward_chunks``: channels and states of a tile, warps down and across, stages of a pipeline."""

    p: int
    n: int
    down: int
    across: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.down * self.across

    def shared_bytes(self, element: int, gated: bool) -> int:
        """``ChunkMemory::bytes``."""
        q, pad, gate = CHUNK[element], 16 // element, int(gated)
        p, n = self.p + pad, self.n + pad
        stage = (2 + gate) * q * p + 2 * self.p * n + (4 * q + 4) * 4 // element
        sums = (3 * self.across + self.down + 2) * q + self.down * self.across
        operands = 2 * q * n + (1 + gate) * q * (q + pad) + 2 * gate * q * p + self.stages * stage
        return operands * element + (8 * sums if element == 4 else 4 * (sums + 4 * self.down * self.across))


def chunk_shape(element: int, p: int, n: int, gated: bool, room: int) -> ChunkShape | None:
    """The shape for heads of p channels and n states, in blocks of ``room`` bytes of shared memory; ``None`` if none fits."""
    states = next((s for s in (32, 64, 128, 256) if s >= n), None)
    if states is None:
        return None
    wide = [64, 32] if p > 32 else [32]
    for stages in (2, 1):
        for channels in wide:
            if element == 2 and states == 256:
                channels, grid = 64, (4, 4)
            else:
                grid = (4, 2) if element == 2 and min(channels, states) == 32 else (2, 4)
            shape = ChunkShape(channels, states, *grid, stages)
            if shape.shared_bytes(element, gated) <= room:
                return shape
    return None


class Look(NamedTuple):
    """All that the launches depend on besides addresses."""

    dtype: torch.dtype
    wide_dt: bool
    sizes: tuple[int, int, int, int, int, int]  # b, l, h, p, n, g
    strides: tuple[int, ...]
    flags: int
    D: int  # axes of the skip, 0: there is none
    options: SsdOptions


class Launch(NamedTuple):
    """A kernel and its grid."""

    source: str
    name: str
    blocks: int
    threads: int
    shared: int


class Plan(NamedTuple):
    """The launches of a backward, the struct behind its pointers, and into how many shares heads of a group are split."""

    launches: tuple[Launch, ...]
    tail: bytes
    splits: int


def _splits(blocks: int, heads: int, slots: int) -> int:
    """Shares of a group's heads, for which the busiest place for blocks has least to do."""
    return min(range(1, heads + 1), key=lambda s: (ceil_div(blocks * s, slots) * (ceil_div(heads, s) + OVERHEAD), s))


@functools.lru_cache(maxsize=4096)
def plan(look: Look, count: int, room: int) -> Plan:
    """Plan for ``count`` multiprocessors with ``room`` bytes of shared memory for a block."""
    b, l, h, p, n, g = look.sizes
    element, T = look.dtype.itemsize, TYPES[look.dtype]
    gated = bool(look.flags & GATED)
    q, pad = CHUNK[element], 16 // element
    chunks = ceil_div(l, q)
    shape = chunk_shape(element, p, n, gated, room)
    if shape is None:
        raise ValueError(f"ssd: no backward of p = {p}, n = {n} fits {room} bytes of shared memory.")
    at_once = max(1, min(room // shape.shared_bytes(element, gated), 256 // shape.threads))
    splits = _splits(b * chunks * g, h // g, count * at_once)
    tile_p, tile_n = 32 if p <= 32 else 64, 32 if n <= 32 else 64
    while b * h * ceil_div(p, tile_p) * ceil_div(n, tile_n) < 2 * count and tile_n + tile_p > 64:
        tile_p, tile_n = (tile_p, 32) if tile_n == 64 else (32, tile_n)
    stage = (q * (1 + gated) * (tile_p + pad) + q * (tile_n + pad)) * element + 8 * q
    columns = h * (2 + (p if look.D == 2 else 1))
    first, then = "ssd_backward_states.cu", "ssd_backward.cu"
    launches = (
        Launch(first, f"ssd_steps<{T}>", ceil_div(b * chunks * h, 4), 128, 0),
        Launch(
            first,
            f"ssd_backward_states<{T}, {tile_p}, {tile_n}, {look.flags}>",
            b * h * ceil_div(p, tile_p) * ceil_div(n, tile_n),
            128,
            STAGES * stage + (2 if element == 2 else 1) * q * (tile_p + pad) * element,
        ),
        Launch(
            then,
            f"ssd_backward_chunks<{T}, {shape.p}, {shape.n}, {shape.down}, {shape.across}, {shape.stages}, {look.flags}>",
            b * chunks * g * splits,
            shape.threads,
            shape.shared_bytes(element, gated),
        ),
        Launch(then, f"ssd_backward_sums<{T}>", ceil_div(2 * b * l * g * n, 256) + ceil_div(columns, 32), 256, 0),
    )
    names = [field[0] for field in SsdBackwardParams._fields_ if field[1] is c_longlong]
    o = look.options
    free = o.dt_limit == (0.0, torch.inf)
    rest = SsdBackwardParams(
        **dict(zip(names, look.strides, strict=True)),
        batch=b,
        l=l,
        h=h,
        p=p,
        n=n,
        groups=g,
        chunks=chunks,
        D_head=p if look.D == 2 else 1,
        D_channel=look.D == 2,
        softplus=o.dt_softplus,
        wide_dt=look.wide_dt,
        splits=splits,
        low=-torch.inf if free else o.dt_min,
        high=o.dt_max,
    )
    return Plan(launches, structs.tail(rest), splits)


def readable(i: SsdInputs) -> SsdInputs:
    """The inputs as the kernels read them: one type but for dt, which may be float32, and unit strides along channels and states."""
    dtype = common_type(i.x, i.B, i.C, i.z)
    x, B, C, z = (in_rows(m, dtype) for m in (i.x, i.B, i.C, i.z))
    dt = i.dt if i.dt.dtype in (dtype, torch.float32) else i.dt.float()
    A, D, dt_bias, state = (in_one_piece(m) for m in (i.A, i.D, i.dt_bias, i.initial_state))
    reset, valid = (in_one_piece(m, torch.bool) for m in (i.reset, i.valid))
    return SsdInputs(x, dt, A, B, C, D, z, dt_bias, state, reset, valid)


def look_of(i: SsdInputs, gout: Tensor, saved: Tensor, options: SsdOptions) -> Look:
    """All that the launches for readable inputs depend on besides addresses."""
    (b, l, h, p), (g, n), x = i.x.shape, i.B.shape[2:], i.x
    lanes = 16 // x.element_size()
    wide = [m for m in (x, i.B, i.C, i.z, gout) if m is not None]
    off = p % lanes or n % lanes or any([m.data_ptr() % 16 or any(s % lanes for s in m.stride()[:3]) for m in wide])
    flags = bool(off or saved.data_ptr() % 16) * UNALIGNED | (i.reset is not None) * RESET | (i.z is not None) * GATED
    strides = (m.stride()[:3] if m is not None else (0, 0, 0) for m in (x, i.dt, i.B, i.C, i.z, gout))
    return Look(
        x.dtype,
        i.dt.dtype != x.dtype,
        (b, l, h, p, n, g),
        sum(strides, ()),
        flags,
        0 if i.D is None else i.D.dim(),
        options,
    )


def backward(
    i: SsdInputs, options: SsdOptions, gout: Tensor, glast: Tensor | None, saved: Tensor, cut: Plan | None = None
) -> SsdInputs:
    """Gradients of readable inputs, those of A, D, dt_bias and the initial state in float32.

    ``saved`` holds the states before chunks, (b, chunks, h, p, n) in their :func:`saved_dtype`.
    """
    x, device = i.x, i.x.device
    (b, l, h, p), (g, n) = x.shape, i.B.shape[2:]
    gout, glast = in_rows(gout, x.dtype), in_one_piece(glast)
    look = look_of(i, gout, saved, options)
    cut = cut or plan(look, processors(device), shared_memory(device) - DRIVERS)
    chunks, q = ceil_div(l, CHUNK[x.element_size()]), CHUNK[x.element_size()]

    def wide(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    gx, gB, gC = (torch.empty(m.shape, dtype=x.dtype, device=device) for m in (x, i.B, i.C))
    gz = None if i.z is None else torch.empty_like(gx)
    gdt = torch.empty((b, l, h), dtype=i.dt.dtype, device=device)
    gstates = torch.empty((b, chunks, h, p, n), dtype=saved_dtype(x.dtype), device=device)
    ginit = None if i.initial_state is None else wide(b, h, p, n)
    columns = h * (2 + (p if look.D == 2 else 1))
    steps, gBC, gheads = wide(4, b, h, chunks * q), wide(cut.splits, 2, b, l, g, n), wide(b * chunks, columns)
    gA, gbias, gD = wide(h), wide(h), wide(columns - 2 * h)
    cuts = torch.empty((b, chunks), dtype=torch.int32, device=device)
    inputs = (x, i.dt, i.A, i.B, i.C, i.D, i.z, i.dt_bias, i.reset, i.valid)
    outputs = (gx, gdt, gz, gBC, gheads, ginit, gB, gC, gA, gbias, gD)
    packed = structs.pack(cut.tail, *inputs, gout, glast, saved, steps, cuts, gstates, *outputs)
    for launch in cut.launches:
        nvrtc.launch(launch.source, launch.name, packed, launch.blocks, launch.threads, launch.shared, device)
    return SsdInputs(gx, gdt, gA, gB, gC, None if i.D is None else gD.view(i.D.shape), gz, gbias, ginit)


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA kernels cannot do a call, or ``None`` if they can; see :class:`.dispatch.Backend`."""
    reason = cuda.refuse(facts)
    if reason is not None or not facts.get("grad"):
        return reason
    n, element = facts.get("d_state", 128), facts.get("dtype", torch.float32).itemsize
    room = shared_memory(torch.device("cuda", torch.cuda.current_device())) - DRIVERS
    if chunk_shape(element, 64, n, True, room) is None:
        return f"the CUDA kernels of ssd need more than {room >> 10} KiB of shared memory for the gradients of d_state = {n}"
    return None


def _gradients(gout: Tensor, glast: Tensor | None, saved: Tensor, i: SsdInputs, options: SsdOptions) -> tuple:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state in their types."""
    given = i[:9]
    if i.x.numel() and i.B.numel():
        return tuple(in_types_of(given, backward(readable(i), options, gout, glast, saved)[:9]))
    grads = [None if m is None else torch.zeros_like(m) for m in given]
    if grads[-1] is not None and glast is not None:
        grads[-1].copy_(glast)
    return tuple(grads)


@custom_op(
    "hybridzoo::ssd_cuda_backward",
    schema=f"(Tensor gout, Tensor? glast, Tensor saved, {_TENSORS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 9)})",
)
def ssd_backward_op(gout: Tensor, glast: Tensor | None, saved: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; empty where there is no such input."""
    return filled(_gradients(gout, glast, saved, SsdInputs(*operands[:-4]), SsdOptions(*operands[-4:])), gout)


differentiable_once(ssd_backward_op)


@ssd_backward_op.register_fake
def _ssd_backward_fake(gout, glast, saved, *operands):
    return like(gout, *operands[:9])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.dt_softplus, ctx.low, ctx.high, ctx.chunk, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, gout: Tensor | None, glast: Tensor | None, _: Any) -> tuple:
    *inputs, saved = ctx.saved_tensors
    if gout is None:
        gout = torch.zeros_like(inputs[0])
    options = ctx.dt_softplus, ctx.low, ctx.high, ctx.chunk
    grads = torch.ops.hybridzoo.ssd_cuda_backward(gout, glast, saved, *inputs, *options)
    return (*(None if x is None else g for g, x in zip(grads, inputs, strict=False)), *[None] * 7)


ssd_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs a small call more time than the kernels."""

    @staticmethod
    def forward(ctx: Any, options: SsdOptions, *tensors: Any) -> tuple[Tensor, Tensor]:
        out, last, saved = forward(SsdInputs(*tensors), options, True)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)
        return out, last

    @staticmethod
    @once("ssd")
    def backward(ctx: Any, gout: Tensor | None, glast: Tensor | None) -> tuple:
        *tensors, saved = ctx.saved_tensors
        if gout is None:
            gout = torch.zeros_like(tensors[0])
        return (None, *_gradients(gout, glast, saved, SsdInputs(*tensors), ctx.options), None, None)


def ssd(i: SsdInputs, options: SsdOptions) -> tuple[Tensor, Tensor]:
    """:func:`.reference.ssd` on an NVIDIA GPU; the same arguments and results."""
    save = torch.is_grad_enabled() and any([m is not None and m.requires_grad for m in i])
    # what is traced, or is not a plain tensor, needs the registered op
    if not eager(i.x):
        return torch.ops.hybridzoo.ssd_cuda(*i, *options, save)[:2]
    return _Eager.apply(options, *i) if save else forward(i, options, False)[:2]

"""The CUDA selective scan: what is allocated, how operands reach the kernels, and the launches.

The sources (``cuda/scan_forward.cu``, ``cuda/scan_backward.cu``) say what the kernels do, :mod:`.cuda_shapes` which instance a call takes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cuda_params as params
from . import nvrtc
from .cuda_shapes import (
    ADJOINT,
    BACKWARD,
    FULL,
    STATE,
    BackwardShape,
    ForwardShape,
    Grid,
    backward_plan,
    ceil_div,
    forward_plan,
    instance,
)

TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
RESET, WALK, UNALIGNED = 1, 2, 4


@dataclass
class Call:
    """One scan's operands in the form that the kernels read: one element type, unit strides along channels and states."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    reset: Tensor | None
    valid: Tensor | None
    dt_softplus: bool
    walk: tuple[int, ...] | None = None  # one of :mod:`.paths`
    before: Tensor | None = None  # (b, l, d) float32: what the outputs of earlier walks add up to
    sum: Tensor | None = None  # the same with this walk's, in place of an output

    @classmethod
    def of(cls, u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus) -> "Call":
        """From the op's arguments; operands of different types meet in float32."""
        same = all(m is None or m.dtype == u.dtype for m in (dt, B, C, z))
        dtype = u.dtype if same and u.dtype in TYPES else torch.float32
        u, dt, B, C, z = (in_rows(m, dtype) for m in (u, dt, B, C, z))
        A, D, dt_bias, initial_state = (_whole(m, torch.float32) for m in (A, D, dt_bias, initial_state))
        reset, valid = (_whole(m, torch.bool) for m in (reset, valid))
        return cls(u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """b, l, d, n, g."""
        b, l, d = self.u.shape
        return b, l, d, self.A.shape[1], self.B.shape[2]

    def signature(self, *wide: Tensor | None) -> tuple:
        """What the non-pointer parameters of a launch depend on, ``wide`` being the (b, l, d) tensors that it moves."""
        strides = [(0, 0) if x is None else x.stride()[:2] for x in wide]
        off = any(x is not None and x.data_ptr() % 16 for x in (*wide, self.B, self.C))
        return (
            self.u.dtype,
            self.sizes,
            *strides,
            self.B.stride()[:3],
            self.C.stride()[:3],
            off,
            self.reset is not None,
            self.walk,
            self.dt_softplus,
        )

    def states(self, save: bool, *lead: int) -> tuple[Tensor, Tensor | None]:
        """Room for the last state and for the states that are saved, with these leading axes."""
        b, l, d, n, _ = self.sizes
        saved = self.A.new_empty((*lead, b, ceil_div(l, BACKWARD[instance(n)].k), d, n)) if save else None
        return self.A.new_empty((*lead, b, d, n)), saved

    def gradients(self, *lead: int, gz: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Room for the gradients of u, dt, B, C and z, with these leading axes; that of z may be there."""
        b, l, d, n, g = self.sizes
        gu, gdt = (self.u.new_empty((*lead, b, l, d)) for _ in range(2))
        gB, gC = (self.u.new_empty((*lead, b, l, g, n)) for _ in range(2))
        return gu, gdt, gB, gC, torch.empty_like(gu) if gz is None and self.z is not None else gz


def in_rows(x: Any, dtype: torch.dtype) -> Any:
    """``x`` in this type with unit stride along channels, as the kernels read it."""
    if x is None:
        return None
    if x.dtype != dtype:
        x = x.to(dtype)
    strides = x.stride()
    return x if strides[-1] == 1 and strides[1] < 2**31 else x.contiguous()


def _whole(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if x is None or (x.dtype == dtype and x.is_contiguous()):
        return x
    return x.to(dtype).contiguous()


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


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _flags(dtype, sizes, strides, B, C, off, reset, walk) -> int:
    """``Flags`` of the sources: 16 bytes are moved at a time if all rows and the borders of groups start at multiples of 16 bytes."""
    b, l, d, n, g = sizes
    lanes = 16 // dtype.itemsize
    borders = [s for pair in strides for s, size in zip(pair, (b, l), strict=True) if size > 1]
    borders += [d] + ([d // g] if g > 1 else [])
    # fewer states than 16 bytes hold are read one by one in any case
    if n >= lanes or n != instance(n):
        borders += [s for three in (B, C) for s, size in zip(three, (b, l, g), strict=True) if size > 1] + [n]
    return reset * RESET | (walk is not None) * WALK | (off or any(s % lanes for s in borders)) * UNALIGNED


def forward(
    call: Call,
    save: bool,
    shape: ForwardShape | None = None,
    chunks: int | None = None,
    into: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The outputs (b, l, d), the last state (b, d, n), and the states before every K-th step, (b, l / K, d, n), if wanted."""
    shape, grid = forward_plan(*call.sizes, processors(call.u.device), shape, chunks)
    out, last, saved = into or (call.u.new_empty(call.u.shape), *call.states(save))
    start = call.initial_state
    if grid.chunks > 1:
        start = chunk_starts(call, shape, STATE, grid, call.initial_state, None)
    _launch_forward(call, shape, FULL, grid, call.u, out, start, last, saved, None, None)
    return out, last, saved


def chunk_starts(
    call: Call, shape: ForwardShape, mode: int, grid: Grid, first: Tensor | None, gout: Tensor | None
) -> Tensor:
    """What enters every chunk, (b, chunks, d, n): the state from the left, or, in ADJOINT mode, its gradient from the right."""
    b, _, d, n, _ = call.sizes
    local, decay = call.A.new_empty((b, grid.chunks, d, n)), call.A.new_empty((b, grid.chunks, d, 2))
    _launch_forward(call, shape, mode, grid, call.u if gout is None else gout, None, None, None, None, local, decay)
    tail = params.tail(params.Carry(total=b * d * n, d=d, n=n, chunks=grid.chunks, reverse=mode == ADJOINT))
    packed = params.pack(tail, call.A, decay, first, local)
    nvrtc.launch("scan_forward.cu", "scan_carry", packed, ceil_div(b * d * n, 256), 256, 0, call.u.device)
    return local


def _sizes(sizes: tuple, grid: Grid, walk: tuple | None, softplus: bool) -> dict[str, Any]:
    """The parameters behind the strides, which both kernels have."""
    b, l, d, n, g = sizes
    cut = {"chunk_len": grid.length, "tiles_per_group": grid.tiles, "chunks": grid.chunks}
    return {"walk": params.walk(walk, l), "l": l, "batch": b, "d": d, "n": n, "groups": g, "softplus": softplus, **cut}


@functools.lru_cache(maxsize=4096)
def _forward_launch(shape: ForwardShape, mode: int, grid: Grid, signature: tuple) -> tuple:
    dtype, sizes, *strides, B, C, off, reset, walk, softplus = signature
    b, _, _, n, g = sizes
    u, dt, z, out = strides
    tail = params.tail(
        params.Forward(
            **params.strides(u=u, dt=dt, B=B, C=C, z=z, out=out),
            **_sizes(sizes, grid, walk, softplus),
        )
    )
    flags = _flags(dtype, sizes, strides, B, C, off, reset, walk)
    lanes = f"{shape.nc}, {shape.ns}, {shape.ln}, {shape.ch}, {shape.tt}, {shape.nh}"
    name = f"scan_forward<{TYPES[dtype]}, {lanes}, {BACKWARD[instance(n)].k}, {mode}, {flags}, {shape.blocks}>"
    # nothing follows the last chunk, or the first on the way back
    chunks = grid.chunks - (mode != FULL)
    return tail, name, b * g * grid.tiles * chunks, shape.nc + shape.nh, shape.shared_bytes(dtype.itemsize, mode)


def _launch_forward(call, shape, mode, grid, u, out, start, last, saved, local, decay) -> None:
    signature = call.signature(u, call.dt, call.z, out)
    tail, name, blocks, threads, shared = _forward_launch(shape, mode, grid, signature)
    inputs = (u, call.dt, call.B, call.C, call.z, call.A, call.D, call.dt_bias, start, call.reset, call.valid)
    packed = params.pack(tail, *inputs, out, last, saved, local, decay, call.before, call.sum)
    nvrtc.launch("scan_forward.cu", name, packed, blocks, threads, shared, call.u.device)


def backward(
    call: Call,
    gout: Tensor,
    glast: Tensor | None,
    saved: Tensor,
    shape: BackwardShape | None = None,
    chunks: int | None = None,
    into: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state; those of A, D, dt_bias and the state are float32."""
    b, l, d, n, g = call.sizes
    count = processors(call.u.device)
    shape, grid = backward_plan(*call.sizes, count, shape, chunks)
    glast = _whole(glast, torch.float32)
    gout = in_rows(gout, call.u.dtype)
    if grid.chunks > 1:
        sweep, _ = forward_plan(b * (grid.chunks - 1), grid.length, d, n, g, count, chunks=1)
        own = Grid(ceil_div(d // g, sweep.channels), grid.chunks, grid.length)
        glast = chunk_starts(call, sweep, ADJOINT, own, glast, gout)
    gu, gdt, gB, gC, gz = into or call.gradients()
    one, rows, new = b * l * g * n, b * grid.chunks, call.A.new_empty
    # one allocation for all that is only passed on to the sums
    parts = [2 * grid.tiles * one, rows * d * n, 2 * rows * d]
    gbc, gA, gskip = new(sum(parts)).split(parts)
    total_A, gD, gbias = new((d, n)), new(d), new(d)
    ginit = None if call.initial_state is None else new((b, d, n))
    signature = call.signature(call.u, call.dt, call.z, gout, gu, gdt, gz)
    tail, name, blocks, threads, shared = _backward_launch(shape, grid, signature)
    inputs = (
        call.u,
        call.dt,
        call.B,
        call.C,
        call.z,
        gout,
        call.A,
        call.D,
        call.dt_bias,
        saved,
        call.initial_state,
        glast,
    )
    packed = params.pack(tail, *inputs, call.reset, call.valid, gu, gdt, gz, gbc, gA, gskip, ginit)
    nvrtc.launch("scan_backward.cu", name, packed, blocks, threads, shared, gu.device)
    bc, skip, row = gbc.data_ptr(), gskip.data_ptr(), 2 * d
    jobs = (
        (bc, gB, one, 2 * one, grid.tiles, False),
        (bc + 4 * one, gC, one, 2 * one, grid.tiles, False),
        (gA.data_ptr(), total_A, d * n, d * n, rows, True),
        (skip, gD, d, row, rows, True),
        (skip + 4 * d, gbias, d, row, rows, True),
    )
    name = f"sum_partials<{TYPES[gu.dtype]}>"
    packed, blocks = params.pack_sums(jobs)
    nvrtc.launch("scan_backward.cu", name, packed, blocks, 256, 0, gu.device)
    return gu, gdt, total_A, gB, gC, gD, gz, gbias, ginit


@functools.lru_cache(maxsize=4096)
def _backward_launch(shape: BackwardShape, grid: Grid, signature: tuple) -> tuple:
    dtype, sizes, *strides, B, C, off, reset, walk, softplus = signature
    b, *_, g = sizes
    u, dt, z, gout, gu, gdt, gz = strides
    tail = params.tail(
        params.Backward(
            **params.strides(u=u, dt=dt, B=B, C=C, z=z, gout=gout, gu=gu, gdt=gdt, gz=gz),
            **_sizes(sizes, grid, walk, softplus),
        )
    )
    flags = _flags(dtype, sizes, strides, B, C, off, reset, walk)
    lanes = f"{shape.ns}, {shape.ln}, {shape.ch}, {shape.warps}, {shape.k}, {shape.ts}"
    name = f"scan_backward<{TYPES[dtype]}, {lanes}, {flags}, {shape.blocks}>"
    return tail, name, b * g * grid.tiles * grid.chunks, shape.warps * 32, shape.shared_bytes(dtype.itemsize)

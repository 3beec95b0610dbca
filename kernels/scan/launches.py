"""The CUDA selective scan: what is allocated, and the launches.

The sources (``scan_forward.cu``, ``scan_backward.cu``) say what the kernels do, :mod:`.shapes` which instance a call takes.
"""

import functools
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from ..gpu import nvrtc, structs
from ..gpu.device import DRIVERS, processors, shared_memory
from ..gpu.operands import (
    CUT,
    LOW_RANK,
    NARROW,
    OUTPUTS,
    RESET,
    TYPES,
    UNALIGNED,
    WALK,
    ceil_div,
    in_one_piece,
    in_rows,
)
from . import structs as params
from .operands import Call
from .shapes import (
    ADJOINT,
    BACKWARD,
    FULL,
    STATE,
    BackwardShape,
    Cut,
    ForwardPair,
    ForwardShape,
    Grid,
    backward_plan,
    forward_plan,
    instance,
)


def _flags(signature: tuple) -> int:
    """``Flags`` of the sources: 16 bytes are moved at a time if all rows and the borders of groups start at multiples of 16 bytes."""
    dtype, (b, l, d, n, g), B, C, off, reset, walk, _, rank, *strides = signature
    lanes = 16 // dtype.itemsize
    wide: list[int] = [d] + ([d // g] if g > 1 else [])
    narrow: list[int] = []
    for pair in strides:
        wide += [s for s, size in zip(pair, (b, l), strict=True) if size > 1]
    # fewer states than 16 bytes hold are read one by one in any case
    if n >= lanes or n != instance(n):
        narrow += [s for three in (B, C) for s, size in zip(three, (b, l, g), strict=True) if size > 1] + [n]
    flags = off | any(s % lanes for s in wide) * UNALIGNED | any(s % lanes for s in narrow) * NARROW
    return flags | reset * RESET | (walk is not None) * WALK | (rank > 0) * LOW_RANK


def _tail(kind: Any, signature: tuple, grid: Grid, names: str) -> bytes:
    """The parameters behind the pointers; ``names`` are those of the tensors whose strides the signature ends with."""
    _, (b, l, d, n, g), B, C, _, _, walk, softplus, rank, *strides = signature
    named = structs.strides(B=B, C=C, **dict(zip(names.split(), strides, strict=True)))
    own = {"walk": params.walk(walk, l), "cut": params.Cut(*astuple(grid.cut)), "tiles_per_group": grid.tiles}
    own |= {"rank": rank, "first_tiles": grid.first} if kind is params.Forward else {}
    return structs.tail(kind(**named, **own, l=l, batch=b, d=d, n=n, groups=g, softplus=softplus))


@dataclass(frozen=True)
class Launch:
    """A kernel, and its parameters behind the pointers."""

    source: str
    name: str
    tail: bytes
    blocks: int
    threads: int
    shared: int

    def __call__(self, device: torch.device, *tensors: Tensor | int | None) -> None:
        """Run it over these, or what lies at these addresses, in the order of its parameters."""
        if not self.blocks:
            return  # a batch of no rows
        packed = structs.pack(self.tail, *tensors)
        nvrtc.launch(self.source, self.name, packed, self.blocks, self.threads, self.shared, device)


# the scan, the sweep before it where rows are cut, and into how many pieces
Launches = tuple[Launch, Launch | None, int]


def _scan(signature: tuple, shape: ForwardShape | ForwardPair, mode: int, grid: Grid) -> Launch:
    dtype, (b, _, _, n, g) = signature[:2]
    one = shape.first if isinstance(shape, ForwardPair) else shape
    k, flags = BACKWARD[instance(n)].k, _flags(signature) | (mode == FULL and grid.cut.chunks > 1) * CUT
    if isinstance(shape, ForwardPair):
        lanes = ", ".join(f"{s.ns}, {s.ln}, {s.ch}, {s.tt}" for s in (shape.first, shape.second))
        name = f"scan_forward_two<{TYPES[dtype]}, {one.nc}, {one.nh}, {lanes}, {k}, {flags}>"
    else:
        lanes = f"{one.nc}, {one.ns}, {one.ln}, {one.ch}, {one.tt}, {one.nh}"
        name = f"scan_forward<{TYPES[dtype]}, {lanes}, {k}, {mode}, {flags}, {one.blocks}>"
    pieces = grid.cut.pieces(b)
    if mode != FULL:
        # nothing follows the last piece of a row, or the first on the way back
        pieces = (b - grid.cut.whole) * (grid.cut.chunks - 1)
    tail = _tail(params.Forward, signature, grid, "u dt z out")
    threads, shared = one.nc + one.nh, shape.shared_bytes(dtype.itemsize, mode, flags & LOW_RANK > 0)
    return Launch("scan_forward.cu", name, tail, pieces * g * grid.tiles, threads, shared)


@functools.lru_cache(maxsize=4096)
def _forward_launches(
    signature: tuple, count: int, room: int, shape: ForwardShape | ForwardPair | None, chunks: int | None
) -> Launches:
    dtype, sizes, *_ = signature
    shape, grid = forward_plan(*sizes, count, shape, chunks, dtype.itemsize, room, _flags(signature) & LOW_RANK > 0)
    sweep = _scan(signature, shape, STATE, grid) if grid.cut.chunks > 1 else None
    return _scan(signature, shape, FULL, grid), sweep, signature[1][0] * grid.cut.chunks


def _sweep(call: Call, sweep: Launch | None, pieces: int, u: Tensor) -> tuple[Tensor | None, int, int]:
    """What each piece of the rows that are cut adds to the state, (pieces, d, n), and its sum of dt, (pieces, d, 2): memory and addresses.

    On the way back ``u`` is the gradient of the outputs, and what is added is the gradient of the state, from the right.
    """
    if sweep is None:
        return None, 0, 0
    _, _, d, n, _ = call.sizes
    # asking twice takes the host as long as a small kernel; what comes second starts at a multiple of 16 bytes
    local = ceil_div(pieces * d * n, 4) * 4
    memory = call.A.new_empty(local + pieces * d * 2)
    at = memory.data_ptr(), memory.data_ptr() + 4 * local
    marks = None, call.reset, call.valid
    sweep(u.device, u, *call.scanned, *marks, None, None, None, *at, None, None, call.dt_weight)
    return memory, *at


def planned(
    call: Call, out: Tensor, shape: ForwardShape | ForwardPair | None = None, chunks: int | None = None
) -> Launches:
    """The launches of a forward that writes ``out``; ``shape`` and ``chunks`` fix what would be chosen."""
    room = shared_memory(out.device) - DRIVERS
    return _forward_launches(call.signature(out), processors(out.device), room, shape, chunks)


def forward(
    call: Call,
    save: bool,
    shape: ForwardShape | ForwardPair | None = None,
    chunks: int | None = None,
    into: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
    *,
    final: bool = True,
    launches: Launches | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The outputs (b, l, d), the ``final`` state (b, d, n) and the states before every K-th step, (b, l / K, d, n), to ``save``.

    ``launches`` are those :func:`planned` for another call with the same signature, and ready as this one is.
    """
    if launches is None:
        call = call.ready()
    if into is None:
        saved = call.saved_states() if save else None
        into = call.u.new_empty(call.u.shape), call.last_state() if final else None, saved
    out, last, saved = into
    scan, sweep, pieces = launches or planned(call, out, shape, chunks)
    _memory, local, decay = _sweep(call, sweep, pieces, call.u)
    inputs = (call.u, *call.scanned, call.initial_state, call.reset, call.valid)
    scan(out.device, *inputs, out, last, saved, local, decay, call.before, call.sum, call.dt_weight)
    return out, last, saved


@functools.lru_cache(maxsize=4096)
def _backward_launches(
    signature: tuple, count: int, room: int, shape: BackwardShape | None, chunks: int | Cut | None, outputs: bool
) -> tuple[Launch, Launch | None, int, Grid, Launch]:
    """The backward, the sweep before it where rows are cut, into how many pieces, the grid, and the launch that adds up partial sums."""
    dtype, (b, l, d, n, g), *facts = signature
    size = dtype.itemsize
    shape, grid = backward_plan(b, l, d, n, g, count, shape, chunks, size, room)
    cut, sweep, pieces = grid.cut, None, 0
    if cut.chunks > 1:
        pieces = (b - cut.whole) * cut.chunks
        forward_shape, _ = forward_plan(pieces - b + cut.whole, cut.length, d, n, g, count, None, 1, size, room)
        # pairs are for rows that are not cut
        assert isinstance(forward_shape, ForwardShape)
        (_, dt, z, gout, *_), nowhere = facts[7:], (0, 0)
        swept = (dtype, signature[1], *facts[:7], gout, dt, z, nowhere)
        sweep = _scan(swept, forward_shape, ADJOINT, Grid(ceil_div(d // g, forward_shape.channels), cut))
    lanes = f"{shape.ns}, {shape.ln}, {shape.ch}, {shape.warps}, {shape.k}, {shape.ts}"
    flags = _flags(signature) | (cut.chunks > 1) * CUT | outputs * OUTPUTS
    name = f"scan_backward<{TYPES[dtype]}, {lanes}, {flags}, {shape.blocks}>"
    tail = _tail(params.Backward, signature, grid, "u dt z gout gu gdt gz")
    blocks, shared = cut.pieces(b) * g * grid.tiles, shape.shared_bytes(dtype.itemsize)
    scan = Launch("scan_backward.cu", name, tail, blocks, shape.warps * 32, shared)
    # gB, gC, gA, gD, gbias: elements, elements from one partial sum to the next, how many, and whether the result is float32
    one, rows = b * l * g * n, cut.pieces(b)
    parts = [(one, 2 * one, grid.tiles, False)] * 2 + [(d * n, d * n, rows, True)] + [(d, 2 * d, rows, True)] * 2
    tail, blocks = params.sums(parts)
    return scan, sweep, pieces, grid, Launch("scan_backward.cu", f"sum_partials<{TYPES[dtype]}>", tail, blocks, 256, 0)


def backward(
    call: Call,
    gout: Tensor,
    glast: Tensor | None,
    saved: Tensor | None,
    shape: BackwardShape | None = None,
    chunks: int | Cut | None = None,
    into: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None] | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state; those of A, D, dt_bias and the state are float32.

    Without the states that a forward ``saved``, they are formed again first. Step sizes are in memory while it runs, whole, and so is
    their gradient. The outputs of a scan with a gate are formed again into ``out``, (b, l, d) in one piece, if given.
    """
    c, new, device = call.with_step_sizes(), call.A.new_empty, gout.device
    b, l, d, n, g = c.sizes
    glast, gout = in_one_piece(glast, torch.float32), in_rows(gout, c.u.dtype)
    gu, gdt, gB, gC, gz = into or c.gradients()
    if saved is None:
        # the outputs are not asked for: they go where a gradient will be
        _, _, saved = forward(c, True, into=(gu, None, c.saved_states()))
    signature = c.signature(gout, gu, gdt, gz)
    room = shared_memory(device) - DRIVERS
    scan, sweep, pieces, grid, add_up = _backward_launches(
        signature, processors(device), room, shape, chunks, out is not None
    )
    _memory, local, decay = _sweep(c, sweep, pieces, gout)
    # one piece of memory for all partial sums, since asking for it takes a small call longer than the kernel
    one, rows = b * l * g * n, grid.cut.pieces(b)
    partial = new(2 * grid.tiles * one + rows * d * (n + 2))
    gbc = partial.data_ptr()
    gA = gbc + 8 * grid.tiles * one
    gskip = gA + 4 * rows * d * n
    total_A, gD, gbias = new((d, n)), new(d), new(d)
    ginit = None if c.initial_state is None else new((b, d, n))
    inputs = (c.u, c.dt, c.B, c.C, c.z, gout, c.A, c.D, c.dt_bias, saved, c.initial_state, glast, local, decay)
    scan(device, *inputs, c.reset, c.valid, gu, gdt, gz, gbc, gA, gskip, ginit, out)
    add_up(device, gbc, gbc + 4 * one, gA, gskip, gskip + 4 * d, gB, gC, total_A, gD, gbias)
    return gu, gdt, total_A, gB, gC, gD, gz, gbias, ginit

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
from . import params
from .inputs import ScanInputs
from .operands import ScanOperands, WideGradients
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
    own = {"walk": params.walk(walk, l), "cut": params.CutParams(*astuple(grid.cut)), "tiles_per_group": grid.tiles}
    own |= {"rank": rank, "first_tiles": grid.first} if kind is params.ForwardParams else {}
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
    tail = _tail(params.ForwardParams, signature, grid, "u dt z out")
    threads, shared = one.nc + one.nh, shape.shared_bytes(dtype.itemsize, mode, flags & LOW_RANK > 0)
    return Launch("scan_forward.cu", name, tail, pieces * g * grid.tiles, threads, shared)


@functools.lru_cache(maxsize=4096)
def forward_launches(
    signature: tuple, count: int, room: int, shape: ForwardShape | ForwardPair | None, chunks: int | None
) -> Launches:
    """The launches of a forward whose operands look like this (:meth:`.operands.ScanOperands.signature`)."""
    dtype, sizes, *_ = signature
    shape, grid = forward_plan(sizes, count, shape, chunks, dtype.itemsize, room, _flags(signature) & LOW_RANK > 0)
    sweep = _scan(signature, shape, STATE, grid) if grid.cut.chunks > 1 else None
    return _scan(signature, shape, FULL, grid), sweep, signature[1][0] * grid.cut.chunks


def room_of(call: ScanOperands, pieces: int) -> int:
    """Numbers that a sweep leaves, a multiple of four: what each piece of cut rows adds to the state, (pieces, d, n), and its sum of dt."""
    _, _, d, n, _ = call.sizes
    return _added(pieces, d, n) + ceil_div(pieces * d * 2, 4) * 4


def _added(pieces: int, d: int, n: int) -> int:
    # what comes second starts at a multiple of 16 bytes
    return ceil_div(pieces * d * n, 4) * 4


def places(call: ScanOperands, memory: Tensor | None, pieces: int) -> tuple[int, int]:
    """Addresses in a sweep's memory: of what pieces add, (pieces, d, n), and of their sums of dt, (pieces, d, 2)."""
    _, _, d, n, _ = call.sizes
    return (0, 0) if memory is None else (memory.data_ptr(), memory.data_ptr() + 4 * _added(pieces, d, n))


def sweeping(call: ScanOperands, u: Tensor, local: int, decay: int) -> tuple:
    """The operands of a sweep, in the order of its parameters."""
    marks = None, call.i.reset, call.i.valid
    return (u, *call.scanned, *marks, None, None, None, local, decay, None, None, call.i.dt_weight)


def _swept(call: ScanOperands, sweep: Launch | None, pieces: int, u: Tensor) -> tuple[Tensor | None, int, int]:
    """Memory and addresses (:func:`places`) of what a sweep has left.

    On the way back ``u`` is the gradient of the outputs, and what is added is the gradient of the state, from the right.
    """
    if sweep is None:
        return None, 0, 0
    # asking twice takes the host as long as a small kernel
    memory = call.i.A.new_empty(room_of(call, pieces))
    at = places(call, memory, pieces)
    sweep(u.device, *sweeping(call, u, *at))
    return memory, *at


def planned(
    call: ScanOperands, out: Tensor, shape: ForwardShape | ForwardPair | None = None, chunks: int | None = None
) -> Launches:
    """The launches of a forward that writes ``out``; ``shape`` and ``chunks`` fix what would be chosen."""
    room = shared_memory(out.device) - DRIVERS
    return forward_launches(call.signature(out), processors(out.device), room, shape, chunks)


def forward(
    call: ScanOperands,
    save: bool,
    shape: ForwardShape | ForwardPair | None = None,
    chunks: int | None = None,
    into: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
    *,
    final: bool = True,
    plan: Launches | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The outputs (b, l, d), the ``final`` state (b, d, n) and the states before every K-th step, (b, l / K, d, n), to ``save``.

    ``plan`` is what was :func:`planned` for another call with the same signature, and ready as this one is.
    """
    if plan is None:
        call = call.ready()
    if into is None:
        saved = call.saved_states() if save else None
        into = call.i.u.new_empty(call.i.u.shape), call.last_state() if final else None, saved
    out, last, saved = into
    scan, sweep, pieces = plan or planned(call, out, shape, chunks)
    _memory, local, decay = _swept(call, sweep, pieces, call.i.u)
    scan(out.device, *scanning(call, into, local, decay))
    return out, last, saved


def scanning(call: ScanOperands, into: tuple[Tensor, Tensor | None, Tensor | None], local: int, decay: int) -> tuple:
    """The operands of a forward, in the order of its parameters."""
    i = call.i
    inputs = (i.u, *call.scanned, i.initial_state, i.reset, i.valid)
    return (*inputs, *into, local, decay, call.before, call.sum, i.dt_weight)


@functools.lru_cache(maxsize=4096)
def backward_launches(
    signature: tuple, count: int, room: int, shape: BackwardShape | None, chunks: int | Cut | None, outputs: bool
) -> tuple[Launch, Launch | None, int, Grid, Launch]:
    """The backward, the sweep before it where rows are cut, into how many pieces, the grid, and the launch that adds up partial sums."""
    dtype, (b, l, d, n, g), *facts = signature
    size = dtype.itemsize
    shape, grid = backward_plan(signature[1], count, shape, chunks, size, room)
    cut, sweep, pieces = grid.cut, None, 0
    if cut.chunks > 1:
        pieces = (b - cut.whole) * cut.chunks
        swept = (pieces - b + cut.whole, cut.length, d, n, g)
        forward_shape, _ = forward_plan(swept, count, None, 1, size, room)
        # pairs are for rows that are not cut
        assert isinstance(forward_shape, ForwardShape)
        (_, dt, z, gout, *_), nowhere = facts[7:], (0, 0)
        looks = (dtype, signature[1], *facts[:7], gout, dt, z, nowhere)
        sweep = _scan(looks, forward_shape, ADJOINT, Grid(ceil_div(d // g, forward_shape.channels), cut))
    lanes = f"{shape.ns}, {shape.ln}, {shape.ch}, {shape.warps}, {shape.k}, {shape.ts}"
    flags = _flags(signature) | (cut.chunks > 1) * CUT | outputs * OUTPUTS
    name = f"scan_backward<{TYPES[dtype]}, {lanes}, {flags}, {shape.blocks}>"
    tail = _tail(params.BackwardParams, signature, grid, "u dt z gout gu gdt gz")
    blocks, shared = cut.pieces(b) * g * grid.tiles, shape.shared_bytes(dtype.itemsize)
    scan = Launch("scan_backward.cu", name, tail, blocks, shape.warps * 32, shared)
    # gB, gC, gA, gD, gbias: elements, elements from one partial sum to the next, how many, and whether the result is float32
    one, rows = b * l * g * n, cut.pieces(b)
    parts = [(one, 2 * one, grid.tiles, False)] * 2 + [(d * n, d * n, rows, True)] + [(d, 2 * d, rows, True)] * 2
    tail, blocks = params.sums(parts)
    return scan, sweep, pieces, grid, Launch("scan_backward.cu", f"sum_partials<{TYPES[dtype]}>", tail, blocks, 256, 0)


def backward(
    call: ScanOperands,
    gout: Tensor,
    glast: Tensor | None,
    saved: Tensor | None,
    shape: BackwardShape | None = None,
    chunks: int | Cut | None = None,
    into: WideGradients | None = None,
    out: Tensor | None = None,
) -> ScanInputs:
    """Gradients of the inputs; those of A, D, dt_bias and the state are float32.

    Without the states that a forward ``saved``, they are formed again first. Step sizes are in memory while it runs, whole, and so is
    their gradient. The outputs of a scan with a gate are formed again into ``out``, (b, l, d) in one piece, if given.
    """
    c, new, device = call.with_step_sizes(), call.i.A.new_empty, gout.device
    i, (b, l, d, n, g) = c.i, c.sizes
    glast, gout = in_one_piece(glast), in_rows(gout, i.u.dtype)
    wide = into or c.gradients()
    if saved is None:
        # the outputs are not asked for: they go where a gradient will be
        _, _, saved = forward(c, True, into=(wide.u, None, c.saved_states()))
    signature = c.signature(gout, wide.u, wide.dt, wide.z)
    room = shared_memory(device) - DRIVERS
    scan, sweep, pieces, grid, add_up = backward_launches(
        signature, processors(device), room, shape, chunks, out is not None
    )
    _memory, local, decay = _swept(c, sweep, pieces, gout)
    # one piece of memory for all partial sums, since asking for it takes a small call longer than the kernel
    one, rows = b * l * g * n, grid.cut.pieces(b)
    partial = new(2 * grid.tiles * one + rows * d * (n + 2))
    gbc = partial.data_ptr()
    gA = gbc + 8 * grid.tiles * one
    gskip = gA + 4 * rows * d * n
    total_A, gD, gbias = new((d, n)), new(d), new(d)
    ginit = None if i.initial_state is None else new((b, d, n))
    inputs = (i.u, i.dt, i.B, i.C, i.z, gout, i.A, i.D, i.dt_bias, saved, i.initial_state, glast, local, decay)
    scan(device, *inputs, i.reset, i.valid, wide.u, wide.dt, wide.z, gbc, gA, gskip, ginit, out)
    add_up(device, gbc, gbc + 4 * one, gA, gskip, gskip + 4 * d, wide.B, wide.C, total_A, gD, gbias)
    return ScanInputs(wide.u, wide.dt, total_A, wide.B, wide.C, gD, wide.z, gbias, ginit)

"""SSD on an NVIDIA GPU: launches of ``ssd_forward.cu``, the ``torch.library`` op around them, and why a call may be refused.

x, B, C and z are read in their type, if it is one and the kernels have it, or in float32; dt in that type or in float32; A, D, the bias and
the states are float32 whatever the rest is. The kernels choose their own chunks: the option ``chunk`` is for the other backends.
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_longlong, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import Facts
from ..gpu import launch_plans, nvrtc, structs
from ..gpu.device import DRIVERS, processors, shared_memory
from ..gpu.operands import (
    RESET,
    TYPES,
    UNALIGNED,
    alignment,
    ceil_div,
    common_type,
    eager,
    in_one_piece,
    in_rows,
    refuse_tensors,
    step_limits,
)
from ..numerics import blank, cast
from ..operators import custom_op
from .chunked import _OPTIONS, _TENSORS
from .inputs import SsdInputs, SsdOptions

# as in ssd_forward.cu and ssd.cuh: threads of a block, and by the bytes of an element the tokens of a chunk
THREADS = 256
CHUNK = {2: 64, 4: 32}
# template flags of ssd_forward.cu: there is z; only what a segment leaves behind
GATED, STATES = 2, 128
MAX_STATE = 256
# blocks per multiprocessor that have registers
BLOCKS = 2
# where rounds of blocks leave more than this share of places empty, blocks take segments of the length in turn, of so many chunks at least
UNEVEN, SHORTEST, MOST = 0.1, 8, 8
# threads of ssd_pass_states
PASS = 256


class SsdForwardParams(ctypes.Structure):
    """``SsdForwardParams`` of ``ssd_forward.cu``."""

    _fields_ = [
        *structs.fields(
            c_void_p, "x dt A B C D z dt_bias reset valid initial_state out last saved turns states passing"
        ),
        *structs.fields(c_longlong, "x_b x_l x_h dt_b dt_l dt_h B_b B_l B_g C_b C_l C_g z_b z_l z_h"),
        *structs.fields(c_int, "batch l h p n groups chunks D_head D_channel softplus wide_dt tiles segments span"),
        *structs.fields(c_float, "low high"),
    ]


def padding(element: int) -> int:
    """Elements between the rows of a ``Tile`` of ``mma.cuh``."""
    return 0 if element == 2 else 16 // element


class Tile(NamedTuple):
    """A block's part of a head: channels and states, rounded up, and how many chunks' operands are in shared memory."""

    p: int
    n: int
    stages: int

    def shared_bytes(self, element: int, states: bool = False) -> int:
        """``Layout::BYTES`` of ``ssd_forward.cu``; with ``states``, of the pass that has no outputs."""
        q, pad = CHUNK[element], padding(element)
        row, steps = self.n + pad, 7 * 4 * q + 16
        operands = self.stages * q * (self.p + pad + row + (0 if states else row))
        if not states:
            operands += self.p * row + q * (q + pad)
        formers = THREADS // 32 if states else 1
        return operands * element + formers * (2 * steps + 16) + 32 + 4 * self.p + 8 * q

    def resident(self, element: int, space: int) -> int:
        """Blocks per multiprocessor of ``space`` bytes of shared memory."""
        return min(BLOCKS, space // (self.shared_bytes(element) + DRIVERS))


def tile_of(p: int, n: int, element: int, space: int) -> Tile:
    """The tile for ``p`` channels and ``n`` states: two stages where they cost no block."""
    # a warp has 16 channels and as many states, at least
    n = next(size for size in (32 if p > 32 else 64, 64, 128, 256) if size >= n)
    one, two = (Tile(32 if p <= 32 or n == 256 else 64, n, stages) for stages in (1, 2))
    return two if two.resident(element, space) >= 2 else one


class SsdLook(NamedTuple):
    """All that the launches depend on besides addresses."""

    dtype: torch.dtype
    sizes: tuple[int, int, int, int, int, int]  # b, l, h, p, g, n
    strides: tuple[tuple[int, ...], ...]  # of x, dt, B, C, z, three each
    aligned: bool
    skip: tuple[int, int]  # strides of D along heads and their channels
    packed: bool
    gated: bool
    wide_dt: bool
    softplus: bool
    limits: tuple[float, float]


class Launch(NamedTuple):
    """A launch of ``ssd_forward.cu``."""

    name: str
    blocks: int
    threads: int
    shared: int


class Plan(NamedTuple):
    """The launches of a call, the struct behind its pointers, and into how many segments the length is cut.

    ``turns`` are the words with which blocks take segments in turn, none where what enters a segment is found first.
    """

    dtype: torch.dtype
    tail: bytes
    segments: int
    turns: int
    launches: tuple[Launch, ...]


def walk(dtype: torch.dtype, tile: Tile, flags: int) -> str:
    """Name the kernel that walks over chunks."""
    return f"ssd_forward<{TYPES[dtype]}, {tile.p}, {tile.n}, {tile.stages}, {flags}>"


def cut(blocks: int, chunks: int, places: int) -> int:
    """Chunks per segment, of ``blocks`` walks over all of them for ``places`` that run at once: all, where these are nearly filled.

    What enters a segment is found by walking the ones before without outputs, which takes nearly half as long again.
    """
    segments = min(places // max(1, blocks), chunks // 2)
    return ceil_div(chunks, segments) if segments > 1 else chunks


def share(blocks: int, chunks: int, places: int) -> int:
    """Chunks per segment that blocks take in turn, of more walks than ``places``: all, where rounds of walks leave few places empty."""
    rounds = ceil_div(blocks, places)
    segments = min(chunks // SHORTEST, MOST)
    uneven = rounds > 1 and rounds * places - blocks > UNEVEN * rounds * places
    return ceil_div(chunks, segments) if uneven and segments > 1 else chunks


@functools.lru_cache(maxsize=4096)
def plan_of(look: SsdLook, count: int, space: int) -> Plan:
    """Plan the launches, for ``count`` multiprocessors that have ``space`` bytes of shared memory each."""
    b, l, h, p, g, n = look.sizes
    element = look.dtype.itemsize
    tile = tile_of(p, n, element, space)
    tiles, chunks = ceil_div(p, tile.p), ceil_div(l, CHUNK[element])
    blocks = b * h * tiles
    places = count * tile.resident(element, space)
    span = cut(blocks, chunks, places)
    shared_out = share(blocks, chunks, places)
    in_turn = span == chunks and shared_out < chunks
    span = min(span, shared_out)
    segments = ceil_div(chunks, span)
    names = ("x", "dt", "B", "C", "z")
    strides = {
        f"{name}_{axis}": s
        for name, values in zip(names, look.strides, strict=True)
        for axis, s in zip("blg" if name in "BC" else "blh", values, strict=True)
    }
    low, high = look.limits
    rest = SsdForwardParams(
        **strides,
        batch=b,
        l=l,
        h=h,
        p=p,
        n=n,
        groups=g,
        chunks=chunks,
        D_head=look.skip[0],
        D_channel=look.skip[1],
        softplus=look.softplus,
        wide_dt=look.wide_dt,
        tiles=tiles,
        segments=segments,
        span=span,
        low=low,
        high=high,
    )
    lanes = 16 // element
    off = (
        not look.aligned
        or p % lanes
        or n % lanes
        or any(s % lanes for k, values in enumerate(look.strides) if k != 1 for s in values)
    )
    flags = (RESET if look.packed else 0) | (UNALIGNED if off else 0)
    name = walk(look.dtype, tile, flags | (GATED if look.gated else 0))
    launches = [Launch(name, blocks * segments, THREADS, tile.shared_bytes(element))]
    if in_turn:
        return Plan(look.dtype, structs.tail(rest), segments, 1 + blocks, tuple(launches))
    if segments > 2:
        launches.insert(0, Launch("ssd_pass_states", ceil_div(b * h * p * n, PASS), PASS, 0))
    if segments > 1:
        # the last segment leaves nothing to another
        name, shared = walk(look.dtype, tile, flags | STATES), tile.shared_bytes(element, states=True)
        launches.insert(0, Launch(name, blocks * (segments - 1), THREADS, shared))
    return Plan(look.dtype, structs.tail(rest), segments, 0, tuple(launches))


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA kernels cannot do a call, or ``None`` if they can; see :class:`.dispatch.Backend`."""
    reason, n = refuse_tensors(facts), facts.get("d_state", 128)
    if reason is not None:
        return reason
    if n > MAX_STATE:
        return f"the CUDA kernels of ssd hold up to d_state = {MAX_STATE}, got {n}"
    return nvrtc.unavailable() or _too_big(n, facts.get("dtype", torch.float32).itemsize)


def _too_big(n: int, element: int) -> str | None:
    if n <= MAX_STATE // 2 or element == 2:
        # fits any GPU that the kernels run on
        return None
    space = shared_memory(torch.device("cuda", torch.cuda.current_device()))
    need = tile_of(64, n, element, space).shared_bytes(element) + DRIVERS
    if need <= space:
        return None
    return f"the CUDA kernels of ssd need {need >> 10} KiB of shared memory for d_state = {n}, a block has {space >> 10} KiB here"


def readable(i: SsdInputs) -> SsdInputs:
    """The inputs in the types and layouts that the kernels read; those that are so already are the same tensors."""
    dtype = common_type(i.x, i.B, i.C, i.z)
    x, B, C, z = (in_rows(m, dtype) for m in (i.x, i.B, i.C, i.z))
    A, D, bias, start = (in_one_piece(m) for m in (i.A, i.D, i.dt_bias, i.initial_state))
    reset, valid = (in_one_piece(m, torch.bool) for m in (i.reset, i.valid))
    dt = i.dt if i.dt.dtype == dtype else cast(i.dt, torch.float32)
    return SsdInputs(x, dt, A, B, C, D, z, bias, start, reset, valid)


def planned(i: SsdInputs, options: SsdOptions) -> Plan:
    """The launches for inputs that are readable."""
    x, D, (b, l, h, p), (g, n) = i.x, i.D, i.x.shape, i.B.shape[2:]
    look = SsdLook(
        x.dtype,
        (b, l, h, p, g, n),
        tuple((0, 0, 0) if m is None else _strides(m) for m in (x, i.dt, i.B, i.C, i.z)),
        min(alignment(m) for m in (x, i.B, i.C, i.z)) == 16,
        (0, 0) if D is None else (1, 0) if D.dim() == 1 else (p, 1),
        i.reset is not None,
        i.z is not None,
        i.dt.dtype != x.dtype,
        options.dt_softplus,
        step_limits(options.dt_limit),
    )
    return plan_of(look, processors(x.device), shared_memory(x.device))


def _strides(m: Tensor) -> tuple[int, ...]:
    # an axis of one has any stride
    return tuple(s if size > 1 else 0 for s, size in zip(m.stride()[:3], m.shape[:3], strict=True))


def known(i: SsdInputs, options: SsdOptions) -> Plan | None:
    """Find the plan of a forward like this one, if there was one that read its inputs as they were."""
    if not eager(i.x):
        return None
    device = i.x.device
    return launch_plans.find("ssd_forward", i, options, processors(device), shared_memory(device))


def _planned(i: SsdInputs, options: SsdOptions) -> tuple[SsdInputs, Plan]:
    def plan_of() -> tuple[SsdInputs, Plan]:
        read = readable(i)
        return read, planned(read, options)

    device = i.x.device
    return launch_plans.planned("ssd_forward", i, plan_of, options, processors(device), shared_memory(device))


def forward(
    i: SsdInputs, options: SsdOptions, save: bool, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs (b, l, h, p) in x's type, the last state, and, to ``save``, the states at chunk starts (b, chunks, h, p, n).

    ``plan`` is that of a call like this one, whose inputs are readable.
    """
    first, (b, l, h, p), n = i.x, i.x.shape, i.B.shape[3]
    if not first.numel():
        i = readable(i)
    elif plan is None:
        i, plan = _planned(i, options)
    x, start = i.x, i.initial_state
    out, last = blank(x), i.A.new_empty((b, h, p, n))
    chunks = ceil_div(l, CHUNK[x.dtype.itemsize])
    saved = x.new_empty(b, chunks, h, p, n, dtype=saved_dtype(x.dtype)) if save else None
    if plan is None:
        return out, last.zero_() if start is None else last.copy_(start), saved
    turns, states, passing = None, None, None
    if plan.turns:
        turns = i.A.new_zeros(plan.turns, dtype=torch.int32)
    elif plan.segments > 1:
        # states, then a decay for each
        states = i.A.new_empty(b * plan.segments * h * (p * n + 1))
        passing = states[b * plan.segments * h * p * n :]
    operands = (*i[:8], i.reset, i.valid, start, out, last, saved, turns, states, passing)
    packed = structs.pack(plan.tail, *operands)
    for launch in plan.launches:
        nvrtc.launch("ssd_forward.cu", launch.name, packed, launch.blocks, launch.threads, launch.shared, x.device)
    return cast(out, first.dtype), last, saved


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of saved states: bfloat16 operands' own, in which a backward multiplies with them, or float32."""
    return dtype if dtype == torch.bfloat16 else torch.float32


@custom_op("hybridzoo::ssd_cuda", schema=f"({_TENSORS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor)")
def ssd_op(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (b, l, h, p), the last state (b, h, p, n), and, to ``save``, the states at chunk starts (b, chunks, h, p, n)."""
    i, options, save = _split(operands)
    out, last, saved = forward(i, options, save)
    return out, last, last.new_empty(0) if saved is None else saved


def _split(operands: tuple) -> tuple[SsdInputs, SsdOptions, bool]:
    return SsdInputs(*operands[:-5]), SsdOptions(*operands[-5:-1]), operands[-1]


@ssd_op.register_fake
def _ssd_fake(*operands):
    i, _, save = _split(operands)
    dtype, (b, l, h, p), n = common_type(i.x, i.B, i.C, i.z), i.x.shape, i.B.shape[3]
    last = i.x.new_empty(b, h, p, n, dtype=torch.float32)
    if not save:
        return blank(i.x), last, last.new_empty(0)
    q = CHUNK[dtype.itemsize]
    return blank(i.x), last, i.x.new_empty(b, (l + q - 1) // q, h, p, n, dtype=saved_dtype(dtype))

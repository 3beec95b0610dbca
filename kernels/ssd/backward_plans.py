"""Plans of SSD's gradients on a GPU: tiles of blocks, launches of ``ssd_backward_*.cu``, and their struct."""

import ctypes
import functools
import itertools
from ctypes import c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..gpu import structs
from ..gpu.operands import RESET, TYPES, ceil_div, step_limits
from .cuda import CHUNK, GATED, padding, saved_dtype
from .inputs import SsdOptions

# template flag: heads of more channels than a tile has
TILED = 8
# numbers per token and head that ssd_steps leaves
PLANES = 7
# chunks that a walk over states has in shared memory
STAGES = 3
# channels and states of its blocks, and what one of them takes for a chunk (us, H200, bf16), whether there are others beside it or not
STATE_TILES = {(64, 128): 1.03, (64, 64): 0.58, (32, 64): 0.43, (32, 32): 0.28}
# bytes at multiples of which parts of one piece of memory start: two lines of L2
LINE = 256
# warps down and across of a block with 64 channels and states or more, of 16 bits; (4, 4): twice the warps, half the registers of each
WARPS = (2, 4)
# where four warps multiply together (`groups.cuh`); their tiles begin at multiples of so many bytes
GROUPS = (4, 2)
BORDER = 1024
# a block's work besides that for its heads, in heads
OVERHEAD = 1.5


class SsdBackwardParams(ctypes.Structure):
    """``SsdBackwardParams`` of ``ssd_backward.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "x dt A B C D z dt_bias reset valid gout gy glast saved steps cuts gstates"),
        *structs.fields(c_void_p, "gx gdt gz gBC gheads ginit gB gC gA gbias gD"),
        *structs.fields(
            c_longlong,
            "x_b x_l x_h dt_b dt_l dt_h B_b B_l B_g C_b C_l C_g z_b z_l z_h gout_b gout_l gout_h gy_b gy_l gy_h",
        ),
        *structs.fields(c_longlong, "gx_row gdt_row gz_row gBC_row"),
        *structs.fields(c_int, "batch l h p n groups chunks D_head D_channel softplus wide_dt splits"),
        *structs.fields(c_float, "low high"),
    ]


@dataclass(frozen=True)
class ChunkShape:
    """The template arguments of ``ssd_backward_chunks``.

    Channels and states of a tile, warps down and across, stages of operands, and heads that wait for each other to be finished.
    """

    p: int
    n: int
    down: int
    across: int
    stages: int
    waiting: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.down * self.across

    @property
    def grouped(self) -> bool:
        """Say whether four warps may multiply together."""
        return (self.down, self.across) == GROUPS and self.p == 64 and self.n in (64, 128)

    def shared_bytes(self, element: int, gated: bool) -> int:
        """``ChunkMemory::bytes``."""
        q, pad = CHUNK[element], padding(element)
        p, n = self.p + pad, self.n + pad
        stage = (4 if gated else 2) * q * p + 2 * self.p * n + (6 * q + 32 + self.p) * 4 // element
        if self.grouped:
            stage = BORDER // element * ceil_div(stage * element, BORDER)
        kept = self.p if self.grouped else self.down * self.across
        sums = self.waiting * ((2 * self.across + self.down + 2) * q + kept)
        operands = 2 * q * n + (2 if gated else 1) * q * (q + pad) + self.stages * stage
        return operands * element + (8 * sums if element == 4 else 4 * (sums + 3 * self.down * self.across))


def chunk_shape(element: int, p: int, n: int, gated: bool, room: int, groups: bool = False) -> ChunkShape | None:
    """The shape for heads of p channels and n states, in blocks of ``room`` bytes of shared memory; ``None`` if none fits.

    ``groups``: where tiles are wide enough, four warps multiply together.
    """
    states = next((s for s in (32, 64, 128, 256) if s >= n), None)
    if states is None:
        return None
    # copies that are under way while a head is worked on are worth more than wide tiles, these more than heads that are finished together
    for stages in (2, 1):
        # sums over 256 states, by warps that are few enough to have registers for them
        for channels in (64, 32) if p > 32 and (element == 4 or states < 256) else (32,):
            wide = (GROUPS if groups and states < 256 else WARPS) if min(channels, states) > 32 else (4, 2)
            grid = (2, 4) if element == 4 else wide
            for waiting in (8, 2, 1):
                shape = ChunkShape(channels, states, *grid, stages, waiting)
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
    """The launches of a backward, the struct behind its pointers, and into how many shares heads of a group are split.

    ``floats`` is the memory for all that lies between launches, and ``places`` are the bytes before each part of it: steps, cuts, gstates,
    gBC, gheads and, behind a gate, gy.
    """

    launches: tuple[Launch, ...]
    tail: bytes
    splits: int
    floats: int
    places: tuple[int, ...]


def _splits(blocks: int, heads: int, slots: int) -> int:
    """Shares of a group's heads, for which the busiest place for blocks has least to do."""
    return min(range(1, heads + 1), key=lambda s: (ceil_div(blocks * s, slots) * (ceil_div(heads, s) + OVERHEAD), s))


def _state_tile(heads: int, p: int, n: int, count: int) -> tuple[int, int]:
    """Channels and states of a block that walks over chunks: those with which the busiest multiprocessor has least to do."""

    def turns(tile: tuple[int, int]) -> float:
        return ceil_div(heads * ceil_div(p, tile[0]) * ceil_div(n, tile[1]), count) * STATE_TILES[tile]

    return min((t for t in STATE_TILES if (t[0] < 2 * p or t[0] == 32) and (t[1] < 2 * n or t[1] == 32)), key=turns)


def _between(look: Look, splits: int, columns: int) -> tuple[int, tuple[int, ...]]:
    """Floats for what lies between launches, and the bytes before each part, each at a whole line of L2."""
    b, l, h, p, n, g = look.sizes
    element, q = look.dtype.itemsize, CHUNK[look.dtype.itemsize]
    chunks = ceil_div(l, q)
    sizes = (
        4 * PLANES * b * h * chunks * q,
        4 * b * chunks,
        saved_dtype(look.dtype).itemsize * b * chunks * h * p * n,
        4 * 2 * splits * b * l * g * n,
        4 * b * chunks * columns,
        element * b * l * h * p if look.flags & GATED else 0,
    )
    ends = list(itertools.accumulate(LINE * ceil_div(size, LINE) for size in sizes))
    return ends[-1] // 4, (0, *ends[:-1])


@functools.lru_cache(maxsize=4096)
def plan(look: Look, count: int, room: int, groups: bool = False) -> Plan:
    """Plan for ``count`` multiprocessors, ``room`` bytes of shared memory for a block, and groups of warps or none."""
    b, l, h, p, n, g = look.sizes
    element, T = look.dtype.itemsize, TYPES[look.dtype]
    gated = bool(look.flags & GATED)
    q, pad = CHUNK[element], padding(element)
    chunks = ceil_div(l, q)
    # fp16 is moved to where it has digits, and documents are done one after the other, by each warp for itself
    groups = groups and look.dtype == torch.bfloat16 and not look.flags & RESET
    shape = chunk_shape(element, p, n, gated, room, groups)
    if shape is None:
        raise ValueError(f"ssd: no backward of p = {p}, n = {n} fits {room} bytes of shared memory.")
    at_once = max(1, min(room // shape.shared_bytes(element, gated), 256 // shape.threads))
    splits = _splits(b * chunks * g, h // g, count * at_once)
    tile_p, tile_n = _state_tile(b * h, p, n, count)
    stage = q * (tile_p + tile_n + 2 * pad) * element + 8 * q
    columns = h * (2 + (p if look.D == 2 else 1))
    marks, gate = look.flags & ~GATED, look.flags & ~RESET
    launches = (
        Launch("ssd_backward_steps.cu", f"ssd_steps<{T}, {gate if gated else 0}>", ceil_div(b * chunks * h, 4), 128, 0),
        Launch(
            "ssd_backward_states.cu",
            f"ssd_backward_states<{T}, {tile_p}, {tile_n}, {marks}>",
            b * h * ceil_div(p, tile_p) * ceil_div(n, tile_n),
            128,
            STAGES * stage + 16,
        ),
        Launch(
            "ssd_backward.cu",
            f"ssd_backward_chunks<{T}, {shape.p}, {shape.n}, {shape.down}, {shape.across}, {shape.stages}, {shape.waiting}, "
            f"{look.flags | (TILED if p > shape.p else 0)}>",
            b * chunks * g * splits,
            shape.threads,
            shape.shared_bytes(element, gated),
        ),
        Launch(
            "ssd_backward.cu",
            f"ssd_backward_sums<{T}>",
            ceil_div(2 * b * l * g * n, 1024) + ceil_div(columns, 32),
            256,
            0,
        ),
    )
    return Plan(launches, _tail(look, splits), splits, *_between(look, splits, columns))


def _tail(look: Look, splits: int) -> bytes:
    """The struct behind its pointers."""
    b, l, h, p, n, g = look.sizes
    names = [field[0] for field in SsdBackwardParams._fields_ if field[1] is c_longlong]
    low, high = step_limits(look.options.dt_limit)
    rest = SsdBackwardParams(
        **dict(zip(names, look.strides, strict=True)),
        batch=b,
        l=l,
        h=h,
        p=p,
        n=n,
        groups=g,
        chunks=ceil_div(l, CHUNK[look.dtype.itemsize]),
        D_head=p if look.D == 2 else 1,
        D_channel=look.D == 2,
        softplus=look.options.dt_softplus,
        wide_dt=look.wide_dt,
        splits=splits,
        low=low,
        high=high,
    )
    return structs.tail(rest)

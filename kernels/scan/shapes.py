"""Kernel shapes: the template arguments of ``*.cu``, and which of them a call takes.

A shape says how many lanes share a channel, how many of its states each holds, how many channels a thread has and how many steps make a
tile. The choice follows what was measured once (NOTES.md): the cycles of a step on the busiest multiprocessor. Nothing is timed while a
program runs.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..gpu.operands import ceil_div
from .low_rank import MAX_RANK

FULL, STATE, ADJOINT = 0, 1, 2
MAX_STATE = 256


@dataclass(frozen=True)
class ForwardShape:
    """Template arguments of ``scan_forward``: scanners, states per lane, lanes per channel, channels per thread, steps per tile, helpers.

    ``blocks`` fit a multiprocessor together. A step takes ``alone`` cycles where a multiprocessor has one block of the launch, and ``each``
    times their number where it has more.
    """

    nc: int
    ns: int
    ln: int
    ch: int
    tt: int
    nh: int
    blocks: int
    alone: float = field(default=80, compare=False)
    each: float = field(default=66, compare=False)

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.nc // self.ln * self.ch

    def shared_bytes(self, element: int, mode: int, low_rank: bool = False) -> int:
        """``ForwardShape::bytes`` of the source; ``low_rank``: of a scan that forms its step sizes."""
        n, full, wide = self.ns * self.ln, mode == FULL, self.tt * self.channels * element
        pairs, kinds = self.tt // 2 * _padded(self.channels) * 4, 2 if full else 1
        stage = pairs + self.tt * n * kinds + self.tt
        part = self.tt * _padded(self.channels * self.ln // 4) * 4 if full else 0
        raw_bc = self.tt * n // min(n, 16 // element) * 16 * kinds
        # a tile of dt, and another one, or three of the low-rank form
        steps = wide + (3 * self.tt * (MAX_RANK + 8) * element if low_rank else wide)
        return 8 * (stage + part) + wide * ((4 if full else 2) + 2) + steps + 2 * raw_bc

    def cost(self, rows: int, l: int, d: int, chunks: int, processors: int) -> float:
        """Cycles of a launch, and of the pass before it that a split length needs."""
        length = Cut.even(l, chunks, self.tt).length
        busiest = math.ceil(rows * ceil_div(d, self.channels) * l / length / processors)
        # two tiles pass before the first result, and about one more at the end
        steps = length + 3 * self.tt
        once = steps * (self.alone if busiest == 1 else busiest * self.each)
        # the pass before it leaves out outputs, and one of the chunks
        return once if chunks == 1 else (1 + 0.8 * (chunks - 1) / chunks) * once + SPLIT


@dataclass(frozen=True)
class ForwardPair:
    """Two shapes of blocks in one launch (``scan_forward_two``), a multiprocessor having one of each at a time, or two of one."""

    first: ForwardShape
    second: ForwardShape

    def shared_bytes(self, element: int, mode: int, low_rank: bool = False) -> int:
        """As of one shape; every block of a launch has as much."""
        return max(s.shared_bytes(element, mode, low_rank) for s in (self.first, self.second))

    def tiles(self, rows: int, d: int, processors: int) -> tuple[int, int, float]:
        """Into how many tiles of each shape to cut the channels of a group, and the cycles of a step on the busiest multiprocessor."""
        first, second = self.first, self.second

        def cut(count: int) -> tuple[int, int, float]:
            rest = ceil_div(d - count * first.channels, second.channels)
            busy = ceil_div(rows * count, processors) * first.each + ceil_div(rows * rest, processors) * second.each
            return count, rest, busy

        return min(
            (cut(i) for i in range(1, (d - 1) // first.channels + 1)), key=lambda c: c[2], default=(0, 0, math.inf)
        )

    def cost(self, rows: int, l: int, d: int, chunks: int, processors: int) -> float:
        """As of one shape; rows are not cut."""
        return math.inf if chunks > 1 else (l + 3 * self.second.tt) * self.tiles(rows, d, processors)[2]


@dataclass(frozen=True)
class BackwardShape:
    """Template arguments of ``scan_backward``: states per lane, lanes per channel, channels per thread, warps, steps per chunk and pass."""

    ns: int
    ln: int
    ch: int
    warps: int
    k: int
    ts: int
    blocks: int

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.warps * (32 // self.ln) * self.ch

    def shared_bytes(self, element: int) -> int:
        """``BackwardShape::bytes`` of the source."""
        n, k, threads, channels = self.ns * self.ln, self.k, self.warps * 32, self.channels
        lanes = 16 // element
        bc = k * n if n < lanes or (element == 2 and n <= 16) else 0
        floats = k * channels * 3 + 2 * bc + 2 * k + 2 * channels + (k // self.ts - 1) * self.ns * self.ch * threads
        floats += self.warps * 3 * 4 * self.ch * 32 + self.warps * 4 * 2 * 32 * self.ns
        raw = 4 * k * channels * element + 2 * k * max(16, n * element) + channels * n * 4
        return floats * 4 + (2 if element == 2 else 1) * raw

    def cost(self, b: int, l: int, tiles: int, cut: "Cut", processors: int) -> float:
        """Steps of a full multiprocessor that a launch lasts, and the pass before it where rows are cut; ``tiles`` of a row."""
        rows = b - cut.whole
        work = (cut.whole * tiles, l), (rows * tiles, cut.first), (rows * tiles * (cut.chunks - 1), cut.length)
        time = self._makespan(work, processors)
        if cut.chunks == 1:
            return time
        before = max(1.3, ceil_div(work[2][0], processors)) * cut.length
        return time + before * ADJOINT_STEP / self.blocks + SPLIT_STEPS

    def _makespan(self, work: tuple[tuple[int, int], ...], processors: int) -> float:
        """Until these numbers of blocks, of these steps each, launched in this order, have all ended."""
        ends, steps = [(0, processors * self.blocks)], 0
        for count, steps in work:
            while count > 0:
                time, places = heapq.heappop(ends)
                taken = min(places, count)
                count -= taken
                heapq.heappush(ends, (time + steps + SETTLING, taken))
                if taken < places:
                    heapq.heappush(ends, (time, places - taken))
        last = max(time for time, _ in ends)
        busy = sum(places for time, places in ends if time == last)
        others = max((time for time, _ in ends if time < last), default=0)
        # a block alone is faster than one of several, but not as much as there are fewer
        share = 0.5 + 0.5 * min(ceil_div(busy, processors) / self.blocks, 1)
        return max(others, last - steps * (1 - share))


def _padded(slots: int) -> int:
    return slots + slots // 8


# cycles of the launches that a split length adds
SPLIT = 10000
# into how many chunks a forward may be cut
SPLITS = (*range(1, 17), 24, 32, 64, 128)
# of the backward, in steps of about 750 cycles: until a block is at work, a block's step of the pass before a cut, and what launches add
SETTLING, ADJOINT_STEP, SPLIT_STEPS = 24, 0.25, 15
# by d_state, rounded up to the next one here
FORWARD = {
    # little to scan, as much to bring in and to finish as ever
    1: (ForwardShape(32, 1, 1, 1, 32, 128, 4),),
    2: (ForwardShape(32, 2, 1, 1, 32, 128, 4),),
    4: (ForwardShape(32, 4, 1, 1, 32, 128, 4),),
    8: (ForwardShape(128, 4, 2, 2, 16, 128, 2, 155, 125), ForwardShape(128, 4, 2, 1, 16, 128, 3, 95, 80)),
    16: (
        ForwardShape(128, 8, 2, 2, 16, 128, 2, 255, 205),
        ForwardShape(128, 8, 2, 1, 16, 128, 3, 135, 104),
        ForwardShape(128, 4, 4, 1, 32, 128, 2, 69, 61),
    ),
    32: (ForwardShape(128, 8, 4, 1, 16, 64, 3),),
    64: (ForwardShape(128, 16, 4, 1, 16, 128, 2),),
    128: (ForwardShape(128, 16, 8, 1, 16, 128, 2),),
    256: (ForwardShape(256, 16, 16, 1, 8, 128, 1),),
}
# blocks of 64 and 32 channels: one of each, or two and one, where blocks of one shape leave half a round (those of 1536 channels in 8 rows,
# and of 5120 in 4, on an H100); of 128 and 64 it was slower than of 64
PAIRS = {16: (ForwardPair(FORWARD[16][1], FORWARD[16][2]),)}
BACKWARD = {
    # few states are little work between loads: many blocks of few registers
    1: BackwardShape(1, 1, 1, 1, 8, 4, 19),
    2: BackwardShape(2, 1, 2, 1, 8, 4, 10),
    4: BackwardShape(4, 1, 1, 1, 8, 4, 12),
    8: BackwardShape(4, 2, 2, 2, 16, 8, 4),
    16: BackwardShape(4, 4, 2, 4, 32, 8, 2),
    32: BackwardShape(8, 4, 1, 4, 32, 8, 2),
    64: BackwardShape(8, 8, 1, 4, 32, 8, 2),
    128: BackwardShape(8, 16, 1, 8, 32, 8, 1),
    256: BackwardShape(8, 32, 1, 8, 32, 8, 1),
}


def instance(n: int) -> int:
    """The state size that the kernels are compiled for.

    Raises:
        ValueError: More states than they hold.
    """
    if n > MAX_STATE:
        raise ValueError(
            f"selective_scan: d_state is {n}, the CUDA kernels hold at most {MAX_STATE}. Use backend='chunked'."
        )
    return next(m for m in FORWARD if m >= n)


def keeps_states(n: int) -> bool:
    """Tell whether a forward leaves the float32 states that its backward starts from, one every K steps.

    Not where they would be more than the 16-bit output, which is what mamba-ssm keeps: there the backward scans once more.
    """
    return 4 * instance(n) <= 2 * BACKWARD[instance(n)].k


# bytes of shared memory that a block may have on an H100
ROOM = 227 << 10


def forward_shapes(
    n: int, element: int, room: int, low_rank: bool = False, pairs: bool = True
) -> list[ForwardShape | ForwardPair]:
    """Those of ``n`` states, an instance, that fit into ``room`` bytes of shared memory with elements of so many bytes."""
    alone = [s for s in FORWARD[n] if s.shared_bytes(element, FULL, low_rank) <= room]
    return alone + [p for p in PAIRS.get(n, ()) if pairs and 2 * p.shared_bytes(element, FULL, low_rank) <= room]


def backward_shape(n: int, element: int, room: int) -> BackwardShape | None:
    """The one of ``n`` states, an instance, with fewer warps where there is less room; ``None`` where it does not fit at all."""
    shape = BACKWARD[n]
    while shape.shared_bytes(element) > room:
        # a thread moves 16 bytes of neighbouring channels
        if shape.warps == 1 or shape.channels // 2 * element < 16:
            return None
        shape = replace(shape, warps=shape.warps // 2)
    return shape


@dataclass(frozen=True)
class Cut:
    """A cut of rows along the length: ``whole`` of them are left whole, the others into ``first`` steps and pieces of ``length``."""

    whole: int
    chunks: int
    first: int
    length: int

    def pieces(self, rows: int) -> int:
        """Of a batch of so many rows."""
        return self.whole + (rows - self.whole) * self.chunks

    @classmethod
    def even(cls, l: int, chunks: int, step: int, whole: int = 0) -> "Cut":
        """About ``chunks`` pieces of as many steps each, a multiple of ``step``."""
        length = ceil_div(ceil_div(l, chunks), step) * step
        return cls(whole, ceil_div(l, length), length, length)


@dataclass(frozen=True)
class Grid:
    """A scan cut into blocks: tiles of channels in each group, the ``first`` of them of a pair's first shape, and pieces of rows."""

    tiles: int
    cut: Cut
    first: int = 0


@functools.lru_cache(maxsize=1024)
def forward_plan(
    sizes: tuple[int, int, int, int, int],
    processors: int,
    shape: ForwardShape | ForwardPair | None = None,
    chunks: int | None = None,
    element: int = 2,
    room: int = ROOM,
    low_rank: bool = False,
) -> tuple[ForwardShape | ForwardPair, Grid]:
    """The shape and the grid of a forward scan of b, l, d, n, g; ``shape`` and ``chunks`` fix what would be chosen."""
    b, l, d, n, g = sizes
    shapes = [shape] if shape else forward_shapes(instance(n), element, room, low_rank, pairs=chunks is None)
    # several chunks cost a second pass over them, so they pay only where much of the chip would have nothing to do
    splits = [chunks] if chunks else [c for c in SPLITS if c == 1 or l >= 96 * c]
    options = itertools.product(shapes, splits)
    shape, chunks = min(options, key=lambda o: o[0].cost(b * g, l, d // g, o[1], processors))
    if isinstance(shape, ForwardPair):
        first, second, _ = shape.tiles(b * g, d // g, processors)
        return shape, Grid(first + second, Cut.even(l, 1, l), first)
    cut = Cut.even(l, chunks, max(shape.tt, BACKWARD[instance(n)].k))
    return shape, Grid(ceil_div(d // g, shape.channels), cut)


@functools.lru_cache(maxsize=1024)
def backward_plan(
    sizes: tuple[int, int, int, int, int],
    processors: int,
    shape: BackwardShape | None = None,
    chunks: int | Cut | None = None,
    element: int = 2,
    room: int = ROOM,
) -> tuple[BackwardShape, Grid]:
    """The shape and the grid of a backward scan of b, l, d, n, g; ``shape`` and ``chunks`` fix what would be chosen."""
    b, l, d, n, g = sizes
    shape = shape or backward_shape(instance(n), element, room)
    if shape is None:
        raise ValueError(
            f"selective_scan: a backward with d_state = {n} needs more shared memory than this GPU's {room} bytes."
        )
    tiles = ceil_div(d // g, shape.channels)
    if chunks is None:
        options = _cuts(b, l, tiles * g, shape.k, processors * shape.blocks)
        chunks = min(options, key=lambda c: shape.cost(b, l, tiles * g, c, processors))
    return shape, Grid(tiles, Cut.even(l, chunks, shape.k) if isinstance(chunks, int) else chunks)


def _cuts(b: int, l: int, tiles: int, step: int, places: int) -> Iterator[Cut]:
    """The cuts that a backward may choose from: each costs a pass over all that is behind the first pieces."""
    yield Cut.even(l, 1, step)
    if b * tiles > 16 * places:
        # the last round of so many is all there is to gain
        return
    most = max(1, min(32, l // (4 * step)))
    # all rows evenly; or only those that do not fit into full rounds of blocks
    full = b * tiles // places * places // tiles
    for whole in {0, full, max(full - 1, 0)} - {b}:
        for chunks in range(2, most + 1):
            yield Cut.even(l, chunks, step, whole)
    # or a long piece first, for blocks that come too few for a round, and short ones for the places that are left
    for part, chunks in itertools.product(range(2, 16), range(2, min(most, 5) + 1)):
        first = ceil_div(l * part // 16, step) * step
        length = ceil_div(ceil_div(l - first, chunks - 1), step) * step
        if length < first and first + (chunks - 2) * length < l:
            yield Cut(0, chunks, first, length)

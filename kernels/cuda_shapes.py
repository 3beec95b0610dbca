"""Kernel shapes: the template arguments of ``cuda/*.cu``, and which of them a call takes.

A shape says how many lanes share a channel, how many of its states each holds, how many channels a thread has and how many steps make a
tile. The choice follows what was measured once (NOTES.md): the cycles of a step on the busiest multiprocessor. Nothing is timed while a
program runs.
"""

import functools
import itertools
import math
from dataclasses import dataclass, field

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

    def shared_bytes(self, element: int, mode: int) -> int:
        """``ForwardShape::bytes`` of the source."""
        n, full, wide = self.ns * self.ln, mode == FULL, self.tt * self.channels * element
        packed = element == 2 and self.ch == 1 and n >= 8 and self.ln > 2
        pairs, kinds = self.tt * self.channels * 2, 2 if full else 1
        stage = pairs + (0 if packed else self.tt * n * kinds) + self.tt
        part = self.tt * self.channels * self.ln if full else 0
        raw_bc = self.tt * n // min(n, 16 // element) * 16 * kinds
        return 8 * (stage + part) + wide * ((4 if full else 2) + 4) + (3 if packed else 2) * raw_bc

    def cost(self, rows: int, l: int, d: int, chunks: int, processors: int) -> float:
        """Cycles of a launch, and of the pass before it that a split length needs."""
        length = _cut(l, chunks, self.tt)[1]
        busiest = math.ceil(rows * ceil_div(d, self.channels) * l / length / processors)
        # two tiles pass before the first result, and about one more at the end
        steps = length + 3 * self.tt
        once = steps * (self.alone if busiest == 1 else busiest * self.each)
        # the pass before it leaves out outputs, and one of the chunks
        return once if chunks == 1 else (1 + 0.8 * (chunks - 1) / chunks) * once + SPLIT


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

    def cost(self, rows: int, l: int, d: int, chunks: int, processors: int) -> float:
        """Steps of a full multiprocessor that a launch lasts, and the pass before it that a split length needs."""
        tiles = ceil_div(d, self.channels)
        full, rest = divmod(ceil_div(rows * tiles * chunks, processors), self.blocks)
        # a block alone is faster than one of several, but not as much as there are fewer
        sets = full + (0.5 + 0.5 * rest / self.blocks if rest else 0)
        once = sets * (_cut(l, chunks, self.k)[1] + SETTLING)
        if chunks == 1:
            return once
        return once + rows * tiles * l * (chunks - 1) / chunks / processors * ADJOINT_STEP / self.blocks + SPLIT_STEPS


# cycles of the launches that a split length adds
SPLIT = 10000
# into how many chunks a forward may be cut
SPLITS = (*range(1, 17), 24, 32, 64, 128)
# of the backward, in steps of about 800 cycles: until a block is at work, a block's step of the pass before a split, and what launches add
SETTLING, ADJOINT_STEP, SPLIT_STEPS = 24, 0.33, 15
# by d_state, rounded up to the next one here
FORWARD = {
    # little to scan, as much to bring in and to finish as ever
    1: (ForwardShape(32, 1, 1, 1, 32, 96, 4),),
    2: (ForwardShape(32, 2, 1, 1, 32, 96, 4),),
    4: (ForwardShape(32, 4, 1, 1, 32, 96, 4),),
    8: (ForwardShape(128, 4, 2, 1, 16, 128, 3),),
    16: (
        ForwardShape(128, 8, 2, 2, 16, 128, 2, 255, 211),
        ForwardShape(128, 8, 2, 1, 32, 128, 2, 135, 106),
        ForwardShape(128, 4, 4, 1, 32, 128, 2, 79, 66),
    ),
    32: (ForwardShape(128, 8, 4, 1, 16, 64, 3),),
    64: (ForwardShape(128, 8, 8, 1, 16, 64, 3),),
    128: (ForwardShape(128, 16, 8, 1, 16, 64, 2),),
    256: (ForwardShape(128, 16, 16, 1, 8, 64, 2),),
}
BACKWARD = {
    1: BackwardShape(1, 1, 2, 1, 8, 8, 8),
    2: BackwardShape(2, 1, 2, 1, 8, 8, 8),
    4: BackwardShape(4, 1, 2, 1, 8, 4, 8),
    8: BackwardShape(4, 2, 2, 2, 16, 8, 2),
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


@dataclass(frozen=True)
class Grid:
    """How a scan is cut into blocks: tiles of channels in each group, and chunks of ``length`` steps."""

    tiles: int
    chunks: int
    length: int


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return (a + b - 1) // b


def _cut(l: int, chunks: int, step: int) -> tuple[int, int]:
    length = ceil_div(ceil_div(l, chunks), step) * step
    return ceil_div(l, length), length


@functools.lru_cache(maxsize=1024)
def forward_plan(
    b: int,
    l: int,
    d: int,
    n: int,
    g: int,
    processors: int,
    shape: ForwardShape | None = None,
    chunks: int | None = None,
) -> tuple[ForwardShape, Grid]:
    """The shape and the grid of a forward scan; ``shape`` and ``chunks`` fix what would be chosen."""
    shapes = [shape] if shape else FORWARD[instance(n)]
    # several chunks cost a second pass over them, so they pay only where much of the chip would have nothing to do
    splits = [chunks] if chunks else [c for c in SPLITS if c == 1 or l >= 96 * c]
    options = itertools.product(shapes, splits)
    shape, chunks = min(options, key=lambda o: o[0].cost(b * g, l, d // g, o[1], processors))
    chunks, length = _cut(l, chunks, max(shape.tt, BACKWARD[instance(n)].k))
    return shape, Grid(ceil_div(d // g, shape.channels), chunks, length)


@functools.lru_cache(maxsize=1024)
def backward_plan(
    b: int,
    l: int,
    d: int,
    n: int,
    g: int,
    processors: int,
    shape: BackwardShape | None = None,
    chunks: int | None = None,
) -> tuple[BackwardShape, Grid]:
    """The shape and the grid of a backward scan."""
    shape = BACKWARD[instance(n)] if shape is None else shape
    if chunks is None:
        options = range(1, max(1, min(32, l // (4 * shape.k))) + 1)
        chunks = min(options, key=lambda c: shape.cost(b * g, l, d // g, c, processors))
    chunks, length = _cut(l, chunks, shape.k)
    return shape, Grid(ceil_div(d // g, shape.channels), chunks, length)

"""Blocks that the chunked selective scan works on: some rows and steps of its inputs, and buffers that stay in the cache.

Layout: ``(rows, steps, g, n, d/g)``. Rows outermost gives a thread the same rows in every operation, channels innermost make all of
them vector operations, and the contractions become batched matrix products.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..numerics import exp_, rates, step_sizes
from .inputs import ScanInputs

# a state is saved every so many steps
CHUNK = 32
# elements of a buffer, (b, d, n) per step: short steps are worked on more than one chunk at a time, and rows beyond go into another sweep
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 25}
SWEEP = {"cpu": 1 << 22, "cuda": 1 << 27}


class Buffer:
    """Work space that is used for one block after another, and its steps, whose views are made once."""

    def __init__(self, whole: Tensor):
        self.whole, self.every = whole, whole.unbind(1)

    def cut(self, count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The first steps, together and one by one."""
        return self.whole[:, :count], self.every[:count]


class ScanWork:
    """The inputs of a scan, and how it goes over them: sweeps of rows, and blocks of steps in each.

    ``order``, ``(l,)`` int64, has the tokens in the order they are visited, if not in their own: every block reads and writes its own.
    """

    def __init__(self, i: ScanInputs, dt_softplus: bool, order: Tensor | None = None):
        self.i, self.dt_softplus, self.order, self.acc, n = i, dt_softplus, order, i.acc, i.A.shape[1]
        self.rates = rates(i.A, i.acc).reshape(i.B.shape[2], -1, n).transpose(1, 2).contiguous()  # (g, n, d/g)
        self.expand: Any = None if i.dt_weight is None else i.dt_weight.to(i.acc)

    def sweeps(self) -> Iterator[tuple[slice, list[slice]]]:
        """Rows that are scanned together, and the blocks of steps they go in, each starting where a state is saved."""
        b, l, d = self.i.u.shape
        device = self.i.u.device.type if self.i.u.device.type in BLOCK else "cuda"
        row = d * self.i.A.shape[1]
        count = max(1, min(b, -(-b * row * CHUNK // SWEEP[device])))
        rows = max(1, -(-b // count))
        steps = CHUNK * max(1, BLOCK[device] // (rows * row * CHUNK))
        blocks = [slice(t, min(l, t + steps)) for t in range(0, l, steps)]
        return ((slice(i, min(b, i + rows)), blocks) for i in range(0, b, rows))

    def buffers(self, rows: slice, blocks: list[slice], count: int) -> list[Buffer]:
        """Uninitialised work space for the largest block, (rows, steps, g, n, d/g) each."""
        shape = (rows.stop - rows.start, blocks[0].stop if blocks else 0, *self.rates.shape)
        return [Buffer(self.rates.new_empty(shape)) for _ in range(count)]

    def take(self, x: Tensor, rows: slice, steps: slice) -> Tensor:
        """Some rows and steps of (b, l, ...), in the accumulation dtype."""
        cut = x[rows, steps] if self.order is None else x[rows].index_select(1, self.order[steps])
        return cut.to(self.acc)

    def add(self, total: Tensor, rows: slice, steps: slice, x: Tensor) -> None:
        """Add to some rows and steps of (b, l, ...), which is in the accumulation dtype, in place."""
        if self.order is None:
            total[rows, steps] += x
        else:
            total[rows].index_add_(1, self.order[steps], x)

    def inward(self, state: Tensor) -> Tensor:
        """A state (b, d, n) as (b, g, n, d/g), in the accumulation dtype."""
        return state.to(self.acc).unflatten(1, (self.rates.shape[0], -1)).transpose(2, 3)


def _drops(reset: Tensor) -> dict[int, Tensor]:
    """Steps at which a document may start in one of the rows, and in which, (rows, 1, 1, 1); a GPU is not asked, and so it may at all."""
    steps = reset.any(0).nonzero().flatten().tolist() if reset.device.type == "cpu" else range(reset.shape[1])
    return {t: reset[:, t, None, None, None] for t in steps}


class ScanBlock:
    """The inputs of some rows and steps in the accumulation dtype, shaped to broadcast against (rows, steps, g, n, d/g)."""

    def __init__(self, work: ScanWork, rows: slice, steps: slice):
        i, self.rates = work.i, work.rates
        g, _, e = self.rates.shape

        def cut(x: Tensor) -> Tensor:
            return work.take(x, rows, steps)

        self.u = cut(i.u).unflatten(2, (g, 1, e))
        self.B, self.C = cut(i.B)[..., None], cut(i.C)[..., None]
        self.low = None if i.dt_weight is None else cut(i.dt)
        self.raw = cut(i.dt) if self.low is None else self.low @ work.expand.T
        self.raw = self.raw if i.dt_bias is None else self.raw + i.dt_bias.to(work.acc)
        self.valid = None if i.valid is None else i.valid[rows, steps]
        self.dt = step_sizes(self.raw, None, work.dt_softplus, self.valid).unflatten(2, (g, 1, e))
        self.dtu = self.dt * self.u
        self.reset = None if i.reset is None else i.reset[rows, steps, None, None, None]
        self.drops = {} if i.reset is None else _drops(i.reset[rows, steps])
        self.D = None if i.D is None else i.D.to(work.acc).view(g, 1, e)

    def scan(self, decays: Buffer, states: Buffer, h: Tensor) -> Tensor:
        """Fill the buffers with the decays and with the states that follow ``h`` (rows, g, n, d/g); returns the last state."""
        count = self.u.shape[1]
        (a, a_steps), (x, x_steps) = decays.cut(count), states.cut(count)
        exp_(torch.mul(self.dt, self.rates, out=a))
        if self.reset is not None:
            a.masked_fill_(self.reset, 0.0)
        torch.mul(self.dtu, self.B, out=x)
        for t, (a_t, x_t) in enumerate(zip(a_steps, x_steps, strict=True)):
            h = x_t.addcmul_(a_t, self.dropped(t, h))
        return h

    def dropped(self, t: int, x: Tensor) -> Tensor:
        """``x`` (rows, g, n, d/g) as it passes step t: zero where a document starts, even if it is NaN on the other side."""
        drop = self.drops.get(t)
        return x if drop is None else x.masked_fill(drop, 0.0)

    def read(self, x: Tensor) -> Tensor:
        """``C . h + D u`` as (rows, steps, g, 1, d/g), from the states ``x``."""
        y = self.C.transpose(3, 4) @ x
        return y if self.D is None else y.addcmul_(self.u, self.D)

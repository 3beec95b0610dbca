"""Blocks of chunks that the chunked SSD works on, their decays and masked attention matrices.

Layout: the chunks of a block count as rows, ``g`` groups of ``r`` heads; x (b, g, r, q, p), B and C (b, g, q, n), state
(b, g, n, r, p), so that the heads of a group share one matrix product with B and C.
"""

import torch
from torch import Tensor

from ..numerics import exp_, rates, step_sizes
from .inputs import SsdInputs, SsdOptions

# beyond it a step forgets all in any type; as one term of a sum, it would cost the others their digits
_FLOOR = -1000.0
# elements of L, (b, h, q, q) per chunk, that are worked on together
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 25}


class SsdWork:
    """The inputs of SSD, and how it goes over them, block by block of chunks."""

    def __init__(self, i: SsdInputs, options: SsdOptions):
        self.i, self.options, self.acc, self.chunk = i, options, i.acc, options.chunk

    @property
    def wide(self) -> torch.dtype:
        """The dtype of running sums: float64, but on Apple's GPUs, which have none."""
        return self.acc if self.i.x.device.type == "mps" else torch.float64

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """b, g, r, n, p."""
        (b, _, h, p), (g, n) = self.i.x.shape, self.i.B.shape[2:]
        return b, g, h // g, n, p

    def blocks(self) -> list[tuple[int, int, int]]:
        """The start, the number of chunks and the length of each of them; what is left of l is a shorter chunk."""
        b, l, h, _ = self.i.x.shape
        whole, q = l // self.chunk, self.chunk
        some = max(1, BLOCK.get(self.i.x.device.type, BLOCK["cuda"]) // max(1, b * h * q * q))
        out = [(c * q, min(some, whole - c), q) for c in range(0, whole, some)]
        return out if l % q == 0 else [*out, (whole * q, 1, l % q)]

    def skip(self) -> Tensor | None:
        """D as (g, r, 1, p or 1)."""
        return None if self.i.D is None else self.i.D.to(self.acc).view(*self.sizes[1:3], 1, -1)


class SsdBlock:
    """Some chunks' inputs in the accumulation dtype, their decays and masked attention matrices."""

    def __init__(self, work: SsdWork, start: int, count: int, q: int):
        i, acc, self.work, self.count, self.q = work.i, work.acc, work, count, q
        self.steps, self.chunks = (
            slice(start, start + count * q),
            slice(start // work.chunk, start // work.chunk + count),
        )
        _, g, r, _, _ = work.sizes
        self.x = self.heads(i.x)
        self.B, self.C = (self.cut(m).to(acc).transpose(1, 2) for m in (i.B, i.C))
        raw = self.cut(i.dt).to(acc)
        self.raw = raw if i.dt_bias is None else raw + i.dt_bias.to(acc)
        self.valid = None if i.valid is None else self.cut(i.valid)
        dt = step_sizes(self.raw, None, work.options.dt_softplus, self.valid, work.options.dt_limit)
        self.dt = dt.transpose(1, 2).unflatten(1, (g, r))
        self.dtx = self.dt[..., None] * self.x
        self.rates = rates(i.A, acc).to(work.wide).view(g, r, 1)
        between, onward, into = _sums((self.dt.to(work.wide) * self.rates).clamp_(min=_FLOOR), acc)
        # from s to t, from t to the state at the end, and from the state at the start to t
        self.L, self.onward, self.into = exp_(between), exp_(onward)[..., None], exp_(into)[..., None]
        self.document = None if i.reset is None else self.cut(i.reset).cumsum(1)[:, None]
        if self.document is not None:
            self.into.masked_fill_(self.document[:, None, ..., None] != 0, 0.0)
            self.onward.masked_fill_((self.document != self.document[..., -1:])[:, None, ..., None], 0.0)
        # the decay over a whole chunk, 0 if a document starts in it
        self.through = self.into[:, :, :, -1:].transpose(2, 3)
        self.scores = self.causal(self.C @ self.B.transpose(2, 3))[:, :, None]  # (b, g, 1, q, q)

    def cut(self, x: Tensor) -> Tensor:
        """The block of (b, l, ...) with its chunks as rows, (b * chunks, q, ...)."""
        return x[:, self.steps].reshape(x.shape[0] * self.count, self.q, *x.shape[2:])

    def paste(self, into: Tensor, x: Tensor) -> None:
        """Undo :meth:`cut`, into the block of a (b, l, ...) tensor."""
        into[:, self.steps] = x.reshape(into.shape[0], self.count * self.q, *into.shape[2:])

    def heads(self, x: Tensor) -> Tensor:
        """Cut (b, l, h, p) as (b * chunks, g, r, q, p)."""
        return self.cut(x).to(self.work.acc).transpose(1, 2).unflatten(1, self.work.sizes[1:3])

    def causal(self, scores: Tensor) -> Tensor:
        """Keep of (b, g, q, q) what a token may see: earlier ones of its document. In place."""
        scores.tril_()
        if self.document is not None:
            scores.masked_fill_(self.document[..., :, None] != self.document[..., None, :], 0.0)
        return scores

    def carry(self, state: Tensor, saved: Tensor) -> Tensor:
        """Store the state at the start of every chunk in ``saved`` (b, chunks, g, n, r, p); returns the one after the last."""
        new = (self.B.transpose(2, 3) @ join(self.dtx * self.onward)).view(saved[:, self.chunks].shape)
        through = self.through.unflatten(0, (-1, self.count))
        for c in range(self.count):
            saved[:, self.chunks.start + c] = state
            state = torch.addcmul(new[:, c], through[:, c], state)
        return state

    def read(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs, and the part of them that the state at the start gives, both (b, g, r, q, p)."""
        old = split(self.C @ state.flatten(3), state).mul_(self.into)
        return (self.scores * self.L) @ self.dtx + old, old


def _sums(logs: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of a chunk's (b, g, r, q): the sums from s to t, as (b, g, r, t, s), from t to the end, and from the start to t."""
    sums = logs.cumsum(3)
    if logs.dtype == torch.float64:
        differences = (sums[..., :, None] - sums[..., None, :]).to(acc).tril_()
        return differences, (sums[..., -1:] - sums).to(acc), sums.to(acc)
    # each sum by itself: a difference of float32 sums would have lost the small terms behind a large one
    between = logs[..., None].expand(*logs.shape, logs.shape[3]).tril(-1).cumsum(3)
    return between, between[..., -1, :].clone(), sums


def join(x: Tensor) -> Tensor:
    """(b, g, r, q, p) as (b, g, q, r p)."""
    return x.transpose(2, 3).flatten(3)


def split(x: Tensor, state: Tensor) -> Tensor:
    """Undo :func:`join` for the heads of ``state`` (b, g, n, r, p)."""
    return x.unflatten(3, state.shape[3:]).transpose(2, 3)

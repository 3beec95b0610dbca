"""Models of DNA that see both strands alike (Caduceus, arXiv:2403.03234, §4).

The reverse complement of a strand is the other one, read in its own direction: the letters from the last to the first, A and T exchanged,
C and G exchanged. Inside of a model it is the same for channels: the first half of them follow one strand, the second half the other, and
the *reverse complement* ``RC(x)`` turns rows around and channels with them. A layer ``f`` with ``f(RC(x)) = RC(f(x))`` is equivariant, and
so is a stack of such layers, residual additions included. All of these are, whatever their weights are::

    complement = [3, 2, 1, 0]                                    # of the letters A, C, G, T = 0, 1, 2, 3
    embedding = StrandEmbedding(complement, d_model)
    norms = [ReverseComplement(RMSNorm(d_model // 2)) for _ in range(4)]
    mixers = [Mamba(d_model, directions=2, reverse_complement=True) for _ in range(4)]
    head = StrandHead(complement, d_model)

    x = embedding(ids)                                           # (b, l) -> (b, l, d_model)
    for norm, mixer in zip(norms, mixers):
        x = x + mixer(norm(x))
    logits = head(x)                                             # (b, l, 4): of the other strand, those of this one in its order

For one number per sequence that does not depend on the strand, average over the tokens and add the two halves, the second one flipped:
``x.mean(1)[:, :h] + x.mean(1)[:, h:].flip(-1)``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Seq
from .common import Device, Dtype
from .turning import turning

__all__ = ["ReverseComplement", "StrandEmbedding", "StrandHead", "both_strands", "reverse_complement"]


def reverse_complement(x: Tensor, seq: Seq | None = None) -> Tensor:
    """``RC(x)`` of ``(b, l, d)``: rows turned around, each document in its own place, and channels. Its own inverse."""
    return turning(seq)(x).flip(-1)


def both_strands(mix: Callable[[Tensor, Seq | None], Tensor], x: Tensor, seq: Seq | None = None) -> Tensor:
    """Mix each half of the channels of ``(b, l, d)`` along its own strand, with ``mix`` of ``(b, l, d / 2)`` for both.

    One strand after the other and not as one batch: the result is equivariant to the bit.
    """
    turn = turning(seq)
    this, other = x.chunk(2, dim=-1)
    return torch.cat([mix(this, seq), turn(mix(turn(other).flip(-1), seq)).flip(-1)], dim=-1)


class ReverseComplement(nn.Module):
    """Anybody's module of half the channels, run for each strand: a norm, an MLP, attention, a mixer.

    Args:
        module: ``(b, l, d / 2) -> (b, l, d / 2)``; one with a ``seq`` argument is given that of the call.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, seq: Seq | None = None) -> Tensor:
        """Run on ``(b, l, d)``."""
        return both_strands(
            lambda half, rows: self.module(half) if rows is None else self.module(half, seq=rows), x, seq
        )


class StrandEmbedding(nn.Embedding):
    """Letters for both strands: half the channels are a letter's, the other half its complement's, flipped.

    Args:
        complement: The complement of each letter, by number; letters without one (N, padding) are their own.
        d_model: Channels, an even number; the weight is ``(letters, d_model / 2)``.
        device, dtype: As for ``torch.nn.Embedding``.

    Raises:
        ValueError: A letter's complement has another complement, or the channels do not split.
    """

    complement: Tensor

    def __init__(self, complement: Sequence[int], d_model: int, device: Device = None, dtype: Dtype = None):
        super().__init__(len(complement), _half(d_model), device=device, dtype=dtype)
        self.register_buffer("complement", _involution(complement, device))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``(b, l)`` letters, to ``(b, l, d_model)``."""
        this, other = super().forward(ids), super().forward(self.complement[ids])
        return torch.cat([this, other.flip(-1)], dim=-1)


class StrandHead(nn.Linear):
    """Logits of letters from both strands: each letter by its weight on one strand and by that of its complement on the other.

    Args:
        complement: The complement of each letter, by number.
        d_model: Channels, an even number; the weight is ``(letters, d_model / 2)``, that of :class:`StrandEmbedding` where they are tied.
        device, dtype: As for ``torch.nn.Linear``.

    Raises:
        ValueError: A letter's complement has another complement, or the channels do not split.
    """

    complement: Tensor

    def __init__(self, complement: Sequence[int], d_model: int, device: Device = None, dtype: Dtype = None):
        super().__init__(_half(d_model), len(complement), bias=False, device=device, dtype=dtype)
        self.register_buffer("complement", _involution(complement, device))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, l, d_model)`` to ``(b, l, letters)``."""
        this, other = x.chunk(2, dim=-1)
        return super().forward(this) + F.linear(other.flip(-1), self.weight[self.complement])


def _half(d_model: int) -> int:
    if d_model < 2 or d_model % 2:
        raise ValueError(f"d_model: {d_model} channels do not split into two strands. Use an even number.")
    return d_model // 2


def _involution(complement: Sequence[int], device: Any) -> Tensor:
    letters = list(complement)
    for letter, other in enumerate(letters):
        if not 0 <= other < len(letters) or letters[other] != letter:
            raise ValueError(
                f"complement: letter {letter} has {other}, which is no letter of 0 ... {len(letters) - 1} that has {letter}. "
                "Give each letter's complement by number, [3, 2, 1, 0] for A, C, G, T."
            )
    return torch.tensor(letters, device=device)

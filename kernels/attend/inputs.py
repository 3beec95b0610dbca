"""The tensors and options of attention over a cache, as values which all backends take."""

from typing import NamedTuple

from torch import Tensor


class HeadNorm(NamedTuple):
    """RMS norms of query and key heads.

    Attributes:
        eps: Added to the mean squares.
        q: ``(p,)``, the weight of the queries' norm, or ``None``.
        k: ``(p,)``, the keys'.
    """

    eps: float
    q: Tensor | None = None
    k: Tensor | None = None


class StepAttention(NamedTuple):
    """The arguments of :func:`.op.step_attention`."""

    qkv: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor
    length: Tensor
    nheads: int
    scale: float | None = None
    window: int | None = None
    frequency: Tensor | None = None
    interleaved: bool = False
    key_multiplier: float = 1.0
    norm: HeadNorm | None = None


class ReadAttention(NamedTuple):
    """The arguments of :func:`.op.read_attention`."""

    qkv: Tensor
    k: Tensor
    v: Tensor
    length: Tensor
    counts: Tensor
    nheads: int
    scale: float | None = None
    frequency: Tensor | None = None
    interleaved: bool = False
    key_multiplier: float = 1.0
    norm: HeadNorm | None = None

"""The tensors and options of a product of few rows, as values which all backends take."""

from typing import NamedTuple

from torch import Tensor


class StepNorm(NamedTuple):
    """A norm in front of a product.

    Attributes:
        weight: ``(k,)``, or ``None``.
        eps: Added to the mean square.
        bias: ``(k,)``, a LayerNorm's.
        centred: Whether the mean is taken off: a LayerNorm.
        gate: ``(b, k)``: the norm is one of ``x * silu(gate)`` (Mamba-2).
        group_size: Channels that share a root mean square; all by default.
        norm_before_gate: Normalise first, then gate.
    """

    weight: Tensor | None
    eps: float
    bias: Tensor | None = None
    centred: bool = False
    gate: Tensor | None = None
    group_size: int | None = None
    norm_before_gate: bool = False


class StepConv(NamedTuple):
    """A step of a causal convolution behind some rows of a weight.

    Attributes:
        first: The first of these rows.
        state: ``(b, kw - 1, channels)``, the inputs before this one; shifted in place.
        weight: ``(channels, kw)``, the filters of as many rows.
        bias: ``(channels,)``.
        silu: Whether SiLU follows.
    """

    first: int
    state: Tensor
    weight: Tensor
    bias: Tensor | None = None
    silu: bool = True


class StepProduct(NamedTuple):
    """The arguments of :func:`.op.step_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    norm: StepNorm | None = None
    conv: StepConv | None = None
    activation: str | None = None
    gated: bool = False
    gate_multiplier: float = 1.0
    residual: Tensor | None = None
    multiplier: float = 1.0

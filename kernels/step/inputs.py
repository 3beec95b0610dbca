"""The tensors and options of one step, as values which all backends take."""

import math
from typing import Any, NamedTuple

from torch import Tensor


class ConvStep(NamedTuple):
    """The tensors of :func:`.op.causal_conv1d_update`."""

    x: Tensor
    state: Tensor
    weight: Tensor
    bias: Tensor | None = None
    rows: Tensor | None = None


class ScanNorms(NamedTuple):
    """RMS norms of dt in low-rank form, of B and of C, before they are used (Jamba, arXiv:2403.19887).

    Attributes:
        eps: Added to the mean squares.
        dt: Its weight, ``(r,)``, or ``None``; so are those of B and C, ``(n,)``.
        B: See dt.
        C: See dt.
    """

    eps: float
    dt: Tensor | None = None
    B: Tensor | None = None
    C: Tensor | None = None


class ScanStep(NamedTuple):
    """The tensors of :func:`.op.selective_state_update` or of :func:`.op.ssd_state_update`, which has heads, (b, h, p) in place of (b, d).

    Behind a convolution, as in :func:`.op.conv_ssd_update`, x, B and C are what comes out of it.
    """

    state: Tensor
    x: Any
    dt: Tensor
    A: Tensor
    B: Any
    C: Any
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    rows: Tensor | None = None
    dt_weight: Tensor | None = None
    norms: ScanNorms | None = None


class StepOptions(NamedTuple):
    """The options of a step.

    Attributes:
        silu: Whether SiLU is behind the convolution.
        dt_softplus: Whether softplus is of the step sizes.
        dt_limit: Their limits.
        groups: Groups of what is convolved.
        log_rates: Whether A is the logarithm of the rates' negative.
    """

    silu: bool = False
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    groups: int = 1
    log_rates: bool = False

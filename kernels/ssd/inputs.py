"""The tensors and options that SSD reads, as values which all its backends take."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import acc_dtype


class SsdInputs(NamedTuple):
    """The tensors of :func:`.op.ssd`, and what its ``seq`` says; their gradients are one of these, too."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_state: Tensor | None = None
    reset: Tensor | None = None  # (b, l) bool, true where the carried state is dropped
    valid: Tensor | None = None  # (b, l) bool, false at padding

    @property
    def acc(self) -> torch.dtype:
        """The type that all is computed in: float32, or float64 for float64 inputs."""
        return acc_dtype(self.x.dtype)


class SsdOptions(NamedTuple):
    """The options of :func:`.op.ssd`: softplus and limits of the step sizes, and the tokens of a chunk."""

    dt_softplus: bool = False
    dt_min: float = 0.0
    dt_max: float = math.inf
    chunk: int = 64

    @property
    def dt_limit(self) -> tuple[float, float]:
        """The limits together."""
        return self.dt_min, self.dt_max

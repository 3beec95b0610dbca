"""The tensors that a selective scan reads, as one value which all its backends take."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import acc_dtype

# of the registered ops: every field but dt_weight, in their order
SCHEMA = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? reset, Tensor? valid, bool dt_softplus"
)


class ScanInputs(NamedTuple):
    """The tensors of :func:`.op.selective_scan`, and what its ``seq`` says; their gradients are one of these, too."""

    u: Tensor
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
    dt_weight: Tensor | None = None

    @property
    def acc(self) -> torch.dtype:
        """The type that all is computed in: float32, or float64 for float64 inputs."""
        return acc_dtype(self.u.dtype)

"""Products of few rows in PyTorch operations: the definition, and what no kernel of ours does."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norm.gated import gated_rms_norm
from ..norm.op import layer_norm, rms_norm
from ..step.op import causal_conv1d_update
from .inputs import StepNorm, StepProduct

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def _normed(x: Tensor, norm: StepNorm | None, dtype: torch.dtype) -> Tensor:
    if norm is None:
        return x
    if norm.gate is not None:
        return gated_rms_norm(x, norm.gate, norm.weight, norm.eps, norm.group_size, norm.norm_before_gate).to(dtype)
    if norm.centred:
        return layer_norm(x, norm.weight, norm.bias, norm.eps, dtype, backend="torch")
    return rms_norm(x, norm.weight, norm.eps, dtype, backend="torch")


def step_linear(i: StepProduct) -> Tensor:
    """Norm, product, and what is behind it, one after the other."""
    y = F.linear(_normed(i.x, i.norm, i.weight.dtype), i.weight, i.bias)
    if i.conv is not None:
        first, state, weight, bias, silu = i.conv
        rows = slice(first, first + len(weight))
        activation = "silu" if silu else None
        y[:, rows] = causal_conv1d_update(y[:, rows], state, weight, bias, activation=activation, backend="chunked")
    act = ACTIVATIONS[i.activation]
    if i.gated:
        value, gate = y.chunk(2, dim=-1)
        y = value * act(gate if i.gate_multiplier == 1 else gate * i.gate_multiplier)
    else:
        y = act(y)
    if i.residual is None:
        return y
    return i.residual + (y if i.multiplier == 1 else y * i.multiplier)

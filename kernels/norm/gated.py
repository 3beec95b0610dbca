"""RMSNorm of what a gate is multiplied to (Mamba-2, arXiv:2405.21060 §6.2)."""

import torch.nn.functional as F
from torch import Tensor

from ..numerics import acc_dtype


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, group_size: int | None = None, before: bool = False
) -> Tensor:
    """``rmsnorm(x * silu(gate))``, or ``rmsnorm(x) * silu(gate)`` with ``before``, per group of channels.

    Args:
        x: ``(..., d)``.
        gate: ``(..., d)``.
        weight: ``(d,)``, or ``None``.
        eps: Added to the mean square.
        group_size: Channels that share one root mean square; all of them by default.
        before: Whether the gate comes behind the norm.

    Returns:
        ``(..., d)`` in x's dtype; statistics and products are in float32 at least.
    """
    acc = acc_dtype(x.dtype)
    y, factor = x.to(acc), F.silu(gate.to(acc_dtype(gate.dtype)))
    size = group_size or x.shape[-1]
    if not before:
        y = y * factor
    y = F.rms_norm(y.unflatten(-1, (-1, size)), (size,), None, eps).flatten(-2)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if before:
        y = y * factor
    return y.to(x.dtype)

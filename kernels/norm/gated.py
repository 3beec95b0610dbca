"""RMSNorm of what a gate is multiplied to (Mamba-2, arXiv:2405.21060 §6.2)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import KERNELS, Backend, choose, register
from ..gpu import launch_plans
from ..numerics import acc_dtype
from . import cuda, gated_cuda


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """``rmsnorm(x * silu(gate))``, or ``rmsnorm(x) * silu(gate)``, per group of channels.

    Args:
        x: ``(..., d)``.
        gate: ``(..., d)``.
        weight: ``(d,)``, or ``None``.
        eps: Added to the mean square.
        group_size: Channels that share one root mean square; all of them by default.
        norm_before_gate: Normalise first, then gate.
        backend: ``"cuda"`` or ``"torch"``; chosen automatically if absent (:mod:`hybridzoo.kernels.dispatch`).

    Returns:
        ``(..., d)`` in x's dtype; statistics and products are in float32 at least.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    where, given, how = "gated_rms_norm", (x, gate, weight), (eps, group_size, norm_before_gate, backend)
    if x.dim() == 0:
        raise ValueError(f"{where}: x has no dimensions, expected (..., d).")
    d, size = x.shape[-1], group_size or x.shape[-1]
    if (plan := launch_plans.find(where, given, *how)) is not None:
        return gated_cuda.gated_rms_norm(x, gate, weight, eps, size, norm_before_gate, *plan)
    checks.floating(where, "x", x, x.dim(), "(..., d)")
    checks.floating(where, "gate", gate, x.dim(), "(..., d)")
    checks.shape(where, "gate", gate, tuple(x.shape), "(..., d) like x")
    checks.shape(where, "weight", weight, (d,), "(d,)")
    checks.floats(where, x=x, gate=gate, weight=weight)
    checks.same_device(where, "x", x=x, gate=gate, weight=weight)
    if size < 1 or d % size:
        raise ValueError(f"{where}: d = {d} is not a multiple of group_size = {size}. Pass a divisor of {d}.")
    # of the other tensors' dtypes only that they can be read
    dtypes = tuple(m.dtype for m in (gate, weight) if m is not None)
    facts: dict[str, Any] = {"device": x.device.type, "dtype": x.dtype, "dtypes": dtypes, "d": size}
    chosen = choose(where, backend=backend, **facts)
    if not chosen.plain:
        gating = gated_cuda.Gating(eps, size, norm_before_gate)
        launch_plans.keep(where, given, lambda: (given, gated_cuda.known(x, gate, weight, gating)), *how)
    return chosen.run(x, gate, weight, eps, size, norm_before_gate)


def _torch(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, size: int, norm_before_gate: bool) -> Tensor:
    y, factor = x.to(acc_dtype(x.dtype)), F.silu(gate.to(acc_dtype(gate.dtype)))
    if not norm_before_gate:
        y = y * factor
    y = F.rms_norm(y.unflatten(-1, (-1, size)), (size,), None, eps).flatten(-2)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if norm_before_gate:
        y = y * factor
    return y.to(x.dtype)


register(
    "gated_rms_norm",
    Backend("cuda", KERNELS, cuda.refuse, gated_cuda.gated_rms_norm),
    Backend("torch", "PyTorch operations", run=_torch, plain=True),
)

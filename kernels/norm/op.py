"""The norm in front of a residual branch: ``h = x / rms(x) * weight`` goes into the branch, x goes past it.

What the branch before adds to x may come in with it, so that the sum and its norm are one pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import KERNELS, Backend, choose, register
from ..gpu import launch_plans
from . import cuda


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype | None = None, *, backend: str | None = None
) -> Tensor:
    """The first result of :func:`branch_rms_norm`; the same arguments."""
    return branch_rms_norm(x, weight, eps, dtype, backend=backend)[0]


def branch_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    add: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension (arXiv:1910.07467), and the input to go on with.

    Whoever adds the branch's output to the x that is returned, instead of to the x that was given, saves a pass over its
    gradient: the backward of the norm adds what comes past the branch to what comes through it.

    Args:
        x: ``(..., d)``. Statistics are in float32 at least, whatever its dtype.
        weight: ``(d,)``, a factor of each channel, or ``None``.
        eps: Added to the mean square.
        dtype: Of the first result; x's by default.
        add: ``(..., d)``, added to x first. The sum has the type that PyTorch gives it.
        backend: ``"cuda"`` or ``"torch"``; chosen automatically if absent (:mod:`hybridzoo.kernels.dispatch`).

    Returns:
        The norm ``(..., d)`` in ``dtype``, and x, not copied, or the sum of x and ``add``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    where, given = "rms_norm", (x, weight, add)
    if launch_plans.find(where, given, eps, dtype, backend):
        return cuda.branch_rms_norm(x, weight, eps, dtype or x.dtype, add)
    _check(x, weight, add)
    if add is not None and torch.promote_types(x.dtype, add.dtype) != x.dtype:
        x, add = x + add, None
    out = dtype or x.dtype
    # of the weight's and the addend's dtype only that it can be read
    dtypes = (out, *(m.dtype for m in (weight, add) if m is not None))
    facts: dict[str, Any] = {"device": x.device.type, "dtype": x.dtype, "dtypes": dtypes, "d": x.shape[-1]}
    chosen = choose(where, backend=backend, **facts)
    if chosen.name == "cuda":
        launch_plans.keep(where, given, lambda: ((x, weight, add), True), eps, dtype, backend)
    return chosen.run(x, weight, eps, out, add)


def _check(x: Tensor, weight: Tensor | None, add: Tensor | None) -> None:
    where = "rms_norm"
    if x.dim() == 0:
        raise ValueError(f"{where}: x has no dimensions, expected (..., d).")
    checks.floating(where, "x", x, x.dim(), "(..., d)")
    checks.shape(where, "weight", weight, (x.shape[-1],), "(d,)")
    checks.floats(where, x=x, weight=weight, add=add)
    checks.same_device(where, "x", x=x, weight=weight, add=add)
    if add is not None:
        checks.floating(where, "add", add, x.dim(), "(..., d)")
        checks.shape(where, "add", add, tuple(x.shape), "(..., d)")


def _torch(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, add: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x if add is None else x + add
    # torch computes this in float32 for half inputs, but wants one dtype
    weight = None if weight is None else weight.to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], weight, eps).to(dtype), x


register(
    "rms_norm",
    Backend("cuda", KERNELS, cuda.refuse, cuda.branch_rms_norm),
    Backend("torch", "PyTorch operations", run=_torch, plain=True),
)

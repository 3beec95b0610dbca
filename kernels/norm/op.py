"""The norm in front of a residual branch: ``h = x / rms(x) * weight``, or LayerNorm's, goes into the branch, x goes past it.

What the branch before adds to x may come in with it, so that the sum and its norm are one pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import KERNELS, Backend, choose, register
from ..gpu import launch_plans
from ..numerics import HALVES, autocasts, cast
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
    if (plan := launch_plans.find(where, given, eps, dtype, backend)) is not None:
        return cuda.branch_rms_norm(x, weight, eps, dtype or x.dtype, add, *plan)
    x, add, chosen = _chosen(where, x, weight, None, add, dtype, backend)
    if chosen.name == "cuda":
        known = functools.partial(cuda.known, (x, add, weight, None), eps, dtype or x.dtype, False)
        launch_plans.keep(where, given, lambda: ((x, weight, add), known()), eps, dtype, backend)
    return chosen.run(x, weight, eps, dtype or x.dtype, add)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The first result of :func:`branch_layer_norm`; the same arguments."""
    return branch_layer_norm(x, weight, bias, eps, dtype, backend=backend)[0]


def branch_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    add: Tensor | None = None,
    plain: Callable[..., Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension (arXiv:1607.06450), and the input to go on with, as :func:`branch_rms_norm`.

    Args:
        x: ``(..., d)``. Statistics are in float32 at least, whatever its dtype.
        weight: ``(d,)``, a factor of each channel, or ``None``.
        bias: ``(d,)``, added behind it, or ``None``.
        eps: Added to the variance.
        dtype: Of the first result; by default x's, or the sum's.
        add: ``(..., d)``, added to x first. The sum has the type that PyTorch gives it.
        plain: Stands in for :func:`plain_layer_norm` where PyTorch's operations answer: whoever minds what these keep passes his own.
        backend: ``"cuda"`` or ``"torch"``; chosen automatically if absent (:mod:`hybridzoo.kernels.dispatch`).

    Returns:
        The norm ``(..., d)`` in ``dtype``, and x, not copied, or the sum of x and ``add``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or there is a bias without a weight.
        BackendError: The backend asked for cannot do this call.
    """
    where, given = "layer_norm", (x, weight, bias, add)
    if (plan := launch_plans.find(where, given, eps, dtype, backend)) is not None:
        return cuda.branch_layer_norm(x, weight, bias, eps, dtype or x.dtype, add, *plan)
    x, add, chosen = _chosen(where, x, weight, bias, add, dtype, backend)
    if chosen.plain:
        return _torch_layer_norm(x, weight, bias, eps, dtype or x.dtype, add, plain or plain_layer_norm)
    known = functools.partial(cuda.known, (x, add, weight, bias), eps, dtype or x.dtype, True)
    launch_plans.keep(where, given, lambda: ((x, weight, bias, add), known()), eps, dtype, backend)
    return chosen.run(x, weight, bias, eps, dtype or x.dtype, add)


def _chosen(
    where: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Backend]:
    """The input, what is left to add to it, and the backend."""
    _check(where, x, weight, bias, add)
    if add is not None and torch.promote_types(x.dtype, add.dtype) != x.dtype:
        x, add = x + add, None
    # of the other tensors' dtypes only that they can be read
    dtypes = (dtype or x.dtype, *(m.dtype for m in (weight, bias, add) if m is not None))
    facts: dict[str, Any] = {"device": x.device.type, "dtype": x.dtype, "dtypes": dtypes, "d": x.shape[-1]}
    return x, add, choose(where, backend=backend, **facts)


def _check(where: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, add: Tensor | None) -> None:
    if x.dim() == 0:
        raise ValueError(f"{where}: x has no dimensions, expected (..., d).")
    checks.floating(where, "x", x, x.dim(), "(..., d)")
    checks.shape(where, "weight", weight, (x.shape[-1],), "(d,)")
    checks.shape(where, "bias", bias, (x.shape[-1],), "(d,)")
    checks.floats(where, x=x, weight=weight, bias=bias, add=add)
    checks.same_device(where, "x", x=x, weight=weight, bias=bias, add=add)
    if bias is not None and weight is None:
        raise ValueError(f"{where}: bias is given without a weight. Pass weight=torch.ones({x.shape[-1]}).")
    if add is not None:
        checks.floating(where, "add", add, x.dim(), "(..., d)")
        checks.shape(where, "add", add, tuple(x.shape), "(..., d)")


def _torch_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, add: Tensor | None
) -> tuple[Tensor, Tensor]:
    x = x if add is None else x + add
    # torch computes this in float32 for half inputs, but wants one dtype
    return F.rms_norm(x, x.shape[-1:], cast(weight, x.dtype), eps).to(dtype), x


def _torch_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    add: Tensor | None,
    plain: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    x = x if add is None else x + add
    return plain(x, weight, bias, eps).to(dtype), x


def plain_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm by PyTorch's operation, which wants one dtype: x's, or float32 where autocast reads a half-precision one."""
    # autocast itself would make the weights wide only behind a rounding to x's type
    x = x.float() if autocasts(x) and x.dtype in HALVES else x
    return F.layer_norm(x, x.shape[-1:], cast(weight, x.dtype), cast(bias, x.dtype), eps)


register(
    "rms_norm",
    Backend("cuda", KERNELS, cuda.refuse, cuda.branch_rms_norm),
    Backend("torch", "PyTorch operations", run=_torch_rms_norm, plain=True),
)
register(
    "layer_norm",
    Backend("cuda", KERNELS, cuda.refuse, cuda.branch_layer_norm),
    Backend("torch", "PyTorch operations", run=_torch_layer_norm, plain=True),
)

"""One token at a time: the ops of :mod:`hybridzoo.kernels.scan.op` for a single step, their states updated in place.

A few operations, or one kernel, without a device synchronisation, so they can be captured in a CUDA graph. Serving programs keep more
states than a batch has entries: ``rows`` says which row of the states an entry continues; rows must not repeat.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import KERNELS, Backend, choose, register
from . import chunked, cuda
from .inputs import ConvStep, ScanNorms, ScanStep, StepOptions

register(
    "update",
    Backend("cuda", KERNELS, cuda.refuse, cuda.update),
    Backend("chunked", "PyTorch operations", run=chunked.update, plain=True),
)


def selective_state_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_weight: Tensor | None = None,
    norms: ScanNorms | None = None,
    log_rates: bool = False,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`hybridzoo.kernels.selective_scan`.

    Args:
        state: ``(b, d, n)``, or ``(r, d, n)`` with ``rows``, updated in place; in 16 bits it is rounded behind every step.
        u: ``(b, d)``; so are ``dt`` and ``z``.
        dt: The step size before bias and softplus.
        A: ``(d, n)``.
        B: ``(b, g, n)`` or ``(b, n)``.
        C: As B.
        D: ``(d,)``.
        z: The gate.
        dt_weight: ``(d, r)``: ``dt`` is ``(b, r)``, and its product with this weight, read in its type, are the step sizes.
        norms: RMS norms of dt in that form, and of B and C, of one group.
        log_rates: A is the logarithm of what it stands for: the rates are ``-exp(A)``.
        dt_bias: ``(d,)``.
        dt_softplus: Pass the biased ``dt`` through softplus.
        rows: ``(b,)`` int32 or int64, the rows of the states that the entries continue. Where one is negative, no state changes and
            the output is zero.
        backend: ``"cuda"``, or ``"chunked"`` for PyTorch operations; chosen automatically if absent.

    Returns:
        ``(b, d)`` in u's dtype.

    Raises:
        ValueError: Shapes do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    where = "selective_state_update"
    checks.floating(where, "state", state, 3, "(b, d, n)")
    b, (d, n) = _batch(where, state, rows), state.shape[1:]
    B, C = (m.unsqueeze(1) if m.dim() == 2 else m for m in (B, C))
    checks.floating(where, "B", B, 3, "(b, g, n) or (b, n)")
    g = B.shape[1]
    checks.groups(where, d, g, "d")
    if dt_weight is not None:
        _check_low_rank(where, dt, dt_weight, b, d)
    for name, m in (("u", u), ("dt", dt if dt_weight is None else None), ("z", z)):
        checks.shape(where, name, m, (b, d), "(b, d) of the state")
    checks.shape(where, "A", A, (d, n), "(d, n) of the state")
    if norms is not None:
        _check_norms(where, norms, dt_weight, g, n)
    for name, m in (("B", B), ("C", C)):
        checks.shape(where, name, m, (b, g, n), "(b, g, n) of the state")
    checks.floats(where, state=state, u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    scan = ScanStep(state, u, dt, A, B, C, D, z, dt_bias, rows, dt_weight, norms)
    return _run(backend, None, scan, StepOptions(dt_softplus=dt_softplus, log_rates=log_rates))


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    log_rates: bool = False,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`hybridzoo.kernels.ssd`.

    Args:
        state: ``(b, h, p, n)``, or ``(r, h, p, n)`` with ``rows``, updated in place; in 16 bits it is rounded behind every step.
        x: ``(b, h, p)``; so is ``z``.
        dt: ``(b, h)``, the step size before bias, softplus and limits.
        A: ``(h,)``.
        B: ``(b, g, n)``.
        C: As B.
        D: ``(h,)`` or ``(h, p)``.
        z: The gate.
        log_rates: As for :func:`selective_state_update`.
        dt_bias: ``(h,)``.
        dt_softplus: Pass the biased ``dt`` through softplus.
        dt_limit: The step size is clamped to this range after softplus.
        rows: As for :func:`selective_state_update`.
        backend: As for :func:`selective_state_update`.

    Returns:
        ``(b, h, p)`` in x's dtype.

    Raises:
        ValueError: Shapes do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    where = "ssd_state_update"
    checks.floating(where, "state", state, 4, "(b, h, p, n)")
    b, (h, p, n) = _batch(where, state, rows), state.shape[1:]
    checks.floating(where, "B", B, 3, "(b, g, n)")
    g = B.shape[1]
    checks.groups(where, h, g, "h")
    checks.shape(where, "x", x, (b, h, p), "(b, h, p) of the state")
    for name, m in (("B", B), ("C", C)):
        checks.shape(where, name, m, (b, g, n), "(b, g, n) of the state")
    _check_heads(where, (b, h, p), dt, A, D, z, dt_bias)
    checks.floats(where, state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    scan = ScanStep(state, x, dt, A, B, C, D, z, dt_bias, rows)
    options = StepOptions(dt_softplus=dt_softplus, dt_limit=dt_limit, log_rates=log_rates)
    return _run(backend, None, scan, options)


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`hybridzoo.kernels.causal_conv1d`.

    Args:
        x: ``(b, d)``.
        state: ``(b, k-1, d)``, or ``(r, k-1, d)`` with ``rows``, the inputs before this one; shifted in place.
        weight: ``(d, k)``.
        bias: ``(d,)``.
        activation: ``"silu"`` or ``None``.
        rows: As for :func:`selective_state_update`.
        backend: As for :func:`selective_state_update`.

    Returns:
        ``(b, d)`` in x's dtype.

    Raises:
        ValueError: Shapes do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    where = "causal_conv1d_update"
    checks.floating(where, "x", x, 2, "(b, d)")
    silu = checks.is_silu(where, activation)
    _check_conv(where, x, state, weight, bias, rows)
    checks.floats(where, x=x, state=state, weight=weight, bias=bias)
    return _run(backend, ConvStep(x, state, weight, bias, rows), None, StepOptions(silu))


def conv_ssd_update(
    xBC: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    ngroups: int = 1,
    activation: str | None = None,
    log_rates: bool = False,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of Mamba-2's convolution and of what follows it, :func:`causal_conv1d_update` and :func:`ssd_state_update` in one.

    Args:
        xBC: ``(b, h*p + 2*g*n)``, x, B and C before the convolution.
        conv_state: ``(b, k-1, h*p + 2*g*n)``, shifted in place.
        weight: ``(h*p + 2*g*n, k)``.
        bias: ``(h*p + 2*g*n,)``.
        state: ``(b, h, p, n)``, updated in place.
        dt: ``(b, h)``; this and the rest as for :func:`ssd_state_update`.
        A: ``(h,)``.
        D: ``(h,)`` or ``(h, p)``.
        z: ``(b, h, p)``.
        ngroups: Groups ``g`` of heads that share B and C.
        activation: The convolution's, ``"silu"`` or ``None``.
        log_rates: As for :func:`selective_state_update`.
        dt_bias: ``(h,)``.
        dt_softplus: Pass the biased ``dt`` through softplus.
        dt_limit: The step size is clamped to this range after softplus.
        rows: As for :func:`selective_state_update`, for both states.
        backend: As for :func:`selective_state_update`.

    Returns:
        ``(b, h, p)`` in xBC's dtype.

    Raises:
        ValueError: Shapes do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    where = "conv_ssd_update"
    checks.floating(where, "state", state, 4, "(b, h, p, n)")
    b, (h, p, n) = _batch(where, state, rows), state.shape[1:]
    checks.groups(where, h, ngroups, "h")
    checks.shape(where, "xBC", xBC, (b, h * p + 2 * ngroups * n), "(b, h*p + 2*g*n)")
    silu = checks.is_silu(where, activation)
    _check_conv(where, xBC, conv_state, weight, bias, rows)
    _check_heads(where, (b, h, p), dt, A, D, z, dt_bias)
    given = {"dt": dt, "A": A, "D": D, "z": z, "dt_bias": dt_bias}
    checks.floats(where, xBC=xBC, conv_state=conv_state, weight=weight, bias=bias, state=state, **given)
    conv = ConvStep(xBC, conv_state, weight, bias, rows)
    scan = ScanStep(state, None, dt, A, None, None, D, z, dt_bias, rows)
    return _run(backend, conv, scan, StepOptions(silu, dt_softplus, dt_limit, ngroups, log_rates))


def _batch(where: str, state: Tensor, rows: Tensor | None) -> int:
    if rows is None:
        return state.shape[0]
    if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{where}: rows has shape {tuple(rows.shape)} and dtype {rows.dtype}, expected (b,) of int32 or int64."
        )
    return rows.shape[0]


def _check_low_rank(where: str, dt: Tensor, dt_weight: Tensor, b: int, d: int) -> None:
    checks.floating(where, "dt", dt, 2, "(b, r), beside a dt_weight")
    r = dt.shape[1]
    checks.shape(where, "dt", dt, (b, r), "(b, r), beside a dt_weight")
    checks.shape(where, "dt_weight", dt_weight, (d, r), "(d, r), dt being (b, r)")
    checks.floats(where, dt_weight=dt_weight)


def _check_norms(where: str, norms: ScanNorms, dt_weight: Tensor | None, g: int, n: int) -> None:
    if dt_weight is None or g != 1:
        raise ValueError(
            f"{where}: norms are of dt in low-rank form, and of B and C of one group, not of {g}. Pass dt_weight."
        )
    checks.shape(where, "norms.dt", norms.dt, dt_weight.shape[1:], "(r,) of dt_weight")
    for name, m in (("norms.B", norms.B), ("norms.C", norms.C)):
        checks.shape(where, name, m, (n,), "(n,) of the state")


def _check_conv(where: str, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> None:
    checks.floating(where, "weight", weight, 2, "(d, k)")
    (b, d), k = x.shape, weight.shape[1]
    checks.shape(where, "weight", weight, (d, k), "(d, k)")
    checks.shape(where, "bias", bias, (d,), "(d,)")
    checks.shape(where, "conv state", state, (b if rows is None else state.shape[0], k - 1, d), "(b, k-1, d)")
    if rows is not None:
        checks.shape(where, "rows", rows, (b,), "(b,)")
        _batch(where, state, rows)


def _check_heads(where: str, sizes: tuple[int, ...], dt: Tensor, A: Tensor, D: Any, z: Any, dt_bias: Any) -> None:
    b, h, p = sizes
    checks.shape(where, "dt", dt, (b, h), "(b, h) of the state")
    checks.shape(where, "A", A, (h,), "(h,) of the state")
    checks.shape(where, "z", z, (b, h, p), "(b, h, p) of the state")
    checks.shape(where, "dt_bias", dt_bias, (h,), "(h,) of the state")
    if D is not None and D.dim() == 2:
        checks.shape(where, "D", D, (h, p), "(h,) or (h, p) of the state")
    else:
        checks.shape(where, "D", D, (h,), "(h,) or (h, p) of the state")


def _run(backend: str | None, conv: ConvStep | None, scan: ScanStep | None, options: StepOptions) -> Tensor:
    x = conv.x if conv is not None else scan.x  # type: ignore[union-attr]
    given = (*(conv or ()), *(scan or ()))
    grad = torch.is_grad_enabled() and any([isinstance(m, Tensor) and m.requires_grad for m in given])
    facts: dict[str, Any] = {"device": x.device.type, "dtype": x.dtype, "grad": grad}
    if scan is not None:
        state = scan.state
        facts |= {"state_dtype": state.dtype, "whole_rows": _whole_rows(state), "d_state": state.shape[-1]}
    if conv is not None:
        whole = conv.state.stride(-1) == 1
        facts |= {"conv_dtype": conv.state.dtype, "whole_channels": whole, "width": conv.weight.shape[1]}
    return choose("update", backend=backend, **facts).run(conv, scan, options)


def _whole_rows(state: Tensor) -> bool:
    inside = 1
    for size, stride in zip(reversed(state.shape[1:]), reversed(state.stride()[1:]), strict=True):
        if size > 1 and stride != inside:
            return False
        inside *= size
    return True

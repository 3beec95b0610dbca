"""The definitions: one loop over time per op, in float32 or float64, obvious and slow.

Every other backend is tested against these functions. They are plain differentiable PyTorch, so autograd gives every gradient, those of
the initial and through the final state included. The loops read their steps from ``unbind``: an indexed read would allocate a
full-size gradient per step, and make the backward quadratic in ``l``.

Sources: selective scan, arXiv:2312.00752, Algorithm 2, with B discretised by Euler's rule as in the authors' code; SSD,
arXiv:2405.21060, equation 1 with a scalar A per head.
"""

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def step_sizes(
    dt: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    valid: Tensor | None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """The step sizes as the recurrence uses them: bias, softplus, limits, and 0 where ``valid`` is false; ``dt`` is (b, l, d or h)."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit != (0.0, math.inf):
        dt = dt.clamp(*dt_limit)
    # a zero step multiplies the state by one and adds nothing
    return dt if valid is None else dt.masked_fill(~valid[..., None], 0.0)


def rates(A: Tensor, acc: torch.dtype) -> Tensor:
    """Decay rates as the recurrence uses them, finite: -inf forgets all at every step, but a step of zero leaves the state alone.

    The floor times the smallest normal number, at which decays end (:func:`exp_`), is no gradient to speak of.
    """
    return A.to(acc).clamp(min=max(-1e30, torch.finfo(acc).min))


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    valid: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`` and ``y_t = C_t . h_t + D u_t``, gated by ``silu(z)``, one step after another.

    Args:
        u: ``(b, l, d)``; so are ``dt`` and ``z``.
        dt: Step sizes before bias and softplus.
        A: ``(d, n)``.
        B: ``(b, l, g, n)``; so is ``C``.
        C: How the state is read.
        D: ``(d,)``.
        z: The gate.
        dt_bias: ``(d,)``.
        initial_state: ``(b, d, n)``.
        reset: ``(b, l)`` bool, true where the carried state is dropped.
        valid: ``(b, l)`` bool, false at padding.
        dt_softplus: Whether step sizes pass through softplus.

    Returns:
        ``(b, l, d)`` in u's dtype, and the last state ``(b, d, n)`` in at least float32.
    """
    acc = torch.promote_types(u.dtype, torch.float32)
    b, l, d = u.shape
    g, n = B.shape[2:]
    x, A = u.to(acc), rates(A, acc)
    dt = step_sizes(dt.to(acc), dt_bias, dt_softplus, valid)
    h = x.new_zeros(b, d, n) if initial_state is None else initial_state.to(acc)
    drops = [None] * l if reset is None else reset.unbind(1)
    ys = []
    for x_t, dt_t, B_t, C_t, drop in zip(
        x.unbind(1), dt.unbind(1), B.to(acc).unbind(1), C.to(acc).unbind(1), drops, strict=True
    ):
        if drop is not None:
            h = h.masked_fill(drop[:, None, None], 0.0)
        B_t, C_t = (m.repeat_interleave(d // g, dim=1) for m in (B_t, C_t))  # (b, d, n)
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * x_t)[..., None] * B_t
        ys.append((h * C_t).sum(-1))
    y = torch.stack(ys, 1) if ys else x * dt  # no token, and still a part of the graph
    return finish(y, x, D, z).to(u.dtype), h


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    valid: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """The same recurrence with one decay rate per head, ``x`` (b, l, h, p), ``dt`` (b, l, h), ``A`` (h,), state (b, h, p, n)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    u, A = x.to(acc), rates(A, acc)
    dt = step_sizes(dt.to(acc), dt_bias, dt_softplus, valid, dt_limit)
    s = u.new_zeros(b, h, p, n) if initial_state is None else initial_state.to(acc)
    drops = [None] * l if reset is None else reset.unbind(1)
    ys = []
    for u_t, dt_t, B_t, C_t, drop in zip(
        u.unbind(1), dt.unbind(1), B.to(acc).unbind(1), C.to(acc).unbind(1), drops, strict=True
    ):
        if drop is not None:
            s = s.masked_fill(drop[:, None, None, None], 0.0)
        B_t, C_t = (m.repeat_interleave(h // g, dim=1)[:, :, None] for m in (B_t, C_t))  # (b, h, 1, n)
        s = torch.exp(dt_t * A)[..., None, None] * s + (dt_t[..., None] * u_t)[..., None] * B_t
        ys.append((s * C_t).sum(-1))
    y = torch.stack(ys, 1) if ys else u * dt[..., None]
    if D is not None and D.dim() == 1:
        D = D[:, None]
    return finish(y, u, D, z).to(x.dtype), s


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, doc: Tensor | None, silu: bool
) -> Tensor:
    """``y_t = bias + sum_j weight[:, k-1-j] x_{t-j}`` over the inputs of t's own document, x (b, l, d), weight (d, k).

    ``initial_state`` (b, k-1, d) stands before the row and belongs to its first document; ``doc`` (b, l) names documents.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    b, l, d = x.shape
    k = weight.shape[1]
    before = x.new_zeros(b, k - 1, d) if initial_state is None else initial_state
    row = torch.cat([before.to(acc), x.to(acc)], 1).unbind(1)
    docs = None if doc is None else torch.cat([doc[:, :1].expand(b, k - 1), doc], 1).unbind(1)
    taps = weight.to(acc).unbind(1)
    ys = []
    for t in range(l):
        y = x.new_zeros(b, d, dtype=acc) if bias is None else bias.to(acc).expand(b, d)
        for j in range(k):
            seen = (
                row[t + j] if docs is None else row[t + j].masked_fill((docs[t + j] != docs[t + k - 1])[:, None], 0.0)
            )
            y = y + taps[j] * seen
        ys.append(F.silu(y) if silu else y)
    return torch.stack(ys, 1).to(x.dtype) if ys else x.clone()


def exp_(x: Tensor) -> Tensor:
    """``exp`` in place, of what is hardly positive; results below the smallest normal number become that number.

    Results that underflow cost 20 to 150 times as much as others in the vector library that torch calls on a CPU.
    """
    return x.clamp_(min=math.log(torch.finfo(x.dtype).tiny)).exp_()


P = ParamSpec("P")
R = TypeVar("R")


def full_precision(op: Callable[P, R]) -> Callable[P, R]:
    """Run an op whose first argument is a tensor with autocast off: its matrix products keep the precision it chose."""

    @functools.wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = cast(Tensor, args[0]).device.type
        if not torch.amp.is_autocast_available(device):
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return run


def finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """The skip and the gate: ``(y + D x) silu(z)``."""
    if D is not None:
        y = y + D.to(y.dtype) * x
    return y if z is None else y * F.silu(z.to(y.dtype))

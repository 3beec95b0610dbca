"""The definitions: one loop over time per op, in float32 or float64, obvious and slow.

Every other backend is tested against these functions. They are plain differentiable PyTorch, so autograd gives every gradient, those of
the initial and through the final state included. The loops read their steps from ``unbind``: an indexed read would allocate a
full-size gradient per step, and make the backward quadratic in ``l``.

Sources: selective scan, arXiv:2312.00752, Algorithm 2, with B discretised by Euler's rule as in the authors' code; SSD,
arXiv:2405.21060, equation 1 with a scalar A per head.
"""

import torch
from torch import Tensor

from ..numerics import finish, rates, step_sizes


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

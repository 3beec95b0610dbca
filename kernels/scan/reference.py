"""The definition of the selective scan: a loop over time, in float32 or float64, obvious and slow.

Every other backend is tested against it. It is plain differentiable PyTorch, so autograd gives every gradient, those of the initial and
through the final state included. The loop reads its steps from ``unbind``: an indexed read would allocate a full-size gradient per step,
and make the backward quadratic in ``l``.
"""

import torch
from torch import Tensor

from ..numerics import finish, rates, step_sizes
from .inputs import ScanInputs


def selective_scan(i: ScanInputs, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`` and ``y_t = C_t . h_t + D u_t``, gated by ``silu(z)``, one step after another.

    Args:
        i: The inputs, B and C with groups; step sizes whole, not in low-rank form.
        dt_softplus: Whether step sizes pass through softplus.

    Returns:
        ``(b, l, d)`` in u's dtype, and the last state ``(b, d, n)`` in at least float32.
    """
    acc, (b, l, d), (g, n) = i.acc, i.u.shape, i.B.shape[2:]
    x, A = i.u.to(acc), rates(i.A, acc)
    dt = step_sizes(i.dt.to(acc), i.dt_bias, dt_softplus, i.valid)
    h = x.new_zeros(b, d, n) if i.initial_state is None else i.initial_state.to(acc)
    drops = [None] * l if i.reset is None else i.reset.unbind(1)
    ys = []
    for x_t, dt_t, B_t, C_t, drop in zip(*(m.unbind(1) for m in (x, dt, i.B.to(acc), i.C.to(acc))), drops, strict=True):
        if drop is not None:
            h = h.masked_fill(drop[:, None, None], 0.0)
        B_t, C_t = (m.repeat_interleave(d // g, dim=1) for m in (B_t, C_t))  # (b, d, n)
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * x_t)[..., None] * B_t
        ys.append((h * C_t).sum(-1))
    y = torch.stack(ys, 1) if ys else x * dt  # no token, and still a part of the graph
    return finish(y, x, i.D, i.z).to(i.u.dtype), h

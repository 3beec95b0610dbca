"""The definition of the selective scan: a loop over time, in float32 or float64, obvious and slow.

Every other backend is tested against it. It is plain differentiable PyTorch, so autograd gives every gradient, those of the initial and
through the final state included. The loop reads its steps from ``unbind``: an indexed read would allocate a full-size gradient per step,
and make the backward quadratic in ``l``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import finish, rates, step_sizes
from .inputs import ScanInputs
from .low_rank import step_sizes as formed
from .paths import Path, per_path, steps_of


def selective_scan(i: ScanInputs, dt_softplus: bool, path: Path | None = None) -> tuple[Tensor, Tensor]:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t`` and ``y_t = C_t . h_t + D u_t``, gated by ``silu(z)``, one step after another.

    Args:
        i: The inputs, B and C with groups; step sizes whole, not in low-rank form.
        dt_softplus: Whether step sizes pass through softplus.
        path: The walk over the tokens, see :mod:`.paths`; from the first to the last by default.

    Returns:
        ``(b, l, d)`` in u's dtype, and the last state ``(b, d, n)`` in at least float32.
    """
    acc, (b, l, d), (g, n) = i.acc, i.u.shape, i.B.shape[2:]
    x, A = i.u.to(acc), rates(i.A, acc)
    dt = step_sizes(i.dt.to(acc), i.dt_bias, dt_softplus, i.valid)
    h = x.new_zeros(b, d, n) if i.initial_state is None else i.initial_state.to(acc)
    drops = [None] * l if i.reset is None else i.reset.unbind(1)
    tokens = list(zip(*(m.unbind(1) for m in (x, dt, i.B.to(acc), i.C.to(acc))), drops, strict=True))
    ys: list[Any] = [None] * l
    for t in range(l) if path is None else steps_of(path):
        x_t, dt_t, B_t, C_t, drop = tokens[t]
        if drop is not None:
            h = h.masked_fill(drop[:, None, None], 0.0)
        B_t, C_t = (m.repeat_interleave(d // g, dim=1) for m in (B_t, C_t))  # (b, d, n)
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * x_t)[..., None] * B_t
        ys[t] = (h * C_t).sum(-1)
    y = torch.stack(ys, 1) if ys else x * dt  # no token, and still a part of the graph
    return finish(y, x, i.D, i.z).to(i.u.dtype), h


def over_paths(i: ScanInputs, dt_softplus: bool, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """One walk after another over the tokens where they are: the sum of the outputs, gated, and the last states (k, b, d, n)."""
    total, last = torch.zeros_like(i.u, dtype=i.acc), []
    for path, own in zip(paths, per_path(len(paths), i), strict=True):
        if own.dt_weight is not None:
            own = own._replace(dt=formed(own.dt, own.dt_weight), dt_weight=None)
        y, h = selective_scan(own._replace(u=own.u.to(i.acc), z=None), dt_softplus, path)
        total = total + y
        last.append(h)
    if i.z is not None:
        total = total * F.silu(i.z.to(i.acc))
    return total.to(i.u.dtype), torch.stack(last)

"""The definition of SSD (arXiv:2405.21060, equation 1 with a scalar A per head): a loop over time, as that of the selective scan."""

import torch
from torch import Tensor

from ..numerics import finish, rates, step_sizes
from .inputs import SsdInputs, SsdOptions


def ssd(i: SsdInputs, options: SsdOptions) -> tuple[Tensor, Tensor]:
    """The same recurrence with one decay rate per head, ``x`` (b, l, h, p), ``dt`` (b, l, h), ``A`` (h,), state (b, h, p, n)."""
    acc, (b, l, h, p), (g, n) = i.acc, i.x.shape, i.B.shape[2:]
    u, A = i.x.to(acc), rates(i.A, acc)
    dt = step_sizes(i.dt.to(acc), i.dt_bias, options.dt_softplus, i.valid, options.dt_limit)
    s = u.new_zeros(b, h, p, n) if i.initial_state is None else i.initial_state.to(acc)
    drops = [None] * l if i.reset is None else i.reset.unbind(1)
    ys = []
    for u_t, dt_t, B_t, C_t, drop in zip(*(m.unbind(1) for m in (u, dt, i.B.to(acc), i.C.to(acc))), drops, strict=True):
        if drop is not None:
            s = s.masked_fill(drop[:, None, None, None], 0.0)
        B_t, C_t = (m.repeat_interleave(h // g, dim=1)[:, :, None] for m in (B_t, C_t))  # (b, h, 1, n)
        s = torch.exp(dt_t * A)[..., None, None] * s + (dt_t[..., None] * u_t)[..., None] * B_t
        ys.append((s * C_t).sum(-1))
    y = torch.stack(ys, 1) if ys else u * dt[..., None]
    D = i.D[:, None] if i.D is not None and i.D.dim() == 1 else i.D
    return finish(y, u, D, i.z).to(i.x.dtype), s

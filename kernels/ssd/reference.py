"""The definition of SSD, through that of the selective scan."""

import torch
from torch import Tensor

from ..numerics import finish, rates, step_sizes


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
    chunk_size: int = 0,
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

"""One token at a time in PyTorch operations: what :mod:`.op` calls where no kernel of ours does it.

No operation waits for the device, so a step can be captured in a CUDA graph. Arguments are checked by the caller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import finish, rates, step_sizes


def take(state: Tensor, rows: Tensor | None) -> Tensor:
    """The entries' states: ``state`` itself, or a copy of the indexed rows, anything where an entry is skipped."""
    return state if rows is None else state.index_select(0, rows.clamp(min=0))


def put(state: Tensor, rows: Tensor | None, new: Tensor) -> None:
    """Write back what :func:`take` gave; entries of a negative index write nothing."""
    if rows is None:
        return
    # which entry writes a row, -1 for none; a selection by mask would wait for the device
    entry = rows.new_full((state.shape[0] + 1,), -1, dtype=torch.int64)
    at = rows.clamp(min=-1).long() + 1
    entry = entry.scatter_(0, at, torch.arange(len(rows), device=rows.device))[1:]
    written = (entry >= 0).view(-1, *[1] * (state.dim() - 1))
    state.copy_(torch.where(written, new.index_select(0, entry.clamp(min=0)), state))


def _skipped(y: Tensor, rows: Tensor | None) -> Tensor:
    return y if rows is None else y.masked_fill((rows < 0).view(-1, *[1] * (y.dim() - 1)), 0.0)


def selective(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    rows: Tensor | None,
) -> Tensor:
    """:func:`.op.selective_state_update`."""
    acc, (b, d), g = state.dtype, u.shape, B.shape[1]
    h = take(state, rows)
    x = u.to(acc)
    dt = step_sizes(dt.to(acc), dt_bias, dt_softplus, None)
    h.mul_(torch.exp(dt[..., None] * rates(A, acc)))
    grouped = h.unflatten(1, (g, d // g))
    grouped.addcmul_((dt * x).view(b, g, d // g, 1), B.to(acc)[:, :, None])
    put(state, rows, h)
    # no matrix product: autocast would round the state
    y = (grouped * C.to(acc)[:, :, None]).sum(-1).view(b, d)
    return _skipped(finish(y, x, D, z).to(u.dtype), rows)


def ssd(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    rows: Tensor | None,
) -> Tensor:
    """:func:`.op.ssd_state_update`."""
    acc, heads = state.dtype, x.shape[1]
    s = take(state, rows)
    u = x.to(acc)
    dt = step_sizes(dt.to(acc), dt_bias, dt_softplus, None, dt_limit)
    B, C = (m.to(acc).repeat_interleave(heads // m.shape[1], dim=1) for m in (B, C))
    s.mul_(torch.exp(dt * rates(A, acc))[..., None, None])
    s.addcmul_((dt[..., None] * u)[..., None], B[:, :, None])
    put(state, rows, s)
    y = (s * C[:, :, None]).sum(-1)
    return _skipped(finish(y, u, D[:, None] if D is not None and D.dim() == 1 else D, z).to(x.dtype), rows)


def conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, rows: Tensor | None) -> Tensor:
    """:func:`.op.causal_conv1d_update`."""
    acc = torch.promote_types(x.dtype, torch.float32)
    row = torch.cat([take(state, rows), x[:, None].to(state.dtype)], 1)
    if rows is None:
        state.copy_(row[:, 1:])
    else:
        put(state, rows, row[:, 1:])
    y = (row.to(acc) * weight.t().to(acc)).sum(1)
    if bias is not None:
        y = y + bias.to(acc)
    return _skipped((F.silu(y) if silu else y).to(x.dtype), rows)


def conv_ssd(
    xBC: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    groups: int,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    rows: Tensor | None,
) -> Tensor:
    """:func:`.op.conv_ssd_update`, one op after the other."""
    _, h, p, n = state.shape
    x, B, C = conv(xBC, conv_state, weight, bias, silu, rows).split([h * p, groups * n, groups * n], dim=-1)
    B, C = (m.unflatten(-1, (groups, n)) for m in (B, C))
    return ssd(state, x.unflatten(-1, (h, p)), dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, rows)

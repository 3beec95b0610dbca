"""One token at a time in PyTorch operations, for what no kernel of ours does.

No operation waits for the device, so a step can be captured in a CUDA graph. Arguments are checked by the caller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import acc_dtype, cast, finish, rates, step_sizes
from .inputs import ConvStep, ScanStep, StepOptions


def take(state: Tensor, rows: Tensor | None) -> Tensor:
    """The entries' states: ``state`` itself, or a copy of the indexed rows, anything where an entry is skipped."""
    return state if rows is None else state.index_select(0, rows.clamp(min=0))


def put(state: Tensor, rows: Tensor | None, new: Tensor) -> None:
    """Write back what :func:`take` gave, in the state's type; entries of a negative index write nothing."""
    if rows is None:
        if new is not state:
            state.copy_(new)
        return
    new = new.to(state.dtype)
    # which entry writes a row, -1 for none; a selection by mask would wait for the device
    entry = rows.new_full((state.shape[0] + 1,), -1, dtype=torch.int64)
    at = rows.clamp(min=-1).long() + 1
    entry = entry.scatter_(0, at, torch.arange(len(rows), device=rows.device))[1:]
    written = (entry >= 0).view(-1, *[1] * (state.dim() - 1))
    state.copy_(torch.where(written, new.index_select(0, entry.clamp(min=0)), state))


def spelled_out(i: ScanStep) -> ScanStep:
    """The same step with its step sizes, B and C formed: no norms, and no low-rank form."""
    if i.dt_weight is None and i.norms is None:
        return i
    dt, B, C = i.dt, i.B, i.C
    if i.norms is not None:
        eps, *weights = i.norms
        dt, B, C = (
            F.rms_norm(m, m.shape[-1:], cast(w, m.dtype), eps) for m, w in zip((dt, B, C), weights, strict=True)
        )
    if i.dt_weight is not None:
        dt = F.linear(dt, i.dt_weight.to(dt.dtype))
    return i._replace(dt=dt, B=B, C=C, dt_weight=None, norms=None)


def _rates(i: ScanStep, options: StepOptions, acc: torch.dtype) -> Tensor:
    return rates(-i.A.to(acc).exp() if options.log_rates else i.A, acc)


def _skipped(y: Tensor, rows: Tensor | None) -> Tensor:
    return y if rows is None else y.masked_fill((rows < 0).view(-1, *[1] * (y.dim() - 1)), 0.0)


def _selective(i: ScanStep, options: StepOptions) -> Tensor:
    acc, (b, d), g = acc_dtype(i.state.dtype), i.x.shape, i.B.shape[1]
    h, x = take(i.state, i.rows).to(acc), i.x.to(acc)
    dt = step_sizes(i.dt.to(acc), i.dt_bias, options.dt_softplus, None)
    h.mul_(torch.exp(dt[..., None] * _rates(i, options, acc)))
    grouped = h.unflatten(1, (g, d // g))
    grouped.addcmul_((dt * x).view(b, g, d // g, 1), i.B.to(acc)[:, :, None])
    put(i.state, i.rows, h)
    # no matrix product: autocast would round the state
    y = (grouped * i.C.to(acc)[:, :, None]).sum(-1).view(b, d)
    return _skipped(finish(y, x, i.D, i.z).to(i.x.dtype), i.rows)


def _ssd(i: ScanStep, options: StepOptions) -> Tensor:
    acc, heads = acc_dtype(i.state.dtype), i.x.shape[1]
    s, u = take(i.state, i.rows).to(acc), i.x.to(acc)
    dt = step_sizes(i.dt.to(acc), i.dt_bias, options.dt_softplus, None, options.dt_limit)
    B, C = (m.to(acc).repeat_interleave(heads // m.shape[1], dim=1) for m in (i.B, i.C))
    s.mul_(torch.exp(dt * _rates(i, options, acc))[..., None, None])
    s.addcmul_((dt[..., None] * u)[..., None], B[:, :, None])
    put(i.state, i.rows, s)
    y = (s * C[:, :, None]).sum(-1)
    D = i.D[:, None] if i.D is not None and i.D.dim() == 1 else i.D
    return _skipped(finish(y, u, D, i.z).to(i.x.dtype), i.rows)


def _conv(i: ConvStep, silu: bool) -> Tensor:
    acc = acc_dtype(i.x.dtype)
    row = torch.cat([take(i.state, i.rows), i.x[:, None].to(i.state.dtype)], 1)
    put(i.state, i.rows, row[:, 1:])
    y = (row.to(acc) * i.weight.t().to(acc)).sum(1)
    if i.bias is not None:
        y = y + i.bias.to(acc)
    return _skipped((F.silu(y) if silu else y).to(i.x.dtype), i.rows)


def update(conv: ConvStep | None, scan: ScanStep | None, options: StepOptions) -> Tensor:
    """One step of a convolution, of a scan, or of one after the other."""
    if conv is not None:
        y = _conv(conv, options.silu)
        if scan is None:
            return y
        (_, h, p, n), g = scan.state.shape, options.groups
        x, B, C = y.split([h * p, g * n, g * n], dim=-1)
        scan = scan._replace(x=x.unflatten(-1, (h, p)), B=B.unflatten(-1, (g, n)), C=C.unflatten(-1, (g, n)))
    assert scan is not None
    return (_ssd if scan.x.dim() == 3 else _selective)(spelled_out(scan), options)

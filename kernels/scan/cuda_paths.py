"""The CUDA scan over walks (:mod:`.paths`): a launch per path, all over the same memory, and nothing is gathered or flipped.

Outputs are summed at the tokens, in float32 and in the order of the paths; the last launch gates the sum and rounds it. Gradients of what
paths share are kept per path and then summed in one pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..gpu.operands import in_rows
from . import launches, low_rank
from .inputs import ScanInputs
from .operands import ScanOperands, WideGradients
from .paths import per_path


def _walks(varied: list[ScanInputs], paths: Sequence[int], dt_softplus: bool) -> list[ScanOperands]:
    u, z = varied[0].u, varied[0].z
    calls: list[ScanOperands] = []
    for k, i in enumerate(varied):
        calls.append(ScanOperands.of(i._replace(u=u, z=z), dt_softplus, tuple(paths[5 * k : 5 * k + 5])))
        # a conversion is made once for all paths
        u, z = calls[0].i.u, calls[0].i.z
    return calls


def forward(
    i: ScanInputs, dt_softplus: bool, paths: Sequence[int], save: bool, chunks: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`.launches.forward`, states with a leading axis of one per path; ``paths`` are five integers for each."""
    calls = _walks(per_path(len(paths) // 5, i), paths, dt_softplus)
    first = calls[0]
    out = first.i.u.new_empty(first.i.u.shape)
    total = out if out.dtype == torch.float32 or len(calls) == 1 else first.i.A.new_empty(out.shape)
    last = first.last_state(len(calls))
    saved = first.saved_states(len(calls)) if save else None
    for k, call in enumerate(calls):
        call.before = total if k else None
        if k + 1 < len(calls):
            call.sum, call.i = total, call.i._replace(z=None)
        launches.forward(call, save, chunks=chunks, into=(out, last[k], None if saved is None else saved[k]))
    return out, last, saved


def backward(
    i: ScanInputs,
    dt_softplus: bool,
    paths: Sequence[int],
    gout: Tensor,
    glast: Tensor | None,
    saved: Tensor | None,
    chunks: int | None = None,
) -> ScanInputs:
    """Gradients of the inputs, in their shapes."""
    varied = per_path(len(paths) // 5, i)
    calls = _walks(varied, paths, dt_softplus)
    gout = in_rows(gout, calls[0].i.u.dtype)
    # of step sizes in low-rank form, the gradient of one path at a time is in memory
    one = None if i.dt_weight is None else gout.new_empty(calls[0].i.u.shape)
    wide = calls[0].gradients(len(calls), dt=one)
    each: list[ScanInputs] = []
    for k, (call, own) in enumerate(zip(calls, varied, strict=True)):
        into = WideGradients(*(g if g is None or g is one else g[k] for g in wide))  # type: ignore[arg-type]
        glast_k, saved_k = (None if x is None else x[k] for x in (glast, saved))
        grads = launches.backward(call, gout, glast_k, saved_k, chunks=chunks, into=into)
        each.append(low_rank.with_gradients(grads, own))
    # what is written into one tensor for all paths is there already
    planes = wide._asdict() if one is None else wide._asdict() | {"dt": None}
    found: dict[str, Any] = {}
    for name, x in i._asdict().items():
        parts = [getattr(grads, name) for grads in each]
        g = planes.get(name)
        if g is None and parts[0] is not None:
            g = torch.stack(parts)
        found[name] = None if x is None or g is None else g.sum(0) if g.dim() > x.dim() else g
    return ScanInputs(**found)

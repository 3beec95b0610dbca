"""The CUDA scan over walks (:mod:`.paths`): all over the same memory, and nothing is gathered or flipped.

Outputs are summed at the tokens, in float32 and in the order of the paths, and the last path gates and rounds the sum: a launch for each,
or one for all (:mod:`.walk_launches`), as a backward is. Gradients of what paths share are kept per path, then summed in one pass.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..gpu import nvrtc
from ..gpu.operands import in_rows
from . import launches, low_rank, walk_launches
from .inputs import ScanInputs
from .operands import ScanOperands
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
    # the scan forms step sizes of all paths, or of none
    if not all([call.is_ready for call in calls]):
        calls = _formed(calls, i)[0]
    first = calls[0]
    out = first.i.u.new_empty(first.i.u.shape)
    total = out if out.dtype == torch.float32 or len(calls) == 1 else first.i.A.new_empty(out.shape)
    last = first.last_state(len(calls))
    saved = first.saved_states(len(calls)) if save else None
    for k, call in enumerate(calls):
        call.before = total if k else None
        if k + 1 < len(calls):
            call.sum, call.i = total, call.i._replace(z=None)
    if chunks is None and walk_launches.forward(calls, out, last, saved):
        return out, last, saved
    for k, call in enumerate(calls):
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
    k = len(paths) // 5
    calls = _walks(per_path(k, i), paths, dt_softplus)
    gout = in_rows(gout, calls[0].i.u.dtype)
    low, weight, dt = None, None, None
    if i.dt_weight is not None:
        # in autograd's thread this may be what comes first, and cuBLAS warns where there is no context
        nvrtc.enter(gout.device)
        calls, low, weight, dt = _formed(calls, i)
    # step sizes that were formed for this are the last that anybody reads of a token: their gradient goes there
    wide = calls[0].gradients(k, dt=dt)
    grads = walk_launches.backward(calls, gout, glast, saved, wide, chunks)
    if low is not None and weight is not None:
        grads = low_rank.with_gradients_of_walks(grads, low, weight, i.dt_weight)
    found: dict[str, Any] = {}
    for name, x in i._asdict().items():
        g = getattr(grads, name)
        found[name] = None if x is None or g is None else g.sum(0) if g.dim() > x.dim() else g
    return ScanInputs(**found)


def _formed(calls: list[ScanOperands], i: ScanInputs) -> tuple[list[ScanOperands], Tensor, Tensor, Tensor]:
    """The calls with step sizes, and of all walks their low-rank form, (k, b, l, r), its weight, and the step sizes, (k, b, l, d)."""
    assert i.dt_weight is not None
    low, weight = _stacked(calls, "dt", i.dt), _stacked(calls, "dt_weight", i.dt_weight)
    dt = low_rank.step_sizes(low, weight)
    whole = [replace(c, i=c.i._replace(dt=dt[k], dt_weight=None)) for k, c in enumerate(calls)]
    return whole, low, weight, dt


def _stacked(calls: list[ScanOperands], name: str, given: Tensor) -> Tensor:
    """An operand of all walks as one tensor, with an axis of one per walk, as it is read."""
    parts = [getattr(call.i, name) for call in calls]
    if given.dim() == parts[0].dim():
        return parts[0].expand(len(parts), *parts[0].shape)
    return given if given.dtype == parts[0].dtype else torch.stack(parts)

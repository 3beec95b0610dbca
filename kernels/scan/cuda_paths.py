"""The CUDA scan over walks (:mod:`.paths`): a launch per path, all over the same memory, and nothing is gathered or flipped.

Outputs are summed at the tokens, in float32 and in the order of the paths; the last launch gates the sum and rounds it. Gradients of what
paths share are kept per path and then summed in one pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..gpu.operands import in_rows
from . import launches as cuda_backend
from . import low_rank
from .operands import Call
from .paths import per_path


def _varied(operands: tuple, paths: Sequence[int], weight: Tensor | None) -> list[tuple[Any, ...]]:
    _, dt, A, B, C, D, _, dt_bias, state, _ = operands
    return per_path(len(paths) // 5, dt, A, B, C, D, dt_bias, state, weight)


def _calls(operands: tuple, paths: Sequence[int], varied: list[tuple[Any, ...]]) -> list[Call]:
    u, *_, z, _, _, softplus = operands
    calls: list[Call] = []
    for k, (dt_k, A_k, B_k, C_k, D_k, bias_k, state_k, weight_k) in enumerate(varied):
        walk = tuple(paths[5 * k : 5 * k + 5])
        call = Call.of(u, dt_k, A_k, B_k, C_k, D_k, z, bias_k, state_k, None, None, softplus, weight_k, walk)
        # a conversion is made once for all paths
        u, z = call.u, call.z
        calls.append(call)
    return calls


def forward(
    operands: tuple, paths: Sequence[int], save: bool, chunks: int | None = None, dt_weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`.launches.forward`, states with a leading axis of one per path.

    ``operands`` are u, dt, A, B, C, D, z, dt_bias, the initial state and whether dt goes through softplus; ``paths`` five integers
    for each. With a ``dt_weight``, dt is in low-rank form (:mod:`.low_rank`).
    """
    calls = _calls(operands, paths, _varied(operands, paths, dt_weight))
    first = calls[0]
    out = first.u.new_empty(first.u.shape)
    total = out if out.dtype == torch.float32 or len(calls) == 1 else first.A.new_empty(out.shape)
    last = first.last_state(len(calls))
    saved = first.saved_states(len(calls)) if save else None
    for k, call in enumerate(calls):
        call.before = total if k else None
        if k + 1 < len(calls):
            call.sum, call.z = total, None
        cuda_backend.forward(call, save, chunks=chunks, into=(out, last[k], None if saved is None else saved[k]))
    return out, last, saved


def backward(
    operands: tuple,
    paths: Sequence[int],
    gout: Tensor,
    glast: Tensor | None,
    saved: Tensor | None,
    chunks: int | None = None,
    dt_weight: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of the tensors among ``operands`` and of ``dt_weight``, in their order and shapes."""
    varied = _varied(operands, paths, dt_weight)
    calls = _calls(operands, paths, varied)
    gout = in_rows(gout, calls[0].u.dtype)
    # of step sizes in low-rank form, the gradient of one path at a time is in memory
    one = None if dt_weight is None else gout.new_empty(calls[0].u.shape)
    gu, gdt, gB, gC, gz = planes = calls[0].gradients(len(calls), gdt=one)
    each: list[Any] = []
    forms: list[tuple[Tensor, Tensor]] = []
    for k, call in enumerate(calls):
        into: Any = tuple(g if g is None or g is one else g[k] for g in planes)
        glast_k, saved_k = (None if x is None else x[k] for x in (glast, saved))
        each.append(cuda_backend.backward(call, gout, glast_k, saved_k, chunks=chunks, into=into))
        if one is not None:
            forms.append(low_rank.gradients(one, varied[k][0], varied[k][-1]))
    gA, gD, gbias, ginit = (None if each[0][i] is None else torch.stack([g[i] for g in each]) for i in (2, 5, 7, 8))
    gweight = None
    if forms:
        gdt, gweight = (torch.stack(x) for x in zip(*forms, strict=True))
    pairs = zip((gu, gdt, gA, gB, gC, gD, gz, gbias, ginit, gweight), (*operands[:9], dt_weight), strict=True)
    return [None if x is None or g is None else g.sum(0) if g.dim() > x.dim() else g for g, x in pairs]

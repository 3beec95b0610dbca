"""The CUDA scan over walks (:mod:`.paths`): a launch per path, all over the same memory, and nothing is gathered or flipped.

Outputs are summed at the tokens, in float32 and in the order of the paths; the last launch gates the sum and rounds it. Gradients of what
paths share are kept per path and then summed in one pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cuda_backend
from .cuda_backend import Call
from .paths import per_path


def _calls(operands: tuple, paths: Sequence[int]) -> list[Call]:
    u, dt, A, B, C, D, z, dt_bias, state, softplus = operands
    calls: list[Call] = []
    for k, (dt_k, A_k, B_k, C_k, D_k, bias_k, state_k) in enumerate(
        per_path(len(paths) // 5, dt, A, B, C, D, dt_bias, state)
    ):
        call = Call.of(u, dt_k, A_k, B_k, C_k, D_k, z, bias_k, state_k, None, None, softplus)
        # a conversion is made once for all paths
        u, z = call.u, call.z
        call.walk = tuple(paths[5 * k : 5 * k + 5])
        calls.append(call)
    return calls


def forward(
    operands: tuple, paths: Sequence[int], save: bool, chunks: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`.cuda_backend.forward`, states with a leading axis of one per path.

    ``operands`` are u, dt, A, B, C, D, z, dt_bias, the initial state and whether dt goes through softplus; ``paths`` five integers
    for each.
    """
    calls = _calls(operands, paths)
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
) -> list[Tensor | None]:
    """Gradients of the tensors among ``operands``, in their order and shapes."""
    calls = _calls(operands, paths)
    gout = cuda_backend.in_rows(gout, calls[0].u.dtype)
    gu, gdt, gB, gC, gz = planes = calls[0].gradients(len(calls))
    each: list[Any] = []
    for k, call in enumerate(calls):
        into: Any = tuple(None if g is None else g[k] for g in planes)
        glast_k, saved_k = (None if x is None else x[k] for x in (glast, saved))
        each.append(cuda_backend.backward(call, gout, glast_k, saved_k, chunks=chunks, into=into))
    gA, gD, gbias, ginit = (None if each[0][i] is None else torch.stack([g[i] for g in each]) for i in (2, 5, 7, 8))
    pairs = zip((gu, gdt, gA, gB, gC, gD, gz, gbias, ginit), operands, strict=False)
    return [None if x is None or g is None else g.sum(0) if g.dim() > x.dim() else g for g, x in pairs]

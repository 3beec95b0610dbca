"""The public op: what it means, what it accepts, and which backend answers."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import CHUNKED, KERNELS, LOOP, Backend, choose, facts_of, register
from ..gpu import launch_plans
from ..seq import Seq, clear_padding, marks_of
from . import chunked, cuda, cuda_backward, library, reference
from .inputs import SsdInputs, SsdOptions

register(
    "ssd",
    Backend("cuda", KERNELS, cuda_backward.refuse, cuda_backward.ssd),
    Backend("mamba_ssm", "mamba_ssm's Triton SSD", library.refuse, library.ssd, reserve=library.reserve),
    Backend("chunked", CHUNKED, run=chunked.ssd),
    Backend("reference", LOOP, run=reference.ssd, plain=True),
)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    seq: Seq | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Any:
    """Mamba-2's scan (arXiv:2405.21060): :func:`selective_scan` with one decay rate per head, in matrix products.

    Args:
        x: ``(b, l, h, p)``, the input.
        dt: ``(b, l, h)``, step sizes before bias, softplus and limits.
        A: ``(h,)``, decay rates, negative.
        B: ``(b, l, g, n)``; head i belongs to group ``i // (h / g)``.
        C: As B.
        D: ``(h,)`` or ``(h, p)``, the skip.
        z: ``(b, l, h, p)``, the gate: the output is multiplied by ``silu(z)``.
        dt_bias: ``(h,)``, added to ``dt``.
        dt_softplus: Pass the biased ``dt`` through softplus.
        dt_limit: Step sizes are clamped to this range after softplus.
        chunk_size: Tokens per matrix product; changes speed and memory, not the result.
        initial_state: ``(b, h, p, n)``, what an earlier call left; zeros if absent. Differentiable.
        seq: Documents and padding, as for :func:`selective_scan`.
        return_final_state: Also return the state after each row's last real token. Differentiable.
        backend: As for :func:`selective_scan`.

    Returns:
        ``(b, l, h, p)`` in x's dtype, or that and the state ``(b, h, p, n)``. Values at padding mean nothing.

    Raises:
        ValueError: Shapes, dtypes, devices, limits or the chunk size do not fit.
        BackendError: The backend asked for cannot do this call.
    """
    where, given = "ssd", SsdInputs(x, dt, A, B, C, D, z, dt_bias, initial_state)
    lo, hi = dt_limit
    options = SsdOptions(dt_softplus, float(lo), float(hi), chunk_size)
    grad = torch.is_grad_enabled() and any([m is not None and m.requires_grad for m in given])
    # of such a call, one that looks the same has been checked, and its launches are planned
    plan = launch_plans.find(where, given, options, backend, grad) if seq is None else None
    if plan is not None:
        out, state = cuda_backward.ssd(given, options, plan)
        return (out, state) if return_final_state else out
    _check(where, given, options)
    checks.fits(where, seq, x)
    x, dt, B, C, z = clear_padding(seq, x, dt, B, C, z)
    leaves = (dt, A, B, C, dt_bias, initial_state)
    facts = facts_of(x, initial_state, seq, return_final_state, *leaves, d_state=B.shape[3], grad=grad)
    chosen = choose(where, backend=backend if x.shape[1] else "reference", **facts)
    i = SsdInputs(x, dt, A, B, C, D, z, dt_bias, initial_state, *marks_of(seq))
    out, state = chosen.run(i, options)
    plan = cuda.known(given, options) if chosen.name == "cuda" and seq is None else None
    if plan is not None:
        launch_plans.keep(where, given, lambda: (given, plan), options, backend, grad)
    (out,) = clear_padding(seq, out)
    return (out, state) if return_final_state else out


def _check(where: str, i: SsdInputs, options: SsdOptions) -> None:
    x, D = i.x, i.D
    checks.floating(where, "x", x, 4, "(b, l, h, p)")
    b, l, h, p = x.shape
    checks.floating(where, "B", i.B, 4, "(b, l, g, n)")
    g, n = i.B.shape[2:]
    checks.groups(where, h, g, "h")
    checks.shape(where, "dt", i.dt, (b, l, h), "(b, l, h)")
    checks.shape(where, "A", i.A, (h,), "(h,)")
    checks.shape(where, "B", i.B, (b, l, g, n), "(b, l, g, n)")
    checks.shape(where, "C", i.C, (b, l, g, n), "(b, l, g, n) like B")
    if D is not None and D.dim() != 2:
        checks.shape(where, "D", D, (h,), "(h,), or (h, p)")
    elif D is not None:
        checks.shape(where, "D", D, (h, p), "(h, p), or (h,)")
    checks.shape(where, "z", i.z, (b, l, h, p), "(b, l, h, p) like x")
    checks.shape(where, "dt_bias", i.dt_bias, (h,), "(h,)")
    checks.shape(where, "initial_state", i.initial_state, (b, h, p, n), "(b, h, p, n)")
    checks.floats(where, **i._asdict())
    checks.same_device(where, "x", **i._asdict())
    lo, hi = options.dt_limit
    if not 0 <= lo <= hi:
        raise ValueError(f"{where}: dt_limit is ({lo}, {hi}), expected 0 <= lower <= upper.")
    if options.chunk < 1:
        raise ValueError(f"{where}: chunk_size is {options.chunk}, expected at least 1.")

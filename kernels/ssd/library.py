"""mamba-ssm behind our signature of SSD."""

import importlib

import torch
from torch import Tensor

from ..dispatch import FLOATS, Facts, refuse_library
from ..numerics import _full, _half, step_sizes


def refuse(facts: Facts) -> str | None:
    """Say why mamba_ssm cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    reason = refuse_library("mamba_ssm", facts, FLOATS)
    if reason is not None:
        return reason
    if facts.get("initial_state") and facts.get("packed"):
        return "mamba_ssm takes an initial state or packed documents, not both"
    if facts.get("dtype", torch.float32) == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "mamba_ssm rounds float32 matrices to TF32, which torch.backends.cuda.matmul.allow_tf32 rules out"
    return None


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
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """:func:`.reference.ssd` by mamba_ssm's ``mamba_chunk_scan_combined``."""
    combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    # it cannot skip padding after softplus, so the step sizes are made here
    dt = step_sizes(dt.float(), dt_bias, dt_softplus, valid, dt_limit)
    # its tiles are powers of two, and the size changes no result
    chunk_size = max(16, 1 << (chunk_size - 1).bit_length())
    # padding continues the last document: its zero steps leave the state alone
    documents = None if reset is None else reset.cumsum(1).to(torch.int32)
    B, C, gate = B.to(x.dtype), C.to(x.dtype), _half(z, x)
    return combined(
        x,
        dt,
        A.float(),
        B,
        C,
        chunk_size,
        D=_full(D),
        z=gate,
        initial_states=_full(initial_state),
        seq_idx=documents,
        return_final_states=True,
    )

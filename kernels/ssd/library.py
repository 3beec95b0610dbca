"""mamba-ssm behind our signature of SSD."""

import importlib

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import FLOATS, Facts, refuse_library
from ..numerics import cast, step_sizes
from .inputs import SsdInputs, SsdOptions


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


def reserve(facts: Facts) -> str | None:
    """Say why mamba_ssm is taken only where it is asked for, or ``None``; see :class:`.dispatch.Backend`."""
    if not dispatch.installed["mamba_ssm"] or not facts.get("packed"):
        return None
    # seen on an H200 with mamba-ssm 2.3.2: NaN in one document of a row came out in others, and gradients of a recorded step of packed rows
    # were not those of the eager one to the bit
    return "mamba_ssm lets what is not finite in a packed document reach the others, and is taken where it is asked for"


def ssd(i: SsdInputs, options: SsdOptions) -> tuple[Tensor, Tensor]:
    """:func:`.reference.ssd` by mamba_ssm's ``mamba_chunk_scan_combined``."""
    combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    # it cannot skip padding after softplus, so the step sizes are made here
    dt = step_sizes(i.dt.float(), i.dt_bias, options.dt_softplus, i.valid, options.dt_limit)
    return combined(
        i.x,
        dt,
        i.A.float(),
        i.B.to(i.x.dtype),
        i.C.to(i.x.dtype),
        # its tiles are powers of two, and the size changes no result
        max(16, 1 << (options.chunk - 1).bit_length()),
        D=cast(i.D, torch.float32),
        z=cast(i.z, i.x.dtype),
        initial_states=cast(i.initial_state, torch.float32),
        # padding continues the last document: its zero steps leave the state alone
        seq_idx=None if i.reset is None else i.reset.cumsum(1).to(torch.int32),
        return_final_states=True,
    )

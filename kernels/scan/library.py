"""mamba-ssm behind our signature of the selective scan: version 2.3, channels first where ours are channels last."""

import importlib

import torch
from torch import Tensor

from ..dispatch import FLOATS, Facts, refuse_library
from ..numerics import cast
from .inputs import ScanInputs


def refuse(facts: Facts) -> str | None:
    """Say why mamba_ssm cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    reason = refuse_library("mamba_ssm", facts, FLOATS)
    if reason is not None:
        return reason
    for fact, name in (("initial_state", "initial state"), ("packed", "packing"), ("padded", "padding")):
        if facts.get(fact):
            return f"mamba_ssm has no {name} in its selective scan"
    if facts.get("final_state_grad"):
        return "mamba_ssm drops the gradient of the final state"
    n = facts.get("d_state", 16)
    return f"mamba_ssm scans up to d_state = 256, got {n}" if n > 256 else None


def selective_scan(i: ScanInputs, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """:func:`.reference.selective_scan` by mamba_ssm, which has no initial state, packing or padding."""
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    u, dt, z = (None if m is None else m.to(i.u.dtype).transpose(1, 2) for m in (i.u, i.dt, i.z))
    B, C = (m.to(i.u.dtype).permute(0, 2, 3, 1).contiguous() for m in (i.B, i.C))
    A, D, dt_bias = (cast(m, torch.float32) for m in (i.A, i.D, i.dt_bias))
    out, last = scan(u, dt, A, B, C, D, z, dt_bias, dt_softplus, return_last_state=True)
    return out.transpose(1, 2), last

"""Optional libraries behind our signatures; :mod:`.dispatch` only sends calls here that they can do.

mamba-ssm 2.3 and causal-conv1d 1.7, channels first where ours are channels last.
"""

import importlib

from torch import Tensor

from ..numerics import _full


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: None,
    reset: None,
    valid: None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`.reference.selective_scan` by mamba_ssm, which has no initial state, packing or padding."""
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    wide = [None if m is None else m.to(u.dtype).transpose(1, 2) for m in (u, dt, z)]
    narrow = [m.to(u.dtype).permute(0, 2, 3, 1).contiguous() for m in (B, C)]
    out, last = scan(
        wide[0], wide[1], A.float(), *narrow, _full(D), wide[2], _full(dt_bias), dt_softplus, return_last_state=True
    )
    return out.transpose(1, 2), last

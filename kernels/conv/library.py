"""causal-conv1d behind our signature of the convolution."""

import importlib

import torch
from torch import Tensor

from ..dispatch import FLOATS, Facts, refuse_library
from ..numerics import cast
from .inputs import ConvInputs


def refuse(facts: Facts) -> str | None:
    """Say why the library cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    reason = refuse_library("causal_conv1d", facts, FLOATS)
    if reason is not None:
        return reason
    width, d = facts.get("width", 4), facts.get("d", 8)
    if not 2 <= width <= 4:
        return f"causal_conv1d takes widths 2 to 4, got {width}"
    if d % 8:
        return f"causal_conv1d needs a multiple of 8 channels, got {d}"
    if facts.get("initial_state") and facts.get("packed"):
        return "causal_conv1d takes an initial state or packed documents, not both"
    return None


def causal_conv1d(i: ConvInputs, silu: bool) -> Tensor:
    """:func:`.reference.causal_conv1d` by the causal_conv1d library."""
    conv, dtype = importlib.import_module("causal_conv1d").causal_conv1d_fn, i.x.dtype
    state = None if i.initial_state is None else i.initial_state.to(dtype).contiguous().transpose(1, 2)
    return conv(
        i.x.contiguous().transpose(1, 2),
        i.weight.to(dtype),
        cast(i.bias, dtype),
        seq_idx=None if i.doc is None else i.doc.to(torch.int32).contiguous(),
        initial_states=state,
        activation="silu" if silu else None,
    ).transpose(1, 2)

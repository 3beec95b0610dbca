"""causal-conv1d behind our signature of the convolution."""

import importlib

import torch
from torch import Tensor

from ..dispatch import FLOATS, Facts, refuse_library
from ..numerics import _half


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


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, doc: Tensor | None, silu: bool
) -> Tensor:
    """:func:`.reference.causal_conv1d` by the causal_conv1d library."""
    conv = importlib.import_module("causal_conv1d").causal_conv1d_fn
    before = None if initial_state is None else initial_state.to(x.dtype).contiguous().transpose(1, 2)
    documents = None if doc is None else doc.to(torch.int32).contiguous()
    return conv(
        x.contiguous().transpose(1, 2),
        weight.to(x.dtype),
        _half(bias, x),
        seq_idx=documents,
        initial_states=before,
        activation="silu" if silu else None,
    ).transpose(1, 2)

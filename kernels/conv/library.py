"""causal-conv1d behind our signature of the convolution."""

import importlib

import torch
from torch import Tensor

from ..numerics import _half


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

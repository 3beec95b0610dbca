"""Layers as one node of autograd on a GPU: where tensors are plain, a gradient is wanted, and our kernels can do all of it.

Nobody then calls its parts as modules: an adapter, a hook, or another module in a part's place has them called one by one.
"""

import functools
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.dispatch import ENV, BackendError, choose
from ..kernels.gpu.operands import eager
from ..kernels.layer_node import Again
from ..kernels.torch_private import saved_tensors_are_handled
from .common import dtype_read, hooked_everywhere, why_called
from .recompute import left_alone, recipe

__all__ = ["again", "may_be", "may_be_asked", "ours", "why_parts_are_called"]


def may_be_asked(x: Tensor) -> bool:
    """Return whether rows ``(b, l, d)`` could be a node's input at all: autograd keeps something, and nobody else decides what."""
    return not left_alone() and x.dim() == 3 and x.numel() > 0


def may_be(op: str, x: Tensor, weights: Iterable[Tensor | None], read: Iterable[Tensor], **facts: Any) -> bool:
    """Return whether a layer may be one node: plain tensors on one device, to be differentiated, whose op our kernels do.

    Args:
        op: ``"mamba_layer"`` or ``"mamba2_layer"``.
        x: Its input.
        weights: Its parameters.
        read: The matrices among them, which have to be of one type, as far as autocast does not make them so.
        facts: About the call, for :func:`.dispatch.choose`.
    """
    device, wanted = x.device, x.requires_grad
    for p in weights:
        if p is not None:
            if not eager(p) or p.device != device:
                return False
            wanted |= p.requires_grad
    each = {m.dtype: m for m in (x, *read)}
    dtype, *others = {dtype_read(m) for m in each.values()}
    if not wanted or not eager(x) or others:
        return False
    return ours(op, device, dtype, os.environ.get(ENV), **facts)


@functools.lru_cache(maxsize=256)
def ours(op: str, device: torch.device, dtype: torch.dtype, wish: str | None, **facts: Any) -> bool:
    """Return whether our kernels do a layer; ``wish`` is what dispatch reads in the environment: asking it takes as long as a product."""
    try:
        return choose(op, device=device.type, dtype=dtype, **facts).name == "cuda"
    except BackendError:
        # what was asked for cannot be: the parts say which of them, and why
        return False


def why_parts_are_called(layer: nn.Module, kinds: dict[str, type[nn.Module]]) -> str | None:
    """Say why a layer's parts have to be called as modules: they are not what they were, ``kinds``, or have hooks; ``None`` if not."""
    if hooked_everywhere():
        return "there are hooks on all modules"
    for name, kind in kinds.items():
        why = why_called(getattr(layer, name), kind)
        if why is not None:
            return f"{name} {why}"
    return None


def again(x: Tensor) -> Again | None:
    """The way to form a node's input for its backward, if it need not be kept."""
    found = None if saved_tensors_are_handled() else recipe(x)
    return None if found is None else found.parts()

"""Attention of one token, or a few, in a launch or two, where nothing but an attention layer's options decides about it."""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from ..kernels import BackendError, HeadNorm, read_attention, step_attention
from ..kernels.dispatch import ENV, TABLES, choose
from ..kernels.gpu.operands import eager
from .common import acc_dtype, autocasts, hooked_everywhere, is_captured, why_called
from .kv import AttentionState
from .norm import RMSNorm
from .rope import frequencies

__all__ = ["attend_token", "attend_tokens", "why_not_at_once"]


def attend_token(layer: Any, qkv: Tensor, state: AttentionState) -> Tensor | None:
    """Attend from one projected token per row, ``(b, d_qkv)`` to ``(b, h * p)``, keeping its key and value; there is room for them.

    ``None``, and nothing done, where the layer's parts have to be called, gradients are asked for, or the kernel does not pay.
    """
    if why_not_at_once(layer, qkv) is not None or autocasts(qkv):
        return None
    grad = torch.is_grad_enabled() and (qkv.requires_grad or state.k.requires_grad)
    if grad or not eager(qkv):
        return None
    caches = state.k, state.v, state.pos, state.length
    return step_attention(qkv, *caches, window=layer.window, **_how(layer, qkv))


def attend_tokens(layer: Any, qkv: Tensor, state: AttentionState, counts: Tensor) -> Tensor:
    """Attend from the first ``counts``, ``(b,)`` int64, of a few projected tokens per row, ``(b, w, d_qkv)`` to ``(b, w, h * p)``.

    Their keys and values are in their slots then; that the rows are longer, the state does not know yet. It has no window.
    """
    return read_attention(qkv, state.k, state.v, state.length, counts, **_how(layer, qkv))


def why_not_at_once(layer: Any, x: Tensor) -> str | None:
    """Say why tokens of the type and on the device of ``x`` go through a layer's parts one by one; ``None`` if they need not."""
    if not _pays(x.device.type, x.dtype, layer.headdim, os.environ.get(ENV)):
        return "the kernel of a few tokens' attention cannot, or is not asked for"
    norms = _norms(layer)
    if any(why_called(m, RMSNorm) for m in norms) or (norms and hooked_everywhere()):
        return "the norms of queries and keys have to be called"
    return None


def _norms(layer: Any) -> list[Any]:
    return [m for m in (layer.q_norm, layer.k_norm) if m is not None]


def _how(layer: Any, qkv: Tensor) -> dict[str, Any]:
    norms = _norms(layer)
    frequency = None if layer.rope is None else _frequencies(qkv, layer.rope, layer.rotary_dim, layer.rope_scaling)
    return {
        "nheads": layer.nheads,
        "scale": layer.softmax_scale,
        "interleaved": layer.rope_interleaved,
        "frequency": frequency,
        "key_multiplier": layer.key_multiplier,
        "norm": HeadNorm(norms[0].eps, norms[0].weight, norms[1].weight) if norms else None,
    }


@functools.lru_cache(maxsize=256)
def _pays(device: str, dtype: torch.dtype, headdim: int, wish: str | None) -> bool:
    # who asks for a backend of attention's own means this one, too
    if wish in TABLES["attention"]:
        return False
    try:
        return wish == "torch" or choose("step_attention", device=device, dtype=dtype, headdim=headdim).name == "cuda"
    except BackendError:
        return False  # our kernels are asked for, and not for this one: the layer's own operations


_kept: dict[tuple, Tensor] = {}


def _frequencies(x: Tensor, theta: float, dim: int, scaling: tuple[float, ...] | None) -> Tensor:
    """The frequencies of a rotation; formed once, for who records a step, too: a few hundred bytes that stay where they are."""
    key = (x.device, acc_dtype(x.dtype), theta, dim, scaling)
    found = _kept.get(key)
    if found is None:
        found = frequencies(theta, dim, scaling, acc_dtype(x.dtype), x.device)
        # what is formed while a graph is recorded is there only when it runs
        if not is_captured(x):
            _kept[key] = found
    return found

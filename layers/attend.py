"""Backends of attention: who sums values by their scaled dot products, and why not the others.

``sdpa`` and ``math`` are PyTorch's scaled dot product (:func:`dot_product`), which :class:`.attention.Attention` calls itself, with a mask
where one is needed.
The others read rows as they are, documents by their offsets and a window by its width: a whole batch is one launch, whatever is packed in
it, and nobody asks the device where documents start. They are told by a span which keys a query sees: how many before it and how many
behind it, -1 for all of its document, so that ``(-1, 0)`` is plain causality and ``(-1, -1)`` none.
"""

import functools
import importlib
import inspect
import os
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import contain, dispatch
from ..kernels.derivatives import ENV, plain, refused_after, refused_beyond
from ..kernels.dispatch import Backend, Facts, refuse_library, register
from ..kernels.numerics import HALVES
from ..kernels.seq import Seq
from ..kernels.torch_private import constant_when_compiled
from .common import is_captured

Span = tuple[int, int]

# tokens of a row from which on flash-attn 4 was measured to pay: with 64 channels per head or more, and within a window
_LONG, _WIDE, _LONG_WINDOWED = 4096, 64, 2048
# queries that are worth a look at where they stand
_MANY = 256


def dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | bool, scale: float | None, backend: str | None = None
) -> Tensor:
    """Sum ``v`` (b, lk, h_kv, p) by the scaled dot products of ``q`` (b, lq, h, p) and ``k``, to (b, lq, h * p).

    ``mask`` is true where a query sees a key, ([b,] lq, lk); or says whether none sees a later one, from the first or the last ones on.
    """
    math = plain() or (backend or os.environ.get(ENV)) == "math"
    # the fused kernels have first derivatives only, and none in forward mode
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if isinstance(mask, bool):
        options["is_causal"] = mask
    else:
        # torch's bias has no heads, and is known by this alone without an import of its compiler
        options["attn_mask"] = mask if hasattr(mask, "variant") else mask.unsqueeze(-3)
    with sdpa_kernel(SDPBackend.MATH) if math else nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, **options)
    if torch.is_grad_enabled() and not math and not torch.compiler.is_compiling():
        y = refused_beyond("attention", y)
    return y.transpose(1, 2).flatten(-2)


def follow(q: Tensor, pos: Tensor, past: int) -> bool:
    """Tell whether the queries of all rows, at ``pos`` (b, lq), stand right behind as many keys: then no mask is needed.

    It asks the device, and so only where that is little beside what is read, and nothing is differentiated or traced.
    """
    if not _is_much(q) or q.requires_grad or plain() or torch.compiler.is_compiling() or is_captured(q):
        return False
    return bool((pos[:, 0] == past).all())


def behind(q: Tensor, k: Tensor) -> Tensor:
    """The mask of queries that are the last ones of as many tokens as there are keys; nothing is allocated for it."""
    # it brings torch's compiler along
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(q.shape[1], k.shape[1])


def _is_much(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in HALVES and q.shape[1] >= _MANY


def _refuse_rows(name: str, facts: Facts) -> str | None:
    """Say what none of the kernels that read offsets can do."""
    headdim = facts.get("headdim", 64)
    if headdim > 256:
        return f"{name} takes headdim up to 256, got {headdim}"
    if headdim % 8:
        return f"{name} takes multiples of 8 as headdim, got {headdim}"
    if facts.get("masked"):
        return f"{name} takes no mask, which a carried state needs"
    if facts.get("packed") and not facts.get("counted", True):
        return f"{name} needs the offsets of documents, and only the device knows them (Seq.from_documents(most=...))"
    return None


def _refuse_flash(facts: Facts) -> str | None:
    return refuse_library("flash_attn", facts, HALVES) or _refuse_rows("flash_attn", facts)


def _refuse_flash_4(facts: Facts) -> str | None:
    reason = refuse_library("flash_attn_4", facts, HALVES) or _refuse_rows("flash_attn_4", facts)
    if reason is not None:
        return reason
    # without a GPU the question is what one would take
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    headdim, most = facts.get("headdim", 64), 256 if major == 9 else 128
    if headdim % 32:
        return (
            f"flash_attn_4 was measured to leave channels out of a headdim that is no multiple of 32, such as {headdim}"
        )
    if major < 9:
        return f"flash_attn_4 differentiates on compute capability 9.0 and later, this is {major}.{minor}"
    if headdim > most:
        return f"flash_attn_4 takes headdim up to {most} on compute capability {major}.{minor}, got {headdim}"
    return None


def _reserve_flash(facts: Facts) -> str | None:
    if not dispatch.installed["flash_attn"]:
        return None
    return "flash_attn is of the same generation as torch's own kernel, and is taken where it is asked for"


def _reserve_flash_4(facts: Facts) -> str | None:
    # measured on an H200 (eval/results/attention-h200.json), forward and with the backward, at (b, l, h, p): against sdpa 1.11x, 1.26x at
    # (4, 4096, 16, 64), 1.13x and 1.12x at (4, 4096, 32, 128), 8 heads of keys, 1.19x and 1.18x at (1, 32768, 32, 128), 0.92x and 1.03x at
    # (16, 1024, 32, 128), 1.04x and 0.99x at (8, 2048, 12, 64); within windows, against varlen, 1.07x and 1.24x at (8, 2048, 12, 64), 2.7x
    # and 2.1x at (4, 4096, 16, 64), 2.2x and 1.9x at (4, 8192, 32, 128)
    headdim, length = facts.get("headdim", 64), facts.get("length", 0)
    if not dispatch.installed["flash_attn_4"]:
        return None
    if facts.get("packed"):
        return "flash_attn_4 was measured to pay on rows of one document alone, and is taken for others where it is asked for"
    if not facts.get("causal", True):
        return "flash_attn_4 was measured to pay on causal attention alone, and is taken for other kinds where it is asked for"
    if facts.get("window"):
        if length >= _LONG_WINDOWED:
            return None
        return f"flash_attn_4 was measured to pay within a window from {_LONG_WINDOWED} tokens on, here {length}"
    if headdim < _WIDE or length < _LONG:
        return (
            f"flash_attn_4 was measured to pay from headdim {_WIDE} and {_LONG} tokens on, here {headdim} and {length}"
        )
    return None


def _refuse_varlen(facts: Facts) -> str | None:
    device, dtype = facts.get("device", "cpu"), facts.get("dtype", torch.float32)
    if device != "cuda":
        return f"varlen needs CUDA tensors, got {device}"
    if dtype not in HALVES:
        return f"varlen takes float16, bfloat16, got {str(dtype).removeprefix('torch.')}"
    if not facts.get("packed") and not facts.get("window"):
        return "varlen is for packed rows and windows; others need no offsets"
    if (reason := _refuse_rows("varlen", facts)) is not None:
        return reason
    return None if _has_flash() else "varlen calls flash attention, without which this torch was built"


@constant_when_compiled
def _has_flash() -> bool:
    return torch.backends.cuda.is_flash_attention_available()


@constant_when_compiled
def _takes_groups() -> bool:
    """Tell whether torch's function wants to be told that heads are grouped: 2.11 takes them as they are."""
    return _names_groups()


@functools.cache
def _names_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _flat(q: Tensor, seq: Seq | None) -> tuple[Tensor, int]:
    """Offsets of the documents in all rows of q (b, l, h, p), one after the other, and a bound of their length."""
    b, l = q.shape[:2]
    if seq is None or not seq.packed:
        starts = torch.arange(0, (b + 1) * l, l, device=q.device)
        if seq is not None:
            # a row's document, and its padding as one more
            starts = F.pad(torch.stack([starts[:-1], starts[:-1] + seq.lengths], 1).flatten(), (0, 1), value=b * l)
        return starts.to(torch.int32), l
    assert seq.offsets is not None
    return seq.offsets, l if seq.longest is None else seq.longest


def _varlen(q: Tensor, k: Tensor, v: Tensor, seq: Seq | None, scale: float | None, span: Span) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    (offsets, longest), shape = _flat(q, seq), q.shape[:2]
    options: dict[str, Any] = {"scale": scale, "window_size": span}
    if q.shape[2] != k.shape[2] and _takes_groups():
        options["enable_gqa"] = True
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return _once(varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)).unflatten(0, shape)


def _flash(library: Any, q: Tensor, k: Tensor, v: Tensor, seq: Seq | None, scale: float | None, span: Span) -> Tensor:
    """Call either generation of flash-attn: the arguments that are passed have the same names in both."""
    # which leaves nothing to say of a window that has no end
    size = (-1, -1) if span == (-1, 0) else span
    options: dict[str, Any] = {"softmax_scale": scale, "causal": span[1] == 0, "window_size": size}
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    if seq is None:
        return _once(library.flash_attn_func(q, k, v, **options))
    (offsets, longest), shape = _flat(q, seq), q.shape[:2]
    options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return _once(library.flash_attn_varlen_func(q, k, v, **options)).unflatten(0, shape)


def _flash_2(q: Tensor, k: Tensor, v: Tensor, seq: Seq | None, scale: float | None, span: Span) -> Tensor:
    return _flash(importlib.import_module("flash_attn"), q, k, v, seq, scale, span)


def _flash_4(q: Tensor, k: Tensor, v: Tensor, seq: Seq | None, scale: float | None, span: Span) -> Tensor:
    library = importlib.import_module("flash_attn.cute")
    if seq is None:
        return _flash(library, q, k, v, seq, scale, span)
    # its tiles reach over the end of a document, and what stands there is multiplied by zero
    q, k, v, mark = contain.enter_attention(q, k, v, seq, span)
    y = _flash(library, q, k, v, seq, scale, span)
    return contain.leave_attention(y.flatten(2), mark).view_as(y)


def _once(y: Tensor | tuple) -> Tensor:
    """The output without what stands beside it, whose gradient refuses to be differentiated."""
    y = y[0] if isinstance(y, tuple) else y
    return y if torch.compiler.is_compiling() else refused_after("attention", y)


register(
    "attention",
    Backend(
        "flash_attn_4",
        "flash-attn 4's kernels, compiled at first use",
        _refuse_flash_4,
        _flash_4,
        reserve=_reserve_flash_4,
    ),
    Backend("flash_attn", "flash-attn 2's CUDA kernel", _refuse_flash, _flash_2, reserve=_reserve_flash),
    Backend("varlen", "torch's varlen_attn, documents by their offsets", _refuse_varlen, _varlen),
    Backend("sdpa", "torch's scaled_dot_product_attention"),
    Backend("math", "the same in matrix products and a softmax", plain=True),
)

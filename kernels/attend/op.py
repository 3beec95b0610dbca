"""Attention over a cache: all that stands between the projections of an attention layer, when it decodes or checks guesses."""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import KERNELS, Backend, choose_able, register
from . import cuda, plain
from .inputs import HeadNorm, ReadAttention, StepAttention

register(
    "step_attention",
    Backend("cuda", KERNELS, cuda.refuse, cuda.step_attention),
    Backend("torch", "PyTorch operations", run=plain.step_attention, plain=True),
)
register(
    "read_attention",
    Backend("cuda", KERNELS, cuda.refuse, cuda.read_attention),
    Backend("torch", "PyTorch operations", run=plain.read_attention, plain=True),
)


def step_attention(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    length: Tensor,
    *,
    nheads: int,
    scale: float | None = None,
    window: int | None = None,
    frequency: Tensor | None = None,
    interleaved: bool = False,
    key_multiplier: float = 1.0,
    norm: HeadNorm | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of one token per row: its key and value go into the cache, and it sums up the values that it sees.

    Args:
        qkv: ``(b, (h + 2 h_kv) p)``, query, key and value heads.
        k: ``(b, cap, h_kv, p)``, keys by slots, position ``i`` in slot ``i % cap``; updated in place, as the next three are.
        v: ``(b, cap, h_kv, p)``.
        pos: ``(b, cap)`` int64, the position in each slot, -1 where it is empty.
        length: ``(b,)`` int64, tokens before this one; one more behind.
        nheads: Query heads, ``h``.
        scale: Factor of the scores; ``p ** -0.5`` by default.
        window: Tokens that are seen, this one included; all by default.
        frequency: ``(rotary_dim / 2,)``, by which angles of the first ``rotary_dim`` channels grow with the position; ``None`` for no
            rotation.
        interleaved: Channels ``(2i, 2i + 1)`` form a pair, instead of ``(i, i + rotary_dim / 2)``.
        key_multiplier: Factor of the keys.
        norm: RMS norms of query and key heads.
        backend: ``"cuda"`` or ``"torch"``; chosen automatically if absent.

    Returns:
        ``(b, h p)`` in qkv's dtype.

    Raises:
        ValueError: Shapes do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    i = StepAttention(
        qkv, k, v, pos, length, nheads, scale, window, frequency, interleaved, key_multiplier, norm
    )  # fmt: skip
    where = "step_attention"
    b, cap = _check(where, i, (), "")
    checks.shape(where, "pos", pos, (b, cap), "(b, cap)")
    _integers(where, pos=pos, length=length)
    return _run(where, i, backend)


def read_attention(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    counts: Tensor,
    *,
    nheads: int,
    scale: float | None = None,
    frequency: Tensor | None = None,
    interleaved: bool = False,
    key_multiplier: float = 1.0,
    norm: HeadNorm | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of a few tokens per row: their keys and values go into the cache, and each sums up the values up to its own.

    Token ``i`` of a row stands at position ``length + i``, in the slot of that number, and sees the slots up to it.  A token behind the
    last slot sees all of them and leaves nothing.  A value that is not finite reaches the row's earlier tokens, too, as zero times it.

    Args:
        qkv: ``(b, w, (h + 2 h_kv) p)``, query, key and value heads.
        k: ``(b, cap, h_kv, p)``, keys by positions; updated in place, as the next is.  What stands behind a row's tokens is not read.
        v: ``(b, cap, h_kv, p)``.
        length: ``(b,)`` int64, tokens before these; left as it is.
        counts: ``(b,)`` int64, tokens of each row, 0 to ``w``; those behind are padding.
        nheads: Query heads, ``h``.
        scale: Factor of the scores; ``p ** -0.5`` by default.
        frequency: ``(rotary_dim / 2,)``; as in :func:`step_attention`, as the next three are.
        interleaved: Channels ``(2i, 2i + 1)`` form a pair.
        key_multiplier: Factor of the keys.
        norm: RMS norms of query and key heads.
        backend: ``"cuda"`` or ``"torch"``; chosen automatically if absent.

    Returns:
        ``(b, w, h p)`` in qkv's dtype; at padding, numbers without a meaning.

    Raises:
        ValueError: Shapes do not fit together, or there is no token or no slot.
        BackendError: The backend asked for cannot do this call.
    """
    i = ReadAttention(qkv, k, v, length, counts, nheads, scale, frequency, interleaved, key_multiplier, norm)
    where = "read_attention"
    checks.floating(where, "qkv", qkv, 3, "(b, w, (h + 2 h_kv) p)")
    w = qkv.shape[1]
    b, cap = _check(where, i, (w,), "w, ")
    checks.shape(where, "counts", counts, (b,), "(b,)")
    _integers(where, length=length, counts=counts)
    if not w or not cap:
        raise ValueError(f"{where}: qkv has w = {w} tokens and k has cap = {cap} slots, expected one of each at least.")
    return _run(where, i, backend)


def _run(where: str, i: StepAttention | ReadAttention, backend: str | None) -> Tensor:
    grad = torch.is_grad_enabled() and any(m.requires_grad for m in (i.qkv, i.k, i.v))
    facts: dict[str, Any] = {"device": i.qkv.device.type, "dtype": i.qkv.dtype, "headdim": i.k.shape[-1], "grad": grad}
    # asked last: what is traced has no addresses
    facts["misfit"] = functools.partial(cuda.misfit, i)
    return choose_able(where, cuda.refuse, backend, facts).run(i)


def _check(where: str, i: StepAttention | ReadAttention, tokens: tuple[int, ...], letter: str) -> tuple[int, int]:
    """Raise unless what both ops take fits together; return the rows and the slots.  ``tokens``: of a row, if they have a dimension."""
    checks.floating(where, "k", i.k, 4, "(b, cap, h_kv, p)")
    b, cap, h_kv, p = i.k.shape
    checks.groups(where, i.nheads, h_kv, "nheads")
    checks.shape(where, "qkv", i.qkv, (b, *tokens, (i.nheads + 2 * h_kv) * p), f"(b, {letter}(h + 2 h_kv) p)")
    checks.shape(where, "v", i.v, (b, cap, h_kv, p), "(b, cap, h_kv, p)")
    checks.shape(where, "length", i.length, (b,), "(b,)")
    checks.floats(where, qkv=i.qkv, k=i.k, v=i.v)
    if i.frequency is not None and not 1 <= i.frequency.numel() <= p // 2:
        raise ValueError(
            f"{where}: frequency has {i.frequency.numel()} numbers, and heads of {p} channels have {p // 2} pairs."
        )
    if i.norm is not None:
        checks.shape(where, "norm.q", i.norm.q, (p,), "(p,)")
        checks.shape(where, "norm.k", i.norm.k, (p,), "(p,)")
    return b, cap


def _integers(where: str, **tensors: Tensor) -> None:
    for name, m in tensors.items():
        if m.dtype != torch.int64:
            raise ValueError(f"{where}: {name} has dtype {m.dtype}, expected torch.int64.")

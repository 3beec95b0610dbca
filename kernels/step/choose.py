"""The end of a decoding step: a token for every row, the likeliest one unless others are given, and what is kept of it.

In PyTorch operations it is twenty launches of next to no work; beside a small model's step that is a tenth of the time.
"""

import ctypes
import functools
from ctypes import c_int, c_longlong, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..dispatch import KERNELS, Backend, Facts, choose, register
from ..gpu import nvrtc, structs
from ..gpu.operands import refuse_tensors

# as in choose.cu
ALIGNED, LIKELY, THREADS = 1, 2, 1024


class Slots(NamedTuple):
    """Rows that are continued, ``b`` of them, in tensors that a step changes in place.

    Attributes:
        tokens: ``(b, m)`` int64, tokens by column.
        logprobs: ``(b, m)`` float32, how likely they were; ``None`` where nobody asks.
        column: ``(b,)`` int64, where the next one goes.
        counts: ``(b,)`` int64, tokens of a row.
        limit: ``(b,)`` int64, and how many it may have.
        finished: ``(b,)`` bool, whether a row has ended.
        broken: ``(b,)`` bool, whether the best logit of a row was not finite before it had.
        token: ``(b,)`` int64, the last token.
        ends: ``(e,)`` int64, tokens that end a row.
    """

    tokens: Tensor
    logprobs: Tensor | None
    column: Tensor
    counts: Tensor
    limit: Tensor
    finished: Tensor
    broken: Tensor
    token: Tensor
    ends: Tensor


def choose_token(
    logits: Tensor, slots: Slots, pad: int, given: Tensor | None = None, *, backend: str | None = None
) -> None:
    """Choose the next token of every row, and keep it.

    Args:
        logits: ``(b, v)`` float32.
        slots: The rows.
        pad: The token of a row that has ended.
        given: ``(b,)`` int64, tokens that were chosen otherwise.
        backend: ``"cuda"`` or ``"torch"``; chosen automatically if absent (:mod:`hybridzoo.kernels.dispatch`).

    Raises:
        ValueError: Shapes do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    checks.floating("choose_token", "logits", logits, 2, "(b, v)")
    checks.shape("choose_token", "given", given, logits.shape[:1], "(b,) of the logits")
    facts = {"device": logits.device.type, "dtype": logits.dtype, "vocab": logits.shape[1]}
    choose("choose_token", backend=backend, **facts).run(logits, slots, pad, given)


def _plain(logits: Tensor, s: Slots, pad: int, given: Tensor | None) -> None:
    alive = ~s.finished
    best, token = logits.max(-1)
    # NaN is the largest of all; -inf may be somebody's way to forbid a token
    s.broken.logical_or_(~best.isfinite() & alive)
    token = (token if given is None else given).masked_fill(s.finished, pad)
    at = s.column[:, None]
    s.tokens.scatter_(1, at, token[:, None])
    if s.logprobs is not None:
        logprob = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(1)
        s.logprobs.scatter_(1, at, logprob.masked_fill(s.finished, 0)[:, None])
    s.column.add_(1)
    s.counts.add_(alive)
    s.token.copy_(token)
    s.finished.logical_or_((token[:, None] == s.ends).any(1)).logical_or_(s.counts >= s.limit)


class ChooseParams(ctypes.Structure):
    """``ChooseParams`` of ``choose.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "logits given ends limit tokens logprobs column count token finished broken"),
        *structs.fields(c_longlong, "pad row"),
        *structs.fields(c_int, "v m e"),
    ]


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA kernel cannot do a choice, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    reason, vocab = refuse_tensors(facts), facts.get("vocab", 1)
    if reason is not None:
        return reason
    if facts.get("dtype", torch.float32) != torch.float32 or not 0 < vocab < 2**24:
        return (
            f"the CUDA kernel chooses from up to {2**24 - 1:,} logits in float32, got {vocab:,} in {facts.get('dtype')}"
        )
    return nvrtc.unavailable()


@functools.lru_cache(maxsize=256)
def _tail(pad: int, row: int, v: int, m: int, e: int) -> bytes:
    return structs.tail(ChooseParams(pad=pad, row=row, v=v, m=m, e=e))


def _cuda(logits: Tensor, s: Slots, pad: int, given: Tensor | None) -> None:
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    (b, v), row, (m, e) = logits.shape, logits.stride(0), (s.tokens.shape[1], len(s.ends))
    flags = (ALIGNED if row % 4 == 0 and logits.data_ptr() % 16 == 0 else 0) | (LIKELY if s.logprobs is not None else 0)
    given = None if given is None else given.contiguous()
    pointers = s.limit, s.tokens, s.logprobs, s.column, s.counts, s.token, s.finished, s.broken
    packed = structs.pack(_tail(pad, row, v, m, e), logits, given, s.ends, *pointers)
    if b:
        nvrtc.launch("choose.cu", f"choose<{flags}>", packed, b, THREADS, 0, logits.device)


register(
    "choose_token",
    Backend("cuda", KERNELS, refuse, _cuda),
    Backend("torch", "PyTorch operations", run=_plain, plain=True),
)

"""The end of a reading: what tokens have left behind is taken over into the state that they were read from, in the rows where it is wanted.

Whoever checks guesses knows only behind the last layer which rows were right. In PyTorch operations a layer's state is then a handful of
launches of next to no work; the CUDA kernel does all layers in one.
"""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int, c_longlong, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..dispatch import KERNELS, Backend, Facts, choose_able, register
from ..gpu import nvrtc
from ..gpu.operands import ceil_div, refuse_tensors

# as in take.cu
MOST, THREADS = 48, 256
UNITS = (16, 4, 2)


class TakenValues(NamedTuple):
    """A state that was formed anew.

    Attributes:
        into: ``(b, ...)``, the old one.
        new: The new one, of the same shape.
    """

    into: Tensor
    new: Tensor


class TakenInputs(NamedTuple):
    """The inputs that a causal filter still needs to see.

    Attributes:
        into: ``(b, k - 1, d)``, its last inputs before.
        read: ``(b, w, d)``, those that were read since.
    """

    into: Tensor
    read: Tensor


class TakenKeys(NamedTuple):
    """Keys and values that are in the slots of their positions already (:func:`~hybridzoo.kernels.read_attention`).

    Attributes:
        k: ``(b, cap, h_kv, p)``.
        v: ``(b, cap, h_kv, p)``.
        pos: ``(b, cap)`` int64, the position in a slot, -1 where it is empty.
        length: ``(b,)`` int64, tokens before.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    length: Tensor


Taken = TakenValues | TakenInputs | TakenKeys


def take_rows(what: Sequence[Taken], rows: Tensor, counts: Tensor, *, backend: str | None = None) -> None:
    """Bring states to where the tokens end that were read, in some rows; in place.

    Args:
        what: Of each layer what it has.
        rows: ``(b,)`` bool, the rows in which it is wanted; in the others states stay, and keys and values behind their end become zero.
        counts: ``(b,)`` int64, the tokens that were read of each row; at least one where it is wanted.
        backend: ``"cuda"`` or ``"torch"``; chosen automatically if absent (:mod:`hybridzoo.kernels.dispatch`).

    Raises:
        ValueError: Shapes or types do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    for taken in what:
        _check(taken, len(rows))
    checks.shape("take_rows", "counts", counts, rows.shape, "(b,) of rows")
    if rows.dtype != torch.bool or counts.dtype != torch.int64:
        raise ValueError(
            f"take_rows: rows and counts have dtypes {rows.dtype} and {counts.dtype}, expected torch.bool and torch.int64."
        )
    facts: dict[str, Any] = {"device": rows.device.type, "misfit": functools.partial(misfit, what)}
    choose_able("take_rows", refuse, backend, facts).run(what, rows, counts)


def _check(taken: Taken, b: int) -> None:
    where = "take_rows"
    if isinstance(taken, TakenKeys):
        _, cap, h_kv, p = taken.k.shape
        for name, m in (("k", taken.k), ("v", taken.v)):
            checks.shape(where, name, m, (b, cap, h_kv, p), "(b, cap, h_kv, p)")
        checks.shape(where, "pos", taken.pos, (b, cap), "(b, cap)")
        return checks.shape(where, "length", taken.length, (b,), "(b,)")
    other = taken[1]
    if isinstance(taken, TakenValues):
        checks.shape(where, "new", other, (b, *taken.into.shape[1:]), "(b, ...), as that which it is taken into")
    else:
        checks.shape(where, "read", other, (b, other.shape[1], taken.into.shape[2]), "(b, w, d), as the state has d")
    if other.dtype != taken.into.dtype:
        raise ValueError(f"take_rows: {other.dtype} cannot be taken into a state of {taken.into.dtype}. Cast it first.")


def _plain(what: Sequence[Taken], rows: Tensor, counts: Tensor) -> None:
    for taken in what:
        if isinstance(taken, TakenValues):
            _select(taken.into, rows, taken.new)
        elif isinstance(taken, TakenInputs):
            kept = taken.into.shape[1]
            at = counts[:, None] + torch.arange(kept, device=counts.device)
            both = torch.cat([taken.into, taken.read], 1)
            _select(taken.into, rows, both.gather(1, at[..., None].expand(-1, -1, both.shape[2])))
        else:
            slots = torch.arange(taken.pos.shape[1], device=counts.device)
            begin = taken.length[:, None]
            new = (slots >= begin) & (slots < begin + counts[:, None])
            taken.pos.copy_(torch.where(new & rows[:, None], slots, taken.pos))
            for cache in (taken.k, taken.v):
                cache.masked_fill_((new & ~rows[:, None])[..., None, None], 0)
            taken.length.add_(torch.where(rows, counts, 0))


def _select(into: Tensor, rows: Tensor, new: Tensor) -> None:
    torch.where(rows.view(-1, *(1,) * (into.dim() - 1)), new, into, out=into)


class TakeParams(ctypes.Structure):
    """``TakeParams`` of ``take.cu``."""

    _fields_ = [
        *[(name, c_void_p * MOST) for name in ("into", "from_", "pos", "length")],
        *[(name, c_longlong * MOST) for name in ("from_b", "from_l", "n")],
        *[(name, c_int * MOST) for name in ("k", "kind", "unit")],
        ("begin", c_int * (MOST + 1)),
        ("rows", c_void_p),
        ("counts", c_void_p),
        ("count", c_int),
        ("b", c_int),
    ]


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA kernel cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    return refuse_tensors(facts) or facts.get("misfit", lambda: None)() or nvrtc.unavailable()


def misfit(what: Sequence[Taken]) -> str | None:
    """Say what of a call the kernel cannot read where it lies, or ``None``."""
    for taken in what:
        whole = taken if isinstance(taken, TakenKeys) else taken if isinstance(taken, TakenValues) else taken[:1]
        if not all(m.is_contiguous() for m in whole):
            return "the CUDA kernel needs states in one piece"
        if isinstance(taken, TakenInputs) and taken.read.stride(2) != 1:
            return "the CUDA kernel needs channels of a filter's inputs side by side"
        if _of(taken)[-1] is None:
            return "the CUDA kernel moves 2 bytes or more"
    return None


def _of(taken: Taken) -> tuple[Any, ...]:
    """Kind, addresses, strides and bytes of a thing, steps or slots that it has, and the bytes that are moved at once."""
    into, other = taken[0], taken[1]
    size = into.element_size()
    rest: tuple[Tensor | None, ...] = (None, None)
    if isinstance(taken, TakenKeys):
        kind, n, k, rest = 2, into[0, 0].numel() * size, into.shape[1], (taken.pos, taken.length)
        strides = (0, 0)
    elif isinstance(taken, TakenInputs):
        kind, n, k = 1, into.shape[2] * size, into.shape[1]
        strides = (other.stride(0) * size, other.stride(1) * size)
    else:
        kind, n, k = 0, into[0].numel() * size if len(into) else 0, 1
        strides = (n, 0)
    places = into.data_ptr(), other.data_ptr(), n, *strides
    unit = next((u for u in UNITS if all(x % u == 0 for x in places)), None)
    return kind, (into, other, *rest), strides, n, k, unit


def _cuda(what: Sequence[Taken], rows: Tensor, counts: Tensor) -> None:
    rows, counts, b = rows.contiguous(), counts.contiguous(), len(rows)
    there = [x for x in what if x[0].numel()]
    for first in range(0, len(there), MOST):
        p, end = TakeParams(rows=rows.data_ptr(), counts=counts.data_ptr(), b=b), 0
        for i, taken in enumerate(there[first : first + MOST]):
            kind, tensors, (p.from_b[i], p.from_l[i]), p.n[i], p.k[i], p.unit[i] = _of(taken)
            p.kind[i], p.begin[i] = kind, end
            p.into[i], p.from_[i], p.pos[i], p.length[i] = (None if m is None else m.data_ptr() for m in tensors)
            # a row's keys are few, and its length is read before it is written
            end += b * (1 if kind == 2 else ceil_div(p.n[i], p.unit[i] * THREADS))
            p.count = i + 1
            p.begin[i + 1] = end
        nvrtc.launch("take.cu", "take_rows", bytes(p), end, THREADS, 0, rows.device)
    for taken in there:
        for state in taken if isinstance(taken, TakenKeys) else taken[:1]:
            if not state.is_inference():
                torch.autograd.graph.increment_version(state)


register(
    "take_rows",
    Backend("cuda", KERNELS, refuse, _cuda),
    Backend("torch", "PyTorch operations", run=_plain, plain=True),
)

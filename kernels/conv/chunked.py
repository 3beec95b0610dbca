"""The causal depthwise convolution as a sum of shifted multiply-adds, channels last.

Measured on one CPU core at (b, l, d, k) = (16, 256, 256, 4): 2.8 ms for the shifted sums, 5.6 ms for ``F.conv1d`` on the transposed view
(18.8 against 4.9 ms at d = 384); packed documents and the state of an earlier call are masks and slices of the same loop.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import acc_dtype, blank
from ..operators import custom_op, filled
from ..seq import Seq
from .inputs import BACKWARD, FORWARD, ConvInputs, connect

# elements of a group of rows that the taps pass over while it is in the cache
_GROUP = {"cpu": 1 << 17, "cuda": 1 << 26}


def _groups(x: Tensor) -> Iterator[slice]:
    b, l, d = x.shape
    rows = max(1, _GROUP.get(x.device.type, _GROUP["cuda"]) // max(1, l * d))
    return (slice(i, min(b, i + rows)) for i in range(0, b, rows))


def _taps(
    x: Tensor, state: Tensor | None, doc: Tensor | None, k: int
) -> Iterator[tuple[int, slice, Tensor | None, bool, slice]]:
    """The work of the taps on earlier inputs: ``(shift, outputs, same-document mask, whether from the state, inputs)``."""
    l = x.shape[1]
    for s in range(1, k):
        if s < l:
            mask = None if doc is None else (doc[:, s:] == doc[:, : l - s])[..., None]
            yield s, slice(s, l), mask, False, slice(0, l - s)
        if state is not None:
            m = min(s, l)
            mask = None if doc is None else (doc[:, :m] == doc[:, :1])[..., None]
            yield s, slice(0, m), mask, True, slice(k - 1 - s, k - 1 - s + m)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0.0)


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None, state: Tensor | None, doc: Tensor | None) -> Tensor:
    y = x * taps[-1] if bias is None else torch.addcmul(bias.to(x.dtype), x, taps[-1])
    for s, to, mask, old, at in _taps(x, state, doc, taps.shape[0]):
        source = state if old and state is not None else x
        y[:, to].addcmul_(_masked(source[:, at], mask), taps[-1 - s])
    return y


def _cut(rows: slice, acc: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if m is None else m[rows].to(acc) for m in tensors]


@custom_op("hybridzoo::causal_conv1d", schema=FORWARD)
def conv_op(*operands: Any) -> Tensor:
    """The convolution, (b, l, d) in x's dtype."""
    *tensors, silu = operands
    i = ConvInputs(*tensors)
    acc = acc_dtype(i.x.dtype)
    taps = i.weight.t().to(acc).contiguous()
    out = blank(i.x)
    for rows in _groups(i.x):
        part, state = _cut(rows, acc, i.x, i.initial_state)
        y = _convolve(part, taps, i.bias, state, None if i.doc is None else i.doc[rows])
        out[rows] = F.silu(y) if silu else y
    return out


@custom_op("hybridzoo::causal_conv1d_backward", schema=BACKWARD)
def conv_backward_op(gout: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and the initial state; empty where there is no such input."""
    *tensors, silu = operands
    i = ConvInputs(*tensors)
    acc = acc_dtype(i.x.dtype)
    taps = i.weight.t().to(acc).contiguous()
    gtaps, gbias, gx = torch.zeros_like(taps), taps.new_zeros(taps.shape[1]), blank(i.x)
    gstate = None if i.initial_state is None else taps.new_zeros(i.initial_state.shape)
    for rows in _groups(i.x):
        part, state, g = _cut(rows, acc, i.x, i.initial_state, gout)
        docs = None if i.doc is None else i.doc[rows]
        if silu:
            g = torch.ops.aten.silu_backward(g, _convolve(part, taps, i.bias, state, docs))
        gpart = g * taps[-1]
        gtaps[-1] += (g * part).sum((0, 1))
        for s, to, mask, old, at in _taps(part, state, docs, taps.shape[0]):
            source, grad = (state, gstate[rows]) if old and gstate is not None else (part, gpart)
            masked = _masked(g[:, to], mask)
            grad[:, at].addcmul_(masked, taps[-1 - s])
            gtaps[-1 - s] += (masked * source[:, at]).sum((0, 1))
        gbias += g.sum((0, 1))
        gx[rows] = gpart
    gweight = gtaps.t().to(i.weight.dtype).contiguous()
    bias, state = (
        None if m is None or g is None else g.to(m.dtype) for g, m in ((gbias, i.bias), (gstate, i.initial_state))
    )
    return filled((gx, gweight, bias, state), i.x)


connect(conv_op, conv_backward_op)


def causal_conv1d(i: ConvInputs, silu: bool) -> Tensor:
    """:func:`.reference.causal_conv1d`, fast; the same arguments and result."""
    return torch.ops.hybridzoo.causal_conv1d(*i, silu)


def last_inputs(x: Tensor, k: int, initial_state: Tensor | None, seq: Seq | None) -> Tensor:
    """The last k-1 real inputs of each row's last document, ``(b, k-1, d)``, zeros before its start; those before the row come first."""
    b, l, d = x.shape
    if seq is None and l >= k - 1:
        # a state must not keep the whole row alive
        return x.narrow(1, l - k + 1, k - 1).clone(memory_format=torch.contiguous_format)
    before = x.new_zeros(b, k - 1, d) if initial_state is None else initial_state.to(x.dtype)
    if seq is None:
        return torch.cat([before[:, l:], x], 1)
    # places in the row; negative ones stand before it
    at = seq.lengths[:, None] + torch.arange(1 - k, 0, device=x.device)

    def pick(rows: Tensor, index: Tensor) -> Tensor:
        return rows.gather(1, index[..., None].expand(b, k - 1, d))

    inside = at.clamp(min=0)
    state = torch.where((at < 0)[..., None], pick(before, (at + k - 1).clamp(max=k - 2)), pick(x, inside))
    if not seq.packed:
        return state
    docs = seq.doc.gather(1, inside)
    return state.masked_fill((docs != docs[:, -1:])[..., None], 0.0)

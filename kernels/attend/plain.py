"""Attention over a cache in PyTorch operations: the definition, and what no kernel of ours does."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import acc_dtype, cast
from .inputs import HeadNorm, ReadAttention, StepAttention


def _normed(x: Tensor, weight: Tensor | None, norm: HeadNorm | None) -> Tensor:
    return x if norm is None else F.rms_norm(x, x.shape[-1:], cast(weight, x.dtype), norm.eps)


def _turned(x: Tensor, position: Tensor, i: StepAttention | ReadAttention) -> Tensor:
    if i.frequency is None:
        return x
    acc, dim = acc_dtype(x.dtype), 2 * i.frequency.shape[0]
    angle = position[..., None, None].to(acc) * i.frequency.to(acc)
    cos, sin = angle.cos(), angle.sin()
    turn, rest = x[..., :dim].to(acc), x[..., dim:]
    first, second = (turn[..., 0::2], turn[..., 1::2]) if i.interleaved else turn.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if i.interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def _heads(qkv: Tensor, position: Tensor, i: StepAttention | ReadAttention) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, ``(..., h, p)``, keys and values of tokens at positions, ``(...)``, behind norms, multiplier and rotation."""
    h_kv, p = i.k.shape[2:]
    q, k, v = qkv.unflatten(-1, (-1, p)).split([i.nheads, h_kv, h_kv], dim=-2)
    q, k = (_normed(x, w, i.norm) for x, w in ((q, i.norm and i.norm.q), (k, i.norm and i.norm.k)))
    k = k if i.key_multiplier == 1 else k * i.key_multiplier
    return _turned(q, position, i), _turned(k, position, i), v


def step_attention(i: StepAttention) -> Tensor:
    """Norms, rotation, the cache's new entry, and the softmax, one after the other."""
    cap, h_kv, p = i.k.shape[1:]
    q, k, v = _heads(i.qkv, i.length, i)
    slot = i.length[:, None] % cap
    for cache, new in ((i.k, k), (i.v, v)):
        cache.scatter_(1, slot[..., None, None].expand(-1, 1, h_kv, p), new[:, None].to(cache.dtype))
    i.pos.scatter_(1, slot, i.length[:, None])
    sees = (i.pos >= 0) & (i.pos <= i.length[:, None])
    if i.window is not None:
        sees = sees & (i.pos > i.length[:, None] - i.window)
    keys, values = (cache.to(q.dtype).transpose(1, 2) for cache in (i.k, i.v))
    mask, grouped = sees[:, None, None], i.nheads != h_kv
    y = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask, scale=i.scale, enable_gqa=grouped)
    i.length.add_(1)
    return y.flatten(1)


def read_attention(i: ReadAttention) -> Tensor:
    """The same of several tokens, all of whose entries are there before the softmax."""
    (cap, h_kv, p), w = i.k.shape[1:], i.qkv.shape[1]
    tokens, slots = (torch.arange(n, device=i.k.device) for n in (w, cap))
    position, padding = i.length[:, None] + tokens, tokens >= i.counts[:, None]  # (b, w)
    q, k, v = _heads(i.qkv.masked_fill(padding[..., None], 0), position, i)
    # by slots, the token that comes there: no two come to one
    comes = slots - i.length[:, None]
    is_new = ((comes >= 0) & (comes < i.counts[:, None]))[..., None, None]
    comes = comes.clamp(0, w - 1)[..., None, None].expand(-1, -1, h_kv, p)
    for cache, new in ((i.k, k), (i.v, v)):
        cache.copy_(torch.where(is_new, new.gather(1, comes).to(cache.dtype), cache))
    # padding sees what tokens see, and one slot at least, so that it gets numbers
    used = (i.length + i.counts).clamp(min=1)[:, None]
    sees = (slots <= position[..., None]) & (slots < used)[:, None]
    empty = (slots >= used)[..., None, None]
    keys, values = (cache.masked_fill(empty, 0).to(q.dtype).transpose(1, 2) for cache in (i.k, i.v))
    mask, grouped = sees[:, None], i.nheads != h_kv
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, scale=i.scale, enable_gqa=grouped
    )
    return y.transpose(1, 2).flatten(2)

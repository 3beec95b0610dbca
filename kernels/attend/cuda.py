"""Attention over a cache on an NVIDIA GPU: the launches of ``attend.cu``."""

import ctypes
import functools
from ctypes import c_float, c_int, c_longlong, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import Facts
from ..gpu import nvrtc, structs
from ..gpu.operands import TYPES, ceil_div, refuse_step
from ..gpu.tickets import tickets
from .inputs import ReadAttention, StepAttention

WARPS, HEADS = 4, 8
THREADS = 32 * WARPS
# shared memory of a block holds so many times 16 slots of every warp
STAGES = 2
# slots that a block has at least if they are taken; blocks for a row, which should keep a GPU busy that has no other row
SLOTS, BLOCKS = 256, 256


class AttendParams(ctypes.Structure):
    """``AttendParams`` of ``attend.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "qkv k v q_gain k_gain frequency pos length counts queries parts tickets out"),
        *structs.fields(c_longlong, "qkv_b qkv_w k_b k_s k_h v_b v_s v_h pos_b"),
        *structs.fields(c_int, "w h h_kv p cap splits chunks window rotated interleaved normed"),
        *structs.fields(c_float, "scale key_multiplier eps"),
    ]


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA kernel cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    reason, headdim = refuse_step(facts, "reads keys"), facts.get("headdim", 64)
    if reason is not None:
        return reason
    if headdim % 8 or headdim > 256:
        return f"the CUDA kernel takes multiples of 8 up to 256 as headdim, got {headdim}"
    return facts.get("misfit", lambda: None)() or nvrtc.unavailable()


def misfit(i: StepAttention | ReadAttention) -> str | None:
    """Say what of a call the kernel cannot read where it lies, or ``None``."""
    norm, dtype = i.norm, i.qkv.dtype
    for name, m in {"k": i.k, "v": i.v, "norm.q": norm and norm.q, "norm.k": norm and norm.k}.items():
        if m is not None and m.dtype != dtype:
            return f"the CUDA kernel needs {name} in qkv's dtype {dtype}, got {m.dtype}"
    for name, m in (("k", i.k), ("v", i.v)):
        if m.stride(-1) != 1 or m.data_ptr() % 16 or any(s % 8 for s in m.stride()[:-1]):
            return f"the CUDA kernel needs heads of {name} in one piece on 16-byte borders"
    name, other = ("counts", i.counts) if isinstance(i, ReadAttention) else ("pos", i.pos)
    if any([m.stride(-1) != 1 for m in (i.qkv, i.length, other)]):
        return f"the CUDA kernel needs rows of qkv, length and {name} in one piece"
    return None


class Shares(NamedTuple):
    """Blocks of a launch, splits of a row's slots, chunks of a row's queries, and a block's shared memory."""

    blocks: int
    splits: int
    chunks: int
    ring: int


@functools.lru_cache(maxsize=4096)
def _cut(
    dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], how: tuple[int, ...], numbers: tuple
) -> tuple[bytes, str, Shares]:
    """The struct behind its pointers, the kernel's types, and how its work is shared out."""
    b, w, cap, h_kv, p, h = sizes
    # of a row alone, and of one token: its bits must not depend on how many rows there are, and how many tokens of others
    splits = max(1, min(BLOCKS // (h_kv * ceil_div(h // h_kv, HEADS)), ceil_div(cap, SLOTS)))
    chunks = ceil_div(w * (h // h_kv), HEADS)
    window, rotated, interleaved, normed = how
    scale, key_multiplier, eps = numbers
    names = "qkv_b qkv_w k_b k_s k_h v_b v_s v_h pos_b".split()
    rest = AttendParams(
        **dict(zip(names, strides, strict=True)), w=w, h=h, h_kv=h_kv, p=p, cap=cap, splits=splits, chunks=chunks, window=window,
        rotated=rotated, interleaved=interleaved, normed=normed, scale=scale, key_multiplier=key_multiplier, eps=eps,
    )  # fmt: skip
    halves = ceil_div(p, 64)
    # 16 slots of every warp, keys and values of two bytes
    ring = STAGES * WARPS * 16 * 2 * 2 * 64 * halves
    shares = Shares(b * h_kv * chunks * splits, splits, h_kv * chunks, ring)
    return structs.tail(rest), f"{TYPES[dtype]}, {halves}", shares


def step_attention(i: StepAttention) -> Tensor:
    """One launch: blocks of slots, and what they have summed up where the last of them arrives."""
    out = _attend(i, 1, (i.qkv.stride(0), 0), i.window or 0, i.pos)
    _count_versions(i.k, i.v, i.pos, i.length)
    return out


def read_attention(i: ReadAttention) -> Tensor:
    """Two launches: the tokens' heads, whose keys and values go into the cache, and blocks of slots."""
    out = _attend(i, i.qkv.shape[1], i.qkv.stride()[:2], counts=i.counts)
    _count_versions(i.k, i.v)
    return out


def _attend(
    i: StepAttention | ReadAttention,
    w: int,
    strides: tuple[int, ...],
    window: int = 0,
    pos: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    (b, cap, h_kv, p), h, norm = i.k.shape, i.nheads, i.norm
    out = torch.empty((*i.qkv.shape[:-1], h * p), dtype=i.qkv.dtype, device=i.qkv.device)
    if not out.numel():
        return out
    tail, types, shares = _cut(
        i.qkv.dtype,
        (b, w, cap, h_kv, p, h),
        (*strides, *i.k.stride()[:3], *i.v.stride()[:3], 0 if pos is None else pos.stride(0)),
        (window, 0 if i.frequency is None else i.frequency.shape[0], i.interleaved, norm is not None),
        (p**-0.5 if i.scale is None else i.scale, i.key_multiplier, 0.0 if norm is None else norm.eps),
    )
    parts = torch.empty((b, w, h, shares.splits, p + 4), dtype=torch.float32, device=out.device)
    queries = None if counts is None else torch.empty_like(out)
    gains = (None, None) if norm is None else (norm.q, norm.k)
    frequency = None if i.frequency is None else i.frequency.float().contiguous()
    drawn = tickets(i.k, (b, shares.chunks + 1))
    where = (pos, i.length, counts, queries, parts, drawn, out)
    packed, several = structs.pack(tail, i.qkv, i.k, i.v, *gains, frequency, *where), ""
    if counts is not None:
        blocks, several = b * w * h_kv * ceil_div(h // h_kv, HEADS), ", true"
        nvrtc.launch("attend.cu", f"attend_keep<{types}>", packed, blocks, THREADS, 0, out.device, overlaps=True)
    name = f"attend_slots<{types}, {STAGES}{several}>"
    nvrtc.launch("attend.cu", name, packed, shares.blocks, THREADS, shares.ring, out.device, overlaps=True)
    return out


def _count_versions(*states: Tensor) -> None:
    for state in states:
        if not state.is_inference():
            torch.autograd.graph.increment_version(state)

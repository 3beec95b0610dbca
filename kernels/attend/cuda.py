"""One token's attention on an NVIDIA GPU: launches of ``attend.cu``."""

import ctypes
import functools
from ctypes import c_float, c_int, c_longlong, c_void_p

import torch
from torch import Tensor

from ..dispatch import Facts
from ..gpu import nvrtc, structs
from ..gpu.operands import TYPES, ceil_div, refuse_step
from .inputs import StepAttention

THREADS = 128
# shared memory of a block: keys and values on their way, 16 bytes each, two times four of every thread
RING = 2 * 4 * 2 * THREADS * 16
# slots that a block has at least, and blocks that share a row's slots at most
SLOTS, SPLITS = 256, 64
# query heads of one block
HEADS = (1, 2, 4)


class AttendParams(ctypes.Structure):
    """``AttendParams`` of ``attend.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "qkv k v q_gain k_gain frequency pos length parts out"),
        *structs.fields(c_longlong, "qkv_b k_b k_s k_h v_b v_s v_h pos_b"),
        *structs.fields(c_int, "h h_kv p cap splits chunks window rotated interleaved normed"),
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


def misfit(i: StepAttention) -> str | None:
    """Say what of a call the kernel cannot read where it lies, or ``None``."""
    norm, dtype = i.norm, i.qkv.dtype
    for name, m in {"k": i.k, "v": i.v, "norm.q": norm and norm.q, "norm.k": norm and norm.k}.items():
        if m is not None and m.dtype != dtype:
            return f"the CUDA kernel needs {name} in qkv's dtype {dtype}, got {m.dtype}"
    for name, m in (("k", i.k), ("v", i.v)):
        if m.stride(-1) != 1 or m.data_ptr() % 16 or any(s % 8 for s in m.stride()[:-1]):
            return f"the CUDA kernel needs heads of {name} in one piece on 16-byte borders"
    if i.qkv.stride(1) != 1 or i.pos.stride(1) != 1 or i.length.stride(0) != 1:
        return "the CUDA kernel needs rows of qkv and pos, and length, in one piece"
    return None


@functools.lru_cache(maxsize=4096)
def _cut(
    dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], how: tuple[int, ...], numbers: tuple
) -> tuple[bytes, str, int, int]:
    """The struct behind its pointers, the kernel, its blocks, and splits of a row's slots."""
    b, cap, h_kv, p, h = sizes
    lanes = next(n for n in (1, 2, 4, 8, 16, 32) if 8 * n >= p)
    heads = next((n for n in HEADS if n >= h // h_kv), HEADS[-1])
    # of the slots alone: a row's bits must not depend on how many rows there are
    splits, chunks = min(SPLITS, ceil_div(cap, SLOTS)), ceil_div(h // h_kv, heads)
    window, rotated, interleaved, normed = how
    scale, key_multiplier, eps = numbers
    names = "qkv_b k_b k_s k_h v_b v_s v_h pos_b".split()
    rest = AttendParams(
        **dict(zip(names, strides, strict=True)), h=h, h_kv=h_kv, p=p, cap=cap, splits=splits, chunks=chunks, window=window,
        rotated=rotated, interleaved=interleaved, normed=normed, scale=scale, key_multiplier=key_multiplier, eps=eps,
    )  # fmt: skip
    return structs.tail(rest), f"attend_split<{TYPES[dtype]}, {lanes}, {heads}>", b * h_kv * chunks * splits, splits


def step_attention(i: StepAttention) -> Tensor:
    """Two launches: blocks of slots, and what they have summed up."""
    (b, cap, h_kv, p), h, norm = i.k.shape, i.nheads, i.norm
    out = torch.empty((b, h * p), dtype=i.qkv.dtype, device=i.qkv.device)
    if not out.numel():
        return out
    tail, name, blocks, splits = _cut(
        i.qkv.dtype,
        (b, cap, h_kv, p, h),
        (i.qkv.stride(0), *i.k.stride()[:3], *i.v.stride()[:3], i.pos.stride(0)),
        (i.window or 0, 0 if i.frequency is None else i.frequency.shape[0], i.interleaved, norm is not None),
        (p**-0.5 if i.scale is None else i.scale, i.key_multiplier, 0.0 if norm is None else norm.eps),
    )
    parts = torch.empty((b, h, splits, p + 2), dtype=torch.float32, device=out.device)
    gains = (None, None) if norm is None else (norm.q, norm.k)
    frequency = None if i.frequency is None else i.frequency.float().contiguous()
    packed = structs.pack(tail, i.qkv, i.k, i.v, *gains, frequency, i.pos, i.length, parts, out)
    nvrtc.launch("attend.cu", name, packed, blocks, THREADS, RING, out.device, overlaps=True)
    combine = f"attend_combine<{TYPES[out.dtype]}>"
    nvrtc.launch("attend.cu", combine, packed, b * h, THREADS, 0, out.device, overlaps=True)
    for state in (i.k, i.v, i.pos, i.length):
        if not state.is_inference():
            torch.autograd.graph.increment_version(state)
    return out

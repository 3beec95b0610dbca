"""The CUDA products of few rows: launches of ``few_rows.cu``.

Weights, and what stands beside them, are of one 16-bit type; the residual stream is of that type or float32.
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_longlong, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import Facts
from ..gpu import nvrtc, structs
from ..gpu.device import DRIVERS, processors, shared_memory
from ..gpu.operands import TYPES, ceil_div, refuse_step
from .inputs import StepProduct

# as in few_rows.cu
WARPS, STEP, PIECE, COLUMN = 8, 32, 1024, 20
# pieces that a warp may take at a time, and have on their way: fewer of these where x takes their place
GROUPS, RINGS = (5, 4, 3, 2), (12, 10, 8, 6, 4)
# pieces on their way of which a launch has at least so many if the next one's block shall have room beside its own
LEAST = 8
# in front of a product, NORM, CENTRED, GATED; behind it, CONVOLVED, ACTIVATED, PAIRED, ADDED; and HALVED, tiles of up to 8 rows
FLAGS = (8, 16, 32, 64, 128, 256, 512, 1024)
ACTIVATIONS = (None, "silu", "gelu", "relu", "relu2")
# rows of a block, of which there are more in parts where blocks of all read so many bytes of the weight together
MAX_ROWS, MOST_BYTES = 32, 16 << 20
# rows up to which the kernel was seen to pay for weights of any size, and bytes of the weight from which on it is taken for more
SURE_ROWS, LARGE_BYTES = 16, 16 << 20
# bytes of shared memory that every GPU of ours has for a block
SMALLEST = 99 << 10
# what a tile costs beside its rows, in rows
OVERHEAD = 2


class FewRowsParams(ctypes.Structure):
    """``FewRowsParams`` of ``few_rows.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "x weight bias gain shift gate residual conv_state conv_weight conv_bias out"),
        *structs.fields(c_longlong, "x_b weight_n gate_b residual_b state_b state_k"),
        *structs.fields(c_int, "b n k part rows tiles blocks per stride"),
        *structs.fields(c_int, "group_size gate_behind activation"),
        *structs.fields(c_int, "conv_first conv_channels conv_width silu"),
        *structs.fields(c_float, "eps gate_multiplier multiplier"),
    ]


def pieces(k: int) -> int:
    """Pieces that a warp has of a tile: as ``k`` alone has it, for so are sums ordered."""
    per = ceil_div(ceil_div(k, STEP), WARPS)
    return per + (per % 2 if per != 3 else 0)


def groups_of(k: int) -> tuple[int, ...]:
    """Pieces that a warp may take at a time."""
    return tuple(group for group in GROUPS if pieces(k) % group == 0)


def ring_of(k: int, most: int, total: int) -> tuple[int, int]:
    """Pieces that a warp takes at a time of ``total``, and how many such groups it has on their way, of up to ``most`` pieces."""
    ways = [(group, most // group) for group in groups_of(k) if most // group > 1]
    if total <= most:
        return max(ways, key=lambda w: (min(w[0] * w[1], total), w[0]))
    # what is on its way while a group is dealt with
    return max(ways, key=lambda w: (w[0] * (w[1] - 1), w[0]))


def stride(k: int) -> int:
    """Elements from row to row of x in shared memory: whole groups, and rows read together 64 bytes apart, modulo the 128 of all banks."""
    whole = max(ceil_div(k, group * STEP) * group * STEP for group in groups_of(k))
    return ceil_div(whole, 64) * 64 + 32


def shared_bytes(b: int, k: int, most: int) -> int:
    """Shared memory of a block: pieces of the weight on their way, sums of two tiles, and x."""
    return WARPS * most * PIECE + 2 * WARPS * 8 * columns(b) * COLUMN * 4 + b * stride(k) * 2


def columns(b: int) -> int:
    """Groups of 8 rows of x that a kernel is compiled for."""
    return next(count for count in (1, 2, 4) if 8 * count >= b)


def part_of(b: int, k: int, n: int | None, room: int) -> tuple[int, int] | str:
    """Rows that a block has of ``b``, and pieces that a warp may have on their way, in ``room`` bytes of shared memory; or why not.

    Who knows no ``n`` has a large one.
    """
    parts = [rows for rows in (min(b, MAX_ROWS), 16, 8) if rows <= b]
    found = next(((rows, most) for rows in parts if (most := _most(rows, k, room))), None)
    if found is not None and found[0] == b:
        return found
    if b > MAX_ROWS and n is None:
        return f"the CUDA kernel is for 1 to {MAX_ROWS} rows, got {b}"
    if found is None:
        need = shared_bytes(min(b, 8), k, rings(k)[-1])
        return f"the CUDA kernel needs {need} bytes of shared memory for {min(b, 8)} rows of {k}, and has {room}"
    count = ceil_div(b, found[0])
    if n is None or 2 * n * k * count > MOST_BYTES:
        return f"the CUDA kernel would read a weight of k = {k} {count} times for {b} rows"
    return found


def rings(k: int) -> tuple[int, ...]:
    """Pieces that a warp may have on their way: two groups or more."""
    return tuple(most for most in RINGS if most >= 2 * groups_of(k)[-1])


def _most(b: int, k: int, room: int) -> int:
    """The largest ring with which two blocks, this launch's and the next one's, stand beside each other; or else one alone; or none."""
    ways = [
        *((most, (room - DRIVERS) // 2) for most in rings(k) if most >= LEAST),
        *((most, room) for most in rings(k)),
    ]
    return next((most for most, size in ways if shared_bytes(b, k, most) <= size), 0)


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA kernel cannot do a product, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    reason, b, k = refuse_step(facts, "multiplies by weights"), facts.get("rows", 1), facts.get("d", 768)
    if reason is not None:
        return reason
    if not b:
        return "the CUDA kernel needs a row"
    if k % 8:
        return f"the CUDA kernel reads 8 elements at a time, got k = {k}"
    # the former looks at addresses, which what is traced has not
    if reason := facts.get("misfit", lambda: None)() or nvrtc.unavailable():
        return reason
    # few calls are of a size that some card has no room for
    if b <= MAX_ROWS and shared_bytes(b, k, rings(k)[-1]) <= SMALLEST:
        return None
    how = part_of(b, k, facts.get("n"), _room(torch.device("cuda")))
    return how if isinstance(how, str) else None


def reserve(facts: Facts) -> str | None:
    """Say why the CUDA kernel would rather leave a product to cuBLAS, or ``None``; see :class:`.dispatch.Backend`."""
    b, n, k = facts.get("rows", 1), facts.get("n"), facts.get("d", 768)
    if b <= SURE_ROWS or n is None or 2 * n * k > LARGE_BYTES:
        return None
    # seen on an H200, without what stands around a product: 32 rows by 5 MB take 1.5 times as long as cuBLAS, 16 rows 0.96 times
    return f"the CUDA kernel reads a weight of {n} x {k} too often for {b} rows: cuBLAS is faster, ours is taken where it is asked for"


def _room(device: torch.device) -> int:
    return shared_memory(device) - DRIVERS


def misfit(i: StepProduct) -> str | None:
    """Say what of a call the kernel cannot read where it lies, or ``None``."""
    norm, conv, dtype = i.norm, i.conv, i.weight.dtype
    streams = {"x": i.x if i.norm is not None and i.norm.gate is None else None, "residual": i.residual}
    same = {"x": None if streams["x"] is not None else i.x, "bias": i.bias}
    if norm is not None:
        same |= {"norm.weight": norm.weight, "norm.bias": norm.bias, "norm.gate": norm.gate}
        size = norm.group_size or i.x.shape[1]
        if size % 4 or i.x.shape[0] * (i.x.shape[1] // size) > 320:
            return f"the CUDA kernel normalises groups of 4 n channels, up to 320 of them, got groups of {size}"
    if conv is not None:
        same |= {"conv.state": conv.state, "conv.weight": conv.weight, "conv.bias": conv.bias}
        if not conv.weight.is_contiguous() or conv.state.stride(2) != 1:
            return "the CUDA kernel needs filters in one piece, and channels of the convolution's state side by side"
    for name, m in same.items():
        if m is not None and m.dtype != dtype:
            return f"the CUDA kernel needs {name} in the weight's dtype {dtype}, got {m.dtype}"
    for name, m in streams.items():
        if m is not None and m.dtype not in (dtype, torch.float32):
            return f"the CUDA kernel needs {name} in the weight's dtype {dtype} or float32, got {m.dtype}"
    rows = {"weight": i.weight, "x": i.x, "norm.gate": None if norm is None else norm.gate}
    for name, m in rows.items():
        wide = 16 if name == "weight" else 8 if m is not None and m.dtype != torch.float32 and norm is not None else 16
        if m is not None and (m.stride(1) != 1 or m.stride(0) * m.element_size() % wide or m.data_ptr() % wide):
            return f"the CUDA kernel needs rows of {name} in one piece on {wide}-byte borders"
    return None


class Look(NamedTuple):
    """All that a launch depends on besides addresses."""

    types: tuple[torch.dtype, torch.dtype, torch.dtype]  # of the weight, x, and the result
    sizes: tuple[int, int, int]  # b, n, k
    strides: tuple[int, ...]  # of x, the weight, gate, residual, and the convolution's state twice
    norm: tuple[bool, bool, int, bool, float] | None  # centred, gated, group size, gate behind, eps
    conv: tuple[int, int, int, bool] | None  # first, channels, width, SiLU
    behind: tuple[bool, str | None, bool, float, float]  # pairs, activation, residual, multipliers of gate and product


class Cut(NamedTuple):
    """A launch: the struct behind its pointers, the kernel, blocks, and bytes of shared memory."""

    tail: bytes
    name: str
    blocks: int
    shared: int


def tiles_of(n: int, most: int, count: int) -> int:
    """Rows of the weight that a tile has, of ``most``, so that the busiest of ``count`` multiprocessors has least to do."""
    return min(range(most, 0, -1), key=lambda rows: ceil_div(ceil_div(n, rows), count) * (rows + OVERHEAD))


@functools.lru_cache(maxsize=4096)
def cut(look: Look, count: int, room: int) -> Cut:
    """Cut a product into tiles for ``count`` multiprocessors with ``room`` bytes of shared memory for a block."""
    (b, n, k), (pairs, activation, added, gate_multiplier, multiplier) = look.sizes, look.behind
    outputs = n // 2 if pairs else n
    how = part_of(b, k, n, room)
    if isinstance(how, str):
        raise ValueError(f"step_linear: {how}.")
    part, most = how
    parts = ceil_div(b, part)
    rows = tiles_of(outputs, 8 if pairs else 16, max(1, count // parts))
    tiles = ceil_div(outputs, rows)
    blocks = min(tiles, max(1, count // parts))
    names = "x_b weight_n gate_b residual_b state_b state_k".split()
    centred, gated, group_size, gate_behind, eps = look.norm or (False, False, k, False, 0.0)
    first, channels, width, silu = look.conv or (0, 0, 2, False)
    rest = FewRowsParams(
        **dict(zip(names, look.strides, strict=True)),
        b=b,
        n=n,
        k=k,
        part=part,
        rows=rows, tiles=tiles, blocks=blocks, per=pieces(k), stride=stride(k),
        group_size=group_size, gate_behind=gate_behind, activation=ACTIVATIONS.index(activation),
        conv_first=first, conv_channels=channels, conv_width=width, silu=silu,
        eps=eps, gate_multiplier=gate_multiplier, multiplier=multiplier,
    )  # fmt: skip
    halved = rows <= 8 and not pairs
    asked = (look.norm, centred, gated, look.conv, activation, pairs, added, halved)
    flags = sum(flag for flag, wanted in zip(FLAGS, asked, strict=True) if wanted)
    group, groups = ring_of(k, most << halved, pieces(k) * ceil_div(tiles, blocks))
    types = ", ".join(TYPES[t] for t in look.types)
    name = f"few_rows<{types}, {columns(part)}, {group}, {groups}, {flags}>"
    return Cut(structs.tail(rest), name, blocks * parts, shared_bytes(part, k, most))


def step_linear(i: StepProduct) -> Tensor:
    """Norm, product, and what is behind it, in one launch."""
    (b, k), n, dtype = i.x.shape, i.weight.shape[0], i.weight.dtype
    norm, conv, residual = i.norm, i.conv, i.residual
    kind = dtype if residual is None else residual.dtype
    out = torch.empty((b, n // 2 if i.gated else n), dtype=kind, device=i.x.device)
    if not out.numel():
        return out
    gate = None if norm is None else norm.gate
    state = None if conv is None else conv.state
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    strides = [0 if m is None else m.stride(0) for m in (i.x, i.weight, gate, residual)]
    look = Look(
        (dtype, i.x.dtype, kind),
        (b, n, k),
        (*strides, *((0, 0) if state is None else state.stride()[:2])),
        None
        if norm is None
        else (norm.centred, gate is not None, norm.group_size or k, norm.norm_before_gate, norm.eps),
        None if conv is None else (conv.first, *conv.weight.shape, conv.silu),
        (i.gated, i.activation, residual is not None, i.gate_multiplier, i.multiplier),
    )
    made = cut(look, processors(i.x.device), _room(i.x.device))
    of_norm = (None, None, None) if norm is None else (norm.weight, norm.bias, gate)
    of_conv = (None, None, None) if conv is None else (state, conv.weight, conv.bias)
    packed = structs.pack(made.tail, i.x, i.weight, i.bias, *of_norm, residual, *of_conv, out)
    nvrtc.launch("few_rows.cu", made.name, packed, made.blocks, 32 * WARPS, made.shared, i.x.device, overlaps=True)
    if state is not None and not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return out

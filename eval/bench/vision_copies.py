"""The four copies of a map, and their sum, as Triton kernels, such as VMamba's authors have (arXiv:2401.10166).

Pure copies, a tile of one channel at a time, read once and written four times, or the reverse. Imported only where there is Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Merge", "Spread"]

TILE = 32


@triton.jit
def _places(H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr):
    # tokens of a tile by rows, the same by columns, and which of them exist
    tile, across = tl.program_id(0), (W + TILE - 1) // TILE
    y = tile // across * TILE + tl.arange(0, TILE)[:, None]
    x = tile % across * TILE + tl.arange(0, TILE)[None, :]
    return y * W + x, x * H + y, (y < H) & (x < W)


@triton.jit
def _spread(maps, rows, C, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr):
    at, turned, there = _places(H, W, TILE)
    c, b, L = tl.program_id(1), tl.program_id(2).to(tl.int64), H * W
    value = tl.load(maps + (b * C + c) * L + at, mask=there)
    to = rows + (b * 4 * C + c) * L
    tl.store(to + at, value, mask=there)
    tl.store(to + C * L + turned, value, mask=there)
    tl.store(to + 2 * C * L + (L - 1 - at), value, mask=there)
    tl.store(to + 3 * C * L + (L - 1 - turned), value, mask=there)


@triton.jit
def _merge(rows, maps, C, H: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr):
    at, turned, there = _places(H, W, TILE)
    c, b, L = tl.program_id(1), tl.program_id(2).to(tl.int64), H * W
    source = rows + (b * 4 * C + c) * L
    total = tl.load(source + at, mask=there).to(tl.float32)
    total += tl.load(source + C * L + turned, mask=there).to(tl.float32)
    total += tl.load(source + 2 * C * L + (L - 1 - at), mask=there).to(tl.float32)
    total += tl.load(source + 3 * C * L + (L - 1 - turned), mask=there).to(tl.float32)
    tl.store(maps + (b * C + c) * L + at, total, mask=there)


def _copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    (b, c, h, w), x = x.shape, x.contiguous()
    rows = torch.empty((b, 4, c, h * w), dtype=dtype, device=x.device)
    _spread[triton.cdiv(h, TILE) * triton.cdiv(w, TILE), c, b](x, rows, c, h, w, TILE)
    return rows


def _summed(rows: Tensor, h: int, w: int, dtype: torch.dtype) -> Tensor:
    (b, _, c, _), rows = rows.shape, rows.contiguous()
    maps = torch.empty((b, c, h, w), dtype=dtype, device=rows.device)
    _merge[triton.cdiv(h, TILE) * triton.cdiv(w, TILE), c, b](rows, maps, c, h, w, TILE)
    return maps


class Spread(torch.autograd.Function):
    """From (b, d, h, w) to its rows, its columns, and both from the end, (b, 4, d, h * w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Copy."""
        ctx.size, ctx.dtype = x.shape[2:], x.dtype
        return _copied(x, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sum, rounded once."""
        h, w = ctx.size
        return _summed(gradient, h, w, ctx.dtype)


class Merge(torch.autograd.Function):
    """From four sequences, and h and w, to their sum where the tokens are, in float32."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, h: int, w: int) -> Tensor:
        """Sum."""
        ctx.dtype, ctx.size = rows.dtype, (h, w)
        return _summed(rows, h, w, torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Copy, in the type that was summed."""
        return _copied(gradient, ctx.dtype), None, None

"""Rotary position embedding (RoFormer, arXiv:2104.09864 §3.4), computed where it is used: no tables, any position."""

import torch
from torch import Tensor

from .common import acc_dtype
from .options import check

__all__ = ["check_rope", "frequencies", "rotate"]


def check_rope(rope: float | None, rotary_dim: int | None, headdim: int, scaling: tuple[float, ...] | None) -> None:
    """Check attention's options of positions: theta, channels that rotate, channels per head, and the stretching."""
    if scaling is not None:
        ok = len(scaling) == 4 and all(number > 0 for number in scaling) and scaling[1] < scaling[2]
        given = f"{list(scaling)} is not (factor, low, high, length). Llama 3.1 has (8, 1, 4, 8192)."
        check(ok, "rope_scaling", given)
    if rope is None:
        return
    check(rope > 0, "rope", f"{rope} is not a base of wavelengths. Use a positive number such as 10000.0, or null.")
    if rotary_dim is None:
        odd = f"{headdim} is odd, and rotary positions turn pairs. Use an even headdim or set rotary_dim."
        check(headdim % 2 == 0, "headdim", odd)
    else:
        check(
            0 < rotary_dim <= headdim and rotary_dim % 2 == 0,
            "rotary_dim",
            f"{rotary_dim} is not an even number of channels up to headdim = {headdim}. "
            "Pick one, or set rope to null for no positions.",
        )


def rotate(
    x: Tensor, pos: Tensor, theta: float, dim: int, interleaved: bool = False, scaling: tuple[float, ...] | None = None
) -> Tensor:
    """Rotate the first ``dim`` channels of every head by an angle that grows with the position.

    Args:
        x: ``(b, l, h, p)``.
        pos: ``(l,)`` or ``(b, l)`` integers.
        theta: Base of the geometric series of wavelengths.
        dim: Channels that rotate, even; the others pass through.
        interleaved: Channels ``(2i, 2i + 1)`` form a pair (GPT-J) instead of ``(i, i + dim / 2)`` (GPT-NeoX, Llama).
        scaling: Llama 3.1's stretching for long contexts: see :func:`_stretched`.

    Returns:
        ``(b, l, h, p)`` in x's dtype; angles and products are in float32 at least.
    """
    acc = acc_dtype(x.dtype)
    frequency = frequencies(theta, dim, scaling, acc, x.device)
    angle = pos[..., None].to(acc) * frequency  # ([b,] l, dim / 2)
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)  # one for all heads
    turn, rest = x[..., :dim].to(acc), x[..., dim:]
    first, second = (turn[..., 0::2], turn[..., 1::2]) if interleaved else turn.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def frequencies(
    theta: float, dim: int, scaling: tuple[float, ...] | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Angles per position of ``dim`` channels' pairs, ``(dim / 2,)``; the rest as for :func:`rotate`."""
    exponent = torch.arange(0, dim, 2, device=device, dtype=dtype) / dim
    # the same expression as in transformers and flash-attn: far out, another rounding is another angle
    frequency = 1.0 / theta**exponent
    return frequency if scaling is None else _stretched(frequency, *scaling)


def _stretched(frequency: Tensor, factor: float, low: float, high: float, length: float) -> Tensor:
    """Long wavelengths become ``factor`` times longer, short ones stay, those between are mixed (arXiv:2407.21783 §3.4.2).

    A wavelength is short if it fits more than ``high`` times into ``length``, the context of the first training stage, and long
    if it fits less than ``low`` times.
    """
    fits = length * frequency / (2 * torch.pi)
    keep = ((fits - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / factor

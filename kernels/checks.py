"""Argument checks of the public ops: one line per mistake, naming the argument and both sizes."""

from typing import Any

import torch
from torch import Tensor

from .seq import Seq

_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def shape(where: str, name: str, x: Tensor | None, want: tuple[int, ...], letters: str) -> None:
    """Raise unless ``x`` is absent or has the shape ``want``, which ``letters`` names."""
    if x is not None and x.shape != want:
        raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected {tuple(want)} {letters}.")


def floating(where: str, name: str, x: Tensor, dims: int, letters: str) -> None:
    """Raise unless ``x`` is a floating-point tensor of ``dims`` dimensions."""
    if x.dim() != dims:
        raise ValueError(f"{where}: {name} has {x.dim()} dimensions, expected {dims} {letters}.")
    if not x.is_floating_point():
        raise ValueError(f"{where}: {name} has dtype {x.dtype}, expected a floating-point one. Embed or cast it first.")


def floats(where: str, **tensors: Tensor | None) -> None:
    """Raise unless every tensor is of a type that is computed in: no integers, complex numbers, or 8 bits."""
    if not _FLOATS.issuperset([x.dtype for x in tensors.values() if x is not None]):
        name, x = next((n, x) for n, x in tensors.items() if x is not None and x.dtype not in _FLOATS)
        raise ValueError(
            f"{where}: {name} has dtype {x.dtype}, expected float16, bfloat16, float32 or float64. Cast it first."
        )


def same_device(where: str, first: str, /, **tensors: Tensor | None) -> None:
    """Raise unless every tensor is where the ``first`` is."""
    x: Any = tensors[first]
    for name, other in tensors.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{where}: {name} is on {other.device}, {first} on {x.device}. Move one of them.")


def groups(where: str, channels: int, g: int, letter: str) -> None:
    """Raise unless ``channels`` is a multiple of the groups of B and C."""
    if g == 0 or channels % g:
        raise ValueError(f"{where}: {letter} = {channels} is not a multiple of the {g} groups of B and C.")


def fits(where: str, seq: Seq | None, x: Tensor) -> None:
    """Raise unless ``seq`` describes the rows of ``x``, ``(b, l, ...)``, and is where they are, if it says anything of them."""
    if seq is None:
        return
    if seq.doc.shape != x.shape[:2]:
        raise ValueError(
            f"{where}: seq describes {tuple(seq.doc.shape)} tokens, the input has {tuple(x.shape[:2])} (b, l)."
        )
    if (seq.packed or seq.padded) and seq.doc.device != x.device:
        raise ValueError(
            f"{where}: seq is on {seq.doc.device}, the input on {x.device}. Make it with device={str(x.device)!r}."
        )


def is_silu(where: str, activation: str | None) -> bool:
    """Tell whether the activation is SiLU; raise if it is neither that nor ``None``."""
    if activation not in (None, "silu"):
        raise ValueError(f"{where}: activation is {activation!r}, expected 'silu' or None.")
    return activation == "silu"

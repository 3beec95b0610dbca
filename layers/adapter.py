"""A low-rank addition to a linear layer (LoRA, arXiv:2106.09685), part of the model from the start.

A block that stands in several places of a pattern shares its weights between them; what is in an adapter is not shared, so every use
can differ a little from the others for few parameters (Zamba2, arXiv:2411.15242; Relaxed Recursive Transformers, arXiv:2410.20672).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .common import Device, Dtype, linear, reset_linear

__all__ = ["Adapter"]


class Adapter(nn.Module):
    """``up_i(down_i(x))`` for each part ``i`` of a linear layer's outputs, to be added to them.

    Args:
        d_in: Channels in.
        sizes: Channels out, part by part: of q, k and v, say. Every part has a ``down`` of its own.
        rank: Channels between ``down`` and ``up``.
        device, dtype: As for ``torch.nn.Linear``.
    """

    def __init__(self, d_in: int, sizes: Sequence[int], rank: int, device: Device = None, dtype: Dtype = None):
        super().__init__()
        self.down = linear(d_in, len(sizes) * rank, False, device, dtype)
        self.up = nn.ModuleList(linear(rank, size, False, device, dtype) for size in sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``down`` and zero ``up``: at first, an adapter adds nothing."""
        reset_linear(self.down)
        for weight in self.up.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_in)`` to ``(..., sum(sizes))``."""
        parts = self.down(x).chunk(len(self.up), dim=-1)
        return torch.cat([up(part) for up, part in zip(self.up, parts, strict=True)], dim=-1)

    def flops(self) -> int:
        """FLOPs per token, 2 per multiply-add."""
        parts: list[Any] = [self.down, *self.up]
        return 2 * sum(part.in_features * part.out_features for part in parts)

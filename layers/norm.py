"""Normalisation by the root mean square (RMSNorm, arXiv:1910.07467), plain and gated (Mamba-2, arXiv:2405.21060 §6.2); and LayerNorm.

Statistics are in float32 at least, whatever the input; the output has the input's dtype, also under autocast, unless another is asked
for.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import branch_layer_norm, branch_rms_norm, gated_rms_norm
from ..kernels.norm.op import plain_layer_norm
from ..kernels.numerics import HALVES
from .common import Device, Dtype, autocasts
from .recompute import recomputing, repeatable

__all__ = ["NORMS", "GatedRMSNorm", "LayerNorm", "RMSNorm", "make_norm"]


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension.

    Args:
        d: Channels.
        eps: Added to the mean square.
        affine: Whether there is a weight; Falcon-Mamba's norms on dt, B and C have none.
        device, dtype: As for ``torch.nn.Linear``.
    """

    def __init__(self, d: int, eps: float = 1e-5, *, affine: bool = True, device: Device = None, dtype: Dtype = None):
        super().__init__()
        self.d, self.eps = d, eps
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype)) if affine else None

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, dtype: torch.dtype | None = None, *, branch: bool = False, add: Tensor | None = None
    ) -> Any:
        """Normalise ``(..., d)``.

        Args:
            x: ``(..., d)``.
            dtype: Of the output; x's by default.
            branch: Also return x, to go on with past whatever the output goes into (:func:`hybridzoo.kernels.branch_rms_norm`).
            add: ``(..., d)``, added to x first.
        """
        h, past = branch_rms_norm(x, self.weight, self.eps, dtype, add=add)
        if not branch:
            return h
        # a linear layer behind it need not keep what is a pass over x to form again; the x that went past may be a view, and with it
        # autograd would complain of an in-place operation before the recipe can say what to do
        read = x if add is None else past
        return repeatable(h, _normed, read, self.weight, self.eps, dtype, autocasts(x)), past

    def extra_repr(self) -> str:
        """Size and eps, for ``print(model)``."""
        return f"{self.d}, eps={self.eps}" + ("" if self.weight is not None else ", affine=False")


def _normed(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype | None, autocast: bool) -> Tensor:
    # autocast decides where PyTorch's own norm rounds
    with torch.autocast(x.device.type, enabled=autocast):
        return branch_rms_norm(x, weight, eps, dtype)[0]


class GatedRMSNorm(nn.Module):
    """``rmsnorm(x * silu(z))``, or ``rmsnorm(x) * silu(z)``, per group of channels.

    Args:
        d: Channels.
        eps: Added to the mean square.
        group_size: Channels that share one root mean square; all of them by default.
        norm_before_gate: Normalise first, then gate. Mamba-2 gates first.
        device, dtype: As for ``torch.nn.Linear``.
    """

    def __init__(
        self,
        d: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        group_size = group_size or d
        if d % group_size:
            raise ValueError(
                f"GatedRMSNorm: d = {d} is not a multiple of group_size = {group_size}. Pick a divisor of {d}."
            )
        self.d, self.eps, self.group_size, self.norm_before_gate = d, eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalise and gate ``x``, both ``(..., d)``; in ``x``'s dtype."""
        return gated_rms_norm(x, z, self.weight, self.eps, self.group_size, self.norm_before_gate)

    def extra_repr(self) -> str:
        """Sizes and order, for ``print(model)``."""
        return f"{self.d}, eps={self.eps}, group_size={self.group_size}, norm_before_gate={self.norm_before_gate}"


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, for inputs of another precision than the weights: a float32 residual stream in a half-precision model."""

    def forward(
        self, x: Tensor, dtype: torch.dtype | None = None, *, branch: bool = False, add: Tensor | None = None
    ) -> Any:
        """As :meth:`RMSNorm.forward`."""
        how = self.weight, self.bias, self.eps, dtype
        h, past = branch_layer_norm(x, *how, add=add, plain=_sparing)
        h = repeatable(h, _layer_normed, x if add is None else past, *how, autocasts(x))
        return (h, past) if branch else h


def _sparing(x: Tensor, *how: Any) -> Tensor:
    with recomputing() as spared:
        # autocast would make it wide, too, and then keep the wide one
        wide = repeatable(x.float(), Tensor.float, x) if autocasts(x) and x.dtype in HALVES else x
        return plain_layer_norm(spared(wide), *how)


def _layer_normed(x: Tensor, *how: Any) -> Tensor:
    *options, autocast = how
    # as it was in the forward, whatever autocast says by now
    with torch.autocast(x.device.type, enabled=autocast):
        return branch_layer_norm(x, *options)[0]


NORMS: dict[str, type[RMSNorm | LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def make_norm(type: str, d: int, eps: float, device: Device = None, dtype: Dtype = None) -> nn.Module:
    """The residual stream's norm by its config name.

    Args:
        type: A name in :data:`NORMS`.
        d: Channels.
        eps: Added to the mean square, or the variance.
        device: As for ``torch.nn.Linear``.
        dtype: As for ``torch.nn.Linear``.

    Raises:
        ValueError: Unknown type.
    """
    if type not in NORMS:
        raise ValueError(f"norm.type: unknown norm {type!r}. Known: {', '.join(map(repr, NORMS))}.")
    return NORMS[type](d, eps, device=device, dtype=dtype)

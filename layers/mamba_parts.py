"""Mamba's parts between its outer projections (arXiv:2312.00752, Figure 3), of which each way along the rows may have its own."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Device, Dtype, acc_dtype, linear, reset_decays, reset_dt_bias, reset_linear
from .conv import CausalConv1d
from .directions import names_of
from .norm import RMSNorm
from .recompute import repeatable

__all__ = ["NAMES", "Parts", "StepProjection"]


class StepProjection(nn.Linear):
    """The step sizes' projection, a linear layer whose bias is float32 whatever its weight is, and with it the output.

    Where nothing is put around it or in its place, the layer takes the product alone, and the scan adds the bias.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Project ``(..., dt_rank)`` to ``(..., d_inner)``; in the wider of the product's and the bias's type."""
        out = self.product(x)
        return out if self.bias is None else out + self.bias

    def product(self, x: Tensor) -> Tensor:
        """The same without the bias."""
        out = F.linear(x, self.weight)
        return repeatable(out, _project, x, self.weight, out.dtype)


def _project(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    # what autocast made of the operands, wherever the backward runs
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype))


class Parts(NamedTuple):
    """A filter, the projections from its outputs, decay rates and skip; and norms of dt, B and C, if they have any."""

    conv1d: CausalConv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor
    dt_norm: RMSNorm | None
    b_norm: RMSNorm | None
    c_norm: RMSNorm | None

    @classmethod
    def of(
        cls, conv: CausalConv1d, sizes: tuple[int, int], bias: bool, norm: Any, device: Device, dtype: Dtype
    ) -> "Parts":
        """Build what stands behind a filter: ``sizes`` are the step sizes' rank and the states; ``bias`` is that of ``x_proj``."""
        d, (r, n), pinned = len(conv.weight), sizes, acc_dtype(dtype)
        steps = linear(r, d, False, device, dtype, StepProjection)
        steps.bias = nn.Parameter(torch.empty(d, device=device, dtype=pinned))
        A_log, D = (nn.Parameter(torch.empty(shape, device=device, dtype=pinned)) for shape in ((d, n), (d,)))
        norms = (norm(size, device=device, dtype=dtype) if norm else None for size in (r, n, n))
        return cls(conv, linear(d, r + 2 * n, bias, device, dtype), steps, A_log, D, *norms)

    @torch.no_grad()
    def reset(self, dt_range: tuple[float, float, float], bound: float) -> None:
        """Draw the initial values as mamba-ssm does: A = -1 ... -n, D = 1, step sizes log-uniform, their weight up to ``bound``."""
        self.conv1d.reset_parameters()
        reset_linear(self.x_proj)
        reset_dt_bias(self.dt_proj.bias, *dt_range)
        self.dt_proj.weight.uniform_(-bound, bound)
        reset_decays(self.A_log)
        self.D.fill_(1.0)
        for norm in (self.dt_norm, self.b_norm, self.c_norm):
            if norm is not None:
                norm.reset_parameters()


NAMES = names_of(Parts)

"""Mamba's parts between its outer projections (arXiv:2312.00752, Figure 3), of which each way along the rows may have its own."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import ScanNorms, Seq, selective_scan, selective_state_update, step_linear
from ..kernels.gpu.operands import eager
from ..kernels.step.cuda import LOW_ROWS
from .common import Device, Dtype, acc_dtype, autocasts, linear, reset_decays, reset_dt_bias, reset_linear, upcast
from .conv import CausalConv1d
from .directions import names_of
from .norm import RMSNorm
from .options import check
from .recompute import repeatable

__all__ = ["NAMES", "Parts", "StepProjection", "check_constant"]


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


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """The product of a token, ``(b, k)``, by the kernel of few rows where that can and pays: of weights this small, with any number."""
    if x.is_cuda and x.dtype == weight.dtype and eager(x) and not autocasts(x):
        return step_linear(x, weight)
    return F.linear(x, weight)


def check_constant(directions: int, **others: Any) -> None:
    """Refuse options of a layer that is not selective which need what it has not: projections to dt, B and C, or a way back.

    Raises:
        OptionError: One of ``others`` is set, or rows are read in both directions.
    """
    for name, value in others.items():
        lacks = f"{value} is about projections to dt, B and C, and selective: false has none. Leave out one of the two."
        check(not value, name, lacks)
    check(directions == 1, "directions", f"{directions} is for selective layers. Use 1, or leave out selective: false.")


class Parts(NamedTuple):
    """A filter, the projections from its outputs, decay rates and skip; and norms of dt, B and C, if they have any.

    In place of projections, a layer that is not selective has B and C, ``(d_inner, n)``, and ``dt_bias``, ``(d_inner,)``, themselves.
    """

    conv1d: CausalConv1d
    x_proj: Any
    dt_proj: Any
    A_log: Tensor
    D: Tensor
    dt_norm: RMSNorm | None = None
    b_norm: RMSNorm | None = None
    c_norm: RMSNorm | None = None
    B: Tensor | None = None
    C: Tensor | None = None
    dt_bias: Tensor | None = None

    @classmethod
    def of(
        cls, conv: CausalConv1d, sizes: tuple[int, int], bias: bool, norm: Any, device: Device, dtype: Dtype
    ) -> "Parts":
        """Build what stands behind a filter: ``sizes`` are the step sizes' rank and the states; ``bias`` is that of ``x_proj``.

        Without a rank, 0, nothing is projected.
        """
        d, (r, n), pinned = len(conv.weight), sizes, acc_dtype(dtype)

        def empty(*shape: int, dtype: Dtype = pinned) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if not r:
            B, C = (empty(d, n, dtype=dtype) for _ in "BC")
            return cls(conv, None, None, empty(d, n), empty(d), B=B, C=C, dt_bias=empty(d))
        steps = linear(r, d, False, device, dtype, StepProjection)
        steps.bias = empty(d)
        norms = (norm(size, device=device, dtype=dtype) if norm else None for size in (r, n, n))
        return cls(conv, linear(d, r + 2 * n, bias, device, dtype), steps, empty(d, n), empty(d), *norms)

    def step(self, u: Tensor, z: Tensor, state: Tensor) -> Tensor:
        """Scan one token per row and gate it, ``(b, d_inner)``, where no part has to be called; ``state`` is updated in place.

        The kernel norms, and forms rates and, of a few rows, step sizes.
        """
        norms, weight = None, self.dt_proj.weight
        dt, B, C = self._projected(u)
        if self.dt_norm is not None and self.b_norm is not None and self.c_norm is not None:
            norms = ScanNorms(self.dt_norm.eps, self.dt_norm.weight, self.b_norm.weight, self.c_norm.weight)
        elif len(u) > LOW_ROWS:
            dt, weight = _product(dt, weight), None
        return selective_state_update(
            state, u, dt, self.A_log, B, C, self.D, z, dt_weight=weight, norms=norms, log_rates=True,
            dt_bias=upcast(self.dt_proj.bias), dt_softplus=True,
        )  # fmt: skip

    def read(self, u: Tensor, z: Tensor, A: Tensor, state: Tensor, seq: Seq) -> tuple[Tensor, Tensor]:
        """Scan a few tokens per row and gate them, ``(b, w, d_inner)``, where no part has to be called; also give the new state."""
        rows = u.shape[:2]
        dt, B, C = self._projected(u.flatten(0, 1))
        if self.dt_norm is not None and self.b_norm is not None and self.c_norm is not None:
            dt, B, C = self.dt_norm(dt), self.b_norm(B), self.c_norm(C)
        dt, B, C = (x.unflatten(0, rows) for x in (_product(dt, self.dt_proj.weight), B, C))
        return selective_scan(
            u, dt, A, B, C, self.D, z, dt_bias=upcast(self.dt_proj.bias), dt_softplus=True, initial_state=state, seq=seq,
            return_final_state=True,
        )  # fmt: skip

    def _projected(self, u: Tensor) -> tuple[Tensor, ...]:
        (r, n) = self.dt_proj.weight.shape[1], self.A_log.shape[1]
        return _product(u, self.x_proj.weight).split([r, n, n], dim=-1)

    @torch.no_grad()
    def reset(self, dt_range: tuple[float, float, float], bound: float) -> None:
        """Draw the initial values as mamba-ssm does: A = -1 ... -n, D = 1, step sizes log-uniform, their weight up to ``bound``.

        B that is no function of the input begins as 1 and C normal, those of S4D (arXiv:2206.11893, section 4).
        """
        self.conv1d.reset_parameters()
        if self.B is not None and self.C is not None and self.dt_bias is not None:
            nn.init.ones_(self.B)
            nn.init.normal_(self.C)
            reset_dt_bias(self.dt_bias, *dt_range)
        else:
            reset_linear(self.x_proj)
            reset_dt_bias(self.dt_proj.bias, *dt_range)
            self.dt_proj.weight.uniform_(-bound, bound)
        reset_decays(self.A_log)
        self.D.fill_(1.0)
        for norm in (self.dt_norm, self.b_norm, self.c_norm):
            if norm is not None:
                norm.reset_parameters()


NAMES = names_of(Parts)

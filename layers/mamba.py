"""Mamba, the selective state space layer (arXiv:2312.00752, Figure 3 and Algorithm 2).

Same parameters, names and initialisation as mamba-ssm's ``Mamba``. Different from it: the state is float32 whatever
the model's precision, it can be carried in and out of ``forward`` with gradients, rows may be padded or packed, and
projections with hooks or adapters such as LoRA are called as modules. Without any, a GPU trains the layer as one node of autograd.
"""

import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import BackendError, selective_scan, selective_state_update
from ..kernels.dispatch import ENV, choose
from ..kernels.gpu.operands import eager
from ..kernels.mamba_layer import Weights, mamba_layer
from ..kernels.torch_private import saved_tensors_are_handled
from .base import Aux, Mixer, Seq, State
from .common import (
    Device,
    Dtype,
    acc_dtype,
    called,
    dtype_read,
    hooked_everywhere,
    linear,
    reset_decays,
    reset_dt_bias,
    reset_linear,
    upcast,
    why_called,
)
from .conv import CausalConv1d
from .norm import RMSNorm
from .options import check, check_dt, check_positive
from .recompute import left_alone, recipe, recomputing, repeatable

__all__ = ["Mamba", "MambaState"]


@dataclass
class MambaState(State):
    """The state of a Mamba layer.

    Attributes:
        conv: ``(b, d_conv - 1, d_inner)``, the last inputs of the convolution.
        ssm: ``(b, d_inner, d_state)``, float32.
    """

    conv: Tensor
    ssm: Tensor


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


@functools.lru_cache(maxsize=256)
def _ours(device: torch.device, dtype: torch.dtype, d_state: int, width: int, normed: bool, wish: str | None) -> bool:
    # ``wish`` is what dispatch reads in the environment; asking it takes as long as a product
    facts: dict[str, Any] = {"d_state": d_state, "width": width, "normed": normed}
    try:
        return choose("mamba_layer", device=device.type, dtype=dtype, **facts).name == "cuda"
    except BackendError:
        # what was asked for cannot be: the parts say which of them, and why
        return False


def _dt_rank(d_model: int) -> int:
    return math.ceil(d_model / 16)


class Mamba(Mixer):
    """Mamba's mixer: project, convolve, scan with input-dependent step sizes, gate, project.

    Args:
        d_model: Channels of the residual stream.
        d_state: State size per channel, ``n``.
        d_conv: Width of the causal convolution.
        expand: ``d_inner = expand * d_model``.
        dt_rank: Rank of the step size's projection; ``ceil(d_model / 16)`` by default.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        dt_init_floor: Lower bound of the initial step sizes.
        dt_scale: Scale of the step size projection's initial weights.
        bias: Whether ``in_proj`` and ``out_proj`` have a bias.
        conv_bias: Whether the convolution has a bias.
        bcdt_norm: Whether dt, B and C are RMS-normalised (Jamba, arXiv:2403.19887; Falcon-Mamba, arXiv:2410.05355).
        bcdt_norm_affine: Whether those norms are learned (Jamba) or have no weight (Falcon-Mamba).
        bcdt_norm_eps: Their epsilon.
        layer_idx, n_layer: Place among the residual blocks; ``out_proj`` is drawn smaller by the square root of their number.
        device, dtype: As for ``torch.nn.Linear``; ``A_log``, ``D`` and ``dt_proj.bias`` are float32 at least.

    Raises:
        OptionError: An option cannot work.
    """

    fp32_parameters = ("A_log", "D", "dt_proj.bias")
    no_decay_parameters = ("A_log", "D", "dt_proj.bias")
    without_effect = frozenset({"dt_min", "dt_max", "dt_init_floor", "dt_scale"})
    rounds_input = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_scale: float = 1.0,
        bias: bool = False,
        conv_bias: bool = True,
        bcdt_norm: bool = False,
        bcdt_norm_affine: bool = True,
        bcdt_norm_eps: float = 1e-6,
        layer_idx: int = 0,
        n_layer: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank)
        check_dt(dt_min, dt_max, dt_init_floor)
        check(bcdt_norm_eps > 0, "bcdt_norm_eps", f"{bcdt_norm_eps} is not positive. The usual value is 1e-6.")
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, expand * d_model
        self.dt_rank = dt_rank or _dt_rank(d_model)
        self.dt_range, self.dt_scale = (dt_min, dt_max, dt_init_floor), dt_scale
        pinned = acc_dtype(dtype)

        self.in_proj = linear(d_model, 2 * self.d_inner, bias, device, dtype)
        self.conv1d = CausalConv1d(self.d_inner, d_conv, conv_bias, "silu", device, dtype)
        self.x_proj = linear(self.d_inner, self.dt_rank + 2 * d_state, False, device, dtype)
        self.dt_proj = linear(self.dt_rank, self.d_inner, False, device, dtype, StepProjection)
        self.dt_proj.bias = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=pinned))
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, device=device, dtype=pinned))
        self.D = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=pinned))
        norm = functools.partial(RMSNorm, eps=bcdt_norm_eps, affine=bcdt_norm_affine, device=device, dtype=dtype)
        sizes = self.dt_rank, d_state, d_state
        self.dt_norm, self.b_norm, self.c_norm = (norm(size) if bcdt_norm else None for size in sizes)
        self.out_proj = linear(self.d_inner, d_model, bias, device, dtype)
        # where nothing has been put around a part or in its place
        self.kinds = {name: type(part) for name, part in self.named_children()}
        self.reset_parameters(layer_idx, n_layer)

    @classmethod
    def effective_options(cls, options: dict[str, Any], d_model: int) -> dict[str, Any]:
        """As :meth:`Mixer.effective_options`."""
        o = super().effective_options(options, d_model)
        o["dt_rank"] = o["dt_rank"] or _dt_rank(d_model)
        return o if o["bcdt_norm"] else o | {"bcdt_norm_affine": None, "bcdt_norm_eps": None}

    @torch.no_grad()
    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1) -> None:
        """Draw the initial values as mamba-ssm does: A = -1 ... -n, D = 1, step sizes log-uniform."""
        if self.A_log.is_meta:
            return  # nothing to draw, and arithmetic on meta tensors would import the compiler: seconds
        reset_linear(self.in_proj)
        self.conv1d.reset_parameters()
        reset_linear(self.x_proj)
        reset_dt_bias(self.dt_proj.bias, *self.dt_range)
        bound = self.dt_rank**-0.5 * self.dt_scale
        self.dt_proj.weight.uniform_(-bound, bound)
        reset_decays(self.A_log)
        self.D.fill_(1.0)
        for norm in (self.dt_norm, self.b_norm, self.c_norm):
            if norm is not None:
                norm.reset_parameters()
        reset_linear(self.out_proj, shrink=n_layer**0.5)

    def forward(
        self, x: Tensor, state: Any = None, seq: Seq | None = None, aux: Aux = None, *, return_state: bool = False
    ) -> Any:
        """Mix ``(b, l, d)`` along its rows; see :meth:`Mixer.forward`."""
        given, (x, seq) = seq, self._enter(x, state, seq)
        if not return_state and state is None and (weights := self._as_one(x)) is not None:
            again = None if saved_tensors_are_handled() else recipe(x)
            eps = None if self.dt_norm is None else self.dt_norm.eps
            y = mamba_layer(x, weights, seq, dtype_read(x), None if again is None else again.parts(), eps)
            return self._leave(y, given)
        with recomputing() as spared:
            u, z = self.in_proj(spared(x)).chunk(2, dim=-1)  # (b, l, d_inner)
        u, conv = self.conv1d(u, None if state is None else state.conv, seq, return_state)
        with recomputing() as spared:
            dt, A, B, C, options = self._scan_inputs(spared(u), z)
            before = None if state is None else state.ssm
            options |= {"initial_state": before, "seq": seq, "return_final_state": return_state}
            out = selective_scan(u, spared(dt), A, B, C, **options)
        y, *ssm = out if return_state else (out,)
        y = self._leave(self.out_proj(y), given)
        return (y, MambaState(conv, *ssm)) if return_state else y

    def _as_one(self, x: Tensor) -> Weights | None:
        """The weights, where forward and backward may be one node of autograd: plain tensors, to be differentiated, on a GPU of ours."""
        if left_alone() or x.dim() != 3 or not x.numel() or self._why_called():
            return None
        inner, conv, outer = self.in_proj, self.conv1d, self.out_proj
        steps = self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias
        norms = [None if m is None else m.weight for m in (self.dt_norm, self.b_norm, self.c_norm)]
        states = self.A_log, self.D
        w = Weights(inner.weight, inner.bias, conv.weight, conv.bias, *steps, *states, outer.weight, outer.bias, *norms)
        device, wanted = x.device, x.requires_grad
        for p in w:
            if p is not None:
                if not eager(p) or p.device != device:
                    return None
                wanted |= p.requires_grad
        each = {m.dtype: m for m in (x, w.in_proj, w.x_proj, w.dt_proj, w.out_proj)}
        dtype, *others = {dtype_read(m) for m in each.values()}
        if not wanted or not eager(x) or others:
            return None
        ours = _ours(device, dtype, self.d_state, w.conv.shape[-1], self.dt_norm is not None, os.environ.get(ENV))
        return w if ours else None

    def _why_called(self) -> str | None:
        """Say why the parts have to be called one by one; ``None`` if nothing asks for it."""
        if hooked_everywhere():
            return "there are hooks on all modules"
        for name, kind in self.kinds.items():
            why = why_called(getattr(self, name), kind)
            if why is not None:
                return f"{name} {why}"
        if self.x_proj.bias is not None or self.dt_proj.bias is None:
            return "x_proj has a bias, or dt_proj has none"
        if len({None if m is None else m.eps for m in (self.dt_norm, self.b_norm, self.c_norm)}) > 1:
            return "the norms of dt, B and C have different eps"
        return None

    def step(self, x: Tensor, state: MambaState) -> Tensor:
        """Mix one token per row, ``(b, d)``, and update ``state`` in place."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv1d.step(u, state.conv)
        dt, A, B, C, options = self._scan_inputs(u, z)
        return self.out_proj(selective_state_update(state.ssm, u, dt, A, B.unsqueeze(1), C.unsqueeze(1), **options))

    def _scan_inputs(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        # dt (..., d_inner), A (d_inner, n), B and C (..., n), and the rest by name
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.dt_norm is not None and self.b_norm is not None and self.c_norm is not None:
            dt, B, C = self.dt_norm(dt), self.b_norm(B), self.c_norm(C)
        steps: Any = self.dt_proj
        # a bias of somebody else's may be adapted, quantised, or elsewhere until the module is called
        whole = called(steps, StepProjection) or steps.bias is None
        options = {"D": self.D, "z": z, "dt_bias": None if whole else upcast(steps.bias), "dt_softplus": True}
        return steps(dt) if whole else steps.product(dt), -upcast(self.A_log).exp(), B, C, options

    def init_state(self, batch: int, max_len: int = 0, device: Device = None, dtype: Dtype = None) -> MambaState:
        """Zeros: ``conv`` in ``dtype``, ``ssm`` in float32."""
        device, dtype = device or self._device, dtype or self._dtype
        return MambaState(
            conv=torch.zeros(batch, self.d_conv - 1, self.d_inner, device=device, dtype=dtype),
            ssm=torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=acc_dtype(dtype)),
        )

    def flops(self, seq_len: int) -> int:
        """FLOPs per token: 2 per multiply-add of projections and convolution, 9 n per channel for the scan, 1 for D.

        The scan's 9 is the field's count (state-spaces/mamba#110).
        """
        d, r, n = self.d_inner, self.dt_rank, self.d_state
        # of sizes, not of weights, which quantised layers keep in other shapes
        weights = 3 * self.d_model * d + (r + 2 * n) * d + r * d + self.d_conv * d
        return 2 * weights + d * (9 * n + 1)

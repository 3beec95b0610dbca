"""Mamba, the selective state space layer (arXiv:2312.00752, Figure 3 and Algorithm 2).

Same parameters, names and initialisation as mamba-ssm's ``Mamba``. Different from it: the state is float32 whatever
the model's precision, it can be carried in and out of ``forward`` with gradients, rows may be padded or packed, and
projections with hooks or adapters such as LoRA are called as modules. Without any, a GPU trains the layer as one node of autograd.

In both directions it is Vim's (arXiv:2401.09417, "bimamba v2"), with the same names again, or with one set of parameters for both; either
is equivariant under reverse complements if it is to be (Caduceus, arXiv:2403.03234).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import selective_scan, selective_state_update
from ..kernels.mamba_layer import Weights, mamba_layer
from . import one_node
from .base import Seq, State
from .common import Device, Dtype, acc_dtype, called, dtype_read, linear, reset_linear, scaled, upcast
from .conv import CausalConv1d
from .directions import Directions, RowMixer, silenced
from .mamba_parts import NAMES, Parts, StepProjection, check_constant
from .norm import RMSNorm
from .options import check, check_dt, check_positive
from .recompute import recomputing
from .turning import turning

__all__ = ["Mamba", "MambaState"]


@dataclass
class MambaState(State):
    """The state of a Mamba layer.

    Attributes:
        conv: ``(b, d_conv - 1, d_inner)``, the last inputs of the convolution.
        ssm: ``(b, d_inner, d_state)``, float32 unless asked otherwise.
    """

    recurrent = ("ssm",)
    conv: Tensor
    ssm: Tensor


def _dt_rank(d_model: int) -> int:
    return math.ceil(d_model / 16)


class Mamba(RowMixer):
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
        x_proj_bias: Whether the projection to dt, B and C has a bias.
        dt_offset: Added to the step sizes after softplus.
        directions: 1, from the first token on; 2, also from the last one back. Then the mixer is not causal and has no state.
        tie_directions: ``"none"``: the way back has a convolution, ``x_proj``, ``dt_proj``, ``A`` and ``D`` of its own, named
            ``conv1d_b`` and so on (Vim); ``"all"``: one set for both.
        combine_directions: ``"sum"`` or ``"mean"`` of both outputs (Vim: mean), in front of ``out_proj``.
        conv_padding: ``"causal"``, each way reads the tokens that it has passed; ``"same"``, both read around a token, in the row's own
            order: of a width of 4, one before it and two behind.
        reverse_complement: Whether the layer is equivariant under reverse complements (:mod:`.reverse_complement`): each half of the
            channels is one strand's, and the parameters are those of a layer of ``d_model / 2``.
        selective: Whether dt, B and C are functions of the input; otherwise parameters of each channel, the time-invariant layer of
            the paper's ablation (Algorithm 1), S4D-Real with Mamba's A, D and step sizes, in one direction.
        gate: Whether the output is gated, by the half of ``in_proj`` that is left out without.
        layer_idx, n_layer: Place among the residual blocks; ``out_proj`` is drawn smaller by the square root of their number.
        device, dtype: As for ``torch.nn.Linear``; ``A_log``, ``D`` and ``dt_proj.bias`` are float32 at least.

    Raises:
        OptionError: An option cannot work.
    """

    fp32_parameters = ("A_log", "D", "dt_proj.bias")
    no_decay_parameters = fp32_parameters
    without_effect = frozenset({"dt_min", "dt_max", "dt_init_floor", "dt_scale"})
    rounds_input = True
    # these, and on the way back those of the same names with a _b, are set one way after the other
    conv1d: CausalConv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    B: nn.Parameter | None
    dt_norm: RMSNorm | None
    b_norm: RMSNorm | None
    c_norm: RMSNorm | None

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
        x_proj_bias: bool = False,
        dt_offset: float = 0.0,
        directions: int = 1,
        tie_directions: str = "none",
        combine_directions: str = "sum",
        conv_padding: str = "causal",
        reverse_complement: bool = False,
        selective: bool = True,
        gate: bool = True,
        layer_idx: int = 0,
        n_layer: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank)
        check_dt(dt_min, dt_max, dt_init_floor)
        check(bcdt_norm_eps > 0, "bcdt_norm_eps", f"{bcdt_norm_eps} is not positive. The usual value is 1e-6.")
        check(dt_offset >= 0, "dt_offset", f"{dt_offset} is negative, and step sizes are not. Use 0 or more.")
        ways = Directions.of(directions, tie_directions, combine_directions, conv_padding, reverse_complement)
        if not selective:
            options = {"dt_rank": dt_rank, "bcdt_norm": bcdt_norm, "x_proj_bias": x_proj_bias, "dt_offset": dt_offset}
            check_constant(directions, **options)
            self.fp32_parameters = ("A_log", "D", "dt_bias")  # type: ignore[misc]
            self.no_decay_parameters = (*self.fp32_parameters, "B")  # type: ignore
        width = self._go(ways, d_model)
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, expand * width
        self.dt_rank = (dt_rank or _dt_rank(width)) if selective else 0
        self.dt_range, self.dt_scale, self.dt_offset = (dt_min, dt_max, dt_init_floor), dt_scale, dt_offset
        self.gate = gate

        self.in_proj = linear(width, self.d_inner * (2 if gate else 1), bias, device, dtype)
        norm = functools.partial(RMSNorm, eps=bcdt_norm_eps, affine=bcdt_norm_affine) if bcdt_norm else None
        for own in self.ways.sets:
            conv = self.ways.convolution(self.d_inner, d_conv, conv_bias, device, dtype)
            self._set(NAMES[own], Parts.of(conv, (self.dt_rank, d_state), x_proj_bias, norm, device, dtype))
        self.out_proj = linear(self.d_inner, width, bias, device, dtype)
        # where nothing has been put around a part or in its place
        self.kinds = {name: type(part) for name, part in self.named_children()}
        self.reset_parameters(layer_idx, n_layer)

    def parts(self, own: str = "") -> Parts:
        """The parts of a way, by the end of their names."""
        return Parts(*[getattr(self, name) for name in NAMES[own]])

    @classmethod
    def effective_options(cls, options: dict[str, Any], d_model: int) -> dict[str, Any]:
        """As :meth:`Mixer.effective_options`."""
        o = super().effective_options(options, d_model)
        o |= Directions.effective(o)
        o["dt_rank"] = o["dt_rank"] or _dt_rank(d_model // 2 if o["reverse_complement"] else d_model)
        o["dt_rank"] = o["dt_rank"] if o["selective"] else None
        return o if o["bcdt_norm"] else o | {"bcdt_norm_affine": None, "bcdt_norm_eps": None}

    @torch.no_grad()
    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1) -> None:
        """Draw the initial values as mamba-ssm does: A = -1 ... -n, D = 1, step sizes log-uniform."""
        if self.A_log.is_meta:
            return  # nothing to draw, and arithmetic on meta tensors would import the compiler: seconds
        reset_linear(self.in_proj)
        for p in map(self.parts, self.ways.sets):
            p.reset(self.dt_range, (self.dt_rank or 1) ** -0.5 * self.dt_scale)
        reset_linear(self.out_proj, shrink=n_layer**0.5)

    def _along(self, x: Tensor, state: Any, seq: Seq | None, return_state: bool) -> Any:
        given, (x, seq) = seq, self._enter(x, state, seq)
        if not return_state and state is None and (weights := self._as_one(x)) is not None:
            eps = None if self.dt_norm is None else self.dt_norm.eps
            y = mamba_layer(x, weights, seq, dtype_read(x), one_node.again(x), eps)
            return self._leave(y, given)
        with recomputing() as spared:
            u, z = self._gated(self.in_proj(spared(x)))  # (b, l, d_inner)
        u, conv = self.conv1d(u, None if state is None else state.conv, seq, return_state)
        with recomputing() as spared:
            dt, A, B, C, options = self._scan_inputs(spared(u), z, self.parts())
            before = None if state is None else state.ssm
            options |= {"initial_state": before, "seq": seq, "return_final_state": return_state}
            out = selective_scan(u, spared(dt), A, B, C, **options)
        y, *ssm = out if return_state else (out,)
        y = self._leave(self.out_proj(y), given)
        return (y, MambaState(conv, *ssm)) if return_state else y

    def _both(self, x: Tensor, seq: Seq | None) -> Tensor:
        given, (x, seq) = seq, self._enter(x, None, seq)
        with recomputing() as spared:
            xz = self.in_proj(spared(x))
        there, back = ((1, x.shape[1], 0, 1, reverse) for reverse in (0, 1))
        if seq is not None and seq.packed:
            turn = turning(seq)
            y = self._way(xz, seq) + turn(self._way(turn(xz), seq, back=True))
        elif self.ways.joined:
            y = self._way(xz, seq, [there, back])
        else:
            y = self._way(xz, seq) + self._way(xz, seq, [back], back=True)
        return self._leave(self.out_proj(scaled(y, self.ways.share)), given)

    def _way(self, xz: Tensor, seq: Seq | None, paths: Any = None, back: bool = False) -> Tensor:
        """Convolve and scan along ``paths``; without, from the first token to the last, which on the way back are those of turned rows."""
        p, (u, z) = self.parts(self.ways.sets[-1] if back else ""), self._gated(xz)
        u = p.conv1d(u, seq=seq, mirrored=self.ways.mirrored(back, turned=paths is None))
        if paths is not None:
            # what a walk meets before the last token leaves no trace
            u, seq = silenced(u, seq), None
        with recomputing() as spared:
            dt, A, B, C, options = self._scan_inputs(spared(u), z, p)
            return selective_scan(u, spared(dt), A, B, C, **options, seq=seq, paths=paths)

    def _as_one(self, x: Tensor) -> Weights | None:
        """The weights, where forward and backward may be one node of autograd (:mod:`.one_node`)."""
        if not one_node.may_be_asked(x) or self._why_called():
            return None
        inner, conv, outer = self.in_proj, self.conv1d, self.out_proj
        steps = self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias
        norms = [None if m is None else m.weight for m in (self.dt_norm, self.b_norm, self.c_norm)]
        states = self.A_log, self.D
        w = Weights(inner.weight, inner.bias, conv.weight, conv.bias, *steps, *states, outer.weight, outer.bias, *norms)
        facts = {"d_state": self.d_state, "width": w.conv.shape[-1], "normed": self.dt_norm is not None}
        taken = one_node.may_be("mamba_layer", x, w, (w.in_proj, w.x_proj, w.dt_proj, w.out_proj), **facts)
        return w if taken else None

    def _why_called(self) -> str | None:
        """Say why the parts have to be called one by one; ``None`` if nothing asks for it."""
        if why := one_node.why_parts_are_called(self, self.kinds):
            return why
        if self.B is not None or not self.gate:
            return "it is not selective, or has no gate"
        if self.x_proj.bias is not None or self.dt_proj.bias is None or self.dt_offset:
            return "x_proj has a bias, dt_proj has none, or the step sizes have an offset"
        if len({None if m is None else m.eps for m in (self.dt_norm, self.b_norm, self.c_norm)}) > 1:
            return "the norms of dt, B and C have different eps"
        return None

    def step(self, x: Tensor, state: MambaState) -> Tensor:
        """Mix one token per row, ``(b, d)``, and update ``state`` in place."""
        if not self.ways.causal:
            self.require("state")
        u, z = self._gated(self.in_proj(x))
        u = self.conv1d.step(u, state.conv)
        if self._why_called() is None:
            return self.out_proj(self.parts().step(u, z, state.ssm))
        dt, A, B, C, options = self._scan_inputs(u, z, self.parts())
        return self.out_proj(selective_state_update(state.ssm, u, dt, A, B, C, **options))

    def _gated(self, xz: Tensor) -> Any:
        return xz.chunk(2, dim=-1) if self.gate else (xz, None)

    def _scan_inputs(self, u: Tensor, z: Tensor | None, p: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        # dt (..., d_inner), A (d_inner, n), B and C (..., n), or (..., d_inner, n) where each channel has its own, and the rest by name
        if p.B is not None and p.C is not None:
            B, C = (m.to(u.dtype).expand(*u.shape[:-1], *m.shape) for m in (p.B, p.C))
            options = {"D": p.D, "z": z, "dt_bias": p.dt_bias, "dt_softplus": True}
            return u.new_zeros(()).expand(u.shape), -upcast(p.A_log).exp(), B, C, options
        dt, B, C = p.x_proj(u).split_with_sizes([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if p.dt_norm is not None and p.b_norm is not None and p.c_norm is not None:
            dt, B, C = p.dt_norm(dt), p.b_norm(B), p.c_norm(C)
        steps: Any = p.dt_proj
        # a bias of somebody else's may be adapted, quantised, or elsewhere until the module is called
        bias = None if self.dt_offset or called(steps, StepProjection) else steps.bias
        whole = bias is None
        dt = steps(dt) if whole else steps.product(dt)
        if self.dt_offset:
            dt = (F.softplus(upcast(dt)) + self.dt_offset).to(u.dtype)
        options = {
            "D": p.D,
            "z": z,
            "dt_bias": None if bias is None else upcast(bias),
            "dt_softplus": not self.dt_offset,
        }
        return dt, -upcast(p.A_log).exp(), B, C, options

    def init_state(self, batch: int, max_len: int = 0, device: Device = None, dtype: Dtype = None) -> Any:
        """Zeros: ``conv`` in ``dtype``, ``ssm`` in float32; ``()`` where there is no state."""
        if not self.ways.causal:
            return ()
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
        each = ((r + 2 * n) * d + r * d if r else 0) + self.d_conv * d
        return self.ways.flops(2 * (3 if self.gate else 2) * self.width * d, 2 * each, d * (9 * n + 1))

    def scan_ops(self) -> int:
        """As :meth:`Mixer.scan_ops`, for every direction."""
        return self.ways.flops(0, 0, self.d_inner * (9 * self.d_state + 1))

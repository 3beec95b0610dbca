"""Mamba-2, the state space dual layer (arXiv:2405.21060, Figure 6).

Same parameters, names and initialisation as mamba-ssm's ``Mamba2``. Different from it: ``step`` and ``forward`` agree
for every option (upstream's ``step`` ignores ``dt_limit`` and fails with ``D_has_hdim``), the state is float32 and
can be carried in and out of ``forward`` with gradients, rows may be padded or packed, and parts with hooks or adapters
such as LoRA are called as modules. Without any, a GPU trains the layer as one node of autograd. In both directions,
projections and norm are those of both, and the gate comes behind the sum.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import conv_ssd_update, ssd, ssd_state_update
from ..kernels.mamba2_layer import Form, Weights, mamba2_layer
from ..kernels.norm.gated_cuda import Gating
from . import one_node
from .base import Seq, State
from .common import Device, Dtype, acc_dtype, called, dtype_read, linear, reset_dt_bias, reset_linear, scaled, upcast
from .conv import CausalConv1d
from .directions import Directions, RowMixer
from .mamba2_parts import NAMES, Parts, check_ranges, check_shapes
from .norm import GatedRMSNorm
from .options import check_dt, check_positive
from .turning import turning

__all__ = ["Mamba2", "Mamba2State"]


@dataclass
class Mamba2State(State):
    """The state of a Mamba-2 layer.

    Attributes:
        conv: ``(b, d_conv - 1, d_ssm + 2 * ngroups * d_state)``, the last inputs of the convolution.
        ssm: ``(b, h, p, n)``, float32 unless asked otherwise.
    """

    recurrent = ("ssm",)
    conv: Tensor
    ssm: Tensor


class Mamba2(RowMixer):
    """Mamba-2's mixer: project once, convolve x, B and C, scan per head, gate and normalise, project.

    Args:
        d_model: Channels of the residual stream.
        d_state: State size per channel, ``n``.
        d_conv: Width of the causal convolution.
        expand: ``d_inner = expand * d_model``.
        headdim: Channels per head, ``p``; the heads are ``d_ssm / headdim``.
        ngroups: Groups of heads that share B and C.
        d_ssm: Channels of the scan; the other ``d_inner - d_ssm`` are a gated MLP beside it. All of them by default.
        A_init_range: Range of the initial decay rates, drawn uniformly.
        D_has_hdim: Whether the skip weight D is per channel instead of per head.
        rmsnorm: Whether the gate comes with a norm.
        norm_before_gate: Normalise first, then gate.
        norm_eps: The norm's epsilon.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        dt_init_floor: Lower bound of the initial step sizes.
        dt_limit: Step sizes are clamped to this range, after softplus.
        bias: Whether ``in_proj`` and ``out_proj`` have a bias.
        conv_bias: Whether the convolution has a bias.
        chunk_size: Tokens per block of the matmul form; decides speed, not results.
        d_inner: Channels inside, instead of ``expand * d_model`` (Nemotron-H, Falcon-H1).
        in_multiplier: Factor of the input; this and the next two are muP's (arXiv:2203.03466), as in Falcon-H1.
        multipliers: Factors of the projected z, x, B, C and dt.
        out_multiplier: Factor of the output.
        directions: 1, from the first token on; 2, also from the last one back. Then the mixer is not causal and has no state.
        tie_directions: ``"none"``: the way back has ``conv1d_b``, ``dt_bias_b``, ``A_b_log`` and ``D_b`` of its own; ``"all"``: one set
            for both.
        combine_directions: ``"sum"`` or ``"mean"`` of both scans, in front of gate and norm.
        conv_padding: As for :class:`.mamba.Mamba`.
        reverse_complement: As for :class:`.mamba.Mamba`.
        layer_idx, n_layer: Place among the residual blocks; ``out_proj`` is drawn smaller by the square root of their number.
        device, dtype: As for ``torch.nn.Linear``; ``A_log``, ``D`` and ``dt_bias`` are float32 at least.

    Raises:
        OptionError: An option cannot work.
    """

    fp32_parameters = ("A_log", "D", "dt_bias")
    no_decay_parameters = ("A_log", "D", "dt_bias")
    without_effect = frozenset({"dt_min", "dt_max", "dt_init_floor", "A_init_range", "chunk_size"})
    # these, and on the way back those of the same names with a _b, are set one way after the other
    conv1d: CausalConv1d
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        d_ssm: int | None = None,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 64,
        d_inner: int | None = None,
        in_multiplier: float = 1.0,
        multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0),
        out_multiplier: float = 1.0,
        directions: int = 1,
        tie_directions: str = "none",
        combine_directions: str = "sum",
        conv_padding: str = "causal",
        reverse_complement: bool = False,
        layer_idx: int = 0,
        n_layer: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim, ngroups=ngroups)
        check_positive(d_ssm=d_ssm, chunk_size=chunk_size, d_inner=d_inner)
        check_dt(dt_min, dt_max, dt_init_floor)
        ways = Directions.of(directions, tie_directions, combine_directions, conv_padding, reverse_complement)
        width = self._go(ways, d_model)
        what = "d_inner" if d_inner is not None else "expand * d_model" if width == d_model else "expand * d_model / 2"
        d_inner = d_inner or expand * width
        check_shapes(d_inner, what, d_ssm, headdim, ngroups)
        check_ranges(A_init_range, dt_limit, multipliers, norm_eps)
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.d_ssm = d_ssm or d_inner
        self.d_mlp, self.nheads = d_inner - self.d_ssm, self.d_ssm // headdim
        self.A_init_range, self.dt_range = tuple(A_init_range), (dt_min, dt_max, dt_init_floor)
        self.dt_limit, self.chunk_size, self.D_has_hdim = (dt_limit[0], dt_limit[1]), chunk_size, D_has_hdim
        self.in_multiplier, self.multipliers, self.out_multiplier = in_multiplier, tuple(multipliers), out_multiplier
        self.rounds_input, self.d_xBC = in_multiplier == 1, self.d_ssm + 2 * ngroups * d_state

        self.in_proj = linear(width, 2 * self.d_mlp + self.d_ssm + self.d_xBC + self.nheads, bias, device, dtype)
        self._add_parts(conv_bias, device, dtype)
        norm = self.d_ssm, norm_eps, self.d_ssm // ngroups, norm_before_gate, device, dtype
        self.norm = GatedRMSNorm(*norm) if rmsnorm else None
        self.out_proj = linear(d_inner, width, bias, device, dtype)
        self.kinds = {name: type(part) for name, part in self.named_children()}  # whatever is put in their place later
        self.reset_parameters(layer_idx, n_layer)

    def _add_parts(self, conv_bias: bool, device: Device, dtype: Dtype) -> None:
        sizes = self.nheads, self.nheads, self.d_ssm if self.D_has_hdim else self.nheads
        pinned: dict[str, Any] = {"device": device, "dtype": acc_dtype(dtype)}
        for own in self.ways.sets:
            conv = self.ways.convolution(self.d_xBC, self.d_conv, conv_bias, device, dtype)
            self._set(NAMES[own], Parts(conv, *(nn.Parameter(torch.empty(size, **pinned)) for size in sizes)))

    def parts(self, own: str = "") -> Parts:
        """The parts of a way, by the end of their names."""
        return Parts(*[getattr(self, name) for name in NAMES[own]])

    @classmethod
    def effective_options(cls, options: dict[str, Any], d_model: int) -> dict[str, Any]:
        """As :meth:`Mixer.effective_options`; ``d_inner`` in place of ``expand``."""
        o = super().effective_options(options, d_model)
        o |= Directions.effective(o)
        o["d_inner"] = o["d_inner"] or o["expand"] * (d_model // 2 if o["reverse_complement"] else d_model)
        del o["expand"]
        o["d_ssm"] = o["d_ssm"] or o["d_inner"]
        o |= {name: [float(number) for number in o[name]] for name in ("dt_limit", "multipliers")}
        return o if o["rmsnorm"] else o | {"norm_before_gate": None, "norm_eps": None}

    @torch.no_grad()
    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1) -> None:
        """Draw the initial values as mamba-ssm does: A uniform, D = 1, step sizes log-uniform."""
        if self.A_log.is_meta:
            return  # nothing to draw, and arithmetic on meta tensors would import the compiler: seconds
        reset_linear(self.in_proj)
        for p in map(self.parts, self.ways.sets):
            p.conv1d.reset_parameters()
            reset_dt_bias(p.dt_bias, *self.dt_range)
            p.A_log.uniform_(*self.A_init_range).log_()
            p.D.fill_(1.0)
        if self.norm is not None:
            self.norm.reset_parameters()
        reset_linear(self.out_proj, shrink=n_layer**0.5)

    def _along(self, x: Tensor, state: Any, seq: Seq | None, return_state: bool) -> Any:
        given, (x, seq) = seq, self._enter(x, state, seq)
        if not return_state and state is None and (weights := self._as_one(x)) is not None:
            inside = scaled(x, self.in_multiplier)
            y = mamba2_layer(inside, weights, self._form(), seq, dtype_read(x), one_node.again(inside))
            return self._leave(scaled(y, self.out_multiplier), given)
        mlp, z, xBC, dt = self._project(x)
        p = self.parts()
        xBC, conv = p.conv1d(xBC, None if state is None else state.conv, seq, return_state)
        u, B, C = self._heads(xBC)
        options = self._scan_options(z, p) | {
            "chunk_size": self.chunk_size,
            "seq": seq,
            "return_final_state": return_state,
        }
        before = None if state is None else state.ssm
        out = ssd(u, dt, -upcast(p.A_log).exp(), B, C, **options, initial_state=before)
        y, *ssm = out if return_state else (out,)
        y = self._leave(self._finish(y.flatten(-2), z, mlp), given)
        return (y, Mamba2State(conv, *ssm)) if return_state else y

    def _as_one(self, x: Tensor) -> Weights | None:
        """The weights, where forward and backward may be one node of autograd (:mod:`.one_node`)."""
        if not one_node.may_be_asked(x) or self._why_called():
            return None
        inner, conv, outer, p = self.in_proj, self.conv1d, self.out_proj, self.parts()
        norm = None if self.norm is None else self.norm.weight
        taps = inner.weight, inner.bias, conv.weight, conv.bias
        w = Weights(*taps, p.dt_bias, p.A_log, p.D, norm, outer.weight, outer.bias)
        facts: dict[str, Any] = {"d_state": self.d_state, "width": self.d_conv, "normed": norm is not None}
        facts["d"] = self.norm.group_size if self.norm is not None else self.d_ssm
        return w if one_node.may_be("mamba2_layer", x, w, (w.in_proj, w.out_proj), **facts) else None

    def _form(self) -> Form:
        norm = self.norm
        gating = None if norm is None else Gating(norm.eps, norm.group_size, norm.norm_before_gate)
        return Form(self.headdim, self.ngroups, self.d_state, self.dt_limit, gating)

    def _why_called(self) -> str | None:
        """Say why the parts have to be called one by one; ``None`` if nothing asks for it."""
        if why := one_node.why_parts_are_called(self, self.kinds):
            return why
        if self.d_mlp:
            return "there is an MLP beside the scan"
        return "the projections have multipliers" if set(self.multipliers) != {1.0} else None

    def _both(self, x: Tensor, seq: Seq | None) -> Tensor:
        given, (x, seq), turn = seq, self._enter(x, None, seq), turning(seq)
        mlp, z, xBC, dt = self._project(x)
        if self.ways.joined:
            xBC = self.conv1d(xBC, seq=seq)
        y = self._way(xBC, dt, seq) + turn(self._way(turn(xBC), turn(dt), seq, back=True))
        y = scaled(y, self.ways.share)
        if self.norm is None:
            y = y * F.silu(z)
        return self._leave(self._finish(y, z, mlp), given)

    def _way(self, xBC: Tensor, dt: Tensor, seq: Seq | None, back: bool = False) -> Tensor:
        """Convolve, unless that is done, and scan, from the first token to the last, which on the way back are those of turned rows."""
        p = self.parts(self.ways.sets[-1] if back else "")
        if not self.ways.joined:
            xBC = p.conv1d(xBC, seq=seq, mirrored=self.ways.mirrored(back, turned=back))
        u, B, C = self._heads(xBC)
        options = self._scan_options(None, p) | {"chunk_size": self.chunk_size, "seq": seq}
        return ssd(u, dt, -upcast(p.A_log).exp(), B, C, **options).flatten(-2)

    def step(self, x: Tensor, state: Mamba2State) -> Tensor:
        """Mix one token per row, ``(b, d)``, and update ``state`` in place."""
        if not self.ways.causal:
            self.require("state")
        mlp, z, xBC, dt = self._project(x)
        p = self.parts()
        conv = p.conv1d
        if called(conv, CausalConv1d):
            y = self.scan_step(conv.step(xBC, state.conv), z, dt, state)
        else:
            options = self._scan_options(z, p) | {"ngroups": self.ngroups, "activation": conv.activation}
            taps = conv.weight.squeeze(1)
            y = conv_ssd_update(xBC, state.conv, taps, conv.bias, state.ssm, dt, p.A_log, log_rates=True, **options)
            y = y.flatten(-2)
        return self._finish(y, z, mlp)

    def scan_step(self, xBC: Tensor, z: Tensor, dt: Tensor, state: Mamba2State) -> Tensor:
        """Scan one token per row behind the convolution, ``(b, d_ssm)``, and gate it, unless the gate belongs to the norm."""
        (u, B, C), options = self._heads(xBC), self._scan_options(z, self.parts())
        return ssd_state_update(state.ssm, u, dt, self.A_log, B, C, log_rates=True, **options).flatten(-2)

    def scan_read(
        self, xBC: Tensor, z: Tensor, dt: Tensor, A: Tensor, state: Tensor, seq: Seq
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`scan_step`, of a few tokens per row, ``(b, w, d_ssm)``; also give the new state."""
        (u, B, C), options = self._heads(xBC), self._scan_options(z, self.parts()) | {"chunk_size": self.chunk_size}
        y, ssm = ssd(u, dt, A, B, C, **options, initial_state=state, seq=seq, return_final_state=True)
        return y.flatten(-2), ssm

    def split(self, projected: Tensor) -> Any:
        """The parts of what ``in_proj`` gives: the MLP's gate and value, z, xBC and dt."""
        return projected.split_with_sizes([self.d_mlp, self.d_mlp, self.d_ssm, self.d_xBC, self.nheads], dim=-1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gate, value, z, xBC, dt = self.split(self.in_proj(scaled(x, self.in_multiplier)))
        if set(self.multipliers) != {1.0}:
            for_z, *for_xBC, for_dt = self.multipliers
            bc = self.ngroups * self.d_state
            parts = xBC.split([self.d_ssm, bc, bc], dim=-1)
            xBC = torch.cat([part * factor for part, factor in zip(parts, for_xBC, strict=True)], dim=-1)
            z, dt = z * for_z, dt * for_dt
        # two operations take the host as long on nothing as on something
        return F.silu(gate) * value if self.d_mlp else gate, z, xBC, dt

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bc = self.ngroups * self.d_state
        u, B, C = xBC.split_with_sizes([self.d_ssm, bc, bc], dim=-1)
        per_group = (self.ngroups, self.d_state)
        return u.unflatten(-1, (self.nheads, self.headdim)), B.unflatten(-1, per_group), C.unflatten(-1, per_group)

    def _scan_options(self, z: Tensor | None, p: Parts) -> dict[str, Any]:
        heads = (self.nheads, self.headdim)
        return {
            "D": p.D.view(heads) if self.D_has_hdim else p.D,
            # with a norm, the gate belongs to it
            "z": z.unflatten(-1, heads) if z is not None and self.norm is None else None,
            "dt_bias": upcast(p.dt_bias),
            "dt_softplus": True,
            "dt_limit": self.dt_limit,
        }

    def _finish(self, y: Tensor, z: Tensor, mlp: Tensor) -> Tensor:
        if self.norm is not None:
            y = self.norm(y, z)
        y = self.out_proj(torch.cat([mlp, y], dim=-1) if self.d_mlp else y)
        return scaled(y, self.out_multiplier)

    def init_state(self, batch: int, max_len: int = 0, device: Device = None, dtype: Dtype = None) -> Any:
        """Zeros: ``conv`` in ``dtype``, ``ssm`` in float32; ``()`` where there is no state."""
        if not self.ways.causal:
            return ()
        device, dtype = device or self._device, dtype or self._dtype
        ssm = (batch, self.nheads, self.headdim, self.d_state)
        return Mamba2State(
            conv=torch.zeros(batch, self.d_conv - 1, self.d_xBC, device=device, dtype=dtype),
            ssm=torch.zeros(ssm, device=device, dtype=acc_dtype(dtype)),
        )

    def flops(self, seq_len: int) -> int:
        """FLOPs per token, 2 per multiply-add: projections, convolution, and the scan in its matmul form.

        The scan takes ``2 d_ssm (2n + q) + 2 g n q`` with blocks of ``q = min(chunk_size, seq_len)`` tokens: state
        in, state out, and the block's own tokens through ``C B^T``.
        """
        q = min(self.chunk_size, seq_len)
        scan = 2 * self.d_ssm * (2 * self.d_state + q) + 2 * self.ngroups * self.d_state * q
        d_inner = self.d_mlp + self.d_ssm
        d_proj = self.d_mlp + d_inner + self.d_xBC + self.nheads
        # of sizes, not of weights, which quantised layers keep in other shapes
        return self.ways.flops(2 * self.width * (d_proj + d_inner), 2 * self.d_conv * self.d_xBC, scan)

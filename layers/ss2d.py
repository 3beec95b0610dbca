"""SS2D, the selective scan over maps (VMamba, arXiv:2401.10166): several walks over the tokens of an image, summed.

Same parameters, names, shapes and initialisation as VMamba's ``SS2D``, whose ``v05_noz`` is the default here, and whose first version is
``ssm_ratio=2, d_state=16, gate=True, conv_bias=True``. Different from it: one projection in the tokens' own order in place of one per
flipped and transposed copy, step sizes that are formed where they are used, and outputs that are summed where the tokens are, so that four
directions need no more tensors of the map's size than one; and a state in float32 whatever the model's precision.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import selective_scan
from .base import Aux, Mixer, Seq
from .common import (
    Device,
    Dtype,
    acc_dtype,
    called,
    dtype_read,
    linear,
    reset_decays,
    reset_dt_bias,
    reset_weight,
    upcast,
    why_called,
)
from .conv2d import around, check_width, convolve, depthwise, reset_depthwise
from .norm import LayerNorm
from .options import check, check_dt, check_known, check_positive
from .orders import names_of, paths_of, ranks_of
from .recompute import recomputing, repeatable

__all__ = ["SS2D"]

# of linear layers, in every published vision model of this kind
STD = 0.02


def _dt_rank(d_model: int) -> int:
    return math.ceil(d_model / 16)


class SS2D(Mixer):
    """VMamba's mixer: project, convolve over the map, scan it along several walks, normalise the sum, gate, project.

    The rows are maps, top row first, and ``seq.grid`` says of which height and width: any, also 1 x n and odd ones.

    Args:
        d_model: Channels of the residual stream.
        d_state: State size per channel and direction, ``n``.
        d_conv: Height and width of the depthwise convolution, an odd number; 0 for none.
        ssm_ratio: ``d_inner = ssm_ratio * d_model``.
        dt_rank: Rank of the step size's projection; ``ceil(d_model / 16)`` by default.
        directions: 4 (rows, columns, and both from the end), 2 (rows, there and back), 1 (rows), or a list of orders (:mod:`.orders`):
            ``["rows", "window7-columns-back"]``. Each has step sizes, B, C, decay rates and a skip of its own.
        gate: Whether the normalised sum is multiplied by another projection of the input (VMamba's first version).
        gate_activation: ``"silu"``, or ``None`` for a linear gate.
        conv_bias: Whether the convolution has a bias.
        out_norm: ``"layernorm"``, or ``None`` for none.
        out_norm_eps: Its epsilon.
        out_activation: ``None``, or ``"gelu"`` behind the norm.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        dt_init_floor: Lower bound of the initial step sizes.
        device, dtype: As for ``torch.nn.Linear``; ``A_logs``, ``Ds`` and ``dt_projs_bias`` are float32 at least.

    Raises:
        OptionError: An option cannot work.
    """

    capabilities = frozenset({"grid"})
    fp32_parameters = ("A_logs", "Ds", "dt_projs_bias")
    no_decay_parameters = ("A_logs", "Ds", "dt_projs_bias")
    without_effect = frozenset({"dt_min", "dt_max", "dt_init_floor"})
    rounds_input = True
    # names of walks, where a gradient passes through the states of these alone: to see what each of them sees, and not for training
    through: tuple[str, ...] | None = None

    def __init__(
        self,
        d_model: int,
        d_state: int = 1,
        d_conv: int = 3,
        ssm_ratio: float = 1.0,
        dt_rank: int | None = None,
        directions: Any = 4,
        gate: bool = False,
        gate_activation: str | None = "silu",
        conv_bias: bool = False,
        out_norm: str | None = "layernorm",
        out_norm_eps: float = 1e-5,
        out_activation: str | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        check_positive(d_model=d_model, d_state=d_state, dt_rank=dt_rank)
        check_dt(dt_min, dt_max, dt_init_floor)
        check_width("d_conv", d_conv, none=True)
        check_known("gate_activation", gate_activation, ("silu", None))
        check_known("out_activation", out_activation, ("gelu", None))
        check_known("out_norm", out_norm, ("layernorm", None))
        check(out_norm_eps > 0, "out_norm_eps", f"{out_norm_eps} is not positive. The usual value is 1e-5.")
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, _d_inner(ssm_ratio, d_model)
        self.dt_rank, self.dt_range = dt_rank or _dt_rank(d_model), (dt_min, dt_max, dt_init_floor)
        self.directions = names_of("directions", directions)
        self.gate, self.gate_activation, self.out_activation = gate, gate_activation, out_activation
        k, d = len(self.directions), self.d_inner

        self.in_proj = linear(d_model, 2 * d if gate else d, False, device, dtype)
        self.conv2d = depthwise(d, d_conv, conv_bias, device, dtype) if d_conv else None
        self.x_proj_weight = nn.Parameter(torch.empty(k, self.dt_rank + 2 * d_state, d, device=device, dtype=dtype))
        self._add_scans(k, device, dtype)
        self.out_norm = LayerNorm(d, out_norm_eps, device=device, dtype=dtype) if out_norm else None
        self.out_proj = linear(d, d_model, False, device, dtype)
        self.reset_parameters()

    def _add_scans(self, k: int, device: Device, dtype: Dtype) -> None:
        d, pinned = self.d_inner, acc_dtype(dtype)
        self.dt_projs_weight = nn.Parameter(torch.empty(k, d, self.dt_rank, device=device, dtype=dtype))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, d, device=device, dtype=pinned))
        self.A_logs = nn.Parameter(torch.empty(k * d, self.d_state, device=device, dtype=pinned))
        self.Ds = nn.Parameter(torch.empty(k * d, device=device, dtype=pinned))

    @classmethod
    def effective_options(cls, options: dict[str, Any], d_model: int) -> dict[str, Any]:
        """As :meth:`Mixer.effective_options`."""
        o = super().effective_options(options, d_model)
        o["dt_rank"] = o["dt_rank"] or _dt_rank(d_model)
        o["ssm_ratio"] = _d_inner(o["ssm_ratio"], d_model) / d_model
        o["directions"] = list(names_of("directions", o["directions"]))
        unused = {"gate_activation": not o["gate"], "conv_bias": not o["d_conv"], "out_norm_eps": o["out_norm"] is None}
        return o | {name: None for name, without in unused.items() if without}

    @torch.no_grad()
    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1) -> None:
        """Draw the initial values as VMamba does: A = -1 ... -n, D = 1, step sizes log-uniform, each direction by itself."""
        if self.A_logs.is_meta:
            return  # nothing to draw, and arithmetic on meta tensors would import the compiler: seconds
        for layer in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(layer.weight, std=STD)
        if self.conv2d is not None:
            reset_depthwise(self.conv2d)
        reset_weight(self.x_proj_weight)
        self._reset_scans()
        if self.out_norm is not None:
            self.out_norm.reset_parameters()

    def _reset_scans(self) -> None:
        self.dt_projs_weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        reset_dt_bias(self.dt_projs_bias, *self.dt_range)
        reset_decays(self.A_logs)
        self.Ds.fill_(1.0)

    def forward(
        self, x: Tensor, state: Any = None, seq: Seq | None = None, aux: Aux = None, *, return_state: bool = False
    ) -> Any:
        """Mix ``(b, h * w, d)`` over its map; see :meth:`Mixer.forward`."""
        self._refuse_state(state, return_state)
        grid = self.grid_of(x, seq)
        with recomputing() as spared:
            u, z = self._project(spared(x))
        u = u if self.conv2d is None else convolve(self.conv2d, u, grid)
        u = repeatable(F.silu(u), F.silu, u)
        with recomputing() as spared:
            y = self._scan(spared(u), grid)
        if self.through is not None:
            y = self._passing(y, u, grid, self.through)
        if self.out_norm is not None:
            # rounded once where nothing but a linear layer, which autocast has read it so, stands behind
            linear_next = self.out_activation is None and z is None and why_called(self.out_norm, LayerNorm) is None
            y = self.out_norm(y, dtype_read(y)) if linear_next else self.out_norm(y)
        if self.out_activation is not None:
            y = F.gelu(y)
        if z is not None:
            y = y * (F.silu(z) if self.gate_activation else z)
        with recomputing() as spared:
            return self.out_proj(spared(y))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.gate:
            return self.in_proj(x), None
        if called(self.in_proj, nn.Linear):
            u, z = self.in_proj(x).chunk(2, dim=-1)
        else:
            # apart from each other: the convolution would copy its part, and the backward join the two
            u, z = (F.linear(x, w) for w in self.in_proj.weight.chunk(2))
        return u, z

    def _read(self, u: Tensor) -> Tensor:
        """Step sizes, B and C of each direction at every token, (k, b, l, r + 2 n): all of it one product in the tokens' order."""
        each = F.linear(u, self.x_proj_weight.flatten(0, 1))
        return each.unflatten(-1, self.x_proj_weight.shape[:2]).permute(2, 0, 1, 3)

    def _scan(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        k, n = len(self.directions), self.d_state
        dt, B, C = self._read(u).split([self.dt_rank, n, n], dim=-1)
        return selective_scan(
            u,
            dt,
            -upcast(self.A_logs).exp().unflatten(0, (k, -1)),
            B.unsqueeze(3),
            C.unsqueeze(3),
            self.Ds.unflatten(0, (k, -1)),
            dt_bias=self.dt_projs_bias,
            dt_weight=self.dt_projs_weight,
            dt_softplus=True,
            paths=paths_of(self.directions, grid, u.device),
        )

    def _passing(self, y: Tensor, u: Tensor, grid: tuple[int, int], through: tuple[str, ...]) -> Tensor:
        """The outputs as they are, with the gradient of the skips, and of the states of walks of some names alone."""
        others = torch.tensor([name not in through for name in self.directions], device=u.device)
        # without C, nothing is read of a walk's states
        unread = (
            torch.arange(self.x_proj_weight.shape[1], device=u.device) >= self.x_proj_weight.shape[1] - self.d_state
        )
        some = copy.copy(self)
        weight = self.x_proj_weight.masked_fill((others[:, None] & unread)[:, :, None], 0.0)
        some._parameters = self._parameters | {"x_proj_weight": weight}  # type: ignore[dict-item]
        read = some._scan(u, grid)
        return y.detach() + (read - read.detach())

    def reach(self, length: int, grid: tuple[int, int] | None = None) -> Tensor | None:
        """As :meth:`Mixer.reach`: what some walk visits before an output, and what the convolution reads around it."""
        if grid is None:
            raise ValueError("SS2D: what an output depends on is a matter of the map. Pass grid=(h, w).")
        earlier = torch.zeros(length, length, dtype=torch.bool)
        for rank in ranks_of(self.directions, grid):
            earlier |= rank <= rank[:, None]
        return (earlier.float() @ around(self.d_conv, grid).float()) > 0

    def flops(self, seq_len: int) -> int:
        """FLOPs per token: 2 per multiply-add of projections and convolution, and :meth:`scan_ops`."""
        steps = 2 * len(self.directions) * self.dt_rank * self.d_inner
        return self._flops_around + steps + self.scan_ops()

    def scan_ops(self) -> int:
        """As :meth:`Mixer.scan_ops`, for every direction."""
        return len(self.directions) * self.d_inner * (9 * self.d_state + 1)

    @property
    def _flops_around(self) -> int:
        """FLOPs per token of what stands around the scans."""
        d, read = self.d_inner, len(self.directions) * (self.dt_rank + 2 * self.d_state)
        return 2 * d * ((3 if self.gate else 2) * self.d_model + read + self.d_conv**2)


def _d_inner(ssm_ratio: float, d_model: int) -> int:
    d = round(ssm_ratio * d_model)
    whole = d >= 1 and abs(d - ssm_ratio * d_model) < 1e-6 * d
    check(whole, "ssm_ratio", f"{ssm_ratio} * d_model = {ssm_ratio * d_model} is no number of channels. Use 1 or 2.")
    return d

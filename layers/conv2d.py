"""Depthwise convolutions over maps, and the mixer that is one between gated projections: a Mamba block without its scan.

:class:`GatedConv2d` is MambaOut's block (arXiv:2405.07992, after arXiv:1612.08083). Its parameters have the shapes and the order of timm's
``GatedConvBlock``, whose ``fc1``, ``conv`` and ``fc2`` are ``in_proj``, ``conv2d`` and ``out_proj`` here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .base import Aux, Mixer, Seq
from .common import Device, Dtype, linear, reset_linear, reset_normal
from .mlp import ACTIVATIONS
from .options import check, check_known, check_positive
from .patches import to_image, to_tokens

__all__ = ["GatedConv2d", "around", "check_width", "convolve", "depthwise", "reset_depthwise"]


def depthwise(d: int, width: int, bias: bool, device: Device, dtype: Dtype) -> nn.Conv2d:
    """A depthwise convolution of ``width`` x ``width`` that keeps a map's size; its values are still to be drawn."""
    device = torch.get_default_device() if device is None else torch.device(device)
    options: dict[str, Any] = {"padding": width // 2, "groups": d, "bias": bias, "device": device, "dtype": dtype}
    build = nn.Conv2d if device.type == "meta" else lambda *args, **kw: nn.utils.skip_init(nn.Conv2d, *args, **kw)
    return build(d, d, width, **options)


@torch.no_grad()
def reset_depthwise(conv: nn.Conv2d) -> None:
    """Draw a depthwise convolution as torch does."""
    for p in conv.parameters():
        p.uniform_(-1 / conv.kernel_size[0], 1 / conv.kernel_size[0])


def check_width(field: str, width: int, none: bool = False) -> None:
    """Raise an :class:`OptionError` unless a filter is odd and has neighbours in it; 0 for no convolution where ``none``."""
    odd, instead = width > 1 and width % 2 == 1, ", or 0 for no convolution" if none else ""
    check(odd or (none and width == 0), field, f"{width} has no middle, or nothing around it. Use 3, 5, ...{instead}.")


def convolve(conv: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Convolve ``(b, h * w, d)``; channels last: torch's convolution takes and gives the tokens where they are."""
    return to_tokens(conv(to_image(x, grid)))[0]


def around(width: int, grid: tuple[int, int]) -> Tensor:
    """The tokens that a filter reads, ``(l, l)`` bool, output by input."""
    at = torch.arange(grid[0] * grid[1])
    rows, columns = at // grid[1], at % grid[1]
    far = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    return far <= width // 2


class GatedConv2d(Mixer):
    """Project, convolve some of the channels over the map, gate all of them by another projection, project.

    The rows are maps, top row first, and ``seq.grid`` says of which height and width. It mixes channels as a feed-forward layer does, and
    needs none behind it.

    Args:
        d_model: Channels of the residual stream.
        kernel_size: Height and width of the depthwise convolution, an odd number.
        expand: Channels of gate and value each, as a multiple of ``d_model``, rounded down.
        conv_ratio: Channels that are convolved, the last ones of the value, as a multiple of ``d_model``, rounded down.
        activation: Of the gate: ``"gelu"``, ``"silu"``, ``"relu"`` or ``"relu2"``.
        bias: Whether projections and convolution have one.
        init_std: Standard deviation of the projections' normal initial weights, cut off at 2; ``None`` for mamba-ssm's.
        layer_idx, n_layer: Place among the residual blocks; without ``init_std``, ``out_proj`` is drawn smaller by the square root of
            their number.
        device, dtype: As for ``torch.nn.Linear``.

    Raises:
        OptionError: An option cannot work.
    """

    capabilities = frozenset({"grid"})
    without_effect = frozenset({"init_std"})
    rounds_input = True

    def __init__(
        self,
        d_model: int,
        kernel_size: int = 7,
        expand: float = 8 / 3,
        conv_ratio: float = 1.0,
        activation: str = "gelu",
        bias: bool = True,
        init_std: float | None = 0.02,
        layer_idx: int = 0,
        n_layer: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        check_positive(d_model=d_model)
        check_width("kernel_size", kernel_size)
        check_known("activation", activation, ACTIVATIONS)
        check(init_std is None or init_std > 0, "init_std", f"{init_std} is not positive. The usual value is 0.02.")
        self.d_model, self.kernel_size, self.activation, self.init_std = d_model, kernel_size, activation, init_std
        self.d_inner, self.d_conv = _channels(expand, conv_ratio, d_model)
        self.in_proj = linear(d_model, 2 * self.d_inner, bias, device, dtype)
        self.conv2d = depthwise(self.d_conv, kernel_size, bias, device, dtype)
        self.out_proj = linear(self.d_inner, d_model, bias, device, dtype)
        self.reset_parameters(layer_idx, n_layer)

    @classmethod
    def effective_options(cls, options: dict[str, Any], d_model: int) -> dict[str, Any]:
        """As :meth:`Mixer.effective_options`."""
        o = super().effective_options(options, d_model)
        inner, conv = _channels(o["expand"], o["conv_ratio"], d_model)
        # the middle of what is rounded down to as many
        return o | {"expand": (inner + 0.5) / d_model, "conv_ratio": (conv + 0.5) / d_model}

    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1) -> None:
        """Draw the projections normally, or as mamba-ssm does, and the convolution as torch does."""
        for layer, shrink in ((self.in_proj, 1.0), (self.out_proj, n_layer**0.5)):
            if self.init_std is None:
                reset_linear(layer, shrink)
            else:
                reset_normal(layer, self.init_std)
        reset_depthwise(self.conv2d)

    def forward(
        self, x: Tensor, state: Any = None, seq: Seq | None = None, aux: Aux = None, *, return_state: bool = False
    ) -> Any:
        """Mix ``(b, h * w, d)`` over its map; see :meth:`Mixer.forward`."""
        self._refuse_state(state, return_state)
        grid = self.grid_of(x, seq)
        rest = self.d_inner - self.d_conv
        gate, as_it_is, value = self.in_proj(x).split([self.d_inner, rest, self.d_conv], dim=-1)
        value = convolve(self.conv2d, value, grid)
        value = torch.cat([as_it_is, value], dim=-1) if rest else value
        return self.out_proj(ACTIVATIONS[self.activation](gate) * value)

    def reach(self, length: int, grid: tuple[int, int] | None = None) -> Tensor | None:
        """As :meth:`Mixer.reach`: what the convolution reads around an output."""
        if grid is None:
            raise ValueError("GatedConv2d: what an output depends on is a matter of the map. Pass grid=(h, w).")
        return around(self.kernel_size, grid)

    def flops(self, seq_len: int) -> int:
        """FLOPs per token of projections and convolution, 2 per multiply-add."""
        return 2 * (3 * self.d_model * self.d_inner + self.kernel_size**2 * self.d_conv)


def _channels(expand: float, conv_ratio: float, d_model: int) -> tuple[int, int]:
    """Channels of gate and value each, and those of the value that are convolved."""
    inner, conv = int(expand * d_model), int(conv_ratio * d_model)
    check(inner >= 1, "expand", f"{expand} * d_model = {expand * d_model} is no number of channels. Use 8 / 3, say.")
    some = f"{conv_ratio} * d_model = {conv_ratio * d_model}"
    check(1 <= conv <= inner, "conv_ratio", f"{some} is none of the 1 to {inner} channels there are. Use 1.0, say.")
    return inner, conv

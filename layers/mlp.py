"""The feed-forward layer, gated (GLU variants, arXiv:2002.05202) or plain."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter
from .base import Aux, Mixer, Seq
from .common import Device, Dtype, linear, reset_linear, reset_normal, scaled
from .options import check, check_known, check_positive, check_rank
from .recompute import recomputing, repeatable

__all__ = ["MLP"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer, arXiv:2109.08668
}


def activate(h: Tensor, activation: str, gated: bool, gate_multiplier: float = 1.0) -> Tensor:
    """``value * act(gate)`` of ``(..., 2h)``, value first as in mamba-ssm, or ``act`` of ``(..., h)``."""
    act = ACTIVATIONS[activation]
    if not gated:
        return act(h)
    value, gate = h.chunk(2, dim=-1)
    return value * act(scaled(gate, gate_multiplier))


def _hidden(d_model: int, given: int | None, expand: float | None, gated: bool) -> int:
    if expand is None:
        return given or -(-(8 * d_model // 3 if gated else 4 * d_model) // 128) * 128
    check(given is None, "expand", f"{expand} is given beside d_intermediate = {given}. Leave one of the two out.")
    check(round(expand * d_model) >= 1, "expand", f"{expand} * d_model = {expand * d_model} is no size. Use 4, say.")
    return round(expand * d_model)


class MLP(Mixer):
    """``fc2(value * act(gate))`` with ``value, gate = fc1(x)``, or ``fc2(act(fc1(x)))``.

    Args:
        d_model: Channels of the residual stream.
        d_intermediate: Hidden channels; by default 8/3 (gated) or 4 (plain) times ``d_model``, rounded up to a
            multiple of 128.
        expand: The same as a multiple of ``d_model``, for trunks of several widths.
        activation: ``"silu"``, ``"gelu"``, ``"relu"`` or ``"relu2"`` (squared ReLU).
        gated: Whether one half of ``fc1`` gates the other.
        bias: Whether both projections have one.
        gate_multiplier: Factor of the gate before its activation; this and the next are muP's, as in Falcon-H1.
        out_multiplier: Factor of the output.
        adapter_rank: Rank of an addition to ``fc1`` that is not shared where the block is, see :class:`Adapter`; 0 for none.
        init_std: Standard deviation of normal initial weights, cut off at 2, as vision models have them (0.02); by default they are drawn
            as mamba-ssm does.
        layer_idx, n_layer: Place among the residual blocks; ``fc2`` is drawn smaller by the square root of their number.
        device, dtype: As for ``torch.nn.Linear``.

    Raises:
        OptionError: An option cannot work.
    """

    without_effect = frozenset({"init_std"})
    mixes_tokens = False
    rounds_input = True

    def __init__(
        self,
        d_model: int,
        d_intermediate: int | None = None,
        expand: float | None = None,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        gate_multiplier: float = 1.0,
        out_multiplier: float = 1.0,
        adapter_rank: int = 0,
        init_std: float | None = None,
        layer_idx: int = 0,
        n_layer: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        check_positive(d_model=d_model, d_intermediate=d_intermediate)
        check(init_std is None or init_std > 0, "init_std", f"{init_std} is not positive. The usual value is 0.02.")
        check_known("activation", activation, ACTIVATIONS)
        check_rank(adapter_rank)
        d_intermediate = _hidden(d_model, d_intermediate, expand, gated)
        self.activation, self.gated, self.init_std = activation, gated, init_std
        self.gate_multiplier, self.out_multiplier = gate_multiplier, out_multiplier
        self.fc1 = linear(d_model, d_intermediate * (2 if gated else 1), bias, device, dtype)
        sizes = [self.fc1.out_features]
        self.adapter = Adapter(d_model, sizes, adapter_rank, device, dtype) if adapter_rank else None
        self.fc2 = linear(d_intermediate, d_model, bias, device, dtype)
        self.reset_parameters(layer_idx, n_layer)

    @classmethod
    def effective_options(cls, options: dict[str, Any], d_model: int) -> dict[str, Any]:
        """As :meth:`Mixer.effective_options`."""
        o = super().effective_options(options, d_model)
        hidden = _hidden(d_model, o["d_intermediate"], o["expand"], o["gated"])
        return o | {"d_intermediate": hidden, "expand": None}

    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1) -> None:
        """Draw the weights as mamba-ssm does, or normally."""
        if self.adapter is not None:
            self.adapter.reset_parameters()
        if self.init_std is None:
            reset_linear(self.fc1)
            reset_linear(self.fc2, shrink=n_layer**0.5)
        else:
            reset_normal(self.fc1, self.init_std)
            reset_normal(self.fc2, self.init_std)

    def forward(
        self, x: Tensor, state: Any = None, seq: Seq | None = None, aux: Aux = None, *, return_state: bool = False
    ) -> Any:
        """Map every token of ``(b, l, d)`` by itself; the state is ``()``."""
        with nullcontext(lambda t: t) if self.gated else recomputing() as spared:
            h = self.fc1(spared(x)) if self.adapter is None else self.fc1(spared(x)) + self.adapter(x)
            how = self.activation, self.gated, self.gate_multiplier
            # one operation per value to form again, and twice the memory to keep; of a gated one, three
            h = activate(h, *how) if self.gated else repeatable(activate(h, *how), activate, h, *how)
            y = scaled(self.fc2(spared(h)), self.out_multiplier)
        return (y, ()) if return_state else y

    def flops(self, seq_len: int) -> int:
        """FLOPs per token of the two projections, 2 per multiply-add."""
        adapter = 0 if self.adapter is None else self.adapter.flops()
        # of sizes, not of weights, which quantised layers keep in other shapes
        return 2 * sum(fc.in_features * fc.out_features for fc in (self.fc1, self.fc2)) + adapter

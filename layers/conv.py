"""The short causal convolution, one filter per channel, in front of a scan (Mamba, arXiv:2312.00752 §3.4)."""

import math

import torch
from torch import Tensor, nn

from ..kernels import causal_conv1d, causal_conv1d_update
from .base import Seq
from .common import Device, Dtype, called
from .recompute import repeatable

__all__ = ["CausalConv1d"]


class CausalConv1d(nn.Module):
    """A depthwise causal convolution with the parameters of ``nn.Conv1d(d, d, k, groups=d)``, channels last.

    The state is what the filter still needs to see: the last ``k - 1`` inputs, ``(b, k - 1, d)``.

    Args:
        d: Channels.
        k: Filter width, in tokens.
        bias: Whether there is a bias.
        activation: ``"silu"`` or ``None``, applied to the output.
        device, dtype: As for ``torch.nn.Linear``.
    """

    def __init__(
        self,
        d: int,
        k: int,
        bias: bool = True,
        activation: str | None = "silu",
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(d, 1, k, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(d, device=device, dtype=dtype)) if bias else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Conv1d`` does."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        for p in self.parameters():
            p.uniform_(-bound, bound)

    def forward(
        self, x: Tensor, state: Tensor | None = None, seq: Seq | None = None, return_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Filter ``(b, l, d)``; also give the state after the last real token, or ``None`` unless ``return_state``."""
        operands = x, self.weight.squeeze(1), self.bias, self.activation, state, seq
        out = _filter(*operands, return_state)
        y, after = out if return_state else (out, None)
        return repeatable(y, _filter, *operands), after

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """Filter one token per row, ``(b, d)``, and shift ``state`` in place; through :meth:`forward` where hooks wait for that."""
        if called(self, CausalConv1d):
            y, new = self(x[:, None], state, return_state=True)
            state.copy_(new)
            return y[:, 0]
        return causal_conv1d_update(x, state, self.weight.squeeze(1), self.bias, activation=self.activation)

    def flops(self) -> int:
        """FLOPs per token, 2 per multiply-add."""
        return 2 * self.weight.numel()

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        d, _, k = self.weight.shape
        return f"{d}, k={k}, bias={self.bias is not None}, activation={self.activation!r}"


def _filter(x, weight, bias, activation, state, seq, return_state=False):
    return causal_conv1d(
        x, weight, bias, activation=activation, initial_state=state, seq=seq, return_final_state=return_state
    )

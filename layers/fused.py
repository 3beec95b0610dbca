"""Decode steps of a whole residual block, ``x + mixer(norm(x))``, in a few launches: every product takes along what stands around it.

A product of few rows reads its weight and does next to nothing else, so the norm in front of it, the convolution or activation behind it
and the residual addition are done by the launch that has the numbers (:func:`hybridzoo.kernels.step_linear`). What is computed is what
the parts compute one after the other. Where somebody has put something around a part or in its place, or the kernel says that it does not
pay, :func:`why_apart` says so, and they are called as ever.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import StepConv, StepNorm, step_linear
from ..kernels.few.op import fits
from ..kernels.gpu.operands import eager
from .attention import Attention
from .base import Mixer
from .common import autocasts, hooked_everywhere, why_called
from .conv import CausalConv1d
from .mamba import Mamba
from .mamba2 import Mamba2
from .mlp import MLP
from .norm import NORMS, GatedRMSNorm, LayerNorm

__all__ = ["Token", "fused_step", "gated_step_norm", "head_step", "step_norm", "why_apart", "why_head_apart"]


class Token(NamedTuple):
    """One token per row in front of a mixer, and what its output is added to.

    Attributes:
        x: ``(b, d)``, to be normalised and mixed.
        norm: The norm.
        residual: ``(b, d)``.
        multiplier: Of the mixer's output.
    """

    x: Tensor
    norm: StepNorm
    residual: Tensor
    multiplier: float


def step_norm(norm: Any) -> StepNorm:
    """The residual stream's norm as a product takes it along."""
    if isinstance(norm, LayerNorm):
        return StepNorm(norm.weight, norm.eps, norm.bias, centred=True)
    return StepNorm(norm.weight, norm.eps)


def gated_step_norm(norm: GatedRMSNorm, gate: Tensor) -> StepNorm:
    """A scan's gated norm, with its gate ``(b, d)``, as a product takes it along."""
    return StepNorm(norm.weight, norm.eps, None, False, gate, norm.group_size, norm.norm_before_gate)


def why_apart(mixer: nn.Module, norm: nn.Module, x: Tensor, state: Any) -> str | None:
    """Say why a mixer's step from ``x``, ``(b, d)``, is not done together with its norm and the residual addition; ``None`` if it is."""
    # of these classes themselves: one that is derived from them may have another step
    way = _WAYS.get(type(mixer))
    if way is None or "step" in mixer.__dict__:
        return f"{type(mixer).__name__} has no such step"
    linears = [getattr(mixer, name) for name in way.linears]
    return _why_products(x, norm, linears) or _why_parts(mixer, way) or way.refuse(mixer) or _why_state(state, linears)


def why_head_apart(head: nn.Module, norm: nn.Module, x: Tensor) -> str | None:
    """Say why the final norm and the head are not one product; ``None`` if they are."""
    return _why_products(x, norm, [head])


def _why_products(x: Tensor, norm: nn.Module, linears: list[Any]) -> str | None:
    first = getattr(linears[0], "weight", x)
    first = first if isinstance(first, Tensor) else x  # a quantised layer's is a method
    # what a CPU answers with no, for every block and token
    if (why := fits(x.device.type, first.dtype, *x.shape)) is not None:
        return why
    why = next((why for m in linears if (why := why_called(m, nn.Linear)) is not None), None)
    if why is not None:
        return f"a projection {why}"
    k, most = max(m.in_features for m in linears), max(m.in_features * m.out_features for m in linears)
    if (why := fits(x.device.type, first.dtype, x.shape[0], k, most // k)) is not None:
        return why
    if type(norm) not in NORMS.values() or why_called(norm, type(norm)) is not None:
        return "the norm is none of ours, or has hooks"
    if hooked_everywhere():
        return "there are hooks on all modules"
    if autocasts(x):
        return "autocast chooses the types"
    if any(m.weight.dtype != first.dtype for m in linears) or x.dtype not in (first.dtype, torch.float32):
        return "the weights, or these and the residual stream, are of different types"
    tensors = [x, *norm.parameters(), *(t for m in linears for t in (m.weight, m.bias) if t is not None)]
    if not all(eager(t) and t.device == x.device for t in tensors):
        return "weights are elsewhere or of a type of their own, or something traces them"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients are asked for"
    return None


def _why_parts(mixer: nn.Module, way: "_Way") -> str | None:
    for name, kind in way.others.items():
        part = getattr(mixer, name)
        if part is not None and (why := why_called(part, kind)) is not None:
            return f"{name} {why}"
    return None


def _why_state(state: Any, linears: list[Any]) -> str | None:
    conv, dtype = getattr(state, "conv", None), linears[0].weight.dtype
    return None if conv is None or conv.dtype == dtype else f"the state keeps the convolution's inputs in {conv.dtype}"


def fused_step(mixer: Mixer, token: Token, state: Any) -> Tensor:
    """``residual + multiplier * mixer(norm(x))`` for one token per row, where :func:`why_apart` has no objection; updates the state."""
    return _WAYS[type(mixer)].step(mixer, token, state)


def head_step(head: nn.Linear, x: Tensor, norm: StepNorm) -> Tensor:
    """``head(norm(x))``."""
    return step_linear(x, head.weight, head.bias, norm=norm)


class _Way(NamedTuple):
    step: Callable[[Any, Token, Any], Tensor]
    refuse: Callable[[Any], str | None]
    linears: tuple[str, ...]
    others: dict[str, type[nn.Module]] = {}  # noqa: RUF012  # of no instance


def _convolution(conv: CausalConv1d, state: Tensor, first: int = 0) -> StepConv:
    return StepConv(first, state, conv.weight.squeeze(1), conv.bias, conv.activation == "silu")


def _refuse_mamba(m: Mamba) -> str | None:
    return m._why_called() if m.ways.causal else "it is not causal"


def _mamba(m: Mamba, token: Token, state: Any) -> Tensor:
    x, norm, residual, multiplier = token
    taps = _convolution(m.conv1d, state.conv)
    u, z = step_linear(x, m.in_proj.weight, m.in_proj.bias, norm=norm, conv=taps).chunk(2, dim=-1)
    y = m.parts().step(u, z, state.ssm)
    return step_linear(y, m.out_proj.weight, m.out_proj.bias, residual=residual, multiplier=multiplier)


def _refuse_mamba2(m: Mamba2) -> str | None:
    if not m.ways.causal:
        return "it is not causal"
    return None if m.in_multiplier == 1 and set(m.multipliers) == {1.0} else "it scales its input, or what it projects"


def _mamba2(m: Mamba2, token: Token, state: Any) -> Tensor:
    x, before, residual, multiplier = token
    taps = _convolution(m.conv1d, state.conv, 2 * m.d_mlp + m.d_ssm)
    gate, value, z, xBC, dt = m.split(step_linear(x, m.in_proj.weight, m.in_proj.bias, norm=before, conv=taps))
    y, norm = m.scan_step(xBC, z, dt, state), None
    if m.d_mlp:
        y = torch.cat([F.silu(gate) * value, y if m.norm is None else m.norm(y, z)], dim=-1)
    elif m.norm is not None:
        norm = gated_step_norm(m.norm, z)
    multiplier *= m.out_multiplier
    return step_linear(y, m.out_proj.weight, m.out_proj.bias, norm=norm, residual=residual, multiplier=multiplier)


def _refuse_mlp(m: MLP) -> str | None:
    return None if m.adapter is None else "it has an adapter"


def _mlp(m: MLP, token: Token, state: Any) -> Tensor:
    x, norm, residual, multiplier = token
    how: dict[str, Any] = {"activation": m.activation, "gated": m.gated, "gate_multiplier": m.gate_multiplier}
    h = step_linear(x, m.fc1.weight, m.fc1.bias, norm=norm, **how)
    multiplier *= m.out_multiplier
    return step_linear(h, m.fc2.weight, m.fc2.bias, residual=residual, multiplier=multiplier)


def _refuse_attention(m: Attention) -> str | None:
    if not m.causal:
        return "it is not causal"
    return None if m.adapter is None and m.in_multiplier == 1 else "it has an adapter, or scales its input"


def _attention(m: Attention, token: Token, state: Any) -> Tensor:
    x, norm, residual, multiplier = token
    taps = None if m.conv1d is None else _convolution(m.conv1d, state.conv)
    qkv = step_linear(x, m.in_proj.weight, m.in_proj.bias, norm=norm, conv=taps)
    multiplier *= m.out_multiplier
    y = m.look(qkv, state)
    return step_linear(y, m.out_proj.weight, m.out_proj.bias, residual=residual, multiplier=multiplier)


_WAYS: dict[type[nn.Module], _Way] = {
    Mamba: _Way(_mamba, _refuse_mamba, ("in_proj", "x_proj", "out_proj")),
    Mamba2: _Way(_mamba2, _refuse_mamba2, ("in_proj", "out_proj"), {"conv1d": CausalConv1d, "norm": GatedRMSNorm}),
    MLP: _Way(_mlp, _refuse_mlp, ("fc1", "fc2")),
    Attention: _Way(_attention, _refuse_attention, ("in_proj", "out_proj"), {"conv1d": CausalConv1d}),
}

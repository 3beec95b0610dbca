"""One product of a decode step and what stands around it: norm, product, and convolution, activation or residual addition in one launch.

At a few rows a product reads its weight once and does next to nothing else, so that everything around it costs more than it: launches.
"""

import functools
import os

import torch
from torch import Tensor

from .. import checks
from ..dispatch import ENV, KERNELS, Backend, Facts, choose_able, register
from . import cuda, plain
from .inputs import StepConv, StepNorm, StepProduct

register(
    "step_linear",
    Backend("cuda", KERNELS, cuda.refuse, cuda.step_linear, reserve=cuda.reserve),
    Backend("torch", "PyTorch operations", run=plain.step_linear, plain=True),
)


def step_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: StepNorm | None = None,
    conv: StepConv | None = None,
    activation: str | None = None,
    gated: bool = False,
    gate_multiplier: float = 1.0,
    residual: Tensor | None = None,
    multiplier: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """A linear layer on one token per row, with the norm in front of it and what is behind it.

    Args:
        x: ``(b, k)`` in the weight's dtype; with a norm, float32 as well.
        weight: ``(n, k)``.
        bias: ``(n,)``.
        norm: Normalises x first, to the weight's dtype.
        conv: Convolves some of the outputs with those of the tokens before. This, an activation and a residual exclude each other.
        activation: ``"silu"``, ``"gelu"``, ``"relu"`` or ``"relu2"`` (squared ReLU).
        gated: The first half of the outputs is multiplied by the activation of the second.
        gate_multiplier: Factor of that half.
        residual: ``(b, n)`` in the weight's dtype or float32, added to the outputs.
        multiplier: Factor of the outputs before that.
        backend: ``"cuda"`` or ``"torch"``; chosen automatically if absent (:mod:`hybridzoo.kernels.dispatch`).

    Returns:
        ``(b, n)``, or ``(b, n / 2)`` if gated, a new tensor in the residual's dtype if there is one, or the weight's.

    Raises:
        ValueError: Arguments do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    i = StepProduct(x, weight, bias, norm, conv, activation, gated, gate_multiplier, residual, multiplier)
    _check(i)
    given = (x, weight, bias, residual, *(norm or ())[:1])
    grad = torch.is_grad_enabled() and any([m is not None and m.requires_grad for m in given])
    facts = _facts(x.device.type, weight.dtype, *x.shape) | {
        "n": weight.shape[0],
        "grad": grad,
        "misfit": functools.partial(cuda.misfit, i),
    }
    return choose_able("step_linear", cuda.refuse, backend, facts).run(i)


def _facts(device: str, dtype: torch.dtype, b: int, k: int) -> Facts:
    return {"device": device, "dtype": dtype, "rows": b, "d": k}


def fits(device: str, dtype: torch.dtype, b: int, k: int, n: int | None = None) -> str | None:
    """Say why a layer with products of ``(b, k)`` and weights of a dtype should go its ordinary way, or ``None`` if these pay.

    ``n`` is that of a ``(n, k)`` as large as the largest weight, if known: what is small does not pay for many rows.
    """
    return _fits(device, dtype, b, k, n, os.environ.get(ENV))


@functools.lru_cache(maxsize=1024)
def _fits(device: str, dtype: torch.dtype, b: int, k: int, n: int | None, wish: str | None) -> str | None:
    if wish == "torch":
        return None
    facts = _facts(device, dtype, b, k)
    if wish is None:
        return cuda.refuse(facts) or cuda.reserve(facts | {"n": n})
    return cuda.refuse(facts) or (None if wish == "cuda" else f"{ENV}={wish} asks for another")


def _check(i: StepProduct) -> None:
    where = "step_linear"
    checks.floating(where, "x", i.x, 2, "(b, k)")
    checks.floating(where, "weight", i.weight, 2, "(n, k)")
    (b, k), n = i.x.shape, i.weight.shape[0]
    checks.shape(where, "weight", i.weight, (n, k), "(n, k), x being (b, k)")
    checks.shape(where, "bias", i.bias, (n,), "(n,)")
    checks.shape(where, "residual", i.residual, (b, n), "(b, n)")
    checks.floats(where, x=i.x, weight=i.weight, bias=i.bias, residual=i.residual)
    if i.activation not in plain.ACTIVATIONS:
        known = ", ".join(repr(name) for name in plain.ACTIVATIONS if name)
        raise ValueError(f"{where}: unknown activation {i.activation!r}. Known: {known}.")
    acts = i.gated or i.activation is not None
    if (i.conv is not None) + acts + (i.residual is not None) > 1:
        raise ValueError(f"{where}: conv, an activation and a residual exclude each other. Leave out all but one.")
    if i.gated and n % 2:
        raise ValueError(f"{where}: weight has {n} rows, of which gated needs an even number.")
    if i.norm is not None:
        _check_norm(where, i.norm, b, k)
    elif i.x.dtype != i.weight.dtype:
        raise ValueError(f"{where}: x has dtype {i.x.dtype}, the weight {i.weight.dtype}. Cast x first.")
    if i.conv is not None:
        _check_conv(where, i.conv, b, n)


def _check_norm(where: str, norm: StepNorm, b: int, k: int) -> None:
    checks.shape(where, "norm.weight", norm.weight, (k,), "(k,)")
    checks.shape(where, "norm.bias", norm.bias, (k,), "(k,)")
    checks.shape(where, "norm.gate", norm.gate, (b, k), "(b, k)")
    if norm.centred and norm.gate is not None:
        raise ValueError(f"{where}: norm is centred and has a gate, which no layer needs. Leave out one of the two.")
    if k % (norm.group_size or k):
        raise ValueError(f"{where}: k = {k} is not a multiple of norm.group_size = {norm.group_size}.")


def _check_conv(where: str, conv: StepConv, b: int, n: int) -> None:
    checks.floating(where, "conv.weight", conv.weight, 2, "(channels, kw)")
    channels, width = conv.weight.shape
    if not 0 <= conv.first <= n - channels:
        raise ValueError(
            f"{where}: conv.first = {conv.first} and {channels} filters go past the {n} rows of the weight."
        )
    checks.shape(where, "conv.state", conv.state, (b, width - 1, channels), "(b, kw - 1, channels)")
    checks.shape(where, "conv.bias", conv.bias, (channels,), "(channels,)")

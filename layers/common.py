"""Rules of precision and initialisation, and of when a module has to be called, which several layers share."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import numerics
from ..kernels.numerics import autocasts as autocasts

# as torch.nn.Linear takes them
Device = torch.device | str | None
Dtype = torch.dtype | None
# linear layers that a residual stream sums up are drawn smaller in deeper models
_A = math.sqrt(5)


def acc_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to accumulate in, and of recurrent states and pinned parameters: at least float32."""
    return numerics.acc_dtype(dtype or torch.get_default_dtype())


def upcast(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return numerics.cast(x, acc_dtype(x.dtype))


def dtype_read(x: Tensor) -> torch.dtype:
    """The dtype in which linear layers read a tensor, or one of its dtype and device: autocast's, or its own."""
    # autocast leaves float64 alone
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) and x.dtype != torch.float64 else x.dtype


def weight_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's weights, in which it takes its input; ``None`` where they are no floating-point numbers (quantised)."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def scaled(x: Tensor, factor: float) -> Tensor:
    """``factor * x``; the usual factor of 1 costs nothing."""
    return x if factor == 1 else x * factor


def drop_rows(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth (arXiv:1603.09382): rows of ``(b, ...)`` are zero with probability ``rate``, and the others make up for them."""
    kept = torch.empty(x.shape[0], *(1,) * (x.dim() - 1), device=x.device, dtype=x.dtype).bernoulli_(1 - rate)
    return x * kept.div_(1 - rate)


def linear(
    d_in: int, d_out: int, bias: bool, device: Device, dtype: Dtype, cls: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """A linear layer whose values are still to be drawn by ``reset_parameters``."""
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "meta":
        return cls(d_in, d_out, bias=bias, device=device, dtype=dtype)
    return nn.utils.skip_init(cls, d_in, d_out, bias=bias, device=device, dtype=dtype)


def why_called(module: nn.Module | None, kind: type[nn.Module]) -> str | None:
    """Say why a module has to be called as such; ``None`` if a ``kind`` of its parameters is all that it is: no adapter, no hook.

    Hooks on all modules (:func:`hooked_everywhere`) are another matter.
    """
    if type(module) is not kind:
        return f"is of type {type(module).__name__}, not {kind.__name__}"
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if hooks or "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return "has hooks, or a forward of its own"
    return None


def called(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module has to be called: whoever would rather read a ``kind``'s parameters may not."""
    return why_called(module, kind) is not None or hooked_everywhere()


def hooked_everywhere() -> bool:
    """Return whether there are hooks on all modules."""
    # torch's own names for what it calls around every module
    every: Any = nn.modules.module
    forward = every._global_forward_hooks or every._global_forward_pre_hooks
    return bool(forward or every._global_backward_hooks or every._global_backward_pre_hooks)


def is_captured(x: Tensor) -> bool:
    """Return whether what happens to a tensor now is recorded as a CUDA graph."""
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


@torch.no_grad()
def reset_linear(layer: nn.Linear, shrink: float = 1.0) -> None:
    """Draw a linear layer as torch does, divided by ``shrink``; its bias is zero, as in mamba-ssm."""
    reset_weight(layer.weight, shrink)
    if layer.bias is not None:
        layer.bias.zero_()


def reset_normal(layer: nn.Linear, std: float) -> None:
    """Draw a linear layer normally, cut off at 2, with a bias of zero, as vision models begin."""
    if layer.weight.is_meta:
        return  # nothing to draw, and arithmetic on meta tensors would import the compiler: seconds
    nn.init.trunc_normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def reset_weight(weight: Tensor, shrink: float = 1.0) -> None:
    """Draw ``(..., d_out, d_in)`` matrices as torch draws a linear layer, divided by ``shrink``."""
    bound = math.sqrt(6 / ((1 + _A**2) * weight.shape[-1])) / shrink
    weight.uniform_(-bound, bound)


@torch.no_grad()
def reset_decays(A_log: Tensor) -> None:
    """Let A be -1 ... -n along the states, the last dimension of its logarithm (S4D-Real, arXiv:2206.11893)."""
    n = torch.arange(1, A_log.shape[-1] + 1, device=A_log.device, dtype=A_log.dtype)
    A_log.copy_(n.log().expand_as(A_log))


@torch.no_grad()
def reset_dt_bias(bias: Tensor, dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """Draw the bias so that ``softplus(bias)`` is log-uniform between ``dt_min`` and ``dt_max`` (Mamba §3.6)."""
    dt = torch.rand_like(bias).mul_(math.log(dt_max) - math.log(dt_min)).add_(math.log(dt_min)).exp_()
    dt.clamp_(min=dt_init_floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))

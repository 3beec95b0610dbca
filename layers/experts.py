"""One matrix per expert, applied to its own run of rows: the dropless core of a mixture of experts (arXiv:2211.15841).

``torch.nn.functional.grouped_mm`` does it in one kernel. It is wrapped in an op of our own because, as of torch 2.13,
its shape rule for tracing accepts bfloat16 only, so ``torch.compile`` fails on what runs well in eager mode. The loop is the
oracle and the fallback. megablocks 0.10.0 and grouped_gemm 0.3.0, by which it multiplies, compile for torch 2.11 without megablocks' pin
on torch 2.7; for CUDA 13, ``debug_synchronous`` must go from megablocks' csrc/cumsum.h, which CUB no longer takes.
Forward and backward of 16,384 rows on an H200, bfloat16: 8 experts from 1,024 to 4,096 channels take 1.21 ms by grouped_mm, 1.58 ms by
megablocks and 1.89 ms in the loop; 16 experts from 4,096 to 1,024 take 1.34, 1.94 and 2.78 ms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..kernels.derivatives import differentiable_once, plain
from ..kernels.dispatch import FLOATS, Backend, Facts, library, refuse_library, register
from ..kernels.operators import custom_op
from ..kernels.torch_private import vmapped

__all__ = ["grouped_linear"]


def _refuse_grouped_mm(facts: Facts) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return "this torch has no grouped_mm (torch >= 2.10 has)"
    dtype = facts.get("dtype", torch.float32)
    if dtype not in FLOATS:
        return f"grouped_mm takes float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    for width in facts.get("widths", ()):
        if width * dtype.itemsize % 16:
            return f"grouped_mm needs rows of a multiple of 16 bytes, got {width} x {dtype.itemsize} = {width * dtype.itemsize}"
    return None


def _refuse_megablocks(facts: Facts) -> str | None:
    reason = refuse_library("megablocks", facts, (torch.bfloat16,))
    if reason is None and getattr(library("megablocks").grouped_gemm_util, "backend", None) is None:  # type: ignore[union-attr]
        return "megablocks multiplies by grouped_gemm, which is not installed"
    return reason


register(
    "moe",
    Backend("grouped_mm", "torch's grouped matmul", _refuse_grouped_mm),
    Backend("megablocks", "megablocks' grouped matmuls", _refuse_megablocks),
    Backend("loop", "one matmul per expert", plain=True),
)


def _runs(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _gmm(a: Tensor, b: Tensor, offsets: Tensor, **transposed: bool) -> Tensor:
    from megablocks import grouped_gemm_util

    sizes = torch.tensor([j - i for i, j in _runs(offsets)])  # it wants them on the CPU
    # below its autograd, which knows one of the two transpositions
    return grouped_gemm_util.backend.gmm(a.contiguous(), b.contiguous(), sizes, **transposed)


def _asks_the_device(x: Tensor, backend: str) -> bool:
    # torch's own grouped_mm is a loop, too, unless it has a kernel: bfloat16 from Hopper on
    return backend != "grouped_mm" or x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (9, 0)


def _loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch.cat([x[i:j] @ w.t() for (i, j), w in zip(_runs(offsets), weight, strict=True)])


def _gather(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    expert = torch.searchsorted(offsets, torch.arange(len(x), device=x.device, dtype=offsets.dtype), right=True)
    return (weight[expert] @ x[..., None]).squeeze(-1)


def _plain(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The product in operations that have every kind of derivative; samples that vmap works on have no offsets in common."""
    return (_gather if vmapped() else _loop)(x, weight, offsets)


@custom_op("hybridzoo::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, backend: str) -> Tensor:
    if x.is_cuda and torch.cuda.is_current_stream_capturing() and _asks_the_device(x, backend):
        backend = "gather"
    if backend == "gather":
        return _gather(x, weight, offsets)
    if backend == "loop":
        return _loop(x, weight, offsets)
    if backend == "megablocks":
        return _gmm(x, weight, offsets, trans_b=True)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@custom_op("hybridzoo::grouped_linear_weight_grad", mutates_args=())
def _weight_grad(grad: Tensor, x: Tensor, offsets: Tensor, backend: str) -> Tensor:
    if backend == "loop":
        return torch.stack([grad[i:j].t() @ x[i:j] for i, j in _runs(offsets)])
    if backend == "megablocks":
        return _gmm(grad, x, offsets, trans_a=True)
    return F.grouped_mm(grad.t(), x, offs=offsets)


differentiable_once(_weight_grad)


@_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return grad.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


def _setup(ctx, inputs, output) -> None:
    x, weight, offsets, ctx.backend = inputs
    ctx.save_for_backward(x, weight, offsets)


def _backward(ctx, grad: Tensor):
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()  # grouped_mm refuses the stride 0 of y.sum().backward()
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.hybridzoo.grouped_linear(grad, weight.transpose(1, 2).contiguous(), offsets, ctx.backend)
    if ctx.needs_input_grad[1]:
        dw = torch.ops.hybridzoo.grouped_linear_weight_grad(grad, x, offsets, ctx.backend)
    return dx, dw, None, None


_grouped_linear.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.hybridzoo.grouped_linear)
def _(x_shape, weight_shape, offsets_shape, backend, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.hybridzoo.grouped_linear_weight_grad)
def _(grad_shape, x_shape, offsets_shape, backend, *args, out_shape=None, **kwargs) -> int:
    return 2 * grad_shape[0] * grad_shape[1] * x_shape[1]


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, backend: str = "grouped_mm") -> Tensor:
    """Multiply each run of rows with its own matrix.

    Args:
        x: ``(t, d_in)``, rows sorted by expert.
        weight: ``(e, d_out, d_in)``.
        offsets: ``(e,)`` int32, where each expert's run ends; runs may be empty.
        backend: ``"grouped_mm"``; ``"megablocks"`` or ``"loop"``, which ask the device for the offsets; ``"gather"``, which copies
            a matrix per row and is what a CUDA graph of a few rows takes instead of those.

    Returns:
        ``(t, d_out)``, differentiable in ``x`` and ``weight``.
    """
    if plain():
        return _plain(x, weight, offsets)
    return torch.ops.hybridzoo.grouped_linear(x, weight, offsets, backend)

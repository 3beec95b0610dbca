"""The CUDA cross-entropy: launches of ``cross_entropy.cu``, and the ``torch.library`` op around them."""

import ctypes
import functools
from ctypes import c_float, c_int, c_longlong, c_void_p
from typing import Any

import torch
from torch import Tensor

from ..derivatives import refusing
from ..dispatch import Facts
from ..gpu import nvrtc, structs
from ..gpu.device import DRIVERS, shared_memory
from ..gpu.operands import TYPES, ceil_div, in_one_piece, refuse_tensors
from ..numerics import blank
from ..operators import custom_op

# threads of a block, and up to how many 16-byte vectors a row gets them; more for longer ones
THREADS, MOST = ((32, 64), (128, 1024)), 512
# shared memory of a block besides what it keeps: the driver's share and the sums
_BESIDE = DRIVERS + 128


class CrossEntropyParams(ctypes.Structure):
    """``CrossEntropyParams`` of ``cross_entropy.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "logits targets losses gradient"),
        ("ignore", c_longlong),
        ("v", c_int),
        ("scale", c_float),
    ]


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA cross-entropy cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    reason = refuse_tensors(facts)
    if reason is None and facts.get("subclass"):
        return f"the CUDA kernels read plain tensors, got {facts['subclass']}"
    return reason or nvrtc.unavailable()


@functools.lru_cache(maxsize=1024)
def plan(v: int, dtype: torch.dtype, want_gradient: bool, room: int) -> tuple[str, int, int]:
    """The kernel for rows of ``v`` logits, its threads, and the bytes of shared memory that keep a row, or what fits of it twice.

    ``room`` is what a multiprocessor has; a block may have half of it anywhere.
    """
    vectors = ceil_div(v * dtype.itemsize, 16)
    threads = next((t for t, most in THREADS if vectors <= most), MOST)
    fits = (room // 2 - _BESIDE) // (16 * threads)
    keep = min(ceil_div(vectors, threads), fits) if want_gradient else 0
    name = f"cross_entropy<{TYPES[dtype]}, {threads}, {keep}, {str(want_gradient).lower()}>"
    return name, threads, 16 * threads * keep


@functools.lru_cache(maxsize=1024)
def _tail(ignore_index: int, v: int, scale: float) -> bytes:
    return structs.tail(CrossEntropyParams(ignore=ignore_index, v=v, scale=scale))


def forward(
    logits: Tensor, targets: Tensor, ignore_index: int, want_gradient: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """The losses (m,) in float32, and the gradient (m, v) in the logits' type if it is wanted."""
    m, v = logits.shape
    logits, targets = in_one_piece(logits, logits.dtype, aligned=True), targets.to(torch.int64).contiguous()
    losses = torch.empty(m, dtype=torch.float32, device=logits.device)
    gradient = blank(logits) if want_gradient else None
    if m:
        name, threads, shared = plan(v, logits.dtype, want_gradient, shared_memory(logits.device))
        packed = structs.pack(_tail(ignore_index, v, scale), logits, targets, losses, gradient)
        nvrtc.launch("cross_entropy.cu", name, packed, m, threads, shared, logits.device)
    return losses, gradient


@custom_op("hybridzoo::cross_entropy_cuda", mutates_args=())
def cross_entropy_op(
    logits: Tensor, targets: Tensor, ignore_index: int, want_gradient: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The losses (m,) in float32, and the gradient (m, v), empty if it is not wanted."""
    losses, gradient = forward(logits, targets, ignore_index, want_gradient, scale)
    return losses, logits.new_empty(0) if gradient is None else gradient


@cross_entropy_op.register_fake
def _fake(logits, targets, ignore_index, want_gradient, scale):
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return losses, blank(logits) if want_gradient else logits.new_empty(0)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, ctx.ignore_index, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets)


def _backward(ctx: Any, glosses: Tensor | None, _: Any) -> tuple:
    if glosses is None:
        return None, None, None, None, None
    logits, targets = ctx.saved_tensors
    gradient = torch.ops.hybridzoo.cross_entropy_cuda(logits, targets, ctx.ignore_index, True, 1.0)[1]
    return (refusing("cross_entropy", gradient, logits) * glosses[:, None]).to(logits.dtype), None, None, None, None


cross_entropy_op.register_autograd(_backward, setup_context=_setup)


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, want_gradient: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """:func:`.op.cross_entropy` on an NVIDIA GPU; the same arguments and results."""
    if not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and logits.requires_grad):
        return forward(logits, targets, ignore_index, want_gradient, scale)
    losses, gradient = torch.ops.hybridzoo.cross_entropy_cuda(logits, targets, ignore_index, want_gradient, scale)
    return losses, gradient if want_gradient else None

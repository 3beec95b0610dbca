"""A Mamba layer as one node of autograd: two products, the convolution, two products, the scan, and a product.

Forward and backward are those of the parts, called one after the other. What it saves against a node for each: most of the host's time,
which an eager step waits for; the pass that adds up the two gradients of the convolution's output, since the second of them is a product
that adds to the first; and the rounding, and the conversion, of gradients of weights that are float32 themselves.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .conv import cuda as conv_kernels
from .derivatives import once
from .dispatch import Backend, Facts, register
from .gpu import nvrtc
from .gpu.operands import in_one_piece
from .layer_node import Again, Gradients, Marks, filtered, flat, refuse
from .norm import cuda as norm_kernels
from .numerics import add_product, cast
from .scan import launches
from .scan.inputs import ScanInputs
from .scan.operands import ScanOperands
from .scan.shapes import keeps_states
from .seq import Seq


class Weights(NamedTuple):
    """The parameters of a layer; ``d`` channels, ``n`` states, ``r`` the rank of the step sizes, ``k`` the width of the filter."""

    in_proj: Tensor  # (2 d, d_model)
    in_bias: Tensor | None  # (2 d,)
    conv: Tensor  # (d, 1, k)
    conv_bias: Tensor | None  # (d,)
    x_proj: Tensor  # (r + 2 n, d)
    dt_proj: Tensor  # (d, r)
    dt_bias: Tensor  # (d,)
    A_log: Tensor  # (d, n)
    D: Tensor  # (d,)
    out_proj: Tensor  # (d_model, d)
    out_bias: Tensor | None  # (d_model,)
    dt_norm: Tensor | None = None  # (r,), and those of B and C, (n,): where these are normalised, and it is learned how
    B_norm: Tensor | None = None
    C_norm: Tensor | None = None


_NORMS = ("dt_norm", "B_norm", "C_norm")


def _split(given: Tensor, n: int) -> list[Tensor]:
    # the step sizes' low-rank form, B and C
    return list(given.split([given.shape[-1] - 2 * n, n, n], dim=-1))


def _normed(given: Tensor, n: int, norms: Sequence[Tensor | None], eps: float | None) -> list[Tensor]:
    parts = _split(given, n)
    if eps is None:
        return parts
    return [norm_kernels.forward(x, w, eps, x.dtype)[0] for x, w in zip(parts, norms, strict=True)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, eps: float | None, again: Again | None, marks: Marks, x: Tensor, *tensors: Any
    ) -> Tensor:
        w = Weights(*tensors)
        ctx.dtype, ctx.eps, ctx.types = dtype, eps, [None if m is None else m.dtype for m in (x, *tensors)]
        w_in, w_x, w_dt, w_out = (cast(m, dtype) for m in (w.in_proj, w.x_proj, w.dt_proj, w.out_proj))
        b_in, b_out = (cast(m, dtype) for m in (w.in_bias, w.out_bias))
        x = cast(x, dtype)
        xz = F.linear(x, w_in, b_in)
        u, z = xz.chunk(2, dim=-1)
        u = conv_kernels.forward(filtered(u, w.conv, w.conv_bias, marks), True)
        given = F.linear(u, w_x)
        A_log, D, bias = map(in_one_piece, (w.A_log, w.D, w.dt_bias))
        A = A_log.exp().neg_()
        norms = w.dt_norm, w.B_norm, w.C_norm
        low, B, C = _normed(given, A.shape[1], norms, eps)
        i = ScanInputs(u, F.linear(low, w_dt), A, B, C, D, z, bias, None, marks.reset, marks.valid)
        out, _, states = launches.forward(ScanOperands(i, True), keeps_states(A.shape[1]), final=False)
        ctx.form, kept = again or (None, [x])
        made, read = (xz, given, states), (w_in, w.conv, w.conv_bias, w_x, w_dt, bias, A, D, w_out)
        ctx.save_for_backward(*made, *read, *norms, *marks, *kept)
        return F.linear(out, w_out, b_out)

    @staticmethod
    @once("Mamba")
    def backward(ctx: Any, gy: Tensor) -> tuple:
        # in autograd's thread this may be what comes first, and cuBLAS warns where there is no context
        nvrtc.enter(gy.device)
        with torch.autocast(gy.device.type, enabled=False):
            return (None, None, None, None, *_gradients(ctx, gy))


def _gradients(ctx: Any, gy: Tensor) -> list[Tensor | None]:
    xz, given, states, w_in, conv, conv_bias, w_x, w_dt, bias, A, D, w_out, *others = ctx.saved_tensors
    norms, marks, kept, n = others[:3], Marks(*others[3:6]), others[6:], A.shape[1]
    grads = Gradients(("x", *Weights._fields), ctx.types, ctx.needs_input_grad[4:])
    wanted = grads.wanted
    u, z = xz.chunk(2, dim=-1)
    gxz = torch.empty_like(xz)
    ghalf, gz = gxz.chunk(2, dim=-1)
    taken = filtered(u, conv, conv_bias, marks)
    u, (low, B, C) = conv_kernels.forward(taken, True), _normed(given, n, norms, ctx.eps)
    i = ScanInputs(u, F.linear(low, w_dt), A, B, C, D, z, bias, None, marks.reset, marks.valid)
    call = ScanOperands(i, True)
    gout = F.linear(gy, w_out.t())
    out = torch.empty_like(u) if wanted["out_proj"] else None
    scanned = launches.backward(call, gout, None, states, into=call.gradients(z=gz), out=out)
    grads.found |= {"A_log": scanned.A.mul_(A), "D": scanned.D, "dt_bias": scanned.dt_bias}
    gu, gdt, gB, gC = scanned.u, scanned.dt, scanned.B, scanned.C
    del i, call, scanned, gout  # the step sizes too
    if out is not None:
        grads.weight("out_proj", gy, out)
    grads.offset("out_bias", gy)
    del out
    grads.weight("dt_proj", gdt, low)
    each = [F.linear(gdt, w_dt.t()), gB, gC]
    del gdt
    if ctx.eps is not None:
        for k, (name, x) in enumerate(zip(_NORMS, _split(given, n), strict=True)):
            each[k], grads.found[name], *_ = norm_kernels.backward(x, norms[k], ctx.eps, each[k], None, wanted[name])
    ggiven = torch.cat(each, dim=-1)
    grads.weight("x_proj", ggiven, u)
    add_product(flat(gu), flat(ggiven), w_x)
    _, gconv, grads.found["conv_bias"], *_ = conv_kernels.backward(taken, True, gu, gx=ghalf)
    grads.found["conv"] = gconv.unsqueeze(1)
    del u, gu
    if wanted["in_proj"]:
        grads.weight("in_proj", gxz, cast(ctx.form(kept) if ctx.form else kept[0], ctx.dtype))
    grads.offset("in_bias", gxz)
    if wanted["x"]:
        grads.found["x"] = F.linear(gxz, w_in.t())
    return grads.in_order()


def mamba_layer(
    x: Tensor,
    weights: Weights,
    seq: Seq | None,
    dtype: torch.dtype,
    again: Again | None = None,
    eps: float | None = None,
) -> Tensor:
    """Mamba (arXiv:2312.00752, Figure 3) on an NVIDIA GPU, from a fresh state, where a gradient is wanted.

    Args:
        x: ``(b, l, d_model)``.
        weights: The layer's parameters.
        seq: Documents and padding.
        dtype: What products and scan read: float32, bfloat16 or float16.
        again: What forms ``x`` for the backward, and from which tensors, which are kept in its place.
        eps: That of the norms of dt, B and C (RMSNorm), where these are normalised.

    Returns:
        ``(b, l, d_model)`` in ``dtype``; once differentiable, in x and all weights.

    Raises:
        ValueError: ``seq`` describes other rows.
    """
    checks.fits("Mamba", seq, x)
    return _Layer.apply(dtype, eps, again, Marks.of(seq), x, *weights)


def _refuse(facts: Facts) -> str | None:
    return refuse(("selective_scan", "causal_conv1d", *(["rms_norm"] if facts.get("normed") else [])), facts)


register(
    "mamba_layer",
    Backend("cuda", "forward and backward of the layer as one node of autograd", _refuse),
    Backend("modules", "a call for each of its parts", plain=True),
)

"""A Mamba-2 layer as one node of autograd: a product, the convolution, the scan by SSD, the norm with its gate, and a product.

Forward and backward are those of the parts, called one after the other. What it saves against a node for each: memory, since of what the
parts make only the first product is kept, and the convolution, the scan with its states, and the norm are formed again; the passes that
autograd takes to put the gradients of the projection's slices together, which are written into one tensor here; the rounding, and the
conversion, of gradients of weights that are float32 themselves; and most of the host's time.
"""

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
from .layer_node import Again, Gradients, Marks, filtered, refuse
from .norm import gated_cuda as norm_kernels
from .norm.gated_cuda import Gating
from .numerics import cast
from .seq import Seq
from .ssd import cuda as ssd_forward
from .ssd import cuda_backward as ssd_backward
from .ssd.inputs import SsdInputs, SsdOptions


class Weights(NamedTuple):
    """The parameters of a layer; ``d = h p`` channels of the scan, ``w = d + 2 g n`` of the convolution, ``k`` the width of the filter."""

    in_proj: Tensor  # (d + w + h, d_model), for z, x, B, C and dt
    in_bias: Tensor | None  # (d + w + h,)
    conv: Tensor  # (w, 1, k)
    conv_bias: Tensor | None  # (w,)
    dt_bias: Tensor  # (h,)
    A_log: Tensor  # (h,)
    D: Tensor  # (h,) or (d,)
    norm: Tensor | None  # (d,); without, the scan gates
    out_proj: Tensor  # (d_model, d)
    out_bias: Tensor | None  # (d_model,)


class Form(NamedTuple):
    """The sizes and options of a layer that its parameters do not tell."""

    headdim: int
    ngroups: int
    d_state: int
    dt_limit: tuple[float, float]
    norm: Gating | None

    @property
    def options(self) -> SsdOptions:
        """Those of the scan."""
        return SsdOptions(True, *self.dt_limit)

    def slices(self, packed: Tensor, h: int) -> tuple[Tensor, ...]:
        """Cut the first product, or its gradient, into z, the convolution's input and dt."""
        d = h * self.headdim
        return packed.split([d, packed.shape[-1] - d - h, h], dim=-1)

    def scan(self, xBC: Tensor, z: Tensor, dt: Tensor, parameters: tuple, marks: Marks) -> SsdInputs:
        """The operands of the scan; ``parameters`` are A, D, and the bias of dt."""
        (A, D, bias), p, bc = parameters, self.headdim, self.ngroups * self.d_state
        x, B, C = xBC.split([xBC.shape[-1] - 2 * bc, bc, bc], dim=-1)
        B, C = (m.unflatten(-1, (self.ngroups, self.d_state)) for m in (B, C))
        D = D if D.shape == A.shape else D.view(-1, p)
        gate = None if self.norm is not None else z.unflatten(-1, (-1, p))
        return SsdInputs(x.unflatten(-1, (-1, p)), dt, A, B, C, D, gate, bias, None, marks.reset, marks.valid)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, form: Form, again: Again | None, marks: Marks, x: Tensor, *tensors: Any
    ) -> Tensor:
        w = Weights(*tensors)
        ctx.dtype, ctx.form, ctx.types = dtype, form, [None if m is None else m.dtype for m in (x, *tensors)]
        w_in, b_in, w_out, b_out = (cast(m, dtype) for m in (w.in_proj, w.in_bias, w.out_proj, w.out_bias))
        A_log, D, bias = map(in_one_piece, (w.A_log, w.D, w.dt_bias))
        parameters = A_log.exp().neg_(), D, bias
        x = cast(x, dtype)
        packed = F.linear(x, w_in, b_in)
        z, xBC, dt = form.slices(packed, len(bias))
        xBC = conv_kernels.forward(filtered(xBC, w.conv, w.conv_bias, marks), True)
        y, *_ = ssd_forward.forward(form.scan(xBC, z, dt, parameters, marks), form.options, False)
        y = y.flatten(-2)
        if form.norm is not None:
            assert w.norm is not None
            y = norm_kernels.forward(y, z, w.norm, form.norm)
        ctx.again, kept = again or (None, [x])
        ctx.save_for_backward(packed, w_in, w.conv, w.conv_bias, *parameters, w.norm, w_out, *marks, *kept)
        return F.linear(y, w_out, b_out)

    @staticmethod
    @once("Mamba2")
    def backward(ctx: Any, gy: Tensor) -> tuple:
        # in autograd's thread this may be what comes first, and cuBLAS warns where there is no context
        nvrtc.enter(gy.device)
        with torch.autocast(gy.device.type, enabled=False):
            return (None, None, None, None, *_gradients(ctx, gy))


def _gradients(ctx: Any, gy: Tensor) -> list[Tensor | None]:
    packed, w_in, conv, conv_bias, *others = ctx.saved_tensors
    parameters, w_norm, w_out, marks, kept = others[:3], others[3], others[4], Marks(*others[5:8]), others[8:]
    (A, _, bias), form = parameters, ctx.form
    grads = Gradients(("x", *Weights._fields), ctx.types, ctx.needs_input_grad[4:])
    wanted = grads.wanted
    gpacked = torch.empty_like(packed)
    (z, xBC, dt), (gz, gxBC, gdt) = (form.slices(m, len(bias)) for m in (packed, gpacked))
    taken = filtered(xBC, conv, conv_bias, marks)
    i = form.scan(conv_kernels.forward(taken, True), z, dt, tuple(parameters), marks)
    y, _, states = ssd_forward.forward(i, form.options, True)
    gout, out = F.linear(gy, w_out.t()), y.flatten(-2)
    del y
    if form.norm is not None:
        found = norm_kernels.backward(out, z, w_norm, form.norm, gout, wanted["norm"], gz, wanted["out_proj"])
        gout, out, grads.found["norm"] = found.x, found.out, found.weight  # type: ignore[assignment]
        del found
    if wanted["out_proj"]:
        grads.weight("out_proj", gy, out)
    grads.offset("out_bias", gy)
    del out
    gout = gout.unflatten(-1, (-1, form.headdim))
    gfiltered = torch.empty(xBC.shape, dtype=xBC.dtype, device=xBC.device)
    room = form.scan(gfiltered, gz, gdt, tuple(parameters), marks)
    into = room.x, room.dt, room.B, room.C, room.z
    scanned: Any = ssd_backward.backward(i, form.options, gout, None, states, into=into)  # type: ignore[arg-type]
    grads.found |= {"A_log": scanned.A * A, "D": scanned.D.flatten(), "dt_bias": scanned.dt_bias}
    del i, states, gout, scanned
    _, gconv, grads.found["conv_bias"], *_ = conv_kernels.backward(taken, True, gfiltered, gx=gxBC)
    grads.found["conv"] = gconv.unsqueeze(1)
    del gfiltered
    if wanted["in_proj"]:
        grads.weight("in_proj", gpacked, cast(ctx.again(kept) if ctx.again else kept[0], ctx.dtype))
    grads.offset("in_bias", gpacked)
    if wanted["x"]:
        grads.found["x"] = F.linear(gpacked, w_in.t())
    return grads.in_order()


def mamba2_layer(
    x: Tensor, weights: Weights, form: Form, seq: Seq | None, dtype: torch.dtype, again: Again | None = None
) -> Tensor:
    """Mamba-2 (arXiv:2405.21060, Figure 6) on an NVIDIA GPU, from a fresh state, where a gradient is wanted.

    Args:
        x: ``(b, l, d_model)``.
        weights: The layer's parameters.
        form: Its sizes and options.
        seq: Documents and padding.
        dtype: What products, scan and norm read: float32, bfloat16 or float16.
        again: What forms ``x`` for the backward, and from which tensors, which are kept in its place.

    Returns:
        ``(b, l, d_model)`` in ``dtype``; once differentiable, in x and all weights.

    Raises:
        ValueError: ``seq`` describes other rows.
    """
    checks.fits("Mamba2", seq, x)
    return _Layer.apply(dtype, form, again, Marks.of(seq), x, *weights)


def _refuse(facts: Facts) -> str | None:
    ops = ("ssd", "causal_conv1d", *(["gated_rms_norm"] if facts.get("normed") else []))
    return refuse(ops, facts | {"grad": True})


register(
    "mamba2_layer",
    Backend("cuda", "forward and backward of the layer as one node of autograd", _refuse),
    Backend("modules", "a call for each of its parts", plain=True),
)

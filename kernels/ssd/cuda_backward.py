"""Gradients of the CUDA SSD: the launches, and the ops and autograd around them.

Four launches: step sizes, their sums and the way through the gate; the gradients of the states behind chunks, chunk after chunk from the
last; all else, a block per chunk and share of a group's heads; and the sums of what those blocks left.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..derivatives import differentiable_once, once
from ..dispatch import Facts
from ..gpu import launch_plans, nvrtc, structs
from ..gpu.device import DRIVERS, has_groups, processors, shared_memory
from ..gpu.operands import (
    RESET,
    UNALIGNED,
    alignment,
    eager,
    in_one_piece,
    in_rows,
    in_types_of,
)
from ..numerics import blank
from ..operators import custom_op, filled, like
from . import cuda
from .backward_plans import Look, Plan, chunk_shape, plan
from .chunked import _OPTIONS, _TENSORS
from .cuda import GATED, _strides, forward, readable, ssd_op
from .inputs import SsdInputs, SsdOptions


def look_of(i: SsdInputs, gout: Tensor, saved: Tensor, options: SsdOptions, into: Sequence[Any]) -> Look:
    """All that the launches for readable inputs depend on besides addresses; ``into`` as for :func:`backward`, or empty."""
    (b, l, h, p), (g, n), x = i.x.shape, i.B.shape[2:], i.x
    lanes = 16 // x.element_size()
    strides = [(0, 0, 0) if m is None else _strides(m) for m in (x, i.dt, i.B, i.C, i.z, gout)]
    # the gradient of what is gated is in one piece, and that of what is not is gout
    gated = tuple(s if size > 1 else 0 for s, size in zip((l * h * p, h * p, p), (b, l, h), strict=True))
    strides.append(strides[-1] if i.z is None else gated)
    off = p % lanes or n % lanes or any([s % lanes for k, values in enumerate(strides) if k != 1 for s in values])
    gx, gdt, gB, _, gz = into or [None] * 5
    rows: tuple[int, ...] = (h * p, h, 0 if i.z is None else h * p, g * n)
    if into:
        # of a single token torch may say anything, so of rows of one the distance is that of the rows
        rows = tuple([0 if m is None else m.stride(0 if l == 1 else 1) for m in (gx, gdt, gz, gB)])
    off = off or rows[0] % lanes or rows[2] % lanes
    off = off or min(alignment(m) for m in (x, i.B, i.C, i.z, gout, saved, gx, gz)) < 16
    flags = bool(off) * UNALIGNED | (i.reset is not None) * RESET | (i.z is not None) * GATED
    return Look(
        x.dtype,
        i.dt.dtype != x.dtype,
        (b, l, h, p, n, g),
        sum(strides, ()) + rows,
        flags,
        0 if i.D is None else i.D.dim(),
        options,
    )


def backward(
    i: SsdInputs,
    options: SsdOptions,
    gout: Tensor,
    glast: Tensor | None,
    saved: Tensor,
    into: Sequence[Any] = (),
) -> SsdInputs:
    """Gradients of the inputs in the types that they are read in, those of A, D, dt_bias and the initial state in float32.

    ``saved`` holds the states before chunks, (b, chunks, h, p, n) in their :func:`saved_dtype`. ``into``, if it is given, takes those of
    x, dt, B, C and z: of their shapes and types, in one piece within a token, and tokens at one distance, B's and C's at the same.
    """
    device = i.x.device
    count, space = processors(device), shared_memory(device) - DRIVERS

    def plan_of() -> tuple[tuple, Plan]:
        read = readable(i)
        grads = in_rows(gout, read.x.dtype), in_one_piece(glast)
        look = look_of(read, grads[0], saved, options, into)
        return (*grads, saved, *read, *into), plan(look, count, space, has_groups(device))

    given = (gout, glast, saved, *i, *into)
    (gout, glast, saved, *read), cut = launch_plans.planned("ssd_backward", given, plan_of, options, count, space)
    i = SsdInputs(*read[: len(i)])
    gx, gdt, gB, gC, gz = into or [m if m is None else blank(m) for m in (i.x, i.dt, i.B, i.C, i.z)]
    ginit = None if i.initial_state is None else blank(i.initial_state)
    gA, gbias, gD = blank(i.A), blank(i.A), blank(i.A if i.D is None else i.D)
    # one piece of memory for what lies between launches, since asking for it takes a small call longer than a kernel
    memory = i.A.new_empty(cut.floats)
    start = memory.data_ptr()
    steps, cuts, gstates, gBC, gheads, gy = [start + place for place in cut.places]
    inputs = (*i[:8], i.reset, i.valid, gout, gout if i.z is None else gy, glast, saved)
    outputs = (gx, gdt, gz, gBC, gheads, ginit, gB, gC, gA, gbias, gD)
    packed = structs.pack(cut.tail, *inputs, steps, cuts, gstates, *outputs)
    for launch in cut.launches:
        nvrtc.launch(launch.source, launch.name, packed, launch.blocks, launch.threads, launch.shared, device)
    return SsdInputs(gx, gdt, gA, gB, gC, None if i.D is None else gD, gz, gbias, ginit)


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA kernels cannot do a call, or ``None`` if they can; see :class:`.dispatch.Backend`."""
    reason = cuda.refuse(facts)
    if reason is not None or not facts.get("grad"):
        return reason
    n, element = facts.get("d_state", 128), facts.get("dtype", torch.float32).itemsize
    room = shared_memory(torch.device("cuda", torch.cuda.current_device())) - DRIVERS
    if chunk_shape(element, 64, n, True, room) is None:
        return f"the CUDA kernels of ssd need more than {room >> 10} KiB of shared memory for the gradients of d_state = {n}"
    return None


def _gradients(gout: Tensor, glast: Tensor | None, saved: Tensor, i: SsdInputs, options: SsdOptions) -> tuple:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state in their types."""
    given = i[:9]
    if i.x.numel() and i.B.numel():
        return tuple(in_types_of(given, backward(i, options, gout, glast, saved)[:9]))
    grads = [None if m is None else torch.zeros_like(m) for m in given]
    if grads[-1] is not None and glast is not None:
        grads[-1].copy_(glast)
    return tuple(grads)


@custom_op(
    "hybridzoo::ssd_cuda_backward",
    schema=f"(Tensor gout, Tensor? glast, Tensor saved, {_TENSORS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 9)})",
)
def ssd_backward_op(gout: Tensor, glast: Tensor | None, saved: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; empty where there is no such input."""
    return filled(_gradients(gout, glast, saved, SsdInputs(*operands[:-4]), SsdOptions(*operands[-4:])), gout)


differentiable_once(ssd_backward_op)


@ssd_backward_op.register_fake
def _ssd_backward_fake(gout, glast, saved, *operands):
    return like(gout, *operands[:9])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.dt_softplus, ctx.low, ctx.high, ctx.chunk, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, gout: Tensor | None, glast: Tensor | None, _: Any) -> tuple:
    *inputs, saved = ctx.saved_tensors
    if gout is None:
        gout = torch.zeros_like(inputs[0])
    options = ctx.dt_softplus, ctx.low, ctx.high, ctx.chunk
    grads = torch.ops.hybridzoo.ssd_cuda_backward(gout, glast, saved, *inputs, *options)
    return (*(None if x is None else g for g, x in zip(grads, inputs, strict=False)), *[None] * 7)


ssd_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs a small call more time than the kernels."""

    @staticmethod
    def forward(ctx: Any, options: SsdOptions, plan: cuda.Plan | None, *tensors: Any) -> tuple[Tensor, Tensor]:
        out, last, saved = forward(SsdInputs(*tensors), options, True, plan)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)
        return out, last

    @staticmethod
    @once("ssd")
    def backward(ctx: Any, gout: Tensor | None, glast: Tensor | None) -> tuple:
        *tensors, saved = ctx.saved_tensors
        if gout is None:
            gout = torch.zeros_like(tensors[0])
        return (None, None, *_gradients(gout, glast, saved, SsdInputs(*tensors), ctx.options), None, None)


def ssd(i: SsdInputs, options: SsdOptions, plan: cuda.Plan | None = None) -> tuple[Tensor, Tensor]:
    """:func:`.reference.ssd` on an NVIDIA GPU; the same arguments and results.

    ``plan`` are the forward's launches of a call like this (:mod:`hybridzoo.kernels.gpu.launch_plans`).
    """
    save = torch.is_grad_enabled() and any([m is not None and m.requires_grad for m in i])
    # what is traced, or is not a plain tensor, needs the registered op
    if not eager(i.x):
        return torch.ops.hybridzoo.ssd_cuda(*i, *options, save)[:2]
    return _Eager.apply(options, plan, *i) if save else forward(i, options, False, plan)[:2]

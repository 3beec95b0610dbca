"""The CUDA scan as ``torch.library`` ops: autograd, fake tensors for ``torch.compile``, and why a call may be refused.

Autocast: the ops take what they are given. Operands of one 16-bit type run in that type with a float32 state; operands of different types
meet in float32 (:meth:`.operands.Call.of`). A, D, the bias and the states are float32 whatever the rest is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..derivatives import differentiable_once, once
from ..gpu import nvrtc
from ..gpu.device import DRIVERS, shared_memory
from ..gpu.operands import eager, in_types_of, refuse_tensors
from ..operators import custom_op
from . import cuda_paths, low_rank
from . import launches as cuda_backend
from .launches import Launches
from .operands import Call
from .paths import Path
from .shapes import BACKWARD, MAX_STATE, backward_shape, forward_shapes, instance, keeps_states


def refuse(facts: dict[str, Any]) -> str | None:
    """Why the CUDA scan cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    reason, n = refuse_tensors(facts), facts.get("d_state", 16)
    if reason is None and n > MAX_STATE:
        return f"the CUDA kernels scan up to d_state = {MAX_STATE}, got {n}"
    return reason or nvrtc.unavailable() or _too_big(n, facts.get("dtype", torch.float32).itemsize)


def _too_big(n: int, element: int) -> str | None:
    if n <= MAX_STATE // 2:
        # fits any GPU that the kernels run on
        return None
    space = shared_memory(torch.device("cuda", torch.cuda.current_device())) - DRIVERS
    if forward_shapes(MAX_STATE, element, space) and backward_shape(MAX_STATE, element, space):
        return None
    return (
        f"the CUDA kernels of more than {MAX_STATE // 2} states need more shared memory than the {space >> 10} KiB that a "
        f"block has here, got d_state = {n}"
    )


@custom_op("hybridzoo::selective_scan_cuda", mutates_args=())
def scan_op(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    valid: Tensor | None,
    dt_softplus: bool,
    save: bool,
    paths: Sequence[int] | None = None,
    dt_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan: outputs (b, l, d), the last state (b, d, n), and, to ``save``, the states that the backward starts from.

    ``paths`` are five integers for each walk; states then have a leading axis of one per walk.
    """
    operands = (u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus, dt_weight)
    out, last, saved = _forward(operands, save, paths)
    return out, last, last.new_empty(0) if saved is None else saved


def _forward(
    operands: tuple, save: bool, paths: Sequence[int] | None, final: bool = True, launches: Launches | None = None
) -> tuple[Tensor, Any, Tensor | None]:
    save = save and keeps_states(operands[2].shape[-1])
    if launches is not None:
        return cuda_backend.forward(Call(*operands), save, final=final, launches=launches)
    if paths is None:
        out, last, saved = cuda_backend.forward(Call.of(*operands), save, final=final)
    else:
        out, last, saved = cuda_paths.forward((*operands[:9], operands[11]), paths, save, dt_weight=operands[12])
    dtype = operands[0].dtype
    return out if out.dtype == dtype else out.to(dtype), last, saved


@scan_op.register_fake
def _scan_fake(
    u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus, save, paths=None, dt_weight=None
):
    (b, l, d), n = u.shape, A.shape[-1]
    lead = () if paths is None else (len(paths) // 5,)

    def wide(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    k = BACKWARD[instance(n)].k
    saved = wide(*lead, b, (l + k - 1) // k, d, n) if save and keeps_states(n) else wide(0)
    return torch.empty(b, l, d, dtype=u.dtype, device=u.device), wide(*lead, b, d, n), saved


@custom_op("hybridzoo::selective_scan_cuda_backward", mutates_args=())
def scan_backward_op(
    gout: Tensor,
    glast: Tensor | None,
    saved: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    valid: Tensor | None,
    dt_softplus: bool,
    paths: Sequence[int] | None = None,
    dt_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias, the initial state and dt_weight; empty where there is no such input."""
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    states = saved if keeps_states(A.shape[-1]) else None
    grads = _gradients(gout, glast, states, (*inputs, reset, valid, dt_softplus, dt_weight), paths)
    return tuple(u.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


def _gradients(
    gout: Tensor,
    glast: Tensor | None,
    saved: Tensor | None,
    operands: tuple,
    paths: Sequence[int] | None,
) -> list[Tensor | None]:
    # of u, dt, A, B, C, D, z, dt_bias, the initial state and dt_weight
    inputs, softplus, weight = operands[:9], operands[11], operands[12]
    grads: Sequence[Tensor | None]
    if paths is None:
        gu, gdt, *others = cuda_backend.backward(Call.of(*operands), gout, glast, saved)
        gdt, gweight = (gdt, None) if weight is None else low_rank.gradients(gdt, inputs[1], weight)
        grads = (gu, gdt, *others, gweight)
    else:
        grads = cuda_paths.backward((*inputs, softplus), paths, gout, glast, saved, dt_weight=weight)
    return in_types_of((*inputs, weight), grads)


differentiable_once(scan_backward_op)


@scan_backward_op.register_fake
def _scan_backward_fake(
    gout,
    glast,
    saved,
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_state,
    reset,
    valid,
    dt_softplus,
    paths=None,
    dt_weight=None,
):
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_state, dt_weight)
    return tuple(u.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.softplus, _, ctx.paths, weight = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, weight, output[2])


def _backward(ctx: Any, gout: Tensor | None, glast: Tensor | None, _: Any) -> tuple:
    *inputs, weight, saved = ctx.saved_tensors
    if gout is None:
        gout = torch.zeros_like(inputs[0])
    options = (ctx.softplus, ctx.paths, weight)
    *grads, gweight = torch.ops.hybridzoo.selective_scan_cuda_backward(gout, glast, saved, *inputs, *options)
    found = [None if x is None else g for g, x in zip(grads, inputs, strict=False)]
    return (*found, None, None, None, None, None, None if weight is None else gweight)


scan_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs a small call more time than the kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        softplus: bool,
        paths: Sequence[int] | None,
        final: bool,
        launches: Launches | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        out, last, saved = _forward((*tensors[:11], softplus, tensors[11]), True, paths, final, launches)
        ctx.softplus, ctx.paths = softplus, paths
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)
        return out, last

    @staticmethod
    @once("selective_scan")
    def backward(ctx: Any, gout: Tensor | None, glast: Tensor | None) -> tuple:
        *tensors, saved = ctx.saved_tensors
        if gout is None:
            gout = torch.zeros_like(tensors[0])
        operands = (*tensors[:11], ctx.softplus, tensors[11])
        *grads, gweight = _gradients(gout, glast, saved, operands, ctx.paths)
        return (None, None, None, None, *grads, None, None, gweight)


def plan_of(operands: tuple, out: Tensor, softplus: bool) -> tuple[tuple, Launches]:
    """Of a scan without documents and padding, for :mod:`hybridzoo.kernels.gpu.launch_plans`.

    The operands are u, dt, A, B, C, D, z, dt_bias, the initial state and dt_weight.
    """
    u, dt, A, B, C, D, z, dt_bias, state, weight = operands
    call = Call.of(u, dt, A, B, C, D, z, dt_bias, state, None, None, softplus, weight).ready()
    used = call.u, call.dt, call.A, call.B, call.C, call.D, call.z, call.dt_bias, call.initial_state, call.dt_weight
    return used, cuda_backend.planned(call, out)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    valid: Tensor | None,
    dt_softplus: bool,
    paths: Sequence[Path] | None = None,
    final: bool = True,
    launches: Launches | None = None,
    dt_weight: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """:func:`.reference.selective_scan` on an NVIDIA GPU; the same arguments and results.

    B and C may come without groups, ``(b, l, n)``, which spares autograd two nodes; not with ``paths``.
    With ``paths`` (:mod:`.paths`), what may differ between them may have a leading axis of one per path, and so has the state returned.
    With ``dt_weight`` dt is in low-rank form (:mod:`.low_rank`). There may be no state where it is not asked for (``final``).
    ``launches`` are those of a call like this (:mod:`hybridzoo.kernels.gpu.launch_plans`).
    """
    flat = None if paths is None else [int(x) for path in paths for x in path]
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid)
    save = torch.is_grad_enabled() and any([m is not None and m.requires_grad for m in (*tensors, dt_weight)])
    # what is traced, or is not a plain tensor, needs the registered op
    if not eager(u):
        return torch.ops.hybridzoo.selective_scan_cuda(*tensors, dt_softplus, save, flat, dt_weight)[:2]
    if save:
        return _Eager.apply(dt_softplus, flat, final, launches, *tensors, dt_weight)
    return _forward((*tensors, dt_softplus, dt_weight), False, flat, final, launches)[:2]

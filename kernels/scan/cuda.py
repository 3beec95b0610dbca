"""The CUDA scan as ``torch.library`` ops: autograd, fake tensors for ``torch.compile``, and why a call may be refused.

Autocast: the ops take what they are given. Operands of one 16-bit type run in that type with a float32 state; operands of different types
meet in float32 (:meth:`.operands.ScanOperands.of`). A, D, the bias and the states are float32 whatever the rest is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..derivatives import differentiable_once, once
from ..dispatch import Facts
from ..gpu import nvrtc
from ..gpu.device import DRIVERS, shared_memory
from ..gpu.operands import eager, in_types_of, refuse_tensors
from ..numerics import blank, cast
from ..operators import custom_op, filled, like
from . import cuda_paths, launches, low_rank
from .inputs import SCHEMA, ScanInputs
from .launches import Launches
from .operands import ScanOperands
from .paths import Path
from .shapes import BACKWARD, MAX_STATE, backward_shape, forward_shapes, instance, keeps_states

Paths = Sequence[int] | None
_PATHS = "SymInt[]? paths=None, Tensor? dt_weight=None"


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA scan cannot do a call, or ``None`` if it can; see :class:`.dispatch.Backend`."""
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


@custom_op("hybridzoo::selective_scan_cuda", schema=f"({SCHEMA}, bool save, {_PATHS}) -> (Tensor, Tensor, Tensor)")
def scan_op(u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus, save, paths=None, dt_weight=None):
    """The scan: outputs (b, l, d), the last state (b, d, n), and, to ``save``, the states that the backward starts from.

    ``paths`` are five integers for each walk; states then have a leading axis of one per walk.
    """
    i = ScanInputs(u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_weight)
    out, last, saved = _forward(i, dt_softplus, paths, save)
    return out, last, last.new_empty(0) if saved is None else saved


def _forward(
    i: ScanInputs, dt_softplus: bool, paths: Paths, save: bool, final: bool = True, plan: Launches | None = None
) -> tuple[Tensor, Any, Tensor | None]:
    save = save and keeps_states(i.A.shape[-1])
    if plan is not None:
        return launches.forward(ScanOperands(i, dt_softplus), save, final=final, plan=plan)
    if paths is None:
        out, last, saved = launches.forward(ScanOperands.of(i, dt_softplus), save, final=final)
    else:
        out, last, saved = cuda_paths.forward(i, dt_softplus, paths, save)
    return cast(out, i.u.dtype), last, saved


@scan_op.register_fake
def _scan_fake(
    u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus, save, paths=None, dt_weight=None
):
    (b, l, d), n, lead = u.shape, A.shape[-1], () if paths is None else (len(paths) // 5,)

    def wide(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    k = BACKWARD[instance(n)].k
    saved = wide(*lead, b, (l + k - 1) // k, d, n) if save and keeps_states(n) else wide(0)
    return blank(u), wide(*lead, b, d, n), saved


@custom_op(
    "hybridzoo::selective_scan_cuda_backward",
    schema=f"(Tensor gout, Tensor? glast, Tensor saved, {SCHEMA}, {_PATHS}) -> ({', '.join(['Tensor'] * 10)})",
)
def scan_backward_op(gout: Tensor, glast: Tensor | None, saved: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias, the initial state and dt_weight; empty where there is no such input."""
    i, dt_softplus, paths = _backward_inputs(*operands)
    states = saved if keeps_states(i.A.shape[-1]) else None
    return filled(_flat(_gradients(gout, glast, states, i, dt_softplus, paths)), gout)


def _backward_inputs(*operands: Any) -> tuple[ScanInputs, bool, Paths]:
    # torch leaves out operands at the end that have their defaults
    *tensors, dt_softplus, paths, dt_weight = (*operands, None, None)[:14]
    return ScanInputs._make((*tensors, dt_weight)), dt_softplus, paths


def _flat(grads: ScanInputs) -> tuple[Tensor | None, ...]:
    # documents and padding have no gradients
    return tuple(g for name, g in grads._asdict().items() if name not in ("reset", "valid"))


def _gradients(
    gout: Tensor, glast: Tensor | None, saved: Tensor | None, i: ScanInputs, dt_softplus: bool, paths: Paths
) -> ScanInputs:
    if paths is None:
        grads = launches.backward(ScanOperands.of(i, dt_softplus), gout, glast, saved)
        grads = low_rank.with_gradients(grads, i)
    else:
        grads = cuda_paths.backward(i, dt_softplus, paths, gout, glast, saved)
    return ScanInputs(*in_types_of(i, grads))  # type: ignore[arg-type]


differentiable_once(scan_backward_op)


@scan_backward_op.register_fake
def _scan_backward_fake(gout, glast, saved, *operands):
    return like(gout, *_flat(_backward_inputs(*operands)[0]))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.dt_softplus, _, ctx.paths, weight = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, weight, output[2])


def _backward(ctx: Any, gout: Tensor | None, glast: Tensor | None, _: Any) -> tuple:
    *inputs, weight, saved = ctx.saved_tensors
    if gout is None:
        gout = torch.zeros_like(inputs[0])
    options = (ctx.dt_softplus, ctx.paths, weight)
    *grads, gweight = torch.ops.hybridzoo.selective_scan_cuda_backward(gout, glast, saved, *inputs, *options)
    found = [None if x is None else g for g, x in zip(grads, inputs, strict=False)]
    return (*found, None, None, None, None, None, None if weight is None else gweight)


scan_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs a small call more time than the kernel."""

    @staticmethod
    def forward(
        ctx: Any, dt_softplus: bool, paths: Paths, final: bool, plan: Launches | None, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, last, saved = _forward(ScanInputs(*tensors), dt_softplus, paths, True, final, plan)
        ctx.dt_softplus, ctx.paths = dt_softplus, paths
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)
        return out, last

    @staticmethod
    @once("selective_scan")
    def backward(ctx: Any, gout: Tensor | None, glast: Tensor | None) -> tuple:
        *tensors, saved = ctx.saved_tensors
        if gout is None:
            gout = torch.zeros_like(tensors[0])
        grads = _gradients(gout, glast, saved, ScanInputs(*tensors), ctx.dt_softplus, ctx.paths)
        return (None, None, None, None, *grads)


def plan_of(i: ScanInputs, out: Tensor, dt_softplus: bool) -> tuple[ScanInputs, Launches]:
    """The inputs that a scan reads in place of these, and its launches, for :mod:`hybridzoo.kernels.gpu.launch_plans`."""
    call = ScanOperands.of(i, dt_softplus).ready()
    return call.i, launches.planned(call, out)


def selective_scan(
    i: ScanInputs,
    dt_softplus: bool,
    paths: Sequence[Path] | None = None,
    final: bool = True,
    plan: Launches | None = None,
) -> tuple[Tensor, Any]:
    """:func:`.reference.selective_scan` on an NVIDIA GPU; the same arguments and results.

    B and C may come without groups, ``(b, l, n)``, which spares autograd two nodes; not with ``paths``.
    With ``paths`` (:mod:`.paths`), what may differ between them may have a leading axis of one per path, and so has the state returned.
    dt may be in low-rank form (:mod:`.low_rank`). There may be no state where it is not asked for (``final``).
    ``plan`` are the launches of a call like this (:mod:`hybridzoo.kernels.gpu.launch_plans`).
    """
    flat = None if paths is None else [int(x) for path in paths for x in path]
    save = torch.is_grad_enabled() and any([m is not None and m.requires_grad for m in i])
    # what is traced, or is not a plain tensor, needs the registered op
    if not eager(i.u):
        return torch.ops.hybridzoo.selective_scan_cuda(*i[:-1], dt_softplus, save, flat, i.dt_weight)[:2]
    if save:
        return _Eager.apply(dt_softplus, flat, final, plan, *i)
    return _forward(i, dt_softplus, flat, False, final, plan)[:2]

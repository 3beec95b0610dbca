"""The chunked scan over walks (:mod:`.paths`): every block reads its tokens where they are, and adds its outputs there.

Nothing of the size of the input is gathered, flipped or repeated in either pass, however many walks there are: blocks stay in the cache,
and outputs and gradients are summed in place, in the accumulation dtype. Step sizes in low-rank form are formed block by block.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derivatives import differentiable_once
from ..numerics import blank, cast, full_precision
from ..operators import custom_op, filled, like
from . import chunked, steps
from .inputs import ScanInputs
from .paths import Path, path_index, per_path

_FIELDS = ("u", "dt", "A", "B", "C", "D", "dt_bias", "initial_state", "dt_weight")
_SCHEMA = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_state, Tensor? dt_weight, "
    "Tensor orders, bool dt_softplus"
)


def _inputs(operands: Sequence[Any]) -> tuple[ScanInputs, Tensor, bool]:
    *tensors, orders, dt_softplus = operands
    return ScanInputs(**dict(zip(_FIELDS, tensors, strict=True))), orders, dt_softplus


@custom_op("hybridzoo::selective_scan_paths", schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor)")
@full_precision
def scan_op(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The scans along ``orders``, (k, l): the sum of the outputs (b, l, d), last states (k, b, d, n), states at chunk starts, flat."""
    i, orders, dt_softplus = _inputs(operands)
    total, last, saved = torch.zeros_like(i.u, dtype=i.acc, memory_format=torch.contiguous_format), [], []
    for order, own in zip(orders, per_path(len(orders), i), strict=True):
        work = steps.ScanWork(own, dt_softplus, order)
        starts, after = chunked.states_of(work)

        def give(rows: slice, at: slice, y: Tensor, work: steps.ScanWork = work) -> None:
            work.add(total, rows, at, y)

        chunked.forward_sweeps(work, starts, after, give)
        saved.append(starts.view(-1))
        last.append(chunked.outward(after))
    return cast(total, i.u.dtype), torch.stack(last), torch.cat(saved)


@scan_op.register_fake
def _scan_fake(*operands):
    i, orders, _ = _inputs(operands)
    (b, l, d), n, k = i.u.shape, i.A.shape[-1], orders.shape[0]
    states = i.u.new_empty(k * b * ((l + steps.CHUNK - 1) // steps.CHUNK) * d * n, dtype=i.acc)
    return blank(i.u), i.u.new_empty(k, b, d, n, dtype=i.acc), states


@custom_op(
    "hybridzoo::selective_scan_paths_backward",
    schema=f"(Tensor gout, Tensor? glast, Tensor saved, {_SCHEMA}) -> ({', '.join(['Tensor'] * len(_FIELDS))})",
)
@full_precision
def scan_backward_op(gout: Tensor, glast: Tensor | None, saved: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Gradients of the tensors in front of ``orders``, summed over the paths that share one; empty where there is none."""
    i, orders, dt_softplus = _inputs(operands)
    k = len(orders)
    # zeros in the accumulation dtype, in the shapes of the inputs, and each path's part of them
    zeros: dict[str, Any] = {f: _zeros(getattr(i, f), i.acc) for f in _FIELDS}
    found = ScanInputs(**zeros)
    every = zip(orders, per_path(k, i), per_path(k, found), saved.view(k, -1), strict=True)
    for path, (order, own, into, starts) in enumerate(every):
        work = steps.ScanWork(own, dt_softplus, order)

        def give(
            rows: slice,
            at: slice,
            block: steps.ScanBlock,
            *grads: Tensor,
            work: steps.ScanWork = work,
            into: ScanInputs = into,
        ) -> None:
            gu, gdt, gB, gC = grads
            if block.low is not None:
                into.dt_weight.addmm_(gdt.flatten(0, 1).T, block.low.flatten(0, 1))  # type: ignore[union-attr]
                gdt = gdt @ work.expand
            for total, g in ((into.u, gu), (into.dt, gdt), (into.B, gB), (into.C, gC)):
                work.add(total, rows, at, g)

        last = None if glast is None else glast[path]
        summed, ginit = chunked.backward_sweeps(work, starts, gout, last, None, give)
        parts = (*chunked.of_parameters(summed, own), chunked.outward(ginit))
        for total, g in zip((into.A, into.D, into.dt_bias, into.initial_state), parts, strict=True):
            if total is not None:
                total += g
    return filled((cast(getattr(found, f), _dtype(getattr(i, f))) for f in _FIELDS), i.u)


def _zeros(x: Tensor | None, acc: torch.dtype) -> Tensor | None:
    return None if x is None else torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, acc), device=x.device)


def _dtype(x: Tensor | None) -> torch.dtype:
    return torch.float32 if x is None else x.dtype


differentiable_once(scan_backward_op)


@scan_backward_op.register_fake
def _scan_backward_fake(gout, glast, saved, *operands):
    return like(gout, *operands[: len(_FIELDS)])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.dt_softplus = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, gout: Tensor | None, glast: Tensor | None, _: Any) -> tuple:
    *inputs, saved = ctx.saved_tensors
    if gout is None:
        gout = torch.zeros_like(inputs[0])
    grads = torch.ops.hybridzoo.selective_scan_paths_backward(gout, glast, saved, *inputs, ctx.dt_softplus)
    return (*(None if x is None else g for g, x in zip(grads, inputs, strict=False)), None, None)


scan_op.register_autograd(_backward, setup_context=_setup)


def selective_scan(i: ScanInputs, dt_softplus: bool, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """:func:`.paths.over_paths` of the chunked scan, without gathering; the same arguments and results."""
    orders = torch.stack([path_index(path, i.u.device) for path in paths])
    out, last, _ = torch.ops.hybridzoo.selective_scan_paths(*(getattr(i, f) for f in _FIELDS), orders, dt_softplus)
    if i.z is not None:
        out = (out.to(i.acc) * F.silu(i.z.to(i.acc))).to(i.u.dtype)
    return out, last

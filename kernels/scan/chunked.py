"""The selective scan as vectorised PyTorch: runs anywhere, trains, needs memory linear in ``l``.

Two designs were measured on one core, recurrence and exponentials of 2**24 (b, l, d, n) elements, at b d n = 8192 and 65536. *Kept* (38 and
41 ms): blocks of steps in buffers that stay in the cache; everything but the recurrence is computed for the block as a whole
(``exp(dt A)``, the outer product ``dt u B``, the contractions), and the recurrence itself is one in-place ``addcmul`` per step.
*Dropped* (50 and 62 ms): scanning sub-blocks side by side and joining them by their cumulative decays, which takes fewer calls but
more passes over memory.
There is no division and no difference of exponents, so no step size or decay rate can make it overflow.

The forward saves a state every 32 steps; the backward walks the blocks in reverse, recomputes the states ``h`` of
one and runs the adjoint recurrence. With ``a_t = exp(dt_t A)``, ``gy`` the gradient of y and ``G`` the gradient of h:

    G_t = C_t gy_t + a_{t+1} G_{t+1}                        gC_t = sum_d gy_t h_t       gB_t = sum_d G_t dt_t u_t
    W_t = G_t a_t h_{t-1}  (the gradient of dt_t A)         gA = sum_t W_t dt_t         gdt_t = sum_n (W_t A + G_t B_t u_t)
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derivatives import differentiable_once
from ..numerics import acc_dtype, blank, cast, full_precision
from ..operators import custom_op, filled, like
from . import steps
from .inputs import SCHEMA, ScanInputs

# the backward needs no initial state: the states at chunk starts hold it
_INPUTS = [name for name in ScanInputs._fields if name not in ("initial_state", "dt_weight")]
_BACKWARD = f"(Tensor gout, Tensor? glast, Tensor saved, {SCHEMA.replace('Tensor? initial_state, ', '')})"


@custom_op("hybridzoo::selective_scan", schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor)")
@full_precision
def scan_op(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The scan: outputs (b, l, d), the last state (b, d, n), and the states at chunk starts (b, chunks, g, n, d/g).

    The latter are flat: a dimension of their own would put the number of chunks, and so a bound on l, among a compiler's guards.
    """
    *tensors, dt_softplus = operands
    i = ScanInputs(*tensors)
    work, out = steps.ScanWork(i, dt_softplus), blank(i.u)
    saved, last = states_of(work)

    def give(rows: slice, at: slice, y: Tensor) -> None:
        out[rows, at] = y if i.z is None else y.mul_(F.silu(i.z[rows, at].to(work.acc)))

    forward_sweeps(work, saved, last, give)
    return out, outward(last), saved.view(-1)


def states_of(work: steps.ScanWork) -> tuple[Tensor, Tensor]:
    """Uninitialised states, at chunk starts (b, chunks, g, n, d/g) and after the last step (b, g, n, d/g)."""
    b, l, _ = work.i.u.shape
    return work.rates.new_empty(b, -(-l // steps.CHUNK), *work.rates.shape), work.rates.new_empty(b, *work.rates.shape)


def forward_sweeps(
    work: steps.ScanWork, saved: Tensor, last: Tensor, give: Callable[[slice, slice, Tensor], None]
) -> None:
    """Scan: fill in the states of :func:`states_of`, and give away the outputs, (rows, steps, d) of some rows and steps at a time."""
    i, q = work.i, steps.CHUNK
    for rows, every in work.sweeps():
        a, x = work.buffers(rows, every, 2)
        last[rows] = 0.0 if i.initial_state is None else work.inward(i.initial_state[rows])
        h = last[rows]
        for at in every:
            block = steps.ScanBlock(work, rows, at)
            c, count = at.start // q, at.stop - at.start
            # the copy outlives the buffer that h is a view of
            h = block.scan(a, x, saved[rows, c].copy_(h))
            states = x.cut(count)[0]
            saved[rows, c + 1 : -(-at.stop // q)] = states[:, q - 1 : count - 1 : q]
            give(rows, at, block.read(states).flatten(2))
        last[rows] = h


@scan_op.register_fake
def _scan_fake(*operands):
    *tensors, _ = operands
    i = ScanInputs(*tensors)
    (b, l, d), n = i.u.shape, i.A.shape[1]
    states = i.u.new_empty(b * ((l + steps.CHUNK - 1) // steps.CHUNK) * d * n, dtype=i.acc)
    return blank(i.u), i.u.new_empty(b, d, n, dtype=i.acc), states


@custom_op("hybridzoo::selective_scan_backward", schema=f"{_BACKWARD} -> ({', '.join(['Tensor'] * 9)})")
@full_precision
def scan_backward_op(gout: Tensor, glast: Tensor | None, saved: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state; empty where there is no such input."""
    *tensors, dt_softplus = operands
    i = ScanInputs(**dict(zip(_INPUTS, tensors, strict=True)))
    work = steps.ScanWork(i, dt_softplus)
    gu, gdt, gB, gC = map(blank, (i.u, i.dt, i.B, i.C))
    gz = None if i.z is None else blank(i.z)

    def give(rows: slice, at: slice, block: steps.ScanBlock, *grads: Tensor) -> None:
        for into, g in zip((gu, gdt, gB, gC), grads, strict=True):
            into[rows, at] = g

    summed, ginit = backward_sweeps(work, saved, gout, glast, gz, give)
    gA, gD, gbias = of_parameters(summed, i)
    return filled((gu, gdt, gA, gB, gC, gD, gz, gbias, outward(ginit)), i.u)


def backward_sweeps(
    work: steps.ScanWork, saved: Tensor, gout: Tensor, glast: Tensor | None, gz: Tensor | None, give: Callable
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Tensor]:
    """Scan back from the gradients of the outputs and of the last state, and fill in the gate's.

    Args:
        work: The scan.
        saved: The states at chunk starts, in one dimension.
        gout: The gradient of the outputs.
        glast: The gradient of the last state.
        gz: Uninitialised, for the gradient of the gate; ``None`` without one.
        give: Takes rows, steps, their block and its gradients of u, of dt before bias and softplus, of B and of C.

    Returns:
        Gradients of rates, D and bias, and that of the initial state.
    """
    i, (b, l, d), dt_softplus = work.i, work.i.u.shape, work.dt_softplus
    saved = saved.view(b, -(-l // steps.CHUNK), *work.rates.shape)
    grates = torch.zeros_like(work.rates)
    gD, gbias = (None if m is None else grates.new_zeros(d) for m in (i.D, i.dt_bias))
    ginit = work.rates.new_empty(b, *work.rates.shape)
    for rows, every in work.sweeps():
        a, x, G = work.buffers(rows, every, 3)
        ginit[rows] = 0.0 if glast is None else work.inward(glast[rows])
        gh = ginit[rows]
        for at in reversed(every):
            block, h = steps.ScanBlock(work, rows, at), saved[rows, at.start // steps.CHUNK]
            block.scan(a, x, h)
            gy = work.take(gout, rows, at).view_as(block.u)
            if i.z is not None and gz is not None:
                gate = i.z[rows, at].to(work.acc).view_as(block.u)
                y = block.read(x.cut(at.stop - at.start)[0])
                gz[rows, at] = torch.ops.aten.silu_backward(y.mul_(gy), gate).flatten(2)
                gy = gy * F.silu(gate)
            gu, gdt, grates_, gB, gC, gh = _block_backward(block, [a, x, G], h, gy, gh)
            graw = _through_step_sizes(gdt, block, dt_softplus)
            give(rows, at, block, gu.flatten(2), graw, gB, gC)
            grates += grates_
            if gD is not None:
                gD += (gy * block.u).flatten(2).sum((0, 1))
            if gbias is not None:
                gbias += graw.sum((0, 1))
        ginit[rows] = gh
    return (grates, gD, gbias), ginit


def of_parameters(summed: tuple[Tensor, Tensor | None, Tensor | None], i: ScanInputs) -> tuple[Any, Any, Any]:
    """Gradients of A, D and the bias, in their types, from those of rates, D and the bias."""
    grates, gD, gbias = summed
    gA = grates.transpose(1, 2).reshape(i.A.shape).to(i.A.dtype).contiguous()
    gD, gbias = (m if w is None else cast(m, w.dtype) for m, w in ((gD, i.D), (gbias, i.dt_bias)))
    return gA, gD, gbias


def _block_backward(
    block: steps.ScanBlock, buffers: list[steps.Buffer], h: Tensor, gy: Tensor, gh: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, of the step sizes, of the rates, of B, C and the state ``h`` before the block; uses the buffers up."""
    count = gy.shape[1]
    (a, a_steps), (x, _), (G, G_steps) = (m.cut(count) for m in buffers)
    gC = (gy @ x.transpose(3, 4)).squeeze(3)
    torch.mul(gy, block.C, out=G)
    gh = _adjoint(block, a_steps, G_steps, gh)
    gB = (block.dtu @ G.transpose(3, 4)).squeeze(3)
    gdtu = block.B.transpose(3, 4) @ G
    # a turns into W = G a h_{t-1}, and G becomes scratch
    a[:, 1:].mul_(x[:, :-1])
    a[:, 0].mul_(h)
    for t, drop in block.drops.items():
        a_steps[t].masked_fill_(drop, 0.0)
    W = a.mul_(G)
    # a product with ones sums over rows and steps in one pass
    each = torch.mul(W, block.dt, out=G).reshape(-1, block.rates.numel())
    grates = (each.new_ones(1, each.shape[0]) @ each).view_as(block.rates)
    gdt = torch.mul(W, block.rates, out=G).sum(3, keepdim=True).addcmul_(gdtu, block.u)
    gu = gdtu.mul_(block.dt)
    if block.D is not None:
        gu.addcmul_(gy, block.D)
    return gu, gdt, grates, gB, gC, gh


def _through_step_sizes(gdt: Tensor, block: steps.ScanBlock, dt_softplus: bool) -> Tensor:
    """From the gradient of the step sizes to that of dt before bias, softplus and padding, (rows, steps, d)."""
    gdt = gdt.flatten(2)
    if dt_softplus:
        gdt.mul_(torch.sigmoid(block.raw))
    return gdt if block.valid is None else gdt.masked_fill_(~block.valid[..., None], 0.0)


def _adjoint(block: steps.ScanBlock, decays: tuple[Tensor, ...], grads: tuple[Tensor, ...], gh: Tensor) -> Tensor:
    """Run ``G_t += a_{t+1} G_{t+1}`` from the gradient ``gh`` of the last state; returns the gradient of the state before the block."""
    later = grads[-1].add_(gh)
    for t in range(len(decays) - 1, 0, -1):
        later = grads[t - 1].addcmul_(decays[t], block.dropped(t, later))
    return decays[0] * block.dropped(0, later)


differentiable_once(scan_backward_op)


@scan_backward_op.register_fake
def _scan_backward_fake(gout, glast, saved, u, dt, A, B, C, D, z, dt_bias, *_):
    state = u.new_empty(u.shape[0], *A.shape, dtype=acc_dtype(u.dtype))
    return (*like(u, u, dt, A, B, C, D, z, dt_bias), state)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.dt_softplus = inputs
    state = ScanInputs(*tensors).initial_state
    ctx.state_dtype = None if state is None else state.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *(x for name, x in zip(ScanInputs._fields, tensors, strict=False) if name in _INPUTS), output[2]
    )


def _backward(ctx: Any, gout: Tensor | None, glast: Tensor | None, _: Any) -> tuple:
    *inputs, saved = ctx.saved_tensors
    if gout is None:
        gout = torch.zeros_like(inputs[0])
    *grads, gstate = torch.ops.hybridzoo.selective_scan_backward(gout, glast, saved, *inputs, ctx.dt_softplus)
    given = [None if x is None else g for g, x in zip(grads, inputs, strict=False)]
    return (*given, None if ctx.state_dtype is None else cast(gstate, ctx.state_dtype), None, None, None)


scan_op.register_autograd(_backward, setup_context=_setup)


def outward(state: Tensor) -> Tensor:
    """A state (b, g, n, d/g) as (b, d, n)."""
    # never a view: autograd lets nobody write into those of an op
    b, g, n, e = state.shape
    out = state.new_empty(b, g * e, n)
    out.view(b, g, e, n).copy_(state.transpose(2, 3))
    return out


def selective_scan(i: ScanInputs, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """:func:`.reference.selective_scan`, fast; the same arguments and results."""
    out, last, _ = torch.ops.hybridzoo.selective_scan(*i[:-1], dt_softplus)
    return out, last

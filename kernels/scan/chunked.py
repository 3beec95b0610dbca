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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derivatives import differentiable_once
from ..numerics import full_precision
from ..operators import custom_op
from . import steps as blocks
from .steps import Block, Buffer, Inputs


@custom_op("hybridzoo::selective_scan", mutates_args=())
@full_precision
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan: outputs (b, l, d), the last state (b, d, n), and the states at chunk starts (b, chunks, g, n, d/g).

    The latter are flat: a dimension of their own would put the number of chunks, and so a bound on l, among a compiler's guards.
    """
    i = Inputs(u, dt, A, B, C, D, z, dt_bias, reset, valid, dt_softplus)
    rates, (b, l, d), q = i.rates(), u.shape, blocks.CHUNK
    g, n, e = rates.shape
    out = torch.empty(b, l, d, dtype=u.dtype, device=u.device)
    saved = u.new_empty(b, -(-l // q), g, n, e, dtype=i.acc)
    last = u.new_empty(b, g, n, e, dtype=i.acc)
    for rows, every in i.sweeps():
        a, x = i.buffers(rows, every, 2)
        last[rows] = 0.0 if initial_state is None else _inward(initial_state[rows].to(i.acc), g)
        h = last[rows]
        for steps in every:
            block = Block(i, rates, rows, steps)
            c, count = steps.start // q, steps.stop - steps.start
            # the copy outlives the buffer that h is a view of
            h = block.scan(a, x, saved[rows, c].copy_(h))
            states = x.cut(count)[0]
            saved[rows, c + 1 : -(-steps.stop // q)] = states[:, q - 1 : count - 1 : q]
            y = block.read(states)
            if z is not None:
                y.mul_(F.silu(z[rows, steps].to(i.acc)).view_as(y))
            out[rows, steps] = y.flatten(2)
        last[rows] = h
    return out, _outward(last), saved.view(-1)


@scan_op.register_fake
def _scan_fake(u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus):
    (b, l, d), n = u.shape, A.shape[1]
    acc = torch.promote_types(u.dtype, torch.float32)
    states = u.new_empty(b * ((l + blocks.CHUNK - 1) // blocks.CHUNK) * d * n, dtype=acc)
    return torch.empty(b, l, d, dtype=u.dtype, device=u.device), u.new_empty(b, d, n, dtype=acc), states


@custom_op("hybridzoo::selective_scan_backward", mutates_args=())
@full_precision
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
    reset: Tensor | None,
    valid: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state; empty where there is no such input."""
    i = Inputs(u, dt, A, B, C, D, z, dt_bias, reset, valid, dt_softplus)
    rates, (b, l, d) = i.rates(), u.shape
    g, n, e = rates.shape
    saved = saved.view(b, -(-l // blocks.CHUNK), g, n, e)
    gu, gdt, gB, gC = (torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in (u, dt, B, C))
    gz = torch.empty(z.shape if z is not None else 0, dtype=u.dtype if z is None else z.dtype, device=u.device)
    grates = torch.zeros_like(rates)
    gD, gbias = (u.new_zeros(d if m is not None else 0, dtype=i.acc) for m in (D, dt_bias))
    ginit = u.new_empty(b, g, n, e, dtype=i.acc)
    for rows, every in i.sweeps():
        a, x, G = i.buffers(rows, every, 3)
        ginit[rows] = 0.0 if glast is None else _inward(glast[rows].to(i.acc), g)
        gh = ginit[rows]
        for steps in reversed(every):
            block, h = Block(i, rates, rows, steps), saved[rows, steps.start // blocks.CHUNK]
            block.scan(a, x, h)
            gy = gout[rows, steps].to(i.acc).view_as(block.u)
            if z is not None:
                gate = z[rows, steps].to(i.acc).view_as(block.u)
                y = block.read(x.cut(steps.stop - steps.start)[0])
                gz[rows, steps] = torch.ops.aten.silu_backward(y.mul_(gy), gate).flatten(2)
                gy = gy * F.silu(gate)
            gu_, gdt_, grates_, gB_, gC_, gh = _block_backward(block, a, x, G, h, gy, gh)
            graw = _through_step_sizes(gdt_, block, dt_softplus)
            gu[rows, steps], gdt[rows, steps], gB[rows, steps], gC[rows, steps] = gu_.flatten(2), graw, gB_, gC_
            grates += grates_
            if D is not None:
                gD += (gy * block.u).flatten(2).sum((0, 1))
            if dt_bias is not None:
                gbias += graw.sum((0, 1))
        ginit[rows] = gh
    gA = grates.transpose(1, 2).reshape(d, n).to(A.dtype).contiguous()
    gD, gbias = (m if w is None else m.to(w.dtype) for m, w in ((gD, D), (gbias, dt_bias)))
    return gu, gdt, gA, gB, gC, gD, gz, gbias, _outward(ginit)


def _block_backward(
    block: Block, decays: Buffer, states: Buffer, space: Buffer, h: Tensor, gy: Tensor, gh: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, of the step sizes, of the rates, of B, C and the state ``h`` before the block; uses the buffers up."""
    count = gy.shape[1]
    (a, a_steps), (x, _), (G, G_steps) = (m.cut(count) for m in (decays, states, space))
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


def _through_step_sizes(gdt: Tensor, block: Block, dt_softplus: bool) -> Tensor:
    """From the gradient of the step sizes to that of dt before bias, softplus and padding, (rows, steps, d)."""
    gdt = gdt.flatten(2)
    if dt_softplus:
        gdt.mul_(torch.sigmoid(block.raw))
    return gdt if block.valid is None else gdt.masked_fill_(~block.valid[..., None], 0.0)


def _adjoint(block: Block, decays: tuple[Tensor, ...], grads: tuple[Tensor, ...], gh: Tensor) -> Tensor:
    """Run ``G_t += a_{t+1} G_{t+1}`` from the gradient ``gh`` of the last state; returns the gradient of the state before the block."""
    later = grads[-1].add_(gh)
    for t in range(len(decays) - 1, 0, -1):
        later = grads[t - 1].addcmul_(decays[t], block.dropped(t, later))
    return decays[0] * block.dropped(0, later)


differentiable_once(scan_backward_op)


@scan_backward_op.register_fake
def _scan_backward_fake(gout, glast, saved, u, dt, A, B, C, D, z, dt_bias, reset, valid, dt_softplus):
    def like(m: Tensor | None) -> Tensor:
        return u.new_empty(0) if m is None else torch.empty(m.shape, dtype=m.dtype, device=m.device)

    b, _, d = u.shape
    acc = torch.promote_types(u.dtype, torch.float32)
    none = u.new_empty(0, dtype=acc)
    gD, gbias = (none if m is None else like(m) for m in (D, dt_bias))
    return like(u), like(dt), like(A), like(B), like(C), gD, like(z), gbias, u.new_empty(b, d, A.shape[1], dtype=acc)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, softplus = inputs
    ctx.softplus = softplus
    ctx.state_dtype = None if inputs[8] is None else inputs[8].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:8], *tensors[9:], output[2])


def _backward(ctx: Any, gout: Tensor | None, glast: Tensor | None, _: Any) -> tuple:
    *inputs, saved = ctx.saved_tensors
    u = inputs[0]
    if gout is None:
        gout = torch.zeros_like(u)
    grads = list(torch.ops.hybridzoo.selective_scan_backward(gout, glast, saved, *inputs, ctx.softplus))
    for at in (5, 6, 7):
        grads[at] = None if inputs[at] is None else grads[at]
    grads[8] = None if ctx.state_dtype is None else grads[8].to(ctx.state_dtype)
    return (*grads, None, None, None)


scan_op.register_autograd(_backward, setup_context=_setup)


def _inward(state: Tensor, g: int) -> Tensor:
    """A state (b, d, n) as (b, g, n, d/g)."""
    return state.unflatten(1, (g, -1)).transpose(2, 3)


def _outward(state: Tensor) -> Tensor:
    # never a view: autograd lets nobody write into those of an op
    b, g, n, e = state.shape
    out = state.new_empty(b, g * e, n)
    out.view(b, g, e, n).copy_(state.transpose(2, 3))
    return out


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
) -> tuple[Tensor, Tensor]:
    """:func:`.reference.selective_scan`, fast; the same arguments and results."""
    out, last, _ = torch.ops.hybridzoo.selective_scan(
        u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus
    )
    return out, last

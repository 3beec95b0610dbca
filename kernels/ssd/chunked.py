"""SSD as matrix products over chunks (arXiv:2405.21060, section 6), with a backward of its own; memory linear in ``l``.

A chunk of q tokens is a masked attention, ``Y = (L * C B^T) (dt x)`` with ``L[t, s] = exp(c_t - c_s)`` for s <= t of one document and
``c`` the running sum of ``dt A``, plus what the state at its start contributes. Differences from the paper's listing: ``c`` is summed and
subtracted in float64, since one large step makes a float32 sum forget the small ones after it (a device without float64 forms every sum
by itself); documents are separated by masks on ``C B^T``, never by infinities in the sums, and what is not finite is kept inside its
document (:mod:`.contain`); heads of a group share one product with B and C; and only inputs and states at chunk starts are saved, the
backward recomputing one block of chunks at a time.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import contain
from ..derivatives import differentiable_once
from ..numerics import full_precision
from ..operators import custom_op
from .chunks import Block, Inputs, join, split


def _inward(state: Tensor, g: int) -> Tensor:
    """A state (b, h, p, n) as (b, g, n, r, p)."""
    return state.unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3)


def _outward(state: Tensor) -> Tensor:
    # never a view: autograd lets nobody write into those of an op
    b, g, n, r, p = state.shape
    out = state.new_empty(b, g * r, p, n)
    out.view(b, g, r, p, n).copy_(state.permute(0, 1, 3, 4, 2))
    return out


@custom_op("hybridzoo::ssd", mutates_args=())
@full_precision
def ssd_op(
    x: Tensor,
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
    dt_min: float,
    dt_max: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (b, l, h, p), the last state (b, h, p, n), and, flat, the states at chunk starts (b, chunks, g, n, r, p)."""
    bad = None
    if reset is not None and not contain.finite(x, dt, B, C, initial_state):
        bad = contain.spoiled(x, dt, B, C, initial_state, reset, dt_softplus)
        x, dt, B, C, initial_state = map(contain.clean, (x, dt, B, C, initial_state))  # type: ignore[assignment]
    i = Inputs(x, dt, A, B, C, D, z, dt_bias, reset, valid, dt_softplus, dt_min, dt_max, chunk)
    b, g, r, n, p = i.sizes
    D = i.skip()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    saved = x.new_empty(b, -(-x.shape[1] // chunk), g, n, r, p, dtype=i.acc)
    state = saved.new_zeros(b, g, n, r, p) if initial_state is None else _inward(initial_state.to(i.acc, copy=True), g)
    for size in i.blocks():
        block = Block(i, *size)
        state = block.carry(state, saved)
        y, _ = block.read(saved[:, block.chunks].flatten(0, 1))
        if D is not None:
            y.addcmul_(block.x, D)
        if z is not None:
            y.mul_(F.silu(block.heads(z)))
        block.paste(out, _tokens(y))
    last = _outward(state)
    if bad is not None:
        out.masked_fill_((bad.after | bad.here)[..., None], math.nan)
        last.masked_fill_(bad.after[:, -1, :, None, None], math.nan)
    return out, last, saved.view(-1)


@ssd_op.register_fake
def _ssd_fake(x, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus, dt_min, dt_max, chunk):
    (b, l, h, p), n = x.shape, B.shape[3]
    acc = torch.promote_types(x.dtype, torch.float32)
    saved = x.new_empty(b * ((l + chunk - 1) // chunk) * h * p * n, dtype=acc)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(b, h, p, n, dtype=acc), saved


@custom_op("hybridzoo::ssd_backward", mutates_args=())
@full_precision
def ssd_backward_op(
    gout: Tensor,
    glast: Tensor | None,
    saved: Tensor,
    x: Tensor,
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
    dt_min: float,
    dt_max: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; empty where there is no such input."""
    bad = None
    if reset is not None and not contain.finite(x, dt, B, C, z, gout, glast):
        after, here = contain.spoiled(x, dt, B, C, None, reset, dt_softplus)
        bad = after | contain.spoiled_before(here, gout, z, glast, reset)
        x, dt, B, C, z, gout, glast = map(contain.clean, (x, dt, B, C, z, gout, glast))  # type: ignore[assignment]
    i = Inputs(x, dt, A, B, C, D, z, dt_bias, reset, valid, dt_softplus, dt_min, dt_max, chunk)
    b, g, r, n, p = i.sizes
    skip, saved = i.skip(), saved.view(b, -(-x.shape[1] // chunk), g, n, r, p)
    gx, gdt, gB, gC = (_like(m) for m in (x, dt, B, C))
    gz = x.new_empty(0) if z is None else _like(z)
    gA, gbias = x.new_zeros(g * r, dtype=i.wide), x.new_zeros(g * r if dt_bias is not None else 0, dtype=i.acc)
    gD = x.new_zeros(0 if skip is None else skip.shape, dtype=i.acc)
    gstate = saved.new_zeros(b, g, n, r, p) if glast is None else _inward(glast.to(i.acc, copy=True), g)
    for size in reversed(i.blocks()):
        block = Block(i, *size)
        state = saved[:, block.chunks].flatten(0, 1)
        gated = gy = block.heads(gout)
        y, old = block.read(state)
        if z is not None:
            gate = block.heads(z)
            gated = gy * F.silu(gate)
            full = y if skip is None else y.addcmul_(block.x, skip)
            block.paste(gz, _tokens(torch.ops.aten.silu_backward(gy * full, gate)))
        gdtx, gB_, gC_, gdtA, gstate = _block_backward(block, state, gated, old, gstate)
        block.paste(gB, gB_.transpose(1, 2))
        block.paste(gC, gC_.transpose(1, 2))
        gA += (gdtA * block.dt).sum((0, 3)).flatten()
        graw = gdtA * block.rates + (gdtx * block.x).sum(4)
        graw = _through_step_sizes(block, graw.to(i.acc).flatten(1, 2).transpose(1, 2))
        block.paste(gdt, graw)
        if dt_bias is not None:
            gbias += graw.sum((0, 1))
        gpart = gdtx.mul_(block.dt[..., None])
        if skip is not None:
            gpart.addcmul_(gated, skip)
            gD += (gated * block.x).sum_to_size(skip.shape)
        block.paste(gx, _tokens(gpart))
    gD = gD if D is None else gD.view(D.shape).to(D.dtype)
    gbias = gbias if dt_bias is None else gbias.to(dt_bias.dtype)
    grads = gx, gdt, gA.to(A.dtype), gB, gC, gD, gz, gbias, _outward(gstate)
    if bad is not None:
        _spoil(grads, bad)
    return grads


def _spoil(grads: tuple[Tensor, ...], bad: Tensor) -> None:
    """Overwrite the gradients that depend on what was not finite, at the tokens and heads ``bad`` (b, l, h)."""
    gx, gdt, gA, gB, gC, gD, gz, gbias, gstate = grads
    heads = bad.any(1).any(0)
    gdt.masked_fill_(bad, math.nan)
    for g in (gx, gz):
        g.masked_fill_(bad[..., None] if g.numel() else g.isnan(), math.nan)
    for g in (gB, gC):
        g.masked_fill_(bad.unflatten(2, (g.shape[2], -1)).any(3)[..., None], math.nan)
    for g in (gA, gD, gbias):
        g.masked_fill_(heads.view(-1, *(1,) * (g.dim() - 1)) if g.numel() else g.isnan(), math.nan)
    gstate.masked_fill_(bad[:, 0, :, None, None], math.nan)


def _block_backward(
    block: Block, state: Tensor, gy: Tensor, old: Tensor, glast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of dt x, B, C, dt A and the state before the block, from those of y and of the state after it."""
    weights = block.scores * block.L
    gweights = gy @ block.dtx.transpose(3, 4)  # (b, g, r, q, q)
    gdtx = weights.transpose(3, 4) @ gy
    gscores = block.causal((gweights * block.L).sum(2))
    flow = gweights.mul_(weights)
    gread = join(gy * block.into)
    gC = gscores @ block.B + gread @ state.flatten(3).transpose(2, 3)
    read = (gy * old).sum(4)
    gstate, gfirst = _carry_backward(block, (block.C.transpose(2, 3) @ gread).view(state.shape), glast)
    after = block.dtx * block.onward
    gafter = split(block.B @ gstate.flatten(3), state)
    gB = gscores.transpose(2, 3) @ block.C + join(after) @ gstate.flatten(3).transpose(2, 3)
    moved = (gafter * after).sum(4, dtype=block.i.wide)
    kept = (gstate * (block.through * state)).sum((2, 4))
    gdtx.addcmul_(gafter, block.onward)
    return gdtx, gB, gC, _through_sums(flow, read, moved, kept), gfirst


def _through_sums(flow: Tensor, read: Tensor, moved: Tensor, kept: Tensor) -> Tensor:
    """The gradient of dt A (b, g, r, q), from those of its sums: from s to t, from the start to t, from s to the end, and of all."""
    if moved.dtype == torch.float64:
        # d weights / d (c_t - c_s) is weights itself: a row gains what a column loses
        gsums = flow.sum(4, dtype=moved.dtype) - flow.sum(3, dtype=moved.dtype)
        gsums += read
        gsums -= moved
        gsums[..., -1] += moved.sum(3) + kept
        return gsums.flip(3).cumsum(3).flip(3)
    # float32 has no digits to lose in differences: what passes step k is what goes from before it to it or beyond
    passing = flow.flip(3).cumsum(3).flip(3).tril(-1).sum(4)
    return passing + read.flip(3).cumsum(3).flip(3) + F.pad(moved, (1, -1)).cumsum(3) + kept[..., None]


def _carry_backward(block: Block, gread: Tensor, glast: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk and of that before the block, from what the chunks read and the state after the block."""
    rows = (-1, block.count)
    every, gread, through = torch.empty_like(gread), gread.unflatten(0, rows), block.through.unflatten(0, rows)
    for c in reversed(range(block.count)):
        every.unflatten(0, rows)[:, c] = glast
        glast = torch.addcmul(gread[:, c], through[:, c], glast)
    return every, glast


def _through_step_sizes(block: Block, g: Tensor) -> Tensor:
    """From the gradient of the step sizes (b, q, h) to that of dt before bias, softplus, limits and padding."""
    i = block.i
    if block.valid is not None:
        g = g.masked_fill(~block.valid[..., None], 0.0)
    if (i.dt_min, i.dt_max) != (0.0, math.inf):
        dt = F.softplus(block.raw) if i.dt_softplus else block.raw
        g = g.masked_fill((dt < i.dt_min) | (dt > i.dt_max), 0.0)
    return g * torch.sigmoid(block.raw) if i.dt_softplus else g


def _tokens(x: Tensor) -> Tensor:
    """(b, g, r, q, p) as (b, q, h, p)."""
    return x.flatten(1, 2).transpose(1, 2)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


differentiable_once(ssd_backward_op)


@ssd_backward_op.register_fake
def _ssd_backward_fake(
    gout, glast, saved, x, dt, A, B, C, D, z, dt_bias, reset, valid, dt_softplus, dt_min, dt_max, chunk
):
    acc = torch.promote_types(x.dtype, torch.float32)
    none = x.new_empty(0, dtype=acc)
    gD, gbias = (none if m is None else _like(m) for m in (D, dt_bias))
    gz = x.new_empty(0) if z is None else _like(z)
    b, _, h, p = x.shape
    return _like(x), _like(dt), _like(A), _like(B), _like(C), gD, gz, gbias, x.new_empty(b, h, p, B.shape[3], dtype=acc)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[11:]
    ctx.state_dtype = None if inputs[8] is None else inputs[8].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], *inputs[9:11], output[2])


def _backward(ctx: Any, gout: Tensor | None, glast: Tensor | None, _: Any) -> tuple:
    *inputs, saved = ctx.saved_tensors
    if gout is None:
        gout = torch.zeros_like(inputs[0])
    grads = list(torch.ops.hybridzoo.ssd_backward(gout, glast, saved, *inputs, *ctx.options))
    for at in (5, 6, 7):
        grads[at] = None if inputs[at] is None else grads[at]
    grads[8] = None if ctx.state_dtype is None else grads[8].to(ctx.state_dtype)
    return (*grads, *[None] * 6)


ssd_op.register_autograd(_backward, setup_context=_setup)


def ssd(
    x: Tensor,
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
    dt_limit: tuple[float, float],
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """:func:`.reference.ssd`, fast; the same arguments and results, and the tokens per chunk."""
    lo, hi = dt_limit
    out, last, _ = torch.ops.hybridzoo.ssd(
        x, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus, lo, hi, chunk_size
    )
    return out, last

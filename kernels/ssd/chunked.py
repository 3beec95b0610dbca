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
from ..numerics import acc_dtype, blank, cast, full_precision
from ..operators import custom_op, filled, like
from .chunks import SsdBlock, SsdWork, join, split
from .inputs import SsdInputs, SsdOptions


def _inward(state: Tensor, g: int) -> Tensor:
    """A state (b, h, p, n) as (b, g, n, r, p)."""
    return state.unflatten(1, (g, -1)).permute(0, 1, 4, 2, 3)


def _outward(state: Tensor) -> Tensor:
    # never a view: autograd lets nobody write into those of an op
    b, g, n, r, p = state.shape
    out = state.new_empty(b, g * r, p, n)
    out.view(b, g, r, p, n).copy_(state.permute(0, 1, 3, 4, 2))
    return out


_TENSORS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? reset, Tensor? valid"
)
_OPTIONS = "bool dt_softplus, float dt_min, float dt_max, SymInt chunk"
# the backward needs no initial state: the states at chunk starts hold it
_INPUTS = [name for name in SsdInputs._fields if name != "initial_state"]
_BACKWARD = f"Tensor gout, Tensor? glast, Tensor saved, {_TENSORS.replace('Tensor? initial_state, ', '')}, {_OPTIONS}"


@custom_op("hybridzoo::ssd", schema=f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
@full_precision
def ssd_op(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (b, l, h, p), the last state (b, h, p, n), and, flat, the states at chunk starts (b, chunks, g, n, r, p)."""
    i, options, bad = SsdInputs(*operands[:-4]), SsdOptions(*operands[-4:]), None
    if i.reset is not None and not contain.finite(i.x, i.dt, i.B, i.C, i.initial_state):
        bad = contain.spoiled(i.x, i.dt, i.B, i.C, i.initial_state, i.reset, options.dt_softplus)
        i = _clean(i, "x", "dt", "B", "C", "initial_state")
    work = SsdWork(i, options)
    (b, g, r, n, p), D = work.sizes, work.skip()
    out = blank(i.x)
    saved = i.x.new_empty(b, -(-i.x.shape[1] // work.chunk), g, n, r, p, dtype=work.acc)
    state = (
        saved.new_zeros(b, g, n, r, p)
        if i.initial_state is None
        else _inward(i.initial_state.to(work.acc, copy=True), g)
    )
    for size in work.blocks():
        block = SsdBlock(work, *size)
        state = block.carry(state, saved)
        y, _ = block.read(saved[:, block.chunks].flatten(0, 1))
        if D is not None:
            y.addcmul_(block.x, D)
        if i.z is not None:
            y.mul_(F.silu(block.heads(i.z)))
        block.paste(out, _tokens(y))
    last = _outward(state)
    if bad is not None:
        out.masked_fill_((bad.after | bad.here)[..., None], math.nan)
        last.masked_fill_(bad.after[:, -1, :, None, None], math.nan)
    return out, last, saved.view(-1)


@ssd_op.register_fake
def _ssd_fake(*operands):
    i, options = SsdInputs(*operands[:-4]), SsdOptions(*operands[-4:])
    (b, l, h, p), n = i.x.shape, i.B.shape[3]
    saved = i.x.new_empty(b * ((l + options.chunk - 1) // options.chunk) * h * p * n, dtype=i.acc)
    return blank(i.x), i.x.new_empty(b, h, p, n, dtype=i.acc), saved


def _clean(i: SsdInputs, *names: str) -> SsdInputs:
    return i._replace(**{name: contain.clean(getattr(i, name)) for name in names})


@custom_op("hybridzoo::ssd_backward", schema=f"({_BACKWARD}) -> ({', '.join(['Tensor'] * 9)})")
@full_precision
def ssd_backward_op(gout: Tensor, glast: Tensor | None, saved: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; empty where there is no such input."""
    i, options = SsdInputs(**dict(zip(_INPUTS, operands, strict=False))), SsdOptions(*operands[-4:])
    if i.reset is None or contain.finite(i.x, i.dt, i.B, i.C, i.z, gout, glast):
        return filled(_gradients(SsdWork(i, options), gout, glast, saved), gout)
    after, here = contain.spoiled(i.x, i.dt, i.B, i.C, None, i.reset, options.dt_softplus)
    bad = after | contain.spoiled_before(here, gout, i.z, glast, i.reset)
    work, (gout, glast) = SsdWork(_clean(i, "x", "dt", "B", "C", "z"), options), map(contain.clean, (gout, glast))
    grads = _gradients(work, gout, glast, saved)
    _spoil(grads, bad)
    return filled(grads, gout)


def _gradients(work: SsdWork, gout: Tensor, glast: Tensor | None, saved: Tensor) -> tuple[Tensor | None, ...]:
    i, (b, g, r, n, p) = work.i, work.sizes
    skip, saved = work.skip(), saved.view(b, -(-i.x.shape[1] // work.chunk), g, n, r, p)
    gx, gdt, gB, gC = map(blank, (i.x, i.dt, i.B, i.C))
    gz = None if i.z is None else blank(i.z)
    gA, gbias = i.x.new_zeros(g * r, dtype=work.wide), None if i.dt_bias is None else saved.new_zeros(g * r)
    gD = None if skip is None else saved.new_zeros(skip.shape)
    gstate = saved.new_zeros(b, g, n, r, p) if glast is None else _inward(glast.to(work.acc, copy=True), g)
    for size in reversed(work.blocks()):
        block = SsdBlock(work, *size)
        state = saved[:, block.chunks].flatten(0, 1)
        gated = gy = block.heads(gout)
        y, old = block.read(state)
        if i.z is not None and gz is not None:
            gate = block.heads(i.z)
            gated = gy * F.silu(gate)
            full = y if skip is None else y.addcmul_(block.x, skip)
            block.paste(gz, _tokens(torch.ops.aten.silu_backward(gy * full, gate)))
        gdtx, gB_, gC_, gdtA, gstate = _block_backward(block, state, gated, old, gstate)
        block.paste(gB, gB_.transpose(1, 2))
        block.paste(gC, gC_.transpose(1, 2))
        gA += (gdtA * block.dt).sum((0, 3)).flatten()
        graw = gdtA * block.rates + (gdtx * block.x).sum(4)
        graw = _through_step_sizes(block, graw.to(work.acc).flatten(1, 2).transpose(1, 2))
        block.paste(gdt, graw)
        if gbias is not None:
            gbias += graw.sum((0, 1))
        gpart = gdtx.mul_(block.dt[..., None])
        if skip is not None and gD is not None:
            gpart.addcmul_(gated, skip)
            gD += (gated * block.x).sum_to_size(skip.shape)
        block.paste(gx, _tokens(gpart))
    gD = None if i.D is None or gD is None else gD.view(i.D.shape).to(i.D.dtype)
    gbias = None if i.dt_bias is None or gbias is None else gbias.to(i.dt_bias.dtype)
    return gx, gdt, gA.to(i.A.dtype), gB, gC, gD, gz, gbias, _outward(gstate)


def _spoil(grads: tuple[Tensor | None, ...], bad: Tensor) -> None:
    """Overwrite the gradients that depend on what was not finite, at the tokens and heads ``bad`` (b, l, h)."""
    gx, gdt, gA, gB, gC, gD, gz, gbias, gstate = grads
    heads = bad.any(1).any(0)
    places = (
        (gx, bad[..., None]),
        (gz, bad[..., None]),
        (gdt, bad),
        *((g, bad.unflatten(2, (g.shape[2], -1)).any(3)[..., None]) for g in (gB, gC) if g is not None),
        *((g, heads.view(-1, *(1,) * (g.dim() - 1))) for g in (gA, gD, gbias) if g is not None),
        (gstate, bad[:, 0, :, None, None]),
    )
    for g, at in places:
        if g is not None:
            g.masked_fill_(at, math.nan)


def _block_backward(
    block: SsdBlock, state: Tensor, gy: Tensor, old: Tensor, glast: Tensor
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
    moved = (gafter * after).sum(4, dtype=block.work.wide)
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


def _carry_backward(block: SsdBlock, gread: Tensor, glast: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk and of that before the block, from what the chunks read and the state after the block."""
    rows = (-1, block.count)
    every, gread, through = torch.empty_like(gread), gread.unflatten(0, rows), block.through.unflatten(0, rows)
    for c in reversed(range(block.count)):
        every.unflatten(0, rows)[:, c] = glast
        glast = torch.addcmul(gread[:, c], through[:, c], glast)
    return every, glast


def _through_step_sizes(block: SsdBlock, g: Tensor) -> Tensor:
    """From the gradient of the step sizes (b, q, h) to that of dt before bias, softplus, limits and padding."""
    options = block.work.options
    if block.valid is not None:
        g = g.masked_fill(~block.valid[..., None], 0.0)
    if options.dt_limit != (0.0, math.inf):
        dt = F.softplus(block.raw) if options.dt_softplus else block.raw
        g = g.masked_fill((dt < options.dt_min) | (dt > options.dt_max), 0.0)
    return g * torch.sigmoid(block.raw) if options.dt_softplus else g


def _tokens(x: Tensor) -> Tensor:
    """(b, g, r, q, p) as (b, q, h, p)."""
    return x.flatten(1, 2).transpose(1, 2)


differentiable_once(ssd_backward_op)


@ssd_backward_op.register_fake
def _ssd_backward_fake(gout, glast, saved, x, dt, A, B, C, D, z, dt_bias, *_):
    (b, _, h, p), n = x.shape, B.shape[3]
    return (
        *like(x, x, dt, A, B, C, D, z, dt_bias),
        x.new_empty(b, h, p, n, dtype=acc_dtype(x.dtype)),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    i, ctx.options = SsdInputs(*inputs[:-4]), inputs[-4:]
    ctx.state_dtype = None if i.initial_state is None else i.initial_state.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(getattr(i, name) for name in _INPUTS), output[2])


def _backward(ctx: Any, gout: Tensor | None, glast: Tensor | None, _: Any) -> tuple:
    *inputs, saved = ctx.saved_tensors
    if gout is None:
        gout = torch.zeros_like(inputs[0])
    *grads, gstate = torch.ops.hybridzoo.ssd_backward(gout, glast, saved, *inputs, *ctx.options)
    given = [None if x is None else g for g, x in zip(grads, inputs, strict=False)]
    return (*given, None if ctx.state_dtype is None else cast(gstate, ctx.state_dtype), *[None] * 6)


ssd_op.register_autograd(_backward, setup_context=_setup)


def ssd(i: SsdInputs, options: SsdOptions) -> tuple[Tensor, Tensor]:
    """:func:`.reference.ssd`, fast; the same arguments and results."""
    out, last, _ = torch.ops.hybridzoo.ssd(*i, *options)
    return out, last

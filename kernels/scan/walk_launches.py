"""Scans over several walks as one launch, each over its own operands.

Of a backward, the blocks of all walks are one grid: their gradients are apart in any case, so nothing waits for anything; and over small
maps, the blocks of one walk are fewer than the multiprocessors hold. Of a forward, a block goes along one walk after the other, since they
add to one sum, of which each block has its own channels.
"""

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..gpu import nvrtc, structs
from ..gpu.device import DRIVERS, processors, shared_memory
from ..gpu.operands import ceil_div, in_one_piece
from . import launches
from .inputs import ScanInputs
from .launches import Launch
from .operands import ScanOperands, WideGradients
from .shapes import Cut, backward_plan, instance

__all__ = ["MOST", "backward", "forward", "launch"]

# Walks::each of the source
MOST = 4
# walks in turn take registers, which instances of more states have none of
FEW_STATES = 4
# of ScanOperands.signature: where it says which tensors are off 16-byte borders, and along which walk
_OFF, _WALK = 4, 6


def launch(each: Sequence[Launch], operands: Sequence[tuple], device: torch.device, in_turn: bool = False) -> None:
    """Run launches of one kernel, alike but for their walks, over the operands of each: as one, or one for every :data:`MOST`.

    Side by side, in a grid of the blocks of all; or ``in_turn``, the blocks of one going along every walk.
    """
    one, (kernel, arguments) = each[0], each[0].name.split("<", 1)
    if not one.blocks:
        return  # a batch of no rows
    packed = [structs.pack(x.tail, *tensors) for x, tensors in zip(each, operands, strict=True)]
    for at in range(0, len(packed), MOST):
        some = packed[at : at + MOST]
        number, blocks = (len(some), one.blocks) if in_turn else (one.blocks, one.blocks * len(some))
        params = b"".join(some).ljust(MOST * len(some[0]), b"\0") + struct.pack("i4x", number)
        name = f"{kernel}_{'in_turn' if in_turn else 'walks'}<{arguments}"
        nvrtc.launch(one.source, name, params, blocks, one.threads, one.shared, device)


def _alike(looks: list[tuple]) -> list[tuple]:
    """Signatures of one kernel for all: what is off 16-byte borders in one walk is moved element by element in every one."""
    off = 0
    for look in looks:
        off |= look[_OFF]
    return [(*look[:_OFF], off, *look[_OFF + 1 :]) for look in looks]


def _looks(calls: list[ScanOperands], gout: Tensor, wide: WideGradients) -> list[tuple]:
    each = [
        c.signature(gout, wide.u[k], wide.dt[k], None if wide.z is None else wide.z[k]) for k, c in enumerate(calls)
    ]
    looks = _alike(each)
    assert len({(*look[:_WALK], *look[_WALK + 1 :]) for look in looks}) == 1, (
        "operands are those of one tensor for all walks"
    )
    return looks


def forward(calls: list[ScanOperands], out: Tensor, last: Tensor, saved: Tensor | None) -> bool:
    """Run a forward of several walks in turn, where that is worth it and can be; tell whether it has been done.

    The calls are as for :func:`.launches.forward`, and ready; states have a leading axis of one per walk.
    """
    if len(calls) == 1 or instance(calls[0].i.A.shape[1]) > FEW_STATES:
        return False
    count, room = processors(out.device), shared_memory(out.device) - DRIVERS
    looks = _alike([call.signature(out) for call in calls])
    plans = [launches.forward_launches(look, count, room, None, None) for look in looks]
    # pieces of a row that other blocks go along would have to wait for these
    if any(sweep for _, sweep, _ in plans) or len({scan.name for scan, *_ in plans}) > 1:
        return False
    into = [(out, last[k], None if saved is None else saved[k]) for k in range(len(calls))]
    operands = [launches.scanning(call, own, 0, 0) for call, own in zip(calls, into, strict=True)]
    launch([scan for scan, *_ in plans], operands, out.device, in_turn=True)
    return True


def _cut(calls: list[ScanOperands], count: int, room: int, chunks: int | Cut | None) -> int | Cut:
    if chunks is not None:
        return chunks
    b, *sizes = calls[0].sizes
    k = len(calls)
    _, grid = backward_plan((k * b, *sizes), count, None, None, calls[0].i.u.element_size(), room)
    return replace(grid.cut, whole=grid.cut.whole // k)


def _swept(
    calls: list[ScanOperands], sweeps: Sequence[Launch | None], pieces: int, gout: Tensor
) -> Sequence[Tensor | None]:
    """Memory of each walk, with what a sweep leaves there (:func:`.launches.places`); of rows that are not cut, none."""
    each = [sweep for sweep in sweeps if sweep is not None]
    if not each:
        return [None] * len(calls)
    memory = calls[0].i.A.new_empty((len(calls), launches.room_of(calls[0], pieces)))
    operands = [launches.sweeping(c, gout, *launches.places(c, x, pieces)) for c, x in zip(calls, memory, strict=True)]
    launch(each, operands, gout.device)
    return memory.unbind()


def backward(
    calls: list[ScanOperands],
    gout: Tensor,
    glast: Tensor | None,
    saved: Tensor | None,
    wide: WideGradients,
    chunks: int | Cut | None = None,
) -> ScanInputs:
    """Gradients as of :func:`.launches.backward`, with a leading axis of one per walk, as ``glast``, ``saved`` and ``wide`` have it.

    The calls have their step sizes whole; their gradient may take the place of them.
    """
    first, k, new, device = calls[0], len(calls), calls[0].i.A.new_empty, gout.device
    b, l, d, n, g = first.sizes
    glast = in_one_piece(glast)
    if saved is None:
        saved = first.saved_states(k)
        for j, call in enumerate(calls):
            # the outputs are not asked for: they go where a gradient will be
            launches.forward(call, True, into=(wide.u[j], None, saved[j]))
    count, room = processors(device), shared_memory(device) - DRIVERS
    cut = _cut(calls, count, room, chunks)
    looks = _looks(calls, gout, wide)
    plans = [launches.backward_launches(look, count, room, None, cut, False) for look in looks]
    _, _, pieces, grid, _ = plans[0]
    one, rows = b * l * g * n, grid.cut.pieces(b)
    # a walk's partial sums start at a multiple of 16 bytes
    size = ceil_div(2 * grid.tiles * one + rows * d * (n + 2), 4) * 4
    partial, total_A, gD, gbias = new((k, size)), new((k, d, n)), new((k, d)), new((k, d))
    ginit = None if first.i.initial_state is None else new((k, b, d, n))
    memory, operands, sums = _swept(calls, [plan[1] for plan in plans], pieces, gout), [], []
    for j, call in enumerate(calls):
        i, gbc, (local, decay) = call.i, partial[j].data_ptr(), launches.places(call, memory[j], pieces)
        gA = gbc + 8 * grid.tiles * one
        gskip = gA + 4 * rows * d * n
        mine = [None if x is None else x[j] for x in (glast, wide.z, ginit)]
        inputs = (i.u, i.dt, i.B, i.C, i.z, gout, i.A, i.D, i.dt_bias, saved[j], i.initial_state, mine[0], local, decay)
        operands.append((*inputs, i.reset, i.valid, wide.u[j], wide.dt[j], mine[1], gbc, gA, gskip, mine[2], None))
        into = (wide.B[j], wide.C[j], total_A[j], gD[j], gbias[j])
        sums.append((gbc, gbc + 4 * one, gA, gskip, gskip + 4 * d, *into))
    launch([plan[0] for plan in plans], operands, device)
    launch([plan[4] for plan in plans], sums, device)
    found: dict[str, Any] = {"A": total_A, "D": gD, "dt_bias": gbias, "initial_state": ginit}
    return ScanInputs(**wide._asdict(), **found, reset=None, valid=None, dt_weight=None)

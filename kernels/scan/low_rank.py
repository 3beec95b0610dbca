"""Step sizes in low-rank form: dt = low W^T of (b, l, r) and (d, r), formed by the scan itself or by a matrix product in front of it.

In Mamba the step sizes of all d channels come out of r = d_model / 16 numbers per token. Formed inside the scan
(``low_rank.cuh``), they are never written: 4 bytes per element of (b, l, d) in 16 bits, and for every path of an image's scan.
"""

from typing import Any

import torch
from torch import Tensor

from ..numerics import product
from .inputs import ScanInputs

# of higher ranks, and beside more states, a product in front is as fast (NOTES.md)
MAX_RANK, MOST_STATES = 16, 16


def step_sizes(dt: Tensor, weight: Tensor) -> Tensor:
    """``(..., b, l, d)`` in dt's type, whatever autocast says.

    Args:
        dt: ``(..., b, l, r)``, the low-rank form.
        weight: ``(d, r)``, or ``(k, d, r)``: of k paths, each with its own.
    """
    weight = weight.to(dt.dtype)
    with torch.autocast(dt.device.type, enabled=False):
        if weight.dim() == 2 or dt.dim() == 3:
            return dt @ (weight.mT if weight.dim() == 2 else weight.mT.unsqueeze(1))
        # rows of all tokens: a product that broadcasts would copy the weight for every sequence
        return torch.bmm(dt.flatten(1, 2), weight.mT).unflatten(1, dt.shape[1:3])


def gradients(gdt: Tensor, dt: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the low-rank form, in the type of the step sizes' gradient ``(b, l, d)``, and of the weight, in its own."""
    rows, low = gdt.flatten(0, 1), dt.to(gdt.dtype).flatten(0, 1)
    with torch.autocast(gdt.device.type, enabled=False):
        return (rows @ weight.to(gdt.dtype)).view(dt.shape), product(rows.mT, low, weight.dtype)


def with_gradients(grads: ScanInputs, i: ScanInputs) -> ScanInputs:
    """The gradients of a scan with that of its step sizes taken to their low-rank form, where ``i`` has one."""
    if i.dt_weight is None:
        return grads
    gdt, gweight = gradients(grads.dt, i.dt, i.dt_weight)
    return grads._replace(dt=gdt, dt_weight=gweight)


def with_gradients_of_walks(grads: ScanInputs, low: Tensor, weight: Tensor, given: Tensor | None) -> ScanInputs:
    """As :func:`with_gradients`, for (k, b, l, r) and (k, d, r) of k walks; the weight's gradient is in the type of the one ``given``."""
    assert given is not None
    rows, each = grads.dt.flatten(1, 2), low.flatten(1, 2)
    with torch.autocast(rows.device.type, enabled=False):
        glow = torch.bmm(rows, weight.to(rows.dtype)).unflatten(1, low.shape[1:3])
        # one by one: of products in a batch, cuBLAS does not split the sum over all tokens
        gweight = torch.stack([product(g.mT, x, given.dtype) for g, x in zip(rows, each, strict=True)])
    return grads._replace(dt=glow, dt_weight=gweight)


def in_vectors(dt: Tensor) -> bool:
    """Tell whether rows of the low-rank form can be read 16 bytes at a time: they start at borders, and what is behind the last exists."""
    (b, l, r), (row, step, one), lanes = dt.shape, dt.stride(), 16 // dt.element_size()
    end = dt.storage_offset() + (b - 1) * row + (l - 1) * step + (r + lanes - 1) // lanes * lanes
    starts = one == 1 and dt.data_ptr() % 16 == 0 and (l == 1 or step % lanes == 0) and (b == 1 or row % lanes == 0)
    return starts and end * dt.element_size() <= dt.untyped_storage().nbytes()


def refuse(facts: dict[str, Any]) -> str | None:
    """Say why the CUDA scan cannot form step sizes itself, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    dtype, rank, n = facts.get("dtype", torch.float32), facts.get("rank", 16), facts.get("d_state", 16)
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA scan forms step sizes in bfloat16 and float16, got {str(dtype).removeprefix('torch.')}"
    if n > MOST_STATES:
        return f"the CUDA scan forms step sizes for d_state up to {MOST_STATES}, got {n}"
    if not 1 <= rank <= MAX_RANK:
        return f"the CUDA scan forms step sizes of ranks up to {MAX_RANK}, got {rank}"
    return None if facts.get("in_vectors", True) else "rows of the step sizes' low-rank form are off 16-byte borders"

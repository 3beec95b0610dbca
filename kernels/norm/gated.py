"""RMSNorm of what a gate is multiplied to (Mamba-2, arXiv:2405.21060 §6.2)."""

import ctypes
import functools
from ctypes import c_float, c_int, c_longlong, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..dispatch import KERNELS, Backend, Facts, choose, register
from ..gpu import nvrtc, structs
from ..gpu.operands import TYPES, refuse_tensors
from ..numerics import acc_dtype

# as in gated.cu and front.cuh
THREADS, N, MOST_GROUPS = 256, 4, 320


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """``rmsnorm(x * silu(gate))``, or ``rmsnorm(x) * silu(gate)``, per group of channels.

    Args:
        x: ``(..., d)``.
        gate: ``(..., d)``.
        weight: ``(d,)``, or ``None``.
        eps: Added to the mean square.
        group_size: Channels that share one root mean square; all of them by default.
        norm_before_gate: Normalise first, then gate.
        backend: ``"cuda"``, which has no gradient, or ``"torch"``; chosen automatically if absent.

    Returns:
        ``(..., d)`` in x's dtype; statistics and products are in float32 at least.

    Raises:
        ValueError: Shapes do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    where, size = "gated_rms_norm", group_size or x.shape[-1]
    checks.shape(where, "gate", gate, tuple(x.shape), "(..., d)")
    checks.shape(where, "weight", weight, (x.shape[-1],), "(d,)")
    if x.shape[-1] % size:
        raise ValueError(f"{where}: d = {x.shape[-1]} is not a multiple of group_size = {size}.")
    grad = torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in (x, gate, weight))
    facts: dict[str, Any] = {"device": x.device.type, "dtype": x.dtype, "grad": grad}
    # asked last: what is traced has no addresses
    facts["misfit"] = functools.partial(_misfit, x, gate, weight, size)
    if backend is None and _refuse(facts) is not None:
        # also where the environment asks for our kernels, which leave training to PyTorch here
        backend = "torch"
    chosen = choose(where, backend=backend, **facts)
    return chosen.run(x, gate, weight, eps, size, norm_before_gate)


def _torch(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, size: int, norm_before_gate: bool) -> Tensor:
    y, factor = x.to(acc_dtype(x.dtype)), F.silu(gate.to(acc_dtype(gate.dtype)))
    if not norm_before_gate:
        y = y * factor
    y = F.rms_norm(y.unflatten(-1, (-1, size)), (size,), None, eps).flatten(-2)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if norm_before_gate:
        y = y * factor
    return y.to(x.dtype)


class GatedNormParams(ctypes.Structure):
    """``GatedNormParams`` of ``gated.cu``."""

    _fields_ = [
        *structs.fields(c_void_p, "x gain gate shift out"),
        *structs.fields(c_longlong, "x_b gate_b"),
        *structs.fields(c_int, "k group_size gate_behind"),
        ("eps", c_float),
    ]


def _misfit(x: Tensor, gate: Tensor, weight: Tensor | None, size: int) -> str | None:
    if size % N or x.shape[-1] // size > MOST_GROUPS:
        return f"the CUDA kernel normalises groups of {N} n channels, up to {MOST_GROUPS}, got {x.shape[-1]} in groups of {size}"
    for name, m in (("gate", gate), ("weight", weight)):
        if m is not None and m.dtype != x.dtype:
            return f"the CUDA kernel needs {name} in x's dtype {x.dtype}, got {m.dtype}"
    for m in (x, gate):
        wide = N * m.element_size()
        if m.stride(-1) != 1 or m.data_ptr() % wide or any(s * m.element_size() % wide for s in m.stride()[:-1]):
            return f"the CUDA kernel needs rows in one piece on {wide}-byte borders"
    return None


def _refuse(facts: Facts) -> str | None:
    if facts.get("grad"):
        return "the CUDA kernel has no gradient"
    if torch.compiler.is_compiling():
        return "the CUDA kernel would break the compiled graph"
    return refuse_tensors(facts) or facts.get("misfit", lambda: None)() or nvrtc.unavailable()


@functools.lru_cache(maxsize=1024)
def _tail(x_b: int, gate_b: int, k: int, size: int, gate_behind: bool, eps: float) -> bytes:
    return structs.tail(GatedNormParams(x_b=x_b, gate_b=gate_b, k=k, group_size=size, gate_behind=gate_behind, eps=eps))


def _cuda(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, size: int, norm_before_gate: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        k = x.shape[-1]
        rows, gates = x.reshape(-1, k), gate.reshape(-1, k)
        weight = None if weight is None else weight.contiguous()
        tail = _tail(rows.stride(0), gates.stride(0), k, size, norm_before_gate, eps)
        packed = structs.pack(tail, rows, weight, gates, None, out)
        name = f"gated_norm<{TYPES[x.dtype]}>"
        nvrtc.launch("gated.cu", name, packed, len(rows), THREADS, 0, x.device, overlaps=True)
    return out


register(
    "gated_rms_norm",
    Backend("cuda", KERNELS, _refuse, _cuda),
    Backend("torch", "PyTorch operations", run=_torch, plain=True),
)

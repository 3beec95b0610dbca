"""One token's attention over a cache: all that stands between the projections of an attention layer, when it decodes."""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import KERNELS, Backend, choose, register
from . import cuda, plain
from .inputs import HeadNorm, StepAttention

register(
    "step_attention",
    Backend("cuda", KERNELS, cuda.refuse, cuda.step_attention),
    Backend("torch", "PyTorch operations", run=plain.step_attention, plain=True),
)


def step_attention(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    length: Tensor,
    *,
    nheads: int,
    scale: float | None = None,
    window: int | None = None,
    frequency: Tensor | None = None,
    interleaved: bool = False,
    key_multiplier: float = 1.0,
    norm: HeadNorm | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of one token per row: its key and value go into the cache, and it sums up the values that it sees.

    Args:
        qkv: ``(b, (h + 2 h_kv) p)``, query, key and value heads.
        k: ``(b, cap, h_kv, p)``, keys by slots, position ``i`` in slot ``i % cap``; updated in place, as the next three are.
        v: ``(b, cap, h_kv, p)``.
        pos: ``(b, cap)`` int64, the position in each slot, -1 where it is empty.
        length: ``(b,)`` int64, tokens before this one; one more behind.
        nheads: Query heads, ``h``.
        scale: Factor of the scores; ``p ** -0.5`` by default.
        window: Tokens that are seen, this one included; all by default.
        frequency: ``(rotary_dim / 2,)``, by which angles of the first ``rotary_dim`` channels grow with the position; ``None`` for no
            rotation.
        interleaved: Channels ``(2i, 2i + 1)`` form a pair, instead of ``(i, i + rotary_dim / 2)``.
        key_multiplier: Factor of the keys.
        norm: RMS norms of query and key heads.
        backend: ``"cuda"`` or ``"torch"``; chosen automatically if absent.

    Returns:
        ``(b, h p)`` in qkv's dtype.

    Raises:
        ValueError: Shapes do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    i = StepAttention(
        qkv, k, v, pos, length, nheads, scale, window, frequency, interleaved, key_multiplier, norm
    )  # fmt: skip
    _check(i)
    grad = torch.is_grad_enabled() and any(m.requires_grad for m in (qkv, k, v))
    facts: dict[str, Any] = {"device": qkv.device.type, "dtype": qkv.dtype, "headdim": k.shape[-1], "grad": grad}
    # asked last: what is traced has no addresses
    facts["misfit"] = functools.partial(cuda.misfit, i)
    if backend is None and cuda.refuse(facts) is not None:
        # also where the environment asks for our kernels: there is none for every layer
        backend = "torch"
    return choose("step_attention", backend=backend, **facts).run(i)


def _check(i: StepAttention) -> None:
    where = "step_attention"
    checks.floating(where, "k", i.k, 4, "(b, cap, h_kv, p)")
    b, cap, h_kv, p = i.k.shape
    checks.groups(where, i.nheads, h_kv, "nheads")
    checks.shape(where, "qkv", i.qkv, (b, (i.nheads + 2 * h_kv) * p), "(b, (h + 2 h_kv) p)")
    checks.shape(where, "v", i.v, (b, cap, h_kv, p), "(b, cap, h_kv, p)")
    checks.shape(where, "pos", i.pos, (b, cap), "(b, cap)")
    checks.shape(where, "length", i.length, (b,), "(b,)")
    checks.floats(where, qkv=i.qkv, k=i.k, v=i.v)
    for name, m in (("pos", i.pos), ("length", i.length)):
        if m.dtype != torch.int64:
            raise ValueError(f"{where}: {name} has dtype {m.dtype}, expected torch.int64.")
    if i.frequency is not None and not 1 <= i.frequency.numel() <= p // 2:
        raise ValueError(
            f"{where}: frequency has {i.frequency.numel()} numbers, and heads of {p} channels have {p // 2} pairs."
        )
    if i.norm is not None:
        checks.shape(where, "norm.q", i.norm.q, (p,), "(p,)")
        checks.shape(where, "norm.k", i.norm.k, (p,), "(p,)")

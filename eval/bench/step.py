"""A decode step: each of its launches beside PyTorch's operations and the bytes it moves, and whole models' beside launches apart.

As many calls as it takes for their weights or states to be beyond any L2 cache are recorded as a CUDA graph, one after the other as in a
model; a time is that of a replay by its calls. Every call finds what it reads in memory, logits too, which a model has just written. The
floor is the time of a copy of as many bytes; what hardly writes may be below it.
"""

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import BackendError, StepNorm, selective_state_update, ssd_state_update, step_attention, step_linear
from ...kernels.dispatch import ENV
from ...kernels.gpu import nvrtc
from ...kernels.step.choose import Slots, choose_token
from ...kernels.step.cuda import LOW_ROWS
from ...zoo.models.build import build
from ..result_file import Row, Tick
from . import timing
from .ops import TOLERANCE, distance

__all__ = ["CASES", "PARTS", "Case", "Piece", "measure", "parts_of"]

BF16, F32 = torch.bfloat16, torch.float32
DEVICE = "cuda"
APART = "launches apart"
# bytes that the calls of a recording move together, and how many there are at most
BEYOND, MOST = 512 << 20, 128
# what is chosen without being asked for is to be no slower than what it is chosen over
GOAL = 1.0


class Piece(NamedTuple):
    """A call, of our kernel by ``"cuda"`` or of a peer by its name; ``reads`` are read once, ``changes`` are changed in place.

    ``how`` says what of a model goes through our kernels.
    """

    call: Callable[[str], Tensor]
    reads: tuple[Tensor, ...]
    changes: tuple[Tensor, ...] = ()
    how: str | None = None


class Case(NamedTuple):
    """A launch, or a model's step, at one shape; ``dtype`` is that of weights and keys, or of the state, ``limit`` of the difference."""

    part: str
    name: str
    op: str
    peer: str
    shape: dict[str, int]
    make: Callable[[int], list[Piece]]
    dtype: torch.dtype = BF16
    limit: float = TOLERANCE[BF16]


def _linear(b: int, k: int, n: int, op: str) -> Piece:
    weight, gain = (torch.randn(n, k) / k**0.5).to(BF16), torch.rand(k).add(0.5).to(BF16)
    norm = StepNorm(gain, 1e-5) if op == "norm, product" else None
    # in front of a norm is the residual stream
    x = torch.randn(b, k).to(BF16 if norm is None else F32)
    residual = torch.randn(b, n) if op == "product, addition" else None
    reads = (x, weight, *(() if norm is None else (gain,)), *(() if residual is None else (residual,)))
    return Piece(lambda how: step_linear(x, weight, norm=norm, residual=residual, backend=how), reads)


def _choices(count: int, b: int, v: int) -> list[Piece]:
    tokens, limit, ends = torch.zeros(b, count, dtype=torch.long), torch.full((b,), 1 << 40), torch.tensor([v])
    column, counts, token = torch.zeros(3, b, dtype=torch.long)
    finished, broken = torch.zeros(2, b, dtype=torch.bool)
    slots = Slots(tokens, None, column, counts, limit, finished, broken, token, ends)

    def piece(i: int) -> Piece:
        logits = torch.randn(b, v)

        def call(how: str) -> Tensor:
            if i == 0:
                slots.column.zero_()  # every recording fills the same columns
            choose_token(logits, slots, 0, backend=how)
            return slots.token

        return Piece(call, (logits,), (tokens[:, i],))

    return [piece(i) for i in range(count)]


def _attention(b: int, l: int, h: int, kv: int, p: int) -> Piece:
    qkv, (k, v) = torch.randn(b, (h + 2 * kv) * p).to(BF16), (torch.randn(b, l, kv, p, dtype=BF16) for _ in range(2))
    pos, length = torch.arange(l).repeat(b, 1), torch.full((b,), l - 1)

    def call(how: str) -> Tensor:
        if how != "sdpa":
            return step_attention(qkv, k, v, pos, length, nheads=h, backend=how)
        # a cache that is full needs no mask
        q, key, value = qkv.unflatten(1, (-1, p)).split([h, kv, kv], 1)
        k[:, -1], v[:, -1] = key, value
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True).flatten(1)

    return Piece(call, (qkv, k, v), (k[:, -1], v[:, -1]))


def _selective(dtype: torch.dtype, b: int, d: int, n: int, r: int) -> Piece:
    state, A, D, bias = torch.randn(b, d, n).to(dtype), torch.rand(d, n), torch.ones(d), torch.rand(d) - 5
    u, z, B, C = (torch.randn(b, size).to(BF16) for size in (d, d, n, n))
    # of many rows the layer forms step sizes by a product of its own
    low = b <= LOW_ROWS
    dt, weight = torch.randn(b, r if low else d).to(BF16), (torch.randn(d, r) / r**0.5).to(BF16) if low else None
    more = {"dt_weight": weight, "log_rates": True, "dt_bias": bias, "dt_softplus": True}

    def call(how: str) -> Tensor:
        return selective_state_update(state, u, dt, A, B, C, D, z, **more, backend=how)  # type: ignore[arg-type]

    return Piece(call, (u, dt, A, B, C, D, z, bias, *(() if weight is None else (weight,))), (state,))


def _ssd(dtype: torch.dtype, b: int, h: int, p: int, n: int) -> Piece:
    state, (A, D, bias) = torch.randn(b, h, p, n).to(dtype), (torch.rand(h), torch.ones(h), torch.rand(h) - 5)
    x, dt, B, C = (torch.randn(b, *shape).to(BF16) for shape in ((h, p), (h,), (1, n), (1, n)))
    more = {"log_rates": True, "dt_bias": bias, "dt_softplus": True}

    def call(how: str) -> Tensor:
        return ssd_state_update(state, x, dt, A, B, C, D, **more, backend=how)  # type: ignore[arg-type]

    return Piece(call, (x, dt, A, B, C, D, bias), (state,))


def _model(name: str, b: int) -> Piece:
    model = build(name, device=DEVICE, dtype=BF16).eval()
    state, ids = model.init_state(b), torch.randint(0, model.cfg.vocab_size, (b,))
    changes: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        changes.append(x)
        return x

    state.map(keep)

    def call(how: str) -> Tensor:
        with _way(how):
            return model.step(ids, state)

    with _way("cuda"):
        taken = model.backbone.steps_taken(state)
    return Piece(call, tuple(model.parameters()), tuple(changes), taken)


@contextlib.contextmanager
def _way(how: str) -> Iterator[None]:
    """Take steps by our kernels, by these with launches apart, or with products by PyTorch, whatever the environment asks for."""
    with mock.patch.dict(os.environ, {ENV: "torch" if how == "torch" else "cuda"}):
        before, nvrtc.OVERLAP = nvrtc.OVERLAP, how != APART
        try:
            yield
        finally:
            nvrtc.OVERLAP = before


def _each(one: Callable[..., Piece], *given: Any) -> Callable[[int], list[Piece]]:
    return lambda count: [one(*given) for _ in range(count)]


_PRODUCTS = ((2560, 10240), (5120, 192), (5120, 2560), (2560, 50280), (768, 3072), (1536, 768))
_UPDATES: tuple[tuple[str, Callable[..., Piece], dict[str, int]], ...] = (
    ("mamba-2.8b", _selective, {"d": 5120, "n": 16, "r": 160}),
    ("mamba2-2.7b", _ssd, {"h": 80, "p": 64, "n": 128}),
)
CASES = [
    *(
        Case("linear", f"linear-{k}x{n}-b{b}", op, "torch", {"b": b, "k": k, "n": n}, _each(_linear, b, k, n, op))
        for k, n in _PRODUCTS
        for b in (1, 8, 64)
        for op in ("product", "product, addition", "norm, product")
    ),
    *(
        Case("choose", f"choose-b{b}", "choice", "torch", {"b": b, "v": 50280}, partial(_choices, b=b, v=50280), F32)
        for b in (1, 64)
    ),
    *(
        Case("attention", f"attention-b{b}-l{l}", "attention", "sdpa", s, _each(_attention, *s.values()))
        for b in (1, 64)
        for l in (1024, 16384)
        for s in [{"b": b, "l": l, "h": 32, "kv": 8, "p": 128}]
    ),
    *(
        Case("update", f"{name}-b{b}", "update", "chunked", s, _each(one, dtype, *s.values()), dtype)
        for name, one, sizes in _UPDATES
        for b in (1, 64)
        for s in [{"b": b, **sizes}]
        for dtype in (F32, BF16)
    ),
    *(
        # in a model a rounding is met by many layers
        Case("model", f"{name}-b{b}", "step", peer, {"b": b}, _each(_model, name, b), BF16, 5 * TOLERANCE[BF16])
        for name in ("mamba-2.8b", "mamba2-2.7b", "mamba-130m")
        for b in (1, 8)
        for peer in (APART, "torch")
    ),
]
PARTS = list(dict.fromkeys(case.part for case in CASES))


def parts_of(device: str) -> list[str]:
    """Return the parts that are worth measuring on a kind of device.

    Raises:
        ValueError: Our kernels do not run here.
    """
    if device != "cuda":
        raise ValueError("bench step: needs a CUDA device, and torch sees none.")
    if (reason := nvrtc.unavailable()) is not None:
        raise ValueError(f"bench step: our kernels do not run here: {reason}.")
    return PARTS


@torch.no_grad()
def measure(
    parts: list[str], timer: timing.Timer, ceilings: dict[str, float], tick: Tick
) -> tuple[list[Row], list[str]]:
    """Return a row per case that our kernels do, and what failed, which the rest survives."""
    rows: list[Row] = []
    failed: list[str] = []
    for case in [case for case in CASES if case.part in parts]:
        tick(f"{case.name}, {case.op}")
        try:
            rows.append(_row(case, timer, ceilings))
        except BackendError:
            continue  # a product that is read too often by blocks of few rows goes to PyTorch
        except (AssertionError, RuntimeError) as e:
            failed.append(f"{case.name}, {case.op}: {type(e).__name__}: {e}")
        gc.collect()  # models are in cycles
        torch.cuda.empty_cache()
    return rows, failed


def _made(case: Case, count: int) -> list[Piece]:
    # made there, but not called so: what operations make on the host for themselves must stay there in a recording
    with torch.device(DEVICE):
        return case.make(count)


def _row(case: Case, timer: timing.Timer, ceilings: dict[str, float]) -> Row:
    error, moved = _agreement(case)
    count = min(MOST, math.ceil(BEYOND / moved))
    pieces = _made(case, count)
    graphs = [timing.captured(partial(_in_turn, pieces, how)) for how in ("cuda", case.peer)]
    mine, theirs = ([ms / count for ms in times] for times in timer.compare(*graphs))
    row: Row = {"name": case.name, "part": case.part, "op": case.op, "shape": case.shape}
    row |= {"dtype": str(case.dtype).removeprefix("torch."), **timing.beside(mine, theirs, case.peer, GOAL)}
    row |= {"calls": count, "moved_MB": moved / 1e6, "ours_GBs": moved / row["ours_ms"] / 1e6}
    floor = moved / ceilings["copy_TBs"] / 1e9
    row |= {"floor_ms": floor, "floor": "bytes", "share_of_floor": floor / row["ours_ms"]}
    row |= {"error": error, "error_limit": case.limit} | ({"how": pieces[0].how} if pieces[0].how else {})
    return {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()}


def _in_turn(pieces: list[Piece], how: str) -> None:
    for piece in pieces:
        piece.call(how)


def _agreement(case: Case) -> tuple[float, int]:
    """The largest relative difference of both ways from the same numbers, and the bytes that a call must move."""
    outcomes = []
    for how in ("cuda", case.peer):
        torch.manual_seed(0)
        (piece,) = _made(case, 1)
        outcomes.append([x.clone() for x in (piece.call(how), *piece.changes)])
    error = max(distance(a, b) for a, b in zip(*outcomes, strict=True))
    if not error <= case.limit:
        raise AssertionError(f"is not close to {case.peer}: relative error {error:.2e}, limit {case.limit:g}")
    held = [outcomes[0][0], *piece.reads, *(x for x in piece.changes for _ in "rw")]
    return error, sum(x.nbytes for x in held)

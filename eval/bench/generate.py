"""Generation by models of equal size at growing contexts: tokens a second of reading and of writing, and memory, through the same loop.

Beside a Mamba or a Mamba-2, where it is installed, stands mamba-ssm's own ``generate`` on the same weights, recorded as a CUDA graph. Both
write greedily. Reading is a prompt's forward; writing is counted per step once a step has been recorded, on both sides.

What guesses gain (prompt lookup) is measured on text that repeats its prompt, beside the same loop without them. Weights are such that it
does: the embedding outweighs all that blocks add, and the head gives each token its successor.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...zoo.models.build import build
from ...zoo.models.decoder import AHEAD, Decoder
from ...zoo.models.prefill import prefill
from ...zoo.models.sampling import Sampler
from ...zoo.models.speculate import PromptLookup, Speculator
from ...zoo.models.verify import Verifier
from ...zoo.sampling_options import SamplingOptions
from ..result_file import Row, Tick
from .ops import distance
from .train import mamba_ssm_model

__all__ = ["CASES", "PARTS", "measure", "parts_of"]

# of the forward's logits in bfloat16, |a - b| / |b|
LIMIT = 3e-2
_LENGTHS = (1024, 16384, 131072)


@dataclasses.dataclass(frozen=True)
class Case:
    """Models that are compared, and where.

    Attributes:
        part: The name that they are asked for by.
        models: Configs, of nearly as many parameters each.
        shapes: Rows and tokens of their prompts.
        new: Tokens that are written behind.
        device: Where it is worth measuring.
        goals: The ratios to reach beside mamba-ssm in writing, by model; beside no guesses, where the text repeats.
        repeats: Whether the text repeats its prompt, and guesses are looked up.
        state_dtype: In which our recurrent states are kept, where it is not float32.
        alone: Whether mamba-ssm is left out: it reads a prompt at once, and indexes it by 32 bits.
    """

    part: str
    models: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    new: int = 128
    device: str = "cuda"
    goals: dict[str, float] = dataclasses.field(default_factory=dict)
    repeats: bool = False
    state_dtype: torch.dtype | None = None
    alone: bool = False


_SMALL = ("mamba-130m", "mamba2-130m", "mambaformer-130m", "transformer-130m")
_LARGE = ("mamba-2.8b", "mamba2-2.7b", "mamba2attn-2.7b", "transformer-2.8b")
_TINY = ("mamba-tiny", "mamba2-tiny", "samba-tiny", "transformer-tiny")
CASES = [
    Case("130m", _SMALL, tuple((1, l) for l in _LENGTHS), goals={"mamba-130m": 2, "mamba2-130m": 2}),
    Case("130m:batch", _SMALL, ((64, 512),)),
    Case("130m:long", _SMALL[:2], ((1, 2**20),), 16, alone=True),
    Case("2.8b", _LARGE, tuple((1, l) for l in _LENGTHS), goals={"mamba-2.8b": 1.7, "mamba2-2.7b": 1.7}),
    Case("2.8b:batch", _LARGE, ((64, 512),), goals={"mamba-2.8b": 1.4, "mamba2-2.7b": 1.1}),
    Case("2.8b:half", ("mamba-2.8b", "mamba2-2.7b"), ((64, 512),), goals={"mamba2-2.7b": 1.5}, state_dtype=torch.bfloat16),
    Case("tiny", _TINY, ((1, 256), (1, 1024), (1, 4096)), 32, "cpu"),
    Case("130m:repeats", _SMALL, ((1, 1024), (8, 1024)), goals=dict.fromkeys(_SMALL, 1.6), repeats=True),
    Case("2.8b:repeats", _LARGE, ((1, 1024),), goals=dict.fromkeys(_LARGE, 1.6), repeats=True),
    Case("tiny:repeats", _TINY, ((1, 256),), 128, "cpu", dict.fromkeys(_TINY, 1.6), repeats=True),
]  # fmt: skip
PARTS = [case.part for case in CASES]


def parts_of(device: str) -> list[str]:
    """Return the parts that are worth measuring on a kind of device."""
    return [case.part for case in CASES if case.device == device]


def measure(parts: list[str], tick: Tick) -> tuple[list[Row], list[str]]:
    """Return a row per model and shape, and what failed; a shape that does not fit is named, and the others go on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    failed: list[str] = []
    for case, name in [(x, name) for x in CASES if x.part in parts for name in x.models]:
        torch.manual_seed(0)
        model = build(name, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32).eval()
        peer = error = None
        try:
            if not (case.repeats or case.alone):
                peer, error = _peer(model)
        except (ImportError, RuntimeError, ValueError) as e:
            failed.append(f"{name}, mamba-ssm: {e}")
        for b, l in case.shapes:
            tick(f"{name}, {b} x {l:,}")
            try:
                rows.append(_row(case, name, model, peer, error, (b, l)))
            except torch.cuda.OutOfMemoryError as e:
                failed.append(f"{name}, {b} x {l}: {str(e).splitlines()[0]}")
            gc.collect()
        del model, peer
    return rows, failed


def _row(case: Case, name: str, model: Any, peer: Any, error: float | None, shape: tuple[int, int]) -> Row:
    b, l = shape
    ids = torch.randint(0, model.cfg.vocab_size, (b, l), device=model.some_weight().device)
    if case.repeats:
        ids = _made_to_repeat(model, b, l)
    row: Row = {
        "name": name,
        "part": case.part,
        "op": f"generate, {b} x {l}",
        "shape": {"b": b, "l": l, "new": case.new},
    }
    row |= {"dtype": str(model.some_weight().dtype).removeprefix("torch."), "params": model.num_params()}
    row |= _ours(model, ids, case)
    if case.repeats:
        guessed = _guessed(model, ids, case.new)
        plain = row["write_tokens_s"]
        row |= guessed | {"op": f"generate, {b} x {l}, repeated", "peer": "no guesses", "peer_write_tokens_s": plain}
        row |= {"ratio": row["write_tokens_s"] / plain, "goal_ratio": case.goals.get(name)}
    if peer is not None:
        theirs = {f"peer_{key}": value for key, value in _theirs(peer, ids, case.new).items()}
        row |= {"peer": "mamba_ssm", "error": error, "goal_ratio": case.goals.get(name)} | theirs
        row |= {
            "ratio": row["write_tokens_s"] / row["peer_write_tokens_s"],
            "read_ratio": row["peer_read_ms"] / row["read_ms"],
        }
    return row


@torch.no_grad()
def _ours(model: Any, ids: Tensor, case: Case) -> dict[str, Any]:
    (b, l), new = ids.shape, case.new
    with _Memory(ids) as memory:
        read_ms = statistics.median(_ms(lambda: prefill(model, ids, None, None, new, None), ids) for _ in range(3))
        logits, state = prefill(model, ids, None, None, new + 3 * AHEAD, None)
        state = state.kept_in(case.state_dtype)
        sampler = Sampler(SamplingOptions(), b, model.cfg.vocab_size, ids.device)
        decoder = Decoder(model, state, sampler, [], 0, new + 3 * AHEAD, logprobs=False)
        decoder.put(torch.arange(b), logits, torch.zeros(b, 0, dtype=torch.float64), new + 3 * AHEAD)
        decoder.advance(AHEAD)  # records the step
        times = [_ms(lambda: decoder.advance(AHEAD), ids) / AHEAD for _ in range(max(1, new // AHEAD))]
    return _speeds(read_ms, times, b, l) | {
        "peak_GiB": memory.peak_gib,
        "state_MiB": state.nbytes / 2**20,
        "state_dtype": None if state.recurrent_dtype is None else str(state.recurrent_dtype).removeprefix("torch."),
        "how": decoder.how,
        "blocks": model.backbone.steps_taken(state),
    }


@torch.no_grad()
def _made_to_repeat(model: Any, b: int, l: int) -> Tensor:
    """Prompts that the model goes on to repeat, once its weights are changed."""
    period = min(3 * l // 4, model.cfg.vocab_size)
    cycle = torch.randperm(model.cfg.vocab_size)[:period].to(model.some_weight().device)
    table = model.backbone.embedding.weight
    table.mul_(100)
    head = torch.zeros_like(table)
    head[cycle] = table[cycle.roll(1)]
    model.lm_head.weight = torch.nn.Parameter(head)
    at = torch.arange(l, device=cycle.device) + 7 * torch.arange(b, device=cycle.device)[:, None]
    return cycle[at % period]


@torch.no_grad()
def _guessed(model: Any, ids: Tensor, new: int) -> dict[str, Any]:
    """The speed of writing with guesses."""
    drafter, warm = PromptLookup(), 4
    rounds = max(1, new // (drafter.most + 1))
    more = (warm + rounds) * (drafter.most + 1)
    logits, state = prefill(model, ids, None, None, more, None)
    verifier = Verifier(model, state, 2 * drafter.most)
    speculator = Speculator(verifier, logits, ids.tolist(), drafter, [], 0, more)
    for _ in range(warm):  # records the forward
        before = speculator.advance().counts.sum()
    times = [_ms(lambda: speculator.advance(), ids) for _ in range(rounds)]
    tokens = int(sum(map(len, speculator.texts)) - ids.numel() - before)
    return {"write_ms": statistics.median(times), "write_tokens_s": 1000 * tokens / sum(times), "how": speculator.how}


def _speeds(read_ms: float, step_ms: list[float], b: int, l: int) -> dict[str, Any]:
    middle = statistics.median(step_ms)
    quarters = statistics.quantiles(step_ms, n=4) if len(step_ms) > 1 else [middle] * 3
    return {
        "read_ms": read_ms, "read_tokens_s": 1000 * b * l / read_ms, "write_ms": middle, "write_iqr_ms": quarters[2] - quarters[0],
        "write_tokens_s": 1000 * b / middle,
    }  # fmt: skip


def _peer(model: Any) -> tuple[Any, float | None]:
    """mamba-ssm's model with the weights of ours, and how far its logits are from ours; ``None`` where it has no such model, or no GPU."""
    mixers = set(model.cfg.layers.replace("(", " ").replace(")", " ").split()) - {"*"}
    has_it = model.some_weight().is_cuda and {x for x in mixers if not x.isdigit()} <= {"mamba", "mamba2"}
    if not (has_it and find_spec("mamba_ssm")):
        return None, None
    theirs = mamba_ssm_model(model.cfg, "cuda").to(torch.bfloat16).eval()
    theirs.load_state_dict(model.state_dict())
    ids = torch.randint(0, model.cfg.vocab_size, (2, 64), device="cuda")
    with torch.no_grad():
        error = distance(theirs(ids).logits.float(), model(ids).logits.float())
    if not error < LIMIT:
        raise ValueError(f"bench generate: mamba-ssm's logits differ from ours by {error:.1e}, more than {LIMIT:g}.")
    return theirs, error


def _theirs(peer: Any, ids: Tensor, new: int) -> dict[str, Any]:
    def write(count: int) -> Callable[[], object]:
        return lambda: peer.generate(ids, max_length=ids.shape[1] + count, cg=True, top_k=1)

    with _Memory(ids) as memory:
        write(new + 1)()  # records the step
        pairs = [(_ms(write(1), ids), _ms(write(new + 1), ids)) for _ in range(3)]
    steps = [(long - short) / new for short, long in pairs]
    return _speeds(statistics.median(short for short, _ in pairs), steps, *ids.shape) | {"peak_GiB": memory.peak_gib}


def _ms(call: Callable[[], object], ids: Tensor) -> float:
    synchronise = torch.cuda.synchronize if ids.is_cuda else lambda: None
    synchronise()
    begin = time.perf_counter()
    call()
    synchronise()
    return 1000 * (time.perf_counter() - begin)


class _Memory:
    """The most that is allocated on the device while it is entered, beyond what was before; ``None`` on a CPU."""

    def __init__(self, ids: Tensor):
        self.on_gpu = ids.is_cuda
        self.peak_gib: float | None = None

    def __enter__(self) -> "_Memory":
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: object) -> None:
        if self.on_gpu:
            self.peak_gib = (torch.cuda.max_memory_allocated() - self.before) / 2**30

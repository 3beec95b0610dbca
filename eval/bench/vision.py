"""Image models beside the published structure and timm's models: images per second and memory, all sides in one process and in turns.

``published`` is VMamba as its authors wrote it on mamba-ssm's scan (:mod:`.vision_peers`), with our weights; logits are compared before
anything is timed. Memory is a side's own: weights, what its optimiser keeps, and the most that a call needs besides. A batch that does not
fit is halved for all sides, and the row says so.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import dispatch
from ...zoo.models.build import build
from ..result_file import Row, Tick
from . import timing
from .ops import compare, distance
from .train import print_kernels
from .vision_bytes import scan_bytes
from .vision_peers import library_parts, plain_parts, published, timm_model
from .workloads import WORKLOADS

__all__ = ["CASES", "PARTS", "PASSES", "Case", "measure", "parts_of"]

FORWARD = ("forward", "forward, graph")
TRAINING = ("training", "training, graph", "training step", "training step, graph")
# in words, for whoever reads a table
PASSES = {
    "forward": "inference",
    "forward, graph": "inference recorded as a CUDA graph",
    "training": "forward and backward",
    "training, graph": "forward and backward recorded as a CUDA graph",
    "training step": "forward, backward and fused AdamW",
    "training step, graph": "the same, forward and backward recorded",
}
PUBLISHED = ("published",)
TIMM = ("swin_tiny_patch4_window7_224", "mambaout_tiny")
# of the logits in float32, |a - b| / |b|
LIMIT = 1e-3
GOAL_MEMORY = 0.6


@dataclasses.dataclass(frozen=True)
class Case:
    """A model beside others, on images of one size.

    Attributes:
        part: The name that it is asked for by.
        model: Ours.
        peers: ``"published"``, or names of timm's.
        passes: The calls that are timed, of :data:`PASSES`.
        size: Images, height and width.
        goals: The ratios to reach beside ``"published"``: of a forward, and of training.
        device: Where it is worth measuring.
    """

    part: str
    model: str
    peers: tuple[str, ...]
    passes: tuple[str, ...]
    size: tuple[int, int, int] = (128, 224, 224)
    goals: tuple[float | None, float | None] = (None, None)
    device: str = "cuda"


def _cases(model: str, goals: tuple[float | None, float | None], is_vmamba: bool = True) -> Iterator[Case]:
    if is_vmamba:
        yield Case(model, model, PUBLISHED, TRAINING, goals=goals)
        yield Case(f"{model}:forward", model, PUBLISHED, FORWARD, goals=goals)
        yield from (Case(f"{model}:large", model, PUBLISHED, FORWARD[:1], (b, 800, 1333)) for b in (1, 2))
    yield Case(f"{model}:timm", model, TIMM, FORWARD + TRAINING[:2])
    yield Case(f"{model}:latency", model, (*PUBLISHED, *TIMM) if is_vmamba else TIMM, FORWARD, (1, 224, 224))


CASES = [
    *_cases("vmamba-tiny-s1l8", (1.3, 1.8)),
    *_cases("vanilla-vmamba-tiny", (None, 3.0)),
    *_cases("hybrid-vision-tiny", (None, None), False),
    *_cases("vim-tiny", (None, None), False),
    Case(
        "vmamba-micro", "vmamba-micro", PUBLISHED, ("forward", "training", "training step"), (8, 16, 16), device="cpu"
    ),
]
WALKS = ("vmamba-14x14-n1", "vmamba-7x7-n1")
COUNTED = ("vmamba-tiny-s1l8", "vanilla-vmamba-tiny")
PARTS = [*dict.fromkeys(case.part for case in CASES), "walks", "bytes"]


def parts_of(device: str) -> list[str]:
    """The parts that can be measured on a device."""
    return [
        *dict.fromkeys(case.part for case in CASES if case.device == device),
        *["walks"] * (device == "cuda"),
        "bytes",
    ]


def measure(
    parts: list[str], tick: Tick, ceilings: dict[str, float], profile: bool = False, timer: timing.Timer | None = None
) -> tuple[list[Row], list[str]]:
    """Rows of these parts, as far as they are for this device, and what failed; with ``profile``, kernels are printed instead.

    Raises:
        ValueError: None of the parts is for this device.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [case for case in CASES if case.part in parts and case.device == device]
    walks = [w for w in WORKLOADS["scan"] if w.name in WALKS and "walks" in parts and w.device == device]
    if not cases and not walks and "bytes" not in parts:
        known = ", ".join(parts_of(device))
        raise ValueError(f"bench vision: {', '.join(parts)}: nothing to measure on a {device}. Its parts: {known}.")
    rows, failed = [], []
    if "bytes" in parts and not profile:
        tick("bytes")
        rows += [scan_bytes(name, 128, 224, 224) for name in COUNTED]
    # a call is a whole model's: fewer of them than of an op
    timer = timer or (timing.EventTimer(600, 4, 50) if device == "cuda" else timing.HostTimer(3))
    jobs: list[tuple[str, Callable[[], list[Row]]]] = []
    jobs += [(case.part, lambda case=case: _beside(case, timer, tick, profile)) for case in cases]  # type: ignore[misc]
    jobs += [(w.name, lambda w=w: _walked(w, timer, ceilings)) for w in walks if not profile]  # type: ignore[misc]
    for name, job in jobs:
        tick(name)
        try:
            with _alone(), _fast_convolutions():
                rows += job()
        except (AssertionError, RuntimeError, ImportError, ValueError) as e:
            failed.append(f"{name}: {type(e).__name__}: {e}")
        _free()
    return rows, failed


def _walked(workload: Any, timer: timing.Timer, ceilings: dict[str, float]) -> list[Row]:
    return [row | {"part": "walks"} for row in compare(workload, "mamba_ssm", timer, ceilings)]


def _beside(case: Case, timer: timing.Timer, tick: Tick, profile: bool) -> list[Row]:
    full: list[int] = []
    b = case.size[0]
    while True:
        try:
            return _rows(case, b, full, timer, tick, profile)
        except torch.OutOfMemoryError:
            if b == 1:
                raise
        # here, where nothing holds the frames of what failed
        full.append(b)
        b //= 2
        _free()


def _rows(case: Case, b: int, full: list[int], timer: timing.Timer, tick: Tick, profile: bool) -> list[Row]:
    sides, error = _sides(case, b)
    rows: list[Row] = []
    for what in case.passes:
        tick(f"{case.part}, {what}")
        if profile:
            for side in sides.values():
                print_kernels(side.call(what), f"{side.name}, {what}, {b} images")
            continue
        made = {name: side.prepared(what) for name, side in sides.items()}
        times = timer.compare(*(call for call, _ in made.values()))
        memory = {name: peak for name, (_, peak) in made.items()}
        for i, peer in enumerate(case.peers, 1):
            row = _row(case, b, what, peer, (times[0], times[i]), (memory["ours"], memory[peer]))
            rows.append(row | ({"oom": full} if full else {}) | (error if peer in PUBLISHED else {}))
        del made
    return rows


def _row(
    case: Case,
    b: int,
    what: str,
    peer: str,
    times: tuple[list[float], list[float]],
    memory: tuple[float | None, float | None],
) -> Row:
    asked, h, w = case.size
    judged = peer in PUBLISHED
    found = timing.beside(*times, peer, case.goals[what not in FORWARD] if judged else None)
    row: Row = {
        "name": case.model,
        "part": case.part,
        "op": f"{what}, {asked} x {h} x {w}",
        "pass": what,
        "shape": {"b": b, "h": h, "w": w},
        "dtype": "bfloat16 autocast" if case.device == "cuda" else "float32",
        **{key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()},
        **{f"{side}_images_s": round(1000 * b / found[f"{side}_ms"], 1) for side in ("ours", "peer")},
    }
    mine, theirs = memory
    if mine is not None and theirs is not None:
        row |= {"ours_GiB": round(mine, 3), "peer_GiB": round(theirs, 3), "memory_ratio": round(mine / theirs, 3)}
        if found["goal_ratio"] and what not in FORWARD:
            row |= {"goal_memory_ratio": GOAL_MEMORY, "memory_met": mine <= GOAL_MEMORY * theirs}
    return row


def _sides(case: Case, b: int) -> tuple[dict[str, "Side"], Row]:
    """Ours and the peers, and how far the published logits are from ours, which must not be far."""
    torch.manual_seed(0)
    model = build(case.model, device=case.device)
    images = torch.randn(b, model.cfg.in_channels, *case.size[1:], device=case.device)
    labels = torch.randint(model.cfg.n_classes, (b,), device=case.device)
    last = images.contiguous(memory_format=torch.channels_last)
    sides, error = {"ours": Side("ours", model, last, labels)}, {}
    for peer in case.peers:
        if peer in PUBLISHED:
            parts = library_parts() if case.device == "cuda" else plain_parts()
            net = published(model, parts)
            off = difference(model, net, images[:8])
            if not off <= LIMIT:
                raise AssertionError(f"{peer}: logits differ by {off:.1e} from ours, limit {LIMIT:.0e}")
            error = {"error": float(f"{off:.2g}"), "error_limit": LIMIT, "copies": parts.about}
            sides[peer] = Side(peer, net, images, labels)
        else:
            theirs: Any = timm_model(peer).to(case.device)
            sides[peer] = Side(peer, theirs.to(memory_format=torch.channels_last), last, labels)
    return sides, error


@torch.no_grad()
def difference(model: nn.Module, net: nn.Module, images: Tensor) -> float:
    """``|a - b| / |b|`` of two models' logits in float32, evaluated."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return distance(model.eval()(images).logits, net.eval()(images))
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Side:
    """A model with images and labels, whose passes can be called again and again."""

    def __init__(self, name: str, model: nn.Module, images: Tensor, labels: Tensor):
        self.name, self.model, self.images, self.labels = name, model, images, labels
        self._optimizer: Any = None

    def _logits(self) -> Tensor:
        # in float32 on a CPU, where bfloat16 says nothing of either side
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.images.is_cuda):
            out: Any = self.model(self.images)
        return getattr(out, "logits", out)

    def _forward(self) -> None:
        with torch.no_grad():
            self._logits()

    def _differentiate(self) -> None:
        self.model.zero_grad(set_to_none=True)
        F.cross_entropy(self._logits().float(), self.labels).backward()

    def call(self, what: str) -> timing.Call:
        """One pass, of :data:`PASSES`."""
        self.model.train(what not in FORWARD)
        call: timing.Call = self._forward if what in FORWARD else self._differentiate
        optimizer = self._stepping() if "step" in what else None
        if "graph" in what:
            call = timing.captured(call)
        if optimizer is None:
            return call

        def step() -> None:
            call()
            optimizer.step()

        return step

    def _stepping(self) -> Any:
        if self._optimizer is None:
            # a rate that leaves the weights about where they are: passes are timed in turns
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
            self._differentiate()
            self._optimizer.step()
        return self._optimizer

    def prepared(self, what: str) -> tuple[timing.Call, float | None]:
        """A pass that has been called before, and the GiB that this side needs for it, weights included; ``None`` on a CPU."""
        if not self.images.is_cuda:
            return self.call(what), None
        call = None
        if "graph" not in what:
            call = self.call(what)
            call()
        elif "step" in what:
            self._stepping()
        self.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        # a graph takes its memory when it is recorded
        call = call or self.call(what)
        call()
        torch.cuda.synchronize()
        kept = sum(x.nbytes for x in (*self.model.parameters(), *self.model.buffers()))
        if self._optimizer is not None and "step" in what:
            kept += sum(x.nbytes for s in self._optimizer.state.values() for x in s.values() if isinstance(x, Tensor))
        return call, (torch.cuda.max_memory_allocated() - before + kept) / 2**30


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let what runs on our side be ours, also where the peers' libraries are installed."""
    before = dict(dispatch.installed)
    dispatch.installed.update(dict.fromkeys(before, False))
    try:
        yield
    finally:
        dispatch.installed.update(before)


@contextlib.contextmanager
def _fast_convolutions() -> Iterator[None]:
    """Let cuDNN try its algorithms at the first call of a shape, as the authors' training does."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

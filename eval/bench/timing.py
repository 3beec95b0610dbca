"""Timers of calls, and the ceilings of a device: its best at copying and at exponentials."""

import statistics
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...kernels.gpu import nvrtc

Call = Callable[[], object]


class HostTimer:
    """Times calls by the wall clock, in turns, so that what disturbs the machine disturbs every one; they return when they are done.

    All are timed ``repeats`` times, but once, without a warm-up, what takes longer than ``slow_seconds`` and is not the first.
    """

    def __init__(self, repeats: int = 7, slow_seconds: float = 20.0):
        self.repeats, self.slow_ms = repeats, 1000 * slow_seconds

    def compare(self, *calls: Call) -> list[list[float]]:
        """Milliseconds of every repetition of every call; the first call is ours, and is always repeated."""
        firsts = [wall_ms(call) for call in calls]
        times = [[first] if i and first > self.slow_ms else [] for i, first in enumerate(firsts)]
        again = [(call, kept) for call, kept in zip(calls, times, strict=True) if not kept]
        for _ in range(self.repeats):
            for call, kept in again:
                kept.append(wall_ms(call))
        return times

    def host(self, call: Call) -> float:
        """Median milliseconds that a call keeps its caller."""
        return statistics.median(wall_ms(call) for _ in range(3))


class EventTimer:
    """Times calls in turns by events on the GPU, the L2 cache overwritten before every call.

    Overwriting takes about 0.1 ms, a head start for the host: what a call costs it shows only where it is more than that. A call is
    repeated for about ``budget_ms``, from ``least`` to ``most`` times.
    """

    def __init__(self, budget_ms: float = 200.0, least: int = 10, most: int = 100):
        self.budget_ms, self.least, self.most = budget_ms, least, most
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")

    def compare(self, *calls: Call) -> list[list[float]]:
        """Milliseconds of every repetition of every call."""
        for call in calls:
            call()
        guesses = [statistics.median(ms) for ms in self._turns(calls, 3)]
        repeats = [min(self.most, max(self.least, int(self.budget_ms / max(guess, 1e-3)))) for guess in guesses]
        self._turns(calls, max(2, min(repeats) // 4))
        return self._turns(calls, min(repeats))

    def _turns(self, calls: Sequence[Call], repeats: int) -> list[list[float]]:
        torch.cuda.synchronize()
        marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
        for _ in range(repeats):
            for call, kept in zip(calls, marks, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush.zero_()
                start.record()
                call()
                end.record()
                kept.append((start, end))
        torch.cuda.synchronize()
        return [[start.elapsed_time(end) for start, end in kept] for kept in marks]

    def host(self, call: Call) -> float:
        """Median milliseconds that a call keeps its caller; the work itself is not waited for."""
        times = []
        for _ in range(10):
            torch.cuda.synchronize()
            times.append(wall_ms(call))
        torch.cuda.synchronize()
        return statistics.median(times)


Timer = HostTimer | EventTimer


def wall_ms(call: Call) -> float:
    """Milliseconds until a call returns."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def iqr(times: Sequence[float]) -> float:
    """The distance between the quartiles, 0 for a single time."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return high - low


def beside(mine: Sequence[float], theirs: Sequence[float], peer: str, goal: float | None) -> dict[str, Any]:
    """Compare the times of two sides, in ms, as a row of a result does: medians, spreads, their ratio, and the goal for it."""
    ours, other = statistics.median(mine), statistics.median(theirs)
    return {
        "ours_ms": ours, "ours_iqr_ms": iqr(mine), "ours_repeats": len(mine), "peer": peer, "peer_ms": other, "peer_iqr_ms": iqr(theirs),
        "peer_repeats": len(theirs), "ratio": other / ours, "goal_ratio": goal, "met": None if goal is None else other / ours >= goal,
    }  # fmt: skip


def captured(call: Call) -> Call:
    """A call that replays ``call`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ceilings(device: str) -> dict[str, float]:
    """Measure a device at its best: TB/s read and written by a copy, and 10^9 exponentials per second."""
    if device != "cuda":
        return _host_ceilings()
    timer = EventTimer()
    big = torch.rand(1 << 29, device=device, dtype=torch.float32)
    into = torch.empty_like(big)
    blocks, threads, rounds = 8 * torch.cuda.get_device_properties(0).multi_processor_count, 256, 4096
    out = torch.empty(blocks * threads, device=device)
    params = struct.pack("Qi4x", out.data_ptr(), rounds)

    def exponentials() -> None:
        nvrtc.launch("probe.cu", "probe_exponentials", params, blocks, threads, 0, out.device)

    copy, exp = (min(times) for times in timer.compare(lambda: into.copy_(big), exponentials))
    if not bool(((out > 5.0) & (out < 5.3)).all()):  # eight times the fixed point of 2^-x, 0.6412
        raise RuntimeError("bench: the kernel that measures exponentials did not compute them.")
    sfu = round(8.0 * rounds * blocks * threads / exp / 1e6, 1)
    return {"copy_TBs": round(2 * big.nbytes / copy / 1e9, 4), "sfu_Gexps": sfu}


def _host_ceilings() -> dict[str, float]:
    big, small = torch.rand(1 << 26), torch.rand(1 << 17)
    into, out = torch.empty_like(big), torch.empty_like(small)
    rounds = 200

    def exps() -> None:
        for _ in range(rounds):
            torch.exp(small, out=out)

    copy, exp = (min(wall_ms(call) for _ in range(7)) for call in (lambda: into.copy_(big), exps))
    return {"copy_TBs": round(2 * big.nbytes / copy / 1e9, 4), "exp_Gs": round(rounds * small.numel() / exp / 1e6, 3)}

"""Ops beside their peers: both are compared before anything is timed, and every pass becomes a row."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import BackendError
from ..result_file import Row, Tick
from . import timing
from .peers import PEERS, Timed, ours
from .workloads import WORKLOADS, Workload, counts, floor_ms

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# how far outputs and gradients may be from the peer's, |a - b| / |b|
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# of the cost per token, between the lengths of the part "length"
LINEAR_WITHIN = 1.1


def measure(
    what: str, vs: list[str], parts: list[str], timer: timing.Timer, ceilings: dict[str, float], tick: Tick
) -> tuple[list[Row], list[str]]:
    """Rows of every workload of the parts that this device is for, against every peer; and what failed, which the rest survives."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    failed: list[str] = []
    for workload in WORKLOADS[what]:
        if workload.device != device or workload.part not in parts:
            continue
        # who calls for mamba_ssm gets the library that it convolves with
        for name in PEERS["conv"] if workload.op == "conv" else [name for name in vs if name in PEERS[workload.op]]:
            tick(f"{workload.name}, {name}")
            try:
                rows += compare(workload, name, timer, ceilings)
            except BackendError:
                continue  # a backend of ours that has no such call
            except (AssertionError, RuntimeError) as e:
                failed.append(f"{workload.name}, {name}: {type(e).__name__}: {e}")
            if device == "cuda":
                torch.cuda.empty_cache()
    _judge_lengths(rows)
    if what == "scan" and device == "cpu":
        tick("memory")
        rows += _memory()
    return rows, failed


def compare(workload: Workload, name: str, timer: timing.Timer, ceilings: dict[str, float]) -> list[Row]:
    """Check that both sides compute the same, then time every pass of a workload."""
    inputs = workload.inputs()
    mine = ours(workload.op, inputs)
    try:
        theirs = PEERS[workload.op][name](inputs)
    except ImportError as e:
        raise ValueError(
            f"bench: the peer {name!r} needs a library that is not here ({e}). Install it, or leave it out."
        ) from e
    if workload.op == "attention" and mine.backend == theirs.backend:
        return []
    on_gpu = workload.device == "cuda"
    trains = on_gpu and workload.op != "decode"
    # on a CPU some peers need minutes for a backward, and the tests compare gradients there
    errors = agreement(mine, theirs, gradients=trains)
    limit = TOLERANCE[workload.dtype]
    for what, error in errors.items():
        if not error <= limit:
            raise AssertionError(f"{what} is not close: relative error {error:.2e}, limit {limit:.0e}")
    sides, rows = {"ours": mine, "peer": theirs}, []
    saved = {f"{side}_saved_MB": timed.saved_bytes() / 1e6 for side, timed in sides.items() if trains}
    for what in workload.passes:
        calls = {side: _call(timed, what) for side, timed in sides.items()}
        row = _row(workload, what, name, timer.compare(*calls.values()), ceilings)
        row |= {f"{side}_host_ms": timer.host(call) for side, call in calls.items() if on_gpu}
        row |= {"backend": mine.backend, "error": max(errors.values()), "error_limit": limit}
        row |= saved if what == "forward+backward" else {}
        rows.append({key: _rounded(value) for key, value in row.items()})
    return rows


def _call(side: Timed, what: str) -> timing.Call:
    if what == "step in a CUDA graph":
        return timing.captured(side.forward)
    return side.train if what == "forward+backward" else side.forward


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _row(workload: Workload, what: str, name: str, times: list[list[float]], ceilings: dict[str, float]) -> Row:
    tokens = workload.shape["b"] * workload.shape.get("l", 1)
    row: Row = {
        "name": workload.name,
        "part": workload.part,
        "op": what if workload.op in ("scan", "ssd", "attention") else f"{workload.op} {what}",
        "shape": workload.shape,
        "dtype": str(workload.dtype).removeprefix("torch."),
        **timing.beside(times[0], times[1], name, workload.goals.get((name, what))),
    }
    if workload.op in ("ssd", "attention"):
        return row  # matrix products: another floor, not measured yet
    (floor, bound), mine = floor_ms(workload, what, ceilings), row["ours_ms"]
    return row | {
        "ours_GBs": counts(workload, what)[0] / mine / 1e6,
        "floor_ms": floor,
        "floor": bound,
        "share_of_floor": floor / mine,
        "ours_ns_per_token": 1e6 * mine / tokens,
    }


def agreement(mine: Timed, theirs: Timed, gradients: bool) -> dict[str, float]:
    """The relative difference of the outputs, of what is updated in place, and, if wanted, of every gradient."""
    found = {"output": distance(mine.result(), theirs.result())}
    if mine.state is not None and theirs.state is not None:
        found["state"] = distance(mine.state, theirs.state)
    if gradients:
        a, b = mine.gradients(), theirs.gradients()
        found |= {f"gradient of {name}": distance(a[name], b[name].reshape(a[name].shape)) for name in a}
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|``, in float32 and in slices, since a whole copy may not fit; NaN if either has one."""
    step = max(1, (1 << 26) * a.shape[1] // max(1, a.numel())) if a.dim() > 1 else 1
    off = total = 0.0
    for x, y in zip(a.split(step, 1), b.split(step, 1), strict=True) if a.dim() > 1 else [(a, b)]:
        x, y = x.detach().float(), y.detach().float()
        off += (x - y).square().sum(dtype=torch.float64).item()
        total += y.square().sum(dtype=torch.float64).item()
    return (off / max(total, 1e-60)) ** 0.5


def _judge_lengths(rows: list[Row]) -> None:
    """Add to the rows of the part "length" what a token costs relative to the longest."""
    for what in ("forward", "forward+backward"):
        same = [row for row in rows if row.get("part") == "length" and row["op"] == what]
        for row in same:
            row["cost_to_longest"] = _rounded(row["ours_ns_per_token"] / same[-1]["ours_ns_per_token"])
            row["linear"] = row["cost_to_longest"] <= LINEAR_WITHIN


_MEMORY = """
import sys
from pathlib import Path
import torch
from hybridzoo.kernels import selective_scan
def megabytes(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
def train(l, d=512, n=16):
    u, dt = (torch.randn(1, l, d, requires_grad=True) for _ in range(2))
    B, C = (torch.randn(1, l, 1, n, requires_grad=True) for _ in range(2))
    selective_scan(u, dt, -torch.ones(d, n), B, C, dt_softplus=True).sum().backward()
train(32)
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = megabytes("VmRSS")
train(int(sys.argv[1]))
print(megabytes("VmHWM") - before)
"""


def _memory() -> list[Row]:
    """Peak resident memory that forward + backward add, inputs included, to a warm process; a process per length."""
    rows: list[Row] = []
    for l in LENGTHS if Path("/proc/self/clear_refs").exists() else ():
        command = [sys.executable, "-c", _MEMORY, str(l)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        row: Row = {"name": f"memory-l{l}", "op": "forward+backward", "shape": {"b": 1, "l": l, "d": 512, "n": 16}}
        rows.append(row | {"dtype": "float32", "ours_MB": round(float(done.stdout), 1)})
    return rows

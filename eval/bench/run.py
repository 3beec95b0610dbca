"""Benchmarks against what one would use instead, on one device: what is run, and the result as data.

A result is the dict of DESIGN section 9: ``ratio`` is the peer's median time over ours, and both are measured in turns, so that what
disturbs the machine disturbs both. Peers are other people's code, called as they publish it and in the layout they want; before
anything is timed, outputs and gradients are compared with ours.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from ...zoo.checkpoint.files import write_whole
from . import ops as bench_ops
from . import timing
from . import train as bench_train
from .peers import PEERS, default_peers, version
from .show import show
from .workloads import WORKLOADS

Result = dict[str, Any]
BENCHES = (*WORKLOADS, "train")


def run_bench(
    what: str,
    vs: list[str] | None = None,
    out: Path | None = None,
    parts: list[str] | None = None,
    profile: bool = False,
) -> Result:
    """Run a benchmark, print it as a table, and write it where asked.

    Args:
        what: ``"scan"``, ``"ssd"`` or ``"train"``.
        vs: Peers by name; those that make sense on the device if absent.
        out: A JSON file to write, whole or not at all. Cases that it holds already, of the same commit and device, stay.
        parts: What to measure of it; for a scan by default the table of shapes, for training all.
        profile: Print the kernels of a training step instead of timing it.

    Returns:
        The result in the schema of DESIGN section 9.

    Raises:
        ValueError: An unknown benchmark, part or peer, a peer whose library is missing; or cases that failed, after the others have
            been measured, shown and written.
    """
    if what not in BENCHES:
        raise ValueError(f"bench: unknown benchmark {what!r}. Known: {', '.join(BENCHES)}, parity, plot, readme.")
    vs = vs or (default_peers(what) if what in PEERS else ["mamba_ssm"])
    known = bench_train.PEERS if what == "train" else list(PEERS[what])
    for name in vs:
        if name not in known:
            raise ValueError(f"bench: unknown peer {name!r} of {what}. Known: {', '.join(known)}.")
    chosen = _parts(what, parts)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log has room for every column
    # no end in sight: steps differ a thousandfold in time
    with Progress(
        *Progress.get_default_columns()[:2],
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None)
        result = bench(what, vs, chosen, lambda text: bar.update(task, description=text), profile)
    result["command"] += "".join(f" --part {part}" for part in parts or [])
    show(result, console)
    if out is not None and not profile:
        before = _same_run(Path(out), result)
        write(result if before is None else merged(before, result), Path(out))
    if result.get("failed"):
        raise ValueError("bench: failed, and left out:\n" + "\n".join(result["failed"]))
    return result


def _parts(what: str, parts: list[str] | None) -> list[str]:
    known = list(bench_train.PARTS) if what == "train" else list(dict.fromkeys(work.part for work in WORKLOADS[what]))
    for part in parts or []:
        if part not in (*known, "all"):
            raise ValueError(f"bench: unknown part {part!r} of {what}. Known: {', '.join(known)}, all.")
    if parts is None:
        return known if what == "train" else ["table"]
    return known if "all" in parts else parts


def bench(
    what: str,
    vs: list[str],
    parts: list[str] | None = None,
    tick: Callable[[str], None] = lambda text: None,
    profile: bool = False,
    timer: timing.Timer | None = None,
) -> Result:
    """Measure without printing; see :func:`run_bench`.

    Args:
        what: A key of ``BENCHES``.
        vs: Names from ``PEERS``.
        parts: As for :func:`run_bench`.
        tick: Told what is measured next.
        profile: As for :func:`run_bench`.
        timer: Another way to take the time.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ceilings: dict[str, float] = {}
    if what == "train":
        rows, failed = bench_train.measure(vs, parts or list(bench_train.PARTS), tick, profile)
    else:
        tick("ceilings")
        ceilings = timing.ceilings(device)
        timer = timer or timing.timer_for(device)
        rows, failed = bench_ops.measure(what, vs, parts or ["table"], timer, ceilings, tick)
    named = {row["peer"].split(",")[0] for row in rows if row.get("peer")}
    command = f"zoo bench {what} " + " ".join(f"--vs {name}" for name in vs)
    result = header(what, command, device, [*vs, *sorted(named)]) | {"ceilings": ceilings, "cases": rows}
    return result | {"failed": failed} if failed else result


def header(what: str, command: str, device: str, libraries: list[str]) -> Result:
    """What a result says of its run: what was run and when, on which commit, on which device of this type, with which libraries."""
    return {
        "what": what,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: version(name) for name in dict.fromkeys(libraries)},
    }


def merged(before: Result, after: Result) -> Result:
    """Both results in one, a case that is in both as it was measured last; what was run is kept under ``runs``."""
    fresh = {_identity(row): row for row in after["cases"]}
    cases = [fresh.pop(_identity(row), row) for row in before["cases"]]
    cases += fresh.values()
    runs = [{key: r[key] for key in ("command", "date", "ceilings")} for r in (before, after)]
    return after | {
        "versions": before["versions"] | after["versions"],
        "cases": cases,
        "runs": [*before.get("runs", runs[:1]), runs[1]],
    }


def _identity(row: dict[str, Any]) -> tuple:
    return tuple(row.get(key) for key in ("name", "op", "dtype", "peer"))


def _same_run(path: Path, result: Result) -> Result | None:
    """What the file holds, if it is of the same benchmark, commit and device."""
    if not path.exists():
        return None
    try:
        before = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: is not JSON ({e}). Move it away, or give another --out.") from e
    return before if all(before.get(key) == result[key] for key in ("what", "commit", "device")) else None


def write(result: Result, path: Path) -> None:
    """Write a result as JSON, whole or not at all."""
    write_whole(path, json.dumps(result, indent=1) + "\n")


def _commit() -> str:
    # a copy of the tree without its history is told
    told = os.environ.get("HYBRIDZOO_COMMIT")
    if told:
        return told
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"], capture_output=True, text=True, cwd=root
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""Benchmarks against what one would use instead, on one device: what is run, and where its result goes.

Both sides are measured in turns, so that what disturbs the machine disturbs both. Peers are other people's code, called as they
publish it and in the layout they want; before anything is timed, outputs and gradients are compared with ours.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from ..result_file import Result, header, merged, read_result, same_run, write
from . import generate as bench_generate
from . import ops as bench_ops
from . import step as bench_step
from . import timing
from . import train as bench_train
from . import trainer as bench_trainer
from . import vision as bench_vision
from .peers import PEERS, default_peers
from .show import show
from .workloads import WORKLOADS

BENCHES = (*WORKLOADS, "train", "trainer", "vision", "generate", "step")
_TRAINED = {
    "train": bench_train.PARTS,
    "trainer": bench_trainer.PARTS,
    "vision": bench_vision.PARTS,
    "generate": bench_generate.PARTS,
    "step": bench_step.PARTS,
}
_LIBRARIES = {
    "trainer": ["transformers", "mamba_ssm"],
    "vision": ["mamba_ssm", "triton", "timm"],
    "generate": ["mamba_ssm"],
    "step": [],  # its peers are ours, or torch's
}
# the parts that a kind of device is asked for by itself
_BY_DEVICE = {"vision": bench_vision.parts_of, "generate": bench_generate.parts_of, "step": bench_step.parts_of}
# of benchmarks whose peers are parts: one of them
_PEER_PARTS = {"trainer": "mamba-130m:mamba_ssm", "vision": "vmamba-tiny-s1l8:timm"}


def run_bench(
    what: str,
    vs: list[str] | None = None,
    out: Path | None = None,
    parts: list[str] | None = None,
    profile: bool = False,
) -> Result:
    """Run what ``zoo bench`` is asked for, print it as a table, and write it where asked.

    Cases that ``out`` holds already, of the same device and versions, stay.

    Raises:
        ValueError: An unknown benchmark, part or peer, a peer whose library is missing; or cases that failed, after the others have
            been measured, shown and written.
    """
    if what not in BENCHES:
        raise ValueError(
            f"bench: unknown benchmark {what!r}. Known: {', '.join(BENCHES)}, data, fields, parity, plot, readme, tutorial."
        )
    if what in _PEER_PARTS and vs:
        raise ValueError(
            f"bench {what}: its peers are parts, so --vs {vs[0]} says nothing. Use --part {_PEER_PARTS[what]}."
        )
    known = bench_train.PEERS if what == "train" else list(PEERS.get(what, ()))
    vs = vs or (default_peers(what) if what in PEERS else known)
    for name in vs:
        if name not in known:
            names = ", ".join(known) or "none, its peers are given; leave out --vs"
            raise ValueError(f"bench: unknown peer {name!r} of {what}. Known: {names}.")
    chosen = _parts(what, parts)
    if out is not None and not profile:
        read_result(Path(out))  # what cannot be joined is said before minutes are spent
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log has room for every column
    # no end in sight: steps differ a thousandfold in time
    columns = (*Progress.get_default_columns()[:2], TimeElapsedColumn())
    results, failed = [], []
    # parts take half a minute each: one that ends is kept, whatever becomes of the next
    for group in [[part] for part in chosen] if what in _BY_DEVICE else [chosen]:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(what, total=None)
            result = bench(what, vs, group, lambda text: bar.update(task, description=text), profile)  # noqa: B023
        result["command"] += "".join(f" --part {part}" for part in (group if what in _BY_DEVICE else parts or []))
        show(result, console)
        if out is not None and not profile:
            before = same_run(Path(out), result)
            write(result if before is None else merged(before, result), Path(out))
        failed += result.get("failed", [])
        results.append(result)
    if failed:
        raise ValueError("bench: failed, and left out:\n" + "\n".join(failed))
    return functools.reduce(merged, results)


def _parts(what: str, parts: list[str] | None) -> list[str]:
    known = list(_TRAINED[what] if what in _TRAINED else dict.fromkeys(work.part for work in WORKLOADS[what]))
    if what in _BY_DEVICE and (parts is None or "all" in parts):
        parts = _BY_DEVICE[what]("cuda" if torch.cuda.is_available() else "cpu")
    for part in parts or []:
        if part not in (*known, "all"):
            raise ValueError(f"bench: unknown part {part!r} of {what}. Known: {', '.join(known)}, all.")
    if parts is None:
        return known if what in _TRAINED else ["table"]
    return known if "all" in parts else parts


def bench(
    what: str,
    vs: list[str],
    parts: list[str] | None = None,
    tick: Callable[[str], None] = lambda text: None,
    profile: bool = False,
    timer: timing.Timer | None = None,
) -> Result:
    """Measure without printing, as :func:`run_bench`; ``tick`` is told what comes next, ``timer`` takes the times."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ceilings: dict[str, float] = {}
    if what == "train":
        rows, failed = bench_train.measure(vs, parts or list(bench_train.PARTS), tick, profile)
    elif what == "trainer":
        rows, failed = bench_trainer.measure(parts or list(bench_trainer.PARTS), tick)
    elif what == "generate":
        rows, failed = bench_generate.measure(parts or bench_generate.parts_of(device), tick)
    elif what == "vision":
        parts = parts or bench_vision.parts_of(device)
        # the floors under the walks need them
        ceilings = timing.ceilings(device) if "walks" in parts and device == "cuda" else {}
        rows, failed = bench_vision.measure(parts, tick, ceilings, profile, timer)
    elif what == "step":
        able = bench_step.parts_of(device)
        tick("ceilings")
        ceilings = timing.ceilings(device)
        rows, failed = bench_step.measure(parts or able, timer or timing.EventTimer(), ceilings, tick)
    else:
        tick("ceilings")
        ceilings = timing.ceilings(device)
        timer = timer or (timing.EventTimer() if device == "cuda" else timing.HostTimer())
        rows, failed = bench_ops.measure(what, vs, parts or ["table"], timer, ceilings, tick)
    named = {row["peer"].split(",")[0] for row in rows if row.get("peer")}
    command = " ".join([f"zoo bench {what}", *(f"--vs {name}" for name in vs)])
    libraries = _LIBRARIES[what] if what in _LIBRARIES else [*vs, *sorted(named)]
    result = header(what, command, device, libraries) | {"ceilings": ceilings, "cases": rows}
    return result | {"failed": failed} if failed else result

"""Results as data: one JSON object for a run, with a row for every case that was measured.

``what``, ``command``, ``date``, ``commit``, ``device`` and ``versions`` say where the figures come from; in a row of ``cases``,
``ratio`` is the peer's median time over ours, both of one process on one device.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from ..zoo.checkpoint.publish import write_whole

__all__ = ["Result", "Row", "Tick", "header", "merged", "read_result", "same_run", "version", "write"]

Result = dict[str, Any]
Row = dict[str, Any]  # one of a result's ``cases``
Tick = Callable[[str], None]  # told of every step of a measurement
_ABSENT = "not installed"


def header(what: str, command: str, device: str, libraries: list[str]) -> Result:
    """The facts of a run that every result begins with: command and time, commit, device, versions of libraries."""
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
    """Both results in one, a case that is in both as it was measured last; what was run is kept under ``runs``.

    A case of an earlier commit than the result's says so under ``commit``.
    """
    fresh = {_identity(row): row for row in after["cases"]}
    earlier = {} if before["commit"] == after["commit"] else {"commit": before["commit"]}
    cases = [fresh.pop(_identity(row), earlier | row) for row in before["cases"]]
    cases += fresh.values()
    runs = [{key: r[key] for key in ("command", "date", "commit", "ceilings")} for r in (before, after)]
    newer = {name: text for name, text in after["versions"].items() if text != _ABSENT}
    return after | {
        "versions": after["versions"] | before["versions"] | newer,
        "cases": cases,
        "runs": [*before.get("runs", runs[:1]), runs[1]],
    }


def _identity(row: dict[str, Any]) -> tuple:
    return tuple(row.get(key) for key in ("part", "name", "op", "dtype", "peer"))


def read_result(path: Path) -> Result | None:
    """Return what a file of results holds; ``None`` where there is none.

    Raises:
        ValueError: It is a folder, or holds no JSON object.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder. Give a file with --out, {path / 'result.json'} say.")
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: is not JSON ({e}). Move it away, or give another --out.") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, and no result. Move it away, or give another --out.")
    return found


def same_run(path: Path, result: Result) -> Result | None:
    """The result in a file, if it is of the same benchmark, on the same device and versions; it may be of another commit.

    A library that one of the two did without is no other version of it.

    Raises:
        ValueError: As :func:`read_result`.
    """
    before = read_result(path)
    if before is None:
        return None
    same = all(before.get(key) == result[key] for key in ("what", "device"))
    theirs = before.get("versions", {})
    pairs = [(text, theirs.get(name, text)) for name, text in result["versions"].items()]
    return before if same and all(a == b or _ABSENT in (a, b) for a, b in pairs) else None


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


def version(name: str) -> str:
    """Return the version of a library; some come without metadata and know it themselves."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    try:
        return str(getattr(import_module(name), "__version__", "unknown"))
    except ImportError:
        return _ABSENT

"""One side of a measurement in a process of its own, so that none sees the memory, or what is compiled, of another."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["answer", "run_apart"]


def run_apart(module: str, spec: dict[str, Any], folder: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what ``main`` of a module makes of a description, in another process; ``side`` and ``model`` name it where it fails.

    Raises:
        RuntimeError: The process ended with another status than 0; the message ends with what it said last.
    """
    out = Path(folder) / "result.json"
    # -P: the folder we are in is no place to import from
    command = [sys.executable, "-P", "-c", f"from {module} import main; main()", json.dumps(spec | {"out": str(out)})]
    done = subprocess.run(command, env=os.environ | (env or {}), cwd="/", stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise RuntimeError(f"{spec['side']} of {spec['model']} ended with status {done.returncode}:\n{last}")
    return json.loads(out.read_text())


def answer(side: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be that other process: the description is the last argument, the result a JSON file."""
    spec = json.loads(sys.argv[-1])
    out = spec.pop("out")
    Path(out).write_text(json.dumps(side(spec)))

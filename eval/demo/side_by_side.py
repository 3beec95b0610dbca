"""Several jobs side by side, a process and its share of the cores each: progress for a person, and one Ctrl-C for all.

A tiny model's operations are too small to be worth splitting among cores; whole models are not. A job is a Python expression;
what it prints to stdout are its messages, one JSON object per line: ``{"done": 3, "total": 10, "note": "..."}`` moves its bar,
``{"say": "..."}`` is shown to the person.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ...zoo.terminal import progress_bar

__all__ = ["WorkerError", "message", "run_side_by_side"]


class WorkerError(RuntimeError):
    """A job failed; the message names the file with what it said."""


def message(**content: str | float) -> None:
    """Send a message from inside a job."""
    print(json.dumps(content), flush=True)


def run_side_by_side(jobs: Mapping[str, str], logs: Path, console: Console) -> None:
    """Run jobs, as many at a time as there are cores, in the order given.

    Args:
        jobs: Python code by name.
        logs: Folder for what they write to stderr, ``NAME/log.txt``.
        console: Where progress goes.

    Raises:
        WorkerError: A job failed; the others have been stopped as by Ctrl-C.
        KeyboardInterrupt: After Ctrl-C, which is passed on once to every job, when all have ended.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_a_time = min(cores, len(jobs))
    waiting = list(jobs.items())
    running: dict[str, subprocess.Popen] = {}
    listeners: dict[str, threading.Thread] = {}
    with progress_bar(console, disable=not console.is_terminal) as bar, _ending(running):
        while waiting or running:
            while waiting and len(running) < at_a_time:
                name, code = waiting.pop(0)
                running[name] = _start(name, code, logs, max(1, cores // at_a_time))
                listeners[name] = threading.Thread(target=_listen, args=(name, running[name], bar), daemon=True)
                listeners[name].start()
            time.sleep(0.1)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    listeners[name].join(timeout=5)  # a helper process it left behind may hold its stdout open
                    if status := process.returncode:
                        raise WorkerError(f"{name}: ended with status {status}. {logs / name / 'log.txt'} says why.")


def _start(name: str, code: str, logs: Path, threads: int) -> subprocess.Popen:
    (logs / name).mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with (logs / name / "log.txt").open("w") as log:
        # -P: the folder we are in is no place to import from; a session of its own: Ctrl-C reaches it through us, and once
        started = [sys.executable, "-P", "-c", code]
        return subprocess.Popen(
            started, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
        )


def _listen(name: str, process: subprocess.Popen, bar: Progress) -> None:
    task = bar.add_task(name, total=None, note="")
    assert process.stdout is not None
    for line in process.stdout:
        content = json.loads(line)
        if "say" in content:
            bar.console.print(f"{name}: {content['say']}", markup=False, highlight=False)
        else:
            bar.update(task, completed=content["done"], total=content["total"], note=content["note"])
    bar.update(task, visible=False)


@contextlib.contextmanager
def _ending(running: dict[str, subprocess.Popen]) -> Iterator[None]:
    """Whatever ends us ends the jobs: first as Ctrl-C does, so that they save; if we are told again, at once."""
    try:
        yield
    except BaseException:
        try:
            for process in running.values():
                process.send_signal(signal.SIGINT)
            for process in running.values():
                process.wait()
        except KeyboardInterrupt:
            for process in running.values():
                process.kill()
        raise

"""Running a study on this host: one worker in this process, or several beside it, until nothing is left, the time is over, or Ctrl-C."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...zoo.terminal import counted
from .job import Job
from .progress import Snapshot, named, snapshot, watching
from .queue import DEATHS, Queue
from .statistics import has_score
from .store import Failure
from .worker import DEVICE_LOST, DeviceLost, work

__all__ = ["Summary", "run_job", "summary_of"]

_POLL, _PATIENCE = 0.2, 120.0  # seconds


@dataclasses.dataclass(frozen=True)
class Summary:
    """The state of a study after a run.

    Attributes:
        study: Its name.
        folder: Its folder.
        cells: That are wanted, as far as is known: further seeds are trained once rates are compared.
        done: That have a result.
        failed: Given up.
        diverged: Trainings among those done that have no score, for they diverged; each makes its rate the worst of its point's.
        unscored: Points of which every rate diverged.
        unmatched: Why points cannot be built or matched, by their names.
        stale: Results in the folder that are of other code, or of an earlier version of the study; nobody looks at them.
        seconds: That the run took.
        interrupted: Whether Ctrl-C ended it.
    """

    study: str
    folder: Path
    cells: int
    done: int
    failed: list[Failure]
    unmatched: dict[str, str]
    stale: int
    seconds: float
    interrupted: bool = False
    diverged: int = 0
    unscored: tuple[str, ...] = ()

    @property
    def left(self) -> int:
        """Return the number of cells that are still to be trained."""
        return self.cells - self.done - len(self.failed)

    @property
    def status(self) -> int:
        """Return a command's exit status, 130 after Ctrl-C, 1 where cells were given up, points lack a score or there are none, else 0."""
        return 130 if self.interrupted else int(bool(self.failed or self.unscored) or not self.cells)

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        failed = [failure.plain() for failure in self.failed]
        return fields | {"folder": str(self.folder), "failed": failed, "left": self.left}

    def __str__(self) -> str:
        lines = [f"{self.study}: {self.done} of {self.cells} cells are done, {self.left} are left ({self.folder})"]
        lines += [f"given up: {named(f.cell)}: {f.error} ({f.log})" for f in self.failed]
        if self.diverged:
            lines.append(f"diverged, which counts as the worst of rates: {counted(self.diverged, 'training')}")
        if self.unscored:
            lines.append(f"every rate diverged: {', '.join(self.unscored)}. Give lower rates.")
        if self.unmatched:
            lines.append(
                f"{counted(len(self.unmatched), 'point')} cannot be built or matched: {', '.join(self.unmatched)}"
            )
        if self.stale:
            lines.append(
                f"left out: {counted(self.stale, 'result')} of other code or of an earlier version of the study"
            )
        if self.left:
            lines.append("The same command goes on where this one stopped.")
        return "\n".join(lines)


def run_job(job: Job, workers: int = 1, quiet: bool = False) -> Summary:
    """Train what a study lacks, with workers on this host; others may do the same elsewhere.

    Args:
        job: The study.
        workers: Processes; GPUs are dealt out to them in turn, or else the cores are divided among them.
        quiet: Show nothing while it runs.

    Raises:
        ValueError: No workers, or workers that cannot begin; the message holds what they said.
        QueueError: The queue cannot be read, written or reached.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: must be at least 1.")
    began, interrupted = time.monotonic(), False
    store, queue = job.store(), Queue(Path(job.folder), job.storage)
    with watching(lambda: snapshot(job, store, queue), job.study, quiet):
        try:
            # several GPUs in one process would split every batch among them
            if workers == 1 and len(_gpus(job)) <= 1:
                work(job)
            else:
                _work_beside(job, workers, queue)
        except KeyboardInterrupt:
            interrupted = True
        except DeviceLost:
            # of no more use to this process, but to another
            _work_beside(job, 1, queue)
    return summary_of(job, snapshot(job, store, queue), time.monotonic() - began, interrupted)


def summary_of(job: Job, now: Snapshot, seconds: float = 0.0, interrupted: bool = False) -> Summary:
    """Return what there is to say of a study at a moment."""
    unmatched = {point.name: point.problem for point in job.points if point.problem}
    diverged = sum(not has_score(result) for result in now.results)
    unscored = tuple(row.name for row in now.rows if row.state == "done" and row.rate is None)
    return Summary(
        job.study, Path(job.folder), now.cells, now.done, now.failures, unmatched, job.store().stale(job.every_cell()),
        seconds, interrupted, diverged, unscored,
    )  # fmt: skip


def _work_beside(job: Job, workers: int, queue: Queue) -> None:
    """Let other processes work, and put a new one in the place of each that has died."""
    logs = Path(job.folder) / "workers" / uuid.uuid4().hex[:8]
    logs.mkdir(parents=True)
    running: dict[int, subprocess.Popen] = {}
    spare = DEATHS * sum(len(job.first(point)) + len(job.seeds) for point in job.points)
    with _without_empty(logs), _ending(running):
        for place in range(workers):
            running[place] = _start(job, place, workers, logs)
        while running:
            time.sleep(_POLL)
            for place, process in list(running.items()):
                if (status := process.poll()) is None:
                    continue
                del running[place]
                if status < 0 or status == DEVICE_LOST:
                    queue.bury()
                    spare -= 1
                    if spare > 0:
                        running[place] = _start(job, place, workers, logs)
                elif status == 130:
                    raise KeyboardInterrupt
                elif status:
                    said = (logs / f"{place}.txt").read_text(errors="replace").strip().splitlines() or ["nothing"]
                    raise ValueError(f"a worker has ended with status {status} and said: {said[-1]} ({logs / f'{place}.txt'})")  # fmt: skip


@contextlib.contextmanager
def _without_empty(logs: Path) -> Iterator[None]:
    """Take away the logs of workers that had nothing to say, when the block ends."""
    try:
        yield
    finally:
        for log in logs.iterdir():
            if not log.stat().st_size:
                log.unlink()
        with contextlib.suppress(OSError):
            logs.rmdir()
            logs.parent.rmdir()


def _start(job: Job, place: int, workers: int, logs: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    gpus = _gpus(job)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment["OMP_NUM_THREADS"] = str(max(1, cores // workers))
    with (logs / f"{place}.txt").open("a") as log:
        # -P: the folder we are in is no place to import from; a session of its own: Ctrl-C reaches it through us, and once
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.worker"], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(job.plain()) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # its status says that it has ended
    return process


def _gpus(job: Job) -> list[str]:
    """Return the GPUs that this process sees, as the variable names them; none where cells are trained on the CPU."""
    if job.device not in (None, "cuda"):
        return []
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


@contextlib.contextmanager
def _ending(running: dict[int, subprocess.Popen]) -> Iterator[None]:
    """Whatever ends us ends the workers: first so that they keep their checkpoints; if we are told again, at once."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt) and running:
            print("\nstopping after the running steps; Ctrl-C again stops at once", file=sys.stderr)
        try:
            for process in running.values():
                assert process.stdin is not None
                with contextlib.suppress(OSError):
                    process.stdin.close()
            end = time.monotonic() + _PATIENCE
            for process in running.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
        finally:
            for process in running.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()
        raise
    finally:
        for process in running.values():
            if process.stdin is not None and not process.stdin.closed:
                with contextlib.suppress(OSError):
                    process.stdin.close()

"""A worker: takes cells of a study, one at a time, until none is left, its time is over, or it is told to stop.

As a process, ``python -m hybridzoo.eval.ablate.worker``, it reads its :class:`~hybridzoo.eval.ablate.job.Job` as a line of JSON, and stops
when its standard input ends: whoever has started it needs no signal for that, and does not outlive it by accident.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from . import queue as queues
from .cells import Cell
from .job import Job
from .journal import QueueError
from .queue import Queue, Taken
from .statistics import score
from .store import LOG, Store, code_digest, foreign_digests

__all__ = ["DEVICE_LOST", "DeviceLost", "main", "work"]

DEVICE_LOST = 3  # an exit status
_POLL = 0.5  # seconds
_LONGEST = 300


class DeviceLost(RuntimeError):
    """The GPU answers nothing any more, in this process; another may go on."""


def work(job: Job, stop: Callable[[], bool] = lambda: False) -> None:
    """Train cells of a study until none is left to wait for, or ``stop()`` says so.

    Raises:
        KeyboardInterrupt: Ctrl-C; the running cell has been given back, and goes on later from its last checkpoint.
        QueueError: The queue cannot be read, written or reached.
        DeviceLost: After the failure of a cell that its GPU has not survived.
        ValueError: This process has other sources than the one that made the job.
    """
    check_code(job)
    store, queue, train = job.store(), Queue(Path(job.folder), job.storage), _function(job.function)
    say = _Stream()

    def stopping() -> bool:
        return stop() or (job.until is not None and time.time() >= job.until)

    while not stopping():
        given_up = {key for key, entry in queue.entries().items() if entry.given_up}
        cells = job.missing(store, given_up)
        if not cells:
            return
        queue.bury()
        queue.add(cells)
        taken = queue.take(cells)
        if taken is None:
            # what others are at may fail, or ask for more seeds
            time.sleep(_POLL)
            continue
        cell = cells[taken.key]
        with _Heart(queue, taken, stopping) as heart, say.into(store.folder_of(taken.key) / LOG, cell, taken):
            trained = functools.partial(train, device=job.device, on_step=heart.on_step)
            try:
                _attempt(store, queue, taken, cell, trained)
            except KeyboardInterrupt:
                # our own, at the end of the time or because others have this cell; or Ctrl-C
                if not heart.asked:
                    raise
            finally:
                taken.lock.release()
        _recover()


def check_code(job: Job) -> None:
    """Raise a ValueError if this process has other sources, or other foreign mixers, than the one that made the job."""
    asked = {item for point in job.points for item in point.foreign.items()}
    if code_digest() != job.code or not asked <= foreign_digests().items():
        raise ValueError(
            "the sources or foreign mixers of this process are not those of the one that has started it. Start the study again, "
            "on all hosts with the same version."
        )


def _attempt(store: Store, queue: Queue, taken: Taken, cell: Cell, train: Callable[[Cell, Path], dict[str, Any]]) -> None:  # fmt: skip
    """Train a cell that was taken, and tell the queue what came of it."""
    if store.get(cell) is not None:
        # finished between a look at what is missing and a look at the queue
        queue.needless(taken)
        return
    place = store.folder_of(taken.key)
    try:
        kept = store.put(cell, _outcome(cell, place, train, taken.attempt), _device())
    except Exception as e:
        traceback.print_exc()
        line = (str(e).strip().splitlines() or [""])[0]
        queue.failed(taken, f"{type(e).__name__}: {line}"[:_LONGEST])
    except BaseException:
        queue.interrupted(taken)
        raise
    else:
        queue.done(taken, score(kept, "valid"))
        _discard_checkpoints(place)


def _outcome(cell: Cell, place: Path, train: Callable[[Cell, Path], dict[str, Any]], attempt: int) -> dict[str, Any]:
    """Train a cell; one that diverges at its last attempt too has a result without a score: its rate has lost."""
    from ...zoo.train.diverged import Diverged
    from .tasks import task_of

    try:
        return train(cell, place)
    except Diverged as e:
        if attempt < queues.ATTEMPTS:
            raise
        traceback.print_exc()
        metric = task_of(cell.task).metric
        scores = {part: {metric: None} for part in ("valid", "test")}
        return {"metric": metric, **scores, "steps": e.step, "stopped": "diverged", "problem": str(e)}


def _discard_checkpoints(place: Path) -> None:
    from ...zoo.checkpoint.publish import discard

    # states of the optimiser, three times the model; nothing goes on from them any more
    with contextlib.suppress(OSError):
        discard(place / "run" / "checkpoints")


class _Heart:
    """Tells the queue every few seconds that a cell is worked on, and the training when it has to stop.

    A context manager; ``on_step`` is called with the steps done and the loss, after each.
    """

    def __init__(self, queue: Queue, taken: Taken, stopping: Callable[[], bool]):
        self.queue, self.taken, self.stopping = queue, taken, stopping
        self.step: int | None = None
        self.first: tuple[int, float] | None = None
        self.asked = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "_Heart":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def on_step(self, step: int, loss: float) -> None:
        self.step = step
        # the first step compiles and says nothing of those that follow
        self.first = self.first or (step, time.monotonic())
        if (self.taken.lost or self.stopping()) and not self.asked:
            self.asked = True
            main = threading.current_thread() is threading.main_thread()
            if main and callable(signal.getsignal(signal.SIGINT)):
                # as Ctrl-C: a training that catches it saves its state first
                signal.raise_signal(signal.SIGINT)
            else:
                raise KeyboardInterrupt

    def _speed(self) -> float | None:
        if self.first is None or self.step is None or self.step <= self.first[0]:
            return None
        return (self.step - self.first[0]) / max(time.monotonic() - self.first[1], 1e-9)

    def _beat(self) -> None:
        while not self._ended.wait(queues.BEAT):
            try:
                self.queue.beat(self.taken, self.step, self._speed())
            except QueueError as e:
                # a server that is away for a moment is no reason to stop training; the end of the cell finds out whether it is back
                print(f"heartbeat: {e}", file=sys.stderr)


class _Stream:
    """Standard output and error while a cell is trained: its log file.

    Handlers of logging keep the stream that they were made with: there is one for the life of the process, and what it writes to changes.
    """

    def __init__(self) -> None:
        self.target: TextIO = sys.stderr

    def write(self, text: str) -> int:
        return self.target.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    @contextlib.contextmanager
    def into(self, file: Path, cell: Cell, taken: Taken) -> Iterator[None]:
        before = self.target
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with file.open("a", encoding="utf-8", buffering=1) as log:
            log.write(f"-- {now} {cell.point.name}, rate {cell.rate:g}, seed {cell.seed}, attempt {taken.attempt}, ")
            log.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.target = log
            stream: Any = self
            try:
                with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                    yield
            finally:
                self.target = before


def _function(name: str) -> Callable[..., dict[str, Any]]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _device() -> str:
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"


def _recover() -> None:
    """Give back the memory of the cell before; a DeviceLost if its GPU is of no more use to this process."""
    gc.collect()
    if _device() == "cuda":
        import torch

        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as e:
            raise DeviceLost(f"the GPU does not answer any more ({str(e).splitlines()[0]})") from e


def main() -> None:
    """Work on the job that standard input holds, until it ends."""
    job = Job.from_plain(json.loads(sys.stdin.readline()))
    stopping = threading.Event()

    def listen() -> None:
        # past Python's buffer, whose lock a thread that waits would hold when the process ends
        while os.read(0, 1):
            pass
        stopping.set()

    threading.Thread(target=listen, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    from ...zoo.importing import import_mixers

    for source in job.imports:
        import_mixers(source)
    try:
        work(job, stopping.is_set)
    except KeyboardInterrupt:
        sys.exit(0 if stopping.is_set() or (job.until or time.time() + 1) <= time.time() else 130)
    except DeviceLost as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(DEVICE_LOST)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The queue of a study, in an Optuna storage: a trial is an attempt at a cell, and waits, runs, is complete or has failed.

Nothing here asks a sampler. Any number of processes and hosts that share the study's folder work on one queue:

- A cell is taken by whoever holds the lock in its folder and turns its first waiting trial into a running one, which the storage grants
  to one process alone. Of a cell with several trials the first that has not ended counts, so that it does no harm to add it twice.
- Whoever is killed lets go of the lock. Others of that host see it at once, and those of another host once its heart, a user attribute
  of the trial, has stood still for :data:`STALE` seconds (JournalStorage of Optuna 5.0 has no heartbeat of its own).
- An attempt that was killed or interrupted is no failure: the cell waits again. One that raised an error is; after :data:`ATTEMPTS` of
  them the cell is given up, and so it is once its process has died :data:`DEATHS` times.
"""

import contextlib
import dataclasses
import json
import math
import os
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...zoo.checkpoint.publish import write_whole
from .cells import Cell

__all__ = ["ATTEMPTS", "BEAT", "DEATHS", "STALE", "Entry", "Queue", "Taken"]

BEAT, STALE = 10.0, 60.0  # seconds
ATTEMPTS, DEATHS = 2, 8
_SETTLED = 120.0  # seconds until a result that one host has written is surely seen by the others
JOURNAL, LOCK, WORKER = "journal.log", ".lock", ".worker"


@dataclasses.dataclass
class Entry:
    """All that the queue knows of a cell.

    Attributes:
        trial: The attempt that waits or runs: Optuna's FrozenTrial.
        done: The time at which it was completed, in seconds since 1970.
        errors: Attempts that ended in an error.
        deaths: Attempts whose process died.
        error: What the last error said, in one line.
        begun: Whether an attempt was cut off, and a later one goes on from its checkpoint.
    """

    trial: Any = None
    done: float | None = None
    errors: int = 0
    deaths: int = 0
    error: str | None = None
    begun: bool = False

    @property
    def given_up(self) -> bool:
        """Return whether it has failed for good."""
        return self.errors >= ATTEMPTS or self.deaths >= DEATHS

    @property
    def state(self) -> str:
        """``"waiting"``, ``"running"``, ``"done"``, ``"failed"`` (for good) or ``"none"``."""
        if self.given_up:
            return "failed"
        # one whose result was removed is tried again
        if self.trial is not None:
            return self.trial.state.name.lower()
        return "none" if self.done is None else "done"

    @property
    def pulse(self) -> dict[str, Any]:
        """``{"time", "step", "steps_per_second", "worker"}`` of the last beat of its heart; empty without one."""
        return self.trial.user_attrs.get("pulse", {}) if self.trial is not None else {}


@dataclasses.dataclass
class Taken:
    """A cell that this process is at work on.

    Attributes:
        lost: Others have taken it for dead, and may have begun it themselves.
    """

    key: str
    trial_id: int
    attempt: int
    lock: Any
    lost: bool = False


class Queue:
    """The queue of the study in a folder, opened or made.

    Args:
        folder: The study's, which all its processes share.
        storage: A database, ``postgresql://``, ``mysql://`` or ``sqlite:///``; by default the file ``journal.log`` in the folder.

    Raises:
        QueueError: It cannot be read, written or reached.
    """

    def __init__(self, folder: Path, storage: str | None = None):
        from filelock import FileLock

        from .storage import guarded, open_storage

        self.folder = folder.resolve()
        identity = _identity_of(self.folder)
        self._guarded = guarded(storage)
        # one at a time: a database's tables are made by who comes first
        with FileLock(self.folder / LOCK) if storage else contextlib.nullcontext(), self._guarded():
            self._storage = open_storage(self.folder / JOURNAL, storage)
            self._study_id = _study_of(self._storage, identity)
        self._heard: dict[int, tuple[Any, float]] = {}  # by trial, the last beat and when it was first seen

    def entries(self) -> dict[str, Entry]:
        """Return what is known of every cell, by its key, in the order in which they were added."""
        from optuna.trial import TrialState

        with self._guarded():
            trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
            forgiven = self._storage.get_study_user_attrs(self._study_id).get("forgiven", 0)
        entries: dict[str, Entry] = {}
        for trial in trials:
            entry = entries.setdefault(trial.user_attrs["key"], Entry())
            if not trial.state.is_finished():
                entry.trial = entry.trial or trial
            elif trial.state == TrialState.COMPLETE:
                entry.done = trial.datetime_complete.timestamp()
                entry.errors = entry.deaths = 0
            elif trial.number >= forgiven:
                entry.errors += "error" in trial.user_attrs
                entry.deaths += "died" in trial.user_attrs
                entry.error = trial.user_attrs.get("error", entry.error)
                entry.begun |= "error" not in trial.user_attrs
        return entries

    def add(self, cells: Mapping[str, Cell]) -> int:
        """Let cells that have no result wait, but for those that wait, run or are given up; return how many are new."""
        entries, new = self.entries(), 0
        for key, cell in cells.items():
            entry = entries.get(key, Entry())
            # another host may have just finished it, and its result not be seen here yet
            settled = entry.done is None or abs(time.time() - entry.done) > _SETTLED
            if entry.trial is None and settled and not entry.given_up:
                self._enqueue(key, cell)
                new += 1
        return new

    def forgive(self) -> None:
        """Let cells that were given up be tried again."""
        with self._guarded():
            count = len(self._storage.get_all_trials(self._study_id, deepcopy=False))
            self._storage.set_study_user_attr(self._study_id, "forgiven", count)

    def take(self, keys: Collection[str]) -> Taken | None:
        """Take the first of some cells that waits, those that were begun before all others; ``None`` where none does.

        Raises:
            QueueError: The storage or the cell's folder takes nothing.
        """
        waiting = [(k, e) for k, e in self.entries().items() if k in keys and e.state == "waiting"]
        for key, entry in sorted(waiting, key=lambda pair: (not pair[1].begun, pair[1].trial.number)):
            lock = self._lock(key)
            if lock is None:
                continue
            try:
                # in its folder and not in the trial: it has to be known before the trial is ours
                write_whole(self._place(key) / WORKER, json.dumps({"host": _host(), "pid": os.getpid()}))
                if self._change(entry.trial._trial_id, "RUNNING"):
                    taken = Taken(key, entry.trial._trial_id, entry.errors + 1, lock)
                    self.beat(taken)
                    return taken
            except BaseException:
                lock.release()
                raise
            lock.release()
        return None

    def beat(self, taken: Taken, step: int | None = None, steps_per_second: float | None = None) -> None:
        """Say that a cell is still being worked on, and how far it is; one that others have given back becomes ``lost``."""
        worker = f"{socket.gethostname()}:{os.getpid()}"
        pulse = {"time": time.time(), "step": step, "steps_per_second": steps_per_second, "worker": worker}
        self._attribute(taken, "pulse", pulse)

    def done(self, taken: Taken, score: float) -> None:
        """Say that a cell's result is in its place."""
        self._end(taken, "COMPLETE", [score] if math.isfinite(score) else None)

    def failed(self, taken: Taken, error: str) -> None:
        """Say that a cell has raised an error, in one line."""
        self._attribute(taken, "error", error)
        self._end(taken, "FAIL")

    def interrupted(self, taken: Taken) -> None:
        """Give a cell back that is to be gone on with later."""
        self._end(taken, "FAIL")

    def needless(self, taken: Taken) -> None:
        """Put away an attempt at a cell that turned out to be done."""
        self._end(taken, "PRUNED")

    def bury(self) -> list[str]:
        """Give back the cells of processes that have died; return their keys."""
        return [key for key, entry in self.entries().items() if entry.state == "running" and self._bury(key, entry)]

    def _bury(self, key: str, entry: Entry) -> bool:
        if not self._is_silent(key, entry):
            return False
        lock = self._lock(key)
        if lock is None:
            return False
        dead = Taken(key, entry.trial._trial_id, entry.errors + 1, lock)
        try:
            with self._guarded():
                if self._storage.get_trial(dead.trial_id).state.is_finished():
                    return False
            self._attribute(dead, "died", True)
            if entry.deaths + 1 >= DEATHS:
                last = entry.pulse.get("step")
                self._attribute(dead, "error", f"its process died {DEATHS} times, the last time at step {last}")
            return self._change(dead.trial_id, "FAIL")
        finally:
            lock.release()

    def _is_silent(self, key: str, entry: Entry) -> bool:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((self._place(key) / WORKER).read_text())["host"] == _host():
                return True  # the lock says the rest
        # clocks of hosts differ: what counts is how long the beat has been the same, by our own
        pulse, now = entry.trial.user_attrs.get("pulse"), time.monotonic()
        before, since = self._heard.get(entry.trial._trial_id, (None, now))
        if before != pulse or entry.trial._trial_id not in self._heard:
            self._heard[entry.trial._trial_id] = pulse, now
            return False
        return now - since > STALE

    def _enqueue(self, key: str, cell: Cell) -> None:
        from optuna.trial import TrialState, create_trial

        about: dict[str, Any] = {"key": key, "log": f"cells/{key}/log.txt"}
        about |= {"point": cell.point.name, "rate": cell.rate, "seed": cell.seed}
        with self._guarded():
            self._storage.create_new_trial(
                self._study_id,
                create_trial(state=TrialState.WAITING, user_attrs=about),
            )

    def _attribute(self, taken: Taken, name: str, value: Any) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            with self._guarded():
                self._storage.set_trial_user_attr(taken.trial_id, name, value)
        except UpdateFinishedTrialError:
            taken.lost = True

    def _change(self, trial_id: int, state: str, values: list[float] | None = None) -> bool:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            with self._guarded():
                return self._storage.set_trial_state_values(trial_id, TrialState[state], values)
        except UpdateFinishedTrialError:
            return False

    def _end(self, taken: Taken, state: str, values: list[float] | None = None) -> None:
        try:
            if not self._change(taken.trial_id, state, values):
                taken.lost = True
        finally:
            taken.lock.release()

    def _place(self, key: str) -> Path:
        return self.folder / "cells" / key

    def _lock(self, key: str) -> Any:
        """Take the lock of a cell's folder; ``None`` while another has it."""
        from filelock import FileLock, Timeout

        from .journal import QueueError

        place = self._place(key)
        try:
            place.mkdir(parents=True, exist_ok=True)
            lock = FileLock(place / LOCK, thread_local=False)
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as e:
            raise QueueError(
                f"{place}: cannot be worked in ({e.strerror or e}). Make room, or give it rights there."
            ) from e
        return lock


def _host() -> str:
    """Return the kernel that this process runs on: containers have host names of their own, and locks in common."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _identity_of(folder: Path) -> str:
    """Return the name of a folder's queue: folders that share a database do not meet there, and hosts that share a folder do."""
    import uuid

    from filelock import FileLock

    from .journal import QueueError

    file = folder / "queue.txt"
    try:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / LOCK):
                if not file.exists():
                    write_whole(file, f"{folder.name} {uuid.uuid4().hex[:12]}\n")
        return file.read_text().strip()
    except OSError as e:
        raise QueueError(
            f"{folder}: cannot be used ({e.strerror or e}). Make room or give it rights there, or name another (--folder)."
        ) from e


def _study_of(storage: Any, name: str) -> int:
    import optuna

    try:
        return storage.get_study_id_from_name(name)
    except KeyError:
        pass
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], name)
    except optuna.exceptions.DuplicatedStudyError:
        return storage.get_study_id_from_name(name)
    finally:
        optuna.logging.set_verbosity(verbosity)

"""The folder of a training run: who works in it, what it holds, and the checkpoints that a later call goes on from.

Every change is one rename, so that a run killed at any moment leaves what it was before or what it becomes::

    OUT/train.json                    settings, facts about the run, and at the end the logged losses
    OUT/report.html                   a page with its curves
    OUT/tensorboard/                  the losses for TensorBoard
    OUT/checkpoints/checkpoint-N      whole from the moment it is there; zoo.json lists its files and their digests
    OUT/model.safetensors, ...        at the end the trained model, as ``zoo.save`` writes it
    OUT/confusion.json                of images, which classes the best model takes for which
    OUT/adapter/                      at the end what LoRA has trained, as PEFT writes it
    OUT/.train.lock, .train.holder    who is at work
"""

import contextlib
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.publish import discard, sync, write_whole
from ..digests import digest_file
from ..errors import CheckpointError
from .manifest import (
    FORMAT,
    MANIFEST,
    STATE,
    Checkpoint,
    are_entries,
    dumps,
    is_number,
    manifest_of,
    plain,
    read_json,
    step_of,
)  # fmt: skip

__all__ = ["ADAPTER", "AGAIN", "CONFUSION", "LOG", "SHARDED", "DifferentRun", "RunFolder", "differences"]

AGAIN = "Use another folder, or turn resume off (--no-resume) to start again."
LOG = "train.json"
ADAPTER, SHARDED, CONFUSION = "adapter", "sharded", "confusion.json"
_KEPT = 2
_DIGESTS = {"data": ", or the same in rows of another length or in other streams", "val": ", or without", "start": ""}
# what marks a folder as somebody's model
_MODEL_FILES = "config.yaml config.json adapter_config.json *.safetensors *.bin checkpoints/checkpoint-*".split()


class DifferentRun(ValueError):
    """The folder holds something else than this run, or another process is at work in it; the message says what."""


class RunFolder:
    """A run's folder, as :func:`~hybridzoo.zoo.train.run.train` reads and writes it; nothing is made until :meth:`claim`."""

    def __init__(self, path: Path):
        self.path, self.checkpoints = path, path / "checkpoints"
        self.staging = self.checkpoints / ".staging"
        self.settings: dict[str, Any] = {}
        self.about: dict[str, Any] = {}

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Be the one process at work in the folder, until the block or the process ends; where another is, that is a DifferentRun."""
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(self.path / ".train.lock"), self.path / ".train.holder"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            by = holder.read_text().strip() if holder.exists() else "another process"
            raise DifferentRun(
                f"{self.path}: {by} is training in this folder. Wait until it has ended, or use another folder."
            ) from None
        try:
            # of those who were killed: whoever is at work holds the lock
            # (.saving without more is a save that was decided: the next load or save finishes it)
            lost = [f for pattern in (".saving-*", ".writing-*", ".deleting-*") for f in self.path.glob(pattern)]
            for left in (*lost, *self.checkpoints.glob(".staging"), *self.checkpoints.glob(".deleting-*")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            write_whole(holder, f"process {os.getpid()} on {socket.gethostname()}\n")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def finished(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The log of this very run, if it is done."""
        try:
            log = self._read_log()
        except DifferentRun:
            return None
        return log if log and log["finished"] and log["settings"] == plain(settings) else None

    def is_finished(self) -> bool:
        """Return whether the log says that all is done."""
        log = self._read_log()
        return log is not None and bool(log["finished"])

    def open(self, settings: dict[str, Any], resume: bool, overwrite: bool) -> Checkpoint | None:
        """Say what there is to go on from, or make the folder ready for a new run.

        What is not this run's, and may not be replaced, is a DifferentRun; checkpoints that are all damaged are a CheckpointError.
        """
        self.settings = plain(settings)
        try:
            old = self._read_log()
            if old is None:
                self._refuse_foreign(overwrite)
            elif resume:
                self._refuse_other(old["settings"])
                return self._newest_whole()
        except DifferentRun:
            if not overwrite and (resume or not (self.path / LOG).exists()):
                raise
        # first what belongs to the old log, then the log: the other way round a killed process would leave a new log on old checkpoints
        for name in ("checkpoints", "tensorboard", ADAPTER):
            discard(self.path / name)
        (self.path / CONFUSION).unlink(missing_ok=True)
        self.about = {}
        self._write_log({"finished": False, "history": [], "seconds": 0.0})
        return None

    def describe(self, about: dict[str, Any], first_step: int) -> dict[str, Any]:
        """Keep facts about the run for people, and at which steps it was resumed; return them."""
        log = self._read_log() or {}
        before = log.get("about", {}).get("resumed", [])
        self.about = plain(about) | {"resumed": [*before, first_step] if first_step else []}
        self._write_log({key: log[key] for key in ("finished", "history", "seconds")})
        return self.about

    def log(self) -> dict[str, Any]:
        """Return what is known of the run in the folder, one that has not ended as far as its newest checkpoint; a DifferentRun if none."""
        log = self._read_log() if self.path.is_dir() else None
        if log is None:
            found = f"holds no {LOG}, so no training of ours" if self.path.is_dir() else "no such folder"
            raise DifferentRun(f"{self.path}: {found}. Name the folder of a run (--out of zoo train).")
        if not log["finished"]:
            histories = (_history_of(folder) for folder in self._steps())
            log["history"] = next((history for history in histories if history), log["history"])
        return log

    def finish(self, history: list[dict[str, float]], seconds: float, best: dict[str, float] | None = None) -> None:
        """Note that the model is in its place, and all is done; ``best`` is the step that it is of, and the loss there, if not the last."""
        self._write_log({"finished": True, "history": history, "seconds": seconds, "best": best})

    def publish(
        self, step: int, facts: dict[str, Any], best: int | None = None, risen_since: int | None = None
    ) -> None:
        """Make the checkpoint that lies in ``staging`` one of the run's, and delete those that are not kept.

        Kept are the newest two, that of the ``best`` step, and, where losses have ``risen_since`` a step, the newest from before that.
        """
        place = self.checkpoints / f"checkpoint-{step}"
        ready = self.staging / place.name
        files = sorted(f for f in ready.rglob("*") if f.is_file())
        listed = {str(f.relative_to(ready)): [f.stat().st_size, digest_file(f)] for f in files}
        manifest = {"format": FORMAT, "step": step, "settings": self.settings, **facts, "files": listed}
        (ready / MANIFEST).write_text(dumps(manifest), encoding="utf-8")
        for file in (*files, ready / MANIFEST, ready):
            sync(file)
        discard(place)
        ready.replace(place)
        self.staging.rmdir()
        sync(self.checkpoints)
        kept = {*self._steps()[:_KEPT], self.checkpoints / f"checkpoint-{best}"}
        if risen_since is not None:
            kept.add(self.checkpoints / f"checkpoint-{self.last_step(risen_since)}")
        for old in self._steps():
            if old not in kept:
                discard(old)

    def last_step(self, until: int | None = None) -> int:
        """The step of the newest checkpoint, ``until`` a step or else the oldest; 0 without one."""
        steps = [step_of(folder) for folder in self._steps()]
        return next((step for step in steps if until is None or step <= until), steps[-1] if steps else 0)

    def kept(self, until: int | None = None) -> str:
        """Say which checkpoint there is, as :meth:`last_step` counts."""
        last = self.last_step(until)
        return f"Checkpoint {last} in {self.checkpoints} is whole." if last else "There is no checkpoint yet."

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of a step; what is not whole is a CheckpointError."""
        folder = self.checkpoints / f"checkpoint-{step}"
        return Checkpoint(folder, manifest_of(folder))

    def _steps(self) -> list[Path]:
        found = [f for f in self.checkpoints.glob("checkpoint-*") if step_of(f) >= 0 and f.is_dir()]
        return sorted(found, key=step_of, reverse=True)

    def _newest_whole(self) -> Checkpoint | None:
        damaged: list[tuple[Path, str]] = []
        for folder in self._steps():
            try:
                manifest = manifest_of(folder)
            except CheckpointError as e:
                damaged.append((folder, str(e)))
                continue
            if manifest["settings"] != self.settings:
                raise DifferentRun(f"{folder}: is of another run than {LOG}. {AGAIN}")
            for bad, why in damaged:
                aside = bad.with_name(f"damaged-{bad.name}-{uuid.uuid4().hex[:8]}")
                bad.replace(aside)
                print(f"{why}; going on from {folder.name}, and keeping that one as {aside.name}", file=sys.stderr)
            return Checkpoint(folder, manifest)
        if damaged:
            reasons = "; ".join(why.rstrip(".") for _, why in damaged)
            raise CheckpointError(f"{reasons}. No checkpoint is whole. {AGAIN}")
        return None

    def _read_log(self) -> dict[str, Any] | None:
        file = self.path / LOG
        try:
            log = read_json(file)
        except FileNotFoundError:
            return None
        except ValueError as e:
            raise DifferentRun(f"{file}: cannot be read ({e}). {AGAIN}") from e
        if not isinstance(log, dict) or log.get("format") != FORMAT:
            there = log.get("format", 1) if isinstance(log, dict) else "none"
            raise DifferentRun(
                f"{file}: is of format {there}, and this version of hybridzoo goes on from format {FORMAT}. {AGAIN}"
            )
        settings, finished, seconds, history = map(log.get, ("settings", "finished", "seconds", "history"))
        whole = isinstance(settings, dict) and isinstance(finished, bool) and is_number(seconds)
        whole = whole and ((best := log.get("best")) is None or are_entries([best]))
        if not (whole and are_entries(history)) or (finished and not all("loss" in e for e in history or [{}])):
            raise DifferentRun(f"{file}: is not whole. {AGAIN}")
        return log

    def _write_log(self, content: dict[str, Any]) -> None:
        write_whole(
            self.path / LOG, dumps({"format": FORMAT, "settings": self.settings, "about": self.about, **content})
        )

    def _refuse_other(self, old: dict[str, Any]) -> None:
        for key, values in differences(old, self.settings):
            # digests say nothing to anybody
            shown = _DIGESTS.get(key, f" ({values})")
            raise DifferentRun(f"{self.path}: holds a run with another {key}{shown}. {AGAIN}")

    def _refuse_foreign(self, overwrite: bool) -> None:
        if (self.path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{self.path}: holds an adapter of PEFT, which transformers would put on the model. Use another folder, or remove it."
            )
        found = next((f for pattern in _MODEL_FILES for f in self.path.glob(pattern)), None)
        if found is not None and not overwrite:
            raise DifferentRun(
                f"{self.path}: holds a model that no training of ours has left there ({found.relative_to(self.path)}, and no {LOG}). Use "
                "another folder, or say overwrite (--overwrite) to replace it."
            )


def _history_of(checkpoint: Path) -> list[dict[str, float]]:
    """Return what was logged until a checkpoint; nothing where it is damaged, or has made way for a newer one."""
    try:
        history = read_json(checkpoint / STATE)["log_history"]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return history if are_entries(history) else []


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys, dotted, under which two nested mappings differ, and what each of them says."""
    for key in {**new, **old}:
        there, now = old.get(key), new.get(key)
        if isinstance(there, dict) and isinstance(now, dict):
            yield from differences(there, now, f"{prefix}{key}.")
        elif there != now:
            there, now = (text if len(text) <= 60 else f"{text[:57]}..." for text in map(str, (there, now)))
            yield f"{prefix}{key}", f"{there} there, {now} now"

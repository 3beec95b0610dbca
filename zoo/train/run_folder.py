"""The folder of a training run: who works in it, what it holds, and the checkpoints that a later call goes on from.

Every change is one rename, so that a run killed at any moment leaves what it was before or what it becomes::

    OUT/train.json                    settings, facts about the run, and at the end the logged losses
    OUT/report.html                   a page with its curves
    OUT/tensorboard/                  the losses for TensorBoard
    OUT/checkpoints/checkpoint-N      whole from the moment it is there; zoo.json lists its files and their digests
    OUT/model.safetensors, ...        at the end the trained model, as ``zoo.save`` writes it
    OUT/.train.lock, .train.holder    who is at work
"""

import contextlib
import json
import math
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.files import is_deep
from ..checkpoint.publish import sync, write_whole
from ..checkpoint.tensors import check_state_file
from ..errors import CheckpointError
from .digests import digest_file

__all__ = ["AGAIN", "LOG", "Checkpoint", "DifferentRun", "RunFolder"]

FORMAT = 2
AGAIN = "Use another folder, or turn resume off (--no-resume) to start again."
LOG, MANIFEST, STATE = "train.json", "zoo.json", "trainer_state.json"
_KEPT = 2
_FOREVER = 1e10  # seconds: longer than anything trains
# what marks a folder as somebody's model
_MODEL_FILES = "config.yaml config.json adapter_config.json *.safetensors *.bin checkpoints/checkpoint-*".split()


class DifferentRun(ValueError):
    """The folder holds something else than this run, or another process is at work in it; the message says what."""


class Checkpoint:
    """A whole checkpoint: its folder, and what its manifest says (``step``, ``seconds``, ``loss_sums``, ``logged``)."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.step, self.seconds = int(manifest["step"]), float(manifest["seconds"])

    def history(self) -> list[dict[str, float]]:
        """Return what was logged up to here."""
        return loss_entries(_read_json(self.folder / STATE)["log_history"])


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
            write_whole(holder, f"process {os.getpid()} on {socket.gethostname()}\n")
            # of those who were killed: whoever is at work holds the lock
            # (.saving without more is a save that was decided: the next load or save finishes it)
            lost = [f for pattern in (".saving-*", ".writing-*", ".deleting-*") for f in self.path.glob(pattern)]
            for left in (*lost, *self.checkpoints.glob(".staging"), *self.checkpoints.glob(".deleting-*")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
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
        for name in ("checkpoints", "tensorboard"):
            _delete(self.path / name)
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
        log = self._read_log()
        if log is None:
            raise DifferentRun(f"{self.path}: holds no {LOG}, so no training of ours.")
        for folder in () if log["finished"] else self._steps()[:1]:
            log["history"] = _read_json(folder / STATE)["log_history"]
        return log

    def finish(self, history: list[dict[str, float]], seconds: float) -> None:
        """Note that the model is in its place, and all is done."""
        self._write_log({"finished": True, "history": history, "seconds": seconds})

    def publish(self, step: int, facts: dict[str, Any]) -> None:
        """Make the checkpoint that lies in ``staging`` one of the run's, and delete all but the newest two."""
        place = self.checkpoints / f"checkpoint-{step}"
        ready = self.staging / place.name
        files = sorted(f for f in ready.rglob("*") if f.is_file())
        listed = {str(f.relative_to(ready)): [f.stat().st_size, digest_file(f)] for f in files}
        manifest = {"format": FORMAT, "step": step, "settings": self.settings, **facts, "files": listed}
        (ready / MANIFEST).write_text(_dumps(manifest), encoding="utf-8")
        for file in (*files, ready / MANIFEST, ready):
            sync(file)
        _delete(place)
        ready.replace(place)
        self.staging.rmdir()
        sync(self.checkpoints)
        for old in self._steps()[_KEPT:]:
            _delete(old)

    def last_step(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        steps = self._steps()
        return _step_of(steps[0]) if steps else 0

    def _steps(self) -> list[Path]:
        found = [f for f in self.checkpoints.glob("checkpoint-*") if _step_of(f) >= 0 and f.is_dir()]
        return sorted(found, key=_step_of, reverse=True)

    def _newest_whole(self) -> Checkpoint | None:
        damaged: list[tuple[Path, str]] = []
        for folder in self._steps():
            try:
                manifest = _whole(folder)
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
            log = _read_json(file)
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
        whole = isinstance(settings, dict) and isinstance(finished, bool) and _is_number(seconds)
        if not (whole and _are_entries(history)) or (finished and not all("loss" in e for e in history or [{}])):
            raise DifferentRun(f"{file}: is not whole. {AGAIN}")
        return log

    def _write_log(self, content: dict[str, Any]) -> None:
        write_whole(self.path / LOG, _dumps({"format": FORMAT, "settings": self.settings, "about": self.about, **content}))

    def _refuse_other(self, old: dict[str, Any]) -> None:
        for key, values in _differences(old, self.settings):
            # digests say nothing to anybody
            shown = "" if key in ("data", "start") else f" ({values})"
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


def _delete(folder: Path) -> None:
    # renamed first: nobody takes half a folder for a whole one
    if folder.exists():
        aside = folder.with_name(f".deleting-{uuid.uuid4().hex}")
        folder.replace(aside)
        shutil.rmtree(aside)


def loss_entries(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The logged losses among what transformers logs."""
    return [{k: v for k, v in entry.items() if k != "epoch"} for entry in log_history if "loss" in entry]


def _whole(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what was written."""
    try:
        manifest = _read_json(folder / MANIFEST)
        expected = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        if manifest["format"] != FORMAT or manifest["step"] != _step_of(folder):
            raise ValueError(f"format {manifest['format']}, step {manifest['step']}")
        kinds = {"settings": dict, "loss_sums": list, "logged": int}
        if not all(isinstance(manifest[key], kind) for key, kind in kinds.items()):
            raise ValueError("settings, loss_sums or logged is of another kind")
        if not all(map(_is_number, manifest["loss_sums"])) or not 0 <= float(manifest["seconds"]) < _FOREVER:
            raise ValueError("loss_sums are no numbers, or seconds is none")
        if outside := [name for name in expected if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise ValueError(f"it names {outside[0]!r}, which is not in the folder")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}, so no training of this version has left it there"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise CheckpointError(f"{folder / MANIFEST}: is not as it was written ({e})") from e
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing")
        if (now := file.stat().st_size) != size:
            raise CheckpointError(f"{file}: has {now} bytes, and {size} were written")
        if digest_file(file) != digest:
            raise CheckpointError(f"{file}: is not as it was written (its digest differs)")
    # a digest in the same folder says nothing of who wrote it
    for file in (f for ending in ("*.pt", "*.pth") for f in folder.glob(ending)):
        check_state_file(file)
    try:
        state = _read_json(folder / STATE)
        if state["global_step"] != manifest["step"] or not _are_entries(state["log_history"]):
            raise ValueError(f"global_step {state['global_step']}, log_history {str(state['log_history'])[:40]}")
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise CheckpointError(f"{folder / STATE}: is not as transformers writes it ({e})") from e
    return manifest


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_entries(history: Any) -> bool:
    return isinstance(history, list) and all(
        isinstance(entry, dict) and all(map(_is_number, entry.values())) for entry in history
    )


def plain(value: Any) -> Any:
    """Return what JSON has words for: keys are text, and numbers that are not finite are written out."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys, dotted, under which two nested mappings differ, and what each of them says."""
    for key in {**new, **old}:
        there, now = old.get(key), new.get(key)
        if isinstance(there, dict) and isinstance(now, dict):
            yield from _differences(there, now, f"{prefix}{key}.")
        elif there != now:
            there, now = (text if len(text) <= 60 else f"{text[:57]}..." for text in map(str, (there, now)))
            yield f"{prefix}{key}", f"{there} there, {now} now"


def _step_of(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() else -1


def _read_json(file: Path) -> Any:
    def refuse(token: str) -> None:
        raise ValueError(f"{token} is no JSON")

    if file.exists() and not file.is_file():
        raise ValueError("is no regular file")  # a pipe would be waited for
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    except RecursionError as e:
        raise ValueError(str(e)) from e
    if is_deep(content):
        raise ValueError("is nested too deeply")
    return content


def _dumps(content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"

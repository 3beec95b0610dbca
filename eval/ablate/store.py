"""The results of a study: one folder per cell, named by a digest of all that decides about it, and by the code that computed it.

::

    FOLDER/cells/KEY/result.json     whole from the moment it is there; the cell is then done
    FOLDER/cells/KEY/log.txt         what its attempts said, and tracebacks of those that failed
    FOLDER/cells/KEY/run             the training, as hybridzoo.train keeps it
    FOLDER/cells/KEY/.lock, .worker  who is at work on it
"""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...zoo.checkpoint.publish import write_whole
from ...zoo.train.manifest import plain, read_json
from .cells import Cell

__all__ = ["Failure", "Result", "Store", "code_digest", "foreign_digests", "foreign_modules"]

RESULT, LOG = "result.json", "log.txt"
ROOT = Path(__file__).resolve().parents[2]
_DECIDE = ("kernels", "layers", "zoo", "eval/ablate/tasks", "eval/ablate/measure.py", "eval/tasks/generators.py")
_KINDS = {".py", ".cu", ".cuh", ".yaml"}
# pages, tables and commands compute nothing that a cell is judged by
_SPEAK = (
    "zoo/report",
    "zoo/commands.py",
    "zoo/image_commands.py",
    "zoo/text_commands.py",
    "zoo/doctor.py",
    "zoo/terminal.py",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished cell.

    Attributes:
        cell: The training.
        result: ``{"metric", "valid", "test", "seconds", "steps", ...}``, as :func:`~hybridzoo.eval.ablate.measure.train_cell` gives it.
        path: Its file, which also holds ``code``, ``versions``, ``device`` and ``date``.
    """

    cell: Cell
    result: dict[str, Any]
    path: Path


@dataclasses.dataclass(frozen=True)
class Failure:
    """A cell that failed, as often as it may be tried.

    Attributes:
        cell: The training.
        error: One line.
        log: What its attempts said, with tracebacks.
        attempts: That ended in an error.
    """

    cell: Cell
    error: str
    log: Path
    attempts: int

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {
            "point": self.cell.point.name, "rate": self.cell.rate, "seed": self.cell.seed, "error": self.error,
            "log": str(self.log), "attempts": self.attempts,
        }  # fmt: skip


class Store:
    """The cells of a study's folder that this code has computed.

    Args:
        folder: The study's.
        code: A digest of the code, by default :func:`code_digest`.
    """

    def __init__(self, folder: Path, code: str | None = None):
        self.folder, self.code = folder, code_digest() if code is None else code
        self._known: dict[str, Result] = {}
        self._keys: dict[tuple, tuple[Cell, str]] = {}

    def key(self, cell: Cell) -> str:
        """Return the name of a cell's folder."""
        # asked for every cell every second; what is looked up by its identity is kept, so that no other takes its place
        about = (id(cell.point), id(cell.task), id(cell.train), cell.rate, cell.seed, repr(cell.measure))
        if about not in self._keys:
            self._keys[about] = cell, cell.key(self.code)
        return self._keys[about][1]

    def folder_of(self, key: str) -> Path:
        """Return a cell's folder, which may not be there yet."""
        return self.folder / "cells" / key

    def get(self, cell: Cell) -> Result | None:
        """Return a cell's result, if it is done.

        Raises:
            ValueError: Its file is damaged.
        """
        key = self.key(cell)
        if key not in self._known:
            path = self.folder_of(key) / RESULT
            if not path.exists():
                return None
            self._known[key] = Result(cell, _read(path), path)
        # studies call the same model by names of their own
        return dataclasses.replace(self._known[key], cell=cell)

    def put(self, cell: Cell, result: dict[str, Any], device: str = "cpu") -> Result:
        """Keep a result, whole or not at all, with the code, commit, versions, date and device (``"cpu"`` or ``"cuda"``) that it is of.

        Raises:
            ValueError: The result lacks what others read from it.
            OSError: It cannot be written.
        """
        from ..result_file import header

        key, path = self.key(cell), self.folder_of(self.key(cell)) / RESULT
        _check(result, "train_cell's result")
        facts = header(cell.study, "", device, ["transformers", "hybridzoo"])
        about = {name: facts[name] for name in ("commit", "versions", "device", "date")}
        content = plain({"cell": cell.plain(), "code": self.code, **about, "result": result})
        write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        self._known[key] = Result(cell, content["result"], path)
        return self._known[key]

    def results(self, cells: Iterable[Cell]) -> list[Result]:
        """Return the results of those cells that are done, each once."""
        found = {self.key(cell): result for cell in cells if (result := self.get(cell))}
        return list(found.values())

    def stale(self, cells: Iterable[Cell]) -> int:
        """Count finished cells of the folder that are none of these: of other code, or of an earlier version of the study."""
        ours = {self.key(cell) for cell in cells}
        return sum(path.parent.name not in ours for path in self.folder.glob(f"cells/*/{RESULT}"))


def _read(path: Path) -> dict[str, Any]:
    try:
        result = read_json(path)["result"]
        _check(result, "it")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: is no result of a cell ({e}). Remove it, and run the study again.") from e
    return result


def _check(result: Any, name: str) -> None:
    if isinstance(result, dict) and isinstance(metric := result.get("metric"), str):
        if all(isinstance(result.get(part), dict) and metric in result[part] for part in ("valid", "test")):
            return
    raise ValueError(f'{name} has no "metric" with a score of that name under "valid" and "test"')


@functools.cache
def code_digest() -> str:
    """Return a digest of what decides about the numbers of a cell besides the cell: our sources.

    Neither torch's version nor the device is part of it: a result says its own, and the report tells if they differ. So what was trained
    on a cluster is read on a laptop.
    """
    files = {f for place in _DECIDE for f in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*"))}
    names = {str(f.relative_to(ROOT).as_posix()): f for f in files if f.suffix in _KINDS}
    decide = {name: f for name, f in names.items() if not name.startswith(_SPEAK)}
    total = hashlib.sha256()
    for name, file in sorted(decide.items()):
        total.update(f"\n{name} {_digest(file)}".encode())
    return total.hexdigest()[:16]


def foreign_digests(types: Iterable[str] | None = None) -> dict[str, str]:
    """Return digests of the modules besides ours that have registered mixers of these types, or any, by the modules' names.

    Each is of the file that registers the mixer, not of what that file imports.
    """
    from ...zoo.registry import get_mixer

    modules = foreign_modules()
    used = modules if types is None else {get_mixer(kind, "mixers").cls.__module__ for kind in types}
    return {name: _digest(modules[name]) for name in sorted(modules.keys() & used)}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def foreign_modules() -> dict[str, Path]:
    """Return the modules besides ours that have registered mixers, with their files, as far as this process knows them."""
    from ...zoo import registry

    registry.list_mixers()
    ours = __name__.split(".")[0]
    modules = {entry.cls.__module__ for entry in registry._entries.values()}
    foreign = (sys.modules[name] for name in modules if name.split(".")[0] != ours and name in sys.modules)
    return {module.__name__: Path(getattr(module, "__file__", None) or module.__name__) for module in foreign}

"""Offline evaluation tasks: lm-eval YAMLs beside the seeded generators they draw from.

``generators`` and ``render`` are pure (numpy and text), so that training documents can come from the same functions
in the same format; ``task`` is the one module that imports lm-eval. Evaluation draws from seeds of 2**31 and above,
training from those below.

What is here finds a mistyped task or size before lm-eval is imported, which takes seconds, and its index read, a quarter of a minute.
"""

import difflib
import functools
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

__all__ = ["FOLDER", "check_amounts", "check_metadata", "check_tasks", "names", "near", "sizes", "unknown_task"]

FOLDER = Path(__file__).resolve().parent
_TAG = "hybridzoo_recall"
_KINDS = {dict: "an object of sizes", int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def names() -> list[str]:
    """The local tasks' names, sorted."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


@functools.cache
def sizes(name: str) -> dict[str, Any]:
    """Sizes of a local task, with the values they have unless metadata says otherwise; ``{}`` for a task without sizes."""
    return yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), _Plain).get("dataset_kwargs", {})


class _Plain(yaml.SafeLoader):
    """Reads a task's file without importing the functions it names."""


_Plain.add_constructor("!function", lambda loader, node: node.value)


def check_tasks(tasks: Iterable[str]) -> None:
    """Find a task's name to be a typo, if it is one. Wildcards, and files, are for lm-eval to resolve.

    Raises:
        ValueError: A name that is neither local nor written in any file of the installed lm-eval.
    """
    for task in tasks:
        if re.search(r"[*?\[]", task) or os.path.exists(task) or task in (*names(), _TAG):
            continue
        if task.startswith("hybridzoo") or (_in_lm_eval() and task not in _in_lm_eval()):
            raise ValueError(unknown_task(task))


def check_amounts(limit: Any, batch_size: Any, called: Sequence[str] = ("limit", "batch_size")) -> None:
    """Refuse a number of documents or a batch size that lm-eval would take without sense, or trip over.

    Raises:
        ValueError: Names the argument, as it is called where the user gave it.
    """
    if limit is not None and not (isinstance(limit, Real) and float(limit) > 0):
        shown = f"{limit:g}" if isinstance(limit, Real) else repr(limit)
        raise ValueError(f"{called[0]}: is {shown}. Give a number of documents, or a share of them below 1.")
    if not re.fullmatch(r"[1-9]\d*|auto(:[1-9]\d*)?", str(batch_size)):
        raise ValueError(f"{called[1]}: is {batch_size!r}. Give a number, auto, or auto:N.")


def unknown_task(task: str) -> str:
    """The message for a task that does not exist."""
    own = {name.removeprefix("hybridzoo_"): name for name in names()}
    # one that begins like ours is not looked for elsewhere
    known = own if task.startswith("hybridzoo") else dict.fromkeys(_in_lm_eval()) | own
    hint = near(task.removeprefix("hybridzoo_"), known, own)
    return f"tasks: unknown task {task!r}.{hint} Local tasks: {', '.join(names())}; others: `zoo lm-eval ls tasks`."


def near(word: str, known: Iterable[str], names: Mapping[str, str] | None = None) -> str:
    """A ``Did you mean ...?`` sentence with a leading space if one of ``known`` is near to a word, by its name in ``names``; else empty."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {(names or {}).get(close[0], close[0])!r}?" if close else ""


def check_metadata(tasks: Sequence[str], metadata: Any) -> None:
    """Find a key of the metadata that no task looks at. Keys are sizes, for all tasks, or local tasks' names with sizes of their own.

    Where other tasks take part, other keys may be theirs.

    Raises:
        ValueError: An unknown key, or a value of another kind than the default.
    """
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata: is a {type(metadata).__name__}, expected an object such as {{'docs': 100}}.")
    # a wildcard or a tag stands for any of them
    local = [task for task in tasks if task in names()] if set(tasks) <= set(names()) else names()
    known = {key: value for name in local for key, value in sizes(name).items()}
    open_ended = any(not task.startswith("hybridzoo") for task in tasks)
    for key, value in metadata.items():
        if key in names() and isinstance(value, Mapping):
            for size, given in value.items():
                _check_size(f"metadata.{key}.{size}", size, given, sizes(key))
        elif key in known or (not open_ended and key != "tokenizer") or key.startswith("hybridzoo"):
            _check_size(f"metadata.{key}", key, value, known | {name: sizes(name) for name in names()})


def _check_size(where: str, key: str, value: Any, known: Mapping[str, Any]) -> None:
    if key not in known:
        listed = ", ".join(known) or "none, the task has no sizes"
        raise ValueError(f"{where}: no task looks at it.{near(key, known)} Known here: {listed}.")
    kind = type(known[key])
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{where}: is {value!r}, expected {_KINDS.get(kind, kind.__name__)}, such as {known[key]!r}.")


@functools.cache
def _in_lm_eval() -> frozenset[str]:
    """The names of lm-eval's tasks, groups and tags, read from its files without parsing them; empty where it is not installed."""
    text = b"\n".join(Path(file).read_bytes() for file in _files())
    named = re.findall(rb"""^[ \t]*(?:-[ \t]*)?['"]?(?:task|group|tag)['"]?[ \t]*:[ \t]*([^\n#]*)""", text, re.M)
    listed = re.findall(rb"^[ \t]*-[ \t]+([^\s:#][^\n:#]*)$", text, re.M)
    values = (value.decode(errors="replace").strip().strip("[]") for value in (*named, *listed))
    return frozenset(name.strip().strip("'\"") for value in values for name in value.split(","))


def _files() -> list[str]:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return []
    found = ((folder, name) for folder, _, inside in os.walk(Path(spec.origin).with_name("tasks")) for name in inside)
    # what others include ends in _yaml, or has no ending at all
    return [os.path.join(*file) for file in found if "." not in file[1] or file[1].endswith(("yaml", ".yml"))]

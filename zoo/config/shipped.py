"""The configs that come with the package, by name. Reads files and imports nothing heavy: ``zoo list`` answers at once."""

import difflib
import fnmatch
import json
import re
from pathlib import Path
from typing import Any

__all__ = ["CONFIGS", "NUMBERS", "describe", "find_models", "list_models", "shipped"]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NUMBERS = CONFIGS / "numbers.json"
# the folders there that hold models, by their task
_FOLDERS = {
    "causal_lm": "lm", "image_classification": "vision", "sequence_regression": "series", "token_classification": "text",
}  # fmt: skip


def list_models(pattern: str = "*", task: str | None = None) -> list[str]:
    """The names of the shipped configs that match an fnmatch ``pattern``, sorted; with a ``task``, of that alone.

    Raises:
        ValueError: There is no such task.
    """
    if task not in (None, *_FOLDERS):
        raise ValueError(f"list_models(task={task!r}): unknown task. Known: {', '.join(_FOLDERS)}.")
    folders = _FOLDERS.values() if task is None else [_FOLDERS[task]]
    paths = (path for folder in folders for path in (CONFIGS / folder).glob("*.yaml"))
    return sorted(path.stem for path in paths if fnmatch.fnmatchcase(path.stem, pattern))


def shipped(name: str) -> Path | None:
    """The file of a shipped config; ``None`` if there is none of that name."""
    found = (CONFIGS / folder / f"{name}.yaml" for folder in _FOLDERS.values())
    return next((path for path in found if path.is_file()), None)


def find_models(pattern: str) -> list[dict[str, Any]]:
    """Describe each shipped model that matches, for ``zoo list``: name, size, state and a sentence.

    A ``pattern`` without wildcards finds the names that contain it; where nothing matches, a ``ValueError`` says what is near. The sizes
    come from a file beside the configs, which ``zoo list --refresh`` writes and a test compares with the models.
    """
    wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern.lower()}*"
    found = list_models(wild)
    if not found:
        names = list_models()
        families = {name.split("-")[0]: name for name in names}
        near = difflib.get_close_matches(pattern, names, n=3) or difflib.get_close_matches(pattern, families, n=1)
        hint = f" Near to it: {', '.join(near)}." if near else ""
        raise ValueError(f"no model matches {pattern!r}.{hint} `zoo list` prints every name.")
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    return [{"name": name, "about": describe(name), **numbers.get(name, {})} for name in found]


def describe(name: str) -> str:
    """The first sentence of the comment at the head of a shipped config."""
    path = shipped(name)
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    head = " ".join(line.lstrip("# ") for line in lines[: next((i for i, x in enumerate(lines) if x[:1] != "#"), None)])
    return re.split(r"(?<=\.) (?=[A-Z])", head)[0].rstrip(".")

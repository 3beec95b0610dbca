"""Offline evaluation tasks: lm-eval YAMLs beside the seeded generators they draw from.

``generators`` and ``render`` are pure (numpy and text), so that training documents can come from the same functions
in the same format; ``task`` is the one module that imports lm-eval. Evaluation draws from seeds of 2**31 and above,
training from those below.
"""

from pathlib import Path
from typing import Any

import yaml

__all__ = ["FOLDER", "names", "sizes"]

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """The local tasks' names, sorted."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def sizes(name: str) -> dict[str, Any]:
    """What a local task is sized by, with the values it has unless metadata says otherwise; ``{}`` for a task without sizes."""
    return yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), _Plain).get("dataset_kwargs", {})


class _Plain(yaml.SafeLoader):
    """Reads a task's file without importing the functions it names."""


_Plain.add_constructor("!function", lambda loader, node: node.value)

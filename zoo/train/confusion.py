"""The confusion of classes in the best evaluation of a run, in a file of its own beside the log, which holds single numbers alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.publish import write_whole
from .manifest import dumps, is_number, read_json
from .run_folder import CONFUSION

__all__ = ["read_confusion", "write_confusion"]


def write_confusion(folder: Path, step: int, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Write which classes the model of a step took for which, by number: ``[class, taken for, images]`` of all pairs that occurred."""
    write_whole(folder / CONFUSION, dumps({"step": step, "labels": list(labels), "counts": counts}))


def read_confusion(folder: Path) -> dict[str, Any] | None:
    """Return what :func:`write_confusion` has left in a folder; ``None`` where there is none, or something else."""
    try:
        found = read_json(folder / CONFUSION)
        labels, counts = found["labels"], found["counts"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    n = len(labels) if isinstance(labels, list) else 0
    whole = isinstance(counts, list) and all(
        isinstance(c, list) and len(c) == 3 and all(map(is_number, c)) and 0 <= min(c[:2]) and max(c[:2]) < n
        for c in counts
    )
    return found if whole and all(isinstance(label, str) for label in labels) else None

"""Published results, with where they come from, and when they may be laid over one's own."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

__all__ = ["Entry", "Published", "as_loss", "literature", "mismatch", "published_names"]


@dataclasses.dataclass(frozen=True)
class Published:
    """A published curve.

    Attributes:
        label: Its name in a picture.
        source: Who published it, and where.
        protocol: What was measured.
        metric: ``accuracy`` (0 to 1), ``bits_per_byte``, ``nats`` or ``perplexity``.
        points: By attention's share of the mixers or length: ``((x, score), ...)``.
    """

    label: str
    source: str
    protocol: str
    metric: str
    points: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A publication: what it says, and its curves over ``x`` (``"attention"`` or ``"length"``) or its table, where it has one.

    ``task`` holds what a study's task has to be for the curves to be drawn over its own.
    """

    name: str
    source: str
    protocol: str
    says: str
    x: str | None = None
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    curves: tuple[Published, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def published_names() -> list[str]:
    """Return the names of all publications."""
    return list(_known())


def literature(name: str) -> Entry:
    """Return a publication by its name in ``literature.yaml``.

    Raises:
        ValueError: There is none of that name.
    """
    known = _known()
    if name not in known:
        raise ValueError(f"literature: there is no {name!r}. Known are: {', '.join(known)}.")
    found = known[name]
    told = {"source": found["source"], "protocol": found["protocol"]}
    curves = tuple(
        Published(label, **told, metric=found["metric"], points=tuple((float(x), float(y)) for x, y in points))
        for label, points in found.get("curves", {}).items()
    )
    table = found.get("table", {"head": [], "rows": []})
    rows = tuple(tuple(map(str, row)) for row in table["rows"])
    return Entry(
        name,
        **told,
        says=found["says"],
        x=found.get("x"),
        task=found.get("task", {}),
        curves=curves,
        head=tuple(table["head"]),
        rows=rows,
    )


def mismatch(entry: Entry, task: Mapping[str, Any]) -> str | None:
    """Return why an entry's curves do not belong over those of a task, or ``None`` where they do."""
    if not entry.curves:
        return "it has no curves"
    differ = [f"its {key} is {want}, here {task.get(key)}" for key, want in entry.task.items() if task.get(key) != want]
    return "; ".join(differ) or None


def as_loss(metric: str, value: float) -> float | None:
    """Return a score that is a loss in units that differ from its own by a factor alone; ``None`` where it is no loss."""
    if metric == "perplexity":
        return math.log(value)
    return value if metric in ("nats", "bits_per_byte", "loss") else None


@functools.cache
def _known() -> dict[str, Any]:
    found = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("literature.yaml")))
    assert isinstance(found, dict)
    return {str(name): entry for name, entry in found.items()}

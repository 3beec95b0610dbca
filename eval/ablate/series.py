"""The order in a study's points: which axes move attention's share, which points belong to one line, and which are worth a line at all."""

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from ...zoo.tables import in_bytes, in_units
from .cells import Point
from .sections import shown as on_axis
from .sentences import ends
from .statistics import Chosen, Comparison
from .words import share, shown

__all__ = [
    "Series",
    "about",
    "few",
    "fraction",
    "has_ratio",
    "is_number",
    "ratio_axes",
    "series_of",
    "short",
    "short_axes",
    "varying",
]


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one line.

    Attributes:
        name: Their values on the axes that tell it from other lines.
        points: In the order of the grid.
        shared: Those of them that are pure ends and belong to other lines as well.
    """

    name: str
    points: tuple[Chosen, ...]
    shared: tuple[Chosen, ...] = ()


def fraction(chosen: Chosen) -> float | None:
    """Return attention's share of the mixers."""
    return chosen.point.costs.attention_of_mixers if chosen.point.costs else None


def has_ratio(comparison: Comparison) -> bool:
    """Tell whether attention's share takes more values than those of the pure ends."""
    return len({fraction(c) for c in comparison.chosen} - {None}) > 2


def varying(points: Sequence[Point]) -> list[str]:
    """Return the axes on which some points differ."""
    names = dict.fromkeys(axis for p in points for axis in p.axes)
    return [axis for axis in names if len({str(p.axes.get(axis)) for p in points}) > 1]


def ratio_axes(points: Sequence[Point]) -> list[str]:
    """Return the axes that move attention's share when nothing else is changed."""
    moved = set()
    for a, b in combinations([p for p in points if p.costs], 2):
        differ = [axis for axis in a.axes if a.axes[axis] != b.axes.get(axis)]
        if len(differ) == 1 and a.costs.attention_of_mixers != b.costs.attention_of_mixers:  # type: ignore[union-attr]
            moved.add(differ[0])
    return [axis for axis in varying(points) if axis in moved]


def is_number(value: Any) -> bool:
    """Tell whether an axis's value, or its label, is a number."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def series_of(comparison: Comparison, points: Sequence[Point], along: Sequence[str]) -> list[Series]:
    """Return lines of points that differ on the axes ``along``.

    A pure end is the same model wherever its attention would stand, so a grid holds it once: it then belongs to every line.
    """
    apart = [axis for axis in varying([c.point for c in comparison.chosen]) if axis not in along]
    lines: dict[tuple[str, ...], list[Chosen]] = {}
    for c in comparison.chosen:
        lines.setdefault(tuple(on_axis(c.point.axes.get(axis)) for axis in apart), []).append(c)
    only = {end: c for c in comparison.chosen if (end := fraction(c)) in (0.0, 1.0) and _is_only(c, points)}
    # a line of its own would hold the end alone, unless there is nothing but ends
    others = {key: many for key, many in lines.items() if not all(c in only.values() for c in many)}
    lines, only = (others, only) if others else (lines, {})
    out = []
    for key, many in lines.items():
        shared = tuple(
            c for end, c in only.items() if len(lines) > 1 and (c in many or all(fraction(o) != end for o in many))
        )
        name = " ".join(f"{axis}={value}" for axis, value in zip(apart, key, strict=True))
        out.append(Series(name, tuple(dict.fromkeys([*many, *shared])), shared))
    return out


def _is_only(chosen: Chosen, points: Sequence[Point]) -> bool:
    moved = ratio_axes(points)
    built = [p for p in points if p.problem is None]
    return sum(all(p.axes.get(axis) == chosen.point.axes.get(axis) for axis in moved) for p in built) == 1


def few(comparison: Comparison, most: int = 6) -> list[Chosen]:
    """Return the points that pictures with a line for each can hold: the best, the pure ends, and others from all over the grid."""
    if len(comparison.chosen) <= most:
        return list(comparison.chosen)
    models = [c.point for c in comparison.chosen]
    apart = [axis for axis in varying(models) if axis not in ratio_axes(models)]

    def in_line(c: Chosen) -> bool:
        return all(c.point.axes.get(axis) == comparison.best.point.axes.get(axis) for axis in apart)

    kept = [comparison.best, *ends(comparison).values()]
    # of the others, first those that only differ from the best in their share of attention
    for same in (True, False):
        rest = sorted(
            (c for c in comparison.chosen if c not in kept and in_line(c) is same), key=lambda c: fraction(c) or 0.0
        )
        room = min(most - len(dict.fromkeys(kept)), len(rest))
        kept += [rest[int((i + 0.5) * len(rest) / room)] for i in range(room)]
    return [c for c in comparison.chosen if c in kept]


def short_axes(kept: Sequence[Chosen]) -> str:
    """Return the title of a key whose entries are :func:`short`: the axes on which its points differ."""
    return ", ".join(varying([c.point for c in kept]))


def short(chosen: Chosen, kept: Sequence[Chosen]) -> str:
    """Return a point's values on the axes on which the points of a picture differ, or its name where there are none."""
    values = [on_axis(chosen.point.axes.get(axis)) for axis in varying([c.point for c in kept])]
    return ", ".join(values) or chosen.point.name


def about(chosen: Chosen) -> str:
    """Return a tooltip: what a point is, what it scores, and with how many seeds."""
    scores = ", ".join(shown(chosen.metric, v) for v in chosen.tests)
    seeds = f"{chosen.n} seed{'s' * (chosen.n > 1)}"
    said = [
        f"{chosen.point.name}: {shown(chosen.metric, chosen.mean)} ({seeds}: {scores})",
        f"learning rate {chosen.rate:g}",
    ]
    if costs := chosen.point.costs:
        of = costs.attention_of_mixers
        said.append(f"attention {share(of)} of mixers, {share(costs.attention_of_blocks)} of blocks")
        said.append(
            f"{in_units(costs.params)} parameters, state {in_bytes(costs.state_bytes)} at {costs.context:,} tokens"
        )
    return "; ".join(said)

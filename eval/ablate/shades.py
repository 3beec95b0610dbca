"""Tables of shades: attention's share by what else differs, and all tasks of a study."""

import re
from collections.abc import Mapping, Sequence

from .cells import Point
from .drawing import Canvas, canvas, series_colour
from .pictures import Picture, scaled, score_label
from .series import about, fraction, ratio_axes, series_of
from .statistics import Chosen, Comparison
from .words import metric_name, share, shown

__all__ = ["heat_map", "overview"]


def heat_map(comparison: Comparison, points: Sequence[Point]) -> Picture | None:
    """Draw attention's share by what else differs as a table of shades; ``None`` where there are not two such axes."""
    moved = ratio_axes([c.point for c in comparison.chosen])
    lines = series_of(comparison, points, moved)
    columns = sorted({f for c in comparison.chosen if (f := fraction(c)) is not None})
    if len(lines) < 2 or len(columns) < 3 or not moved:
        return None
    rows = [
        (line.name, comparison, {columns.index(f): c for c in line.points if (f := fraction(c)) is not None})
        for line in lines
    ]
    with canvas(84 + 44 * len(lines)) as on:
        _shades(on, rows, [share(f).removesuffix(" %") for f in columns])
        on.axes.set_xlabel("attention, % of the mixers")
        svg = on.svg(
            f"{score_label(comparison.metric)} by attention's share and {' and '.join(line.name for line in lines)}"
        )
    return Picture("heat-map", "Attention's share by what else differs", _shades_note(comparison), svg)


def overview(compared: Sequence[Comparison]) -> Picture:
    """Draw all tasks of a study as a table of shades, a row for each."""
    labels = list(dict.fromkeys(comparison.label(c) for comparison in compared for c in comparison.chosen))
    rows = [
        (comparison.name, comparison, {labels.index(comparison.label(c)): c for c in comparison.chosen})
        for comparison in compared
    ]
    # what stands before values is the same in all, and said once
    axes = ", ".join(re.findall(r"(\w+)=", labels[0]))
    names = [re.sub(r"\w+=", "", label).replace(" ", ", ") for label in labels] if axes else labels
    longest = max(map(len, names))
    upright = longest * len(names) > 34
    with canvas(84 + 44 * len(rows) + (6.5 * longest if upright else 0)) as on:
        _shades(on, rows, names)
        on.axes.tick_params(axis="x", rotation=90 if upright else 0)
        on.axes.set_xlabel(axes)
        svg = on.svg(f"scores of {len(rows)} tasks")
    return Picture("overview", "All tasks", "Shades compare within a row, a task. " + _shades_note(compared[0]), svg)


def _shades(on: Canvas, rows: Sequence[tuple[str, Comparison, Mapping[int, Chosen]]], columns: Sequence[str]) -> None:
    """Draw rows of cells, which are named, compared among each other by their row's comparison, and hold points by their column."""
    from matplotlib.patches import Rectangle

    size = 12 if len(columns) <= 6 else 10 if len(columns) <= 8 else 8
    for y, (_, comparison, cells) in enumerate(rows):
        means = [c.mean for c in comparison.chosen]
        for x, c in cells.items():
            worth = (c.mean - min(means)) / (max(means) - min(means) or 1.0)
            shade = 0.05 + 0.45 * (worth if comparison.higher else 1 - worth)
            cell = Rectangle((x + 0.03, y + 0.04), 0.94, 0.92, fc=series_colour(0), alpha=shade, lw=0)
            on.tip(on.axes.add_patch(cell), about(c))
            middle = {"ha": "center", "va": "center"}
            weight = "bold" if c is comparison.best else "normal"
            text = shown(c.metric, c.mean).removesuffix(" %")
            on.inside(on.axes.text(x + 0.5, y + 0.4, text, fontsize=size, weight=weight, **middle))
            spread = "1 seed" if c.sd is None else f"±{scaled(c.metric, c.sd):.2g}"
            on.inside(on.axes.text(x + 0.5, y + 0.75, spread, fontsize=size - 2, **middle))
    on.axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    on.axes.set_xticks([i + 0.5 for i in range(len(columns))], columns)
    on.axes.set_yticks([i + 0.5 for i in range(len(rows))], [name.replace(" ", "\n") for name, _, _ in rows])
    on.axes.grid(False)
    on.axes.tick_params(length=0)
    on.axes.spines[:].set_visible(False)


def _shades_note(comparison: Comparison) -> str:
    unit = "per cent" if comparison.metric == "accuracy" else metric_name(comparison.metric)
    return (
        f"Means on test in {unit}, and the standard deviation of a seed below them; darker is better, the best is bold."
    )

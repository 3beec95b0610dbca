"""Pictures of scores: against attention's share, against the state, of every point, over two axes, and over learning rates."""

import dataclasses
import math
from collections.abc import Sequence

from .cells import Point
from .drawing import CARD, INK, MARKS, SOFT, Canvas, bytes_axis, canvas, context_axis, series_colour
from .literature import Published
from .series import (
    Series,
    about,
    few,
    has_ratio,
    is_number,
    ratio_axes,
    series_of,
    short,
    short_axes,
    varying,
)
from .statistics import Chosen, Comparison
from .words import metric_name, shown

__all__ = [
    "Picture", "every_point", "few_note", "laid_over", "learning_rates", "noise_note", "scaled", "score_label",
    "score_over",
]  # fmt: skip

_TITLES = {
    "attention_of_mixers": "attention's share", "attention_of_blocks": "attention's share of all blocks", "state_bytes": "state",
    "params": "parameters", "active_params": "active parameters", "flops": "FLOPs of training per token",
}  # fmt: skip
_FILES = {"attention_of_mixers": "attention", "state_bytes": "state", "attention_of_blocks": "attention-of-blocks"}
_NOTES = {"state_bytes": "What a sequence leaves behind: keys and values of attention, states of all else. "}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with its words.

    Attributes:
        name: Of its file.
        title: What it shows.
        note: How to read it.
        svg: The picture.
    """

    name: str
    title: str
    note: str
    svg: str


def score_label(metric: str) -> str:
    """Return the name of an axis of scores."""
    return f"{metric_name(metric)} on test" + (", %" if metric == "accuracy" else "")


def scaled(metric: str, value: float) -> float:
    """Return a score as pictures have it: accuracies in per cent."""
    return 100 * value if metric == "accuracy" else value


def score_over(
    comparison: Comparison, points: Sequence[Point], x: str, published: Sequence[Published] = ()
) -> Picture | None:
    """Draw the score over a cost (``attention_of_mixers``, ``state_bytes``, ...) or an axis of numbers, a line for what else differs.

    Returns ``None`` where points hardly differ in ``x``, or where it is no number.
    """
    places = {c.point.name: place for c in comparison.chosen if (place := _place(c, x)) is not None}
    attention = x == "attention_of_mixers"
    if len(set(places.values())) < (3 if attention else 2):
        return None
    models = [c.point for c in comparison.chosen]
    moved = ratio_axes(models)
    numbers = [a for a in varying(models) if all(is_number(p.axes.get(a)) for p in models)]
    along = moved if attention else [x] if x in models[0].axes else numbers
    if not attention and x not in models[0].axes and has_ratio(comparison):
        along = list(dict.fromkeys([*moved, *numbers]))
    with canvas(250) as on:
        _band(on, comparison)
        for i, line in enumerate(series_of(comparison, points, along)):
            found = sorted((c for c in line.points if c.point.name in places), key=lambda c: places[c.point.name])
            # with two sizes along one line, its points have no order
            _points(on, comparison, line, i, [places[c.point.name] for c in found], found, attention or len(along) == 1)
        for number, curve in enumerate(published):
            xs, ys = zip(*sorted((100 * at, scaled(comparison.metric, y)) for at, y in curve.points), strict=True)
            laid_over(on, curve, xs, ys, number)
        _along(on, comparison, x, list(places.values()))
        on.axes.set(ylabel=score_label(comparison.metric))
        _limits(on, comparison, [y for curve in published for _, y in curve.points])
        on.key("grey, dashed: published" if published else "")
        svg = on.svg(f"{score_label(comparison.metric)} over {_TITLES.get(x, x)}")
    note = (
        _NOTES.get(x, "")
        + "Dots are means over seeds, small dots the seeds, bars 95 % intervals."
        + noise_note(comparison)
    )
    return Picture(f"score-{_FILES.get(x, x)}", f"Score against {_TITLES.get(x, x)}", note, svg)


def every_point(comparison: Comparison) -> Picture:
    """Draw a row for every point with its seeds, mean and interval."""
    rows = comparison.chosen
    models = [c.point for c in rows]
    moved = ratio_axes(models) if has_ratio(comparison) else []
    kinds = [a for a in varying(models) if a not in moved and not all(is_number(p.axes.get(a)) for p in models)]
    values = list(dict.fromkeys(str(c.point.axes.get(kinds[0])) for c in rows)) if kinds else [""]
    with canvas(70 + 34 * len(rows)) as on:
        _band(on, comparison, across=False)
        for row, c in enumerate(rows):
            colour = series_colour(values.index(str(c.point.axes.get(kinds[0]))) if kinds else 0)
            on.axes.text(0.0, row - 0.24, comparison.label(c), transform=on.axes.get_yaxis_transform(), va="center")
            seeds = [scaled(c.metric, v) for v in c.tests]
            on.axes.plot(seeds, [row + 0.2] * c.n, "o", ms=4, mew=0, color=colour, alpha=0.45)
            if bar := _bar(c):
                on.axes.plot(bar, [row + 0.2] * 2, "-", color=colour, lw=1.6)
            (dot,) = on.axes.plot([scaled(c.metric, c.mean)], [row + 0.2], "o", color=colour, mec=CARD)
            on.tip(dot, about(c))
        on.axes.set(xlabel=score_label(comparison.metric), ylim=(len(rows) - 0.5, -0.6), yticks=[])
        on.axes.spines["left"].set_visible(False)
        _limits(on, comparison, across=False)
        on.axes.locator_params(axis="x", nbins=6)  # numbers of five digits beside each other
        svg = on.svg(f"{score_label(comparison.metric)} of every point")
    note = (
        f"Every point at its best learning rate. Colours tell apart {kinds[0]}."
        if kinds
        else "Every point at its best learning rate."
    )
    return Picture("points", "Every point", note + noise_note(comparison), svg)


def learning_rates(comparison: Comparison) -> Picture | None:
    """Draw validation scores over learning rates; ``None`` where every point has a single rate."""
    kept = [c for c in few(comparison) if len(c.tried) > 1 and any(v is not None for v in c.tried.values())]
    if not kept:
        return None
    with canvas(230) as on:
        for i, c in enumerate(kept):
            found = [(rate, scaled(c.metric, v)) for rate, v in c.tried.items() if v is not None]
            style = {"color": series_colour(i), "marker": MARKS[i % len(MARKS)], "label": short(c, kept)}
            (line,) = on.axes.plot(*zip(*found, strict=True), **style, ms=5)
            on.tip(line, f"{c.point.name}: " + ", ".join(f"{rate:g}: {value:.4g}" for rate, value in found))
            if comparison.noise:
                noise = scaled(c.metric, comparison.noise)
                on.axes.errorbar(
                    *zip(*found, strict=True),
                    yerr=noise,
                    fmt="none",
                    ecolor=series_colour(i),
                    alpha=0.4,
                    elinewidth=1.4,
                )
            best = math.nan if (value := c.tried[c.rate]) is None else scaled(c.metric, value)
            on.axes.plot([c.rate], [best], "o", ms=11, mfc="none", mec=series_colour(i), mew=1.5)
        on.axes.set(
            xscale="log",
            xlabel="peak learning rate",
            ylabel=score_label(comparison.metric).replace("test", "validation"),
        )
        rates = sorted({rate for c in kept for rate in c.tried})
        if len(rates) <= 6:
            on.axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            on.axes.minorticks_off()
        on.key(short_axes(kept))
        svg = on.svg("validation score over the learning rate")
    bars = ", bars the noise floor of a seed" if comparison.noise else ""
    note = f"On validation, over the seeds that all rates have; rings are the choices{bars}." + few_note(
        comparison, kept
    )
    return Picture("rates", "Learning rates", note, svg)


def laid_over(on: Canvas, curve: Published, xs: Sequence[float], ys: Sequence[float], number: int) -> None:
    """Draw a published curve so that nobody takes it for one of ours: dashed, in grey, with its source."""
    style = {"color": SOFT, "ls": (0, (3, 2)), "lw": 1.4, "marker": "x+1234"[number % 6], "ms": 7, "mew": 1.4}
    (drawn,) = on.axes.plot(xs, ys, **style, label=curve.label)
    on.tip(drawn, f"{curve.label}: {curve.source}; {curve.protocol}")


def _place(chosen: Chosen, x: str) -> float | None:
    """The place of a point along ``x``; shares in per cent."""
    if x in chosen.point.axes:
        value = chosen.point.axes[x]
        return float(value) if is_number(value) else None
    value = getattr(chosen.point.costs, x, None)
    if x.startswith("attention_of"):
        return None if value is None else 100 * value
    return value or None


def _along(on: Canvas, comparison: Comparison, x: str, places: Sequence[float]) -> None:
    """Label the axis of ``x`` and choose its scale."""
    if x.startswith("attention_of"):
        on.axes.set(xlabel=f"attention, % of {'the mixers' if x.endswith('mixers') else 'all blocks'}", xlim=(-4, 104))
        if x.endswith("mixers"):
            _of_blocks(on, comparison)
    elif x == "state_bytes":
        context = next(c.point.costs.context for c in comparison.chosen if c.point.costs)
        on.axes.set_xlabel(f"state at {context:,} tokens")
        bytes_axis(on.axes, "x")
    else:
        on.axes.set_xlabel(_TITLES.get(x, x))
        context_axis(on.axes, places)


def _points(
    on: Canvas,
    comparison: Comparison,
    line: Series,
    number: int,
    xs: Sequence[float],
    chosen: Sequence[Chosen],
    joined: bool = True,
) -> None:
    """Draw a line's points: seeds, intervals, means; pure ends that it shares are rings in the colour of text."""
    colour, mark = series_colour(number), MARKS[number % len(MARKS)]
    ys = [scaled(c.metric, c.mean) for c in chosen]
    on.axes.plot(xs, ys, "-" if joined else "", color=colour, lw=2, zorder=2)
    for x, y, c in zip(xs, ys, chosen, strict=True):
        own = c not in line.shared
        if own or number == 0:
            shade = colour if own else INK
            on.axes.plot(
                [x] * c.n, [scaled(c.metric, v) for v in c.tests], "o", ms=3.5, mew=0, color=shade, alpha=0.45, zorder=3
            )
            if bar := _bar(c):
                on.axes.plot([x, x], bar, "-", color=shade, lw=1.4, alpha=0.8, zorder=2)
            fill = shade if own else CARD
            (dot,) = on.axes.plot(
                [x], [y], mark if own else "o", color=shade, mfc=fill, mec=CARD if own else INK, zorder=4
            )
            on.tip(dot, about(c))
    if line.name:
        on.axes.plot([], [], "-" if joined else "", color=colour, marker=mark, mec=CARD, label=line.name)
    if number == 0 and line.shared:
        on.axes.plot([], [], "", color=INK, marker="o", mfc=CARD, mec=INK, label="pure ends")


def _bar(chosen: Chosen) -> tuple[float, float] | None:
    if chosen.interval is None:
        return None
    low, high = chosen.interval
    if chosen.metric == "accuracy":
        low, high = max(low, 0.0), min(high, 1.0)
    return scaled(chosen.metric, low), scaled(chosen.metric, high)


def _band(on: Canvas, comparison: Comparison, across: bool = True) -> None:
    """Draw what cannot be told from the best: what noise alone explains of a difference."""
    best, reach = comparison.best, comparison.within(comparison.best, comparison.best)
    if reach is None:
        return
    edge = best.mean - reach if comparison.higher else best.mean + reach
    span = on.axes.axhspan if across else on.axes.axvspan
    band = span(*sorted((scaled(best.metric, edge), scaled(best.metric, best.mean))), color=INK, alpha=0.09, lw=0)
    on.tip(
        band,
        f"Within noise of the best, {best.point.name}: {shown(best.metric, edge)} to {shown(best.metric, best.mean)}",
    )


def noise_note(comparison: Comparison) -> str:
    """Return what a caption says of the band."""
    if comparison.noise is None:
        return " There is no noise floor, as no point has two seeds."
    return " The grey band is within noise of the best."


def few_note(comparison: Comparison, kept: Sequence[Chosen]) -> str:
    """Return what a caption says where a picture does not have all points."""
    return (
        f" {len(kept)} of {len(comparison.chosen)} points; cells.csv has all."
        if len(kept) < len(comparison.chosen)
        else ""
    )


def _of_blocks(on: Canvas, comparison: Comparison) -> None:
    """Put the share of all blocks above the axes, where it is the share of the mixers times one number."""
    costs = [c.point.costs for c in comparison.chosen if c.point.costs and c.point.costs.attention_of_mixers]
    factors = {round(c.attention_of_blocks / c.attention_of_mixers, 6) for c in costs if c.attention_of_mixers}
    if len(factors) != 1 or factors == {1.0}:
        return
    (factor,) = factors
    top = on.axes.secondary_xaxis("top", functions=(lambda x: x * factor, lambda x: x / factor))
    top.set_xlabel("attention, % of all blocks")
    top.spines["top"].set_visible(False)
    top.tick_params(length=0)


def _limits(on: Canvas, comparison: Comparison, more: Sequence[float] = (), across: bool = True) -> None:
    """Set limits by scores, not by intervals, of which those of two seeds are wide."""
    values = [scaled(comparison.metric, v) for v in (*(v for c in comparison.chosen for v in c.tests), *more)]
    if reach := comparison.within(comparison.best, comparison.best):
        best = comparison.best.mean
        values.append(scaled(comparison.metric, best - reach if comparison.higher else best + reach))
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    if comparison.metric == "accuracy":
        low, high = max(low, -2.0), min(high, 102.0)
    (on.axes.set_ylim if across else on.axes.set_xlim)(low, high)

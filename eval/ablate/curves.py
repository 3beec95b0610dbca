"""Pictures with a line for a point: slices of the test and lengths beyond training, speed and memory, losses, and published shapes."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from ...zoo.tables import in_units
from .drawing import MARKS, SOFT, Canvas, bytes_axis, canvas, context_axis, counts_axis, series_colour
from .literature import Published, as_loss
from .pictures import Picture, few_note, laid_over, scaled, score_label
from .series import few, fraction, has_ratio, short, short_axes
from .statistics import Chosen, Comparison, is_finite
from .words import shown

__all__ = ["excess", "losses", "relative_to_best", "slice_scores", "slices", "speeds"]

_SPEEDS = {
    "prefill_tokens_s": ("Reading a prompt", "tokens/s"),
    "decode_tokens_s": ("Writing", "tokens/s"),
    "peak_bytes": ("Peak memory", "bytes"),
    "state_bytes": ("State", "bytes"),
}
_MOST_STEPS = 150


def slice_scores(chosen: Chosen) -> dict[str, list[float]]:
    """Return the scores, a seed each, of every slice of the test: ``{"length=512": [0.98, 0.97]}``."""
    found: dict[str, list[float]] = {}
    for result in chosen.results:
        for name, part in (result.result["test"].get("slices") or {}).items():
            value = part.get(chosen.metric)
            if is_finite(value):
                found.setdefault(name, []).append(float(value))
    return found


def slices(comparison: Comparison, published: Sequence[Published] = ()) -> list[Picture]:
    """Draw the score over each kind of slice that the test has two of, such as pairs or lengths; published curves are over lengths."""
    kept = few(comparison)
    kinds: dict[str, dict[str, dict[Any, list[float]]]] = {}
    for c in kept:
        for name, values in slice_scores(c).items():
            kind, place = _parsed(name)
            kinds.setdefault(kind, {}).setdefault(c.point.name, {})[place] = values
    drawn = [
        _sliced(comparison, kept, kind, lines, published if kind == "length" else ())
        for kind, lines in kinds.items()
        if len({place for line in lines.values() for place in line}) > 1
    ]
    return drawn


def _sliced(
    comparison: Comparison,
    kept: Sequence[Chosen],
    kind: str,
    lines: Mapping[str, Mapping[Any, Sequence[float]]],
    published: Sequence[Published],
) -> Picture:
    # words behind numbers, where a kind has both
    places = sorted(
        {place for line in lines.values() for place in line}, key=lambda place: (isinstance(place, str), place)
    )
    numbers = all(isinstance(place, float) for place in places)
    with canvas(230) as on:
        for i, c in enumerate(kept):
            mine = [(place, lines.get(c.point.name, {}).get(place, [])) for place in places]
            found = [(place if numbers else places.index(place), values) for place, values in mine if values]
            xs, means = [x for x, _ in found], [scaled(c.metric, fmean(values)) for _, values in found]
            _line(
                on,
                i,
                (short(c, kept), c.point.name),
                xs,
                means,
                lambda y, c=c: shown(c.metric, y / scaled(c.metric, 1)),
            )
            spread = [scaled(c.metric, stdev(values)) if len(values) > 1 else 0.0 for _, values in found]
            low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
            on.axes.fill_between(xs, low, high, color=series_colour(i), alpha=0.14, lw=0)
        for i, curve in enumerate(published):
            reached = [(x, y) for x, y in curve.points if x <= 2 * places[-1]]
            laid_over(on, curve, [x for x, _ in reached], [scaled(comparison.metric, y) for _, y in reached], i)
        trained = _trained_length(comparison) if kind == "length" else None
        if numbers:
            context_axis(on.axes, places)
        else:
            on.axes.set_xticks(range(len(places)), [str(place) for place in places])
        if trained is not None:
            on.axes.axvline(trained, color=SOFT, ls="--", lw=1.2, label="training")
        on.axes.set(xlabel=kind, ylabel=score_label(comparison.metric))
        if comparison.metric == "accuracy":
            on.axes.set_ylim(-3, 103)
        on.key(short_axes(kept) + ("; grey, dashed: published" if published else ""))
        svg = on.svg(f"{score_label(comparison.metric)} over {kind}")
    beyond = trained is not None and places[-1] > trained
    title = "Beyond the length of training" if beyond else f"By {kind}"
    return Picture(
        f"slices-{re.sub(r'[^a-z]+', '-', kind.lower())}",
        title,
        f"Means over seeds on parts of the test, in bands of a standard deviation.{few_note(comparison, kept)}",
        svg,
    )


def speeds(comparison: Comparison) -> list[Picture]:
    """Draw throughput and memory over the context, as far as they were measured."""
    kept, drawn = [c for c in few(comparison) if c.speed], []
    for what, (title, unit) in _SPEEDS.items():
        lines = {c.point.name: c.measured(what) for c in kept}
        if not any(len(line) > 1 and all(v > 0 for v in line.values()) for line in lines.values()):
            continue
        with canvas(215) as on:
            for i, c in enumerate(kept):
                found = sorted((x, y) for x, y in lines[c.point.name].items() if y > 0)
                _line(
                    on,
                    i,
                    (short(c, kept), c.point.name),
                    [x for x, _ in found],
                    [y for _, y in found],
                    lambda y: in_units(y),
                )
            context_axis(on.axes, [x for line in lines.values() for x in line])
            if unit == "bytes":
                bytes_axis(on.axes, "y")
            else:
                counts_axis(on.axes)
            on.axes.set(xlabel="context, tokens", ylabel=title.lower() if unit == "bytes" else unit)
            on.key(short_axes(kept))
            svg = on.svg(f"{title} over the context, in {unit}")
        drawn.append(
            Picture(
                f"speed-{what.split('_')[0]}", title, f"Measured once for each point.{few_note(comparison, kept)}", svg
            )
        )
    return drawn


def losses(comparison: Comparison) -> Picture | None:
    """Draw the training losses at the chosen rates, a line for every seed; ``None`` where none are kept."""
    kept = few(comparison)
    lines = {c.point.name: [line for r in c.results if len(line := _history(r.result)) > 1] for c in kept}
    values = [y for many in lines.values() for line in many for _, y in line]
    if not values:
        return None
    with canvas(230) as on:
        for i, c in enumerate(kept):
            for number, line in enumerate(lines[c.point.name]):
                # the first seed stands for all, the others show how far they are from it
                style = {"lw": 1.0, "alpha": 0.35} if number else {"lw": 1.6, "label": short(c, kept)}
                (drawn,) = on.axes.plot(*zip(*line, strict=True), color=series_colour(i), **style)
                seed = c.results[number].cell.seed
                on.tip(drawn, f"{c.point.name}: seed {seed}, learning rate {c.rate:g}, {line[-1][1]:.4g} at the end")
        if min(values) > 0 and max(values) > 10 * min(values):
            on.axes.set_yscale("log")
        on.axes.locator_params(axis="x", nbins=5)
        on.axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,g} k" if x >= 1000 else f"{x:g}")
        on.axes.set(xlabel="steps", ylabel="training loss")
        on.key(short_axes(kept))
        svg = on.svg("training loss over the steps")
    note = f"At the chosen learning rate; further seeds are faint.{few_note(comparison, kept)}"
    return Picture("losses", "Losses", note, svg)


def _history(result: Mapping[str, Any]) -> list[tuple[float, float]]:
    found = [(h["step"], h["loss"]) for h in result.get("history") or [] if is_finite(h.get("loss"))]
    return found[:: max(1, len(found) // _MOST_STEPS)]


def relative_to_best(comparison: Comparison, published: Sequence[Published]) -> Picture | None:
    """Draw losses of other data and units as what they lie over their own best, in per cent; ``None`` where there is nothing to compare.

    Units that differ by a factor, such as bits of a byte and nats of a token, are the same there; a perplexity is taken as its logarithm.
    """
    curves = [curve for curve in published if as_loss(curve.metric, 1.0) is not None]
    if not curves or not has_ratio(comparison) or as_loss(comparison.metric, 1.0) is None:
        return None
    by_share: dict[float, float] = {}
    for c in comparison.chosen:
        if (at := fraction(c)) is not None:
            by_share[at] = min(c.mean, by_share.get(at, c.mean))
    with canvas(240) as on:
        xs, ys = excess(list(by_share.items()), comparison.metric)
        _line(on, 0, ("this study", "this study"), xs, ys, lambda y: f"{y:.2f} %")
        for i, curve in enumerate(curves):
            laid_over(on, curve, *excess(curve.points, curve.metric), i)
        # small models gain more from attention than large ones, whose curves would be one line on an even scale
        on.axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
        on.axes.set(
            xlabel="attention, % of the mixers", ylabel="loss over its own lowest, %", xlim=(-4, 104), ylim=(0, None)
        )
        on.key("grey, dashed: published")
        svg = on.svg("loss over its own lowest, in per cent, over attention's share")
    note = (
        "Data, tokens and sizes differ, so only shapes compare: each curve is over its own lowest, on a scale of square roots; of equal "
        "shares, the best is drawn."
    )
    return Picture("published", "Against published curves", note, svg)


def excess(points: Sequence[tuple[float, float]], metric: str) -> tuple[list[float], list[float]]:
    """Return a curve over shares in per cent: how far each loss lies over the lowest, in per cent of it."""
    found = sorted((100 * x, as_loss(metric, y) or 0.0) for x, y in points)
    low = min(y for _, y in found)
    return [x for x, _ in found], [100 * (y / low - 1) for _, y in found]


def _line(on: Canvas, number: int, names: tuple[str, str], xs: Sequence[float], ys: Sequence[float], say: Any) -> None:
    style = {"color": series_colour(number), "marker": MARKS[number % len(MARKS)], "ms": 5.5}
    (drawn,) = on.axes.plot(xs, ys, **style, label=names[0])
    on.tip(drawn, f"{names[1]}: " + ", ".join(f"{x:,g}: {say(y)}" for x, y in zip(xs, ys, strict=True)))


def _parsed(name: str) -> tuple[str, Any]:
    """The kind of a slice and its place: ``("length", 512.0)`` of ``"length=512"``, ``("length, pairs", "64, 4")`` of two."""
    parts = re.findall(r"([\w ]+?)\s*=\s*([^\s,;]+)", name)
    if not parts:
        return "part", name
    kind, values = ", ".join(key.strip() for key, _ in parts), [value for _, value in parts]
    try:
        numbers = tuple(float(value) for value in values)
    except ValueError:
        return kind, ", ".join(values)
    return kind, numbers[0] if len(numbers) == 1 else _Places(numbers)


class _Places(tuple):
    """Numbers that stand together, sorted as such and read as words."""

    def __str__(self) -> str:
        return ", ".join(f"{value:g}" for value in self)


def _trained_length(comparison: Comparison) -> float | None:
    """The longest length that the task trains on; settings of mixtures begin with it: ``[length, pairs, examples]``."""
    settings = comparison.task.get("settings") or []
    lengths = [comparison.task.get("length"), *(s.get("length") if isinstance(s, Mapping) else s[0] for s in settings)]
    return max((float(n) for n in lengths if isinstance(n, int | float)), default=None)

"""Charts as SVG that stay legible at any width: along x all is a share of the plot, while text, marks and heights are pixels.

A chart takes the font of the page and the width of its column (:meth:`Chart.html`); :func:`picture` puts charts into a file of their
own. Colours are the variables of ``chart.css``, one set for light and one for dark.
"""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

__all__ = ["Bar", "Chart", "Dots", "Mark", "bars", "colour", "dots", "line_chart", "picture", "style"]

_COLOURS = 6
# pixels: of a picture, around it, and beside a curve for the numbers of its axis
_WIDTH, _PAD, _LEFT = 440, 16, 36


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawing that is as wide as where it is put: SVG elements, x in per cent of the plot, y in pixels.

    ``label`` says the same in words, for who cannot see it; ``left`` and ``right`` are pixels beside the plot, for text.
    """

    label: str
    body: str
    height: float
    left: float
    right: float

    def html(self) -> str:
        """Return the chart for a page."""
        return (
            f'<div class="chart" style="padding-left:{self.left:.0f}px;padding-right:{self.right:.0f}px">'
            f'<svg width="100%" height="{self.height:.0f}" role="img" aria-label="{escape(self.label)}">{self.body}</svg></div>'
        )


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of :func:`bars`: its name on the left, its length, ``text`` at its end, and the number of its colour."""

    name: str
    value: float
    text: str
    colour: int


@dataclasses.dataclass(frozen=True)
class Dots:
    """A row of :func:`dots`, one for each of ``values``, with the number of its colour; ``limit`` is a stroke that they cannot pass.

    ``name`` stands above them, ``note`` behind it, and ``text`` on the right.
    """

    name: str
    note: str
    values: tuple[tuple[float, int], ...]
    text: str
    limit: float | None = None


@dataclasses.dataclass(frozen=True)
class Mark:
    """A point of :func:`line_chart` to stand out: where it is, the words beside it, and the number of its colour."""

    x: float
    y: float
    text: str
    colour: int


def line_chart(
    label: str,
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    smoothing: float | Sequence[float] = 0.0,
    marks: Sequence[Mark] = (),
    plot: float = 224,
) -> Chart:
    """Draw curves over an axis of x that starts at 0, each with its name at its end.

    Lines are names with points (x, y), in the order of the colours. Where ``smoothing``, of all or of each, is the weight of the past, in
    [0, 1), a mean is drawn instead of the points, which then show through. ``plot`` is the height between the axes.
    """
    top = 30 if y_label else 10
    bottom = top + plot
    every = [y for _, points in lines for _, y in points]
    low, high = y_range or (min(every), max(every) + (max(every) == min(every)))
    most = max(x for _, points in lines for x, _ in points) or 1
    down = _scale(low, high, bottom, top)
    ticks = [(down(value), _number(value)) for value in _ticks(low, high, 5 if plot > 150 else 3)]
    left = max(_LEFT, 8 + _width(*(text for _, text in ticks)))
    parts, ends = [_text(0, 14, y_label, "soft", dx=-left)] if y_label else [], []
    for y, text in ticks:
        parts += [_stroke("rule", 0, y, 100, y), _text(0, y + 4, text, "soft", "end", -8)]
    for value in _ticks(0, most, 5 if plot > 150 else 3):
        parts.append(_text(100 * value / most, bottom + 18, _number(value), "soft", "middle"))
    if x_label:
        parts.append(_text(0, bottom + 38, x_label, "soft"))
    weights, curves = [smoothing] * len(lines) if isinstance(smoothing, float | int) else smoothing, []
    for i, (_, points) in enumerate(lines):
        xs, ys = zip(*points, strict=True)
        smooth = _smooth(ys, weights[i])
        ends.append(min(max(down(smooth[-1]), top), bottom))
        for kind, values in [("line faint", ys)] * bool(weights[i]) + [("line", smooth)]:
            way = " ".join(f"{1000 * x / most:.1f},{down(y) - top:.1f}" for x, y in zip(xs, values, strict=True))
            curves.append(f'<polyline class="{kind}" style="stroke:{colour(i)}" points="{way}"/>')
    # what is cut off stays inside this one, and it alone is stretched
    parts.append(
        f'<svg y="{top}" width="100%" height="{bottom - top}" viewBox="0 0 1000 {bottom - top}" preserveAspectRatio="none">'
        f"{''.join(curves)}</svg>"
    )
    for mark in marks:
        at, y = 100 * mark.x / most, min(max(down(mark.y), top), bottom)
        parts.append(f'<circle cx="{at:.2f}%" cy="{y:.1f}" r="5" style="fill:{colour(mark.colour)}"/>')
        # over it where there is room, and towards the side that has some
        words = y - 11 if y > top + 12 else y + 20
        parts.append(_text(at, words, mark.text, "strong", "end" if at > 60 else "start", fill=colour(mark.colour)))
    names = [name for name, _ in lines]
    for i, (end, at) in enumerate(zip(ends, _apart(ends, 18, bottom), strict=True) if any(names) else ()):
        link = f'<path class="rule" style="fill:none;stroke:{colour(i)}" d="M2,{end:.1f} L12,{at:.1f}"/>'
        parts.append(f'<svg x="100%" overflow="visible">{link}</svg>')
        parts.append(_text(100, at + 4, names[i], "strong", dx=16, fill=colour(i)))
    # they are bold, and where a page's fonts are missing, wider
    right = 1.25 * _width(*names) + 20 if any(names) else 14
    return Chart(label, "".join(parts), bottom + (46 if x_label else 24), left, right)


def bars(label: str, rows: Sequence[Bar], top: float, reference: tuple[str, float] | None = None) -> Chart:
    """Draw horizontal bars from 0 to ``top``, a row each; ``reference`` is the text and the value of a dashed line across."""
    first, parts = 24 if reference else 2, []
    for i, row in enumerate(rows):
        y = first + 28 * i
        parts.append(_text(0, y + 16, row.name, anchor="end", dx=-10))
        share = 100 * row.value / top
        parts.append(f'<rect y="{y + 3}" width="{share:.2f}%" height="18" rx="2" style="fill:{colour(row.colour)}"/>')
        parts.append(_text(share, y + 16, row.text, "strong", dx=7))
    height, left = first + 28 * len(rows), _width(*(row.name for row in rows)) + 12
    if reference:
        text, value = reference
        at = 100 * value / top
        parts.append(_stroke("reference", at, 20, at, height))
        # towards the side that has room
        parts.append(_text(at, 13, text, "soft", "start" if at < 35 else "end" if at > 65 else "middle"))
    return Chart(label, "".join(parts), height, left, _width(*(row.text for row in rows)) + 8)


def dots(label: str, rows: Sequence[Dots], unit: str) -> Chart:
    """Draw rows of dots, whose values are positive, on one logarithmic scale."""
    every = [math.log10(v) for row in rows for v in (*(v for v, _ in row.values), row.limit) if v]
    low, high = min(every) - 0.05, max(every) + 0.05

    def share(value: float) -> float:
        return _scale(low, high, 0, 100)(math.log10(value))

    height, parts = 42 * len(rows), []
    between = (1, 3) if high - low < 3.5 else (1,)
    for value in (m * 10.0**k for k in range(math.floor(low), math.ceil(high)) for m in between):
        if 0 <= share(value) <= 94:  # the unit takes what is left
            parts.append(_stroke("rule", share(value), 0, share(value), height))
            parts.append(_text(share(value), height + 16, f"{value:,g}", "soft", "middle"))
    parts.append(_text(100, height + 16, unit, "soft", dx=10))
    for i, row in enumerate(rows):
        y = 42 * i
        parts.append(_text(0, y + 14, row.name, note=row.note))
        parts.append(_stroke("join", share(min(row.values)[0]), y + 28, share(max(row.values)[0]), y + 28))
        if row.limit is not None:
            parts.append(_stroke("limit", share(row.limit), y + 20, share(row.limit), y + 36))
        for value, number in reversed(row.values):
            parts.append(f'<circle cx="{share(value):.2f}%" cy="{y + 28}" r="5.5" style="fill:{colour(number)}"/>')
        parts.append(_text(100, y + 32, row.text, "strong", dx=10))
    return Chart(label, "".join(parts), height + 22, 8, _width(*(r.text for r in rows), unit) + 12)


def picture(title: str, panels: Sequence[tuple[str, Chart]], key: Sequence[tuple[str, int | None]] = ()) -> str:
    """Return charts under their headings as one SVG file, whose text can still be read when it is scaled to a phone.

    The key holds names with the numbers of the colours that they have in all panels; None stands for the limit.
    """
    y, parts = 12.0, []
    for line in textwrap.wrap(title, int((_WIDTH - 2 * _PAD) / 9.6)):
        y += 22
        parts.append(f'<text class="title" x="{_PAD}" y="{y}">{escape(line)}</text>')
    if key:
        y += 28
        x = _PAD + 6.0
        for name, number in key:
            if x + 11 + _width(name) > _WIDTH - _PAD:
                x, y = _PAD + 6.0, y + 22
            parts.append(_mark(x, y - 4.5, number) + f'<text x="{x + 11}" y="{y}">{escape(name)}</text>')
            x += 37 + _width(name)
    for heading, chart in panels:
        y += 36
        parts.append(f'<text class="strong" x="{_PAD}" y="{y}">{escape(heading)}</text>')
        width = _WIDTH - 2 * _PAD - chart.left - chart.right
        box = f'x="{_PAD + chart.left:.0f}" y="{y + 12}" width="{width:.0f}" height="{chart.height:.0f}"'
        parts.append(f'<svg {box} overflow="visible">{chart.body}</svg>')
        y += 12 + chart.height
    lines = "\n".join(parts)
    size = f'width="{_WIDTH}" height="{y + _PAD:.0f}" viewBox="0 0 {_WIDTH} {y + _PAD:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" aria-label="{escape(title)}" {size}'
        f' font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif">\n<style>\n{style()}</style>\n'
        f'<rect width="100%" height="100%" rx="8" style="fill:var(--card)"/>\n{lines}\n</svg>\n'
    )


def _mark(x: float, y: float, number: int | None) -> str:
    if number is None:
        return f'<line class="limit" x1="{x}" y1="{y - 7}" x2="{x}" y2="{y + 7}"/>'
    return f'<circle cx="{x}" cy="{y}" r="5.5" style="fill:{colour(number)}"/>'


@functools.cache
def style() -> str:
    """Return the style sheet that charts need, for a page; a picture brings it along."""
    return Path(__file__).with_name("chart.css").read_text(encoding="utf-8")


def colour(number: int) -> str:
    """Return a colour of the series, as CSS."""
    return f"var(--c{number % _COLOURS})"


def _text(
    x: float, y: float, text: str, kind: str = "", anchor: str = "start", dx: float = 0, fill: str = "", note: str = ""
) -> str:
    place = f'x="{x:.2f}%" y="{y:.1f}" dx="{dx:g}" text-anchor="{anchor}" class="{kind}"'
    looks = f' style="fill:{fill}"' if fill else ""
    more = f'<tspan dx="8" style="fill:var(--soft)">{escape(note)}</tspan>' if note else ""
    return f"<text {place}{looks}>{escape(text)}{more}</text>"


def _number(value: float) -> str:
    return f"{value:,.10g}"


def _stroke(kind: str, x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line class="{kind}" x1="{x0:.2f}%" y1="{y0:.1f}" x2="{x1:.2f}%" y2="{y1:.1f}"/>'


def _width(*texts: str) -> float:
    """Pixels that the widest of some texts takes, about."""
    return 7.2 * max(map(len, texts))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most about ``most`` round values from ``low`` to ``high``."""
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= least * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _smooth(values: Sequence[float], weight: float) -> list[float]:
    # an exponential mean that starts at the first value's level
    out, mean, norm = [], 0.0, 0.0
    for v in values:
        mean, norm = weight * mean + (1 - weight) * v, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def _apart(at: Sequence[float], gap: float, most: float) -> list[float]:
    """Positions near those asked for, in their order, ``gap`` apart and at most ``most``."""
    order, out = sorted(range(len(at)), key=at.__getitem__), list(at)
    for a, b in pairwise(order):
        out[b] = max(out[b], out[a] + gap)
    for i in reversed(order):
        out[i] = most = min(out[i], most)
        most -= gap
    return out

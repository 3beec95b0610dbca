"""A picture of which classes a model takes for which, and a table of what it confuses most."""

from collections.abc import Sequence
from html import escape
from typing import Any

from .blocks import table
from .charts import Chart, colour

__all__ = ["MOST", "confusion_blocks", "confusion_chart"]

# of more classes, a picture would have cells too small to read
MOST, _LISTED = 20, 12
_CELL = 30


def confusion_blocks(found: dict[str, Any]) -> list[str]:
    """Return HTML of ``{"step", "labels", "counts": [[class, taken for, images], ...]}``, as a training leaves it."""
    labels, counts = found["labels"], found["counts"]
    right = sum(n for i, j, n in counts if i == j)
    every = sum(n for _, _, n in counts)
    wrong = sorted((c for c in counts if c[0] != c[1]), key=lambda c: -c[2])
    parts = [
        "<h2>Confusion</h2>",
        f'<p class="note">Images that are held out, at step {found["step"]:,.0f}: {right:,.0f} of {every:,.0f} right. Rows are what they '
        "are, columns what they were taken for.</p>",
    ]
    if len(labels) <= MOST:
        return [*parts, f"<figure>{confusion_chart(labels, counts).html()}</figure>"]
    rows = [[labels[i], labels[j], f"{n:,.0f}"] for i, j, n in wrong[:_LISTED]]
    if not rows:
        return parts[:1] + ['<p class="note">Nothing was taken for something else.</p>']
    return [
        parts[0],
        parts[1].replace("Rows", "The most frequent: rows"),
        table(["is", "was taken for", "images"], rows),
    ]


def confusion_chart(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Chart:
    """Draw a matrix: a row for every class, and in it a column for every class that it was taken for, as dark as its share of the row."""
    n, totals, parts = len(labels), [0] * len(labels), []
    for i, _, images in counts:
        totals[i] += images
    width = 100 / n
    for i, name in enumerate(labels):
        y = _CELL * i
        parts.append(_text(0, y + 20, _short(name, 14), "end", -10))
        parts.append(f'<rect y="{y}" width="100%" height="{_CELL - 2}" style="fill:{colour(0)};fill-opacity:.04"/>')
        parts.append(_text((i + 0.5) * width, _CELL * n + 18, _short(name, 5), "middle", kind="soft"))
    for i, j, images in counts:
        share = images / totals[i]
        # what is wrong stands out from what is right
        paint = f"fill:{colour(0 if i == j else 1)};fill-opacity:{0.12 + 0.6 * share:.2f};stroke:var(--card)"
        parts.append(
            f'<rect x="{j * width:.2f}%" y="{_CELL * i}" width="{width:.2f}%" height="{_CELL - 2}" style="{paint}">'
            f"<title>{escape(labels[i])}, taken for {escape(labels[j])}: {images:,.0f}</title></rect>"
        )
        parts.append(_text((j + 0.5) * width, _CELL * i + 19, f"{images:,.0f}", "middle", kind="on"))
    left = 7.2 * max(len(_short(name, 14)) for name in labels) + 12
    words = "; ".join(f"{labels[i]} taken for {labels[j]}: {c:,.0f}" for i, j, c in counts if i != j)
    return Chart(f"Confusion of classes. {words or 'Nothing is confused.'}", "".join(parts), _CELL * n + 26, left, 8)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _text(x: float, y: float, text: str, anchor: str, dx: float = 0, kind: str = "") -> str:
    return f'<text x="{x:.2f}%" y="{y}" dx="{dx:g}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'

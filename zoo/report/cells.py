"""Charts of cells: maps of how much a place counts.

Shades are one colour in steps of opacity, so that they are right on a light page and on a dark one.
"""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from .charts import Chart, colour

__all__ = ["SHADES", "Field", "heat_maps", "pooled", "shade"]

Rows = Sequence[Sequence[float]]
# more of either would be told apart by nobody, and make files large
SHADES, MOST_CELLS = 14, 64

Field = tuple[str, str, Rows]


def heat_maps(label: str, fields: Sequence[Field], height: float = 150, columns: int = 5) -> Chart:
    """Draw maps side by side, each with its name above and a note below.

    Args:
        label: The same in words.
        fields: Names, notes, and values from 0 to 1, row by row; a shade is the square root of the value.
        height: Of each map, in pixels.
        columns: How many stand side by side.
    """
    parts, share = [], 100 / columns
    for i, (name, note, rows) in enumerate(fields):
        x, y = share * (i % columns), (height + 52) * (i // columns)
        h, w = len(rows), len(rows[0])
        parts.append(f'<text class="strong" x="{x:.2f}%" y="{y + 14}">{escape(name)}</text>')
        parts.append(
            f'<svg x="{x:.2f}%" y="{y + 22}" width="{share - 3:.2f}%" height="{height}" viewBox="0 0 {w} {h}" '
            'preserveAspectRatio="xMinYMid meet">'
            f'<rect width="{w}" height="{h}" style="fill:var(--rule);fill-opacity:.45"/>{_shaded(rows)}</svg>'
        )
        parts.append(f'<text class="soft" x="{x:.2f}%" y="{y + height + 40}">{escape(note)}</text>')
    rows_of_maps = -(-len(fields) // columns)
    return Chart(label, "".join(parts), (height + 52) * rows_of_maps, 0, 0)


def pooled(rows: Rows, most: int = MOST_CELLS) -> list[list[float]]:
    """Return a map of at most ``most`` cells in each direction, which are means of those that they cover, with 1 as the largest again."""
    h, w = len(rows), len(rows[0])
    by = max(1, -(-max(h, w) // most))
    cells = [
        [_mean([v for row in rows[i : i + by] for v in row[j : j + by]]) for j in range(0, w, by)]
        for i in range(0, h, by)
    ]
    top = max(map(max, cells)) or 1.0
    return [[v / top for v in row] for row in cells]


def shade(value: float) -> int:
    """Return the step of a value from 0 to 1, up to ``SHADES``: the square root, for what is small to be seen."""
    return round(SHADES * value**0.5)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shaded(rows: Rows) -> str:
    """One path for each shade, of runs along the rows."""
    runs: dict[int, list[str]] = {}
    for i, row in enumerate(rows):
        j = 0
        for step, run in groupby(map(shade, row)):
            n = len(list(run))
            if step:
                runs.setdefault(step, []).append(f"M{j},{i}h{n}v1h-{n}z")
            j += n
    return "".join(
        f'<path shape-rendering="crispEdges" style="fill:{colour(0)};fill-opacity:{step / SHADES:.2f}" d="{"".join(parts)}"/>'
        for step, parts in sorted(runs.items())
    )

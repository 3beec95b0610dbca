"""Reports: one HTML page that needs nothing else, of blocks that any comparison of runs is made from.

Charts are those of :mod:`hybridzoo.zoo.report.charts`. The page follows the reader's light or dark theme and reads on a phone as on a desk.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path

from .charts import colour, style

__all__ = ["card", "facts", "filled", "page", "sample", "table"]


def page(title: str, body: str) -> str:
    """Return a whole page around a body in HTML; the title is the window's."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return filled(template, {"title": escape(title), "style": style(), "body": body})


def filled(template: str, blocks: Mapping[str, str]) -> str:
    """Return a template with HTML in place of every ``{{name}}``."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: blocks[found[1]], template)


def card(title: str, body: str, number: int | None = None) -> str:
    """Return a box with a title; ``number`` is the colour that its subject has in the charts."""
    edge = "" if number is None else f' style="--c:{colour(number)}"'
    return f"<article{edge}><h3>{escape(title)}</h3>{body}</article>"


def sample(name: str, prompt: str, text: str, number: int) -> str:
    """Return a card with what a model wrote after a prompt."""
    return card(name, f'<pre><span class="prompt">{escape(prompt)}</span>{escape(text)}</pre>', number)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], best: Collection[tuple[int, int]] = frozenset()) -> str:
    """Return a table whose first column, with the rows' names, stays in view where there is no room for all.

    ``best`` holds row and column of cells to stand out.
    """
    lines = []
    for i, (name, *cells) in enumerate(rows):
        marks = (' class="best"' if (i, j) in best else "" for j in range(1, len(cells) + 1))
        shown = (f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, cells, strict=True))
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(shown)}</tr>')
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def facts(pairs: Mapping[str, str]) -> str:
    """Return names with what they stand for, for a ``dl``."""
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs.items())

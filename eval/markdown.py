"""Markdown as the README has it: paragraphs wrapped, tables with a line per row."""

import textwrap
from collections.abc import Iterable, Sequence

__all__ = ["paragraph", "table"]


def paragraph(text: str) -> str:
    """``text`` in lines of at most 140 characters."""
    return textwrap.fill(text, 140, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""The tables of ``zoo list`` and ``zoo show``, which a terminal of 80 columns and a pipe both show whole."""

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import printable

if TYPE_CHECKING:
    from .models.macs import Macs
    from .models.stats import Row, Stats

__all__ = ["columns", "fold", "in_bytes", "listed", "output", "shown"]

_WIDE = 150  # columns from which there is room for a sentence about each model


def output() -> Console:
    """Standard output. Where it is no terminal nothing is folded, so that a line is a row for whoever reads it next."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    return console


def columns(*heads: str, left: int = 2) -> Table:
    """An empty table whose first ``left`` columns are texts, and whose others are numbers, which are never broken."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, head in enumerate(heads):
        words = i < left
        table.add_column(head, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    return table


def listed(models: Sequence[dict[str, Any]]) -> None:
    """Print the shipped models."""
    console = output()
    about = console.width >= _WIDE
    table = columns("model", "parameters", "active", "state at 1k", left=1)
    table.columns[0].no_wrap = True
    for head in ("pattern", "what it is") if about else ("pattern",):
        table.add_column(head, overflow="fold")
    for m in models:
        counts = (in_units(m.get(key, 0), "B") for key in ("params", "active_params"))
        rest = [m["about"]] if about else []
        table.add_row(m["name"], *counts, in_bytes(m.get("state_bytes", 0)), m.get("pattern", ""), *rest)
    console.print(table)


def shown(name: str, report: "Stats", state: dict[str, int], counted: "Macs | None" = None) -> None:
    """Print a model's layers and what they cost; of an image model also in the units of papers."""
    console = output()
    some_rest, image = report.active_params != report.params, report.unit == "image"
    active = ["active"] if some_rest else []
    last = [] if image else [f"state at {report.seq_len:,}"]
    table = columns("block", "layer", "parameters", *active, "forward FLOPs", *last)

    def add(block: str, layer: str, rows: Sequence["Row"], **style: Any) -> None:
        params, active = (sum(getattr(row, key) for row in rows) for key in ("params", "active_params"))
        flops, kept = sum(row.flops for row in rows), sum(row.state_bytes for row in rows)
        counts = [f"{params:,}" if params else "", *([in_units(active, "B")] if some_rest else [])]
        table.add_row(Text(block), Text(layer), *counts, in_units(flops), *([] if image else [in_bytes(kept)]), **style)

    at = 0
    for group, times in fold(report.rows):
        everything = report.rows[at : (at := at + len(group) * times)]
        if len(group) == 1:
            add(_span(everything), f"{group[0].token} × {times}".removesuffix(" × 1"), everything)
            continue
        add(_span(everything), f"( {len(group)} blocks ) × {times}", everything)
        for (row,), again in fold(group, longest=1):
            add("", f"  {row.token} × {again}".removesuffix(" × 1"), [row] * again, style="dim")
    table.add_section()
    add("", "all", report.rows, style="bold")
    console.print(Text.assemble((printable(name), "bold"), f"  {report.layers}"))
    console.print(table)
    forward = f"{in_units(report.flops)} forward, {in_units(3 * report.flops)} training"
    console.print(f"weights: {report.dtype}, {in_gigabytes(report.weight_bytes)}")
    if image:
        console.print(f"FLOPs per image of {report.seq_len} x {report.seq_len} pixels: {forward}")
    else:
        console.print(f"FLOPs per token at {report.seq_len:,} tokens: {forward}")
        sizes = [f"{in_bytes(n) or '0 B'} at {int(l):,}" for l, n in state.items()]
        one = sizes[0].split(" at ")[0] + " at any length"
        console.print("state per sequence: " + (one if len(set(state.values())) == 1 else ", ".join(sizes)))
    if counted is not None:
        parts = (
            f"{n / 1e9:.3g} G {of}" for n, of in zip(counted, ("of products", "of scans", "of norms"), strict=True)
        )
        console.print(f"as papers count it: {counted.total / 1e9:.3g} GMACs ({', '.join(parts)})")
    if report.attention_of_mixers is not None:
        shares = (100 * report.attention_of_mixers, 100 * report.attention_of_blocks)
        console.print("attention: {:.1f} % of the sequence mixers, {:.1f} % of all blocks".format(*shares))


def fold(rows: Sequence["Row"], longest: int = 64) -> list[tuple[list["Row"], int]]:
    """Runs of rows, and of groups of rows, that differ in nothing but their index: the group, and how many times it stands there.

    At each row the repetition that leaves out most rows is taken, of equally good ones the shortest group; ``longest`` bounds a group.
    """
    kinds: dict[Row, int] = {}
    plain = [kinds.setdefault(dataclasses.replace(row, index=row.index and 0), len(kinds)) for row in rows]
    out: list[tuple[list[Row], int]] = []
    i = 0
    while i < len(rows):
        found = [(_times(plain, i, p), p) for p in range(1, longest + 1)]
        times, period = max(found, key=lambda best: (best[0] - 1) * best[1])
        out.append((list(rows[i : i + period]), times))
        i += period * times
    return out


def _times(plain: Sequence[int], i: int, period: int) -> int:
    n = 1
    while plain[i + n * period : i + (n + 1) * period] == plain[i : i + period]:
        n += 1
    return n if i + period <= len(plain) else 1


def _span(rows: Sequence["Row"]) -> str:
    first, last = rows[0].index, rows[-1].index
    return "" if first is None else str(first) if first == last else f"{first}-{last}"


def in_units(n: float, giga: str = "G") -> str:
    """A number of three digits and a unit: ``129 M``; nothing for 0. What is counted has billions and no ``giga``."""
    units = ["", " k", " M", f" {giga}", " T"]
    while n >= 999.5 and len(units) > 1:
        n, units = n / 1000, units[1:]
    digits = 0 if units[0] == "" or n >= 99.95 else 1 if n >= 9.995 else 2
    return f"{n:,.{digits}f}{units[0]}" if n else ""


def in_bytes(n: float) -> str:
    """Bytes in powers of 1024; nothing for 0."""
    units = ["B", "KiB", "MiB", "GiB"]
    while n >= 1024 and len(units) > 1:
        n, units = n / 1024, units[1:]
    return f"{n:,.{0 if units[0] == 'B' else 1}f} {units[0]}" if n else ""


def in_gigabytes(n: float) -> str:
    """Bytes in gigabytes, of 10**9, with three digits at least."""
    size = n / 1e9
    return f"{size:,.2f} GB" if size >= 1 else f"{size:.3f} GB" if size >= 0.01 else f"{size:.6f} GB"

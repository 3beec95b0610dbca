"""Benchmark results for people: tables on the terminal, and pictures."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["plot", "shape_text", "show", "spread"]


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result as tables."""
    title = f"{result['what']} on {result['device']}, {result['commit']}"
    rows = result["cases"]
    steps = [row for row in rows if "ours_tokens_s" in row]
    timed = [row for row in rows if "ours_ms" in row and "ours_tokens_s" not in row]
    memory = [row for row in rows if "ours_MB" in row]
    if timed:
        console.print(_timed(timed, title))
    if steps:
        console.print(_steps(steps, title))
    if memory:
        console.print(_memory(memory))
    for name, value in result["ceilings"].items():
        console.print(f"{name} {value:g}", highlight=False)


def shape_text(shape: dict[str, int]) -> str:
    """A shape in a few characters."""
    return " ".join(f"{k}{v}" for k, v in shape.items())


def _columns(table: Table, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ratio(row: dict[str, Any]) -> tuple[str, str]:
    goal = row["goal_ratio"]
    colour = "" if goal is None else "[green]" if row["ratio"] >= goal else "[red]"
    return f"{colour}{row['ratio']:.2f}x", "" if goal is None else f"{goal:g}x"


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def _timed(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    numbers = (
        "ours ms",
        "± iqr",
        "peer ms",
        "ratio",
        "goal",
        "GB/s",
        "floor",
        "host ms",
        "peer host",
        "saved MB",
        "peer",
        "to longest",
    )
    _columns(table, ("case", "shape", "op", "peer"), numbers)
    for row in rows:
        op = row["op"].replace("forward", "fwd").replace("backward", "bwd")
        times = f"{row['ours_ms']:.3f}", f"{row['ours_iqr_ms']:.3f}", f"{row['peer_ms']:.3f}"
        more = (
            _cell(row, "ours_GBs", ".0f"),
            _cell(row, "share_of_floor", ".0%"),
            *(_cell(row, key, ".3f") for key in ("ours_host_ms", "peer_host_ms")),
            *(_cell(row, key, ".1f") for key in ("ours_saved_MB", "peer_saved_MB")),
            _cell(row, "cost_to_longest", ".2f"),
        )
        table.add_row(row["name"], shape_text(row["shape"]), op, row["peer"], *times, *_ratio(row), *more)
    return table


def _steps(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    numbers = ("tokens/s", "spread", "peer", "spread", "ratio", "goal", "GiB", "peer", "ratio", "goal", "losses differ")
    _columns(table, ("model", "ours"), numbers)
    for row in rows:
        cells = [f"{row['ours_tokens_s']:,.0f}", spread(row, "ours")]
        if row.get("peer"):
            met = "[green]" if row["memory_ratio"] <= row["goal_memory_ratio"] else "[red]"
            cells += [f"{row['peer_tokens_s']:,.0f}", spread(row, "peer"), *_ratio(row)]
            cells += [f"{row['ours_GiB']:.2f}", f"{row['peer_GiB']:.2f}"]
            cells += [f"{met}{row['memory_ratio']:.2f}x", f"{row['goal_memory_ratio']:g}x", f"{row['error']:.1e}"]
        else:
            cells += ["", "", "", "", f"{row['ours_GiB']:.2f}"]
        table.add_row(row["name"], row["variant"], *cells)
    return table


def spread(row: dict[str, Any], side: str) -> str:
    """The middle half of a side's times, in per cent of their median; a busy host shows here."""
    return f"{100 * row[f'{side}_iqr_ms'] / row[f'{side}_ms']:.1f} %"


def _memory(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="peak memory of forward + backward", box=box.SIMPLE_HEAD)
    for name in ("l", "peak MB", "kB per token"):
        table.add_column(name, justify="right")
    for row in rows:
        l = row["shape"]["l"]
        table.add_row(str(l), f"{row['ours_MB']:.1f}", f"{1000 * row['ours_MB'] / l:.1f}")
    return table


_OURS, _PEER, _FLOOR = "#0072b2", "#d55e00", "#009e73"


def plot(result: dict[str, Any], path: Path) -> Path:
    """Draw a result: times per case beside the peer's, the floor as a line, and the ratio on top; or training speed.

    Args:
        result: As :func:`hybridzoo.eval.bench.run.run_bench` returns it.
        path: An .svg or .png file.

    Raises:
        ValueError: The result holds nothing to draw.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = _panels(result)
    if not panels:
        raise ValueError(f"bench: {result['what']} has no rows with a peer to draw.")
    style: Any = {"svg.hashsalt": result["what"], "svg.fonttype": "none", "font.size": 9, "axes.axisbelow": True}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 3.2 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        for ax, (title, unit, rows) in zip(axes, panels, strict=True):
            _bars(ax, title, unit, rows)
        figure.suptitle(f"{result['what']} on {result['device']}", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None, dpi=120)
    return path


def _panels(result: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, float, float, float, str]]]]:
    """Title, unit and bars (label, ours, peer, floor, ratio) of every panel."""
    rows = [row for row in result["cases"] if row.get("peer")]
    if result["what"] == "train":
        speed = [
            (f"{r['name']}\n{r['variant']}", r["ours_tokens_s"], r["peer_tokens_s"], 0.0, f"{r['ratio']:.2f}x")
            for r in rows
        ]
        memory = [
            (f"{r['name']}\n{r['variant']}", r["ours_GiB"], r["peer_GiB"], 0.0, f"{r['memory_ratio']:.2f}x")
            for r in rows
        ]
        return [("training", "tokens/s", speed), ("peak memory", "GiB", memory)] if rows else []
    panels = []
    for op in dict.fromkeys(row["op"] for row in rows if row.get("part", "table") == "table"):
        bars = [
            (r["name"], r["ours_ms"], r["peer_ms"], r.get("floor_ms", 0.0), f"{r['ratio']:.1f}x")
            for r in rows
            if r["op"] == op and r.get("part", "table") == "table"
        ]
        panels.append((op, "ms", bars))
    return panels


def _bars(ax: Any, title: str, unit: str, rows: list[tuple[str, float, float, float, str]]) -> None:
    for i, (_, mine, theirs, floor, ratio) in enumerate(rows):
        label = i == 0
        ax.bar(i - 0.2, mine, 0.38, color=_OURS, label="hybridzoo" if label else None)
        ax.bar(i + 0.2, theirs, 0.38, color=_PEER, label="peer" if label else None)
        if floor:
            ax.plot([i - 0.42, i + 0.02], [floor] * 2, color=_FLOOR, linewidth=2, label="floor" if label else None)
        ax.annotate(ratio, (i - 0.2, mine), xytext=(0, 2), textcoords="offset points", ha="center", fontweight="bold")
    ax.set_xticks(range(len(rows)), [row[0] for row in rows])
    ax.margins(y=0.1)  # room for what is written above the highest bar
    if unit == "ms":
        ax.set_yscale("log")
    ax.set_ylabel(unit)
    ax.set_title(title, loc="left")
    ax.grid(axis="y", alpha=0.25, linewidth=0.6)
    ax.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)

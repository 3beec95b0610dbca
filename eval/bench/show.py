"""Benchmark results for people: tables on the terminal, and pictures."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ...zoo.report.charts import Bar, Chart, Dots, bars, dots, picture
from .train import VARIANTS
from .workloads import title

__all__ = ["peer_name", "plot", "shape_text", "show", "spread"]


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result as tables."""
    title = f"{result['what']} on {result['device']}, {result['commit']}"
    if imaged := [row for row in result["cases"] if "ours_images_s" in row]:
        console.print(_images(imaged, title))
    timed = [row for row in result["cases"] if "ours_ms" in row and "ours_images_s" not in row]
    if timed:
        table = _steps if "ours_tokens_s" in timed[0] else _launches if "calls" in timed[0] else _timed
        console.print(table(timed, title))
    if written := [row for row in result["cases"] if "write_tokens_s" in row]:
        console.print(_generated(written, title))
    if trained := [row for row in result["cases"] if "outside_share" in row]:
        console.print(_trained(trained, title))
    if memory := [row for row in result["cases"] if "ours_MB" in row]:
        console.print(_memory(memory))
    if counted := [row for row in result["cases"] if row.get("counted")]:
        console.print(_bytes(counted))
    for name, value in result["ceilings"].items():
        console.print(f"{name} {value:g}", highlight=False)


def shape_text(shape: dict[str, int]) -> str:
    """A shape in a few characters."""
    return " ".join(f"{k}{v}" for k, v in shape.items())


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ratio(row: dict[str, Any]) -> tuple[str, str]:
    goal = row["goal_ratio"]
    colour = "" if goal is None else "[green]" if row["ratio"] >= goal else "[red]"
    return f"{colour}{row['ratio']:.2f}x", "" if goal is None else f"{goal:g}x"


_DETAILS = {
    "ours_GBs": ".0f",
    "share_of_floor": ".0%",
    **dict.fromkeys(("ours_host_ms", "peer_host_ms"), ".3f"),
    **dict.fromkeys(("ours_saved_MB", "peer_saved_MB"), ".1f"),
    "cost_to_longest": ".2f",
}


def _timed(rows: list[dict[str, Any]], title: str) -> Table:
    numbers = "ours ms,± iqr,peer ms,ratio,goal,GB/s,floor,host ms,peer host,saved MB,peer,to longest".split(",")
    table = _table(title, ("case", "shape", "op", "peer"), numbers)
    for row in rows:
        op = row["op"].replace("forward", "fwd").replace("backward", "bwd")
        times = (f"{row[key]:.3f}" for key in ("ours_ms", "ours_iqr_ms", "peer_ms"))
        more = (format(row[key], form) if key in row else "" for key, form in _DETAILS.items())
        table.add_row(row["name"], shape_text(row["shape"]), op, row["peer"], *times, *_ratio(row), *more)
    return table


def _launches(rows: list[dict[str, Any]], title: str) -> Table:
    numbers = ("ours us", "spread", "peer us", "spread", "ratio", "goal", "MB", "TB/s", "of copying", "calls", "differ")
    table = _table(title, ("case", "op", "dtype", "peer"), numbers)
    for row in rows:
        cells = [x for side in ("ours", "peer") for x in (f"{1000 * row[f'{side}_ms']:,.1f}", spread(row, side))]
        cells += [*_ratio(row), f"{row['moved_MB']:,.1f}", f"{row['ours_GBs'] / 1000:.2f}"]
        cells += [f"{row['share_of_floor']:.0%}", str(row["calls"]), f"{row['error']:.1e}"]
        table.add_row(row["name"], row["op"], row["dtype"], row["peer"], *cells)
    table.caption = "\n".join(dict.fromkeys(f"{row['name']}: {row['how']}" for row in rows if "how" in row)) or None
    return table


def _steps(rows: list[dict[str, Any]], title: str) -> Table:
    peer = peer_name(rows[0]["peer"])
    numbers = ("tokens/s", "spread", peer, "spread", "ratio", "goal", "GiB", peer, "ratio", "goal", "losses differ")
    table = _table(title, ("model", "ours"), numbers)
    for row in rows:
        met = "[green]" if row["memory_ratio"] <= row["goal_memory_ratio"] else "[red]"
        cells = [x for side in ("ours", "peer") for x in (f"{row[f'{side}_tokens_s']:,.0f}", spread(row, side))]
        cells += [*_ratio(row), *(f"{row[key]:.2f}" for key in ("ours_GiB", "peer_GiB"))]
        cells += [f"{met}{row['memory_ratio']:.2f}x", f"{row['goal_memory_ratio']:g}x", f"{row['error']:.1e}"]
        table.add_row(row["name"], row["variant"], *cells)
    return table


def _images(rows: list[dict[str, Any]], title: str) -> Table:
    numbers = ("images/s", "spread", "peer", "spread", "ratio", "goal", "GiB", "peer", "ratio", "goal", "logits differ")
    table = _table(title, ("model", "pass", "images", "beside"), numbers)
    for row in rows:
        cells = [x for side in ("ours", "peer") for x in (f"{row[f'{side}_images_s']:,.0f}", spread(row, side))]
        cells += _ratio(row)
        if "ours_GiB" in row:
            colour = "" if "memory_met" not in row else "[green]" if row["memory_met"] else "[red]"
            cells += [f"{row['ours_GiB']:.2f}", f"{row['peer_GiB']:.2f}", f"{colour}{row['memory_ratio']:.2f}x"]
            cells.append(f"{row['goal_memory_ratio']:g}x" if "memory_met" in row else "")
        else:
            cells += [""] * 4
        size = " x ".join(str(row["shape"][k]) for k in "bhw")
        error = f"{row['error']:.1e}" if "error" in row else ""
        table.add_row(row["name"], row["pass"], size, peer_name(row["peer"]), *cells, error)
    return table


def _bytes(rows: list[dict[str, Any]]) -> Table:
    table = _table(
        "bytes of the scans of a forward, counted from shapes",
        ("model",),
        ("ours GB", "published", "least", "to least", "goal"),
    )
    for row in rows:
        colour = "[green]" if row["met"] else "[red]"
        sides = (f"{row[f'{side}_GB']:.2f}" for side in ("ours", "published", "least"))
        table.add_row(row["name"], *sides, f"{colour}{row['to_least']:.2f}x", f"{row['goal_to_least']:g}x")
    return table


def _trained(rows: list[dict[str, Any]], title: str) -> Table:
    numbers = ("tokens/s", "beside packed", "ms a step", "MFU", "GiB", "outside", "real tokens", "rows")
    table = _table(title, ("model", "how"), numbers)
    packed = {row["name"]: row["tokens_s"] for row in rows if row["variant"] == "packed"}
    for row in rows:
        colour = "[green]" if row["outside_met"] else "[red]"
        share = f"{row['tokens_s'] / packed[row['name']]:.2f}x" if row["name"] in packed else ""
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        cells = [f"{row['tokens_s']:,}", share, f"{row['step_ms']:.1f}", mfu, f"{row['peak_GiB']:.1f}"]
        cells += [f"{colour}{row['outside_share']:.1%}", f"{row['real_share']:.0%}", str(row["shape"]["b"])]
        table.add_row(row["name"], row["variant"], *cells)
    return table


def _generated(rows: list[dict[str, Any]], title: str) -> Table:
    numbers = ("parameters", "rows", "context", "read tokens/s", "write tokens/s", "ms a step", "peak GiB", "state MiB")
    table = _table(title, ("model",), ("state", *numbers, "peer", "its tokens/s", "ratio", "goal", "read ratio"))
    for row in rows:
        cells = [
            row.get("state_dtype") or "",
            f"{row['params'] / 1e6:,.1f} M",
            str(row["shape"]["b"]),
            f"{row['shape']['l']:,}",
        ]
        cells += [f"{row['read_tokens_s']:,.0f}", f"{row['write_tokens_s']:,.0f}", f"{row['write_ms']:.2f}"]
        cells += ["" if row["peak_GiB"] is None else f"{row['peak_GiB']:.2f}", f"{row['state_MiB']:,.1f}"]
        if "peer" in row:
            read = f"{row['read_ratio']:.2f}x" if "read_ratio" in row else ""
            cells += [row["peer"], f"{row['peer_write_tokens_s']:,.0f}", *_ratio(row), read]
        table.add_row(row["name"], *cells)
    return table


def spread(row: dict[str, Any], side: str) -> str:
    """The middle half of a side's times, in per cent of their median; a busy host shows here."""
    return f"{100 * row[f'{side}_iqr_ms'] / row[f'{side}_ms']:.1f} %"


def _memory(rows: list[dict[str, Any]]) -> Table:
    table = _table("peak memory of forward + backward", (), ("l", "peak MB", "kB per token"))
    for row in rows:
        l = row["shape"]["l"]
        table.add_row(str(l), f"{row['ours_MB']:.1f}", f"{1000 * row['ours_MB'] / l:.1f}")
    return table


def plot(result: dict[str, Any], path: Path) -> Path:
    """Draw a result into an SVG file, beside its peers': dots of times on a logarithmic scale, or bars of training speed and memory."""
    if path.suffix != ".svg":
        raise ValueError(f"bench plot: writes SVG, and {path} is none. Name a file that ends in .svg.")
    rows = [row for row in result["cases"] if row.get("peer")]
    if result["what"] == "vision":
        rows = [row for row in rows if any(row.get("pass", "").split(",")[0] == what for what, *_ in _IMAGED)]
        # large batches alone: speed is what is drawn
        rows = [row for row in rows if row["shape"]["b"] > 2]
    elif result["what"] != "train":
        rows = [row for row in rows if row.get("part", "table") == "table"]
    if not rows:
        raise ValueError(f"bench: {result['what']} has no rows with a peer to draw.")
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    key: list[tuple[str, int | None]] = [("hybridzoo", 0), *((peer_name(peer), i) for i, peer in enumerate(peers, 1))]
    if any("floor_ms" in row for row in rows):
        key.append(("the least time possible", None))
    panels = {"train": _training, "vision": _imaging}.get(result["what"], _times)(rows, peers)
    titles = {"scan": "The selective scan", "ssd": "Mamba-2's scan", "attention": "Attention", "train": "Training"}
    titles["vision"] = "Image models"
    words = titles[result["what"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture(f"{words} on {result['device']}", panels, key), encoding="utf-8")
    return path


def peer_name(peer: str) -> str:
    """A library's name as its authors write it, or a model's without its size."""
    return peer.removesuffix("_patch4_window7_224").replace("_", "-")


# of image models: the pass, the figure, its unit and its form
_IMAGED = (
    ("training", "images_s", "training, images per second", ",.0f"),
    ("training", "GiB", "training, peak GiB", ".1f"),
    ("forward", "images_s", "inference, images per second", ",.0f"),
)


def _imaging(rows: list[dict[str, Any]], peers: list[str]) -> list[tuple[str, Chart]]:
    panels = []
    for name, (what, key, words, form) in itertools.product(dict.fromkeys(row["name"] for row in rows), _IMAGED):
        # a side is measured once beside every peer; the first time counts
        shown: dict[tuple[str, str], Bar] = {}
        for row in rows:
            if row["name"] != name or row["pass"].split(",")[0] != what or f"ours_{key}" not in row:
                continue
            recorded = "graph" in row["pass"]
            if recorded and key == "GiB":
                continue
            for side, who, colour in (
                ("ours", "hybridzoo", 0),
                ("peer", peer_name(row["peer"]), 1 + peers.index(row["peer"])),
            ):
                value = row[f"{side}_{key}"]
                bar = Bar(who + ", graph" * recorded, value, f"{value:{form}}", colour)
                shown.setdefault((who, row["pass"]), bar)
        if shown:
            heading = f"{name}, {words}"
            rows_of = sorted(shown.values(), key=lambda bar: bar.colour)
            panels.append((heading, bars(heading, rows_of, max(bar.value for bar in rows_of))))
    return panels


def _times(rows: list[dict[str, Any]], peers: list[str]) -> list[tuple[str, Chart]]:
    panels = []
    for op, (i, peer) in itertools.product(dict.fromkeys(row["op"] for row in rows), enumerate(peers, 1)):
        shown = [
            Dots(
                title(row["name"]),
                " × ".join(str(row["shape"][k]) for k in ("b", "l", "d") if k in row.get("shape", {})),
                ((row["ours_ms"], 0), (row["peer_ms"], i)),
                f"{row['ratio']:.1f}x",
                row.get("floor_ms"),
            )
            for row in rows
            if row["op"] == op and row["peer"] == peer
        ]
        if shown:
            heading = op.replace("+", " and ") + (f", beside {peer_name(peer)}" if len(peers) > 1 else "")
            panels.append((heading, dots(f"Milliseconds of {heading}", shown, "ms")))
    return panels


def _training(rows: list[dict[str, Any]], peers: list[str]) -> list[tuple[str, Chart]]:
    panels = []
    shown_of = ("tokens per second", "tokens_s", ",.0f", "ratio"), ("peak GiB", "GiB", ".1f", "memory_ratio")
    for what, key, form, ratio in shown_of:
        for name in dict.fromkeys(row["name"] for row in rows):
            own, shown = [row for row in rows if row["name"] == name], []
            for row in own:
                value = row[f"ours_{key}"]
                shown.append(Bar(VARIANTS[row["variant"]][0], value, f"{value:{form}}  ({row[ratio]:.2f}x)", 0))
            theirs = {row["peer"]: row[f"peer_{key}"] for row in own}
            shown += [Bar(peer_name(p), value, f"{value:{form}}", 1 + peers.index(p)) for p, value in theirs.items()]
            heading = f"{name.replace('-', ' ').title()}, {what}"
            panels.append((heading, bars(heading, shown, max(bar.value for bar in shown))))
    return panels

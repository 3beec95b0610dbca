"""Results of ``zoo bench generate`` as the pages show them: a sentence, a table, and a picture of speed over the context."""

from typing import Any

from ...zoo.report.charts import Chart, line_chart, picture
from ..markdown import table
from ..result_file import Result, Row

__all__ = ["claims", "drawn", "pieces", "sentence"]


def sentence(result: Result, link: str) -> str | None:
    """Say how fast the largest model writes beside mamba-ssm's; ``None`` where nothing was measured beside it."""
    rows = [row for row in result["cases"] if row.get("peer") == "mamba_ssm" and row["shape"]["b"] == 1]
    if not rows:
        return None
    best = max(rows, key=lambda row: (row["params"], -row["shape"]["l"]))
    return (
        f"- **Generation**: {best['name']} writes {best['write_tokens_s']:,.0f} tokens a second, {best['ratio']:.2f} times mamba-ssm's "
        f"(one row on the same {result['device']}; {link})."
    )


def claims(result: Result) -> str | None:
    """Tabulate what the largest models write and keep of one row at the ends of the contexts; ``None`` where there is one."""
    rows = [row for row in result["cases"] if row["shape"]["b"] == 1 and not _guessed(row)]
    if rows:
        part = max(rows, key=lambda row: row["params"])["part"]
        rows = [row for row in rows if row["part"] == part]
    contexts = sorted({row["shape"]["l"] for row in rows})
    if len(contexts) < 2:
        return None
    names = list(dict.fromkeys(row["name"] for row in rows))
    cells = {
        (row["name"], row["shape"]["l"]): f"{row['write_tokens_s']:,.0f}/s, {row['state_MiB']:,.0f} MiB" for row in rows
    }
    lines = [[f"{l:,}", *(cells.get((name, l), "") for name in names)] for l in (contexts[0], contexts[-1])]
    return table(["tokens/s, state at", *names], lines)


def pieces(result: Result, source: str, versions: str, image: str) -> list[str]:
    """Return the section: what was measured, one table per number of rows, and the picture."""
    rows, guessed = ([row for row in result["cases"] if _guessed(row) is it] for it in (False, True))
    judged = [row for row in rows if row.get("goal_ratio")]
    met = sum(row["ratio"] >= row["goal_ratio"] for row in judged)
    text = (
        f"Greedy generation on one {result['device']} ({versions}), bf16 weights: models of nearly the same size at growing contexts, and "
        "where mamba-ssm has the model, its own `generate` with a CUDA graph on the same weights. Reading is the forward of the prompt, "
        "writing a token per row and step once a step has been recorded, memory what both take beyond the weights, and the state what the "
        f"rows leave behind ({source})."
    )
    if judged:
        text += f" {met} of {len(judged)} goals of writing are reached."
    found = [text]
    for several in (False, True):
        if chosen := [row for row in rows if (row["shape"]["b"] > 1) is several]:
            found.append(_table(chosen))
    if guessed:
        found += [
            'On text that repeats its prompt, with guesses looked up in it (`assistant="lookup"`) and without:',
            _guesses(guessed),
        ]
    return [*found, f"![Tokens a second over the context]({image})"] if _panels(result) else found


def _table(rows: list[Row]) -> str:
    return table(
        ["model", "parameters", "rows x context", "state", "MiB", "read, tokens/s", "write, tokens/s", "ms a step", "mamba-ssm", "ratio",
         "of the goal", "reading", "peak GiB"],
        [
            [
                row["name"], f"{row['params'] / 1e6:,.0f} M", f"{row['shape']['b']} x {row['shape']['l']:,}", row["state_dtype"] or "",
                f"{row['state_MiB']:,.0f}", f"{row['read_tokens_s']:,.0f}", f"{row['write_tokens_s']:,.0f}", f"{row['write_ms']:.2f}",
                *_beside(row), "" if row["peak_GiB"] is None else f"{row['peak_GiB']:.1f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def _beside(row: Row) -> list[str]:
    if "ratio" not in row:
        return [""] * 4
    return [f"{row['peer_write_tokens_s']:,.0f}", f"{row['ratio']:.2f}x", _of_goal(row), f"{row['read_ratio']:.2f}x"]


def _of_goal(row: Row) -> str:
    goal = row.get("goal_ratio")
    return f"{100 * row['ratio'] / goal:.0f} % of {goal:g}x" if goal else ""


def _guessed(row: Row) -> bool:
    return row.get("peer") == "no guesses"


def _guesses(rows: list[Row]) -> str:
    return table(
        ["model", "rows x context", "write, tokens/s", "without guesses", "ratio", "of the goal"],
        [
            [
                row["name"], f"{row['shape']['b']} x {row['shape']['l']:,}", f"{row['write_tokens_s']:,.0f}",
                f"{row['peer_write_tokens_s']:,.0f}", f"{row['ratio']:.2f}x", _of_goal(row),
            ]
            for row in rows
        ],
    )  # fmt: skip


def drawn(result: Result) -> str | None:
    """Draw how fast one row is written over its context as an SVG file, a panel for every size; ``None`` where one context was measured."""
    panels = _panels(result)
    return picture(f"Generation on {result['device']}", panels) if panels else None


def _panels(result: Result) -> list[tuple[str, Chart]]:
    found = []
    for part in dict.fromkeys(row["part"] for row in result["cases"]):
        rows = [row for row in result["cases"] if row["part"] == part and row["shape"]["b"] == 1 and not _guessed(row)]
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            _put(lines, row["name"], row, "write_tokens_s")
        for row in (row for row in rows if "ratio" in row):
            _put(lines, f"{row['name'].partition('-')[0]}, mamba-ssm", row, "peer_write_tokens_s")
        if any(len(points) > 1 for points in lines.values()):
            top = 1.05 * max(y for points in lines.values() for _, y in points)
            words = f"Tokens a second over the context, {part}"
            named = [(name, sorted(points)) for name, points in lines.items()]
            found.append((words, line_chart(words, named, "thousand tokens of context", "tokens a second", (0, top))))
    return found


def _put(lines: dict[str, list[tuple[float, float]]], name: str, row: dict[str, Any], key: str) -> None:
    lines.setdefault(name, []).append((row["shape"]["l"] / 1024, row[key]))

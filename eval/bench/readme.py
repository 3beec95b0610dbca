"""The Performance section of the README, written from the committed results: no figure in it is typed by hand."""

import json
from pathlib import Path
from typing import Any

from ..markdown import paragraph, table
from ..parity import run as parity
from .show import plot, spread

__all__ = ["performance", "refresh"]

Result = dict[str, Any]
START, END = "<!-- written by `zoo bench readme` from eval/results -->", "<!-- end of what is written -->"
PARITY = "<!-- written by `zoo bench readme` from eval/results/parity.json -->"


def refresh(readme: Path) -> list[Path]:
    """Write the sections between the marks of a README, and the pictures beside the results they show.

    Args:
        readme: The README of a checkout, whose results are in ``eval/results``.

    Returns:
        What was written.

    Raises:
        ValueError: The marks of the performance section are not there. Those of the checkpoints may be missing.
    """
    text = readme.read_text(encoding="utf-8")
    folder = readme.parent / "eval" / "results"
    if PARITY in text and (folder / "parity.json").exists():
        text = _filled(readme, text, PARITY, parity.section(folder))
    text = _filled(readme, text, START, performance(folder))
    drawn = [plot(result, path.with_suffix(".svg")) for path, result in _results(folder) if _on_gpu(result)]
    readme.write_text(text, encoding="utf-8")
    return [readme, *drawn]


def _filled(readme: Path, text: str, start: str, section: str) -> str:
    before, found, rest = text.partition(start)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"{readme}: has no section between {start!r} and {END!r}.")
    return f"{before}{start}\n\n{section}\n\n{END}{after}"


def performance(folder: Path) -> str:
    """The section as Markdown, from every result in a folder."""
    found = _results(folder)
    pieces = []
    for path, result in found:
        if result["what"] == "scan" and _on_gpu(result):
            pieces += _gpu_scan(path, result)
    for path, result in found:
        if result["what"] == "train":
            pieces += _train(path, result)
    for path, result in found:
        if result["what"] == "scan" and not _on_gpu(result):
            pieces += _cpu_scan(path, result)
    return "\n\n".join(piece if piece.startswith("|") else paragraph(piece) for piece in pieces)


def _results(folder: Path) -> list[tuple[Path, Result]]:
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]


def _on_gpu(result: Result) -> bool:
    return "sfu_Gexps" in result.get("ceilings", {}) or result["what"] == "train"


def _source(path: Path, result: Result) -> str:
    command = result["command"].split(" --part")[0]
    return f"`{command}`, commit {result['commit']}, [figures](eval/results/{path.name})"


def _shape(row: Result) -> str:
    return " x ".join(str(row["shape"][k]) for k in ("b", "l", "d") if k in row["shape"])


def _goal(row: Result) -> str:
    if row.get("goal_ratio") is None:
        return ""
    return f"{row['goal_ratio']:g}x" + ("" if row["met"] else ", missed")


def _versions(result: Result) -> str:
    named = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
    return ", ".join(f"{named.get(k, k)} {v}" for k, v in result["versions"].items() if k != "python")


def _gpu_scan(path: Path, result: Result) -> list[str]:
    rows, top = [row for row in result["cases"] if row.get("peer")], result["ceilings"]
    main = [row for row in rows if row["part"] == "table"]
    more = [row for row in rows if row["part"] != "table"]
    met = sum(bool(row["met"]) for row in main)
    pieces = [
        f"The selective scan on one {result['device']} ({_versions(result)}), bf16, n = 16, gate and softplus fused: medians "
        f"of one process in which both sides take turns, the cache overwritten before every call ({_source(path, result)}). "
        f"The floor is the larger of two times: the bytes that must move, at the {top['copy_TBs']:.2f} TB/s of a copy, and the "
        f"exponentials of the decays, at {top['sfu_Gexps']:,.0f}e9 a second, both measured in the same run. "
        f"{met} of {len(main)} goals are met.",
        table(
            ["case", "b x l x d", "pass", "ours, ms", "mamba-ssm, ms", "ratio", "goal", "of the floor", "saved, MB (theirs)"],
            [
                [
                    row["name"], _shape(row), row["op"], f"{row['ours_ms']:.3f}", f"{row['peer_ms']:.3f}", f"{row['ratio']:.2f}x",
                    _goal(row), f"{100 * row['share_of_floor']:.0f} %",
                    f"{row['ours_saved_MB']:.0f} ({row['peer_saved_MB']:.0f})" if "ours_saved_MB" in row else "",
                ]
                for row in main
            ],
        ),
    ]  # fmt: skip
    picture = path.with_suffix(".svg")
    pieces.append(f"![Times of the scan beside mamba-ssm's](eval/results/{picture.name})")
    if more:
        missed = sum(row["met"] is False for row in more)
        pieces.append(
            f"<details><summary>Walks over images, lengths, state sizes, types, decoding and the convolution: {len(more)} rows, "
            f"{missed} slower than the peer</summary>"
        )
        pieces.append(
            table(
                ["case", "shape", "type", "pass", "peer", "ours, ms", "peer, ms", "ratio", "goal", "per token, to longest"],
                [
                    [
                        row["name"], " ".join(f"{k}={v}" for k, v in row["shape"].items()), row["dtype"], row["op"], row["peer"],
                        f"{row['ours_ms']:.4f}", f"{row['peer_ms']:.4f}", f"{row['ratio']:.2f}x", _goal(row),
                        f"{row['cost_to_longest']:.2f}" if "cost_to_longest" in row else "",
                    ]
                    for row in more
                ],
            )
        )  # fmt: skip
        pieces.append("</details>")
    return pieces


def _train(path: Path, result: Result) -> list[str]:
    rows = result["cases"]
    shape = rows[0]["shape"]
    return [
        f"A training step of whole models on one {result['device']} ({_versions(result)}), b = {shape['b']}, l = {shape['l']}, "
        f"bf16 autocast, fused AdamW, beside mamba-ssm's own `MambaLMHeadModel` from the same weights ({_source(path, result)}). "
        "Spread: the middle half of the steps' times over their median; what is wide waits for its host.",
        table(
            ["model", "ours", "tokens/s", "spread", "mamba-ssm", "spread", "ratio", "goal", "GiB", "mamba-ssm", "ratio", "goal"],
            [
                [
                    row["name"], row["about"], f"{row['ours_tokens_s']:,}", spread(row, "ours"), f"{row['peer_tokens_s']:,}",
                    spread(row, "peer"), f"{row['ratio']:.2f}x", _goal(row),
                    f"{row['ours_GiB']:.1f}", f"{row['peer_GiB']:.1f}", f"{row['memory_ratio']:.2f}x",
                    f"{row['goal_memory_ratio']:g}x" + ("" if row["memory_met"] else ", missed"),
                ]
                for row in rows
            ],
        ),
    ]  # fmt: skip


def _cpu_scan(path: Path, result: Result) -> list[str]:
    timed = [row for row in result["cases"] if row.get("peer")]
    memory = [row for row in result["cases"] if "ours_MB" in row]
    ends = [f"{row['ours_MB']:.0f} MB at l = {row['shape']['l']}" for row in (memory[0], memory[-1])] if memory else []
    return [
        f"The selective scan on a CPU ({result['device']}, torch {result['versions']['torch']}), fp32, medians of one process "
        f"in which both sides take turns ({_source(path, result)}). "
        f"transformers' torch path has a backward that is quadratic in the length; ours is linear, in memory too"
        + (f": {', '.join(ends)} (b = 1, d = 512, n = 16)." if ends else "."),
        table(
            ["b, l, d, n", "pass", "peer", "ours, ms", "peer, ms", "ratio"],
            [
                [
                    ", ".join(str(v) for v in row["shape"].values()), row["op"], row["peer"], f"{row['ours_ms']:.0f}",
                    f"{row['peer_ms']:.0f}", f"{row['ratio']:.1f}x",
                ]
                for row in timed
            ],
        ),
    ]  # fmt: skip

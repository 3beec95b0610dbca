"""Figures in README and docs, written from the committed results: none of them is typed by hand."""

import json
from collections import Counter
from pathlib import Path

from ...zoo.report.explained import explained_picture
from ...zoo.report.training import training_picture
from ..demo.overview import overview
from ..markdown import paragraph, table
from ..parity.run import table as parity_table
from ..result_file import Result
from . import written, written_ssd
from .show import peer_name, plot, spread
from .workloads import title
from .written_ssd import of_goal

__all__ = ["END", "PAGES", "START", "checkpoints", "headline", "performance", "refresh", "section"]

START, END = "<!-- written by `zoo bench readme` from eval/results -->", "<!-- end of what is written -->"


def refresh(readme: Path) -> list[Path]:
    """Write the section between the marks of every page of a checkout, and its pictures, from ``eval/results``; return what was written.

    Raises:
        ValueError: The marks of a page are not there; nothing is written then.
    """
    root, texts = readme.parent, {}
    for page in PAGES:
        path = root / page
        before, start, rest = path.read_text(encoding="utf-8").partition(START)
        _, end, after = rest.partition(END)
        if not start or not end:
            raise ValueError(f"{path}: has no section between {START!r} and {END!r}.")
        texts[path] = f"{before}{start}\n\n{section(root, page)}\n\n{end}{after}"
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    folder = root / "eval" / "results"
    shown = [
        *_results(folder, "scan", gpu=True),
        *_results(folder, "train"),
        *_results(folder, "vision", device="NVIDIA"),
    ]
    drawn = [plot(result, path.with_suffix(".svg")) for path, result in shown]
    for path, result in _results(folder, "generate", device="NVIDIA"):
        if (drawing := written.drawn(result)) is not None:
            drawn.append(path.with_suffix(".svg"))
            drawn[-1].write_text(drawing, encoding="utf-8")
    for what, name, draw in _PICTURES:
        for _, result in _results(folder, what):
            drawn.append(root / "docs" / name)
            drawn[-1].write_text(draw(result), encoding="utf-8")
    return [*texts, *drawn]


def section(root: Path, page: str) -> str:
    """The section of one of :data:`PAGES` as Markdown, with links that work from there."""
    up = "../" * page.count("/")
    return PAGES[page](root / "eval" / "results").replace("](eval/", f"]({up}eval/")


def headline(folder: Path) -> str:
    """The figures of the README, a line each: the scan, a training step, generation, images, checkpoints."""
    lines = []
    for path, result in _results(folder, "scan", gpu=True):
        rows = [row for row in result["cases"] if row["part"] == "table"]
        ratios = [row["ratio"] for row in rows if row["name"].startswith("train")]
        slow = min(rows, key=lambda row: row["ratio"])
        lines.append(
            f"- **Scan**: {min(ratios):.1f} to {max(ratios):.1f} times as fast as mamba-ssm's in training (bf16, {result['device']}); "
            f"at its least {slow['ratio']:.2f} times ({title(slow['name'])}; [figures](eval/results/{path.name}))."
        )
    for path, result in sorted(_results(folder, "train"), key=lambda pair: pair[1]["date"])[-1:]:
        # of the largest model, whose steps wait least for a host, ours or theirs
        best = max(result["cases"], key=lambda row: (row["params"], row["ratio"]))
        lines.append(
            f"- **Training step**: {best['ratio']:.2f} times mamba-ssm's tokens per second in {best['memory_ratio']:.2f} of its memory "
            f"({best['name']} on the same GPU, {best['about'].split(' (')[0]}; [figures](eval/results/{path.name}))."
        )
    for path, result in _results(folder, "trainer"):
        by = {(row["name"], row["variant"]): row for row in result["cases"]}
        packed, plain = by.get(("mamba-130m", "packed")), by.get(("mamba-130m", "plain"))
        if packed and plain:
            lines.append(
                f"- **`zoo train`**: {packed['tokens_s']:,} tokens of real text a second on one {result['device']}, "
                f"{packed['tokens_s'] / plain['tokens_s']:.2f} times a plain loop of transformers' Trainer around the same model "
                f"(mamba-130m, packed; [figures](eval/results/{path.name}))."
            )
    for path, result in _results(folder, "generate", device="NVIDIA"):
        lines += filter(None, [written.sentence(result, f"[figures](eval/results/{path.name})")])
    for path, result in _results(folder, "vision", device="NVIDIA"):
        rows = [row for row in result["cases"] if row.get("peer") == "published" and row["pass"] == "training, graph"]
        if rows:
            row = rows[0]
            lines.append(
                f"- **Images**: {row['name']} trains on {row['ours_images_s']:,.0f} images of {row['shape']['h']} x {row['shape']['w']} a "
                f"second, {row['ratio']:.2f} times the published structure on mamba-ssm's scan, in {row['memory_ratio']:.2f} of its memory "
                f"(both recorded as CUDA graphs, {result['device']}; [figures](eval/results/{path.name}))."
            )
    for path, result in _results(folder, "parity"):
        errors = [max(row["logit_error"], row["decoding_error"]) for row in result["cases"]]
        families = {row["family"] for row in result["cases"]}
        lines.append(
            f"- **Checkpoints**: {len(families)} families of transformers' give its logits within {max(errors):.0e}, and are written "
            f"back bit for bit ([figures](eval/results/{path.name}))."
        )
    tables = [written.claims(result) for _, result in _results(folder, "generate", device="NVIDIA")]
    return "\n\n".join(["\n".join(lines), *filter(None, tables)])


def performance(folder: Path) -> str:
    """Times of ops and training steps beside other implementations, from every result in a folder."""
    pieces = [
        *(piece for path, result in _results(folder, "scan", gpu=True) for piece in _gpu_scan(path, result)),
        *(piece for path, result in _results(folder, "ssd", gpu=True) for piece in _gpu_ssd(path, result)),
        *(piece for path, result in _results(folder, "train") for piece in _train(path, result)),
        *(piece for path, result in _results(folder, "trainer") for piece in _trainer(path, result)),
        *(piece for path, result in _results(folder, "generate", device="NVIDIA") for piece in _generate(path, result)),
        *(piece for path, result in _results(folder, "vision", device="NVIDIA") for piece in _vision(path, result)),
        *(piece for path, result in _results(folder, "attention", gpu=True) for piece in _attention(path, result)),
        *(piece for path, result in _results(folder, "scan", gpu=False) for piece in _cpu_scan(path, result)),
    ]
    return "\n\n".join(piece if piece.startswith("|") else paragraph(piece) for piece in pieces)


_OUTCOMES = ("equal", "refused", "silent")


def checkpoints(folder: Path) -> str:
    """Distances from transformers' own classes, and the outcomes of configs drawn at random."""
    ((_, result),) = _results(folder, "parity")
    text = (
        f"Random weights in transformers {result['versions']['transformers']}'s own classes, saved, read by us, and written back "
        f"(`{result['command']}`, torch {result['versions']['torch']}, fp32 on a CPU, commit {result['commit']}, "
        "[figures](eval/results/parity.json)). Errors are the worst of all shapes, relative to the largest value: of the logits, in one "
        "pass and in 20 decoded steps, and of any parameter's gradient. Written back means the same tensors, bit for bit, which "
        "transformers loads with no key missing or left over."
    )
    for _, fuzz in _results(folder, "parity_fuzz"):
        edits, exports = (
            Counter({kind: sum(row.get(kind, 0) for row in fuzz["cases"] if row["op"] == op) for kind in _OUTCOMES})
            for op in ("edit", "export")
        )
        same, refused, wrong = ((edits + exports)[kind] for kind in _OUTCOMES)
        text += (
            f" Beyond these shapes, `{fuzz['command']}` edits single fields of their configs ({edits.total():,} that transformers can "
            f"compute) and writes random options of ours ({exports['equal'] + exports['silent']:,}): {same:,} gave the same logits, "
            f"{refused:,} were refused by name, {wrong} differed silently."
        )
    return f"{paragraph(text)}\n\n{parity_table(result)}"


_PICTURES = (
    ("demo", "demo.svg", overview),
    ("tutorial", "train.svg", training_picture),
    ("fields", "fields.svg", lambda result: explained_picture(result["explained"])),
)
PAGES = {"README.md": headline, "docs/performance.md": performance, "docs/checkpoints.md": checkpoints}


def _results(folder: Path, what: str, gpu: bool | None = None, device: str = "") -> list[tuple[Path, Result]]:
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    found = [(p, r) for p, r in found if r["what"] == what and r["device"].startswith(device)]
    return [(p, r) for p, r in found if gpu in (None, "sfu_Gexps" in r.get("ceilings", {}))]


def _source(path: Path, result: Result) -> str:
    command = result["command"].split(" --part")[0]
    commits = dict.fromkeys([result["commit"], *(row["commit"] for row in result["cases"] if "commit" in row)])
    named = f"commit{'s' if len(commits) > 1 else ''} {' and '.join(commits)}"
    return f"`{command}`, {named}, [figures](eval/results/{path.name})"


def _versions(result: Result) -> str:
    # what is torch's own has no version of its own
    there = {k: v for k, v in result["versions"].items() if k != "python" and v != "not installed"}
    return ", ".join(f"{peer_name(k)} {v}" for k, v in there.items())


def _gpu_scan(path: Path, result: Result) -> list[str]:
    top = result["ceilings"]
    rows = [row for row in result["cases"] if row.get("peer")]
    main, more = ([row for row in rows if (row["part"] == "table") is shown] for shown in (True, False))
    slower = sum(row["ratio"] < 1 for row in more)
    return [
        f"The selective scan on one {result['device']} ({_versions(result)}), bf16, n = 16, gate and softplus fused: medians "
        f"of one process in which both sides take turns, the cache overwritten before every call ({_source(path, result)}). "
        f"The floor is the larger of two times: the bytes that must move, at the {top['copy_TBs']:.2f} TB/s of a copy, and the "
        f"exponentials of the decays, at {top['sfu_Gexps']:,.0f}e9 a second, both measured in the same run. "
        f"{sum(row['met'] for row in main)} of {len(main)} goals are reached.",
        table(
            ["case", "pass", "ratio", "of the goal", "ours, ms", "theirs, ms", "of the floor", "saved, MB (theirs)", "b x l x d"],
            [
                [
                    title(row["name"]), row["op"], f"{row['ratio']:.2f}x", of_goal(row), f"{row['ours_ms']:.3f}",
                    f"{row['peer_ms']:.3f}", f"{100 * row['share_of_floor']:.0f} %",
                    f"{row['ours_saved_MB']:.0f} ({row['peer_saved_MB']:.0f})" if "ours_saved_MB" in row else "",
                    " x ".join(str(row["shape"][k]) for k in "bld"),
                ]
                for row in main
            ],
        ),
        f"![Times of the scan beside mamba-ssm's](eval/results/{path.stem}.svg)",
        f"<details><summary>Walks over images, lengths, state sizes, types, decoding and the convolution: {len(more)} rows, "
        f"{slower} slower than the other library</summary>",
        table(
            ["case", "pass", "type", "beside", "ratio", "ours, ms", "theirs, ms", "per token, to longest", "shape"],
            [
                [
                    title(row["name"]), row["op"], row["dtype"], peer_name(row["peer"]), f"{row['ratio']:.2f}x",
                    f"{row['ours_ms']:.4f}", f"{row['peer_ms']:.4f}",
                    f"{row['cost_to_longest']:.2f}" if "cost_to_longest" in row else "",
                    " ".join(f"{k}={v}" for k, v in row["shape"].items()),
                ]
                for row in more
            ],
        ),
        "</details>",
    ]  # fmt: skip


def _gpu_ssd(path: Path, result: Result) -> list[str]:
    return written_ssd.pieces(result, _source(path, result), _versions(result))


def _train(path: Path, result: Result) -> list[str]:
    rows = result["cases"]
    shape = rows[0]["shape"]
    return [
        f"A training step of whole models on one {result['device']} ({_versions(result)}), b = {shape['b']}, l = {shape['l']}, "
        f"bf16 autocast, fused AdamW, beside mamba-ssm's own `MambaLMHeadModel` from the same weights ({_source(path, result)}). "
        "Spread: the middle half of the steps' times over their median; what is wide waits for its host.",
        table(
            ["model", "ours", "tokens/s", "spread", "mamba-ssm", "spread", "ratio", "of the goal", "GiB", "mamba-ssm", "ratio", "at most"],
            [
                [
                    row["name"], row["about"], f"{row['ours_tokens_s']:,}", spread(row, "ours"), f"{row['peer_tokens_s']:,}",
                    spread(row, "peer"), f"{row['ratio']:.2f}x", of_goal(row),
                    f"{row['ours_GiB']:.1f}", f"{row['peer_GiB']:.1f}", f"{row['memory_ratio']:.2f}x",
                    f"{row['goal_memory_ratio']:g}x",
                ]
                for row in rows
            ],
        ),
    ]  # fmt: skip


def _trainer(path: Path, result: Result) -> list[str]:
    rows = result["cases"]
    return [
        f"`zoo train` itself on one {result['device']} ({_versions(result)}), rows of {rows[0]['shape']['l']:,} tokens, bf16 autocast, on "
        "Python's own documentation, a document per topic and per module, as bytes in the models' own vocabularies. Tokens are real ones, "
        "without padding; time is from step to step, with everything between; memory is what was reserved. MFU counts three forwards per "
        f"real token, attention over its own document ({_source(path, result)}).",
        table(
            ["model", "how", "tokens/s", "ms a step", "MFU", "GiB", "outside the step", "real tokens", "rows"],
            [
                [
                    row["name"], row["about"], f"{row['tokens_s']:,}", f"{row['step_ms']:.1f}",
                    "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %", f"{row['peak_GiB']:.1f}",
                    f"{100 * row['outside_share']:.1f} %", f"{100 * row['real_share']:.0f} %", str(row["shape"]["b"]),
                ]
                for row in rows
            ],
        ),
    ]  # fmt: skip


def _vision(path: Path, result: Result) -> list[str]:
    rows = [row for row in result["cases"] if "ours_images_s" in row]
    counted = [row for row in result["cases"] if row.get("counted")]
    judged = [row for row in rows if row.get("goal_ratio")]
    bytes_of = "; ".join(
        f"{row['name']} {row['ours_GB']:.2f} GB, {row['to_least']:.1f} times the least possible {row['least_GB']:.2f} GB "
        f"(the published structure {row['published_GB']:.2f} GB)"
        for row in counted
    )
    return [
        f"Image models on one {result['device']} ({_versions(result)}), bf16 autocast, beside VMamba as it is published (four copies of "
        "every map, mamba-ssm's scan, sums in float32; our weights, the same logits) and timm's models, in turns in one process. Memory is "
        f"a side's own, weights and all ({_source(path, result)}). {sum(row['met'] for row in judged)} of {len(judged)} goals of speed are "
        "reached.",
        table(
            ["model", "pass", "images", "beside", "images/s", "theirs", "ratio", "of the goal", "GiB", "theirs", "ratio"],
            [
                [
                    row["name"], row["pass"], " x ".join(str(row["shape"][k]) for k in "bhw"), peer_name(row["peer"]),
                    f"{row['ours_images_s']:,.0f}", f"{row['peer_images_s']:,.0f}", f"{row['ratio']:.2f}x",
                    of_goal(row) if row.get("goal_ratio") else "",
                    *(f"{row[key]:.2f}" if key in row else "" for key in ("ours_GiB", "peer_GiB")),
                    f"{row['memory_ratio']:.2f}x" if "memory_ratio" in row else "",
                ]
                for row in rows
            ],
        ),
        *([f"Bytes that the scans of a forward move for 128 images, counted from shapes: {bytes_of}."] if counted else []),
        f"![Images per second beside other models]({'eval/results/' + path.stem}.svg)",
    ]  # fmt: skip


def _generate(path: Path, result: Result) -> list[str]:
    return written.pieces(result, _source(path, result), _versions(result), f"eval/results/{path.stem}.svg")


def _attention(path: Path, result: Result) -> list[str]:
    return [
        f"Attention between its projections on one {result['device']} ({_versions(result)}), bf16, causal: the backend that is chosen by "
        f"itself beside every other one that can do the call, outputs and gradients compared first ({_source(path, result)}). For packed "
        "rows, the host knows where documents start, which spares `sdpa` the masks.",
        table(
            ["case", "pass", "taken", "ms", "beside", "ms", "ratio"],
            [
                [
                    title(row["name"]), row["op"], row["backend"], f"{row['ours_ms']:.3f}", row["peer"], f"{row['peer_ms']:.3f}",
                    f"{row['ratio']:.2f}x",
                ]
                for row in result["cases"]
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
            ["b, l, d, n", "pass", "beside", "ours, ms", "theirs, ms", "ratio"],
            [
                [
                    ", ".join(str(v) for v in row["shape"].values()), row["op"], row["peer"], f"{row['ours_ms']:.0f}",
                    f"{row['peer_ms']:.0f}", f"{row['ratio']:.1f}x",
                ]
                for row in timed
            ],
        ),
    ]  # fmt: skip

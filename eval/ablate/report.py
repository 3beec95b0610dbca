"""The report of a study: one page that needs nothing else, pictures as files, and tables as CSV and JSON, from its results alone."""

import json
import re
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...zoo.checkpoint.publish import write_whole
from ...zoo.report.blocks import page
from ...zoo.train.manifest import plain
from .cells import Point
from .curves import losses, relative_to_best, slices, speeds
from .drawing import alone
from .frame import cell_rows, csv_text, point_rows
from .literature import Entry, Published, literature, mismatch
from .pictures import Picture, every_point, learning_rates, score_over
from .sentences import three_sentences
from .shades import heat_map, overview
from .statistics import Comparison, choose, comparisons
from .tables import doubts, figures, named, origins, point_table, published, settings, troubles, waiting_table

if TYPE_CHECKING:
    from .schema import StudySpec
    from .store import Failure, Result

__all__ = ["PAGE", "sentences", "write_report"]

PAGE = "report.html"
_HERE = Path(__file__).parent


def sentences(points: Sequence[Point], results: Sequence["Result"]) -> list[str]:
    """Return what a study has found in three plain sentences: the best point, the basin around it, and what it costs."""
    return three_sentences(comparisons(choose(results)), points)


def write_report(
    spec: "StudySpec",
    points: Sequence[Point],
    results: Sequence["Result"],
    failures: Sequence["Failure"],
    out: Path,
    folder: Path | None = None,
) -> Path:
    """Write a study's report into a folder: ``report.html``, its pictures as SVG, ``cells.csv``, ``points.csv`` and ``report.json``.

    All of it is made before anything is written, and the page last, so an error leaves an earlier report as it was.

    Args:
        spec: The study.
        points: All of its points, with those that cannot be built.
        results: What is trained so far, maybe nothing.
        failures: Cells that failed for good.
        out: The folder, made where it is missing.
        folder: The study's own, where it is not the default.

    Returns:
        The path of the page.

    Raises:
        ValueError: ``out`` is a file; or a result, or the literature that the study names, cannot be read.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if out.is_file() or out.suffix == ".html":
        raise ValueError(f"{out}: is not a folder. The report is several files; give a folder for them.")
    compared = comparisons(choose(results))
    entries = [literature(name) for name in spec.report.get("literature") or []]
    drawn = {title: _pictures(title, spec, points, compared, entries) for title in _SECTIONS}
    found = three_sentences(compared, points)
    facts = settings(spec) | origins(results)
    files = {
        "cells.csv": csv_text(cell_rows(results, points)),
        "points.csv": csv_text(point_rows(points, compared)),
        "report.json": _json(spec, found, compared, points, failures, facts),
    }
    files |= {f"{p.name}.svg": alone(p.svg) for pictures in drawn.values() for p in pictures}
    body = "\n".join(
        [
            _top(spec, found, compared, points, results, failures),
            *(_section(title, pictures) for title, pictures in drawn.items() if pictures),
            *_points(compared),
            waiting_table(points, compared),
            published(entries, compared),
            troubles(points, failures),
            _bottom(spec, facts, list(files), folder),
        ]
    )
    html = page(f"hybridzoo: {spec.name}", body)
    for name, text in files.items():
        write_whole(out / name, text)
    write_whole(out / PAGE, html)
    for picture in out.glob("*.svg"):
        # of an earlier report that had more of them
        if picture.name not in files:
            picture.unlink()
    return out / PAGE


_SECTIONS = ("Scores", "Parts of the test", "Cost", "Training")


def _pictures(
    title: str,
    spec: "StudySpec",
    points: Sequence[Point],
    compared: Sequence[Comparison],
    entries: Sequence[Entry],
) -> list[Picture]:
    """The pictures of a section of the page, for every comparison; each is named after it where there are several."""
    drawn: list[Picture] = [overview(compared)] if title == "Scores" and len(compared) > 1 else []
    for comparison in compared:
        fitting = [e for e in entries if mismatch(e, comparison.task) is None]
        shares = [curve for e in fitting if e.x == "attention" for curve in e.curves]
        found: list[Picture | None] = []
        if title == "Scores":
            found = _scores(comparison, points, spec.report.get("x"), shares)
        elif title == "Parts of the test":
            found += slices(comparison, [curve for e in fitting if e.x == "length" for curve in e.curves])
        elif title == "Cost":
            found += speeds(comparison)
        else:
            found = [learning_rates(comparison), losses(comparison)]
        drawn += [_for(comparison, picture) for picture in found if picture is not None]
    return drawn


def _scores(
    comparison: Comparison, points: Sequence[Point], x: str | None, shares: Sequence[Published]
) -> list[Picture | None]:
    same = [curve for curve in shares if curve.metric == comparison.metric]
    along = dict.fromkeys([*([x] if x else []), "attention_of_mixers", "state_bytes"])
    over = [score_over(comparison, points, name, same if name == "attention_of_mixers" else ()) for name in along]
    other = relative_to_best(comparison, [curve for curve in shares if curve not in same])
    return [*over, other, heat_map(comparison, points), every_point(comparison)]


def _for(comparison: Comparison, picture: Picture) -> Picture:
    if not comparison.name:
        return picture
    name = f"{picture.name}-{re.sub(r'[^A-Za-z0-9]+', '-', comparison.name).strip('-')}"
    return Picture(name, f"{comparison.name}: {picture.title[0].lower()}{picture.title[1:]}", picture.note, picture.svg)


def _top(
    spec: "StudySpec",
    found: Sequence[str],
    compared: Sequence[Comparison],
    points: Sequence[Point],
    results: Sequence["Result"],
    failures: Sequence["Failure"],
) -> str:
    parts = [
        f'<p class="kicker">{escape(spec.name)}, {escape(spec.scale)}</p>',
        f"<h1>{escape(spec.question)}</h1>",
        f'<section class="found">{"".join(f"<p>{escape(sentence)}</p>" for sentence in found)}</section>',
    ]
    if spec.about:
        parts.append(f'<p class="about">{escape(spec.about)}</p>')
    parts.append(figures(compared, points, results, len(failures)))
    if said := doubts(compared, points):
        parts.append(f'<ul class="doubts">{"".join(f"<li>{escape(doubt)}</li>" for doubt in said)}</ul>')
    return f"<style>\n{_asset('report.css')}</style>\n" + "\n".join(parts)


def _section(title: str, pictures: Sequence[Picture]) -> str:
    shown = (
        f"<figure><h3>{escape(p.title)}</h3>{p.svg}<figcaption>{escape(p.note)}</figcaption></figure>" for p in pictures
    )
    return f'<h2>{escape(title)}</h2><div class="plots">{"".join(shown)}</div>'


def _points(compared: Sequence[Comparison]) -> list[str]:
    if not compared:
        return []
    note = (
        "Each at the learning rate that is best on validation, scored on test; sd is of a seed, and the interval of the mean is Student's. "
        "Differences from the best are Welch's. Press a column's head to sort."
    )
    parts = [f'<h2>Points</h2><p class="note">{note}</p>']
    for comparison in compared:
        parts.append(f"<h3>{escape(comparison.name)}</h3>" if comparison.name else "")
        parts.append(point_table(comparison))
    return parts


def _bottom(spec: "StudySpec", facts: dict[str, str], files: Sequence[str], folder: Path | None) -> str:
    from omegaconf import OmegaConf

    return (
        f"<h2>The study</h2>{named(facts)}"
        f"<details><summary>Its file at this scale</summary><pre>{escape(OmegaConf.to_yaml(spec.data))}</pre></details>"
        f"{_again(spec, folder)}"
        f'<p class="note">Beside this page: {escape(", ".join(files))}.</p>'
        f"<script>\n{_asset('report.js')}</script>"
    )


def _again(spec: "StudySpec", folder: Path | None) -> str:
    """The commands that train what is missing and write the page again; none where a program has made the study itself."""
    if not spec.source:
        return ""
    words = [spec.source, "--scale", spec.scale, *([] if folder is None else ["--folder", str(folder)])]
    lines = (shlex.join(["zoo", "ablate", command, *words]) for command in ("run", "report"))
    return f"<h2>Again</h2><pre>{escape(chr(10).join(lines))}</pre>"


def _json(
    spec: "StudySpec",
    found: Sequence[str],
    compared: Sequence[Comparison],
    points: Sequence[Point],
    failures: Sequence["Failure"],
    facts: dict[str, str],
) -> str:
    content: dict[str, Any] = {
        "what": "ablation",
        "study": spec.name,
        "scale": spec.scale,
        "question": spec.question,
        "sentences": list(found),
        "comparisons": [
            {
                "task": c.task,
                "metric": c.metric,
                "noise_floor": c.noise,
                "best": c.best.point.name,
                "basin": None if c.basin is None else [inside.point.name for inside in c.basin],
            }
            for c in compared
        ],
        "points": point_rows(points, compared),
        "failures": [
            {"point": f.cell.point.name, "rate": f.cell.rate, "seed": f.cell.seed, "error": f.error} for f in failures
        ],
        "doubts": doubts(compared, points),
        "about": facts,
        "file": spec.data,
    }
    return json.dumps(plain(content), indent=1, allow_nan=False) + "\n"


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")

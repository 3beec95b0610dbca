"""Tables and lists of a study's page: its points, what is doubtful or failed, what is published, and what it was made with."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...zoo.report.blocks import card, facts, table
from ...zoo.report.training import duration
from ...zoo.tables import in_bytes, in_units
from .cells import Point
from .literature import Entry, mismatch
from .statistics import Chosen, Comparison, difference
from .words import gap, listed, share, shown, shown_interval

if TYPE_CHECKING:
    from .schema import StudySpec
    from .store import Failure, Result

__all__ = ["doubts", "figures", "named", "origins", "point_table", "published", "settings", "troubles", "waiting_table"]


def figures(compared: Sequence[Comparison], points: Sequence[Point], results: Sequence["Result"], failed: int) -> str:
    """Return cards with the numbers that tell how far a study may be trusted."""
    built = [p for p in points if p.problem is None]
    seeds = sorted({c.n for comparison in compared for c in comparison.chosen})
    seconds = sum(float(r.result.get("seconds") or 0) for r in results)
    noise = [gap(c.metric, c.noise) for c in sorted(compared, key=lambda c: c.noise or 0.0) if c.noise is not None]
    trained = f"trainings in {duration(seconds)}" if results else "none trained yet"
    cells = [
        ("Points", f"{len({r.cell.point.name for r in results})} of {len(built)}", "have results; each is a model"),
        ("Cells", f"{len(results):,}", f"{trained}; {failed} failed" if failed else trained),
        ("Seeds", _range([str(n) for n in seeds], "none"), "per point, at its best learning rate"),
        ("Noise floor", _range(noise, "unknown"), "standard deviation of a seed, over all points"),
    ]
    shown_cards = (
        card(title, f'<p class="big">{escape(value)}</p><p>{escape(note)}</p>') for title, value, note in cells
    )
    return f'<section class="cards figures">{"".join(shown_cards)}</section>'


def _range(ascending: Sequence[str], nothing: str) -> str:
    if not ascending:
        return nothing
    low, high = ascending[0], ascending[-1]
    return low if low == high else f"{low.removesuffix(' points')} to {high}"


def point_table(comparison: Comparison) -> str:
    """Return the points of a comparison as a table; a script of the page lets it be sorted."""
    best, basin = comparison.best, comparison.basin
    head = [
        "point", "test", "sd", "95 % interval", "seeds", "less the best (95 %)", "within noise", "rate", "attention of mixers", "of blocks",
        "parameters", "FLOPs/token", "state", "training tokens/s",
    ]  # fmt: skip
    rows = []
    for c in comparison.chosen:
        low, high = shown_interval(c.metric, c.interval) if c.interval else ("", "")
        costs, rates = c.point.costs, [v for r in c.results if (v := r.result.get("tokens_per_second"))]
        rows.append([
            comparison.label(c),
            shown(c.metric, c.mean),
            "" if c.sd is None else gap(c.metric, c.sd).removesuffix(" points"),
            f"{low.removesuffix(' %')} to {high}" if low else "",
            str(c.n),
            "" if c is best else _less(c, best),
            "" if basin is None else "yes" if c in basin else "no",
            f"{c.rate:g}" + (f" ({c.edge})" if c.edge else ""),
            share(costs.attention_of_mixers) if costs else "",
            share(costs.attention_of_blocks) if costs else "",
            in_units(costs.params) if costs else "",
            in_units(costs.flops) if costs else "",
            in_bytes(costs.state_bytes) if costs else "",
            in_units(fmean(rates)) if rates else "",
        ])  # fmt: skip
    row = comparison.chosen.index(best)
    return f'<div class="sorts">{table(head, rows, {(row, 1)})}</div>'


def waiting_table(points: Sequence[Point], compared: Sequence[Comparison]) -> str:
    """Return the costs of points that have no result yet, as a table; empty where all have one."""
    done = {c.point.name for comparison in compared for c in comparison.chosen}
    head = ["point", "attention of mixers", "of blocks", "parameters", "FLOPs/token", "state"]
    rows = [
        [p.name, share(p.costs.attention_of_mixers), share(p.costs.attention_of_blocks), in_units(p.costs.params), in_units(p.costs.flops),
         in_bytes(p.costs.state_bytes)]
        for p in points if p.costs and p.name not in done
    ]  # fmt: skip
    return f'<h2>Without a result</h2><div class="sorts">{table(head, rows)}</div>' if rows else ""


def _less(chosen: Chosen, best: Chosen) -> str:
    def number(value: float) -> str:
        return f"{100 * value:.1f}" if chosen.metric == "accuracy" else f"{value:.3g}"

    found = difference(chosen, best)
    return number(chosen.mean - best.mean) + (
        f" ({number(found.interval[0])} to {number(found.interval[1])})" if found else ""
    )


def doubts(compared: Sequence[Comparison], points: Sequence[Point]) -> list[str]:
    """Return what a reader has to know before trusting the numbers, a sentence for each kind."""
    chosen = [c for comparison in compared for c in comparison.chosen]
    edges = [f"{c.point.name} ({c.rate:g}, {c.edge})" for c in chosen if c.edge]
    late = [p.name for p in points if p.problem is None and p.name not in {c.point.name for c in chosen}]
    rates = [
        f"{c.point.name} ({', '.join(f'{rate:g}' for rate in c.missing_rates)})" for c in chosen if c.missing_rates
    ]
    diverged = [f"{c.point.name} ({c.diverged} of {c.n + c.diverged})" for c in chosen if c.diverged]
    lost = [
        f"{c.point.name} ({', '.join(f'{rate:g}' for rate in gone)})"
        for c in chosen
        if (gone := [rate for rate, valid in c.tried.items() if valid is None])
    ]
    devices = sorted({str(d) for c in chosen for r in c.results if (d := r.result.get("device"))})
    found = {
        "Trained on more than one kind of device, whose precision and speed differ": devices
        if len(devices) > 1
        else [],
        "The best learning rate is at an end of its grid, and a better one may lie beyond": edges,
        "Without a result": late,
        "Learning rates without a result": rates,
        "Learning rates that diverged, and lose": lost,
        "Seeds at the best rate without a finite score, which are not in the mean": diverged,
        "Fewer than 3 seeds": [c.point.name for c in chosen if c.n < 3],
    }
    return [f"{what}: {listed(names)}." for what, names in found.items() if names]


def troubles(points: Sequence[Point], failures: Sequence["Failure"]) -> str:
    """Return tables of the points that could not be built or matched, and of the cells that failed; empty where all went well."""
    parts = []
    if unmatched := [[p.name, p.problem] for p in points if p.problem is not None]:
        parts.append(
            "<h2>Points that could not be built or matched</h2>"
            + f'<div class="words">{table(["point", "why"], unmatched)}</div>'
        )
    if failures:
        rows = [
            [
                f"{f.cell.point.name}, rate {f.cell.rate:g}, seed {f.cell.seed}",
                f"{f.error} ({f.attempts} attempts)",
                "/".join(f.log.parts[-3:]),
            ]
            for f in failures
        ]
        parts.append(f'<h2>Cells that failed</h2><div class="words">{table(["cell", "error", "log"], rows)}</div>')
    return "".join(parts)


def published(entries: Sequence[Entry], compared: Sequence[Comparison]) -> str:
    """Return what the publications that a study names have found, and why a curve of theirs is not drawn, where it is not."""
    parts = []
    for entry in entries:
        said = (
            f"<p>{escape(entry.says)} <span class='source'>{escape(entry.source)}: {escape(entry.protocol)}.</span></p>"
        )
        if entry.curves and compared:
            why = [mismatch(entry, comparison.task) for comparison in compared]
            if all(why):
                said += f'<p class="note">Its curves are not drawn: {escape(str(why[0]))}.</p>'
        if entry.rows:
            said += table(entry.head, entry.rows)
        parts.append(said)
    return f"<h2>Published</h2>{''.join(parts)}" if parts else ""


def settings(spec: "StudySpec") -> dict[str, str]:
    """Return what all cells have in common, for a ``dl``."""
    match = spec.match
    return {
        "task": _plain(spec.task),
        "training": _plain(spec.train),
        "learning rates": "; ".join(
            f"{name}: {', '.join(f'{r:g}' for r in rates)}" for name, rates in spec.rates.items()
        ),
        "seeds": ", ".join(map(str, spec.seeds)),
        "matched": "nothing"
        if match is None
        else f"{match.cost.replace('_', ' ')} within {100 * match.within:g} %, by {match.by}",
    }


def origins(results: Sequence["Result"]) -> dict[str, str]:
    """Return what the results were made with, as their files say: device, versions, digest of the code, and dates.

    Raises:
        ValueError: A file of a result is gone, or damaged.
    """
    found: list[Mapping[str, Any]] = []
    for result in results:
        try:
            found.append(json.loads(result.path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError) as e:
            raise ValueError(
                f"{result.path}: cannot be read ({e}). Run the study again; it trains what is missing."
            ) from e
    if not found:
        return {}
    devices = dict.fromkeys(str(f.get("device")) for f in found)
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in (f.get("versions") or {}).items()) for f in found)
    dates = sorted(str(f.get("date")) for f in found)
    return {
        "device": "\n".join(devices),
        "versions": "\n".join(versions),
        "code": ", ".join(dict.fromkeys(str(f.get("code")) for f in found)),
        "trained": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
    }


def named(pairs: Mapping[str, str]) -> str:
    """Return facts as a list of definitions."""
    return f"<dl>{facts(pairs)}</dl>"


def _plain(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items()) or "none"

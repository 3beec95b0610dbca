"""A study's results as flat rows, for a notebook and for CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .cells import Point
from .curves import slice_scores
from .statistics import Chosen, Comparison, choose, difference, score

if TYPE_CHECKING:
    import pandas

    from .store import Result

__all__ = ["cell_rows", "csv_text", "frame", "point_rows"]

_COSTS = ("params", "active_params", "flops", "state_bytes", "context", "attention_of_mixers", "attention_of_blocks")
_MEASURED = ("seconds", "steps", "tokens", "tokens_per_second", "peak_bytes", "stopped")


def frame(results: Sequence["Result"], points: Sequence[Point]) -> "pandas.DataFrame":
    """Return a row for every result: axes, rate, seed, costs, both of attention's shares, scores, slices of the test, and time.

    ``chosen`` tells whether the rate is the one that is best on validation; scores that are no finite number are NaN.
    """
    from ...zoo.lazily import needed

    return needed("pandas", "holds tables of results", "'hybridzoo[ablate]'").DataFrame(cell_rows(results, points))


def cell_rows(results: Sequence["Result"], points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the rows of :func:`frame` as plain data, in the order of the points, rates and seeds."""
    order = {p.name: i for i, p in enumerate(points)}
    best = {(c.point.name, str(c.task)): c.rate for c in choose(results)}
    rows = []
    for r in sorted(results, key=lambda r: (order.get(r.cell.point.name, len(order)), r.cell.rate, r.cell.seed)):
        cell = r.cell
        row = _of_point(cell.point) | {
            "task": cell.task.get("name"),
            "rate": cell.rate,
            "seed": cell.seed,
            "chosen": best.get((cell.point.name, str(cell.task))) == cell.rate,
            "metric": r.result["metric"],
            "valid": score(r, "valid"),
            "test": score(r, "test"),
            "valid_loss": r.result["valid"].get("loss"),
            "test_loss": r.result["test"].get("loss"),
        }
        row |= {name: r.result.get(name) for name in _MEASURED}
        for measured in r.result.get("speed") or []:
            row |= {f"{name} at {measured['context']}": v for name, v in measured.items() if name != "context"}
        for name, part in (r.result["test"].get("slices") or {}).items():
            row[f"test {name}"] = part.get(r.result["metric"])
        rows.append(row | {"cell": r.path.parent.name})
    return rows


def point_rows(points: Sequence[Point], compared: Iterable[Comparison]) -> list[dict[str, Any]]:
    """Return a row for every point: costs, the chosen rate, and mean, spread and interval of its seeds, or why there are none."""
    found = {c.point.name: (comparison, c) for comparison in compared for c in comparison.chosen}
    rows = []
    for point in points:
        row = _of_point(point)
        if point.name in found:
            row |= _of_chosen(*found[point.name])
        rows.append(row | {"problem": point.problem})
    return rows


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header, columns in the order in which they first come up."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _of_point(point: Point) -> dict[str, Any]:
    costs = {name: getattr(point.costs, name, None) for name in _COSTS}
    # an axis may be called as a column is
    axes = {
        f"axis {name}" if name in costs or name in ("rate", "seed", "task") else name: v
        for name, v in point.axes.items()
    }
    return {"point": point.name} | axes | costs


def _of_chosen(comparison: Comparison, chosen: Chosen) -> dict[str, Any]:
    low, high = chosen.interval or (None, None)
    found = difference(chosen, comparison.best)
    from_best = chosen.mean - comparison.best.mean
    return {
        "task": chosen.task.get("name"),
        "rate": chosen.rate,
        "edge": chosen.edge,
        "metric": chosen.metric,
        "seeds": chosen.n,
        "diverged": chosen.diverged,
        "mean": chosen.mean,
        "sd": chosen.sd,
        "low": low,
        "high": high,
        "from_best": from_best,
        "from_best_low": found.interval[0] if found else None,
        "from_best_high": found.interval[1] if found else None,
        "within_noise": None if comparison.basin is None else chosen in comparison.basin,
        "noise_floor": comparison.noise,
    } | {f"test {name}": fmean(values) for name, values in slice_scores(chosen).items()}

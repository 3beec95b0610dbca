"""Statistics of a study: a learning rate chosen on validation, and what its seeds say on test, with the noise that is in it.

Points are only compared where they are scored by one task: results of other tasks are never pooled.
"""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from .cells import Point
from .sections import shown

if TYPE_CHECKING:
    from .store import Result

__all__ = [
    "Chosen", "Comparison", "Difference", "best_rate", "choose", "comparisons", "difference", "has_score", "higher_is_better", "is_finite",
    "score",
]  # fmt: skip

Interval = tuple[float, float]
_HIGHER = {"accuracy": True, "bits_per_byte": False, "error": False, "loss": False, "mse": False, "perplexity": False}


def higher_is_better(metric: str) -> bool:
    """Return the direction of a metric.

    Raises:
        ValueError: It is not known whether more or less of it is better.
    """
    if metric not in _HIGHER:
        raise ValueError(f"metric {metric!r}: its direction is not known. Known are: {', '.join(_HIGHER)}.")
    return _HIGHER[metric]


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """A point at the learning rate that is best on validation.

    Attributes:
        point: The model.
        task: The task that scores it.
        metric: The name of the score.
        rate: The chosen learning rate.
        tried: By rate, ascending: the validation score, mean over the seeds that all rates have; ``None`` where a training diverged.
        edge: ``"lowest"`` or ``"highest"`` where the choice is at an end of the point's grid and none inside it scores as high.
        results: Those at the chosen rate with a finite test score, by seed.
        diverged: How many there are at the chosen rate without one.
        speed: Rows of speed and memory by context, of whichever of the point's results has them.
    """

    point: Point
    task: dict[str, Any]
    metric: str
    rate: float
    tried: dict[float, float | None]
    edge: str | None
    results: tuple["Result", ...]
    diverged: int = 0
    speed: tuple[dict[str, Any], ...] = ()

    @cached_property
    def tests(self) -> tuple[float, ...]:
        """The test scores, a seed each."""
        return tuple(score(r, "test") for r in self.results)

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.tests)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that are in the mean."""
        return tuple(r.cell.seed for r in self.results)

    @cached_property
    def mean(self) -> float:
        """The mean of the test scores."""
        return fmean(self.tests)

    @cached_property
    def sd(self) -> float | None:
        """Their standard deviation (n - 1 in the denominator); ``None`` of a single one."""
        return stdev(self.tests) if self.n > 1 else None

    @cached_property
    def interval(self) -> Interval | None:
        """The 95 % interval of the mean by Student's t; ``None`` of a single seed."""
        if self.sd is None:
            return None
        half = _t(self.n - 1) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    def measured(self, what: str) -> dict[int, float]:
        """Return a measure of speed or memory by context, empty where it was not taken."""
        return {row["context"]: row[what] for row in self.speed if is_finite(row.get(what))}

    @property
    def missing_rates(self) -> tuple[float, ...]:
        """Rates of the point's grid that nothing is known of yet."""
        return tuple(rate for rate in self.point.rates if rate not in self.tried)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of one point less that of another, and its 95 % interval by Welch's t, for standard deviations that differ."""

    mean: float
    interval: Interval


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Points that one task scores.

    Attributes:
        name: The options of the task that tell it from the study's other tasks, empty where it is the only one.
        task: The task.
        metric: The name of the score.
        chosen: The points, each at its learning rate.
    """

    name: str
    task: dict[str, Any]
    metric: str
    chosen: tuple[Chosen, ...]

    @property
    def higher(self) -> bool:
        """The direction of the metric: true where more of it is better."""
        return higher_is_better(self.metric)

    @cached_property
    def best(self) -> Chosen:
        """The point with the best mean on test; of equals, the one with the smallest state."""

        def order(c: Chosen) -> tuple[float, float]:
            return (c.mean if self.higher else -c.mean), -(c.point.costs.state_bytes if c.point.costs else math.inf)

        return max(self.chosen, key=order)

    @cached_property
    def noise(self) -> float | None:
        """The noise floor: the standard deviation of a seed, pooled over all points with two seeds or more; ``None`` without any."""
        many = [(c.n - 1, c.sd) for c in self.chosen if c.sd is not None]
        if not many:
            return None
        return math.sqrt(sum(df * sd * sd for df, sd in many) / sum(df for df, _ in many))

    def label(self, chosen: Chosen) -> str:
        """Return a point's name without what all points of this comparison have in common, where there are other comparisons."""
        values = {axis: {str(c.point.axes.get(axis)) for c in self.chosen} for axis in chosen.point.axes}
        told = [f"{axis}={shown(chosen.point.axes[axis])}" for axis, found in values.items() if len(found) > 1]
        return " ".join(told) if self.name and told else chosen.point.name

    def within(self, a: Chosen, b: Chosen) -> float | None:
        """Return the difference of two means that noise alone explains in 95 % of cases.

        By the noise floor and Student's t for its degrees of freedom; where those are many, it is about two standard errors.
        """
        if self.noise is None:
            return None
        return _t(sum(c.n - 1 for c in self.chosen)) * self.noise * math.sqrt(1 / a.n + 1 / b.n)

    @cached_property
    def basin(self) -> tuple[Chosen, ...] | None:
        """The points within noise of the best, and the best itself; ``None`` where there is no noise floor."""
        if self.noise is None:
            return None
        # a hair more, for means that differ by rounding alone
        return tuple(
            c
            for c in self.chosen
            if abs(c.mean - self.best.mean) <= (self.within(c, self.best) or 0) * (1 + 1e-9) + 1e-12
        )


def score(result: "Result", part: str) -> float:
    """Return a result's score on ``"valid"`` or ``"test"``, NaN where it is not a finite number.

    Raises:
        ValueError: It holds none.
    """
    metric, found = result.result["metric"], result.result[part]
    if metric not in found:
        raise ValueError(f"{result.path}: its {part!r} score has no {metric!r}, but {', '.join(found) or 'nothing'}.")
    value = found[metric]
    return float(value) if is_finite(value) else math.nan


def has_score(result: "Result") -> bool:
    """Tell whether a training has a finite score on validation; one that diverged has none."""
    return not math.isnan(score(result, "valid"))


def best_rate(results: Sequence["Result"]) -> float:
    """Return the learning rate that is best on validation, for results of one point.

    Rates are compared over the seeds that all of them have, so that further seeds of the best, which may disappoint, do not make a rate
    with fewer of them look better. A training that diverged makes its rate the worst. Of equals, the rate with more seeds is taken, then
    the one with the lower validation loss, one inside the grid, and the lowest.

    Raises:
        ValueError: There are no results.
    """
    if not results:
        raise ValueError("results: there are none to choose a rate from")
    higher, grid = higher_is_better(results[0].result["metric"]), results[0].cell.point.rates
    valid, by_rate = _tried(results), _by_rate(results)

    def order(rate: float) -> tuple[float, ...]:
        value = valid[rate]
        worth = -math.inf if value is None else value if higher else -value
        losses = [v for r in by_rate[rate] if is_finite(v := r.result["valid"].get("loss"))]
        loss = fmean(losses) if losses else math.inf
        return worth, len(by_rate[rate]), -loss, rate not in (grid[0], grid[-1]), -rate

    return max(valid, key=order)


def choose(results: Iterable["Result"]) -> list[Chosen]:
    """Return every point at its best rate; a point none of whose results at that rate has a finite test score is left out."""
    points: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        points[result.cell.point.name, _plain(result.cell.task)].append(result)
    chosen = []
    for many in points.values():
        cell, metric, rate = many[0].cell, many[0].result["metric"], best_rate(many)
        at = sorted(_by_rate(many)[rate], key=lambda r: r.cell.seed)
        finite = tuple(r for r in at if not math.isnan(score(r, "test")))
        if not finite:
            continue
        tried, diverged = _tried(many), len(at) - len(finite)
        speed = next((tuple(rows) for r in many if (rows := r.result.get("speed"))), ())
        edge = _edge(cell.point, rate, tried)
        chosen.append(Chosen(cell.point, cell.task, metric, rate, tried, edge, finite, diverged, speed))
    return chosen


def comparisons(chosen: Iterable[Chosen]) -> list[Comparison]:
    """Return the points in groups of one task and metric each, in the order that they come in."""
    groups: dict[tuple[str, str], list[Chosen]] = defaultdict(list)
    for c in chosen:
        groups[_plain(c.task), c.metric].append(c)
    names = _names(list(groups.values()))
    return [
        Comparison(name, many[0].task, many[0].metric, tuple(many))
        for name, many in zip(names, groups.values(), strict=True)
    ]


def difference(a: Chosen, b: Chosen) -> Difference | None:
    """Return the mean of ``a`` less that of ``b`` with its interval; ``None`` where one of them has a single seed."""
    if a.sd is None or b.sd is None:
        return None
    mean, va, vb = a.mean - b.mean, a.sd**2 / a.n, b.sd**2 / b.n
    if va + vb == 0:
        return Difference(mean, (mean, mean))
    # Welch and Satterthwaite's degrees of freedom
    df = (va + vb) ** 2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1))
    half = _t(df) * math.sqrt(va + vb)
    return Difference(mean, (mean - half, mean + half))


def _t(df: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    return float(stdtrit(df, 0.975))


def is_finite(value: Any) -> bool:
    """Return whether a value is a number, and no NaN or infinity."""
    return isinstance(value, int | float) and math.isfinite(value)


def _by_rate(results: Iterable["Result"]) -> dict[float, list["Result"]]:
    rates: dict[float, list[Result]] = defaultdict(list)
    for result in results:
        rates[result.cell.rate].append(result)
    return rates


def _tried(results: Sequence["Result"]) -> dict[float, float | None]:
    """The validation score by rate, over the seeds that all rates share, or over all that a rate has where they share none."""
    by_rate = _by_rate(results)
    shared = set.intersection(*({r.cell.seed for r in many} for many in by_rate.values()))
    means = {
        rate: fmean(score(r, "valid") for r in many if not shared or r.cell.seed in shared)
        for rate, many in sorted(by_rate.items())
    }
    return {rate: None if math.isnan(mean) else mean for rate, mean in means.items()}


def _edge(point: Point, rate: float, tried: dict[float, float | None]) -> str | None:
    if len(point.rates) < 2 or rate not in (point.rates[0], point.rates[-1]):
        return None
    if any(tried.get(inner) == tried[rate] for inner in point.rates[1:-1]):
        return None
    return "lowest" if rate == point.rates[0] else "highest"


def _plain(task: dict[str, Any]) -> str:
    return json.dumps(task, sort_keys=True)


def _names(groups: Sequence[Sequence[Chosen]]) -> list[str]:
    """Names of comparisons: the options in which their tasks differ, or what points say of it on an axis, whichever is a word."""
    if len(groups) < 2:
        return [""] * len(groups)
    axes = [
        axis
        for axis in groups[0][0].point.axes
        if all(len({str(c.point.axes.get(axis)) for c in many}) == 1 for many in groups)
    ]
    on_axes = [[(axis, many[0].point.axes.get(axis)) for axis in axes] for many in groups]
    options = [[(key, many[0].task.get(key)) for key in {k: 0 for g in groups for k in g[0].task}] for many in groups]
    found = []
    for told in (options, on_axes):
        differ = [i for i in range(len(told[0])) if len({_plain({"": pairs[i][1]}) for pairs in told}) > 1]
        kept = [[pairs[i] for i in differ] for pairs in told]
        # a word says what it is, a number does not
        words = len(differ) == 1 and all(isinstance(pairs[0][1], str) for pairs in kept)
        names = [" ".join(str(v) if words else f"{key}={v}" for key, v in pairs) for pairs in kept]
        found.append((not words, names))
    for _, names in sorted(found, key=lambda one: one[0]):
        if len(set(names)) == len(names):
            return names
    return [f"{many[0].task.get('name', 'task')} {many[0].metric}" for many in groups]

"""Scores, shares and differences as they are read, in sentences, tables and pictures alike."""

from collections.abc import Sequence

from .statistics import higher_is_better

__all__ = ["gap", "listed", "metric_name", "share", "shown", "shown_interval", "times"]


def metric_name(metric: str) -> str:
    """Return a metric in words."""
    return {"mse": "mean squared error"}.get(metric, metric.replace("_", " "))


def shown(metric: str, value: float) -> str:
    """Return a score as it is read: per cent of an accuracy, as it is of anything else."""
    if metric == "accuracy":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def shown_interval(metric: str, interval: tuple[float, float]) -> tuple[str, str]:
    """Return an interval as it is read; no accuracy is beyond 0 or 100 %, no error below 0."""
    low, high = max(interval[0], 0.0), interval[1]
    if metric == "accuracy":
        low, high = min(low, 1.0), max(0.0, min(high, 1.0))
    return shown(metric, low), shown(metric, high)


def gap(metric: str, value: float) -> str:
    """Return a difference of scores as it is read."""
    if metric == "accuracy":
        return f"{100 * value:.1f} points"
    return f"{value:.3g} {metric_name(metric)}" if higher_is_better(metric) else f"{value:.3g}"


def share(fraction: float | None) -> str:
    """Return a fraction in per cent, without a decimal that says nothing."""
    return "none" if fraction is None else f"{100 * fraction:.3g} %"


def times(mine: float, theirs: float) -> str:
    """Return how much of another's a number is: ``"26 % of"``, ``"3.1 times"``."""
    if not theirs:
        return "against 0 of"
    times = mine / theirs
    return f"{100 * times:.2g} % of" if times < 0.95 else f"{times:.3g} times"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return names as a list in words, the first ``most`` of them."""
    more = [f"{len(names) - most} more"] if len(names) > most else []
    words = [*names[:most], *more]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

"""A study's outcome in three plain sentences, computed from its results: the best point, the basin around it, and what it costs."""

from collections.abc import Callable, Sequence

from ...zoo.tables import in_bytes, in_units
from .cells import Costs, Point
from .statistics import Chosen, Comparison
from .words import gap, listed, metric_name, share, shown, shown_interval, times

__all__ = ["ends", "three_sentences"]


def three_sentences(compared: Sequence[Comparison], points: Sequence[Point]) -> list[str]:
    """Return what a study has found: which point is best, which are as good within noise, and what the best costs.

    Where seeds or points are missing, they say so in place of a precision that is not there.
    """
    buildable = [p for p in points if p.problem is None]
    if not compared:
        return [
            f"Nothing can be said yet: none of the {len(buildable)} points has a result.",
            "How much noise there is shows once points have two seeds or more.",
            "State and parameters of every point are known before training and are in the table below.",
        ]
    done = {c.point.name for comparison in compared for c in comparison.chosen}
    missing = sum(p.name not in done for p in buildable)
    late = f"; {missing} of {len(buildable)} points have no result yet" if missing else ""
    if len(compared) > 1:
        best, basin, costs = (_each(compared, say) for say in (_best_briefly, _basin_briefly, _costs_briefly))
        contexts = {c.best.point.costs.context for c in compared if c.best.point.costs}
        after = f"After {contexts.pop():,} tokens" if len(contexts) == 1 else "At the lengths of their tasks"
        return [
            f"The best points on test are, by task: {best}{late}.",
            f"Within noise of the best are, by task: {basin}.",
            f"{after} the best leave a state of, by task: {costs}.",
        ]
    (only,) = compared
    return [_sentence(_best(only) + late), _sentence(_basin(only)), _sentence(_costs(only))]


def _sentence(said: str) -> str:
    return f"{said[0].upper()}{said[1:]}."


def _each(compared: Sequence[Comparison], say: Callable[[Comparison], str]) -> str:
    return "; ".join(f"{comparison.name}, {say(comparison)}" for comparison in compared)


def _best_briefly(comparison: Comparison) -> str:
    best = comparison.best
    value = f"{comparison.label(best)} with {shown(best.metric, best.mean)} {metric_name(best.metric)}"
    if best.interval is None:
        return f"{value} (of a single seed)"
    low, high = shown_interval(best.metric, best.interval)
    return f"{value} (95 % interval {low} to {high}, {best.n} seeds)"


def _basin_briefly(comparison: Comparison) -> str:
    if comparison.basin is None or comparison.noise is None:
        return "unknown, of single seeds"
    if len(comparison.basin) == len(comparison.chosen):
        which = f"all {len(comparison.chosen)}"
    else:
        which = listed([comparison.label(c) for c in comparison.basin])
    return f"{which} (noise floor {gap(comparison.metric, comparison.noise)})"


def _costs_briefly(comparison: Comparison) -> str:
    best = comparison.best
    if best.point.costs is None:
        return "an unknown size"
    others = [f"{times(best.point.costs.state_bytes, c.point.costs.state_bytes)} that {name}" for name, c in ends(comparison).items()
              if c is not best and c.point.costs]  # fmt: skip
    speed = best.measured("decode_tokens_s")
    decodes = f", at {in_units(speed[max(speed)])} tokens/s after {max(speed):,}" if speed else ""
    return f"{in_bytes(best.point.costs.state_bytes)}{f' ({listed(others)})' if others else ''}{decodes}"


def _best(comparison: Comparison) -> str:
    best, costs = comparison.best, comparison.best.point.costs
    fractions = {c.point.costs.attention_of_mixers for c in comparison.chosen if c.point.costs}
    what = best.point.name
    if costs and len(fractions) > 2:
        what += f" ({_attention(costs)})"
    value = f"{shown(best.metric, best.mean)} {metric_name(best.metric)} on test"
    if best.interval is None:
        return (
            f"the best point so far is {what}, with {value}, but that is a single seed: nothing is known of its noise"
        )
    low, high = shown_interval(best.metric, best.interval)
    ties = [c for c in comparison.chosen if c.mean == best.mean]
    equals = f" ({len(ties) - 1} others score the same, with no less state)" if len(ties) > 1 else ""
    return f"the best point is {what}, with {value}{equals}, 95 % interval {low} to {high} over {best.n} seeds"


def _attention(costs: Costs) -> str:
    if costs.attention_of_mixers is None:
        return "it has no sequence mixers"
    return f"attention is {share(costs.attention_of_mixers)} of its mixers and {share(costs.attention_of_blocks)} of all its blocks"


def _basin(comparison: Comparison) -> str:
    best, basin, floor = comparison.best, comparison.basin, comparison.noise
    if len(comparison.chosen) == 1:
        return f"there is nothing to compare {best.point.name} with"
    if basin is None or floor is None:
        return "no point has two seeds, so there is no noise floor, and differences between points may be chance"
    noise = f"the noise floor is a standard deviation of {gap(comparison.metric, floor)} per seed"
    others = [c for c in comparison.chosen if c not in basin]
    if len(basin) > 1:
        return f"{_flat(comparison, basin)} within noise of the best; {noise}"
    if not others:
        return noise
    next_best = (max if comparison.higher else min)(others, key=lambda c: c.mean)
    worse = "lower" if comparison.higher else "higher"
    by, reach = abs(best.mean - next_best.mean), comparison.within(best, next_best) or 0.0
    of = f"95 % interval {gap(comparison.metric, by - reach)} to {gap(comparison.metric, by + reach)}, by the noise floor"
    gone = f"the next, {next_best.point.name}, is {gap(comparison.metric, by)} {worse} ({of})"
    return f"no other point is within noise of it: {gone}; {noise}"


def _flat(comparison: Comparison, basin: Sequence[Chosen]) -> str:
    """Say which points are in the basin, and from which share of attention to which it goes where that is all of a range."""
    count = f"{len(basin)} of {len(comparison.chosen)} points"
    inside = {c.point.costs.attention_of_mixers for c in basin if c.point.costs}
    outside = {c.point.costs.attention_of_mixers for c in comparison.chosen if c.point.costs and c not in basin}
    spans = sorted(f for f in inside if f is not None)
    if len(basin) == len(comparison.chosen):
        return f"all {len(basin)} points are"
    if len(spans) > 1 and not any(f is not None and spans[0] <= f <= spans[-1] for f in outside):
        return f"the basin is flat from {share(spans[0])} to {share(spans[-1])} attention of the mixers: {count} are"
    return f"{count} ({listed([c.point.name for c in basin])}) are"


def _costs(comparison: Comparison) -> str:
    best, costs = comparison.best, comparison.best.point.costs
    if costs is None:
        return "what it costs is not known"
    others = [(name, c) for name, c in ends(comparison).items() if c is not best and c.point.costs]
    state = [
        f"{times(costs.state_bytes, c.point.costs.state_bytes)} that {name}" for name, c in others if c.point.costs
    ]
    against = f", {' and '.join(state)}" if state else ""
    said = f"at {costs.context:,} tokens its state takes {in_bytes(costs.state_bytes)} a sequence{against}"
    mine = best.measured("decode_tokens_s")
    if not mine:
        return f"{said}; its speed was not measured"
    context = max(mine)
    speeds = [
        f"{times(mine[context], theirs)} that {name}"
        for name, c in others
        if (theirs := c.measured("decode_tokens_s").get(context)) is not None
    ]
    against = f", {' and '.join(speeds)}" if speeds else ""
    return f"{said}; it decodes {in_units(mine[context])} tokens/s after {context:,} tokens{against}"


def ends(comparison: Comparison) -> dict[str, Chosen]:
    """Return the pure ends that there are: attention alone, and none; of several, the best by score."""
    found: dict[str, Chosen] = {}
    for name, fraction in (("with attention alone", 1.0), ("without attention", 0.0)):
        pure = [c for c in comparison.chosen if c.point.costs and c.point.costs.attention_of_mixers == fraction]
        if pure and len(pure) < len(comparison.chosen):
            best = (max if comparison.higher else min)(pure, key=lambda c: c.mean)
            found[name if len(pure) == 1 else f"{name} ({comparison.label(best)})"] = best
    return found

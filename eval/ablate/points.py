"""The points of a study: its axes multiplied out, every model built on the meta device and made to cost what the others do."""

import copy
import fnmatch
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ...zoo.config.files import apply_overrides
from ...zoo.config.resolve import resolve
from ...zoo.models.build import build
from ...zoo.models.stats import stats
from ...zoo.registry import get_mixer
from .cells import Costs, Point
from .match import Unmatched, nearest_size
from .schema import StudySpec
from .sections import check_train, shown
from .store import foreign_digests

__all__ = ["costs_of", "places_of", "points_of", "rows_of"]

_MAX_POINTS = 2000
# of a batch, where a training does not say, as in measure
_ROWS = 64
# what a config, a task or a mixer's constructor may raise about sizes that do not fit
_WRONG = (ValueError, TypeError, ArithmeticError, NotImplementedError, RuntimeError)


def places_of(spec: StudySpec) -> list[dict[str, Any]]:
    """Return the values on the axes of every point of a study, in the order of its axes, the last of which changes fastest.

    Raises:
        ValueError: There are no points, or too many to be meant.
    """
    total = math.prod(len(axis.values) for axis in spec.axes.values())
    if total > _MAX_POINTS:
        raise ValueError(f"axes: give {total:,} points, more than {_MAX_POINTS:,}. Take out values.")
    grid = itertools.product(*(axis.values for axis in spec.axes.values()))
    kept = [at for values in grid if _is_kept(spec, at := dict(zip(spec.axes, values, strict=True)))]
    if not kept:
        raise ValueError("axes: only and exclude leave no point. Take one of them out.")
    return kept


def points_of(spec: StudySpec, done: Callable[[int], None] = lambda more: None) -> list[Point]:
    """Return every point of a study, in the order of :func:`places_of`; ``done`` is told of each.

    A point that cannot be built or matched has a ``problem`` that says why; nothing is raised for one. So has one that is an earlier point
    under another name, as models without attention are, wherever it would stand: their trainings would be the same.

    Raises:
        ValueError: As :func:`places_of`.
    """
    known: dict[str, _Built] = {}
    names: dict[str, str] = {}
    points = []
    for at in places_of(spec):
        point = _point(spec, at, known)
        if point.problem is None:
            same = json.dumps([point.config, point.task, point.train], sort_keys=True)
            if (first := names.setdefault(same, point.name)) != point.name:
                problem = f"is trained as {first!r}, since all of its settings are the same; exclude it"
                point = Point(point.name, at, {}, point.rates, None, problem, point.task, point.train)
        points.append(point)
        done(1)
    return points


def rows_of(train: Mapping[str, Any]) -> int:
    """Return how many rows a step of a training reads."""
    options = check_train(train)
    return (options.batch_size or _ROWS) * options.accumulate


def costs_of(source: Any, length: int, context: int) -> Costs:
    """Return the costs of a model, built on the meta device.

    Args:
        source: A config, as :func:`hybridzoo.build` takes it.
        length: Tokens of a row in training, for which FLOPs are stated.
        context: Tokens that the state is stated for.
    """
    model = build(source, device="meta")
    found = stats(model, length)
    return Costs(
        params=found.params,
        active_params=found.active_params,
        flops=3 * found.flops,  # a training's, three times a forward's
        state_bytes=stats(model, context).state_bytes,
        context=context,
        attention_of_mixers=found.attention_of_mixers,
        attention_of_blocks=found.attention_of_blocks,
    )


def _is_kept(spec: StudySpec, values: Mapping[str, Any]) -> bool:
    def agrees(combination: Mapping[str, list[Any]]) -> bool:
        return all(values[name] in allowed for name, allowed in combination.items())

    return (not spec.only or any(map(agrees, spec.only))) and not any(map(agrees, spec.exclude))


def _settings(spec: StudySpec, axes: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Keys that a place on the axes sets, of the study's task, its training, or, as ``config``, of the model."""
    found: dict[str, Any] = {}
    for name, value in axes.items():
        for key, to in spec.axes[name].values[value].items():
            first = key.split(".")[0]
            if part == (first if first in ("task", "train") else "config"):
                found[key] = to
    return found


def _at(spec: StudySpec, axes: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The task, or the options of the training, at a place on the axes."""
    return copy.deepcopy(apply_overrides({part: getattr(spec, part)}, _settings(spec, axes, part))[part])


def _point(spec: StudySpec, axes: dict[str, Any], known: dict[str, "_Built"]) -> Point:
    name = " ".join(f"{axis}={shown(value)}" for axis, value in axes.items())
    task, train = {}, {}
    try:
        task, train = _at(spec, axes, "task"), _at(spec, axes, "train")
        making = _Making(spec, axes, known)
        made = making.at(making.size())
        rates = _rates(spec.rates, name, made.architecture)
        for kind, amount in spec.budget.items():
            tokens = rows_of(train) * making.length
            train["steps"] = max(1, round(amount / (tokens * (made.costs.flops if kind == "flops" else 1))))
        check_train(train)
        return Point(name, axes, made.config, rates, made.costs, None, task, train, made.foreign)
    except _WRONG as e:
        return Point(name, axes, {}, tuple(spec.rates["default"]), None, str(e), task, train)


class _Built(NamedTuple):
    """A model: its resolved config, the types of its sequence mixers with a plus between, its costs, and digests of foreign modules."""

    config: dict[str, Any]
    architecture: str
    costs: Costs
    foreign: dict[str, str]


class _Making:
    """A place on the axes on its way to a model; ``known`` has the models that have been built for the study."""

    def __init__(self, spec: StudySpec, axes: Mapping[str, Any], known: dict[str, _Built]):
        from .tasks import task_of

        self.spec, self.axes, self.known = spec, axes, known
        task = task_of(_at(spec, axes, "task"))
        self.length = task.tokens_per_example
        asked = spec.match.at if spec.match else None
        self.context = asked or max(spec.measure["contexts"], default=self.length)
        self.data = apply_overrides(apply_overrides(spec.base, _settings(spec, axes, "config")), task.config())

    def at(self, size: int | None = None) -> _Built:
        """The model at a size of what is solved for, or at its own."""
        data = (
            self.data
            if size is None or self.spec.match is None
            else apply_overrides(self.data, {self.spec.match.by: size})
        )
        key = json.dumps([data, self.length, self.context], sort_keys=True)
        if key not in self.known:
            resolved = resolve(data)
            config: Any = OmegaConf.to_container(resolved.config)
            types = {part["type"] for spec in resolved.specs for _, part, _ in spec.parts}
            mixing = "+".join(sorted(kind for kind in types if get_mixer(kind, "mixers").cls.mixes_tokens))
            costs = costs_of(resolved, self.length, self.context)
            self.known[key] = _Built(config, mixing, costs, foreign_digests(types))
        return self.known[key]

    def size(self) -> int | None:
        """The size that gives the cost that is matched; ``None`` where nothing is."""
        match = self.spec.match
        if match is None:
            return None
        target = match.target
        if isinstance(target, dict):
            target = getattr(_Making(self.spec, {**self.axes, **target}, self.known).at().costs, match.cost)
        if not target:
            raise Unmatched(f"{match.cost}: is 0 at the point to be matched. Match another cost, or give a number.")

        def cost(size: int) -> float | None:
            try:
                return getattr(self.at(size).costs, match.cost)
            except _WRONG:
                return None  # nothing of that size can be built

        # where not even the base can, the reason is more than that
        start = _integer_at(self.at().config, match.by)
        try:
            return nearest_size(cost, start, target, match.within)
        except Unmatched as e:
            raise Unmatched(f"{match.cost}: no {match.by} is within {100 * match.within:g} %: {e}.") from None


def _integer_at(config: Mapping[str, Any], key: str) -> int:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise Unmatched(f"match.by: {key} is {value!r} in the base, and solving starts at an integer. Set it there.")
    return value


def _rates(rates: Mapping[str, list[float]], name: str, architecture: str) -> tuple[float, ...]:
    """The first grid whose pattern is the architecture or the point's name."""
    for pattern, grid in rates.items():
        if pattern != "default" and any(fnmatch.fnmatchcase(text, pattern) for text in (architecture, name)):
            return tuple(grid)
    return tuple(rates["default"])

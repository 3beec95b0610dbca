"""The parts of a study's file, each read strictly: what is none of its keys, or no value of one, is an error with its dotted key."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from ...zoo.errors import ConfigError, nearest, shortened
from ...zoo.train.options import TrainOptions
from .cells import Costs
from .literature import published_names

__all__ = [
    "COSTS", "Axis", "Match", "check_keys", "check_train", "listed", "read_axes", "read_budget", "read_combinations", "read_match",
    "read_measure", "read_rates", "read_report", "read_seeds", "section", "shown",
]  # fmt: skip

COSTS = ("params", "flops", "state_bytes")
# decided by cells, and said elsewhere
_ELSEWHERE = {
    "lr": "rates", "seed": "seeds", "val": "task", "device": "the option --device", "report_to": "the store", "resume": "the store",
    "overwrite": "the store",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
_LABEL = re.compile(r"[^\s=,]{1,64}")
# more are a slip, and all would be trained
_MAX_VALUES = 256
_MAX_SEEDS = 100


@dataclasses.dataclass(frozen=True)
class Axis:
    """A way in which the models of a study differ.

    Attributes:
        values: What points say of it, numbers or labels, in the file's order; and the keys that each sets. Keys are dotted: of the config,
            or of the study's ``task.`` or ``train.``.
    """

    values: dict[Any, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Match:
    """The cost that all points have in common.

    Attributes:
        cost: ``params``, ``flops`` or ``state_bytes``.
        target: How much; or values on axes, of the point that has as much: on other axes it is where the point is that is matched.
        by: The dotted key of the config, an integer, that is solved for.
        at: Tokens that state is stated for; by default the longest context that is measured, or the task's length.
        within: The share of the target that may be missed.
    """

    cost: str
    target: float | dict[str, Any]
    by: str
    at: int | None = None
    within: float = 0.01


def section(data: Mapping[str, Any], key: str, example: str, where: str = "") -> dict[str, Any]:
    """Return the mapping under a key; an empty one where there is none or ``null``."""
    value = data.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{where}{key}: found {shortened(value)}, expected a mapping, such as {example}.")
    return dict(value or {})


def check_keys(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse keys that are not known; ``where`` is what stands in front of them, with its dot."""
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}{key}: unknown key.{nearest(key, known)} Keys: {listed(known)}.")


def listed(names: Collection[Any]) -> str:
    """Return names as an error lists them."""
    return ", ".join(map(shown, names)) or "none"


def shown(value: Any) -> str:
    """Return a value on an axis as points' names have it: ``0.25``, ``true``, ``none``."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_train(train: Mapping[str, Any]) -> TrainOptions:
    """Return the options of a training, checked; refuse what is none, and what a study says elsewhere."""
    for key in train:
        if key in _ELSEWHERE:
            raise ConfigError(
                f"train.{key}: is no option of a study's training. {_ELSEWHERE[key]} decides it; leave it out."
            )
    known = [f.name for f in dataclasses.fields(TrainOptions) if f.metadata["of"] != "images"]
    check_keys(train, [name for name in known if name not in _ELSEWHERE], "train.")
    try:
        return TrainOptions(**train, report_to="none")
    except (ValueError, TypeError) as e:
        raise ConfigError(f"train: {e}") from None


def read_axes(data: Mapping[str, Any]) -> dict[str, Axis]:
    """Return the axes by name."""
    axes = section(data, "axes", "{attention: {key: layers.allocate.attention, values: [0, 0.25, 1]}}")
    if not axes:
        raise ConfigError(
            "axes: there are none. Name one, such as {attention: {key: layers.allocate.attention, values: [0, 0.5, 1]}}."
        )
    for name in axes:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"axes.{name}: is no name of an axis. Use letters, digits and underscores, 64 at most.")
    read = {
        name: _axis(section(axes, name, "{key: d_model, values: [64, 128]}", "axes."), f"axes.{name}") for name in axes
    }
    owners: dict[str, str] = {}
    for name, axis in read.items():
        for key in {key for settings in axis.values.values() for key in settings}:
            if owners.setdefault(key, name) != name:
                raise ConfigError(
                    f"axes.{name}: sets {key}, which axes.{owners[key]} sets too. Let one of them set it."
                )
    return read


def _axis(axis: Mapping[str, Any], where: str) -> Axis:
    check_keys(axis, ("key", "values"), f"{where}.")
    values, key = axis.get("values"), axis.get("key")
    if not values or not isinstance(values, list | dict) or len(values) > _MAX_VALUES:
        raise ConfigError(
            f"{where}.values: found {shortened(values)}, expected 1 to {_MAX_VALUES} of them: [0, 0.25] beside a key, or labels with what "
            "they set, {small: {d_model: 64}}."
        )
    if isinstance(values, list) != (key is not None):
        remedy = "Name what a list of values sets" if key is None else "Labels set keys of their own: leave it out"
        raise ConfigError(f"{where}.key: is {shortened(key)}, and values are a {type(values).__name__}. {remedy}.")
    read: dict[Any, dict[str, Any]] = {}
    for value in values:
        if isinstance(value, list | dict) or not _LABEL.fullmatch(shown(value)):
            raise ConfigError(
                f"{where}.values: found {shortened(value)}, expected a number, or a label without blanks, commas and '='. Label it, as in "
                "{small: {d_model: 64}}."
            )
        if any(shown(value) == shown(other) for other in read):
            raise ConfigError(f"{where}.values: {shown(value)} stands there twice. Leave one out.")
        settings = (
            {key: value} if isinstance(values, list) else section(values, value, "{d_model: 64}", f"{where}.values.")
        )
        read[value] = {
            str(k): v for part, v in settings.items() for k, v in _flat(part, v, f"{where}.values.{value}").items()
        }
    return Axis(read)


def _flat(key: Any, value: Any, where: str) -> dict[str, Any]:
    """Settings of the study's own parts by dotted keys, however they were nested; those of a config are left to who reads configs."""
    if not isinstance(key, str):
        raise ConfigError(
            f"{where}: found the key {shortened(key)}, expected a dotted key of a config, task.* or train.*."
        )
    if key in ("task", "train"):
        if not isinstance(value, dict):
            raise ConfigError(
                f"{where}.{key}: found {shortened(value)}, expected a mapping. A model's own task follows from the study's."
            )
        return {f"{key}.{part}": inner for part, inner in value.items()}
    return {key: value}


def read_combinations(data: Mapping[str, Any], key: str, axes: Mapping[str, Axis]) -> list[dict[str, list[Any]]]:
    """Return ``only`` or ``exclude``: values on some axes, lists of them."""
    found = data.get(key) or []
    if not isinstance(found, list) or not all(isinstance(one, dict) and one for one in found):
        raise ConfigError(
            f"{key}: found {shortened(found)}, expected a list, such as [{{attention: [0, 1], place: first}}]."
        )
    return [
        {name: [_value(v, name, axes, f"{key}.{i}.{name}") for v in (values if isinstance(values, list) else [values])]
         for name, values in one.items()}
        for i, one in enumerate(found)
    ]  # fmt: skip


def _value(value: Any, name: str, axes: Mapping[str, Axis], where: str) -> Any:
    if name not in axes:
        raise ConfigError(f"{where}: is no axis.{nearest(name, axes)} Axes: {listed(axes)}.")
    known = {shown(v): v for v in axes[name].values}
    if shown(value) not in known:
        raise ConfigError(
            f"{where}: {shortened(value)} is not on this axis.{nearest(shown(value), known)} On it: {listed(known)}."
        )
    return known[shown(value)]


def read_match(data: Mapping[str, Any], axes: Mapping[str, Axis]) -> Match | None:
    """Return what is matched, if anything."""
    match = section(data, "match", "{params: {attention: 0}, by: mixers.mlp.d_intermediate}")
    if not match:
        return None
    check_keys(match, (*COSTS, "by", "at", "within"), "match.")
    costs = [key for key in COSTS if key in match]
    if len(costs) != 1:
        raise ConfigError(
            f"match: names {listed(costs)}, expected one of {listed(COSTS)}. One size can make one cost equal."
        )
    target, by, where = match[costs[0]], match.get("by"), f"match.{costs[0]}"
    if isinstance(target, dict):
        target = {name: _value(value, name, axes, f"{where}.{name}") for name, value in target.items()}
    elif not _is_number(target) or target <= 0:
        raise ConfigError(
            f"{where}: found {shortened(target)}, expected a number above 0, or a point, such as {{attention: 0}}."
        )
    if not isinstance(by, str) or not by:
        raise ConfigError(
            f"match.by: found {shortened(by)}, expected the key of an integer, such as mixers.mlp.d_intermediate."
        )
    if by.split(".")[0] in ("task", "train"):
        raise ConfigError(
            f"match.by: {by} is no key of a config. Name a size of the model, such as mixers.mlp.d_intermediate."
        )
    for name, axis in axes.items():
        if any(
            by == key or by.startswith(f"{key}.")
            for settings in axis.values.values()
            for key in settings
            if key != "mixers"
        ):
            raise ConfigError(f"match.by: {by} is what axes.{name} sets. Name another size.")
    at, within = match.get("at"), match.get("within", 0.01)
    if at is not None and not _is_count(at):
        raise ConfigError(f"match.at: found {shortened(at)}, expected a number of tokens.")
    if not _is_number(within) or not 0 < within < 1:
        raise ConfigError(f"match.within: found {shortened(within)}, expected a share between 0 and 1, such as 0.01.")
    return Match(costs[0], target, by, at, float(within))


def read_rates(data: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return learning rates by pattern."""
    rates = section(data, "rates", "{default: [3.0e-4, 1.0e-3, 3.0e-3]}")
    if "default" not in rates:
        raise ConfigError(
            "rates.default: is missing. Give learning rates, ascending, such as [3.0e-4, 1.0e-3, 3.0e-3]."
        )
    for name, grid in rates.items():
        fits = isinstance(grid, list) and grid and all(_is_number(rate) and rate > 0 for rate in grid)
        if not fits or sorted(set(grid)) != grid:
            raise ConfigError(
                f"rates.{name}: found {shortened(grid)}, expected rates above 0, ascending, such as [3.0e-4, 1.0e-3]."
            )
    return {name: [float(rate) for rate in grid] for name, grid in rates.items()}


def read_seeds(data: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the seeds, three by default."""
    seeds = data.get("seeds", [0, 1, 2])
    fits = (
        isinstance(seeds, list)
        and 0 < len(seeds) <= _MAX_SEEDS
        and all(_is_count(seed, 0) and seed < 2**31 for seed in seeds)
    )
    if not fits or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds: found {shortened(seeds)}, expected 1 to {_MAX_SEEDS} different ones, such as [0, 1, 2]."
        )
    return tuple(seeds)


def read_measure(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is measured besides scores."""
    measure = section(data, "measure", "{contexts: [1024, 4096]}")
    check_keys(measure, ("contexts",), "measure.")
    contexts = measure.get("contexts") or []
    if not isinstance(contexts, list) or not all(_is_count(n) for n in contexts) or sorted(set(contexts)) != contexts:
        raise ConfigError(
            f"measure.contexts: found {shortened(contexts)}, expected tokens, ascending, such as [1024, 4096]."
        )
    return {"contexts": contexts}


def read_budget(data: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, int]:
    """Return the budget of a training, if steps do not say it."""
    budget = section(data, "budget", "{tokens: 1.0e+8}")
    check_keys(budget, ("tokens", "flops"), "budget.")
    if len(budget) > 1 or (budget and "steps" in train):
        raise ConfigError(
            f"budget: {listed([*budget, *(['train.steps'] if 'steps' in train else [])])} say the same. Leave one."
        )
    if not budget and "steps" not in train:
        raise ConfigError("train.steps: is missing. Give it, or a budget of tokens or flops.")
    for key, value in budget.items():
        if not _is_number(value) or value < 1:
            raise ConfigError(f"budget.{key}: found {shortened(value)}, expected a number of them, such as 1.0e+8.")
    return {key: int(value) for key, value in budget.items()}


def read_report(data: Mapping[str, Any], axes: Mapping[str, Axis]) -> dict[str, Any]:
    """Return what the report is told."""
    report = section(data, "report", "{x: attention_of_mixers, literature: []}")
    check_keys(report, ("x", "literature"), "report.")
    known = [*axes, *(f.name for f in dataclasses.fields(Costs))]
    if (x := report.get("x")) is not None and x not in known:
        raise ConfigError(
            f"report.x: {shortened(x)} is no axis and no cost.{nearest(x, known)} Known: {listed(known)}."
        )
    literature = report.get("literature") or []
    if not isinstance(literature, list) or not all(isinstance(name, str) for name in literature):
        raise ConfigError(
            f"report.literature: found {shortened(literature)}, expected names of published curves, or []."
        )
    for name in literature:
        # now, and not after the last training
        if name not in (known := published_names()):
            raise ConfigError(
                f"report.literature: there is no {shortened(name)}.{nearest(name, known)} Known: {listed(known)}."
            )
    return {"x": x, "literature": literature}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

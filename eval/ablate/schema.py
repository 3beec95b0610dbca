"""The file of a study: a question, a base config, and the axes along which models of it differ.

Read as configs are (:mod:`hybridzoo.zoo.config.files`): plain data, nothing evaluated. Under ``scales`` stand smaller and larger versions
of the study, each a part of such a file that is put on top of the rest: mappings key by key, lists and values in place of what was there. A
``match``, ``budget``, axis, and a task of another name, replace the earlier one as a whole, and ``null`` takes it out.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ...zoo.config.files import inherit, merge, read_config
from ...zoo.config.plain import plain
from ...zoo.config.shipped import CONFIGS
from ...zoo.errors import ConfigError, nearest, shortened
from .sections import (
    Axis,
    Match,
    check_keys,
    check_train,
    listed,
    read_axes,
    read_budget,
    read_combinations,
    read_match,
    read_measure,
    read_rates,
    read_report,
    read_seeds,
    section,
)

__all__ = ["Axis", "Match", "StudySpec", "described", "list_studies", "load_study", "written"]

STUDIES = CONFIGS / "studies"
_KEYS = (
    "name", "question", "about", "base", "axes", "only", "exclude", "match", "task", "train", "budget", "rates", "seeds", "measure",
    "report", "scales",
)  # fmt: skip
# a part of one stands for another thing than what it was
_WHOLE = ("match", "budget", "only", "exclude")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class StudySpec:
    """A study at one of its scales.

    Attributes:
        name: The file's, without ending; results are kept under it.
        scale: Which of ``scales``.
        question: In a line.
        about: More of it, for the report.
        base: The config that all points begin with, its own base merged in; not checked by itself.
        axes: By name, in the file's order.
        only: Values on axes; a point agrees with one of these.
        exclude: The same, and it agrees with none.
        match: What is equal, if anything is.
        task: ``{"name": ..., sizes}``; an axis may set keys of it.
        train: Options of :class:`~hybridzoo.zoo.train.options.TrainOptions` by name; an axis may set some.
        budget: ``{"tokens": n}`` or ``{"flops": n}`` of a training, which decides on its steps; or empty.
        rates: Learning rates, ascending, by architecture or by points' names, wildcards allowed; ``default`` for all others.
        seeds: The first is what rates are chosen with.
        measure: ``{"contexts": [tokens]}``: where speed and memory are measured.
        report: ``x``, the axis or cost that pictures have along, and ``literature``, published curves that may be laid over.
        data: All of the file that holds at this scale, as plain data.
        source: The shipped name or the path that it was read from; empty for a mapping.
    """

    name: str
    scale: str
    question: str
    about: str
    base: dict[str, Any]
    axes: dict[str, Axis]
    only: list[dict[str, list[Any]]]
    exclude: list[dict[str, list[Any]]]
    match: Match | None
    task: dict[str, Any]
    train: dict[str, Any]
    budget: dict[str, int]
    rates: dict[str, list[float]]
    seeds: tuple[int, ...]
    measure: dict[str, Any]
    report: dict[str, Any]
    data: dict[str, Any] = dataclasses.field(repr=False)
    source: str = ""


def list_studies() -> list[str]:
    """Return the names of the studies that come with the package, sorted."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(source: str | Path | Mapping[str, Any], scale: str = "short") -> StudySpec:
    """Read and check a study.

    Args:
        source: A name from :func:`list_studies`, a YAML file, or the same as a mapping.
        scale: One of the study's ``scales``; a study without any has the one that is called ``short``.

    Raises:
        ConfigError: There is no such study or scale, or something in it cannot work: the dotted key, what is wrong, and the remedy.
    """
    path = None if isinstance(source, Mapping) else _find(source)
    data = plain(source) if path is None else read_config(path)
    check_keys(data, _KEYS, "")
    spec = _spec(_at_scale(data, scale), scale, path)
    return dataclasses.replace(spec, source="" if path is None else str(source))


def described() -> list[dict[str, Any]]:
    """Describe each shipped study, for ``zoo ablate list``: its name, question and scales."""
    files = {name: read_config(STUDIES / f"{name}.yaml") for name in list_studies()}
    return [
        {"name": name, "question": data["question"], "scales": list(data.get("scales") or ["short"])}
        for name, data in files.items()
    ]


def written(spec: StudySpec) -> str:
    """Return the YAML of a study at its scale, its base written out, so that it needs no other file."""
    return OmegaConf.to_yaml(OmegaConf.create({"name": f"my-{spec.name}"} | spec.data | {"base": spec.base}))


def _find(source: str | Path) -> Path:
    if isinstance(source, str) and source in list_studies():
        return STUDIES / f"{source}.yaml"
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        raise ConfigError(f"study: there is no file {str(source)!r} in {Path.cwd()}. Check the path.")
    known = list_studies()
    raise ConfigError(
        f"study: unknown study {str(source)!r}.{nearest(source, known)} Known: {listed(known)}; or give a YAML file."
    )


def _at_scale(data: dict[str, Any], scale: str) -> dict[str, Any]:
    scales = section(data, "scales", "{smoke: {train: {steps: 100}}}")
    # one without any is of one size, whatever that is
    known = list(scales) or ["short"]
    if scale not in known:
        raise ConfigError(f"scales: there is no {scale!r}.{nearest(scale, known)} Known: {listed(known)}.")
    rest = {key: value for key, value in data.items() if key != "scales"}
    over = section(scales, scale, "{train: {steps: 100}}", "scales.") if scales else {}
    check_keys(over, [key for key in _KEYS if key not in ("name", "scales")], f"scales.{scale}.")
    merged = merge(rest, over)
    merged |= {key: over[key] for key in _WHOLE if key in over}
    task, axes = (section(over, key, "{}", f"scales.{scale}.") for key in ("task", "axes"))
    if "name" in task and task["name"] != section(rest, "task", "{name: mqar}").get("name"):
        merged["task"] = task
    if axes:
        both = section(rest, "axes", "{}") | axes
        merged["axes"] = {name: axis for name, axis in both.items() if axis is not None}
    return merged


def _spec(data: dict[str, Any], scale: str, path: Path | None) -> StudySpec:
    name, question = data.get("name", path.stem if path else "study"), data.get("question")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"name: {shortened(name)} is no name of a folder. Use letters, digits, '-', '_' and '.', 64 at most."
        )
    if not isinstance(question, str) or not question.strip() or "\n" in question.strip():
        raise ConfigError(f"question: found {shortened(question)}, expected what the study answers, in one line.")
    if not isinstance(about := data.get("about") or "", str):
        raise ConfigError(f"about: found {shortened(about)}, expected a text.")
    task, train = section(data, "task", "{name: mqar, length: 64, pairs: 4}"), section(data, "train", "{steps: 1000}")
    if not isinstance(task.get("name"), str):
        raise ConfigError(f"task.name: found {shortened(task.get('name'))}, expected a task, such as mqar.")
    # null takes an option out, steps in favour of a budget say
    train = {key: value for key, value in train.items() if value is not None}
    check_train(train)
    axes = read_axes(data)
    return StudySpec(
        name=name,
        scale=scale,
        question=question.strip(),
        about=about.strip(),
        base=_base(data.get("base"), path),
        axes=axes,
        only=read_combinations(data, "only", axes),
        exclude=read_combinations(data, "exclude", axes),
        match=read_match(data, axes),
        task=task,
        train=train,
        budget=read_budget(data, train),
        rates=read_rates(data),
        seeds=read_seeds(data),
        measure=read_measure(data),
        report=read_report(data, axes),
        data=data,
    )


def _base(base: Any, path: Path | None) -> dict[str, Any]:
    if not isinstance(base, str | dict):
        raise ConfigError(f"base: found {shortened(base)}, expected a config's name or path, or a config itself.")
    return inherit({"base": base} if isinstance(base, str) else base, path)

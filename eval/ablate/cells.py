"""The units of a study: a point is a model of the grid, a cell a training of it, and a result what came of that."""

import dataclasses
import hashlib
import json
from typing import Any

__all__ = ["Cell", "Costs", "Point"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of a model, asked of the model itself, built on the meta device.

    Attributes:
        params: Parameters, tied ones counted once.
        active_params: Those that a token passes through.
        flops: Of training per token at the task's length (three times the forward's); of a task of other units, per unit.
        state_bytes: What a sequence leaves behind at ``context`` tokens.
        context: The length that ``state_bytes`` is stated for.
        attention_of_mixers: Attention's share of the sequence mixers; ``None`` without any.
        attention_of_blocks: Attention's share of all residual blocks.
    """

    params: int
    active_params: int
    flops: int
    state_bytes: int
    context: int
    attention_of_mixers: float | None
    attention_of_blocks: float


@dataclasses.dataclass(frozen=True)
class Point:
    """A model of the grid.

    Attributes:
        name: Its place on the axes, as pictures and tables call it: ``"attention=0.25 place=even"``.
        axes: The value on each axis, by the axis's name.
        config: The resolved config, matched in cost, as plain data: what :func:`hybridzoo.build` takes.
        rates: Learning rates to choose from, ascending.
        costs: ``None`` where there is a ``problem``.
        problem: Why it cannot be built or matched; nothing of it is trained.
        task: ``{"name": ..., sizes}``, which an axis may have set a part of.
        train: Options of its trainings, likewise.
        foreign: Digests of the modules besides ours that register mixers of it, by their names.
    """

    name: str
    axes: dict[str, Any]
    config: dict[str, Any]
    rates: tuple[float, ...]
    costs: Costs | None = None
    problem: str | None = None
    task: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    foreign: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A training: a point with a learning rate and a seed.

    Attributes:
        study: The study's name.
        point: The model.
        rate: The peak learning rate.
        seed: Of weights, the order of rows, and the training data.
        task: ``{"name": ..., sizes}``, as :func:`~hybridzoo.eval.ablate.tasks.task_of` takes it.
        train: Options of the training, by the names of :class:`~hybridzoo.zoo.train.options.TrainOptions`; rate and seed are not in it.
        measure: What is measured besides the scores: ``{"contexts": [...]}``.
    """

    study: str
    point: Point
    rate: float
    seed: int
    task: dict[str, Any]
    train: dict[str, Any]
    measure: dict[str, Any] = dataclasses.field(default_factory=dict)

    def key(self, code: str) -> str:
        """Return the name that its result is kept under: a digest of all that decides about it, and of the code that computes it.

        Studies that hold the same cell share it, so neither the study's name nor the point's is part of it. Nor is the device, which every
        process of a study would have to have in common: a result says its own, and the report tells if they differ.
        """
        point = self.point
        decides = [point.config, self.rate, self.seed, self.task, self.train, self.measure, code, point.foreign]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, found: dict[str, Any]) -> "Cell":
        """Return the cell that :meth:`plain` gave."""
        point = dict(found["point"])
        costs = point["costs"] and Costs(**point["costs"])
        return cls(**found | {"point": Point(**point | {"costs": costs, "rates": tuple(point["rates"])})})

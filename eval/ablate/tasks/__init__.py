"""Tasks of cells: rows to train on, made from seeds, and the count of what is right."""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from ...tasks import near
from .copying import Copying, SelectiveCopying
from .in_context import LinearRegression, Parity, Retrieval
from .induction import Induction
from .mad import MAD
from .mqar import MQAR
from .text import Text

__all__ = ["TASKS", "Task", "task_of"]


class Task(Protocol):
    """The contract of a task; its sizes are the arguments that it is made with.

    Attributes:
        name: As studies call it.
        metric: The score that models are compared by: a key of what :meth:`score` returns.
        higher_is_better: Of the metric.
        chance: The metric of a guess; ``None`` where that says nothing.
        tokens_per_example: Units that a model reads of a row in training.
    """

    name: str
    metric: str
    higher_is_better: bool
    chance: float | None
    tokens_per_example: int

    def config(self) -> dict[str, Any]:
        """Return what every model of the task has in its config."""

    def training(self, seed: int, steps: int, batch_size: int) -> Any:
        """Return what so many steps are trained on, as ``zoo.train(data=)`` takes it."""

    def validation(self) -> Any:
        """Return what ``zoo.train(val=)`` takes: rows like those of the training, from another stream."""

    def score(self, model: Any, part: str, device: Any = None) -> dict[str, Any]:
        """Score a model on ``"valid"`` or ``"test"``: the metric, ``loss``, ``n``, and ``slices``, the same of parts by name."""


_IN_CONTEXT = (Parity, Retrieval, LinearRegression)
TASKS: dict[str, Any] = {
    kind.name: kind for kind in (MQAR, Induction, SelectiveCopying, Copying, MAD, Text, *_IN_CONTEXT)
}


def task_of(task: Mapping[str, Any]) -> Task:
    """Return the task that ``{"name": ..., sizes}`` names.

    Raises:
        ValueError: No such task, a size that it does not have, or sizes that cannot be; the message names the key.
    """
    given = dict(task)
    name = given.pop("name", None)
    if name not in TASKS:
        raise ValueError(f"task.name: {name!r} is not known.{near(str(name), TASKS)} Tasks: {', '.join(TASKS)}.")
    sizes = list(inspect.signature(TASKS[name]).parameters)
    for key in given:
        if key not in sizes:
            raise ValueError(f"task.{key}: {name} has no such size.{near(key, sizes)} It has {', '.join(sizes)}.")
    try:
        return TASKS[name](**given)
    except ValueError as e:
        raise ValueError(f"task.{e}") from e

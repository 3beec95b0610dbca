"""The table of tasks: the classes that models are built as, by the names that configs give them under ``task``."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..config.schema import SCHEMAS, ConfigSchema, check_choice
from ..errors import SourceError
from .causal_lm import CausalLM
from .image_classification import ImageClassifier
from .model import Model
from .sequence_regression import SequenceRegressor
from .token_classification import TokenClassifier

__all__ = ["check_language_model", "register_task", "task_of"]

T = TypeVar("T", bound=type[Model])

_tasks: dict[str, type[Model]] = {}


def register_task(name: str) -> Callable[[T], T]:
    """Class decorator: build configs with ``task: name`` as this :class:`~hybridzoo.zoo.models.model.Model`.

    Raises:
        ValueError: The name is taken by another class.
    """

    def wrap(cls: T) -> T:
        taken = _tasks.get(name, cls)
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"register_task({name!r}): the name is taken by {taken.__module__}.{taken.__qualname__}. Choose another."
            )
        _tasks[name], SCHEMAS[name] = cls, cls.schema
        return cls

    return wrap


def task_of(cfg: Mapping[str, Any]) -> type[Model]:
    """Return the class that a config's model is built as; a language model where the config names no task."""
    name = cfg.get("task", ConfigSchema.task)
    check_choice("task", name, _tasks)
    return _tasks[name]


def check_language_model(model: Model, name: object) -> None:
    """Refuse a model that continues no text, and has no likelihood of one, for who asks for that; ``name`` is what the caller named it by.

    Raises:
        SourceError: It has another task.
    """
    if not isinstance(model, CausalLM):
        raise SourceError(
            f"{name}: is no language model, its task is {model.task!r}. It neither continues texts nor scores them: name a causal_lm, or "
            "call this one yourself, zoo.load(...)(...).logits."
        )


register_task("causal_lm")(CausalLM)
register_task("image_classification")(ImageClassifier)
register_task("sequence_regression")(SequenceRegressor)
register_task("token_classification")(TokenClassifier)

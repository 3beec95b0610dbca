"""The options of :func:`hybridzoo.evaluate`. Nothing that this needs is an extra."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from ..zoo.images.damaged import DAMAGED
from ..zoo.options import option

__all__ = ["EvaluateCall", "ModelOptions", "TaskOptions"]

_MODEL = (
    "A folder, a config name (built untrained, with a warning), a hub id, or a model: one of ours, one of transformers for text, or an "
    "``LM`` of lm-eval, to which ``batch_size`` and the like then do not apply."
)
_TASKS = 'Of a text model: names, with wildcards for local ones (``"hybridzoo_*"``), or paths of YAML files; a list, or a text with commas.'
_DATA = (
    "Of an image model: a folder of class folders, a built-in set (``digits``), or what :func:`hybridzoo.zoo.images.images_from` takes "
    "besides. Where it has parts, ``test`` is taken, or ``val``."
)
_METADATA = (
    'Overrides of the local tasks\' sizes, for all (``{"docs": 100}``) or for one (``{"hybridzoo_mqar": {"pairs": 4}}``), '
    "and what other tasks take."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of :class:`HybridZooLM` that :func:`evaluate` hands on; an ``LM`` of lm-eval has its own."""

    batch_size: int | str = option("auto", 'Requests or images per forward, or ``"auto"``.')
    dtype: str = option("auto", "Of the weights of a model that is loaded.")
    device: str | None = option(None, "An object stays where it is.", unset="a GPU if there is one")
    tokenizer: Any = option(None, "A folder, a hub id or an object.", unset="the model's own")
    max_length: int | None = option(None, "Window in tokens.", unset="what the config states")
    add_bos_token: bool | None = option(None, "As ``HybridZooLM``.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of lm-eval's ``simple_evaluate`` that :func:`evaluate` hands on."""

    limit: int | float | None = option(
        None, "Documents per task, or images, or a share of them below 1; for trying things out."
    )
    num_fewshot: int | None = option(None, "Worked examples before each question, where a task allows it.")
    use_cache: str | os.PathLike[str] | None = option(
        None,
        "Path prefix of a database of answers, to take up an interrupted run or to add tasks; models are kept apart in it.",
    )
    log_samples: bool = option(False, 'Keep every request and answer under ``"samples"``.')
    gen_kwargs: dict[str, Any] | None = option(None, "Overrides of how tasks generate.")
    apply_chat_template: bool | str = option(
        False, "Put prompts into the tokenizer's chat template, or into the one of this name."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCall(TaskOptions, ModelOptions):
    """Arguments of a call of :func:`evaluate`."""

    model: Any = dataclasses.field(kw_only=False, metadata={"help": _MODEL})
    tasks: str | Sequence[str] | None = dataclasses.field(default=None, kw_only=False, metadata={"help": _TASKS})
    data: Any = option(None, _DATA)
    damaged: str = option(
        "stop", "What is done about images that are no whole files, named either way.", choices=DAMAGED
    )
    metadata: dict[str, Any] | None = option(None, _METADATA)
    output: str | os.PathLike[str] | None = option(None, "JSON file for the results, written whole or not at all.")
    progress: bool = option(True, "Show a bar on stderr, if that is a terminal.")

    def of(self, options: type) -> dict[str, Any]:
        """Return those of the options that a class names."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(options)}

"""One call for all evaluations: texts through lm-eval, images by ourselves."""

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

from ..zoo.config.resolve import load_config
from ..zoo.config.shipped import list_models
from ..zoo.options import called_with
from .options import EvaluateCall

__all__ = ["evaluate"]

# what both kinds of models have
_SHARED = {"model", "tasks", "data", "damaged", "limit", "batch_size", "device", "output", "progress"}
_IMAGES = "image_classification"


@called_with(EvaluateCall)
def evaluate(call: EvaluateCall) -> dict[str, Any] | None:
    """Score a text model on tasks of lm-eval, the local ones or any other, or an image model on images.

    Of tasks, the results are lm-eval's; ``None`` on all ranks but the first. Those of images are of ``eval.images.evaluate_images``.

    Raises:
        ModuleNotFoundError: A package is missing, and the message says which.
        ValueError: A task, data, a model or a device that does not exist, or an amount of nothing; tasks for an image model, or data for
            a text model.
    """
    if (call.tasks is None) == (call.data is None):
        both = "both are given" if call.data is not None else "neither is given"
        raise ValueError(
            f"evaluate: {both}. Give tasks (--tasks hybridzoo_mqar) for a text model, or data (--data digits) for an image model."
        )
    if call.data is not None:
        return _on_images(call)
    if _task_of(call.model) == _IMAGES:
        raise ValueError(
            "tasks: are of text models, and this one is for images. Give data in their place (--data digits)."
        )
    try:
        run = importlib.import_module(".run", __package__)
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("hybridzoo"):
            raise
        raise ModuleNotFoundError(
            f"evaluate: tasks need {e.name}. Install it with: pip install 'hybridzoo[eval]'", name=e.name
        ) from e
    return run.run_tasks(call)


def _on_images(call: EvaluateCall) -> dict[str, Any]:
    for field in dataclasses.fields(call):
        if field.name not in _SHARED and getattr(call, field.name) != field.default:
            raise ValueError(f"{field.name}: is an option of tasks, and these are images. Leave it out.")
    from .images import evaluate_images

    given = {name: getattr(call, name) for name in _SHARED - {"model", "data", "tasks"}}
    return evaluate_images(call.model, call.data, **given)


def _task_of(model: Any) -> str | None:
    """The task of a model, where it is one of ours; None where only others can say."""
    if not isinstance(model, str | os.PathLike):
        return getattr(model, "task", None)
    path = Path(model)
    ours = str(model) in list_models() or path.suffix in (".yaml", ".yml") or (path / "config.yaml").is_file()
    return load_config(model).task if ours else None

"""From what a user names to an image model that is ready to look at images."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load
from ..config.resolve import load_config
from ..device import pick_device
from ..models.build import build
from ..models.finite import check_finite
from ..models.image_classification import ImageClassifier
from ..named import check_model
from ..train.options import holds_weights

__all__ = ["check_head", "evaluating", "image_model", "name_of", "untrained"]


def image_model(model: Any, device: Any = None, instead: str = "Name an image model.") -> ImageClassifier:
    """Return the image model that is meant.

    Args:
        model: A saved folder, a hub id, the name of a config or its file (built untrained, with a warning), or a model, which stays where
            it is unless a device is named.
        device: A GPU by default, if there is one.
        instead: What to do with a model of another task, for its error.

    Raises:
        ValueError: The model is of another task, its weights are no numbers, or there is none of this name.
    """
    if isinstance(model, torch.nn.Module):
        _check(getattr(model, "task", type(model).__name__), "model", instead)
        return model if device is None else model.to(pick_device(device))  # type: ignore[return-value]
    name, at = str(model), pick_device(device)
    check_model(name)
    built: Any
    if not holds_weights(model) and not Path(name).is_dir():
        cfg = load_config(name)
        _check(cfg.task, name, instead)
        warnings.warn(f"{name} is a config: its model is untrained. Pass a folder of trained weights.", stacklevel=3)
        return untrained(cfg).to(at)
    built = load(name, device=at)
    _check(built.task, name, instead)
    check_finite(built, name)
    return built


def untrained(cfg: Any) -> ImageClassifier:
    """Return a config's model as it is before training, on the CPU; always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build(cfg)


def name_of(model: Any) -> str:
    """Return what results call a model: the name that it was asked for by, or its class's."""
    return type(model).__name__ if isinstance(model, torch.nn.Module) else str(model)


def check_head(model: ImageClassifier) -> None:
    """Refuse a model that tells nothing apart, with a ``ValueError``."""
    if not model.cfg.n_classes:
        raise ValueError("model: has no head (n_classes = 0), and tells nothing apart. Call reset_head, and train it.")


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Compute as in an evaluation, without gradients; the model is left in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _check(task: str, name: str, instead: str) -> None:
    if task != ImageClassifier.schema.task:
        raise ValueError(f"{name}: is a model for {task}, and this is for images. {instead}")

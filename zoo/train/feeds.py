"""The table of what models read, by the class that a task's models are of."""

import dataclasses
from typing import Any

from ..models.causal_lm import CausalLM
from ..models.image_classification import ImageClassifier
from ..models.model import Model
from ..models.sequence_regression import SequenceRegressor
from .feed import Feed
from .image_feed import ImageFeed
from .options import TrainOptions
from .text_feed import TextFeed
from .vector_feed import VectorFeed

__all__ = ["feed_of"]

_FEEDS: dict[type[Model], type[Feed]] = {CausalLM: TextFeed, ImageClassifier: ImageFeed, SequenceRegressor: VectorFeed}


def feed_of(core: Any, options: TrainOptions) -> Feed:
    """Return what a model reads, with the options that this kind has where they were left open.

    Raises:
        ValueError: Its task is none that can be trained, or an option is about something else.
    """
    for kind, feed in _FEEDS.items():
        if isinstance(core, kind):
            left = {name: value for name, value in feed.defaults.items() if getattr(options, name) is None}
            found = feed(core, dataclasses.replace(options, **left) if left else options)
            found.refuse_others()
            return found
    tasks = ", ".join(kind.schema.task for kind in _FEEDS)
    raise ValueError(f"train: a model whose task is {core.task!r} cannot be trained here. Tasks that can: {tasks}.")

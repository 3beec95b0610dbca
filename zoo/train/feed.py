"""The seam between a training and what its model reads: one loop trains on rows of tokens or vectors and on images, and knows none.

All that differs is a method here. :mod:`.text_feed`, :mod:`.image_feed` and :mod:`.vector_feed` are those that there are, and :mod:`.feeds`
finds the right one for a model; nothing else asks for a task.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from .batches import Batch
from .options import TrainOptions

__all__ = ["Feed"]


class Feed:
    """Says all that a training has to know of what a model reads.

    Args:
        core: The model.
        options: Of the training: a :class:`~hybridzoo.zoo.train.call.TrainCall`, where data are to be read.

    Attributes:
        kind: The word for it that options have (``of``).
        unit: What is counted, and speed is of, in the plural.
        row: The word for an example, in the singular.
        reads: The name of the model's input in a batch.
        defaults: Values of options that were left open.
    """

    kind: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    row: ClassVar[str] = ""
    reads: ClassVar[str] = ""
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, core: Any, options: Any):
        self.core, self.options = core, options

    def adapter(self, core: Any = None) -> Any:
        """Return the model, or another of its kind, as transformers' Trainer takes it."""
        raise NotImplementedError

    def fit(self, fresh: bool, overrides: Any) -> list[str]:
        """Let the model follow from the data where it may, a ``fresh`` one more than one with weights; return what there is to say."""
        return []

    def examples(self, devices: int) -> tuple[Any, Any]:
        """Return what is trained on, and what is evaluated on, if anything."""
        raise NotImplementedError

    def size(self, examples: Any) -> int:
        """Return the units that an example takes up."""
        raise NotImplementedError

    def flops(self, examples: Any, frozen: bool) -> float:
        """Return the FLOPs of a training step per unit; weights that stay as they are have no gradient."""
        raise NotImplementedError

    def mean(self, examples: Any) -> float:
        """Return the units that an example holds on average, without what fills it up."""
        return self.size(examples)

    def inputs(self, batch: Batch, examples: Any) -> dict[str, Any]:
        """Return the model's arguments for a batch of some examples."""
        return {name: batch[name] for name in (self.reads, "labels")}

    def targets(self, batch: Batch) -> Tensor:
        """Return the targets of a batch, int64; -100 where is none."""
        return batch["labels"]

    def prepared(self, batch: Batch, *key: int) -> Batch:
        """Return a batch as it is trained on; whatever is drawn follows from seed and ``key``: step, part of the step, and process."""
        return batch

    def items(self, batch: Batch, items: Any) -> Any:
        """Return what the adapter divides a summed loss by, for a prepared batch of a step with so many targets."""
        return items

    def carried(self) -> Any:
        """Return the state that goes from batch to batch, if any does."""
        return None

    def silent(self, part: Batch, examples: Any) -> dict[str, Any]:
        """Return the arguments by which the model is called for its experts' choices alone."""
        inputs = self.inputs(part, examples)
        inputs.pop("labels")
        return inputs

    def weight(self, part: Batch) -> Any:
        """Return what a part of a step counts for among the others."""
        return part["labels"].shape[0]

    def evaluated(self, trainer: Any) -> dict[str, float]:
        """Evaluate the Trainer's model; return ``eval_loss`` and more, by the names under which they are logged."""
        raise NotImplementedError

    def keep(self, folder: Path, step: int) -> None:
        """Leave in the run's folder what there is to know of the evaluation of a step, the best so far, besides numbers."""

    def described(self, examples: Any) -> list[str]:
        """Return what there is to say of examples, in lines."""
        return list(examples.about)

    def judged(self, examples: Any) -> str:
        """Return what there is to say of the examples that are evaluated on, in a line."""
        raise NotImplementedError

    def methods(self, training: Any) -> dict[str, str]:
        """Return what there is to say of how the examples of a training are used, each under a word for it."""
        return {}

    def in_memory(self, examples: Any) -> tuple[str, str]:
        """Return the words for an example of their size, in the plural, and for what makes it smaller."""
        raise NotImplementedError

    def done(self) -> None:
        """Undo what was done to the model for the training alone."""

    def refuse_others(self) -> None:
        """Refuse options that are about something else than what the model reads, with a ValueError."""
        default = TrainOptions()
        for field in dataclasses.fields(TrainOptions):
            of, value = field.metadata.get("of", ""), getattr(self.options, field.name)
            if of and of != self.kind and value != getattr(default, field.name):
                raise ValueError(
                    f"train({field.name}={value!r}): is for {of}, and this model reads {self.kind} (task: {self.core.task}). Leave it out."
                )

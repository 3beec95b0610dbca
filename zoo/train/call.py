"""The arguments of a training, and its result."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.model import Model
from .options import TrainOptions

__all__ = ["Interrupted", "TrainCall", "TrainResult"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, once what is needed to go on has been saved.

    Attributes:
        step: The step of the newest checkpoint; 0 if there is none.
        steps: Of the whole run.
        folder: The run's.
    """

    def __init__(self, step: int, steps: int, folder: Path):
        super().__init__(f"step {step} of {steps} is saved in {folder}; the same call goes on from there")
        self.step, self.steps, self.folder = step, steps, folder


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        model: The trained model, in evaluation mode; with ``val`` that of the ``best`` step. Of processes that shard one, the first has
            it, and the others have their parts.
        history: ``{"step", "loss", "learning_rate", "grad_norm", "seconds"}`` per logged step; the loss is the mean
            since the last one, in nats per token or image (of vectors, the squared error), and the seconds are those spent training, over
            all sessions, without what an interruption lost. Where there are experts, ``"aux_loss"`` and an ``"expert_load/N"`` for each of
            their layers: the load of the busiest over the mean. Where the step was evaluated, ``"eval_loss"``, in nats per target, and for
            bytes ``"eval_bits_per_byte"``; of images, of rows with labels and of vectors whose targets are signs ``"eval_accuracy"``, the
            share of right answers (of a row with labels, on average over rows), and of images from 11 classes on
            ``"eval_accuracy_top5"``.
        tokens: Read in all steps; of images or vectors, their number.
        seconds: Spent training, over all sessions.
        resumed_from: The step that this call started at.
        best: ``{"step", "eval_loss"}`` of the lowest loss in an evaluation; where answers are right or wrong, that of the
            highest accuracy, with ``"eval_accuracy"``. ``None`` without evaluations.
        unit: What ``tokens`` are: ``"tokens"``, ``"images"`` or ``"vectors"``.
    """

    model: Model
    history: list[dict[str, float]]
    tokens: int
    seconds: float
    resumed_from: int
    best: dict[str, float] | None = None
    unit: str = "tokens"

    @property
    def tokens_per_second(self) -> float:
        """Training throughput."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCall(TrainOptions):
    """Arguments of a call of :func:`train`."""

    model: Any = dataclasses.field(
        kw_only=False,
        metadata={
            "help": "A config (name, path, ``zoo.config(...)``) for a fresh model; or what is trained further: a model, or the folder or "
            "hub id of one, whose weights are read in float32."
        },
    )
    data: Any = dataclasses.field(
        kw_only=False,
        metadata={
            "help": "Of a language model ``(n, l)`` token ids (see :func:`~hybridzoo.zoo.train.data.pack`), a path that "
            ":func:`~hybridzoo.zoo.train.data.read_documents` understands, or ``-`` for standard input; or rows with labels of their own, "
            "``(input_ids, labels)``, each ``(n, l)``, the label at the token whose logits are to say it and -100 elsewhere, a ``.npz`` of "
            "both, or an object that makes such pairs when they are asked for (:func:`~hybridzoo.zoo.train.labelled.labelled_rows`). Of a "
            "model of images what "
            ":func:`~hybridzoo.zoo.images.examples.images_from` understands: a folder of class folders, a folder of ``datasets``, "
            "``digits`` or ``mnist-5k``, or arrays ``(images, labels)``. Of a model of vectors ``(inputs, labels)``, or rows made one by "
            "one (:class:`~hybridzoo.zoo.train.vector_rows.MadeRows`)."
        },
    )
    out: str | Path = dataclasses.field(kw_only=False, metadata={"help": "The run's folder."})
    overrides: Sequence[str] | Mapping[str, Any] | None = dataclasses.field(
        default=None, metadata={"help": "Changes to a config, as :func:`~hybridzoo.zoo.models.build.build` takes them."}
    )
    on_step: Callable[[int, float], None] | None = dataclasses.field(
        default=None, metadata={"help": "Called with the steps done and the last logged loss, after every step."}
    )

"""Vectors as a training has them: rows with a target at some of their places."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hf_vectors import HybridZooForSequenceRegression
from ..models.loss import IGNORE
from ..models.sequence_regression import missing
from .batches import Batch, evaluation_batches
from .feed import Feed
from .flops import flops_per_token
from .vector_rows import VectorExamples, vectors_from

__all__ = ["VectorFeed"]


class VectorFeed(Feed):
    """Rows of vectors for a model of them; see :class:`Feed`."""

    kind, unit, row, reads = "vectors", "vectors", "row", "inputs"
    defaults: ClassVar[dict[str, Any]] = {"batch_size": 64, "lr": 1e-3}

    def adapter(self, core: Any = None) -> HybridZooForSequenceRegression:
        """As :meth:`Feed.adapter`."""
        return HybridZooForSequenceRegression.wrap(core or self.core)

    def examples(self, devices: int) -> tuple[VectorExamples, VectorExamples | None]:
        """As :meth:`Feed.examples`."""
        call = self.options
        call.check_evaluated(call.val)
        rows = vectors_from(call.data, self.core.cfg)
        if call.val is None:
            return rows, None
        try:
            val = vectors_from(call.val, self.core.cfg)
        except ValueError as e:
            raise ValueError(f"val: {str(e).removeprefix('data: ')}") from e
        if call.until is not None and not val.signs:
            raise ValueError(
                f"train(until={call.until:g}): predicted numbers are not right or wrong, but for targets of -1 and 1. Leave it out."
            )
        return rows, val

    def size(self, examples: VectorExamples) -> int:
        """As :meth:`Feed.size`: an example is a row of vectors."""
        return examples.length

    def flops(self, examples: VectorExamples, frozen: bool) -> float:
        """As :meth:`Feed.flops`."""
        return flops_per_token(self.core, examples.length, frozen)

    def targets(self, batch: Batch) -> Tensor:
        """As :meth:`Feed.targets`: each number of a target counts."""
        return missing(batch["labels"])

    def evaluated(self, trainer: Any) -> dict[str, float]:
        """As :meth:`Feed.evaluated`: the mean squared error over all targets; auxiliary losses are not part of it.

        Where all targets are -1 or 1, ``eval_accuracy`` too, the share of predictions that have their sign.
        """
        model, examples = trainer.model, trainer.eval_dataset
        # sum of squares, targets, right signs
        sums = torch.zeros(3, dtype=torch.float64, device=trainer.args.device)
        with evaluation_batches(trainer) as batches:
            for batch in batches:
                found = (self.targets(batch) != IGNORE).sum()
                out = model(**self.inputs(batch, examples), num_items_in_batch=1)
                aux_loss, _ = model.reported
                error = out.loss if aux_loss is None else out.loss - aux_loss * found
                # 0, as good as either sign, is none of both
                right = (out.logits.sign() == batch["labels"]).sum()
                sums += torch.stack([x.double() for x in (error, found, right)])
        error, count, right = trainer.accelerator.reduce(sums, "sum").tolist()
        return {"eval_loss": error / count} | ({"eval_accuracy": right / count} if examples.signs else {})

    def judged(self, examples: VectorExamples) -> str:
        """As :meth:`Feed.judged`."""
        return examples.about[0]

    def in_memory(self, examples: VectorExamples) -> tuple[str, str]:
        """As :meth:`Feed.in_memory`."""
        return f"rows of {examples.length:,} vectors", f"rows of fewer vectors than {examples.length:,}"

"""Forward and backward of a batch: replayed from a CUDA graph where one can be recorded, and eager elsewhere."""

from typing import Any

import torch
from torch import Tensor

from ...layers.moe import MoE
from ..terminal import say
from .batches import Batch, filled
from .captured_step import CapturedStep, why_not_captured

__all__ = ["Stepping"]


class Stepping:
    """Takes batches through a recorded step, or says why the caller has to.

    Args:
        model: The adapter around the model, where it is trained.
        rows: Of a whole batch.
        most: The most documents of a row, where rows are packed.
        autocast: The type that is computed in, if it is not that of the weights.
        capture: The option of that name.
        why: Why no step can be recorded, if the caller knows that.

    Attributes:
        why_eager: Why no step is recorded; ``None`` where one is, or will be.

    Raises:
        ValueError: A step was to be recorded (``capture="on"``), and cannot be.
    """

    def __init__(
        self, model: Any, rows: int, most: int | None, autocast: torch.dtype | None, capture: str,
        why: str | None = None,
    ):  # fmt: skip
        self.model, self.rows, self.most, self.autocast, self.must = model, rows, most, autocast, capture == "on"
        self.reads: str = model.main_input_name
        self.captured: CapturedStep | None = None
        self.replayed = False
        self.balances = any(isinstance(m, MoE) for m in model.modules())
        self.why_eager: str | None = None
        why = "capture is off" if capture == "off" else why or why_not_captured(model.core, autocast)
        if why is not None:
            self._give_up(why)

    @property
    def says(self) -> str:
        """A line for who trains."""
        return "step: captured" if self.why_eager is None else f"step: eager, because {self.why_eager.rstrip('.')}"

    def take(self, batch: Batch, num_items: Tensor | None) -> Tensor | None:
        """Return the loss of a batch, with the gradients where a backward leaves them; ``None`` where nothing was done."""
        self.replayed = False
        b = batch["labels"].shape[0]
        if self.captured is None and self.why_eager is None and b == self.rows:
            self._record(batch, num_items is not None)
        # what is balanced among experts counts every row
        if self.captured is None or (b < self.rows and self.balances):
            return None
        batch, self.replayed = batch if b == self.rows else filled(batch, self.rows), True
        more = {"documents": batch["documents"]} if "documents" in batch else {}
        return self.captured(batch[self.reads], batch["labels"], num_items=num_items, **more)

    def statistics(self) -> dict[str, Tensor]:
        """Return what is logged of the last batch: its auxiliary loss, and of every layer of experts the highest load over the mean one."""
        source = self.captured if self.replayed else None
        aux_loss, router = self.model.reported if source is None else (source.aux_loss, source.router)
        loads = {f"expert_load/{one['layer_idx']}": one["load"].max() * one["load"].numel() for one in router}
        return loads if aux_loss is None else {"aux_loss": aux_loss, **loads}

    def _record(self, batch: Batch, num_items: bool) -> None:
        packed: dict[str, Any] = {"documents": batch["documents"], "most": self.most} if "documents" in batch else {}
        self.model.train()
        try:
            self.captured = CapturedStep(
                self.model.core,
                batch[self.reads],
                batch["labels"],
                num_items=num_items,
                autocast=self.autocast,
                **packed,
            )
        except (ValueError, RuntimeError) as e:
            if self.must and isinstance(e, torch.OutOfMemoryError):
                raise
            self._give_up(str(e).splitlines()[0].removeprefix("CapturedStep: "))
            say(self.says)

    def _give_up(self, why: str) -> None:
        if self.must:
            raise ValueError(
                f"train(capture='on'): the step cannot be captured: {why.rstrip('.')}. Use capture='auto'."
            )
        self.why_eager = why

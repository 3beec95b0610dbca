"""Truncated backpropagation through time (arXiv:1602.02410): a batch starts from the state of the one before, and gradients end there."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.model import Model
from ..models.state import ModelState

__all__ = ["CarriedState"]


class CarriedState:
    """The state that the rows of the last batch have left behind, for those of the next, of one process.

    Args:
        model: The model, every mixer of which must be able to carry a state.

    Raises:
        NotImplementedError: One cannot.
    """

    def __init__(self, model: Model):
        self.model = model
        for spec in model.backbone.blocks:
            spec.mixer.require("state")
        self.state: ModelState | None = None

    def forward(self, input_ids: Tensor, labels: Tensor, starts: Tensor, **kwargs: Any) -> Any:
        """Run a batch from where the last one ended, and keep what it leaves behind.

        Args:
            input_ids: ``(b, l)``.
            labels: ``(b, l + 1)``, the token after the row included.
            starts: ``(b,)`` bool, the rows that begin a document and know nothing of before.
            **kwargs: As of the model's forward.
        """
        before = self.state
        if before is not None:
            before = before.restarted(starts)
        out = self.model(input_ids, labels, state=before, return_state=True, **kwargs)
        self.state = out.state.detach()
        return out

    def drop(self) -> None:
        """Forget everything."""
        self.state = None

    def save(self, folder: Path, process: int) -> None:
        """Write the state into a checkpoint."""
        if self.state is not None:
            self.state.save(self._file(folder, process))

    def load(self, folder: Path, process: int, device: torch.device) -> None:
        """Read what :meth:`save` has written there; an error is a :class:`~hybridzoo.zoo.errors.CheckpointError`."""
        file = self._file(folder, process)
        self.state = ModelState.load(file, device) if file.exists() else None

    @staticmethod
    def _file(folder: Path, process: int) -> Path:
        return folder / f"carried-{process}.safetensors"

"""Truncated backpropagation through time (arXiv:1602.02410): a batch starts from the state of the one before, and gradients end there."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.model import Model
from ..models.state import ModelState
from ..models.state_cache import StateCache
from .batches import Batch
from .tokens import model_inputs

__all__ = ["CarriedState"]


class CarriedState:
    """The state that the rows of the last batch have left behind, for those of the next, of one process.

    Args:
        core: The model, every mixer of which must be able to carry a state.

    Raises:
        NotImplementedError: One cannot.
    """

    def __init__(self, core: Model):
        for block in core.backbone.blocks:
            block.mixer.require("state")
        self.state: ModelState | None = None

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the adapter for a batch of pieces, which go on from where the last ones ended, or begin documents."""
        starts: Tensor = batch["starts"]
        state = None if self.state is None else self.state.restarted(starts)
        return model_inputs(batch) | {"cache": StateCache(state), "use_cache": True}

    def keep(self, output: Any) -> None:
        """Take over what a batch has left behind, cut off from how it came about."""
        caches = (value for value in output.values() if isinstance(value, StateCache))
        state = next(caches).state
        assert state is not None
        self.state = state.detach()

    def save(self, folder: Path, process: int) -> None:
        """Write the state into a checkpoint."""
        if self.state is not None:
            self.state.save(_file(folder, process))

    def load(self, folder: Path, process: int, device: torch.device) -> None:
        """Read what :meth:`save` has written there; what cannot be read is a :class:`~hybridzoo.zoo.errors.CheckpointError`."""
        file = _file(folder, process)
        self.state = ModelState.load(file, device) if file.exists() else None


def _file(folder: Path, process: int) -> Path:
    return folder / f"carried-{process}.safetensors"

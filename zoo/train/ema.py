"""Weights averaged over the steps of a training, which are what is evaluated and saved as the model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from ..errors import CheckpointError
from .run_folder import AGAIN
from .weights import load_weights

__all__ = ["Ema", "load_averaged"]

# of a checkpoint: the folder of the averages, which is one of weights
EMA, WEIGHTS = "ema", "model.safetensors"


class Ema(TrainerCallback):
    """Keeps an exponential mean of the weights that are trained.

    In step t the mean keeps at most (1 + t) / (10 + t) of itself, so that a short training does not end close to its random beginning
    (as TensorFlow's ``ExponentialMovingAverage`` does with ``num_updates``).

    Args:
        model: The Trainer's.
        decay: Share of the mean that is kept in a step.
    """

    def __init__(self, model: Any, decay: float):
        self.decay, self.core = decay, model.core
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.means: list[Tensor] = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Start from the weights, where no checkpoint was read."""
        if not self.means:
            self.means = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        """Take the weights of a step in."""
        t = state.global_step
        take: Any = get_ema_multi_avg_fn(min(self.decay, (1 + t) / (10 + t)))
        for means, weights in _by_dtype(self.means, self.weights):
            take(means, weights, None)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the means in the place of the weights, within the block."""
        kept = [p.detach().clone() for p in self.weights]
        _copy(self.weights, self.means)
        try:
            yield
        finally:
            _copy(self.weights, kept)

    def save(self, folder: Path) -> None:
        """Write the means into a checkpoint, as a folder of weights."""
        means = {id(p): mean for p, mean in zip(self.weights, self.means, strict=True)}
        (folder / EMA).mkdir()
        tensors = {name: means.get(id(p), p).detach().cpu().contiguous() for name, p in self.core.named_parameters()}
        save_file(tensors, folder / EMA / WEIGHTS, {"format": "pt"})

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` has written into the weights, whose own values have to be read behind this."""
        load_averaged(self, folder)
        self.means = [p.detach().clone() for p in self.weights]


def load_averaged(trained: Any, folder: Path) -> None:
    """Fill the Trainer's model with the means of a checkpoint; one without any is a CheckpointError."""
    if not (folder / EMA).is_dir():
        raise CheckpointError(f"{folder}: holds no averaged weights. {AGAIN}")
    load_weights(trained, folder / EMA)


@torch.no_grad()
def _copy(to: list[Any], values: list[Tensor]) -> None:
    for p, value in zip(to, values, strict=True):
        p.copy_(value)


def _by_dtype(means: list[Tensor], weights: list[Any]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    for dtype in dict.fromkeys(mean.dtype for mean in means):
        pairs = [(mean, p.detach()) for mean, p in zip(means, weights, strict=True) if mean.dtype == dtype]
        yield [mean for mean, _ in pairs], [p for _, p in pairs]

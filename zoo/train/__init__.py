"""Training through transformers' Trainer."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .captured_step import CapturedStep
    from .diverged import Diverged
    from .memory import OutOfMemory
    from .options import TrainOptions
    from .run import Interrupted, TrainResult, train
    from .run_folder import DifferentRun

__all__ = [
    "CapturedStep",
    "DifferentRun",
    "Diverged",
    "Interrupted",
    "OutOfMemory",
    "TrainOptions",
    "TrainResult",
    "train",
]
__getattr__, __dir__ = lazily(
    __name__,
    CapturedStep="captured_step",
    DifferentRun="run_folder",
    Diverged="diverged",
    Interrupted="run",
    OutOfMemory="memory",
    TrainOptions="options",
    TrainResult="run",
    train="run",
)

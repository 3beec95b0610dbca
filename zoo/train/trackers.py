"""Trackers: where the logged numbers of a training go, besides its own log."""

from pathlib import Path

from transformers import TrainerCallback

__all__ = ["trackers"]


def trackers(report_to: str, out: Path, first_step: int) -> list[TrainerCallback]:
    """Return what reports to the trackers named, of a run in the folder ``out`` that goes on behind ``first_step``."""
    if report_to == "none":
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    # what an interrupted run logged after its last checkpoint is logged again
    again = first_step + 1 if first_step else None
    return [TensorBoardCallback(SummaryWriter(str(out / "tensorboard"), purge_step=again))]

"""The page of a run in its folder, ``report.html``: as far as the run has come."""

import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..checkpoint.publish import write_whole
from ..report.training import training_page
from .confusion import read_confusion
from .manifest import plain
from .run_folder import RunFolder

__all__ = ["REPORT", "Report", "write_report"]

REPORT = "report.html"


class Report(TrainerCallback):
    """Writes the page of a run at every checkpoint; one that cannot be written is said, and stops nothing."""

    def __init__(self, out: Path, about: dict[str, Any]):
        self.path, self.about, self.failed = out / REPORT, about, False

    def on_save(self, args, state, control, **kwargs):
        """Write the page as far as the run has come."""
        if state.is_world_process_zero:
            self._write({"history": plain(state.log_history), "finished": False})

    def finish(self, history: list[dict[str, float]], seconds: float) -> None:
        """Write the page of a run that is done."""
        self._write({"history": history, "seconds": seconds, "finished": True})

    def _write(self, log: dict[str, Any]) -> None:
        if self.failed:
            return
        try:
            write_page(self.path, {"about": self.about, **log})
        except Exception as e:  # a picture is no reason to lose a training
            self.failed = True
            print(f"{self.path}: cannot be written ({e})", file=sys.stderr)


def write_report(out: Path) -> Path:
    """Write the page of a run, finished or not, from what its folder holds; return its path.

    Raises:
        DifferentRun: The folder holds no training, or one of another version.
    """
    log = RunFolder(out).log()
    return write_page(out / REPORT, log)


def write_page(path: Path, log: dict[str, Any]) -> Path:
    """Write a page, whole or not at all."""
    write_whole(path, training_page(log | {"confusion": read_confusion(path.parent)}))
    return path

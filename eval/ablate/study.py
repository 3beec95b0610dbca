"""The public face of studies: a study by name or file, its plan, run, results, table and report."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .job import TRAIN_CELL, Job
from .store import Failure, Result, Store, foreign_modules

if TYPE_CHECKING:
    import pandas as pd

    from .cells import Point
    from .plan import Plan
    from .run import Summary
    from .schema import StudySpec

__all__ = ["Study"]


class Study:
    """A study: a grid of models of equal cost, trained over learning rates and seeds, and compared.

    ::

        study = Study("recall-ratio", "smoke")
        study.run()
        study.frame()

    Args:
        source: A shipped study (``zoo ablate list`` names them), a YAML file, or the content of one as a mapping.
        scale: ``"smoke"``, ``"short"`` or ``"paper"``.
        folder: Keeps queue and results; by default ``runs/ablate/NAME-SCALE``. Hosts that work together share it.
        storage: The queue's database, ``postgresql://USER@HOST/NAME``, ``mysql://`` or ``sqlite:///FILE``; by default a file in the folder.

    Attributes:
        function: Trains and scores a cell, as ``"module:function"``, which another of the same arguments and result may replace.

    Raises:
        ValueError: There is no such study or scale, or its file is wrong; the message names the key.
    """

    def __init__(
        self,
        source: "str | Path | Mapping[str, Any]",
        scale: str = "short",
        *,
        folder: "str | Path | None" = None,
        storage: str | None = None,
    ):
        from .schema import load_study

        self.spec: StudySpec = load_study(source, scale)
        self.folder = self._usual_folder() if folder is None else Path(folder)
        self.storage = storage
        self.function = TRAIN_CELL

    @functools.cached_property
    def points(self) -> "list[Point]":
        """The models of the grid, matched in cost; those that cannot be say why."""
        from .points import points_of

        return points_of(self.spec)

    @functools.cached_property
    def store(self) -> Store:
        """The results in the folder."""
        return Store(self.folder)

    def plan(self) -> "Plan":
        """Return the grid with its costs, and the time that it takes, by what has been trained so far; nothing is trained."""
        from .plan import plan_of

        return plan_of(self.spec, self.points, self.results())

    def run(
        self,
        workers: int = 1,
        only: str | None = None,
        minutes: float | None = None,
        device: str | None = None,
        *,
        again: bool = False,
        quiet: bool = False,
    ) -> "Summary":
        """Train what is missing. Any number of processes and hosts may do so at once, and any of them may be killed.

        Args:
            workers: Processes on this host; GPUs are dealt out to them in turn.
            only: Points to train, by a pattern of their names: ``"attention=0.25*"``.
            minutes: When to stop: no further cell is begun, and running ones keep a checkpoint.
            device: ``"cpu"`` or ``"cuda"``; a GPU by default, if there is one.
            again: Try cells again that were given up.
            quiet: Show nothing while it runs.

        Returns:
            The state of the study after it; also when Ctrl-C has ended it.

        Raises:
            ValueError: An argument is wrong, or the queue cannot be read, written or reached.
        """
        from .run import run_job

        job = self._job(only, minutes, device)
        if again:
            self._queue().forgive()
        return run_job(job, workers, quiet)

    def submit(
        self,
        workers: int = 1,
        only: str | None = None,
        minutes: float | None = None,
        device: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Let jobs of a SLURM cluster do what :meth:`run` does, a worker each; the cluster's hosts share the study's folder.

        Args:
            workers: Jobs.
            only: Points to train, by a pattern of their names.
            minutes: The time limit of each job, which stops three minutes before.
            device: As for :meth:`run`.
            settings: Of the jobs: options of ``sbatch``, such as ``{"partition": "gpu"}``, submitit's own, such as ``gpus_per_node`` and
                ``cpus_per_task``, and ``cluster``, submitit's executor: ``"slurm"``, or to try things ``"local"`` or ``"debug"``.

        Returns:
            Submitit's jobs.

        Raises:
            ValueError: No time limit, or too short a one, or a setting that submitit does not know.
        """
        from .cluster import submit

        return submit(self._job(only, None, device), workers, minutes, dict(settings or {}))

    def results(self) -> list[Result]:
        """Return the finished cells of this study, by this code."""
        return self.store.results(self._job().every_cell())

    def stale(self) -> int:
        """Count the results in the folder that are of other code, or of an earlier version of the study; nobody looks at them."""
        return self.store.stale(self._job().every_cell())

    def failures(self) -> list[Failure]:
        """Return the cells that were given up."""
        from .progress import snapshot

        if self.storage is None and not self.folder.is_dir():
            return []
        return snapshot(self._job(), self.store, self._queue()).failures

    def summary(self) -> "Summary":
        """Return the state of the study; nothing is trained."""
        from .progress import snapshot
        from .run import summary_of

        job = self._job()
        return summary_of(job, snapshot(job, self.store, self._queue()))

    def frame(self) -> "pd.DataFrame":
        """Return the results as a table, one row per cell."""
        from .frame import frame

        return frame(self.results(), self.points)

    def report(self, out: "str | Path | None" = None) -> Path:
        """Write ``report.html``, with tables and pictures beside it, into a folder, by default that of the study; return its path."""
        from .report import write_report

        folder = None if self.folder == self._usual_folder() else self.folder
        place = self.folder if out is None else Path(out)
        return write_report(self.spec, self.points, self.results(), self.failures(), place, folder)

    def _usual_folder(self) -> Path:
        return Path("runs/ablate") / f"{self.spec.name}-{self.spec.scale}"

    def _queue(self) -> Any:
        from .queue import Queue

        return Queue(self.folder, self.storage)

    def _job(self, only: str | None = None, minutes: float | None = None, device: str | None = None) -> Job:
        if minutes is not None and minutes <= 0:
            raise ValueError(f"minutes={minutes}: must be more than 0.")
        spec = self.spec
        job = Job(
            study=spec.name, points=tuple(self.points), measure=dict(spec.measure),
            seeds=tuple(spec.seeds), folder=str(self.folder.resolve()), storage=self.storage, code=self.store.code, device=device,
            imports=_imports(), until=None if minutes is None else time.time() + 60 * minutes, function=self.function,
        )  # fmt: skip
        return job.only(only)


def _imports() -> tuple[str, ...]:
    """Return what other processes have to import, so that they know the mixers that this one knows."""
    modules = foreign_modules().items()
    return tuple(str(file.resolve()) if "." not in name and file.suffix == ".py" else name for name, file in modules)

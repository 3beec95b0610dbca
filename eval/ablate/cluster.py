"""Workers as jobs of a SLURM cluster, through submitit: a job takes cells until none is left, and stops before its time is over.

The cluster's hosts share the study's folder. Where the file locks of that folder do not reach from host to host, a database is the queue's
place (``storage=``), and a host that is silent for a minute is taken for dead.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from .job import Job

__all__ = ["ClusterWorker", "submit"]

MARGIN = 3.0  # minutes before a job's end: the longest step, a checkpoint, and what SLURM needs


class ClusterWorker:
    """A worker as submitit calls it; one that is preempted lets go of its cell, and is submitted again."""

    def __call__(self, job: dict[str, Any], minutes: float) -> int:
        """Work for some minutes; return the number of results that the study then has."""
        from ...zoo.importing import import_mixers
        from .worker import work

        told = dataclasses.replace(Job.from_plain(job), until=time.time() + 60 * minutes)
        for source in told.imports:
            import_mixers(source)
        work(told)
        return len(told.store().results(told.every_cell()))

    def checkpoint(self, job: dict[str, Any], minutes: float) -> Any:
        """Return what submitit is to do where SLURM has ended the job before it was done: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job, minutes)


def submit(job: Job, workers: int, minutes: float, cluster: str | None, parameters: dict[str, Any]) -> list[Any]:
    """Submit workers.

    Args:
        job: The study.
        workers: Jobs.
        minutes: The time limit of each.
        cluster: ``"slurm"``, ``"local"`` or ``"debug"``; by default what submitit finds.
        parameters: Of submitit's executor.

    Returns:
        Submitit's jobs; what they print is in the study's folder, under ``slurm``.

    Raises:
        ValueError: Too few workers or minutes, or a parameter that submitit does not know.
    """
    from ...zoo.lazily import needed

    submitit = needed("submitit", "submits jobs to SLURM", "submitit")
    if workers < 1 or minutes <= MARGIN:
        raise ValueError(
            f"workers={workers}, minutes={minutes:g}: give one worker at least, and more than {MARGIN:g} minutes: in the last it stops."
        )
    place = Path(job.folder) / "slurm"
    place.mkdir(parents=True, exist_ok=True)
    # a database's password is in what is submitted
    place.chmod(0o700)
    try:
        executor = submitit.AutoExecutor(folder=place, cluster=cluster)
        executor.update_parameters(name=f"zoo-{job.study}", timeout_min=round(minutes), **parameters)
        with executor.batch():
            return [executor.submit(ClusterWorker(), job.plain(), minutes - MARGIN) for _ in range(workers)]
    except (RuntimeError, TypeError, NameError) as e:
        raise ValueError(f"submitit: {e}") from e

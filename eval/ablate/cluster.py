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

# settings that submitit has words of its own for, whatever the cluster
_SHARED = ("mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "stderr_to_stdout")
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


def submit(job: Job, workers: int, minutes: float | None, settings: dict[str, Any]) -> list[Any]:
    """Submit workers.

    Args:
        job: The study.
        workers: Jobs.
        minutes: The time limit of each.
        settings: Of submitit and of ``sbatch``, as :meth:`~hybridzoo.eval.ablate.study.Study.submit` takes them.

    Returns:
        Submitit's jobs; what they print is in the study's folder, under ``slurm``.

    Raises:
        ValueError: Too few workers or minutes, or a setting that submitit does not know.
    """
    from ...zoo.lazily import needed

    submitit = needed("submitit", "submits jobs to SLURM", "submitit")
    if workers < 1 or minutes is None or minutes <= MARGIN:
        raise ValueError(
            f"workers={workers}, minutes={minutes}: jobs need one worker at least and a time limit of more than {MARGIN:g} minutes, in the "
            "last of which they stop."
        )
    place = Path(job.folder) / "slurm"
    place.mkdir(parents=True, exist_ok=True)
    # a database's password is in what is submitted
    place.chmod(0o700)
    named = {key if key in _SHARED else f"slurm_{key}": _number(value) for key, value in settings.items()}
    try:
        executor = submitit.AutoExecutor(folder=place, cluster=named.pop("slurm_cluster", None))
        executor.update_parameters(name=f"zoo-{job.study}", timeout_min=round(minutes), **named)
        return [executor.submit(ClusterWorker(), job.plain(), minutes - MARGIN) for _ in range(workers)]
    except (RuntimeError, TypeError, NameError, AssertionError) as e:
        raise ValueError(f"submitit: {str(e).splitlines()[0]}") from e


def _number(value: Any) -> Any:
    """Return the number that a setting on a command line means, if it means one."""
    return int(value) if isinstance(value, str) and value.isdigit() else value

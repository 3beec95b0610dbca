"""Trackers: where the logged numbers of a training go, besides its own log."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainerCallback

from ..checkpoint.publish import write_whole
from .options import tracker_names

__all__ = ["reporting"]

IDS = "trackers.json"


@contextlib.contextmanager
def reporting(report_to: str, out: Path, first_step: int) -> Iterator[list[TrainerCallback]]:
    """Yield what reports to the trackers named, and end their runs with the block.

    A training in the folder ``out`` that goes on behind ``first_step`` goes on in the same runs; their names are kept in the folder.
    """
    before = _read(out / IDS) if first_step else {}
    ids: dict[str, str] = {}
    with contextlib.ExitStack() as ending:
        callbacks = []
        for name in tracker_names(report_to):
            callback, run = _BEGUN[name](out, before.get(name), first_step, ending)
            callbacks.append(callback)
            ids |= {name: run} if run else {}
        if ids != before and ids:
            write_whole(out / IDS, json.dumps(ids) + "\n")
        yield callbacks


def _tensorboard(out: Path, known: str | None, first_step: int, ending: contextlib.ExitStack) -> tuple[Any, None]:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    # what an interrupted run logged after its last checkpoint is logged again
    again = first_step + 1 if first_step else None
    return TensorBoardCallback(SummaryWriter(str(out / "tensorboard"), purge_step=again)), None


def _wandb(out: Path, known: str | None, first_step: int, ending: contextlib.ExitStack) -> tuple[Any, str | None]:
    import wandb
    from transformers.integrations import WandbCallback

    if wandb.run is not None:  # the caller's own, a sweep's say: it is theirs to end
        return WandbCallback(), None
    project = os.environ.get("WANDB_PROJECT", "hybridzoo")
    try:
        run = wandb.init(project=project, name=out.name, dir=str(out), id=known, resume="allow" if known else None)
    except wandb.errors.UsageError as e:
        raise ValueError(
            f"report_to='wandb': {str(e).rstrip('.')}. Run `wandb login`, or set WANDB_MODE=offline to keep everything here."
        ) from e

    def end(kind: type[BaseException] | None, *_: Any) -> None:
        run.finish(exit_code=0 if kind is None else 1)

    ending.push(end)
    return WandbCallback(), run.id


def _mlflow(out: Path, known: str | None, first_step: int, ending: contextlib.ExitStack) -> tuple[Any, str | None]:
    import mlflow
    from transformers.integrations import MLflowCallback

    if mlflow.active_run() is not None:
        return MLflowCallback(), None
    try:
        run = mlflow.start_run(run_id=known, run_name=None if known else out.name)
    except mlflow.exceptions.MlflowException:  # the one that was begun is not there any more
        if known is None:
            raise
        known, run = None, mlflow.start_run(run_name=out.name)

    def end(kind: type[BaseException] | None, *_: Any) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        mlflow.end_run("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    class Continued(MLflowCallback):
        """Logs no parameters again: MLflow refuses those that changed, such as when to save."""

        def setup(self, args: Any, state: Any, model: Any) -> None:
            super().setup(SimpleNamespace(run_name=None, to_dict=dict), state, None)

    ending.push(end)
    return Continued() if known else MLflowCallback(), run.info.run_id


_BEGUN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


def _read(file: Path) -> dict[str, str]:
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in ids.items() if isinstance(v, str)} if isinstance(ids, dict) else {}

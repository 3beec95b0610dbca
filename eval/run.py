"""Evaluate a text model through lm-eval, quietly: what ``zoo eval`` and ``zoo lm-eval`` call.

Local tasks load at once; lm-eval's index of some 14 000 YAMLs, which takes a quarter of a minute, is read only when a
task asks for it.
"""

import contextlib
import fnmatch
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from rich.console import Console
from tqdm import tqdm

from ..zoo.checkpoint.publish import write_whole
from ..zoo.device import pick_device
from ..zoo.named import option_pairs
from ..zoo.terminal import progress_bar
from .harness import HybridZooLM
from .options import EvaluateCall, ModelOptions, TaskOptions
from .pretrained import quiet
from .tasks import FOLDER, check_amounts, check_metadata, check_tasks, names, unknown_task

__all__ = ["lm_eval_main", "run_tasks", "table", "task_manager"]


def run_tasks(call: EvaluateCall) -> dict[str, Any] | None:
    """Score a model on tasks of lm-eval, as :func:`hybridzoo.evaluate` does; ``None`` on all ranks but the first."""
    model, metadata, tasks = call.model, call.metadata or {}, call.tasks or []
    tasks = [task for task in tasks.split(",") if task] if isinstance(tasks, str) else tasks
    if call.device is not None:
        pick_device(call.device)
    if call.output is not None and Path(call.output).is_dir():
        raise ValueError(f"output: {call.output} is a folder. Name a JSON file.")
    check_amounts(call.limit, call.batch_size)
    check_tasks(tasks)
    check_metadata(tasks, metadata)
    shared: dict[str, Any] = {"tokenizer": None} | metadata
    manager, chosen, foreign = _find(tasks, shared)
    of_tasks = call.of(TaskOptions) | {"use_cache": None if call.use_cache is None else str(call.use_cache)}
    with contextlib.ExitStack() as stack:
        if isinstance(model, torch.nn.Module):
            stack.callback(model.train, model.training)
        lm = model if isinstance(model, LM) else HybridZooLM(model, **call.of(ModelOptions))
        cut = getattr(lm, "truncated", 0)
        stack.enter_context(_quiet())
        if foreign and isinstance(lm, HybridZooLM) and not shared["tokenizer"]:
            # some tasks measure their prompts in tokens, and load the tokenizer by the name in the manager's metadata
            shared["tokenizer"] = stack.enter_context(tempfile.TemporaryDirectory())
            lm.tokenizer.save_pretrained(shared["tokenizer"])
        if isinstance(lm, HybridZooLM) and lm.rank == 0:
            stack.enter_context(_bar(lm, call.progress))
        results = simple_evaluate(model=lm, tasks=chosen, task_manager=manager, **of_tasks)
    if results is None:
        return None
    if isinstance(lm, HybridZooLM) and lm.truncated > cut:
        warnings.warn(
            f"evaluate: {lm.truncated - cut} requests exceed the window of {lm.max_length} tokens and lost their beginning. "
            "Raise max_length, or shorten the prompts.", stacklevel=4,
        )  # fmt: skip
    for samples in results.get("samples", {}).values():
        samples.sort(key=lambda sample: sample["doc_id"])  # ranks hand them in one after another
    if call.output is not None:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        write_whole(Path(call.output), text + "\n")
    return results


def table(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per task and metric.

    ``task, metric, value, stderr, chance, n, higher_is_better``; ``None`` where there is none.
    """
    rows = []
    for task, scores in results["results"].items():
        chance = results["configs"].get(task, {}).get("metadata", {}).get("chance", {})
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            stderr = scores.get(f"{metric}_stderr,{kind}")
            rows.append({
                "task": task, "metric": metric, "value": value, "stderr": stderr if isinstance(stderr, float) else None,
                "chance": chance.get(metric), "n": results["n-samples"].get(task, {}).get("effective"),
                "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
            })  # fmt: skip
    return rows


def task_manager(tasks: Sequence[str], metadata: dict[str, Any] | None = None) -> tuple[TaskManager, list[str]]:
    """A task manager that knows the given tasks, and their full names, wildcards resolved; fast if all are local.

    Raises:
        ValueError: A task that does not exist.
    """
    return _find(tasks, metadata)[:2]


def lm_eval_main(argv: Sequence[str]) -> None:
    """The command line of lm-eval, all of it, with ``--model hybridzoo`` and the local tasks known."""
    from lm_eval.__main__ import cli_evaluate

    argv = list(argv)
    named = any(arg.split("=")[0] in ("--tasks", "-t", "ls", "validate") for arg in argv)
    if named and not any(arg.split("=")[0] == "--include_path" for arg in argv):
        argv += ["--include_path", str(FOLDER)]
    if device := next((value for key, value in option_pairs(argv) if key == "--device"), None):
        pick_device(device)  # the adapter cannot tell cuda:0 from lm-eval's default
    with mock.patch.object(sys, "argv", ["lm-eval", *argv]):
        cli_evaluate()


def _find(tasks: Sequence[str], metadata: dict[str, Any] | None) -> tuple[TaskManager, list[str], bool]:
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    chosen: list[str] = []
    foreign: list[str] = []
    for task in tasks:
        if Path(task).suffix in (".yaml", ".yml") and Path(task).is_file():
            chosen.append(str(Path(task).resolve()))
        elif matches := [task] if task in manager.all_tasks else fnmatch.filter(manager.all_subtasks, task):
            chosen += matches
        elif task.startswith("hybridzoo"):
            raise ValueError(unknown_task(task))
        else:
            foreign.append(task)
    if foreign:
        manager = TaskManager(include_path=str(FOLDER), metadata=metadata)
        for task in foreign:
            matches = manager.match_tasks([task])
            if not matches:
                raise ValueError(unknown_task(task))
            chosen += matches
    if not chosen:
        raise ValueError(f"tasks: none are given. Local tasks: {', '.join(names())}.")
    return manager, list(dict.fromkeys(chosen)), bool(foreign)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        quiet("lm_eval", "transformers.tokenization_utils_base"),
        contextlib.redirect_stdout(sys.stderr),  # lm-eval prints about its search for a batch size
        mock.patch("lm_eval.api.task.tqdm", functools.partial(tqdm, disable=True)),
        # git complains outside of a checkout, and the description of the machine takes seconds
        mock.patch("lm_eval.evaluator.get_git_commit_hash", lambda: None),
        mock.patch("lm_eval.evaluator.add_env_info", lambda results: None),
    ):
        yield


@contextlib.contextmanager
def _bar(lm: HybridZooLM, wanted: bool) -> Iterator[None]:
    console = Console(stderr=True)
    bars: dict[str, Any] = {}
    with progress_bar(console, transient=True, disable=not (wanted and console.is_terminal)) as bar:

        def report(kind: str, done: int, total: int) -> None:
            if kind not in bars:
                bars[kind] = bar.add_task(kind.replace("_", " "), total=total, note="")
            bar.update(bars[kind], completed=done, total=total)

        before, lm.report = lm.report, report
        try:
            yield
        finally:
            lm.report = before

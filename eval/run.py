"""Evaluate a model through lm-eval, quietly: what ``zoo eval`` and ``zoo lm-eval`` call.

Local tasks load at once; lm-eval's index of some 14 000 YAMLs, which takes a quarter of a minute, is read only when a
task asks for it.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import json
import os
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
from ..zoo.options import called_with, option
from ..zoo.terminal import progress_bar
from .harness import HybridZooLM
from .pretrained import quiet
from .tasks import FOLDER, check_amounts, check_metadata, check_tasks, names, unknown_task

__all__ = ["evaluate", "lm_eval_main", "table", "task_manager"]

_MODEL = (
    "A folder, a config name (built untrained, with a warning), a hub id, a :class:`CausalLM`, a transformers model, or an ``LM`` of "
    "lm-eval, to which ``batch_size`` and the like then do not apply."
)
_TASKS = (
    'Names, with wildcards for local ones (``"hybridzoo_*"``), or paths of YAML files; a list, or a text with commas.'
)
_METADATA = (
    'Overrides of the local tasks\' sizes, for all (``{"docs": 100}``) or for one (``{"hybridzoo_mqar": {"pairs": 4}}``), '
    "and what other tasks take."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of :class:`HybridZooLM` that :func:`evaluate` hands on; an ``LM`` of lm-eval has its own."""

    batch_size: int | str = option("auto", 'Requests per forward, or ``"auto"``.')
    dtype: str = option("auto", "Of the weights of a model that is loaded.")
    device: str | None = option(None, "An object stays where it is.", unset="a GPU if there is one")
    tokenizer: Any = option(None, "A folder, a hub id or an object.", unset="the model's own")
    max_length: int | None = option(None, "Window in tokens.", unset="what the config states")
    add_bos_token: bool | None = option(None, "As :class:`HybridZooLM`.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of lm-eval's ``simple_evaluate`` that :func:`evaluate` hands on."""

    limit: int | float | None = option(None, "Documents per task, or a share of them below 1; for trying things out.")
    num_fewshot: int | None = option(None, "Worked examples before each question, where a task allows it.")
    use_cache: str | os.PathLike[str] | None = option(
        None,
        "Path prefix of a database of answers, to take up an interrupted run or to add tasks; models are kept apart in it.",
    )
    log_samples: bool = option(False, 'Keep every request and answer under ``"samples"``.')
    gen_kwargs: dict[str, Any] | None = option(None, "Overrides of how tasks generate.")
    apply_chat_template: bool | str = option(
        False, "Put prompts into the tokenizer's chat template, or into the one of this name."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCall(TaskOptions, ModelOptions):
    """Arguments of a call of :func:`evaluate`."""

    model: Any = dataclasses.field(kw_only=False, metadata={"help": _MODEL})
    tasks: str | Sequence[str] = dataclasses.field(kw_only=False, metadata={"help": _TASKS})
    metadata: dict[str, Any] | None = option(None, _METADATA)
    output: str | os.PathLike[str] | None = option(None, "JSON file for the results, written whole or not at all.")
    progress: bool = option(True, "Show a bar on stderr, if that is a terminal.")

    def of(self, options: type) -> dict[str, Any]:
        """Return those of the options that a class names."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(options)}


@called_with(EvaluateCall)
def evaluate(call: EvaluateCall) -> dict[str, Any] | None:
    """Score a model on tasks of lm-eval, the local ones or any other.

    The results are lm-eval's; ``None`` on all ranks but the first.

    Raises:
        ValueError: A task, a model or a device that does not exist, or an amount of nothing.
    """
    model, metadata = call.model, call.metadata or {}
    tasks = [task for task in call.tasks.split(",") if task] if isinstance(call.tasks, str) else call.tasks
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
            "Raise max_length, or shorten the prompts.", stacklevel=3,
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

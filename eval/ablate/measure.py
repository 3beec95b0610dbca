"""One cell: a model trained, scored on what it was chosen and what it was not chosen by, and measured."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cells import Cell
from .tasks import task_of

__all__ = ["speed_at", "train_cell"]

# a pass over a context is timed so often, and so many tokens are decoded behind it; neither goes on for longer than some seconds
_REPEATS, _DECODED, _ENOUGH = 3, 32, 2.0


def train_cell(
    cell: Cell, folder: Path, *, device: str | None = None, on_step: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Train a cell, score it and measure it.

    Called again with the same cell and folder it goes on from the last checkpoint, and a training that is finished is not repeated.

    Args:
        cell: The model, its task and its training.
        folder: Holds the training's folder, ``run``.
        device: As of :func:`hybridzoo.zoo.train`.
        on_step: Called with the steps done and the last logged loss, after every step.

    Returns:
        ``metric``; ``valid`` and ``test``, as :meth:`~.tasks.Task.score` gives them, of the best step on the validation; ``seconds`` of
        training, without evaluations; ``steps`` done, ``best_step``, and ``tokens`` read in all of them; ``tokens_per_second``;
        ``peak_bytes`` of a GPU's memory in training; the ``history`` of logged steps; ``stopped``, ``"solved"`` or ``"stalled"`` where
        the option ``until`` or ``patience`` ended it before the last step; ``device``, ``"cpu"`` or ``"cuda"``; and ``speed``, as
        :func:`speed_at` gives it, for every context that the cell names.

    Raises:
        KeyboardInterrupt: After Ctrl-C; a checkpoint is kept.
        Exception: As :func:`hybridzoo.zoo.train`.
    """
    from ...zoo.train.run import train

    task = task_of(cell.task)
    options: dict[str, Any] = {"steps": 1000, "batch_size": 64, "report_to": "none", **cell.train}
    options |= {"lr": cell.rate, "seed": cell.seed, "device": device, "on_step": on_step}
    steps, batch_size = options["steps"], options["batch_size"]
    data = task.training(cell.seed, steps, batch_size * options.get("accumulate", 1))
    if isinstance(data, tuple | np.ndarray):
        # tables are read faster than processes that read ahead are started, several for each of many cells
        options.setdefault("workers", 0)
    result = train(cell.point.config, data, folder / "run", val=task.validation(), **options)
    model = result.model
    with torch.no_grad(), precision_of(model, options.get("precision", "auto")):
        scores = {part: task.score(model, part) for part in ("valid", "test")}
        speed = [speed_at(model, context) for context in cell.measure.get("contexts", ())]
    done, best = int(result.history[-1]["step"]), result.best or {}
    solved = best.get("eval_accuracy", 0.0) >= (options.get("until") or math.inf)
    memory = [entry["memory_GiB"] for entry in result.history if "memory_GiB" in entry]
    return {
        "metric": task.metric, **scores, "seconds": result.seconds, "steps": done, "best_step": best.get("step", done),
        "tokens": result.tokens, "tokens_per_second": result.tokens_per_second,
        "peak_bytes": int(max(memory) * 2**30) if memory else None, "history": result.history,
        "stopped": None if done == steps else "solved" if solved else "stalled",
        "device": model.some_weight().device.type, "speed": speed,
    }  # fmt: skip


def precision_of(model: Any, precision: str) -> Any:
    """Return the autocast that a model is trained under with an option ``precision``, for what is asked of it afterwards."""
    from ...zoo.train.arguments import resolved_precision

    device = model.some_weight().device
    half = resolved_precision(precision, device.type == "cpu") == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()


@torch.no_grad()
def speed_at(model: Any, context: int) -> dict[str, Any]:
    """Measure a model on one row of ``context`` units, under the caller's autocast.

    Returns:
        ``context``; ``prefill_tokens_s``, of a pass over the row, and ``decode_tokens_s``, of steps behind it one by one, both medians of
        what is done within two seconds, and of one at least; ``peak_bytes``, the most that a GPU's memory held (``None`` on a CPU);
        ``state_bytes``, what the row leaves behind. Where the row does not fit, all but the context is ``None``, and ``problem`` says so.
    """
    model.eval()
    found: dict[str, Any] = dict.fromkeys(("prefill_tokens_s", "decode_tokens_s", "peak_bytes", "state_bytes"))
    device = model.some_weight().device
    try:
        return {"context": context, **found, **_measured(model, context, device)}
    except torch.OutOfMemoryError as e:
        torch.cuda.empty_cache()
        return {"context": context, **found, "problem": str(e).splitlines()[0]}


def _measured(model: Any, context: int, device: torch.device) -> dict[str, Any]:
    from ...layers.base import nbytes_of

    row, wait = _row_of(model, context, device), torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def timed(call: Callable[[], Any], times: int) -> tuple[float, Any]:
        taken: list[float] = []
        out = call() if device.type == "cuda" else None  # compiles, and asks for memory
        while len(taken) < times and sum(taken) < _ENOUGH:
            out = None  # what is measured is the memory of one pass
            wait()
            began = time.perf_counter()
            out = call()
            wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken), out

    def prefill(state: Any = None) -> Any:
        return model(
            row, state=state, return_state=True, **({"logits_to_keep": 1} if hasattr(model, "generate") else {})
        ).state

    seconds, after = timed(prefill, _REPEATS)
    left, token, after = nbytes_of(after.layers), row[:, -1], None
    # a state that has room for what is decoded, as a generation makes it
    state = prefill(model.init_state(1, context + _DECODED + 1, device))
    per_token, _ = timed(lambda: model.step(token, state), _DECODED)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "prefill_tokens_s": context / seconds, "decode_tokens_s": 1 / per_token, "peak_bytes": peak,
        "state_bytes": left,
    }  # fmt: skip


def _row_of(model: Any, context: int, device: torch.device) -> torch.Tensor:
    """Return a row of a model's inputs, ``(1, context)`` ids, or ``(1, context, n)`` numbers of a model of vectors."""
    drawn = torch.Generator().manual_seed(0)
    if "vocab_size" in model.cfg:
        return torch.randint(model.cfg.vocab_size, (1, context), generator=drawn).to(device)
    return torch.randn(1, context, model.cfg.inputs, generator=drawn).to(device)

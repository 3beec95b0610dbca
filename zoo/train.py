"""Training through transformers' ``Trainer``, on the one adapter: what it optimises, resumes, logs and saves.

A run is a folder::

    OUT/train.json         settings and the logged losses
    OUT/tensorboard/       the same, for TensorBoard
    OUT/checkpoints/       what a resumed run continues from: weights, optimiser, schedule, random states
    OUT/model.safetensors, config.yaml, ...    the trained model, as ``zoo.save`` writes it
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from .build import build, param_groups
from .checkpoint import load, save
from .checkpoint.files import write_whole
from .data import Rows, rows_from
from .device import pick_device
from .hf import HybridZooForCausalLM
from .lm import CausalLM
from .tokenizer import load_tokenizer

__all__ = ["DifferentRun", "TrainResult", "train"]

_LOG = "train.json"


class DifferentRun(ValueError):
    """The folder holds a run with other settings; the message says which."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind.

    Attributes:
        model: The trained model, in evaluation mode.
        history: ``{"step", "loss", "learning_rate", "grad_norm", "seconds"}`` per logged step; the loss is the mean
            since the last one, in nats per token, and the seconds are those spent training, over all sessions.
        tokens: Read in all steps.
        seconds: Spent training, over all sessions.
        resumed_from: The step that this call started at.
    """

    model: CausalLM
    history: list[dict[str, float]]
    tokens: int
    seconds: float
    resumed_from: int

    @property
    def tokens_per_second(self) -> float:
        """Training throughput."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    model: Any,
    data: str | Path | np.ndarray,
    out: str | Path,
    *,
    overrides: list[str] | None = None,
    steps: int = 1000,
    batch_size: int = 8,
    length: int | None = None,
    lr: float = 1e-3,
    warmup: float = 0.1,
    weight_decay: float = 0.1,
    seed: int = 0,
    save_every: int | None = None,
    resume: bool = True,
    report_to: str = "tensorboard",
    device: str | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train a language model: AdamW, linear warm-up, cosine decay to zero, gradients clipped at norm 1.

    An interrupted run (Ctrl-C, a crash) continues from its last complete checkpoint when it is called again, and a
    finished one is read from its folder.

    Args:
        model: A config (name, path, ``zoo.config(...)``), or a model to train further.
        data: ``(n, l)`` token ids (see :func:`~hybridzoo.zoo.data.pack`), or a path that
            :func:`~hybridzoo.zoo.data.read_documents` understands.
        out: The run's folder.
        overrides: Dotlist changes to a config.
        steps: Optimiser steps.
        batch_size: Rows per step and device.
        length: Tokens per row if ``data`` is a path; by default the config's ``max_length``, at most 512.
        lr: Peak learning rate.
        warmup: Steps until the peak, or their share of all steps if below 1.
        weight_decay: Of matrices; see :func:`~hybridzoo.zoo.build.param_groups`.
        seed: Of the weights and of the order of the rows.
        save_every: Steps between checkpoints; by default a tenth of all. The last two are kept.
        resume: Continue what is in ``out``; otherwise start again.
        report_to: ``tensorboard`` or ``none``.
        device: ``cpu`` or ``cuda``; by default the accelerator that is there.
        on_step: Called with the number of steps done and the last logged loss, after every step.

    Raises:
        ConfigError: The config is not valid.
        FileNotFoundError: No data.
        DifferentRun: ``out`` holds a run with other settings.
        ValueError: Data that cannot be read, ids outside the vocabulary, or a device that is not there.
        KeyboardInterrupt: After Ctrl-C, when the state has been saved.
    """
    out = Path(out)
    if steps < 1 or batch_size < 1:
        raise ValueError(f"train(steps={steps}, batch_size={batch_size}): both must be at least 1.")
    use_cpu = device is not None and pick_device(device, numbered=False).type == "cpu"
    torch.manual_seed(seed)
    given = isinstance(model, CausalLM)
    if not given:
        model = build(model, overrides)
    table = _table(data, model, length)
    settings = {
        "config": OmegaConf.to_container(model.cfg), "data": _digest(table), "steps": steps,
        "batch_size": batch_size, "lr": lr, "warmup": warmup, "weight_decay": weight_decay, "seed": seed,
        "start": _digest_weights(model) if given else None,
    }  # fmt: skip
    log = _open_run(out, settings, resume)
    per_step = batch_size * table.shape[1] * int(os.environ.get("WORLD_SIZE", "1"))  # torchrun says how many take part
    tokens = steps * per_step
    if log["finished"]:
        return TrainResult(load(out), log["history"], tokens, log["seconds"], resumed_from=steps)

    args = TrainingArguments(
        output_dir=str(out / "checkpoints"), max_steps=steps, per_device_train_batch_size=batch_size, seed=seed,
        learning_rate=lr, lr_scheduler_type="cosine", warmup_steps=warmup, weight_decay=weight_decay,
        save_steps=save_every or max(1, steps // 10), save_total_limit=2, logging_steps=max(1, steps // 200),
        use_cpu=use_cpu, dataloader_pin_memory=not use_cpu and torch.cuda.is_available(),
        remove_unused_columns=False, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    checkpoint = _last_complete(out / "checkpoints")
    session = _Session(per_step, log["seconds"], on_step)
    callbacks: list[TrainerCallback] = [session]
    if report_to == "tensorboard":
        callbacks.append(_tensorboard(out / "tensorboard"))
    trainer = _Trainer(HybridZooForCausalLM.wrap(model), args, train_dataset=Rows(table), callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # a backward of one device in a thread of its own costs a sixth of a small model's step; several devices need their threads
    apart = torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ
    with session.saving_on_interrupt(), _quiet(), torch.autograd.set_multithreading_enabled(apart):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if session.interrupted and trainer.state.global_step < steps:
        raise KeyboardInterrupt
    history = [
        {k: v for k, v in entry.items() if k != "epoch"} for entry in trainer.state.log_history if "loss" in entry
    ]
    if trainer.is_world_process_zero():
        save(model, out)
        _write(out / _LOG, log | {"finished": True, "history": history, "seconds": session.seconds})
    return TrainResult(model.eval(), history, tokens, session.seconds, resumed_from=session.first_step)


class _Trainer(Trainer):
    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        decayed = {id(p) for p in param_groups(model)[0]["params"]}
        return [name for name, p in model.named_parameters() if id(p) in decayed]


class _Session(TrainerCallback):
    """Watches one call of the Trainer: shows progress, measures time, and turns Ctrl-C into a checkpoint."""

    def __init__(self, tokens_per_step: int, seconds_before: float, on_step: Callable[[int, float], None] | None):
        self.tokens_per_step, self.before, self.on_step = tokens_per_step, seconds_before, on_step
        self.interrupted = False
        self.first_step = 0
        self.start = time.monotonic()
        self.end: float | None = None
        self.bar: Progress | None = None

    @property
    def seconds(self) -> float:
        return self.before + (self.end or time.monotonic()) - self.start

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        # a checkpoint knows the time that led to it; what came after it was lost
        self.before = next((entry["seconds"] for entry in reversed(state.log_history) if "seconds" in entry), 0.0)
        self.start = time.monotonic()
        console = Console(stderr=True)
        if not state.is_local_process_zero:
            return
        if state.global_step:
            console.print(f"resuming at step {state.global_step} of {state.max_steps}", highlight=False)
        if console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=console, transient=True)
            self.bar.add_task("", total=state.max_steps, completed=state.global_step, note="")
            self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)
        if self.on_step:
            losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
            self.on_step(state.global_step, next(losses, float("nan")))
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history[-1]["seconds"] = round(self.seconds, 3)
        if self.bar and logs and "loss" in logs:
            rate = (state.global_step - self.first_step) * self.tokens_per_step / (self.seconds - self.before)
            self.bar.update(self.bar.task_ids[0], note=f"loss {logs['loss']:.3f}  {rate:,.0f} tokens/s")

    def on_train_end(self, args, state, control, **kwargs):
        self.end = time.monotonic()
        if self.bar:
            self.bar.stop()

    @contextlib.contextmanager
    def saving_on_interrupt(self) -> Iterator[None]:
        def ask(signum, frame):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, ask) if main else None
        try:
            yield
        finally:
            if self.bar:
                self.bar.stop()
            if main:
                signal.signal(signal.SIGINT, before)


def _table(data: str | Path | np.ndarray, model: CausalLM, length: int | None) -> np.ndarray:
    if isinstance(data, np.ndarray):
        table = data
    else:
        tokenizer = load_tokenizer(model.cfg.tokenizer)
        table = rows_from(
            data, length or min(512, model.cfg.max_length or 512), tokenizer.encode, tokenizer.eos_token_id or 0
        )
    if (highest := max(int(table.max()), ~int(table.min()))) >= model.cfg.vocab_size:
        raise ValueError(
            f"data: token id {highest} is outside the model's vocabulary of {model.cfg.vocab_size}. Set vocab_size, or "
            f"tokenize with the config's tokenizer ({model.cfg.tokenizer})."
        )
    return table


def _open_run(out: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    new: dict[str, Any] = {"settings": settings, "finished": False, "history": [], "seconds": 0.0}
    old = _read(out / _LOG)
    if old is not None and resume:
        differing = [key for key, value in settings.items() if old["settings"].get(key) != value]
        if differing:
            key = differing[0]
            shown = (
                ""
                if key in ("config", "data", "start")
                else f" ({old['settings'].get(key)} there, {settings[key]} now)"
            )
            raise DifferentRun(f"{out}: holds a run with another {key}{shown}. Use another folder, or turn resume off.")
        return old
    if not resume:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / _LOG, new)
    return new


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write(file: Path, content: Any) -> None:
    write_whole(file, json.dumps(content, indent=1) + "\n")


def _last_complete(folder: Path) -> Path | None:
    # the Trainer writes its state last: a checkpoint without it was cut short
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda f: -int(f.name.rsplit("-", 1)[1])):
        if _read(checkpoint / "trainer_state.json") is not None:
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _digest(table: np.ndarray) -> str:
    # of very large tables a sample must do
    rows = table[:: max(1, table.size // 10_000_000)]
    return hashlib.sha256(str(table.shape).encode() + np.ascontiguousarray(rows).tobytes()).hexdigest()


def _digest_weights(model: CausalLM) -> float:
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # every checkpoint would otherwise draw a bar of its own, and remark on the file system
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def _tensorboard(folder: Path) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder)))

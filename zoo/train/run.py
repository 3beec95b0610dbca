"""Training through transformers' ``Trainer``, on the one adapter; :mod:`.run_folder` says what it leaves behind."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from ..checkpoint import load, save
from ..digests import digest_weights
from ..images.builtin import check_data
from ..models.model import Model
from ..options import called_with
from .arguments import on_cpu, resolved_precision, training_arguments
from .batches import collated
from .call import Interrupted, TrainCall, TrainResult
from .disk import naming_disk
from .diverged import Diverged
from .ema import load_averaged
from .evaluation import best_of, has_ended
from .feed import Feed
from .feeds import feed_of
from .flops import peak_flops
from .header import command_of, described, facts_of, methods_of
from .loop import ZooTrainer
from .lora import adapted, lora_config, save_adapter
from .manifest import Checkpoint, loss_entries
from .memory import OutOfMemory, naming_memory
from .options import TrainOptions, check_out
from .processes import devices_in_one, in_first
from .report import Report
from .run_folder import DifferentRun, RunFolder
from .session import Session, Workload
from .start import start_from, weights_from
from .trackers import reporting
from .weights import load_weights

__all__ = ["DifferentRun", "Diverged", "Interrupted", "OutOfMemory", "TrainCall", "TrainResult", "train"]


@called_with(TrainCall)
def train(call: TrainCall) -> TrainResult:
    """Train a model on text or images; by default AdamW, linear warm-up, cosine decay to zero, gradients clipped at norm 1.

    An interrupted run (Ctrl-C, a crash) continues from its last checkpoint when it is called again, with the numbers of a run that was
    not interrupted, and a finished one is read from its folder. Rows in which nothing is to be predicted are left out. Weights decay
    as :func:`~hybridzoo.zoo.models.build.param_groups` says.

    A fresh model of images takes ``n_classes`` and ``labels`` from the data, whatever its config says, unless they are overridden: then
    they have to agree. A model with weights keeps its head where that knows all classes of the data, and gets a new one for others.
    ``image_size`` and ``in_channels`` are the model's, and images are brought to them; but for arrays and built-in sets a fresh model has
    to have their channels, and where either is of less than 64 pixels their size, or be told to be of another.

    Raises:
        CheckpointError: Weights that cannot be read, or a run without a whole checkpoint.
        ConfigError: The config is not valid.
        DifferentRun: ``out`` holds something else, or another process is training there.
        Diverged: A loss, gradient or weight is no longer finite, or the loss has risen (``spike``); the last good checkpoint is kept.
        FileNotFoundError: No data.
        NotADirectoryError: ``out`` is a file.
        Interrupted: After Ctrl-C, when the state has been saved; a KeyboardInterrupt.
        OutOfMemory: A step does not fit; the last checkpoint is kept.
        ValueError: Data that cannot be read, ids outside the vocabulary, a device that is not there, or numbers that cannot work.
    """
    out = Path(call.out)
    check_out(out)
    for source in (call.data, call.val):
        if isinstance(source, str | os.PathLike):
            check_data(source)
    use_cpu = on_cpu(call.device)
    call = dataclasses.replace(call, precision=resolved_precision(call.precision, use_cpu))
    torch.manual_seed(call.seed)
    core, header = start_from(call.model, call.overrides, out, call.base)
    feed = feed_of(core, call)
    call = feed.options
    header += feed.fit(weights_from(call.model, call.base) is None, call.overrides)
    adapters = lora_config(core, call, weights_from(call.model, call.base))
    devices = int(os.environ.get("WORLD_SIZE", "0")) or (1 if use_cpu else max(1, torch.cuda.device_count()))
    rows, val = feed.examples(devices)
    per_step = feed.options.batch_size * call.accumulate * devices * feed.size(rows)
    run = RunFolder(out)
    with contextlib.ExitStack() as claimed:
        claimed.enter_context(naming_disk(out))
        log, settings = None, {}
        # torchrun says which process is the first, before they know each other
        if os.environ.get("RANK", "0") == "0":
            settings = _settings(feed, rows, val, devices)
            log = run.finished(settings) if call.resume else None
            if log is None:
                claimed.enter_context(run.claim())
        args = training_arguments(out, call, use_cpu, val is not None)
        log, checkpoint = in_first(
            args, lambda: (log, None if log else run.open(settings, call.resume, call.overwrite))
        )
        if log is not None:
            history = log["history"]
            tokens = per_step * int(history[-1]["step"])
            return TrainResult(load(out), history, tokens, log["seconds"], call.steps, log.get("best"), feed.unit)
        said = described(feed, rows, args)
        methods, work = methods_of(feed, rows, val, args), _workload(feed, rows, args, frozen=adapters is not None)
        model, how = _wrapped(feed, adapters, args, work)
        methods |= how
        lines = [*header, *said.values(), *(f"{word}: {text}" for word, text in methods.items())]
        session = Session(lines, work, checkpoint, call.on_step)
        if args.process_index == 0:
            facts = facts_of(core, "; ".join(header), said | methods, args.device)
            run.describe(_about(call, facts, session.work), session.first_step)
        report = Report(run.path, run.about)
        try:
            with naming_memory(call, feed.in_memory(rows), args.device, run.kept):
                history = _run(model, (rows, val), args, run, session, checkpoint, feed, report)
            best = best_of(history)
            _take(model, run, call, history, best)
            core = _outcome(model, feed, adapters, first=args.process_index == 0)
            if args.process_index == 0:
                save(core, out)
                report.finish(history, session.saved_seconds)
                run.finish(history, session.saved_seconds, best)
        except KeyboardInterrupt:
            raise Interrupted(run.last_step(), call.steps, out) from None
    tokens = per_step * int(history[-1]["step"])
    return TrainResult(core.eval(), history, tokens, session.saved_seconds, session.first_step, best, feed.unit)


def _settings(feed: Feed, rows: Any, val: Any, devices: int) -> dict[str, Any]:
    """Return what a call has to have in common with those that it continues."""
    call, core = feed.options, feed.core
    data = {"data": rows.digest, "val": None if val is None else val.digest}
    start = None if weights_from(call.model, call.base) is None else digest_weights(core)
    config = {"config": OmegaConf.to_container(core.cfg)}
    return config | data | call.settings(feed.kind) | {"devices": devices, "start": start}


def _take(
    model: Any, run: RunFolder, options: TrainOptions, history: list[dict[str, float]], best: dict[str, float] | None
) -> None:
    """Let the model be that of the best step, or the average of its weights there."""
    last = int(history[-1]["step"])
    step = last if best is None else int(best["step"])
    if options.ema is not None:
        load_averaged(model, run.checkpoint(step).folder)
    elif step < last:
        load_weights(model, run.checkpoint(step).folder)


def _run(
    model: Any, data: tuple[Any, Any], args: TrainingArguments, run: RunFolder, session: Session,
    checkpoint: Checkpoint | None, feed: Feed, report: Report,
) -> list[dict[str, float]]:  # fmt: skip
    """Take the steps that are left, and give what was logged in all of them."""
    options = feed.options
    if checkpoint is not None:
        history = checkpoint.history()
        if checkpoint.step >= args.max_steps or has_ended(history, options):
            # stopped after its last step: there is nothing left to train
            load_weights(model, checkpoint.folder)
            return history
    if options.checkpointing:
        model.core.gradient_checkpointing_enable()
    named = options.report_to if args.process_index == 0 else "none"
    # a backward of one device in a thread of its own costs a sixth of a small model's step; several devices need their threads
    apart = torch.cuda.device_count() > 1 and devices_in_one()
    with reporting(named, run.path, session.first_step) as callbacks, session.saving_on_interrupt(), _quiet():
        trainer = _trainer(options)(
            model, args, train_dataset=data[0], eval_dataset=data[1], data_collator=collated,
            callbacks=[*callbacks, report], feed=feed, options=options, run=run, session=session,
            checkpoint=checkpoint,
        )  # fmt: skip
        if args.device.type == "cuda":
            session.header.append(trainer.stepping.says)
            run.about.setdefault("facts", {})["step"] = trainer.stepping.says.removeprefix("step: ")
        with torch.autograd.set_multithreading_enabled(apart):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
        history = loss_entries(trainer.state.log_history)
        if trainer.state.global_step < args.max_steps and not has_ended(history, options):
            raise KeyboardInterrupt
    return history


def _wrapped(feed: Feed, adapters: Any, args: TrainingArguments, work: Workload) -> tuple[Any, dict[str, str]]:
    """Return the model as the Trainer gets it, and what there is to say of how it is trained."""
    model, about = adapted(feed.core, adapters) if adapters else (feed.adapter(), {})
    if feed.options.shard:
        about["sharding"] = f"weights, gradients and the optimiser's state over {args.world_size} processes (FSDP2)"
    if work.device and work.peak is None:
        about["MFU"] = f"left out: the peak of {torch.cuda.get_device_name(work.device)} is not known"
    return model, about


def _trainer(options: TrainOptions) -> type[ZooTrainer]:
    if not options.shard:
        return ZooTrainer
    from .sharded_trainer import ShardedTrainer

    return ShardedTrainer


def _outcome(model: Any, feed: Feed, adapters: Any, first: bool) -> Model:
    """Return the model that comes of the Trainer's: gathered where processes hold parts, and adapters, kept by themselves, merged."""
    call = feed.options
    if call.shard:
        from .sharding import gathered

        model = gathered(model, adapters, feed)
    if adapters and first:
        save_adapter(model, Path(call.out))
    if adapters and (first or not call.shard):  # what others hold are parts
        model.merge_and_unload()
    feed.done()
    model.core.batch_mean = None
    return model.core


def _workload(feed: Feed, rows: Any, args: TrainingArguments, frozen: bool) -> Workload:
    """Return the work of a step, as it is measured against time."""
    devices = args.world_size * max(1, args.n_gpu)
    units = feed.mean(rows) * args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
    gpu, peak = args.device if args.device.type == "cuda" else None, None
    if gpu:
        peak = peak_flops(torch.cuda.get_device_name(gpu), half=args.bf16 or args.fp16)
    return Workload(units, feed.flops(rows, frozen), peak and peak * devices, gpu, feed.unit)


def _about(call: TrainCall, facts: dict[str, str], work: Workload) -> dict[str, Any]:
    """Return what a page of the run has to know besides what is logged."""
    out, model = Path(call.out), call.model
    named = isinstance(model, str | os.PathLike)
    return {
        "name": (Path(model).stem if Path(model).suffix in (".yaml", ".yml") else Path(model).name) if named else out.name,
        "folder": str(out), "command": command_of(call, model, call.data),
        "steps": call.steps, "unit": work.unit, f"{work.unit}_per_step": work.units, "facts": facts,
    }  # fmt: skip


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

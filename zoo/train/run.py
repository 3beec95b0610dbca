"""Training through transformers' ``Trainer``, on the one adapter; :mod:`.run_folder` says what it leaves behind."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from ..checkpoint import load, save
from ..corpus.places import check_path
from ..digests import digest_weights
from ..hf import HybridZooForCausalLM
from ..models.model import Model
from ..options import called_with
from .arguments import on_cpu, resolved_precision, training_arguments
from .disk import naming_disk
from .diverged import Diverged
from .evaluation import best_of, has_stalled
from .examples import Examples, examples_from, lanes_from
from .flops import context_length, flops_per_token, peak_flops
from .header import command_of, described, facts_of, methods_of
from .loop import ZooTrainer
from .lora import adapted, lora_config, save_adapter
from .manifest import Checkpoint, loss_entries
from .memory import OutOfMemory, naming_memory
from .options import TrainOptions, check_out
from .processes import in_first
from .report import Report
from .run_folder import DifferentRun, RunFolder
from .session import Session, Workload
from .start import start_from, weights_from
from .trackers import reporting
from .weights import load_weights

__all__ = ["DifferentRun", "Diverged", "Interrupted", "OutOfMemory", "TrainCall", "TrainResult", "train"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, once what is needed to go on has been saved.

    Attributes:
        step: The step of the newest checkpoint; 0 if there is none.
        steps: Of the whole run.
        folder: The run's.
    """

    def __init__(self, step: int, steps: int, folder: Path):
        super().__init__(f"step {step} of {steps} is saved in {folder}; the same call goes on from there")
        self.step, self.steps, self.folder = step, steps, folder


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        model: The trained model, in evaluation mode; with ``val`` that of the ``best`` step. Of processes that shard one, the first has
            it, and the others have their parts.
        history: ``{"step", "loss", "learning_rate", "grad_norm", "seconds"}`` per logged step; the loss is the mean
            since the last one, in nats per token, and the seconds are those spent training, over all sessions, without what an interruption
            lost. Where there are experts, ``"aux_loss"`` and an ``"expert_load/N"`` for each of their layers: the load of the busiest over
            the mean. Where the step was evaluated, ``"eval_loss"``, in nats per target, and for bytes ``"eval_bits_per_byte"``.
        tokens: Read in all steps.
        seconds: Spent training, over all sessions.
        resumed_from: The step that this call started at.
        best: ``{"step", "eval_loss"}`` of the lowest loss on ``val``; ``None`` without it.
    """

    model: Model
    history: list[dict[str, float]]
    tokens: int
    seconds: float
    resumed_from: int
    best: dict[str, float] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Training throughput."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCall(TrainOptions):
    """Arguments of a call of :func:`train`."""

    model: Any = dataclasses.field(
        kw_only=False,
        metadata={
            "help": "A config (name, path, ``zoo.config(...)``) for a fresh model; or what is trained further: a model, or the folder or "
            "hub id of one, whose weights are read in float32."
        },
    )
    data: str | Path | np.ndarray = dataclasses.field(
        kw_only=False,
        metadata={
            "help": "``(n, l)`` token ids (see :func:`~hybridzoo.zoo.train.data.pack`), a path that "
            ":func:`~hybridzoo.zoo.train.data.read_documents` understands, or ``-`` for standard input."
        },
    )
    out: str | Path = dataclasses.field(kw_only=False, metadata={"help": "The run's folder."})
    overrides: Sequence[str] | Mapping[str, Any] | None = dataclasses.field(
        default=None, metadata={"help": "Changes to a config, as :func:`~hybridzoo.zoo.models.build.build` takes them."}
    )
    on_step: Callable[[int, float], None] | None = dataclasses.field(
        default=None, metadata={"help": "Called with the steps done and the last logged loss, after every step."}
    )


@called_with(TrainCall)
def train(call: TrainCall) -> TrainResult:
    """Train a language model; by default AdamW, linear warm-up, cosine decay to zero, gradients clipped at norm 1.

    An interrupted run (Ctrl-C, a crash) continues from its last checkpoint when it is called again, with the numbers of a run that was
    not interrupted, and a finished one is read from its folder. Rows in which nothing is to be predicted are left out. Weights decay
    as :func:`~hybridzoo.zoo.models.build.param_groups` says.

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
            check_path(source)
    use_cpu = on_cpu(call.device)
    call = dataclasses.replace(call, precision=resolved_precision(call.precision, use_cpu))
    torch.manual_seed(call.seed)
    core, header = start_from(call.model, call.overrides, out, call.base)
    adapters = lora_config(core, call, weights_from(call.model, call.base))
    devices = int(os.environ.get("WORLD_SIZE", "0")) or (1 if use_cpu else max(1, torch.cuda.device_count()))
    rows, val = _data(call, core, devices)
    per_step = call.batch_size * call.accumulate * devices * rows.length
    run = RunFolder(out)
    with contextlib.ExitStack() as claimed:
        claimed.enter_context(naming_disk(out))
        log, settings = None, {}
        # torchrun says which process is the first, before they know each other
        if os.environ.get("RANK", "0") == "0":
            settings = _settings(call, core, rows, val, devices)
            log = run.finished(settings) if call.resume else None
            if log is None:
                claimed.enter_context(run.claim())
        args = training_arguments(out, call, use_cpu)
        log, checkpoint = in_first(
            args, lambda: (log, None if log else run.open(settings, call.resume, call.overwrite))
        )
        if log is not None:
            history = log["history"]
            tokens = per_step * int(history[-1]["step"])
            return TrainResult(load(out), history, tokens, log["seconds"], call.steps, log.get("best"))
        source = f"{call.data}: " if isinstance(call.data, str | os.PathLike) else ""
        said = described(core, rows, source, per_step * call.steps, args)
        methods, work = methods_of(core, call, val, args), _workload(core, rows, args, frozen=adapters is not None)
        model, how = _wrapped(core, adapters, call.shard, args)
        methods |= how
        if work.device and work.peak is None:
            methods["MFU"] = f"left out: the peak of {torch.cuda.get_device_name(work.device)} is not known"
        lines = [*header, *said.values(), *(f"{word}: {text}" for word, text in methods.items())]
        session = Session(lines, work, checkpoint, call.on_step)
        if args.process_index == 0:
            facts = facts_of(core, "; ".join(header), said | methods, args.device)
            run.describe(_about(call, facts, session.work), session.first_step)
        report = Report(run.path, run.about)
        try:
            with naming_memory(call, rows.length, args.device, run.kept):
                history = _run(model, (rows, val), args, run, session, checkpoint, call, report)
            best = best_of(history)
            if best is not None and best["step"] < history[-1]["step"]:
                load_weights(model, run.checkpoint(int(best["step"])).folder)
            core = _outcome(model, call, adapters, first=args.process_index == 0)
            if args.process_index == 0:
                save(core, out)
                report.finish(history, session.saved_seconds)
                run.finish(history, session.saved_seconds, best)
        except KeyboardInterrupt:
            raise Interrupted(run.last_step(), call.steps, out) from None
    tokens = per_step * int(history[-1]["step"])
    return TrainResult(core.eval(), history, tokens, session.saved_seconds, session.first_step, best)


def _data(call: TrainCall, core: Model, devices: int) -> tuple[Any, Any]:
    """Return what is trained on, and what is evaluated on, in rows of the same length."""
    out, lanes = Path(call.out), call.batch_size * devices
    if call.carry_state and devices > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"train(carry_state=True): {devices} GPUs in one process split batches, and with them the streams. Use torchrun, or one GPU "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    rows = (
        lanes_from(call.data, core, call, lanes, call.seed, out)
        if call.carry_state
        else examples_from(call.data, core, call, out)
    )
    if call.val is None:
        return rows, None
    like = dataclasses.replace(call, length=call.length or rows.length)
    try:
        if call.carry_state:
            return rows, lanes_from(call.val, core, like, lanes, call.seed, out, once=True)
        return rows, examples_from(call.val, core, like, out)
    except ValueError as e:
        raise ValueError(f"val: {str(e).removeprefix('data: ')}") from e


def _settings(call: TrainCall, core: Model, rows: Examples, val: Examples | None, devices: int) -> dict[str, Any]:
    """Return what a call has to have in common with those that it continues."""
    data = {"data": rows.digest, "val": None if val is None else val.digest}
    start = None if weights_from(call.model, call.base) is None else digest_weights(core)
    return {"config": OmegaConf.to_container(core.cfg), **data, **call.settings(), "devices": devices, "start": start}


def _run(
    model: Any, data: tuple[Examples, Examples | None], args: TrainingArguments, run: RunFolder, session: Session,
    checkpoint: Checkpoint | None, options: TrainOptions, report: Report,
) -> list[dict[str, float]]:  # fmt: skip
    """Take the steps that are left, and give what was logged in all of them."""
    if checkpoint is not None:
        history = checkpoint.history()
        if checkpoint.step >= args.max_steps or has_stalled(history, options.patience):
            # stopped after its last step: there is nothing left to train
            load_weights(model, checkpoint.folder)
            return history
    if options.checkpointing:
        model.core.gradient_checkpointing_enable()
    named = options.report_to if args.process_index == 0 else "none"
    # a backward of one device in a thread of its own costs a sixth of a small model's step; several devices need their threads
    apart = torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ
    with reporting(named, run.path, session.first_step) as callbacks, session.saving_on_interrupt(), _quiet():
        trainer = _trainer(options)(
            model, args, train_dataset=data[0], eval_dataset=data[1],
            callbacks=[*callbacks, report], options=options, run=run, session=session, checkpoint=checkpoint,
        )  # fmt: skip
        if args.device.type == "cuda":
            session.header.append(trainer.stepping.says)
            run.about.setdefault("facts", {})["step"] = trainer.stepping.says.removeprefix("step: ")
        with torch.autograd.set_multithreading_enabled(apart):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
        history = loss_entries(trainer.state.log_history)
        if trainer.state.global_step < args.max_steps and not has_stalled(history, options.patience):
            raise KeyboardInterrupt
    return history


def _wrapped(core: Model, adapters: Any, shard: bool, args: TrainingArguments) -> tuple[Any, dict[str, str]]:
    """Return the model as the Trainer gets it, and what there is to say of how it is trained."""
    model, about = adapted(core, adapters) if adapters else (HybridZooForCausalLM.wrap(core), {})
    if shard:
        about["sharding"] = f"weights, gradients and the optimiser's state over {args.world_size} processes (FSDP2)"
    return model, about


def _trainer(options: TrainOptions) -> type[ZooTrainer]:
    if not options.shard:
        return ZooTrainer
    from .sharded_trainer import ShardedTrainer

    return ShardedTrainer


def _outcome(model: Any, call: TrainCall, adapters: Any, first: bool) -> Model:
    """Return the model that comes of the Trainer's: gathered where processes hold parts, and adapters, kept by themselves, merged."""
    if call.shard:
        from .sharding import gathered

        model = gathered(model, adapters)
    if adapters and first:
        save_adapter(model, Path(call.out))
    if adapters and (first or not call.shard):  # what others hold are parts
        model.merge_and_unload()
    model.core.batch_mean = None
    return model.core


def _workload(core: Model, rows: Examples, args: TrainingArguments, frozen: bool) -> Workload:
    """Return the work of a step, as it is measured against time."""
    devices = args.world_size * max(1, args.n_gpu)
    tokens = (
        rows.tokens / len(rows.rows) * args.per_device_train_batch_size * args.gradient_accumulation_steps * devices
    )
    gpu, peak = args.device if args.device.type == "cuda" else None, None
    if gpu:
        peak = peak_flops(torch.cuda.get_device_name(gpu), half=args.bf16 or args.fp16)
    flops = flops_per_token(core, context_length(rows), frozen)
    return Workload(tokens, flops, peak and peak * devices, gpu)


def _about(call: TrainCall, facts: dict[str, str], work: Workload) -> dict[str, Any]:
    """Return what a page of the run has to know besides what is logged."""
    out, model = Path(call.out), call.model
    named = isinstance(model, str | os.PathLike)
    return {
        "name": (Path(model).stem if Path(model).suffix in (".yaml", ".yml") else Path(model).name) if named else out.name,
        "folder": str(out), "command": command_of(call, model, call.data),
        "steps": call.steps, "tokens_per_step": work.tokens, "facts": facts,
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

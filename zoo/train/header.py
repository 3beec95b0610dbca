"""Words for a training before its first step, for its terminal and for its page."""

import dataclasses
import os
import platform
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..config.stages import pattern_of
from ..models.model import Model
from ..terminal import counted
from .balance import is_counted_first
from .feed import Feed
from .options import TrainOptions

__all__ = ["command_of", "described", "facts_of", "methods_of"]

# of one call, and not of the run
_ONCE = ("resume", "overwrite")


def described(feed: Feed, rows: Any, args: TrainingArguments) -> dict[str, str]:
    """Say what is trained, on what and for how long, each under a word for it."""
    core, parts = feed.core, args.gradient_accumulation_steps
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in core.parameters()})
    devices = args.world_size * max(1, args.n_gpu)
    where = f"{devices} x {args.device.type}" if devices > 1 else str(args.device)
    each = args.train_batch_size * args.world_size * parts
    units, once = each * feed.size(rows), len(rows) * feed.size(rows)
    split = f" in {parts} parts, {units:,} {feed.unit}" if parts > 1 else ""
    budget = (
        f"{counted(args.max_steps, 'step')} of {counted(each, feed.row)}{split}: {units * args.max_steps:,} {feed.unit}"
    )
    source = f"{feed.options.data}: " if isinstance(feed.options.data, str | os.PathLike) else ""
    data = feed.described(rows)
    data = [f"{source}{data[0]}", *data[1:]]
    return {
        "size": f"{core.num_params():,} parameters in {' and '.join(kinds)}, on {where}",
        "data": "\n".join(data),
        "budget": f"{budget}, the data {units * args.max_steps / once:.3g} times; into {Path(args.output_dir).parent}",
    }


def methods_of(feed: Feed, rows: Any, val: Any, args: TrainingArguments) -> dict[str, str]:
    """Say in what precision and by which optimiser it is trained, and how it is evaluated, each under a word for it."""
    options = feed.options
    half = {"bfloat16": "bfloat16 autocast, weights in float32"}
    warm = args.get_warmup_steps(args.max_steps)
    course = {
        "cosine": "falling as a cosine",
        "wsd": f"falling in the last {options.decay:.0%}",
        "constant": "constant",
    }
    rate = f"lr {options.lr:g} after {counted(warm, 'step')} of warm-up, {course[options.schedule]}"
    rate += f" to {options.final_lr * options.lr:g}" if options.schedule != "constant" else ""
    clip = f"gradients clipped at {options.clip:g}" if options.clip else "no gradient clipped"
    found = {
        "precision": half.get(options.precision, options.precision)
        + (", blocks computed again" if options.checkpointing else ""),
        "optimizer": f"{options.optimizer}, {rate}; weight decay {options.weight_decay:g}, {clip}",
    }
    if options.layer_decay is not None:
        found["optimizer"] += f"; the rate times {options.layer_decay:g} for every layer towards the input"
    if options.ema is not None:
        found["average"] = f"of the weights, {options.ema:g} of it kept in a step: what is evaluated and saved"
    found |= feed.methods(rows)
    if is_counted_first(feed.core, options):
        found["experts"] = (
            f"balanced over all {options.accumulate} parts of a step, which a forward of its own counts first"
        )
    if val is not None:
        about = feed.judged(val)
        source = f"{options.val}: " if isinstance(options.val, str | os.PathLike) else ""
        patience = f"; ends after {options.patience} without a better one" if options.patience else ""
        until = f"; ends when {options.until:.4g} of its answers are right" if options.until else ""
        found["evaluation"] = f"every {counted(args.eval_steps, 'step')}, on {source}{about}{patience}{until}"
    return found


def facts_of(core: Model, start: str, said: dict[str, str], device: torch.device) -> dict[str, str]:
    """Return what the page of a run says of it, by the words for it."""
    found = {"model": start, "layers": pattern_of(core.cfg), **said}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    names = ("hybridzoo", "torch", "transformers", "accelerate", "peft")
    versions = [f"{name} {version}" for name in names if (version := _version(name))]
    return found | {"versions": ", ".join([f"python {platform.python_version()}", *versions])}


def command_of(call: Any, model: Any, data: Any) -> str | None:
    """Return the command line of a call, or None where something in it has no words there."""
    overrides = call.overrides or []
    words = [model, data, call.out, *([] if isinstance(overrides, str) else overrides)]
    if not all(isinstance(word, str | os.PathLike) for word in words):
        return None
    given = []
    for field in dataclasses.fields(TrainOptions):
        name, value = f"--{field.name.replace('_', '-')}", getattr(call, field.name)
        if value == field.default or field.name in _ONCE:
            continue
        if not isinstance(value, str | int | float | os.PathLike):
            return None
        given += [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else [name, str(value)]
    return shlex.join(map(str, ["zoo", "train", model, *overrides, "--data", data, "--out", call.out, *given]))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

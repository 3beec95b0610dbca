"""Words for a training before its first step, for its terminal and for its page."""

import dataclasses
import os
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..models.model import Model
from .examples import Examples
from .options import TrainOptions

__all__ = ["command_of", "described", "facts_of"]

# of one call, and not of the run
_ONCE = ("resume", "overwrite")


def described(core: Model, rows: Examples, source: str, tokens: int, args: TrainingArguments) -> dict[str, str]:
    """Say what is trained, on what and for how long, each under a word for it."""
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in core.parameters()})
    devices = args.world_size * max(1, args.n_gpu)
    where = f"{devices} x {args.device.type}" if devices > 1 else str(args.device)
    once = len(rows) * rows.length
    parts = args.gradient_accumulation_steps
    split = f" in {parts} parts, {tokens // args.max_steps:,} tokens" if parts > 1 else ""
    data = rows.about or [f"{len(rows):,} rows of {rows.length:,} tokens ({once:,})"]
    data = [f"{source}{data[0]}", *data[1:]]
    if (left := len(rows.rows) - len(rows)) > 0:
        data.append(f"{left:,} rows hold nothing to predict and are left out")
    return {
        "size": f"{core.num_params():,} parameters in {' and '.join(kinds)}, on {where}",
        "data": "\n".join(data),
        "budget": f"{args.max_steps:,} steps of {args.train_batch_size * args.world_size * parts:,} rows{split}: {tokens:,} tokens, "
        f"the data {tokens / once:.3g} times; into {Path(args.output_dir).parent}",
    }


def facts_of(
    core: Model, start: str, said: dict[str, str], notes: Sequence[str], device: torch.device
) -> dict[str, str]:
    """Return what the page of a run says of it, by the words for it; a note may name its own, before a colon."""
    found = {"model": start, "layers": core.cfg.layers, **said}
    for note in notes:
        word, colon, text = note.partition(": ")
        word, text = (word, text) if colon and len(word) <= 20 else ("also", note)
        found[word] = f"{found[word]}\n{text}" if word in found else text
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    names = ("hybridzoo", "torch", "transformers", "accelerate", "peft")
    found["versions"] = ", ".join(
        [f"python {platform.python_version()}", *(f"{n} {v}" for n in names if (v := _version(n)))]
    )
    return found


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

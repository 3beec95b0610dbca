"""The model that a training starts from."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import load
from ..checkpoint.native import as_saved
from ..hf import HybridZooForCausalLM
from ..models.build import build
from ..models.finite import check_finite
from ..models.model import Model
from .options import holds_weights
from .run_folder import LOG, DifferentRun, RunFolder

__all__ = ["start_from"]


def start_from(model: Any, overrides: Sequence[str] | Mapping[str, Any] | None, out: Path) -> tuple[Model, list[str]]:
    """Return the model that training starts from, and what there is to say of it."""
    if isinstance(model, HybridZooForCausalLM):
        model = model.core
    weights, named = holds_weights(model), f"{model}: " if isinstance(model, str | os.PathLike) else ""
    if named and os.path.exists(Path(model) / LOG) and not RunFolder(Path(model)).is_finished():
        raise ValueError(
            f"{model}: holds a training that has not ended. Go on with the call that began it, or name another model to start from."
        )
    if overrides and (weights or isinstance(model, Model)):
        raise ValueError(
            f"overrides: {next(iter(overrides))!r} would change the config that the weights were made for. Leave it out, or name a config "
            "to train a fresh model."
        )
    if isinstance(model, Model):
        as_saved(model)  # a model that could not be saved is refused before it is trained
        return model, []
    if not weights:
        return build(model, overrides), [f"{named}a fresh model"] if named else []
    if out.exists() and os.path.exists(model) and os.path.samefile(out, model):
        raise DifferentRun(
            f"{out}: is the folder that the weights come from, which training would replace. Use another folder for what becomes of them."
        )
    # in half precision most updates would be rounded away
    core = load(model, dtype=torch.float32)
    check_finite(core, str(model))  # the first loss need not see it
    return core.train(), [f"{named}starts from the weights there"]

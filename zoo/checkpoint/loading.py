"""``zoo.load``: a folder, a file or a hub id in any format that the zoo knows becomes a model."""

import functools
import os
from pathlib import Path
from typing import Any

import torch

from ..config.resolve import Resolved, list_models, resolve
from ..device import pick_device
from ..errors import CheckpointError, ConfigError
from ..models.tasks import task_of
from .family import FileFamily, Shapes
from .files import open_source
from .keys import View
from .reading import checked, fill, load_folder, one_precision
from .report import LoadReport
from .single import file_in, opened_file, recognised

__all__ = ["STRUCTURE", "load"]

# keys of a config that decide what a model is; the others are about data and training
STRUCTURE = (
    "d_model", "layers", "stages", "mixers", "override", "stem", "downsample", "norm", "class_token", "pos_embed", "pool",
    "residual_in_fp32", "residual_multiplier", "vocab_size", "tokenizer",
)  # fmt: skip


def load(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    config: Any = None,
    weights: str | None = None,
    n_classes: int | None = None,
) -> Any:
    """Read a model that the zoo, transformers, mamba-ssm, or a project of image models has written.

    Args:
        source: A folder; a hub id such as ``"state-spaces/mamba-130m"`` (downloaded through huggingface_hub); or a file of weights without
            any config: ``.pth`` or ``.safetensors`` of VMamba or Vim, ``.npz`` of typeseg.
        device: Where the weights go; the CPU by default.
        dtype: What they are cast to; by default they stay as stored, or, where the files mix precisions, have the one that
            ``config.json`` states, as in transformers. Parameters that must be float32 are.
        config: For a file of weights, a config as for ``zoo.build``. By default it is found in the shapes of the tensors: the shipped one
            that has them, or else what they tell. The number of classes is the file's.
        weights: For a training's file, the part to take: ``"model"`` (default, as the projects' own loaders), or ``"model_ema"``, the
            averaged weights that papers report.
        n_classes: Put a new head for so many classes in place of a stored one for another number, for fine-tuning; everything else is as
            stored. ``model.load_report`` says so.

    Returns:
        The model in evaluation mode, of its task's class: a :class:`~hybridzoo.zoo.models.causal_lm.CausalLM`, say. What was matched,
        missing and unexpected is in its ``load_report``.

    Raises:
        CheckpointError: A file is missing, damaged or hostile, its tensors do not fit the config, the family is unknown, or the folder
            is being written to.
        ConfigError: The config of one of our own folders, or ``config``, is not valid.
        ValueError: The device is not there; nothing has been read or downloaded then.
    """
    device = pick_device("cpu" if device is None else device, meta=True)
    place = open_source(source)
    file = place if place.is_file() else file_in(place)
    if file is not None:
        model = _load_file(file, device, dtype, config, weights)
    else:
        for name, given in (("config", config), ("weights", weights)):
            if given is not None:
                raise CheckpointError(
                    f"{name}: is for a file of weights, and {place} is a folder, which says what it holds. Leave it out."
                )
        model = load_folder(place, source, device=device, dtype=dtype)
    return model if n_classes is None else _with_head(model, n_classes).eval()


def _load_file(file: Path, device: torch.device, dtype: torch.dtype | None, config: Any, weights: str | None) -> Any:
    with opened_file(file, weights) as found:
        family, stored, beside = recognised(found.tensors, file)
        shapes = Shapes({name: tensor.shape for name, tensor in stored.items()}, file)
        resolved, name = _config_of(family, shapes, config)
        try:
            model = task_of(resolved.config)(resolved, device="meta")
        except ConfigError as e:
            if config is not None:
                raise
            raise CheckpointError(f"{file}: its tensors describe no model that works: {e}") from e
        pieces = checked(View(model, shapes), family, stored, file)
        if dtype is None:
            dtype = one_precision(model, pieces, stored, file)
        fill(model, pieces, stored, device, dtype)
    model.family = family.model_type
    model.load_report = LoadReport(
        str(file), family.model_type, found.part, found.parts, name, tuple(pieces),
        unexpected=(*sorted(stored.keys() - pieces.keys()), *sorted(beside)),
    )  # fmt: skip
    return model.eval()


def _config_of(family: FileFamily, shapes: Shapes, config: Any) -> tuple[Resolved, str]:
    """The config of a file's model, and where it comes from."""
    if config is not None:
        given, n, name = resolve(config), family.classes(shapes), config if isinstance(config, str) else "given"
        return given if given.config.get("n_classes") == n else resolve(given, {"n_classes": n, "labels": None}), name
    found = family.find(shapes)
    try:
        resolved = resolve(found)
    except ConfigError as e:
        raise CheckpointError(f"{shapes.file}: its tensors describe no model that works: {e}") from e
    facts: dict[str, Any] = {
        key: found[key] for key in ("n_classes", "labels", "in_channels", "image_size") if key in found
    }
    for name in (name for pattern in family.configs for name in list_models(pattern)):
        shipped = _shipped(name).config
        if all(shipped.get(key) == resolved.config.get(key) for key in STRUCTURE):
            return resolve(shipped, facts), name
    return resolved, "found"


@functools.cache
def _shipped(name: str) -> Resolved:
    # to be compared with, by every load
    return resolve(name)


def _with_head(model: Any, n_classes: int) -> Any:
    """The model with a head for so many classes, its own where it has that many."""
    if not hasattr(model, "reset_head"):
        raise CheckpointError(
            f"n_classes: a model whose task is {model.task!r} has no head to be put anew. Leave it out."
        )
    if n_classes == model.cfg.n_classes:
        return model
    stored = [name for name in model.load_report.matched if "head" in name.split(".")]
    model.reset_head(n_classes)
    drawn = [f"{model.head_name}.{name}" for name, _ in model.head.named_parameters()]
    model.load_report = model.load_report.without(stored, drawn)
    return model

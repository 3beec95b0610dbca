"""The model that a training starts from."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ..checkpoint import load
from ..checkpoint.native import as_saved
from ..models.build import build
from ..models.finite import check_finite
from ..models.model import Model
from ..named import near_path
from .options import holds_weights
from .run_folder import LOG, DifferentRun, RunFolder, differences

__all__ = ["start_from", "weights_from"]

Overrides = Sequence[str] | Mapping[str, Any] | None
# what a message lists before it counts
_SHOWN = 4


def weights_from(model: Any, base: Any = None) -> Any:
    """Return what the weights that a training goes on from come from; ``None`` where they are random."""
    return model if base is None and (isinstance(model, torch.nn.Module) or holds_weights(model)) else base


def start_from(model: Any, overrides: Overrides, out: Path, base: Any = None) -> tuple[Model, list[str]]:
    """Return the model that training starts from, and what there is to say of it."""
    if isinstance(getattr(model, "core", None), Model):  # transformers' adapter
        model = model.core
    named = f"{model}: " if isinstance(model, str | os.PathLike) else ""
    if named:
        _refuse_unfinished(model)
    if base is not None:
        if weights_from(model) is not None:
            what = named.removesuffix(": ") or f"the {type(model).__name__}"
            raise ValueError(f"base={str(base)!r}: {what} has weights of its own. Name a config, or leave base out.")
        return _from_base(model, overrides, out, base)
    if overrides and weights_from(model) is not None:
        raise ValueError(
            f"overrides: {next(iter(overrides))!r} would change the config that the weights were made for. Leave it out, or name a config "
            "to train a fresh model, with these weights as its base (--base) where they fit."
        )
    if isinstance(model, Model):
        as_saved(model)  # a model that could not be saved is refused before it is trained
        return model, []
    if not holds_weights(model):
        return build(model, overrides), [f"{named}a fresh model"] if named else []
    return _loaded(model, out).train(), [f"{named}starts from the weights there"]


def _refuse_unfinished(folder: Any) -> None:
    if os.path.exists(Path(folder) / LOG) and not RunFolder(Path(folder)).is_finished():
        raise ValueError(
            f"{folder}: holds a training that has not ended. Go on with the call that began it, or name another model to start from."
        )


def _loaded(source: Any, out: Path) -> Model:
    if out.exists() and os.path.exists(source) and os.path.samefile(out, source):
        raise DifferentRun(
            f"{out}: is the folder that the weights come from, which training would replace. Use another folder for what becomes of them."
        )
    # in half precision most updates would be rounded away
    core = load(source, dtype=torch.float32)
    check_finite(core, str(source))  # the first loss need not see it
    return core


def _from_base(config: Any, overrides: Overrides, out: Path, base: Any) -> tuple[Model, list[str]]:
    """Build a model of the config, and give it the weights of another, whose every tensor has to fit."""
    if not isinstance(base, str | os.PathLike):
        raise ValueError(
            f"base: expected a folder or a hub id, got {type(base).__name__}. Give the model itself as model."
        )
    if not holds_weights(base):
        hint = f" Did you mean {near!r}?" if not os.path.exists(base) and (near := near_path(Path(base))) else ""
        raise ValueError(f"base={str(base)!r}: there are no weights.{hint} Name the folder or the hub id of a model.")
    _refuse_unfinished(base)
    core = build(config, overrides)
    old = _loaded(base, out)
    there, here = dict(old.named_parameters()), dict(core.named_parameters())
    about: list[str] = []
    # classes are those of the data
    if hasattr(core, "reset_head"):
        if old.cfg.n_classes == core.cfg.n_classes:
            core.cfg.labels = core.cfg.labels or old.cfg.labels
        else:
            about.append(f"a new head for {core.cfg.n_classes:,} classes in place of that for {old.cfg.n_classes:,}")
            there, here = (
                {k: p for k, p in named.items() if not k.startswith(f"{core.head_name}.")} for named in (there, here)
            )
    if wrong := list(_misfits(there, here)):
        raise ValueError(
            f"base={str(base)!r}: {len(wrong)} of {len(there.keys() | here.keys())} tensors do not fit the config: {_listed(wrong, '; ')}. "
            "Change the config (overrides), or take another base."
        )
    with torch.no_grad():
        for name, p in here.items():
            p.copy_(there[name])
    # texts are the old model's: its tokenizer's files, its special tokens
    core.source, core.metadata, core.family = old.source, old.metadata, old.family
    named = f"{config}: a fresh model that " if isinstance(config, str | os.PathLike) else ""
    about.insert(0, f"{named}starts from the weights of {base}")
    configs = (OmegaConf.to_container(model.cfg) for model in (old, core))
    if changes := [f"{key} ({values})" for key, values in differences(*configs)]:  # type: ignore[arg-type]
        about.append(f"its config differs from theirs in {_listed(changes, ', ')}")
    return core, about


def _misfits(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterable[str]:
    for name in {**here, **there}:
        old, new = (tuple(tensors[name].shape) if name in tensors else None for tensors in (there, here))
        if old != new:
            yield (
                f"{name} is {old or 'missing'} there, and the config makes it {new}"
                if new
                else f"{name} {old} is there, and no part of the config"
            )


def _listed(items: list[str], separator: str) -> str:
    left = len(items) - _SHOWN
    return separator.join(items[:_SHOWN]) + (f"{separator}and {left} more" if left > 0 else "")

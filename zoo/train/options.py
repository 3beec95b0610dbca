"""Options of a training, checked before anything heavy is imported: the standard library is all that this needs."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

from ..config.shipped import list_models
from ..named import HUB_ID, near_path
from ..options import at_least, check_options, option

__all__ = ["TrainOptions", "check_out", "check_path", "default_out", "holds_weights"]

_SEEDS = ("at least 0, and below 2**32", lambda seed: 0 <= seed < 2**32)
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of a training: those of :func:`~hybridzoo.zoo.train.run.train` and of ``zoo train``.

    Raises:
        ValueError: Numbers that no training can work with, or a report that there is not.
    """

    steps: int = option(1000, "Optimiser steps.", trainer="max_steps")
    batch_size: int = option(8, "Rows per step and device.", trainer="per_device_train_batch_size")
    length: int | None = option(
        None, "Tokens per row.", unset="a table's own, or max_length, at most 512", bound=at_least(2), setting=False
    )
    lr: float = option(1e-3, "Peak learning rate.", bound=("above 0", lambda x: x > 0), trainer="learning_rate")
    warmup: float = option(
        0.1, "Steps until the peak; below 1, their share.", bound=at_least(0), trainer="warmup_steps"
    )
    weight_decay: float = option(0.1, "Of matrices.", bound=at_least(0), trainer="weight_decay")
    seed: int = option(0, "Of weights and of the order of rows.", bound=_SEEDS, trainer="seed")
    save_every: int | None = option(
        None, "Steps between checkpoints; two are kept.", unset="a tenth of all", bound=at_least(1), setting=False
    )
    resume: bool = option(True, "Continue an interrupted run, or start again.", setting=False)
    overwrite: bool = option(False, "Replace a model or another run that is in the run's folder.", setting=False)
    report_to: str = option("tensorboard", "tensorboard or none.", choices=("tensorboard", "none"), setting=False)
    device: str | None = option(None, "cpu or cuda; a GPU by default, if there is one.", setting=False)

    def __post_init__(self):
        check_options(self, "train")
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"train(steps={self.steps}, batch_size={self.batch_size}): both must be at least 1.")
        if self.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError(
                "No module named 'tensorboard'; report_to='none' does without", name="tensorboard"
            )

    def settings(self) -> dict[str, Any]:
        """Return what a run that is continued must have in common with its beginning, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata.get("setting")}

    def for_trainer(self) -> dict[str, Any]:
        """Return what transformers' ``TrainingArguments`` take as it is, by their names."""
        named = ((f.metadata.get("trainer"), f.name) for f in dataclasses.fields(self))
        return {theirs: getattr(self, ours) for theirs, ours in named if theirs}


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, if something is there; otherwise a FileNotFoundError that names what is nearly called so."""
    path = Path(path)
    if os.path.exists(path):
        return path
    hint = f" Did you mean {near!r}?" if (near := near_path(path)) else ""
    raise FileNotFoundError(
        f"{path}: no such file or folder.{hint} Give a text, .jsonl or .npy (token ids) file, or a folder of them."
    )


def check_out(out: Path) -> None:
    """Refuse a run's folder that is a file, or would have to lie in one, with a NotADirectoryError."""
    file = next((p for p in (out, *out.parents) if p.exists()), out)
    if file.exists() and not file.is_dir():
        raise NotADirectoryError(f"{file}: is a file, and out={str(out)!r} has to be a folder. Name another.")


def holds_weights(model: Any) -> bool:
    """Return whether a model argument means trained weights, a folder that holds some or a hub id, and not a config to build from."""
    if not isinstance(model, str | os.PathLike) or model in list_models():
        return False
    path = Path(model)
    if os.path.isdir(path):
        return any(f.is_file() for pattern in _WEIGHTS for f in path.glob(pattern))
    named = isinstance(model, str) and HUB_ID.fullmatch(model) and path.suffix not in (".yaml", ".yml")
    return bool(named) and not os.path.exists(path)


def default_out(model: str) -> Path:
    """``runs/MODEL``, or ``runs/MODEL-finetuned`` where that is the folder the weights come from."""
    name = Path(model).name if Path(model).suffix not in (".yaml", ".yml") else Path(model).stem
    out = Path("runs") / (name or Path(model).resolve().name)
    return out.with_name(f"{out.name}-finetuned") if os.path.exists(out) and os.path.samefile(out, model) else out

"""What a training asks for, checked before anything heavy is imported: the standard library is all that this needs."""

import dataclasses
import difflib
import importlib.util
import math
import numbers
import os
from pathlib import Path
from typing import Any

from ..config.shipped import list_models
from ..named import HUB_ID, near_path

__all__ = ["REPORTS", "TrainOptions", "check_out", "check_path", "default_out", "holds_weights"]

REPORTS = ("tensorboard", "none")
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How :func:`~hybridzoo.zoo.train.run.train` trains; it says what each of them means.

    Raises:
        ValueError: Numbers that no training can work with, or a report that there is not.
    """

    steps: int = 1000
    batch_size: int = 8
    length: int | None = None
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    seed: int = 0
    save_every: int | None = None
    resume: bool = True
    overwrite: bool = False
    report_to: str = "tensorboard"
    device: str | None = None

    def __post_init__(self):
        for field in ("steps", "batch_size", "length", "seed", "save_every"):
            given = getattr(self, field)
            if given is None and field in ("length", "save_every"):
                continue
            if not isinstance(given, numbers.Integral):
                raise ValueError(f"train({field}={given!r}): must be an integer.")
            object.__setattr__(self, field, int(given))
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train(seed={self.seed}): must be at least 0, and below 2**32.")
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"train(steps={self.steps}, batch_size={self.batch_size}): both must be at least 1.")
        for name, value, least in (("length", self.length, 2), ("save_every", self.save_every, 1)):
            if value is not None and value < least:
                raise ValueError(f"train({name}={value}): must be at least {least}. Leave it out for the default.")
        for name, number in (("lr", self.lr), ("warmup", self.warmup), ("weight_decay", self.weight_decay)):
            real = isinstance(number, numbers.Real) and math.isfinite(number)
            if not real or number < 0 or (name == "lr" and number == 0):
                bound = "above" if name == "lr" else "at least"
                raise ValueError(f"train({name}={number!r}): must be a number {bound} 0, and finite.")
            object.__setattr__(self, name, float(number))  # NumPy's numbers are none to JSON
        if self.report_to not in REPORTS:
            close = difflib.get_close_matches(str(self.report_to), REPORTS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"report_to={self.report_to!r}: is not known.{hint} Known: {', '.join(REPORTS)}.")
        if self.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise ModuleNotFoundError(
                "No module named 'tensorboard'; report_to='none' does without", name="tensorboard"
            )


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, if something is there; otherwise a FileNotFoundError that names what is nearly called so."""
    path = Path(path)
    if os.path.exists(path):
        return path
    near = near_path(path)
    hint = f" Did you mean {near!r}?" if near else ""
    raise FileNotFoundError(
        f"{path}: no such file or folder.{hint} Give a text, .jsonl or .npy (token ids) file, or a folder of them."
    )


def check_out(out: Path) -> None:
    """Refuse a run's folder that is a file, or would have to lie in one, with a NotADirectoryError."""
    file = next((p for p in (out, *out.parents) if p.exists()), out)
    if file.exists() and not file.is_dir():
        raise NotADirectoryError(f"{file}: is a file, and out={str(out)!r} has to be a folder. Name another.")


def holds_weights(model: Any) -> bool:
    """Whether a model argument means trained weights, a folder that holds some or a hub id, and not a config to build from."""
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

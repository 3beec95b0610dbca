"""Options of a training, checked before anything heavy is imported: the standard library is all that this needs."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

from ..config.shipped import list_models
from ..corpus.places import STANDARD_INPUT
from ..images.damaged import DAMAGED
from ..named import HUB_ID
from ..options import at_least, check_options, option, within

__all__ = [
    "TRACKERS",
    "TrainOptions",
    "check_out",
    "default_out",
    "holds_weights",
    "tracker_names",
]

TRACKERS = ("tensorboard", "wandb", "mlflow")

_SEEDS = ("at least 0, and below 2**32", lambda seed: 0 <= seed < 2**32)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "mamba_al.npz")
_FILES = (".pth", ".pt", ".bin", ".safetensors", ".npz")
# groups of the command line's help
_DATA, _OPTIMISER, _EVALUATION, _SPEED, _RUN = "Data", "Optimiser", "Evaluation", "Speed", "Run"
_TUNING, _IMAGES = "Fine-tuning", "Images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of a training: those of :func:`~hybridzoo.zoo.train.run.train` and of ``zoo train``.

    Raises:
        ValueError: Numbers that no training can work with, or a report that there is not.
    """

    steps: int = option(1000, "Optimiser steps.", bound=at_least(1), trainer="max_steps", panel=_RUN)
    batch_size: int | None = option(
        None, "Rows or images per device that are read at once.", unset="8 rows, or 64 images", bound=at_least(1),
        trainer="per_device_train_batch_size", setting=False, panel=_DATA,
    )  # fmt: skip
    accumulate: int = option(
        1, "Batches per step, whose gradients are added up as if they were one.", bound=at_least(1),
        trainer="gradient_accumulation_steps", setting=False, panel=_DATA,
    )  # fmt: skip
    length: int | None = option(
        None, "Tokens per row.", unset="a table's own, or max_length, at most 512", bound=at_least(2), setting=False, of="text",
        panel=_DATA,
    )  # fmt: skip
    packing: str = option(
        "documents", "documents: those that fill a row best, apart from each other; stream: end to end; padded: one in each row. A table "
        "is rows already.", choices=("documents", "stream", "padded"), of="text", panel=_DATA,
    )  # fmt: skip
    column: str = option(
        "text",
        "The text, the token ids or the images, in rows of JSON Lines, parquet and datasets.",
        setting=False,
        panel=_DATA,
    )
    carry_state: bool = option(
        False, "Read documents in consecutive rows, each from the state that the one before left: truncated backpropagation through time.",
        of="text", panel=_DATA,
    )  # fmt: skip
    val: Any = option(  # noqa: RUF009  # a field, as the others
        None, "What to evaluate on, of the same kinds as the data; the best model is kept.", typed=Path | None, setting=False,
        unset="of images the val or test that the data have beside train, else nothing", panel=_EVALUATION,
    )  # fmt: skip
    eval_every: int | None = option(
        None, "Steps between evaluations.", unset="as save_every", bound=at_least(1), setting=False, panel=_EVALUATION
    )  # fmt: skip
    patience: int | None = option(
        None, "Evaluations without a better one after which to stop.", unset="never", bound=at_least(1), panel=_EVALUATION
    )  # fmt: skip
    until: float | None = option(
        None, "Share of right answers in an evaluation at which to stop: of images, or of rows with labels.", unset="never",
        bound=("above 0, up to 1", lambda x: 0 < x <= 1), panel=_EVALUATION,
    )  # fmt: skip
    precision: str = option(
        "auto", "auto, float32 or bfloat16: what is computed in; weights stay float32. auto is bfloat16 on a GPU that has it.",
        choices=("auto", "float32", "bfloat16"), panel=_SPEED,
    )  # fmt: skip
    capture: str = option(
        "auto", "auto, on or off: record a step on a GPU as a CUDA graph, and replay it.", choices=("auto", "on", "off"),
        setting=False, panel=_SPEED,
    )  # fmt: skip
    optimizer: str = option(
        "adamw", "adamw, or muon: Muon for the matrices inside blocks, AdamW for the rest.", choices=("adamw", "muon"),
        panel=_OPTIMISER,
    )  # fmt: skip
    lr: float | None = option(
        None, "Peak learning rate.", unset="1e-3, and 3e-3 for images", bound=("above 0", lambda x: x > 0),
        trainer="learning_rate", panel=_OPTIMISER,
    )  # fmt: skip
    warmup: float = option(
        0.1, "Steps until the peak; below 1, their share.", bound=at_least(0), trainer="warmup_steps", panel=_OPTIMISER
    )
    schedule: str = option(
        "cosine", "cosine, wsd or constant: how the rate goes on from the peak; wsd holds it, and falls at the end.",
        choices=("cosine", "wsd", "constant"), panel=_OPTIMISER,
    )  # fmt: skip
    decay: float = option(0.2, "Share of the steps in which wsd falls.", bound=within(0, 1, True), panel=_OPTIMISER)
    final_lr: float = option(
        0.0, "Share of the rate that is left at the end.", bound=within(0, 1, True), panel=_OPTIMISER
    )
    beta1: float = option(0.9, "AdamW's, for gradients.", bound=within(0, 1), trainer="adam_beta1", panel=_OPTIMISER)
    beta2: float = option(
        0.999, "AdamW's, for their squares.", bound=within(0, 1), trainer="adam_beta2", panel=_OPTIMISER
    )
    weight_decay: float = option(0.1, "Of matrices.", bound=at_least(0), trainer="weight_decay", panel=_OPTIMISER)
    clip: float = option(
        1.0,
        "Longest gradient that is used as it is; 0 for all.",
        bound=at_least(0),
        trainer="max_grad_norm",
        panel=_OPTIMISER,
    )
    layer_decay: float | None = option(
        None, "Factor of the rate for every layer that lies between a layer and the head (fine-tuning; 0.65 to 0.9, say).",
        unset="one rate for all", bound=("above 0, up to 1", lambda x: 0 < x <= 1), panel=_TUNING,
    )  # fmt: skip
    ema: float | None = option(
        None, "Average the weights over the steps, and keep this share of the mean in a step (0.9999, say): the mean is what is evaluated "
        "and saved.", unset="the weights are", bound=within(0, 1), panel=_OPTIMISER,
    )  # fmt: skip
    checkpointing: bool = option(
        False, "Keep less of every block, and compute it again in the backward.", setting=False, panel=_SPEED
    )
    spike: float = option(
        2.0, "Stop when the loss, averaged over some ten steps, is this many nats above its lowest; 0 never.", bound=at_least(0),
        setting=False, panel=_RUN,
    )  # fmt: skip
    base: Any = option(  # noqa: RUF009  # a field, as the others
        None, "The folder or hub id of a model whose weights a fresh model of the config starts from.", typed=str | None,
        setting=False, panel=_TUNING,
    )  # fmt: skip
    lora: int | None = option(
        None, "Rank of the adapters (LoRA) that are trained in place of the weights.", unset="the weights are trained",
        bound=at_least(1), of="text", panel=_TUNING,
    )  # fmt: skip
    lora_alpha: float | None = option(
        None, "What the adapters count for, divided by their rank.", unset="twice the rank", bound=("above 0", lambda x: x > 0),
        of="text", panel=_TUNING,
    )  # fmt: skip
    lora_targets: str = option(
        "all-linear", "Where the adapters sit: all-linear, or names of modules or parameters (in_proj,out_proj,experts.w1).",
        of="text", panel=_TUNING,
    )  # fmt: skip
    freeze: int = option(
        0, "Stages, from the stem on, that stay as they are.", bound=at_least(0), of="images", panel=_TUNING
    )
    augment: str = option(
        "auto", "auto, resized (a random part, brought to size), shift (by an eighth) or none: how images are cropped in training. auto is "
        "shift for models of less than 64 pixels, and none of less than 16.", choices=("auto", "resized", "shift", "none"),
        of="images", panel=_IMAGES,
    )  # fmt: skip
    flip: float | None = option(
        None, "Share of the images that are mirrored.", unset="half; none of built-in sets, which are digits, or without augment",
        bound=within(0, 1, True), of="images", panel=_IMAGES,
    )  # fmt: skip
    rand_augment: str | None = option(
        None, "timm's spelling of a RandAugment, rand-m9-mstd0.5-inc1 say.", unset="none", of="images", panel=_IMAGES
    )
    random_erasing: float = option(
        0.0,
        "Share of the images of which a part is erased, by timm.",
        bound=within(0, 1, True),
        of="images",
        panel=_IMAGES,
    )
    mixup: float = option(
        0.0,
        "Mix images in pairs, by timm: alpha of the shares (0.8, say).",
        bound=at_least(0),
        of="images",
        panel=_IMAGES,
    )
    cutmix: float = option(
        0.0, "Paste parts of images into others, by timm: alpha of the areas (1, say).", bound=at_least(0), of="images",
        panel=_IMAGES,
    )  # fmt: skip
    label_smoothing: float = option(
        0.0, "Share of a label's probability that is spread over all classes.", bound=within(0, 1), of="images",
        panel=_IMAGES,
    )  # fmt: skip
    damaged: str = option(
        "stop", "stop or skip: what to do about files that are no whole images.", choices=DAMAGED, setting=False,
        of="images", panel=_IMAGES,
    )  # fmt: skip
    shard: bool = option(
        False, "Under torchrun, let every process hold a part of the weights and of the optimiser's state (FSDP2).", panel=_SPEED
    )  # fmt: skip
    workers: int | None = option(
        None, "Processes that read rows ahead; the numbers are the same.", unset="2 on a GPU, else 0", bound=at_least(0), setting=False,
        panel=_DATA,
    )  # fmt: skip
    seed: int = option(0, "Of weights and of the order of rows.", bound=_SEEDS, trainer="seed", panel=_RUN)
    save_every: int | None = option(
        None,
        "Steps between checkpoints; the last two are kept, and the best.",
        unset="a tenth of all",
        bound=at_least(1),
        setting=False,
        panel=_RUN,
    )
    resume: bool = option(True, "Continue an interrupted run, or start again.", setting=False, panel=_RUN)
    overwrite: bool = option(
        False, "Replace a model or another run that is in the run's folder.", setting=False, panel=_RUN
    )
    report_to: str = option(
        "tensorboard", "tensorboard, wandb or mlflow, several of them with commas, or none.", choices=(*TRACKERS, "none"),
        several=True, setting=False, panel=_RUN,
    )  # fmt: skip
    device: str | None = option(None, "cpu or cuda; a GPU by default, if there is one.", setting=False, panel=_SPEED)

    def __post_init__(self):
        check_options(self, "train")
        self._check_together()
        self._check_tuning()
        for name in tracker_names(self.report_to):
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:  # a folder of that name, as wandb makes them, is no package
                raise ModuleNotFoundError(
                    f"No module named {name!r}: pip install {name}, or leave it out of report_to={self.report_to!r} ('none' does "
                    "without any)", name=name,
                )  # fmt: skip

    def _check_together(self) -> None:
        if isinstance(self.val, str | os.PathLike) and str(self.val) == STANDARD_INPUT:
            raise ValueError("train(val='-'): standard input can be read once only. Give a file.")
        if self.schedule == "constant" and self.final_lr:
            raise ValueError(
                f"train(final_lr={self.final_lr:g}): a constant rate does not fall. Leave it out, or use another schedule."
            )
        warm = self.warmup / self.steps if self.warmup >= 1 else self.warmup
        if self.schedule == "wsd" and warm + self.decay > 1:
            raise ValueError(
                f"train(warmup={self.warmup:g}, decay={self.decay:g}): together more than all of the {self.steps} steps. Lower one."
            )

    def check_evaluated(self, val: Any) -> None:
        """Refuse options of evaluations where there is nothing to evaluate on, with a ValueError."""
        named = {name: getattr(self, name) for name in ("eval_every", "patience", "until")}
        if val is None and (given := next((f"{name}={value:g}" for name, value in named.items() if value), None)):
            raise ValueError(f"train({given}): there is nothing to evaluate on. Give val, or leave it out.")

    def _check_tuning(self) -> None:
        alone = {"ema": self.ema, "layer_decay": self.layer_decay}
        others: dict[str, Any] = {"lora": self.lora, "shard": self.shard or None}
        if self.optimizer == "muon" and self.layer_decay is not None:
            raise ValueError(
                f"train(optimizer='muon', layer_decay={self.layer_decay:g}): Muon has one rate. Use adamw, or leave layer_decay out."
            )
        for name, value in alone.items():
            for other, also in others.items():
                if value is not None and also is not None:
                    raise ValueError(f"train({name}={value:g}, {other}={also}): do not go together. Leave one out.")
        if self.lora is None and (self.lora_alpha is not None or self.lora_targets != "all-linear"):
            alpha = self.lora_alpha
            given = f"lora_targets={self.lora_targets!r}" if alpha is None else f"lora_alpha={alpha:g}"
            raise ValueError(f"train({given}): there are no adapters. Give their rank (lora), or leave it out.")
        if self.lora is not None and importlib.util.find_spec("peft") is None:
            raise ModuleNotFoundError("No module named 'peft', which makes adapters; leave lora out", name="peft")
        if self.shard and int(os.environ.get("WORLD_SIZE", "0")) < 1:
            raise ValueError(
                "train(shard=True): needs processes to shard over. Start it with torchrun, or leave it out."
            )
        if self.shard and self.optimizer == "muon":
            raise ValueError(
                "train(shard=True, optimizer='muon'): Muon needs whole matrices, and a process has parts. Use adamw, or leave shard out."
            )

    def settings(self, kind: str = "text") -> dict[str, Any]:
        """Return what a run on data of a kind that is continued must have in common with its beginning, by name.

        How the rows of a step are read, in few large batches or in many small ones, is not among it.
        """
        fields = [f for f in dataclasses.fields(self) if f.metadata.get("setting") and f.metadata["of"] in ("", kind)]
        named = {f.name: getattr(self, f.name) for f in fields}
        return named | {"rows_per_step": self.batch_size and self.batch_size * self.accumulate}

    def for_trainer(self) -> dict[str, Any]:
        """Return what transformers' ``TrainingArguments`` take as it is, by their names."""
        named = ((f.metadata.get("trainer"), f.name) for f in dataclasses.fields(self))
        return {theirs: getattr(self, ours) for theirs, ours in named if theirs}


def tracker_names(report_to: str) -> list[str]:
    """Return the trackers that are named, each once; ``none`` beside another is a ValueError."""
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",")))
    if "none" in names and len(names) > 1:
        raise ValueError(f"report_to={report_to!r}: names none and others. Leave none out, or the others.")
    return [name for name in names if name != "none"]


def check_out(out: Path) -> None:
    """Refuse a run's folder that is a file, or would have to lie in one, with a NotADirectoryError."""
    file = next((p for p in (out, *out.parents) if p.exists()), out)
    if out.is_symlink() and not out.exists():
        raise NotADirectoryError(
            f"{out}: is a link to {os.readlink(out)}, where nothing is. Make a folder there, or name another."
        )
    if file.exists() and not file.is_dir():
        raise NotADirectoryError(f"{file}: is a file, and out={str(out)!r} has to be a folder. Name another.")


def holds_weights(model: Any) -> bool:
    """Return whether a model argument means trained weights, a file of them, a folder that has one or a hub id, and no config."""
    if not isinstance(model, str | os.PathLike) or model in list_models():
        return False
    path = Path(model)
    if os.path.isdir(path):
        return any(f.is_file() for pattern in _WEIGHTS for f in path.glob(pattern))
    if os.path.isfile(path):
        return path.suffix in _FILES
    named = isinstance(model, str) and HUB_ID.fullmatch(model) and path.suffix not in (".yaml", ".yml")
    return bool(named) and not os.path.exists(path)


def _is_same(out: Path, model: str) -> bool:
    # a config's name is no folder, and its run may be there from an earlier call
    return os.path.exists(out) and os.path.exists(model) and os.path.samefile(out, model)


def default_out(model: str) -> Path:
    """``runs/MODEL``, or ``runs/MODEL-finetuned`` where that is the folder the weights come from."""
    name = Path(model).name if Path(model).suffix not in (".yaml", ".yml") else Path(model).stem
    out = Path("runs") / (name or Path(model).resolve().name)
    return out.with_name(f"{out.name}-finetuned") if _is_same(out, model) else out

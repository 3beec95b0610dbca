"""Options of a training in the words of transformers' ``Trainer``."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..device import pick_device
from .options import TrainOptions

__all__ = ["on_cpu", "resolved_precision", "training_arguments"]


def on_cpu(device: str | None) -> bool:
    """Return whether the CPU trains, because it is named or there is nothing else; transformers wants to be told of either."""
    if device is None:
        return not torch.accelerator.is_available()
    return pick_device(device, numbered=False).type == "cpu"


def resolved_precision(wish: str, use_cpu: bool) -> str:
    """Return the precision that ``auto`` stands for here, or the one that is wished for."""
    if wish != "auto":
        return wish
    able = not use_cpu and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return "bfloat16" if able else "float32"


def training_arguments(out: Path, options: TrainOptions, use_cpu: bool, evaluated: bool) -> TrainingArguments:
    """Return the arguments of a run in the folder ``out``, in which the model is ``evaluated`` or not."""
    on_gpu = not use_cpu and torch.cuda.is_available()
    workers = options.workers if options.workers is not None else 2 if on_gpu else 0
    save_steps = options.save_every or max(1, options.steps // 10)
    return TrainingArguments(
        output_dir=str(out / "checkpoints"), **_schedule(options), **options.for_trainer(),
        bf16=options.precision == "bfloat16",
        # fused: it can be told on the device to leave the weights alone
        optim="adamw_torch_fused",
        logging_steps=max(1, options.steps // 200), save_steps=save_steps,
        eval_strategy="steps" if evaluated else "no", eval_steps=options.eval_every or save_steps,
        per_device_eval_batch_size=options.batch_size,
        # what is not finite is an error, and looking for it after every step would wait for the device
        logging_nan_inf_filter=False,
        # a batch is sent while the one before it is computed; the host would otherwise wait for all that the device has to do
        use_cpu=use_cpu, dataloader_pin_memory=on_gpu, accelerator_config={"non_blocking": on_gpu},
        dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0,
        remove_unused_columns=False, disable_tqdm=True, report_to="none",
    )  # fmt: skip


def _schedule(options: TrainOptions) -> dict[str, Any]:
    """The course of the rate in transformers' names."""
    if options.schedule == "constant":
        return {"lr_scheduler_type": "constant_with_warmup"}
    if options.schedule == "cosine":
        floor = {"lr_scheduler_kwargs": {"min_lr_rate": options.final_lr}}
        return (
            {"lr_scheduler_type": "cosine_with_min_lr", **floor}
            if options.final_lr
            else {"lr_scheduler_type": "cosine"}
        )
    course = {
        "num_decay_steps": round(options.decay * options.steps),
        "min_lr_ratio": options.final_lr,
        "decay_type": "1-sqrt",
    }
    return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": course}

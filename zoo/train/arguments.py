"""Options of a training in the words of transformers' ``Trainer``."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from .options import TrainOptions

__all__ = ["training_arguments"]


def training_arguments(out: Path, options: TrainOptions, use_cpu: bool) -> TrainingArguments:
    """Return the arguments of a run in the folder ``out``."""
    on_gpu = not use_cpu and torch.cuda.is_available()
    workers = options.workers if options.workers is not None else 2 if on_gpu else 0
    return TrainingArguments(
        output_dir=str(out / "checkpoints"), lr_scheduler_type="cosine", **options.for_trainer(),
        # fused: it can be told on the device to leave the weights alone
        optim="adamw_torch_fused",
        logging_steps=max(1, options.steps // 200), save_steps=options.save_every or max(1, options.steps // 10),
        # what is not finite is an error, and looking for it after every step would wait for the device
        logging_nan_inf_filter=False,
        use_cpu=use_cpu, dataloader_pin_memory=on_gpu,
        dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0,
        remove_unused_columns=False, disable_tqdm=True, report_to="none",
    )  # fmt: skip

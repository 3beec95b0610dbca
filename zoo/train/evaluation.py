"""Evaluation in the middle of a training, which changes nothing of it: the loss per target, the best so far, and when to give up."""

import math
from typing import Any

import torch
from transformers import TrainerCallback

from ..models.loss import IGNORE
from .batches import Whole, model_inputs, targets
from .carried import CarriedState

__all__ = ["Evaluations", "best_of", "has_stalled", "loss_per_target", "metrics_of"]


class Evaluations(TrainerCallback):
    """Lets a continued run save and evaluate as often as this call says, and evaluates after the last step too."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget the intervals of the call that wrote the checkpoint."""
        state.save_steps, state.eval_steps, state.logging_steps = args.save_steps, args.eval_steps, args.logging_steps

    def on_step_end(self, args, state, control, **kwargs):
        """Let what is evaluated be logged too, so that both losses are of one step."""
        if args.eval_strategy != "no" and state.global_step == state.max_steps:
            control.should_evaluate = True
        control.should_log |= control.should_evaluate


def loss_per_target(trainer: Any) -> float:
    """Return the mean cross-entropy in nats over all targets of the trainer's evaluation set.

    Rows are as in training, spread over the processes. Every target counts once, whatever batch it is in; auxiliary losses are not part
    of it.
    """
    model, examples, size = trainer.model, trainer.eval_dataset, trainer.args.eval_batch_size * trainer.args.world_size
    sums = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
    carried = CarriedState(model.core) if trainer.options.carry_state else None
    training = model.training
    model.eval()
    # the loader draws a seed; what is drawn here, training must not miss
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for batch in trainer.get_eval_dataloader(Whole(examples, size)):
            batch = trainer._prepare_inputs(batch)
            found = (targets(batch) != IGNORE).sum()
            # of all logits that a call outside training gives, one per row is formed
            inputs = (
                {"use_cache": False} | model_inputs(batch, examples.documents)
                if carried is None
                else carried.inputs(batch)
            )
            out = model(**inputs, num_items_in_batch=1, logits_to_keep=1)
            if carried is not None:
                carried.keep(out)
            aux_loss, _ = model.reported
            nats = out.loss if aux_loss is None else out.loss - aux_loss * found
            sums += torch.stack([nats.double(), found.double()])
    model.train(training)
    nats, count = trainer.accelerator.reduce(sums, "sum").tolist()
    return nats / count


def _evaluations(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The steps that were evaluated, each with its loss."""
    return [{"step": e["step"], "eval_loss": e["eval_loss"]} for e in history if "eval_loss" in e]


def best_of(history: list[dict[str, float]]) -> dict[str, float] | None:
    """The first step whose evaluation gave the lowest loss, with it; ``None`` where nothing was evaluated."""
    return min(_evaluations(history), key=lambda e: e["eval_loss"], default=None)


def has_stalled(history: list[dict[str, float]], patience: int | None) -> bool:
    """Return whether the last ``patience`` evaluations have not been better than one before them."""
    found, best = _evaluations(history), best_of(history)
    return patience is not None and best is not None and len(found) - 1 - found.index(best) >= patience


def metrics_of(loss: float, tokenizer: str) -> dict[str, float]:
    """An evaluation as it is logged; where a token is a byte, also in bits per byte."""
    return {"eval_loss": loss} | ({"eval_bits_per_byte": loss / math.log(2)} if tokenizer == "byte" else {})

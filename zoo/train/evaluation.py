"""Evaluations in the middle of a training: when there are some, the best so far, and when to give up."""

from transformers import TrainerCallback

from .options import TrainOptions

__all__ = ["Evaluations", "best_of", "has_ended", "has_stalled"]

_COMPARED = ("eval_loss", "eval_accuracy")


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


def _evaluations(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The steps that were evaluated, each with what they are compared by."""
    return [{k: e[k] for k in ("step", *_COMPARED) if k in e} for e in history if "eval_loss" in e]


def best_of(history: list[dict[str, float]]) -> dict[str, float] | None:
    """The first step whose evaluation was the best, with that; ``None`` where nothing was evaluated.

    The best has the highest accuracy, where answers are right or wrong, and among equals the lowest loss.
    """
    return min(_evaluations(history), key=lambda e: (-e.get("eval_accuracy", 0), e["eval_loss"]), default=None)


def has_stalled(history: list[dict[str, float]], patience: int | None) -> bool:
    """Return whether the last ``patience`` evaluations have not been better than one before them."""
    found, best = _evaluations(history), best_of(history)
    return patience is not None and best is not None and len(found) - 1 - found.index(best) >= patience


def has_ended(history: list[dict[str, float]], options: TrainOptions) -> bool:
    """Return whether a training is over before its last step: it gets no better, or its answers are as right as was asked for."""
    right = (best_of(history) or {}).get("eval_accuracy", -1.0)
    return has_stalled(history, options.patience) or (options.until is not None and right >= options.until)

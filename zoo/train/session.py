"""A training as its user sees it: progress, times, and Ctrl-C made a checkpoint."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from ..terminal import progress_bar, stderr
from .run_folder import Checkpoint

__all__ = ["Session"]


class Session(TrainerCallback):
    """Watches one call of the Trainer: shows ``header`` and progress, measures time, and turns Ctrl-C into a checkpoint."""

    def __init__(
        self, header: list[str], tokens_per_step: int, checkpoint: Checkpoint | None,
        on_step: Callable[[int, float], None] | None,
    ):  # fmt: skip
        self.header, self.tokens_per_step, self.on_step = header, tokens_per_step, on_step
        # a checkpoint knows the time that led to it; what came after it was lost
        self.before = 0.0 if checkpoint is None else checkpoint.seconds
        self.first_step = 0 if checkpoint is None else checkpoint.step
        self.interrupted = self.stopping = False
        self.start = time.monotonic()
        self.saved_seconds = self.before  # those that the last checkpoint carries on are those of the run
        self.console: Console | None = None
        self.bar: Progress | None = None

    @property
    def seconds(self) -> float:
        """Spent training, in this call and those before it."""
        return self.before + time.monotonic() - self.start

    def on_train_begin(self, args, state, control, **kwargs):
        """Show what is trained."""
        self.start = time.monotonic()
        if not state.is_world_process_zero:
            return
        self.console = stderr()
        for line in self.header:
            self.console.print(line)
        if state.global_step:
            self.console.print(f"resuming at step {state.global_step} of {state.max_steps}")
        if self.console.is_terminal and not self.console.is_jupyter:
            self.bar = progress_bar(self.console, transient=True)
            self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")
            self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        """Count, and stop where that is wished."""
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)
        if self.on_step:
            losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
            self.on_step(state.global_step, next(losses, float("nan")))
        if state.global_step == state.max_steps:
            control.should_log = True
        elif self.stopping or (self.interrupted and args.world_size == 1):
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the time to what is logged, and show it."""
        state.log_history[-1]["seconds"] = round(self.seconds, 3)
        if not self.console or not logs or "loss" not in logs:
            return
        rate = (state.global_step - self.first_step) * self.tokens_per_step / (self.seconds - self.before)
        note = f"loss {logs['loss']:.3f}  {rate:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.bar.task_ids[0], note=note)
        else:
            self.console.print(f"step {state.global_step:,} of {state.max_steps:,}  {note}")

    @contextlib.contextmanager
    def saving_on_interrupt(self) -> Iterator[None]:
        """Take the first Ctrl-C for the wish to stop after the step, and the second for impatience."""

        def ask(signum, frame):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, ask) if main else None
        try:
            yield
        finally:
            if self.bar:
                self.bar.stop()
            if main:
                signal.signal(signal.SIGINT, before)

"""A training as its user sees it: progress, speed, times, and Ctrl-C made a checkpoint."""

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from ..terminal import progress_bar, stderr
from .manifest import Checkpoint

__all__ = ["Session", "Workload"]

# speed is of the last seconds, or of the last that was logged if that took longer
_WINDOW = 10.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """The work of one step of all processes, and what the devices could do.

    Attributes:
        units: Tokens that something is made of, and padding is none, a mean where rows differ; or images, or vectors.
        flops: FLOPs per unit, forward and backward.
        peak: FLOPs a second that all devices do at most; ``None`` if that is not known.
        device: The GPU of this process, if it has one.
        unit: The word for what is counted, in the plural.
    """

    units: float
    flops: float = 0.0
    peak: float | None = None
    device: torch.device | None = None
    unit: str = "tokens"


class Session(TrainerCallback):
    """Watches one call of the Trainer: shows ``header`` and progress, measures speed and time, and turns Ctrl-C into a checkpoint."""

    def __init__(
        self,
        header: list[str],
        work: Workload,
        checkpoint: Checkpoint | None,
        on_step: Callable[[int, float], None] | None,
    ):
        self.header, self.work, self.on_step = header, work, on_step
        # a checkpoint knows the time that led to it; what came after it was lost
        self.before = 0.0 if checkpoint is None else checkpoint.seconds
        self.first_step = 0 if checkpoint is None else checkpoint.step
        self.interrupted = self.stopping = False
        self.start = time.monotonic()
        self.saved_seconds = self.before  # those that the last checkpoint carries on are those of the run
        self.console: Console | None = None
        self.bar: Progress | None = None
        # steps and seconds of what was logged last, and where the next of them begins
        self.pace: deque[tuple[int, float]] = deque()
        self.mark: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        """Spent training, in this call and those before it."""
        return self.before + time.monotonic() - self.start

    def on_train_begin(self, args, state, control, **kwargs):
        """Show what is trained."""
        self.start = time.monotonic()
        if self.work.device:
            torch.cuda.reset_peak_memory_stats(self.work.device)
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
        if self.mark is None:
            # the first step compiles, records and asks for memory; it says nothing of those that follow
            if self.work.device:
                torch.cuda.synchronize(self.work.device)
            self._begin(state.global_step)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)
        if self.on_step:
            losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
            self.on_step(state.global_step, next(losses, float("nan")))
        if state.global_step == state.max_steps:
            control.should_log = True
        elif self.stopping or (self.interrupted and args.world_size == 1):
            control.should_save = control.should_training_stop = True

    def measures(self, step: int) -> dict[str, float]:
        """Return speed and memory for what is logged at a step; whoever asks has waited for the device."""
        found = {}
        if self.mark is not None and step > self.mark[0]:
            self.pace.append((step - self.mark[0], time.monotonic() - self.mark[1]))
            self._begin(step)
            while len(self.pace) > 1 and sum(seconds for _, seconds in self.pace) - self.pace[0][1] >= _WINDOW:
                self.pace.popleft()
        if self.pace:
            steps, seconds = map(sum, zip(*self.pace, strict=True))
            rate = self.work.units * steps / max(seconds, 1e-9)
            found[f"{self.work.unit}_per_second"] = round(rate, 1)
            if self.work.peak and self.work.flops:
                found["mfu"] = round(rate * self.work.flops / self.work.peak, 4)
        if self.work.device:
            found["memory_GiB"] = round(torch.cuda.max_memory_reserved(self.work.device) / 2**30, 3)
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done here out of the time spent training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.start += time.monotonic() - began

    def _begin(self, step: int) -> None:
        self.mark = step, time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        """Leave the time that saving took out of the speed."""
        self._begin(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        """Leave the time that evaluating took out of the speed."""
        self._begin(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the time to what is logged, and show it."""
        state.log_history[-1]["seconds"] = round(self.seconds, 3)
        if not self.console or not logs:
            return
        step = f"step {state.global_step:,} of {state.max_steps:,}  "
        if "eval_loss" in logs:
            right = f", {logs['eval_accuracy']:.2%} right" if "eval_accuracy" in logs else ""
            self.console.print(f"{step}held-out loss {logs['eval_loss']:.3f}{right}")
        if "loss" not in logs:
            return
        note = f"loss {logs['loss']:.3f}" + "".join(f"  {text}" for text in _shown(logs, self.work.unit))
        if self.bar:
            self.bar.update(self.bar.task_ids[0], note=note)
        else:
            self.console.print(f"{step}{note}{self._left(state.max_steps - state.global_step)}")

    def _left(self, steps: int) -> str:
        if not self.pace or not steps:
            return ""
        taken, seconds = map(sum, zip(*self.pace, strict=True))
        minutes, rest = divmod(round(steps * seconds / taken), 60)
        return f"  {minutes // 60}:{minutes % 60:02}:{rest:02} left"

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


def _shown(logs: dict[str, float], unit: str) -> Iterator[str]:
    if (rate := logs.get(f"{unit}_per_second")) is not None:
        yield f"{rate:,.0f} {unit}/s"
    if "mfu" in logs:
        yield f"{100 * logs['mfu']:.0f} % MFU"
    if "memory_GiB" in logs:
        yield f"{logs['memory_GiB']:.1f} GiB"

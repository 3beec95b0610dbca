"""transformers' ``Trainer`` as a zoo training uses it: what it optimises, notices, logs, evaluates and saves."""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer

from ..checkpoint.publish import why_unwritten
from ..corpus.lanes import Lanes
from ..models.build import param_groups
from ..models.loss import IGNORE
from .balance import Balance, is_counted_first
from .batches import Batch, Whole
from .diverged import Diverged, first_nonfinite, largest_gradient, nonfinite_weight
from .ema import Ema
from .evaluation import Evaluations, best_of, has_ended
from .feed import Feed
from .feeds import feed_of
from .later import Later
from .manifest import Checkpoint
from .optimisers import muon_and_adamw
from .options import TrainOptions
from .order import order_of
from .processes import anywhere, batch_mean
from .run_folder import RunFolder
from .session import Session
from .stepping import Stepping
from .watch import Seen, Told, Watch
from .weights import load_weights

__all__ = ["ZooTrainer"]


class ZooTrainer(Trainer):
    """A ``Trainer`` that decays what :func:`param_groups` says, stops at what is not finite, and resumes as if it had not stopped.

    Args:
        *args: Of the ``Trainer``.
        options: Of the training.
        run: Its folder.
        session: What its user sees.
        checkpoint: The one that it goes on from.
        feed: What the model reads; found, unless it is given.
        **kwargs: Of the ``Trainer``.
    """

    optimizer: Any
    control: Any
    train_dataset: Any

    def __init__(
        self, *args: Any, options: TrainOptions, run: RunFolder, session: Session, checkpoint: Checkpoint | None,
        feed: Feed | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.options, self.run, self.session = options, run, session
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(Evaluations)
        self.add_callback(session)
        device = self.args.device
        self.watch = Watch(device, options.spike)
        if checkpoint is not None:
            start, logged = checkpoint.manifest["losses"][self.args.process_index], checkpoint.manifest["logged"]
            self.watch = Watch(device, options.spike, start, checkpoint.step, logged)
        self.model.core.batch_mean = batch_mean if self.args.world_size > 1 else None
        # where the host runs as the device does, nothing is saved by asking later
        self.asks_at_once = device.type == "cpu"
        self.late: tuple[Later, float] | None = None
        self.feed = feed_of(self.model.core, options) if feed is None else feed
        self.carried = self.feed.carried()
        self.ema = None if options.ema is None else Ema(self.model, options.ema)
        if self.ema is not None:
            self.add_callback(self.ema)
        why = "several devices train together" if self.args.world_size > 1 or self.args.n_gpu > 1 else None
        if self.carried is not None:
            why = "a state is carried from batch to batch"
        self.balance: Balance | None = None
        if is_counted_first(self.model, options) and self.args.n_gpu <= 1:
            self.balance = Balance(self.model, self.feed, self.train_dataset, self.model.core.batch_mean)
        most = getattr(self.train_dataset, "documents", None)
        self.stepping = Stepping(
            self.model,
            self.args.train_batch_size,
            most,
            torch.bfloat16 if self.args.bf16 else None,
            options.capture,
            why,
        )

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Name the parameters that decay."""
        decayed = {id(p) for p in param_groups(model)[0]["params"]}
        return [name for name, p in model.named_parameters() if id(p) in decayed]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return order_of(self.train_dataset if train_dataset is None else train_dataset, self.args.seed)

    def get_train_dataloader(self) -> DataLoader:
        """As transformers; where several processes share a pass, its last batches are whole, and no row is read by two of them."""
        examples: Any = self.train_dataset
        if self.args.world_size > 1 and not isinstance(examples, Lanes):
            self.train_dataset = Whole(examples, self.args.train_batch_size * self.args.world_size)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset = examples
        # its own: a loader draws a seed for its workers, once or in every pass, and what layers draw must not depend on their number
        getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers; or with rates that fall by layer; or Muon for the matrices of blocks that decay, and AdamW for the rest."""
        args, layer_decay = self.args, self.options.layer_decay
        if self.optimizer is not None or (self.options.optimizer == "adamw" and layer_decay is None):
            return super().create_optimizer(model)
        model = self.model if model is None else model
        if layer_decay is None:
            self.optimizer = muon_and_adamw(model, args)
        else:
            kind, given = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = kind(param_groups(model, args.weight_decay, layer_decay, args.learning_rate), **given)
        return self.optimizer

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """As transformers, or a replay of it; the loss is added up here, in a sum that a checkpoint carries on."""
        rows = inputs.pop("row")
        loss = self.stepping.take(inputs, num_items_in_batch)
        if loss is None:
            carried = self.carried
            given = self.feed.inputs(inputs, self.train_dataset) if carried is None else carried.inputs(inputs)
            loss = super().training_step(model, given, self.feed.items(inputs, num_items_in_batch))
        self._log_late()
        self.watch.read(rows, loss)
        return loss

    def compute_loss(self, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """As transformers; a state that is to be carried on is kept."""
        loss, output = super().compute_loss(*args, return_outputs=True, **kwargs)
        if self.carried is not None:
            self.carried.keep(output)
        return (loss, output) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Any]:
        """As transformers; images are mixed, and experts see which of them all parts of the step choose."""
        parts, items = super().get_batch_samples(*args, **kwargs)
        step, process = self.state.global_step, self.args.process_index
        parts = [self.feed.prepared(batch, step, i, process) for i, batch in enumerate(parts)]
        if self.balance is not None and parts:
            self.balance.count(parts)
        return parts, items

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Any:
        counted = [{**batch, "shift_labels": self.feed.targets(batch)} for batch in batch_samples]
        return super()._get_num_items_in_batch(counted, device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers would count all parameters for every batch, to estimate what a model knows of itself."""
        return 0

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        self._differentiated(norm)
        return norm

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        if grad_norm is None:  # nothing is clipped
            grad_norm = super()._get_grad_norm(model)
            self._differentiated(grad_norm)
        return grad_norm

    def _differentiated(self, norm: Tensor) -> None:
        self.watch.differentiated(norm)
        if self.asks_at_once:
            self._ask()
        else:
            # the protocol of torch.amp.GradScaler: a fused optimiser leaves everything as it is where this is 1
            self._plain_optimizer.found_inf = self.watch.bad

    @property
    def _plain_optimizer(self) -> Any:
        """The optimiser without accelerate's around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        control, now = self.control, self.asks_at_once or self.args.world_size > 1
        if control.should_log and not (
            now or control.should_save or control.should_evaluate or control.should_training_stop
        ):
            # the host would wait for the step, and the device then for the host; it is logged when the next one is on its way
            named = {"grad_norm": grad_norm, **self.watch.tell(self.session.interrupted), **self.stepping.statistics()}
            self.late = Later(named), kwargs["learning_rate"]
            self.watch.sum.zero_()
            tr_loss.zero_()
            self._globalstep_last_logged = self.state.global_step
            control.should_log = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _log_late(self) -> None:
        if self.late is not None:
            (late, rate), self.late = self.late, None
            found = late.read()
            told = Told(**{field.name: found.pop(field.name) for field in dataclasses.fields(Told)})
            logs = {"loss": told.total, "grad_norm": found.pop("grad_norm"), "learning_rate": rate}
            self._log_step(self._heard([told]), logs, found)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As transformers, with the mean over all steps since the last logged one, whatever was stopped in between."""
        if "loss" not in logs:
            return super().log(logs, *args, **kwargs)
        told = self._ask()
        self.watch.sum.zero_()
        self._log_step(told, logs, Later(self.stepping.statistics()).read())

    def _log_step(self, told: list[Told], logs: dict[str, float], found: dict[str, float]) -> None:
        step = self.state.global_step
        mean = sum(one.total for one in told) / self.args.world_size / (step - self.watch.logged)
        self.watch.logged = step
        super().log({**logs, "loss": mean, **found, **self.session.measures(step)})

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, log it, and have the best model saved; training ends where there is no better one for long, or none is needed."""
        with self.session.paused(), contextlib.nullcontext() if self.ema is None else self.ema.in_place():
            metrics = self.feed.evaluated(self)
        step, loss = self.state.global_step, metrics["eval_loss"]
        if loss != loss or loss == float("inf"):
            self._diverge(
                f"the loss of the evaluation after it is {loss}", step, [], nonfinite_weight(self.model) or "unknown"
            )
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        history = self.state.log_history
        if (best := best_of(history)) is not None and best["step"] == step:
            self.control.should_save = True
            if self.args.process_index == 0:
                self.feed.keep(self.run.path, step)
        if has_ended(history, self.options):
            self.control.should_save = self.control.should_training_stop = True
        return metrics

    def _ask(self) -> list[Told]:
        """Return what all processes have to tell, or raise :class:`Diverged` where a step must not be taken."""
        told = torch.stack(list(self.watch.tell(self.session.interrupted).values()))[None]
        if self.args.world_size > 1:
            told = self.accelerator.gather(told)
        return self._heard([Told(*one) for one in told.tolist()])

    def _heard(self, processes: list[Told]) -> list[Told]:
        if any(one.bad for one in processes):
            self._stop_at(int(min(one.good for one in processes if one.bad)), processes)
        # of several processes none may stop alone
        self.session.stopping = any(one.wish for one in processes)
        self.watch.forget()
        return processes

    def _stop_at(self, index: int, told: list[Told]) -> None:
        """Raise :class:`Diverged` for the step that was ``index``-th since the last question."""
        seen = self.watch.steps[index]
        loss, norm = seen.loss.item(), seen.norm.item()
        finite = all(abs(x) < float("inf") for x in (loss, norm))
        step, rows = self.watch.asked + index + 1, sorted(torch.cat(seen.rows).tolist())
        try:
            where = self._locate(seen, finite)
        except (RuntimeError, ValueError) as e:  # out of memory, say: the rest of the message matters more
            where = f"not found ({str(e).splitlines()[0]})"
        if not finite:
            self._diverge(f"the loss is {loss:.4g} and its gradient's norm {norm:.4g}", step, rows, where)
        own = told[self.args.process_index]
        self._diverge(
            f"the loss is {loss:.4g}, and its mean over some ten steps {own.mean:.4g}, more than {self.options.spike:g} above the "
            f"{own.lowest:.4g} of step {own.lowest_at:.0f}", step, rows, where, int(own.lowest_at),
        )  # fmt: skip

    def _locate(self, seen: Seen, finite: bool) -> str:
        self.model.core.batch_mean = None  # every process looks for itself
        numbers = torch.cat(seen.rows).tolist()
        examples: Any = self.train_dataset
        examples.set_epoch(int(self.state.epoch or 0))
        size = self.args.per_device_train_batch_size
        chosen = [[examples.rows[n] for n in numbers[i : i + size]] for i in range(0, len(numbers), size)]
        batches = [{k: torch.stack([row[k] for row in rows]).to(self.args.device) for k in rows[0]} for rows in chosen]
        items = sum((self.feed.targets(batch) != IGNORE).sum() for batch in batches)
        inputs = [self.feed.inputs(batch, examples) | {"num_items": items} for batch in batches]
        with self.accelerator.autocast():
            if finite:
                return largest_gradient(self.model.core, inputs)
            return first_nonfinite(self.model.core, inputs) or "not found again"

    def _diverge(self, what: str, step: int, rows: list[int], where: str, before: int | None = None) -> None:
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        batch = f"; {self.feed.row}s {shown} of the data" if rows else ""
        found = "first value that is not finite" if before is None else "largest gradient"
        calm = "" if before is None else ", or go on regardless with spike=0 (--spike 0)"
        raise Diverged(
            f"training diverged at step {step} of {self.args.max_steps}: {what}{batch}; {found}: {where}. {self.run.kept(before)} "
            f"Try a lower lr (it is {self.args.learning_rate:g}) or a longer warm-up, in another folder or with resume off "
            f"(--no-resume){calm}.",
            step, tuple(rows), where,
        )  # fmt: skip

    def _get_output_dir(self, trial: Any) -> str:
        # asked for when a checkpoint is saved, and at the end, when old ones are looked for in vain
        return str(self.run.staging)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        told, step = self._ask(), self.state.global_step
        if (name := anywhere(nonfinite_weight(self.model))) is not None:
            self._diverge("the weights are no longer finite after it", step, [], f"the weight {name}")
        seconds = self.session.saved_seconds = round(self.session.seconds, 3)
        try:
            super()._save_checkpoint(model, trial)
            if self.carried is not None:
                self.carried.save(self.run.staging / f"checkpoint-{step}", self.args.process_index)
            if self.ema is not None and self.args.should_save:
                self.ema.save(self.run.staging / f"checkpoint-{step}")
        except (
            RuntimeError,
            SafetensorError,
            OSError,
        ) as e:  # the first two are a full disk's, of those who do not write in Python
            why = why_unwritten(e, self.run.checkpoints)
            if self.args.should_save:  # the room is somebody else's
                shutil.rmtree(self.run.staging, ignore_errors=True)
            raise OSError(
                f"{self.run.checkpoints}: the checkpoint of step {step} cannot be written ({why}). Those before it are whole; make "
                "room, and the same call goes on."
            ) from e
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = best_of(self.state.log_history)
            facts = {"seconds": seconds, "losses": [self.watch.kept(one) for one in told], "logged": self.watch.logged}
            self.run.publish(step, facts, None if best is None else int(best["step"]), self.watch.risen_since(told))
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.carried is not None:
            self.carried.load(Path(resume_from_checkpoint), self.args.process_index, self.args.device)
        if self.ema is not None:
            self.ema.load(Path(resume_from_checkpoint))
        return load_weights(self.model, Path(resume_from_checkpoint))

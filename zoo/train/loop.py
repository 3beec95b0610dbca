"""transformers' ``Trainer`` as a zoo training uses it: what it optimises, notices, logs and saves."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer

from ..checkpoint.tensors import stored_tensors
from ..errors import CheckpointError
from ..models.build import param_groups
from ..models.model import Model
from .diverged import Diverged, first_nonfinite, nonfinite_weight
from .order import order_of
from .run_folder import AGAIN, Checkpoint, RunFolder
from .session import Session

__all__ = ["ZooTrainer", "load_weights"]


class Watch:
    """Adds up losses and notices what is not finite, on the device; the host asks when something is logged or saved.

    From the first step that is not finite on, ``bad`` is 1, and the optimiser, which reads it on the device, changes no weight: the model
    is then still the one that this step started from. ``sums`` is of the losses since the step that was logged last, of one process.
    """

    def __init__(self, device: torch.device, sums: float = 0.0, step: int = 0, logged: int = 0):
        self.sum, self.bad, self.good = (torch.full((), x, device=device) for x in (sums, 0.0, 0.0))
        self.asked, self.logged = step, logged
        self.loss: Tensor | None = None
        # rows, loss and gradient norm of each since the last question
        self.steps: list[tuple[list[Tensor], Tensor, Tensor]] = []
        self.rows: list[Tensor] = []

    def read(self, rows: Tensor, loss: Tensor) -> None:
        """Take in a batch, or a part of one."""
        self.rows.append(rows)
        self.loss = loss if self.loss is None else self.loss + loss

    def differentiated(self, norm: Tensor) -> None:
        """Take in the norm of the gradient that a step is about to use."""
        assert self.loss is not None
        finite = torch.isfinite(self.loss) & torch.isfinite(norm)
        self.bad.copy_(torch.maximum(self.bad, 1 - finite.to(self.bad.dtype)))
        self.good += 1 - self.bad
        self.sum += self.loss
        self.steps.append((self.rows, self.loss, norm))
        self.rows, self.loss = [], None


class ZooTrainer(Trainer):
    """A ``Trainer`` that decays what :func:`param_groups` says, stops at what is not finite, and resumes as if it had not stopped."""

    def __init__(self, *args: Any, run: RunFolder, session: Session, checkpoint: Checkpoint | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.run, self.session = run, session
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(session)
        device = self.args.device
        self.watch = Watch(device)
        if checkpoint is not None:
            sums = checkpoint.manifest["loss_sums"][self.args.process_index]
            self.watch = Watch(device, sums, checkpoint.step, checkpoint.manifest["logged"])
        # where the host runs as the device does, nothing is saved by asking later
        self.asks_at_once = device.type == "cpu"

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Name the parameters that decay."""
        decayed = {id(p) for p in param_groups(model)[0]["params"]}
        return [name for name, p in model.named_parameters() if id(p) in decayed]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return order_of(self.train_dataset if train_dataset is None else train_dataset, self.args.seed)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers; the loss is added up here, in a sum that a checkpoint carries on."""
        rows = inputs.pop("row")
        if (documents := inputs.pop("documents", None)) is not None:
            inputs["seq_idx"] = documents
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.watch.read(rows, loss)
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        self.watch.differentiated(norm)
        if self.asks_at_once:
            self._ask()
        else:
            # the protocol of torch.amp.GradScaler: a fused optimiser leaves everything as it is where this is 1
            optimiser: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            optimiser.found_inf = self.watch.bad
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As transformers, with the mean over all steps since the last logged one, whatever was stopped in between."""
        if "loss" in logs:
            step = self.state.global_step
            logs["loss"] = sum(self._ask()) / self.args.world_size / (step - self.watch.logged)
            self.watch.sum.zero_()
            self.watch.logged = step
            logs |= self.session.measures(step)
        super().log(logs, *args, **kwargs)

    def _ask(self) -> list[float]:
        """Return the sums of losses of all processes, or raise :class:`Diverged` where something was not finite."""
        watch, asked = self.watch, float(self.session.interrupted)
        told = torch.stack([watch.sum, watch.bad, watch.good, torch.full_like(watch.sum, asked)])
        if self.args.world_size > 1:
            told = self.accelerator.gather(told)
        processes = told.reshape(-1, 4).tolist()
        if any(bad for _, bad, _, _ in processes):
            self._stop_at(int(min(good for _, bad, good, _ in processes if bad)))
        # of several processes none may stop alone
        self.session.stopping = any(wish for *_, wish in processes)
        watch.asked += len(watch.steps)
        watch.steps.clear()
        watch.good.zero_()
        return [total for total, *_ in processes]

    def _stop_at(self, index: int) -> None:
        """Raise :class:`Diverged` for the step that was ``index``-th since the last question."""
        rows, loss, norm = self.watch.steps[index]
        step, numbers = self.watch.asked + index + 1, sorted(torch.cat(rows).tolist())
        batch = [self.train_dataset.rows[n] for n in numbers]
        ids, labels = (torch.stack([row[k] for row in batch]).to(self.args.device) for k in ("input_ids", "labels"))
        try:
            where = first_nonfinite(self.model.core, ids, labels)
        except (RuntimeError, ValueError) as e:  # out of memory, say: the rest of the message matters more
            where = f"not found ({str(e).splitlines()[0]})"
        what = f"the loss is {loss.item():.4g} and its gradient's norm {norm.item():.4g}"
        self._diverge(what, step, numbers, where or "not found again")

    def _diverge(self, what: str, step: int, rows: list[int], where: str) -> None:
        last = self.run.last_step()
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        kept = f"Checkpoint {last} in {self.run.checkpoints} is whole." if last else "There is no checkpoint yet."
        batch = f"; rows {shown} of the data" if rows else ""
        raise Diverged(
            f"training diverged at step {step} of {self.args.max_steps}: {what}{batch}; first value that is not finite: {where}. {kept} "
            f"Try a lower lr (it is {self.args.learning_rate:g}) or a longer warm-up, in another folder or with resume off (--no-resume).",
            step, tuple(rows), where,
        )  # fmt: skip

    def _get_output_dir(self, trial: Any) -> str:
        return str(
            self.run.staging
        )  # asked for when a checkpoint is saved, and at the end, when old ones are looked for in vain

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        sums, step = self._ask(), self.state.global_step
        if (name := nonfinite_weight(self.model)) is not None:
            self._diverge("the weights are no longer finite after it", step, [], f"the weight {name}")
        seconds = self.session.saved_seconds = round(self.session.seconds, 3)
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, SafetensorError) as e:  # how a full disk is told by those who do not write in Python
            why = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise OSError(
                f"{self.run.checkpoints}: the checkpoint of step {step} cannot be written ({why}). Those before it are whole; make "
                "room, and the same call goes on."
            ) from e
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.run.publish(step, {"seconds": seconds, "loss_sums": sums, "logged": self.watch.logged})
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return load_weights(self.model.core, Path(resume_from_checkpoint))


def load_weights(model: Model, folder: Path) -> None:
    """Fill a model with the weights of its checkpoint; tensors of other names, shapes or types are a CheckpointError."""
    with stored_tensors(folder) as stored, torch.no_grad():
        places = dict(model.named_parameters(remove_duplicate=False))
        filled = {id(places[name]) for name in stored if name in places}
        lacking = (name for name, p in model.named_parameters() if id(p) not in filled)
        if wrong := sorted(set(stored) - set(places)) + sorted(lacking):
            raise CheckpointError(
                f"{folder}: holds the weights of another model: {wrong[0]!r} is in one of them alone. {AGAIN}"
            )
        for name, tensor in stored.items():
            value, place = tensor.read(), places[name]
            if value.shape != place.shape or value.dtype != place.dtype:
                raise CheckpointError(
                    f"{tensor.file}: {name!r} is {value.dtype} of shape {tuple(value.shape)}, the model's {place.dtype} of shape "
                    f"{tuple(place.shape)}. {AGAIN}"
                )
            place.copy_(value)

"""Text as a training has it: rows of tokens, each a target for those before it."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hf import HybridZooForCausalLM
from ..models.loss import IGNORE
from ..terminal import counted
from .batches import Batch, evaluation_batches
from .carried import CarriedState
from .examples import Examples, examples_from, lanes_from
from .feed import Feed
from .flops import context_length, flops_per_token
from .labelled import scores_of
from .processes import devices_in_one
from .tokens import model_inputs, targets

__all__ = ["TextFeed"]


class TextFeed(Feed):
    """Rows of tokens for a language model; see :class:`Feed`."""

    kind, unit, row, reads = "text", "tokens", "row", "input_ids"
    defaults: ClassVar[dict[str, Any]] = {"batch_size": 8, "lr": 1e-3}

    def adapter(self, core: Any = None) -> HybridZooForCausalLM:
        """As :meth:`Feed.adapter`."""
        return HybridZooForCausalLM.wrap(core or self.core)

    def examples(self, devices: int) -> tuple[Any, Any]:
        """As :meth:`Feed.examples`, in rows of the same length."""
        call = self.options
        call.check_evaluated(call.val)
        rows = self._examples(call.data, call, devices)
        if call.val is None:
            return rows, None
        like = dataclasses.replace(call, length=call.length or rows.length)
        try:
            val = self._examples(call.val, like, devices, once=True)
        except ValueError as e:
            raise ValueError(f"val: {str(e).removeprefix('data: ')}") from e
        if call.until is not None and not val.labelled:
            raise ValueError(
                f"train(until={call.until:g}): no answers are right or wrong. Give val rows with labels, or leave it out."
            )
        return rows, val

    def _examples(self, data: Any, call: Any, devices: int, once: bool = False) -> Any:
        out = Path(call.out)
        if not call.carry_state:
            return examples_from(data, self.core, call, out)
        if devices > 1 and devices_in_one():
            raise ValueError(
                f"train(carry_state=True): {devices} GPUs in one process split batches, and with them the streams. Use torchrun, or one "
                "GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        return lanes_from(data, self.core, call, call.batch_size * devices, call.seed, out, once=once)

    def size(self, examples: Examples) -> int:
        """As :meth:`Feed.size`."""
        return examples.length

    def mean(self, examples: Examples) -> float:
        """As :meth:`Feed.mean`."""
        return examples.tokens / len(examples.rows)

    def flops(self, examples: Examples, frozen: bool) -> float:
        """As :meth:`Feed.flops`."""
        return flops_per_token(self.core, context_length(examples), frozen)

    def inputs(self, batch: Batch, examples: Examples) -> dict[str, Any]:
        """As :meth:`Feed.inputs`; packed documents do not see each other."""
        return model_inputs(batch, examples.documents)

    def targets(self, batch: Batch) -> Tensor:
        """As :meth:`Feed.targets`: the tokens that follow."""
        return targets(batch)

    def carried(self) -> CarriedState | None:
        """As :meth:`Feed.carried`."""
        return CarriedState(self.core) if self.options.carry_state else None

    def silent(self, part: Batch, examples: Examples) -> dict[str, Any]:
        """As :meth:`Feed.silent`."""
        return super().silent(part, examples) | {"logits_to_keep": 1, "use_cache": False}

    def weight(self, part: Batch) -> Any:
        """As :meth:`Feed.weight`: tokens."""
        documents = part.get("documents")
        return part["input_ids"].numel() if documents is None else (documents >= 0).sum()

    def evaluated(self, trainer: Any) -> dict[str, float]:
        """As :meth:`Feed.evaluated`: the loss per target, and for bytes their bits; where labels are given, the share of right ones."""
        if trainer.eval_dataset.labelled:
            return answers(trainer)
        loss = loss_per_target(trainer)
        bits = {"eval_bits_per_byte": loss / math.log(2)} if self.core.cfg.tokenizer == "byte" else {}
        return {"eval_loss": loss} | bits

    def described(self, examples: Examples) -> list[str]:
        """As :meth:`Feed.described`."""
        n, length = len(examples), examples.length
        found = examples.about or [f"{counted(n, 'row')} of {length:,} tokens ({n * length:,})"]
        if (left := len(examples.rows) - n) > 0:
            found = [*found, f"{left:,} rows hold nothing to predict and are left out"]
        return found

    def judged(self, examples: Examples) -> str:
        """As :meth:`Feed.judged`."""
        about = (
            examples.about[-1] if examples.about else f"{counted(len(examples), 'row')} of {examples.length:,} tokens"
        )
        return f"{about}; the best has the highest accuracy" if examples.labelled else about

    def in_memory(self, examples: Examples) -> tuple[str, str]:
        """As :meth:`Feed.in_memory`."""
        return f"rows of {examples.length:,} tokens", f"a length below {examples.length:,}"


def loss_per_target(trainer: Any) -> float:
    """Return the mean cross-entropy in nats over all targets of the trainer's evaluation set.

    Rows are as in training, spread over the processes. Every target counts once, whatever batch it is in; auxiliary losses are not part
    of it.
    """
    model, examples = trainer.model, trainer.eval_dataset
    sums = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
    carried = CarriedState(model.core) if trainer.options.carry_state else None
    with evaluation_batches(trainer) as batches:
        for batch in batches:
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
    nats, count = trainer.accelerator.reduce(sums, "sum").tolist()
    return nats / count


def answers(trainer: Any) -> dict[str, float]:
    """Return the mean loss per target, in nats, and the share of right answers in a row, on average over rows, of labelled rows.

    As Zoology and its kin count: rows count alike, however many labels they have.
    """
    model, examples = trainer.model, trainer.eval_dataset
    # nats, targets, shares, rows
    sums = torch.zeros(4, dtype=torch.float64, device=trainer.args.device)
    with evaluation_batches(trainer) as batches:
        for batch in batches:
            wanted = targets(batch)
            inputs = model_inputs(batch, examples.documents)
            inputs.pop("labels")
            out = model(**inputs, use_cache=False, logits_to_keep=1, output_hidden_states=True)
            with trainer.accelerator.autocast():
                nats, right = scores_of(out.hidden_states[-1], model.core.lm_head, wanted)
            found = (wanted != IGNORE).sum(1)
            shares = right.sum(1) / found.clamp(min=1)
            sums += torch.stack([x.sum().double() for x in (nats, found, shares, found > 0)])
    nats, count, shares, rows = trainer.accelerator.reduce(sums, "sum").tolist()
    return {"eval_loss": nats / count, "eval_accuracy": shares / rows}

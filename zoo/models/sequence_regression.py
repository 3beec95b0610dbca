"""Vectors in, vectors out: a prediction at every place of a row, and the squared error where there is a target.

Time series, and functions learned in context (arXiv:2208.01066, arXiv:2402.04248). State-dict keys are those of the trunk, whose embedding
is a linear layer, ``backbone.embedding.{weight,bias}``, and ``head.{weight,bias}``.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from omegaconf import MISSING
from torch import Tensor, nn

from ...layers.base import Seq, shapes, tree
from ...layers.common import linear, reset_linear, upcast, weight_dtype
from ..config.schema import TrunkSchema
from .loss import IGNORE, items_of, share_of_items
from .model import Model
from .rows import describe_rows
from .state import ModelState

__all__ = ["SequenceRegressionOutput", "SequenceRegressionSchema", "SequenceRegressor", "missing"]


@dataclasses.dataclass
class SequenceRegressionSchema(TrunkSchema):
    """The keys of a config for rows of vectors: those of :class:`~hybridzoo.zoo.config.schema.TrunkSchema`, and two sizes.

    Attributes:
        inputs: Numbers that a place of a row holds.
        outputs: Numbers that are predicted there.
    """

    needs: ClassVar[dict[str, str]] = {}
    task: str = "sequence_regression"
    inputs: int = MISSING
    outputs: int = MISSING


@dataclasses.dataclass(repr=False)
class SequenceRegressionOutput:
    """The output of a forward; a pytree of its tensors, so that what wraps a model finds them.

    Attributes:
        loss: With ``labels``: mean squared error of the numbers that have a target, plus ``aux_loss``.
        logits: ``(b, l, outputs)``, the predictions, under the name that the outputs of all tasks have; those of padding mean nothing.
        aux_loss: The weighted sum of the mixers' auxiliary losses; ``None`` where no mixer has one.
        state: What the rows leave behind, for the next call.
        router: Statistics of every MoE block, a list of dicts.
        hidden: ``(b, l, d)`` after the final norm.
        hidden_states: Where asked for: ``(b, l, d)`` of the embedding and after every block, the last one after the final norm.
    """

    loss: Tensor | None
    logits: Tensor
    aux_loss: Tensor | None
    state: ModelState | None
    router: list[dict[str, Any]]
    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None

    __repr__ = shapes


tree(SequenceRegressionOutput)


class SequenceRegressor(Model):
    """A model of rows of vectors; arguments and attributes are those of :class:`~hybridzoo.zoo.models.model.Model`."""

    schema, hf_class, main_input_name = SequenceRegressionSchema, "HybridZooForSequenceRegression", "inputs"
    head: nn.Linear

    def make_embedding(self, device: Any, dtype: torch.dtype | None) -> nn.Module:
        """A linear layer with a bias that reads a vector."""
        return linear(self.cfg.inputs, self.cfg.d_model, True, device, dtype)

    def make_head(self, device: Any, dtype: torch.dtype | None) -> nn.Module:
        """A linear layer with a bias that gives one."""
        return linear(self.cfg.d_model, self.cfg.outputs, True, device, dtype)

    def make_end(self, part: str) -> nn.Module | None:
        """As :meth:`Model.make_end`: both are drawn by their sizes."""
        make = {"backbone.embedding": self.make_embedding, "head": self.make_head}.get(part)
        made: Any = make and make("cpu", torch.float32)
        if made is not None:
            reset_linear(made)
        return made

    def reset_ends(self) -> None:
        """Draw both linear layers as torch does; biases are zero."""
        for part in (self.backbone.embedding, self.head):
            reset_linear(part)  # type: ignore[arg-type]

    @classmethod
    def auto_classes(cls, cfg: Any) -> dict[str, str]:
        """As :meth:`Model.auto_classes`; transformers has no Auto class for such a task, so its own class reads a folder."""
        return {"AutoConfig": "HybridZooConfig"}

    def embedding_flops(self, size: int) -> int:
        """As of :class:`Model`: it multiplies."""
        return 2 * self.cfg.inputs * self.cfg.d_model

    def head_flops(self, size: int) -> int:
        """As of :class:`Model`, from the config: a quantised head has no parameters to count."""
        return 2 * self.cfg.d_model * self.cfg.outputs

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Any = None,
        state: ModelState | None = None,
        *,
        return_state: bool | None = None,
        num_items: Tensor | int | None = None,
        seq_idx: Any = None,
        seq: Seq | None = None,
        output_hidden_states: bool = False,
    ) -> SequenceRegressionOutput:
        """Predict vectors, and train on them.

        Args:
            inputs: ``(b, l, inputs)`` of any floating-point type, ``l >= 1``.
            labels: ``(b, l, outputs)``, the target of the place itself: who forecasts shifts them. NaN where there is none. Padding is
                never a target.
            attention_mask: As of :meth:`hybridzoo.zoo.models.causal_lm.CausalLM.forward`; no place sees padding.
            cu_seqlens: Likewise; no place sees another document.
            state: Likewise, where the mixers keep one.
            return_state: Whether ``out.state`` is filled; by default, where ``state`` is given.
            num_items: What the sum of squares is divided by, instead of the number of targets in this call: the targets of the larger
                batch that this call is a part of. The auxiliary loss counts by the same share.
            seq_idx: As of :meth:`hybridzoo.zoo.models.causal_lm.CausalLM.forward`.
            seq: Likewise.
            output_hidden_states: Whether ``out.hidden_states`` is filled.

        Raises:
            ValueError: Shapes or types that disagree, two kinds of row description, or a packed row with a state.
            NotImplementedError: A state, with a mixer that keeps none.
        """
        _check("inputs", inputs, (None, None, self.cfg.inputs))
        if labels is not None:
            _check("labels", labels, (*inputs.shape[:2], self.cfg.outputs))
        x = self.backbone.embed(self._read(inputs))
        seq = describe_rows(x, attention_mask, cu_seqlens, seq_idx, seq, state)
        return_state = state is not None if return_state is None else return_state
        if return_state and not torch.compiler.is_compiling():
            self._hooks.look_again()
        run = self.passed(x, seq, state, return_state=return_state, hidden_states=output_hidden_states)
        hidden, dtype = run.hidden, weight_dtype(self.head)
        logits = self.head(hidden if dtype is None else hidden.to(dtype))
        loss = None if labels is None else self._loss(logits, labels, seq, run.aux_loss, num_items)
        if seq is not None:
            hidden, logits = seq.restore(hidden), seq.restore(logits)
        return SequenceRegressionOutput(loss, logits, run.aux_loss, run.state, run.router, hidden, run.hidden_states)

    def _read(self, inputs: Tensor) -> Tensor:
        dtype = weight_dtype(self.backbone.embedding)
        return inputs if dtype is None else inputs.to(dtype)

    def _loss(self, logits: Tensor, labels: Tensor, seq: Seq | None, aux_loss: Tensor | None, num_items: Any) -> Tensor:
        if seq is not None:
            labels = seq.align(labels).masked_fill(~seq.valid[..., None], torch.nan)
        targets, predictions = missing(labels), upcast(logits)
        # chosen before it is squared: what has no target, NaN, has no gradient either
        error = (predictions - labels).where(targets != IGNORE, 0.0)
        loss = error.square().sum() / items_of(targets, num_items)
        # a part of a larger batch adds its part, so that accumulating gradients does not multiply the auxiliary loss
        return loss if aux_loss is None else loss + aux_loss * share_of_items(targets, num_items)

    def step(self, inputs: Tensor, state: ModelState) -> Tensor:
        """Read one vector per row, ``(b, inputs)``, and predict ``(b, outputs)``; ``state`` is updated in place.

        Where there are hooks, this is a call of the model with one vector per row.

        Raises:
            ValueError: Another shape or type, or another number of rows than the state has.
            NotImplementedError: A mixer keeps no state.
            RuntimeError: There are hooks, and a CUDA graph is captured, which would not run them again.
        """
        _check("inputs", inputs, (state.tokens.shape[0], self.cfg.inputs))
        return self._step(self._read(inputs), state)


def missing(labels: Tensor) -> Tensor:
    """Say which numbers are targets, as the targets of other tasks do: int64 of the labels' shape, -100 where there is none, else 0."""
    return labels.isnan().long() * IGNORE


def _check(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    """Refuse what is no floating-point tensor of a shape, of which ``None`` stands for any size but 0."""
    fits = x.dim() == len(shape) and all(n == m or (n is None and m) for n, m in zip(shape, x.shape, strict=True))
    if not fits or not x.is_floating_point():
        letters = f"({', '.join('any' if n is None else str(n) for n in shape)})"
        raise ValueError(
            f"{name}: expected floating-point numbers of shape {letters}, got {x.dtype} of shape {tuple(x.shape)}. The last size is the "
            f"config's."
        )

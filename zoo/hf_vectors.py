"""The adapter of models of vectors to transformers: Trainer and FSDP2 see them through it. There is no Auto class for their task."""

import dataclasses
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from .hf_base import Adapter
from .hf_calls import refuse_others

__all__ = ["HybridZooForSequenceRegression", "VectorOutput"]


@dataclasses.dataclass
class VectorOutput(ModelOutput):
    """The output as transformers knows it; attributes as of :class:`~hybridzoo.zoo.models.sequence_regression.SequenceRegressionOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class HybridZooForSequenceRegression(Adapter):
    """A zoo model of vectors as transformers knows it; ``core`` is the model itself."""

    main_input_name = "inputs"

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> VectorOutput | tuple:
        """As :meth:`SequenceRegressor.forward`, in transformers' words.

        Args:
            inputs: ``(b, l, inputs)``.
            attention_mask: ``(b, l)``, nonzero at real places.
            labels: ``(b, l, outputs)``, NaN where no loss is wanted.
            num_items_in_batch: Numbers that have a target in the larger batch that this is part of, as the Trainer counts them.
            output_hidden_states: Whether ``hidden_states`` is filled; by default as the config says, and so for ``return_dict``.
            return_dict: Whether the output is an object or a tuple.
            kwargs: ``seq_idx``, ``cu_seqlens`` or ``seq`` of packed rows; what cannot be honoured is refused.

        Raises:
            ValueError: As :meth:`SequenceRegressor.forward`; for what the model cannot give (attentions); and for an unknown argument.
        """
        packed = {name: kwargs.pop(name, None) for name in ("cu_seqlens", "seq_idx", "seq")}
        refuse_others(self, kwargs, output_attentions=self.config.output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        out = self.core(
            inputs, labels, attention_mask, num_items=num_items_in_batch, output_hidden_states=bool(output_hidden_states), **packed
        )  # fmt: skip
        output = VectorOutput(loss=out.loss, logits=out.logits, hidden_states=out.hidden_states)
        return self._answer(out, output, return_dict)

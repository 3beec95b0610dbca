"""The adapter of token classifiers to transformers: Trainer, ``AutoModelForTokenClassification`` and its pipeline see them through it."""

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import TokenClassifierOutput

from .hf_base import Adapter
from .hf_calls import Rows, refuse_others

__all__ = ["HybridZooForTokenClassification"]


class HybridZooForTokenClassification(Adapter):
    """A zoo classifier of tokens as transformers knows it; ``core`` is the model itself."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """As :meth:`TokenClassifier.forward`, in transformers' words.

        Args:
            input_ids: ``(b, l)`` int64.
            attention_mask: ``(b, l)``, nonzero at real tokens.
            inputs_embeds: ``(b, l, d)`` in place of ``input_ids``.
            labels: ``(b, l)`` int64, the class of each token, -100 where no loss is wanted.
            num_items_in_batch: Labels in the larger batch that this is part of, as the Trainer counts them.
            output_hidden_states: Whether ``hidden_states`` is filled; by default as the config says, and so for ``return_dict``.
            return_dict: Whether the output is an object or a tuple.
            kwargs: Packed rows as transformers' collators describe them (``cu_seq_lens_q``, ``seq_idx``, ``position_ids`` that start again
                at every document), or ``seq``; what cannot be honoured is refused.

        Raises:
            ValueError: As :meth:`TokenClassifier.forward`; for what the model cannot give (attentions); and for an unknown argument.
        """
        seq, packed = kwargs.pop("seq", None), {}
        for name in ("cu_seqlens", "seq_idx", "position_ids"):
            packed[name] = kwargs.pop(name, None)
        refuse_others(self, kwargs, output_attentions=self.config.output_attentions)
        rows = Rows(input_ids if input_ids is not None else inputs_embeds, attention_mask, None, **packed, **kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        out = self.core(
            input_ids, labels, rows.attention_mask, inputs_embeds=inputs_embeds, num_items=num_items_in_batch,
            seq_idx=rows.documents, seq=seq, output_hidden_states=bool(output_hidden_states),
        )  # fmt: skip
        output = TokenClassifierOutput(loss=out.loss, logits=out.logits, hidden_states=out.hidden_states)
        return self._answer(out, output, return_dict)

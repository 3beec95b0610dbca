"""The base of models that read tokens, whatever they make of them."""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ...layers.base import Seq
from ..tokenizer import load_tokenizer
from .model import Model
from .rows import integers
from .state import ModelState

__all__ = ["Passed", "TextModel", "padded_vocab"]


class Passed(NamedTuple):
    """The result of running tokens through the trunk.

    Attributes:
        hidden: ``(b, l, d)`` after the final norm, in the order in which the rows are described: real tokens first.
        state: What the rows leave behind, if it was asked for.
        aux_loss: The weighted sum of the mixers' auxiliary losses; ``None`` where no mixer has one.
        router: Statistics of every MoE block.
        hidden_states: ``(b, l, d)`` of the embedding and after every block, in the caller's order, if they were asked for.
    """

    hidden: Tensor
    state: ModelState | None
    aux_loss: Tensor | None
    router: list[dict[str, Any]]
    hidden_states: tuple[Tensor, ...] | None


class TextModel(Model):
    """A model of tokens; arguments and attributes are those of :class:`~hybridzoo.zoo.models.model.Model`."""

    def make_embedding(self, device: Any, dtype: torch.dtype | None) -> nn.Module:
        """A table of ``padded_vocab`` rows."""
        table = torch.empty(padded_vocab(self.cfg), self.cfg.d_model, device=device, dtype=dtype)
        return nn.Embedding.from_pretrained(table, freeze=False)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the model's folder, else the one that its config names, with ``encode``, ``decode`` and ``eos_token_id``."""
        return load_tokenizer(self.cfg.tokenizer, self.source)

    def embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The tokens of a call as the first block sees them, ``(b, l, d)``, from ids or as they are.

        Raises:
            ValueError: Both or neither are given, or one of another shape or type.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: give exactly one of them.")
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[1] == 0 or inputs_embeds.shape[2] != self.cfg.d_model:
                raise ValueError(
                    f"inputs_embeds: expected shape (b, l, {self.cfg.d_model}) with l >= 1, got {tuple(inputs_embeds.shape)}."
                )
            return inputs_embeds
        assert input_ids is not None
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids: expected shape (b, l) with l >= 1, got {tuple(input_ids.shape)}.")
        return self.backbone.embed(integers("input_ids", input_ids, ", or vectors as inputs_embeds"))

    def passed(
        self,
        x: Tensor,
        seq: Seq | None,
        state: ModelState | None = None,
        *,
        return_state: bool = False,
        hidden_states: bool = False,
    ) -> Passed:
        """Run the embedded tokens ``(b, l, d)`` of rows that ``seq`` describes through the trunk."""
        # from here on padding holds zeros, whatever the caller has there
        x, rows = (x, None) if seq is None else (seq.align(x), seq.cleared)
        every: list[Tensor] | None = [] if hidden_states else None
        hidden, new_state, aux = self.backbone(x, rows, state, return_state, every)
        if every and seq is not None:
            every = [seq.restore(h) for h in every]
        states = None if every is None else tuple(every)
        return Passed(hidden, new_state, self.aux_loss(aux), aux.get("router", []), states)


def padded_vocab(cfg: DictConfig) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up to ``pad_vocab_size_multiple``."""
    multiple = cfg.pad_vocab_size_multiple
    return -(-cfg.vocab_size // multiple) * multiple

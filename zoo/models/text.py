"""The base of models that read tokens, whatever they make of them."""

from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ..tokenizer import load_tokenizer
from .model import Model
from .rows import integers

__all__ = ["TextModel", "padded_vocab"]


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


def padded_vocab(cfg: DictConfig) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up to ``pad_vocab_size_multiple``."""
    multiple = cfg.pad_vocab_size_multiple
    return -(-cfg.vocab_size // multiple) * multiple

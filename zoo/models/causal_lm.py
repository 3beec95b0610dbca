"""The language model: tokens in, logits and the next-token loss out.

State-dict keys follow mamba-ssm: those of the trunk, and ``lm_head.weight``.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.base import Seq, shapes, tree
from ...layers.common import weight_dtype
from .generate import generate, stream
from .loss import next_token_loss, share_of_items, shift_labels
from .rows import describe_rows, integers
from .state import ModelState
from .text import TextModel, padded_vocab

__all__ = ["CausalLM", "CausalLMOutput"]


@dataclasses.dataclass(repr=False)
class CausalLMOutput:
    """The output of a forward; a pytree of its tensors, so that what wraps a model finds them.

    Attributes:
        loss: With ``labels``: mean cross-entropy in nats per target, plus ``aux_loss``.
        aux_loss: The weighted sum of the mixers' auxiliary losses; ``None`` where no mixer has one. Experts are balanced over all
            layers together, see :func:`hybridzoo.layers.moe.balance_loss`.
        state: What the rows leave behind, for the next call.
        router: Statistics of every MoE block, a list of dicts.
        hidden: ``(b, l, d)`` after the final norm.
        hidden_states: Where asked for: ``(b, l, d)`` of the embedding and after every block, the last one after the final norm.
    """

    loss: Tensor | None
    aux_loss: Tensor | None
    state: ModelState | None
    router: list[dict[str, Any]]
    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None
    _head: nn.Module
    _kept: int | Tensor = 0
    _logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """``(b, l, v)``. With ``labels`` they are formed when first asked for: the loss did not need them all at once."""
        if self._logits is None:
            at = slice(-self._kept, None) if isinstance(self._kept, int) else self._kept
            kept, dtype = self.hidden[:, at], weight_dtype(self._head)
            self._logits = self._head(kept if dtype is None else kept.to(dtype))
        return self._logits

    __repr__ = shapes


tree(CausalLMOutput)


class CausalLM(TextModel):
    """A decoder-only language model; arguments and attributes are those of :class:`~hybridzoo.zoo.models.text.TextModel`."""

    head_name, may_tie, hf_class = "lm_head", True, "HybridZooForCausalLM"
    lm_head: nn.Linear
    generate, stream = generate, stream

    def make_head(self, device: Any, dtype: torch.dtype | None) -> nn.Module:
        """A linear layer, whose weight is the table's where they are tied."""
        head = nn.Linear(self.cfg.d_model, padded_vocab(self.cfg), bias=False, device=device, dtype=dtype)
        if self.cfg.tie_embeddings:
            head.weight = self.backbone.embedding.weight  # type: ignore[assignment]
        return head

    def reset_ends(self) -> None:
        """Draw the table, and the head where it is another."""
        for weight in dict.fromkeys((self.backbone.embedding.weight, self.lm_head.weight)):
            nn.init.normal_(weight, std=self.cfg.initializer_range)  # type: ignore[arg-type]

    def head_flops(self, seq_len: int) -> int:
        """As of :class:`Model`, from the config: a quantised head has no parameters to count."""
        return 2 * self.cfg.d_model * padded_vocab(self.cfg)

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Any = None,
        state: ModelState | None = None,
        *,
        return_state: bool | None = None,
        inputs_embeds: Tensor | None = None,
        num_items: Tensor | int | None = None,
        seq_idx: Any = None,
        seq: Seq | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """Score tokens, and train on them.

        Args:
            input_ids: ``(b, l)`` int64, ``l >= 1``.
            labels: ``(b, l)`` int64 aligned with ``input_ids`` (the shift is done here), -100 where no loss is wanted. Padding and
                the first token of a packed document are never targets. ``(b, l + 1)`` where the token that follows a row is known: the
                row is then a piece of a longer one, and its last token has a target too.
            attention_mask: ``(b, l)``, nonzero at real tokens of this call; padding may stand on either side, or in between.
            cu_seqlens: ``(n + 1,)`` offsets of the documents packed into one row, in a tensor, an array or a list; no token sees
                another document.
            state: What an earlier call returned (``out.state``) or :meth:`init_state`: the tokens continue from there. Not modified.
            return_state: Whether ``out.state`` is filled; by default, whenever ``labels`` is absent or ``state`` is given.
            inputs_embeds: ``(b, l, d)`` in place of ``input_ids``, as the first block shall see them (``backbone.embed``).
            num_items: What the summed cross-entropy is divided by, instead of the number of targets in this call: the targets of the
                larger batch that this call is a part of. The auxiliary loss counts by the same share.
            seq_idx: ``(b, l)`` integers (a tensor, an array or lists), the packed document that a token belongs to, in place of
                ``cu_seqlens``: a new one starts where the number changes; negative at padding, which stands at the end of a row.
            seq: The rows as :class:`~hybridzoo.kernels.Seq` describes them, made by the caller, in place of ``attention_mask``,
                ``cu_seqlens`` and ``seq_idx``. One with ``most`` of a device's documents lets nobody wait for it, and can be captured
                in a CUDA graph.
            logits_to_keep: How many logits of the end of every row to form, 0 for all, or the indices of the positions, ``(m,)`` int64.
            output_hidden_states: Whether ``out.hidden_states`` is filled.

        Raises:
            ValueError: Shapes that disagree, two kinds of row description, or a packed row with a state.
        """
        x = self.embedded(input_ids, inputs_embeds)
        seq = describe_rows(x, attention_mask, cu_seqlens, seq_idx, seq, state)
        if labels is not None and labels.shape not in (x.shape[:2], (x.shape[0], x.shape[1] + 1)):
            raise ValueError(
                f"labels: shape {tuple(labels.shape)} differs from the tokens' {tuple(x.shape[:2])}. Pass unshifted labels."
            )
        return_state = (labels is None or state is not None) if return_state is None else return_state
        if return_state and not torch.compiler.is_compiling():
            self._hooks.look_again()
        run = self.passed(x, seq, state, return_state=return_state, hidden_states=output_hidden_states)
        loss = None if labels is None else self._loss(run.hidden, labels, seq, run.aux_loss, num_items)
        hidden = run.hidden if seq is None else seq.restore(run.hidden)
        found = loss, run.aux_loss, run.state, run.router, hidden, run.hidden_states
        out = CausalLMOutput(*found, self.lm_head, logits_to_keep)
        if labels is None:
            out.logits  # noqa: B018  # formed inside the call, where hooks and wrappers expect the head's
        return out

    def _loss(self, hidden: Tensor, labels: Tensor, seq: Any, aux_loss: Tensor | None, num_items: Any) -> Tensor:
        labels = integers("labels", labels).long()
        labels, after = labels[:, : hidden.shape[1]], labels[:, hidden.shape[1] :]
        targets = shift_labels(labels if seq is None else seq.align(labels), seq, after if after.shape[1] else None)
        loss = next_token_loss(hidden, self.lm_head, targets, num_items)
        # a part of a larger batch adds its part, so that accumulating gradients does not multiply the auxiliary loss
        return loss if aux_loss is None else loss + aux_loss * share_of_items(targets, num_items)

    def step(self, input_ids: Tensor, state: ModelState) -> Tensor:
        """Decode one token per row: ``(b,)`` int64 to logits ``(b, v)``; ``state`` is updated in place.

        Where there are hooks, this is a call of the model with one token per row.

        Raises:
            ValueError: Another shape, or another number of rows than the state has.
            RuntimeError: There are hooks, and a CUDA graph is captured, which would not run them again.
        """
        if input_ids.shape != state.tokens.shape:
            raise ValueError(
                f"input_ids: expected shape (b,), one token for each of the state's {state.tokens.shape[0]} rows, got "
                f"{tuple(input_ids.shape)}."
            )
        return self._step(integers("input_ids", input_ids), state)

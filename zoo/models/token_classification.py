"""A class for every token: tokens in, logits of the classes and their loss out. Mixers may read both ways.

State-dict keys are those of the trunk, and ``head.{weight,bias}``.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from omegaconf import MISSING
from torch import Tensor, nn

from ...kernels import cross_entropy
from ...layers.base import Seq, shapes, tree
from ...layers.common import weight_dtype
from ..config.schema import ConfigSchema, check_labels
from ..errors import ConfigError
from .loss import IGNORE, items_of, share_of_items
from .rows import describe_rows, integers
from .text import TextModel

__all__ = ["TokenClassificationOutput", "TokenClassificationSchema", "TokenClassifier"]


@dataclasses.dataclass
class TokenClassificationSchema(ConfigSchema):
    """The keys of a token classifier's config: a language model's, and what a token may be.

    Attributes:
        n_classes: Classes that a token may have.
        labels: Their names, in the order of the logits, where they are known.
    """

    needs: ClassVar[dict[str, str]] = {}
    task: str = "token_classification"
    tie_embeddings: bool = False
    n_classes: int = MISSING
    labels: list[str] | None = None

    @classmethod
    def check(cls, values: dict[str, Any]) -> None:
        """Refuse a number of classes that is none, names that are not one for each, and a head that is the embedding."""
        if not values["n_classes"]:
            raise ConfigError("n_classes: is 0, and every token has a class. Use 1 or more.")
        check_labels(values)
        if values["tie_embeddings"]:
            raise ConfigError("tie_embeddings: is true, and a head of classes is no table of tokens. Write false.")


@dataclasses.dataclass(repr=False)
class TokenClassificationOutput:
    """The output of a forward; a pytree of its tensors, so that what wraps a model finds them.

    Attributes:
        loss: With ``labels``: mean cross-entropy in nats per labelled token, plus ``aux_loss``.
        logits: ``(b, l, n_classes)``; those of padding mean nothing.
        aux_loss: The weighted sum of the mixers' auxiliary losses; ``None`` where no mixer has one.
        router: Statistics of every MoE block, a list of dicts.
        hidden: ``(b, l, d)`` after the final norm.
        hidden_states: Where asked for: ``(b, l, d)`` of the embedding and after every block, the last one after the final norm.
    """

    loss: Tensor | None
    logits: Tensor
    aux_loss: Tensor | None
    router: list[dict[str, Any]]
    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None

    __repr__ = shapes


tree(TokenClassificationOutput)


class TokenClassifier(TextModel):
    """A classifier of tokens; arguments and attributes are those of :class:`~hybridzoo.zoo.models.text.TextModel`."""

    schema, hf_class = TokenClassificationSchema, "HybridZooForTokenClassification"
    head: nn.Linear

    def make_head(self, device: Any, dtype: torch.dtype | None) -> nn.Module:
        """A linear layer with a bias, one row for each class."""
        return nn.Linear(self.cfg.d_model, self.cfg.n_classes, device=device, dtype=dtype)

    def reset_ends(self) -> None:
        """Draw the table and the head; the head's bias is zero."""
        for weight in (self.backbone.embedding.weight, self.head.weight):
            nn.init.normal_(weight, std=self.cfg.initializer_range)  # type: ignore[arg-type]
        nn.init.zeros_(self.head.bias)

    def head_flops(self, seq_len: int) -> int:
        """As of :class:`Model`, from the config: a quantised head has no parameters to count."""
        return 2 * self.cfg.d_model * self.cfg.n_classes

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Any = None,
        *,
        seq_idx: Any = None,
        seq: Seq | None = None,
        inputs_embeds: Tensor | None = None,
        num_items: Tensor | int | None = None,
        output_hidden_states: bool = False,
    ) -> TokenClassificationOutput:
        """Classify tokens, and train on them.

        Args:
            input_ids: ``(b, l)`` int64, ``l >= 1``.
            labels: ``(b, l)`` int64 from 0 to ``n_classes - 1``, the class of each token; -100 where no loss is wanted. Padding is never
                a target.
            attention_mask: As of :meth:`hybridzoo.zoo.models.causal_lm.CausalLM.forward`; no token sees padding.
            cu_seqlens: Likewise; no token sees another document.
            seq_idx: Likewise.
            seq: Likewise.
            inputs_embeds: ``(b, l, d)`` in place of ``input_ids``, as the first block shall see them (``backbone.embed``).
            num_items: What the summed cross-entropy is divided by, instead of the number of targets in this call: the targets of the
                larger batch that this call is a part of. The auxiliary loss counts by the same share.
            output_hidden_states: Whether ``out.hidden_states`` is filled.

        Raises:
            ValueError: Shapes that disagree, or two kinds of row description.
            IndexError: A label that is no class, on a CPU; on a GPU, where nothing waits for the answer, the loss is NaN.
        """
        x = self.embedded(input_ids, inputs_embeds)
        seq = describe_rows(x, attention_mask, cu_seqlens, seq_idx, seq, None)
        if labels is not None and labels.shape != x.shape[:2]:
            raise ValueError(
                f"labels: shape {tuple(labels.shape)} differs from the tokens' {tuple(x.shape[:2])}. Pass one class for each token."
            )
        run = self.passed(x, seq, hidden_states=output_hidden_states)
        hidden, dtype = run.hidden, weight_dtype(self.head)
        logits = self.head(hidden if dtype is None else hidden.to(dtype))
        loss = None if labels is None else self._loss(logits, labels, seq, run.aux_loss, num_items)
        if seq is not None:
            hidden, logits = seq.restore(hidden), seq.restore(logits)
        return TokenClassificationOutput(loss, logits, run.aux_loss, run.router, hidden, run.hidden_states)

    def _loss(self, logits: Tensor, labels: Tensor, seq: Seq | None, aux_loss: Tensor | None, num_items: Any) -> Tensor:
        targets = integers("labels", labels).long()
        if seq is not None:
            targets = seq.align(targets).masked_fill(~seq.valid, IGNORE)
        losses, _ = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss = losses.sum() / items_of(targets, num_items)
        # a part of a larger batch adds its part, so that accumulating gradients does not multiply the auxiliary loss
        return loss if aux_loss is None else loss + aux_loss * share_of_items(targets, num_items)

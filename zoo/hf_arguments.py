"""Arguments of transformers' models beside the tokens: honoured, known to change nothing, or refused by name."""

import difflib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.seq import Seq
from .models.rows import number_documents
from .models.state import StateCache

__all__ = ["Rows", "refuse_others"]

# what the model cannot give or do, and what is to be done instead
_REFUSED = {
    "output_attentions": "the layers do not hand out attention scores. Leave it out, or read what is there with forward hooks",
    "output_router_logits": "statistics of the routers are in `core(...).router`, and the auxiliary loss is part of the loss. Leave it out",
    "head_mask": "no head can be switched off. Leave it out, or zero its rows of out_proj",
    "encoder_hidden_states": "there is no cross-attention. Leave it out",
    "encoder_attention_mask": "there is no cross-attention. Leave it out",
    "inputs_embeds_mask": "there is no such mask. Use attention_mask",
}
# what says again what is known: read by Rows, or the length of the longest document
_READ = (
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "token_type_ids", "cache_position", "is_causal",
)  # fmt: skip


def refuse_others(model: nn.Module, kwargs: dict[str, Any], **defaults: Any) -> None:
    """Raise a ``ValueError`` for keyword arguments of a forward that are not in its signature and ask for something.

    Args:
        model: Whose ``forward`` it is, for the names that it knows.
        kwargs: What was given.
        defaults: What the config says where nothing was.
    """
    for name, value in {**defaults, **kwargs}.items():
        if value is None or name in _READ:
            continue
        if name in _REFUSED:
            if isinstance(value, Tensor) or value:
                raise ValueError(f"{name}: {_REFUSED[name]}.")
            continue
        known = [*inspect.signature(model.forward).parameters, *_READ]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: is not an argument of {type(model).__name__}.{hint} Known: {', '.join(known)}.")


class Rows:
    """Padding or packing of the rows of a call, in whichever words it was said.

    Attributes:
        attention_mask: ``(b, l)``, of padded rows of one document each.
        documents: ``(b, l)`` int64 on the CPU, of packed rows: as ``seq_idx`` of :meth:`CausalLM.forward`.

    Raises:
        ValueError: Descriptions that contradict each other, or ask for what the layers cannot do; the argument is named.
    """

    def __init__(
        self,
        tokens: Tensor | None,
        attention_mask: Tensor | None,
        cache: StateCache | None,
        cu_seqlens: Any,
        seq_idx: Any,
        position_ids: Tensor | None,
        kwargs: dict[str, Any],
    ):
        self.attention_mask: Tensor | None = attention_mask
        self.documents: Tensor | None = None
        if tokens is None:
            return
        self.shape, self.device = (tokens.shape[0], tokens.shape[1]), tokens.device
        self._check_rest(cache, kwargs)
        said: dict[str, Tensor] = {}
        for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"):
            offsets = cu_seqlens if name == "cu_seqlens" else kwargs.get(name)
            if offsets is not None:
                said[name] = number_documents(Seq.from_cu_seqlens(offsets, *self.shape, self.device).doc, self.shape)
        if seq_idx is not None:
            said["seq_idx"] = number_documents(seq_idx, self.shape).to(self.device)
        if position_ids is not None and (packed := self._positions(position_ids.to(self.device), cache)) is not None:
            said["position_ids"] = packed
        if said:
            self._agree(said)

    def _agree(self, said: dict[str, Tensor]) -> None:
        (first, documents), *others = said.items()
        for name, other in others:
            if not torch.equal(documents, other):
                raise ValueError(f"{name}: and {first} describe different documents. Pass one of them, or both alike.")
        if not bool(documents.any()):
            return  # one document in every row
        self.documents = documents
        if self.attention_mask is not None:
            self.documents = documents.masked_fill(self.attention_mask.to(self.device) == 0, -1)
            self.attention_mask = None
        if not torch.compiler.is_compiling():
            # the host has waited for them already; attention takes documents apart that it knows
            self.documents = self.documents.cpu()

    def _positions(self, given: Tensor, cache: StateCache | None) -> Tensor | None:
        """The documents that positions tell apart; ``None`` where they are those that the layers count."""
        given = given[None] if given.dim() == 1 else given
        b, l = self.shape
        if given.shape not in ((1, l), (b, l)):
            raise ValueError(
                f"position_ids: expected shape {(b, l)}, got {tuple(given.shape)}. Leave them out: the layers count."
            )
        given = given.expand(b, l).long()
        real = (
            torch.ones_like(given) if self.attention_mask is None else (self.attention_mask.to(self.device) != 0).long()
        )
        # as the layers read them: real tokens first
        order = torch.argsort(real, dim=1, descending=True, stable=True)
        position, real = given.gather(1, order), real.gather(1, order) != 0
        # they are relative: what counts is that they rise by one, from 0 again at another document, and go on where a state ends
        rises = position.diff(dim=1) == 1
        starts = F.pad(~rises & (position[:, 1:] == 0) & real[:, 1:], (1, 0))
        wrong = F.pad(~rises, (1, 0)) & real & ~starts
        if cache is not None and cache.state is not None:
            wrong |= starts
            wrong[:, 0] |= real[:, 0] & (position[:, 0] != cache.state.tokens) & (position[:, 0] != cache.length)
        if bool(wrong.any()):
            row, at = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"position_ids: {int(position[row, at])} at row {row}, token {at} is not the position that follows. The layers count "
                "positions themselves; leave them out, or let them start again at 0 with every packed document."
            )
        if not bool(starts.any()):
            return None
        if b != 1:
            raise ValueError(
                f"position_ids: start again inside a row of a batch of {b}. Lay packed documents in one row, (1, l), or pass seq_idx."
            )
        documents = starts.long().cumsum(1)
        return torch.empty_like(documents).scatter(1, order, documents)

    def _check_rest(self, cache: StateCache | None, kwargs: dict[str, Any]) -> None:
        types = kwargs.get("token_type_ids")
        if types is not None and bool(types.any()):
            raise ValueError("token_type_ids: there are no embeddings of types. Leave them out (all 0 is accepted).")
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal: the layers read from left to right, and cannot do otherwise. Leave it out.")
        columns = kwargs.get("cache_position")
        if columns is not None:
            begin = 0 if cache is None else cache.length
            want = torch.arange(begin, begin + self.shape[1])
            if not torch.equal(columns.flatten().cpu().long(), want):
                raise ValueError(
                    f"cache_position: {columns.flatten().tolist()[:3]} ..., but the cache has read {begin} columns, and this call brings "
                    f"{self.shape[1]}. Leave it out."
                )

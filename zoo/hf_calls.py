"""Calls of transformers' models on our states: arguments beside the tokens are honoured, known to change nothing, or refused by name."""

import difflib
import inspect
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.seq import Seq
from .models.decoder import not_finite, refuse
from .models.rows import number_documents
from .models.state_cache import StateCache

__all__ = ["CACHE_NAMES", "FIRST_CACHE", "Finite", "Generation", "Rows", "one_cache", "refuse_others"]

# callers may say either, with whatever version of transformers
CACHE_NAMES = ("cache", "past_key_values")
# of one before the first token, which says that columns are to be recorded
FIRST_CACHE = "first_cache"
_Next: Any = object  # the classes of transformers, which are the next in line of Generation
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
    """Raise a ``ValueError`` for arguments of a model's forward, or ``defaults`` of its config, that it cannot honour."""
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

    Padded rows of one document each have an ``attention_mask``, ``(b, l)``; packed ones have ``documents``, ``(b, l)`` int64 on the CPU, as
    ``seq_idx`` of :meth:`CausalLM.forward`. Descriptions that contradict each other are a ``ValueError``.
    """

    def __init__(self, tokens: Tensor | None, attention_mask: Tensor | None, cache: StateCache | None, **kwargs: Any):
        self.attention_mask: Tensor | None = attention_mask
        self.documents: Tensor | None = None
        if tokens is None:
            return
        self.shape, self.device = (tokens.shape[0], tokens.shape[1]), tokens.device
        self._check_rest(cache, kwargs)
        said: dict[str, Tensor] = {}
        for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"):
            if (offsets := kwargs.get(name)) is not None:
                said[name] = number_documents(Seq.from_cu_seqlens(offsets, *self.shape, self.device).doc, self.shape)
        if (numbers := kwargs.get("seq_idx")) is not None:
            said["seq_idx"] = number_documents(numbers, self.shape).to(self.device)
        positions = kwargs.get("position_ids")
        if positions is not None and (packed := self._positions(positions.to(self.device), cache)) is not None:
            said["position_ids"] = packed
        if not said:
            return
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
        real = torch.ones_like(given)
        if self.attention_mask is not None:
            real = (self.attention_mask.to(self.device) != 0).long()
        # as the layers read them: real tokens first
        order = torch.argsort(real, dim=1, descending=True, stable=True)
        position, real = given.gather(1, order), real.gather(1, order) != 0
        # they are relative: what counts is that they rise by one, from 0 again at another document, and go on where a state ends
        rises = position.diff(dim=1) == 1
        starts = F.pad(~rises & (position[:, 1:] == 0) & real[:, 1:], (1, 0))
        wrong = F.pad(~rises, (1, 0)) & real & ~starts
        if cache is not None and cache.state is not None:
            wrong |= starts
            wrong[:, 0] |= real[:, 0] & (position[:, 0] != cache.tokens) & (position[:, 0] != cache.length)
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
        if (types := kwargs.get("token_type_ids")) is not None and bool(types.any()):
            raise ValueError("token_type_ids: there are no embeddings of types. Leave them out (all 0 is accepted).")
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal: the layers read from left to right, and cannot do otherwise. Leave it out.")
        if (columns := kwargs.get("cache_position")) is not None:
            columns, begin = columns.flatten().tolist(), 0 if cache is None else cache.length
            if columns != list(range(begin, begin + self.shape[1])):
                raise ValueError(
                    f"cache_position: {columns[:3]} ..., but the cache has read {begin} columns, and this call brings {self.shape[1]}. "
                    "Leave it out."
                )


class Generation(_Next):
    """The part of an adapter that stands before transformers' ``GenerationMixin``."""

    cache_name: ClassVar[
        str
    ]  # of CACHE_NAMES, the one that the installed transformers uses in its outputs and from step to step

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers; the state that an earlier call left comes as ``cache`` or as ``past_key_values``, with every version."""
        cache = one_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
        prompts = next((x for x in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if x is not None), None)
        if isinstance(prompts, Tensor) and not prompts.numel() and kwargs.get("inputs_embeds") is None:
            raise ValueError(
                f"input_ids: shape {tuple(prompts.shape)} holds no token. Give every prompt at least one (BOS, say)."
            )
        if cache is not None and isinstance(prompts, Tensor):
            self._check_whole(cache, prompts, kwargs)
        return super().generate(*args, **kwargs, **({} if cache is None else {self.cache_name: cache}))

    def _check_whole(self, cache: StateCache, prompts: Tensor, kwargs: dict[str, Any]) -> None:
        """Refuse assisted decoding that is to go on from a cache with new columns alone: transformers takes them for the whole text."""
        config, mask = (
            kwargs.get("generation_config") or getattr(self, "generation_config", None),
            kwargs.get("attention_mask"),
        )
        lookup = kwargs.get("prompt_lookup_num_tokens", getattr(config, "prompt_lookup_num_tokens", None))
        assisted = lookup is not None or kwargs.get("assistant_model") is not None
        columns = prompts.shape[1]
        if assisted and cache.length and (columns <= cache.length or (mask is not None and mask.shape[1] > columns)):
            raise ValueError(
                f"input_ids: {columns} columns, and the cache has read {cache.length}. Assisted decoding goes on from one with the text "
                "from its beginning: pass that, with as long an attention_mask."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers, but a state before the first token is left out, from which PEFT sees that its prompt is still to be read."""
        given = kwargs.get(self.cache_name)
        if next_sequence_length is None and given is not None and given.recording and given.length:
            # assisted decoding passes the whole text on at first, whatever the cache has read
            next_sequence_length = input_ids.shape[1] - given.length
        if next_sequence_length is not None and next_sequence_length < 1:
            seen = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            raise ValueError(
                f"input_ids: {seen} columns, but the cache has read {seen - next_sequence_length}, and nothing is new. Pass the text from "
                "its beginning, or the new columns alone with an attention_mask of all."
            )
        for name in ("tokenizer", "assistant_tokenizer"):
            # for stopping criteria, and handed down to here with what the model is for
            kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        cache = inputs.pop(self.cache_name, None)
        if cache is None or not cache.length:
            return inputs | ({} if cache is None or not cache.recording else {FIRST_CACHE: cache})
        # under both names: a version of PEFT knows one of them, and not always that of the transformers beside it
        return inputs | dict.fromkeys(CACHE_NAMES, cache)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every way of continuous batching starts here."""
        raise ValueError(
            f"{type(self).__name__}: continuous batching keeps keys and values in pages, and a recurrent state has none. Use generate "
            "without cache_implementation, with the prompts padded on the left."
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode=None, *args, **kwargs) -> None:
        # what every way of generating asks for before it starts, and so the place to say what cannot be had
        for name in ("assistant_early_exit", "use_mtp"):
            if getattr(generation_config, name, None):
                raise ValueError(
                    f"{name}: the model guesses nothing by a part of itself. Use prompt_lookup_num_tokens, or assistant_model: a smaller "
                    "model of the zoo or of transformers."
                )
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "dynamic_full"):
            raise ValueError(
                f"cache_implementation: {kind!r} is a cache for keys and values alone; the model keeps states of its own, which are "
                "small. Leave it unset."
            )
        given = model_kwargs.get(self.cache_name)
        if given is not None and generation_config.use_cache is False:
            raise ValueError(
                "use_cache: False reads everything again at every step, which cannot follow on a cache. Leave one of them out."
            )
        if given is not None and generation_config.prefill_chunk_size and self.cache_name == "past_key_values":
            raise ValueError(
                "prefill_chunk_size: versions of transformers before 5.24 may read again, in chunks, what the cache has read. Leave one of "
                "them out, or upgrade."
            )
        if generation_config.use_cache is not False:
            cache = StateCache() if given is None else replace(given)
            if generation_config.is_assistant or "assisted" in str(getattr(mode, "value", mode)):
                cache.activate_past_recording()
            model_kwargs[self.cache_name] = cache

    def _prepare_position_ids_for_generation(self, *args, **kwargs) -> None:
        # the layers count; positions that nobody has passed need not be checked at every token
        return None


class Finite:
    """Stops at scores that are no numbers: greedy decoding would go on with token 0, and sampling fails without saying why."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores of the next token as they are."""
        refuse(not_finite(scores))
        return scores


def one_cache(cache: Any, past_key_values: Any) -> StateCache | None:
    """Return the cache that a call was given under one of its two names; two, or one that is none of ours, are a ``ValueError``."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache: and past_key_values are two names of one argument. Pass one of them.")
    name, given = ("past_key_values", past_key_values) if cache is None else ("cache", cache)
    if given is not None and not isinstance(given, StateCache):
        raise ValueError(
            f"{name}: expected the StateCache of an earlier call, got {type(given).__name__}, which has no place for recurrent states. "
            "Leave it out, and take the one that comes back (use_cache=True)."
        )
    return given

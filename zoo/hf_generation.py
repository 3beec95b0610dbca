"""``generate`` of transformers on our states: what it is handed, and what no recurrent state can do, refused by name."""

from typing import Any, ClassVar

from torch import Tensor

from .models.generate import check_finite_logits
from .models.state import StateCache

__all__ = ["CACHE_NAMES", "Finite", "Generation", "one_cache"]

# callers may say either, with whatever version of transformers
CACHE_NAMES = ("cache", "past_key_values")


# the classes of transformers, which are the next in line
_Next: Any = object


class Generation(_Next):
    """The part of an adapter that stands before transformers' ``GenerationMixin``.

    Attributes:
        cache_name: The one of :data:`CACHE_NAMES` that the installed transformers uses in its outputs and from step to step.
    """

    cache_name: ClassVar[str]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers; the state that an earlier call left comes as ``cache`` or as ``past_key_values``, with every version."""
        cache = one_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
        prompts = next((x for x in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if x is not None), None)
        if isinstance(prompts, Tensor) and not prompts.numel() and kwargs.get("inputs_embeds") is None:
            raise ValueError(
                f"input_ids: shape {tuple(prompts.shape)} holds no token. Give every prompt at least one (BOS, say)."
            )
        return super().generate(*args, **kwargs, **({} if cache is None else {self.cache_name: cache}))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers, but a state before the first token is left out, from which PEFT sees that its prompt is still to be read."""
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
        # under both names: a version of PEFT knows one of them, and not always that of the transformers beside it
        return inputs | (dict.fromkeys(CACHE_NAMES, cache) if cache is not None and cache.state is not None else {})

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every way of continuous batching starts here."""
        raise ValueError(
            f"{type(self).__name__}: continuous batching keeps keys and values in pages, and a recurrent state has none. Use generate "
            "without cache_implementation, with the prompts padded on the left."
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        # what every way of generating asks for before it starts, and so the place to say what cannot be had
        if generation_config.is_assistant:
            raise ValueError(
                f"{type(self).__name__}: cannot be the assistant of another model: rejected tokens would have to be taken out of its "
                "states, and a recurrent state cannot be rolled back. Use an attention-only model of transformers as the assistant."
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
            model_kwargs[self.cache_name] = StateCache() if given is None else given

    def _prepare_position_ids_for_generation(self, *args, **kwargs) -> None:
        # the layers count; positions that nobody has passed need not be checked at every token
        return None


class Finite:
    """Stops at scores that are no numbers: greedy decoding would go on with token 0, and sampling fails without saying why."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores of the next token as they are."""
        check_finite_logits(scores)
        return scores


def one_cache(cache: Any, past_key_values: Any) -> StateCache | None:
    """Return the cache that a call was given under one of its two names.

    Raises:
        ValueError: Two different ones, or none of ours.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache: and past_key_values are two names of one argument. Pass one of them.")
    name, given = ("past_key_values", past_key_values) if cache is None else ("cache", cache)
    if given is not None and not isinstance(given, StateCache):
        raise ValueError(
            f"{name}: expected the StateCache of an earlier call, got {type(given).__name__}, which has no place for recurrent states. "
            "Leave it out, and take the one that comes back (use_cache=True)."
        )
    return given

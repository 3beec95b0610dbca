"""The adapters to transformers: Trainer, ``generate``, pipelines, lm-eval's HFLM and the Auto classes see a zoo model through them.

The files ``hf*.py`` alone import transformers for modelling; this one has language models, and enters all into transformers' tables.
"""

import importlib.util
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from .hf_base import Adapter, HybridZooConfig
from .hf_calls import CACHE_NAMES, FIRST_CACHE, Finite, Generation, Rows, one_cache, refuse_others
from .hf_images import HybridZooForImageClassification
from .hf_tokens import HybridZooForTokenClassification
from .hf_vectors import HybridZooForSequenceRegression
from .models.state_cache import StateCache
from .models.text import padded_vocab
from .tokenizer import byte_tokenizer

__all__ = [
    "HybridZooConfig",
    "HybridZooForCausalLM",
    "HybridZooForImageClassification",
    "HybridZooForSequenceRegression",
    "HybridZooForTokenClassification",
    "StateCache",
    "byte_tokenizer",
]


class HybridZooForCausalLM(Generation, Adapter, GenerationMixin):
    """A zoo language model as transformers knows it; ``core`` is the model itself."""

    cache_name = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
    _fsdp_plan = {  # noqa: RUF012
        "backbone.embedding": "free_full_weight",
        "backbone.layers.*": "free_full_weight",
        "backbone.norm_f": "keep_full_weight",
        "lm_head": "keep_full_weight",
    }
    _supports_sdpa = True
    _skip_keys_device_placement = [*CACHE_NAMES]  # noqa: RUF012

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Any = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        past_key_values: StateCache | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Any = None,
        seq: Any = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """As :meth:`CausalLM.forward`, in transformers' words.

        ``past_key_values`` is another name of ``cache``, and ``attention_mask`` may cover what that has seen. Packed rows may also come
        as transformers' collators describe them, by ``cu_seq_lens_q``, ``seq_idx``, or ``position_ids`` that start again at every
        document; otherwise these must be the positions that the layers count themselves. Defaults are the config's.

        Raises:
            ValueError: As :meth:`CausalLM.forward`; for what the model cannot give (attentions, another cache); and for an unknown
                argument.
        """
        first = kwargs.pop(FIRST_CACHE, None)
        cache = one_cache(first if cache is None else cache, past_key_values)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if attention_mask is not None and tokens is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"attention_mask: expected shape (b, l), got {tuple(attention_mask.shape)}. What a token sees is the layers' to say; "
                    "pass one 0/1 row per sequence."
                )
            attention_mask = attention_mask[:, -tokens.shape[1] :]
        refuse_others(self, kwargs, output_attentions=self.config.output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        others = labels, inputs_embeds, cu_seqlens, position_ids, seq_idx, seq, kwargs.get("cache_position")
        if cache is not None and input_ids is not None and not output_hidden_states and all(x is None for x in others):
            cache, input_ids, attention_mask, logits_to_keep = cache.prepared(
                self.core, input_ids, attention_mask, logits_to_keep
            )
            tokens = input_ids
        elif cache is not None:
            cache = cache.settled(self.core)
        packed = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx, "position_ids": position_ids}
        rows = Rows(tokens, attention_mask, cache, **packed, **kwargs)
        use_cache = self._uses_cache(use_cache, labels, cache)
        out = self.core(
            input_ids, labels, rows.attention_mask, None, None if cache is None else cache.state,
            return_state=use_cache, inputs_embeds=inputs_embeds, num_items=num_items_in_batch, seq_idx=rows.documents,
            seq=seq, logits_to_keep=logits_to_keep, output_hidden_states=bool(output_hidden_states),
        )  # fmt: skip
        left = None
        if use_cache and out.state is not None and tokens is not None:
            left = (cache or StateCache()).after(out.state, tokens.shape[1], input_ids, rows.attention_mask)
        # the Trainer in training wants the loss alone; forming all logits would undo the sliced cross-entropy
        logits = None if self.training and labels is not None else out.logits
        output = CausalLMOutputWithPast(
            loss=out.loss, logits=logits, hidden_states=out.hidden_states, **{self.cache_name: left}
        )
        return self._answer(out, output, return_dict)

    def _uses_cache(self, wish: bool | None, labels: Tensor | None, cache: StateCache | None) -> bool:
        replica = getattr(self, "_is_replica", False)
        if wish and replica:
            raise ValueError("use_cache: nn.DataParallel cannot gather states. Leave it out, or call the model itself.")
        if wish is None:
            if self.training and labels is not None:
                return False
            # as transformers' models, by the config; who scores labels, or trains, has no use for it
            return self.config.use_cache and not self.training and not replica and (labels is None or cache is not None)
        return wish

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        padding = list(range(self.core.cfg.vocab_size, padded_vocab(self.core.cfg)))
        if padding:
            # rows that only pad the table are never produced; first, so that top-k and top-p choose among the others
            processors.insert(0, SuppressTokensLogitsProcessor(padding, device=str(self.device)))
        processors.insert(0, Finite())
        return processors

    def _init_weights(self, module: nn.Module) -> None:
        # asked for rows of a new vocabulary
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=self.core.cfg.initializer_range)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As transformers: more or fewer rows of embedding and head, known to the config, so that the model can be saved.

        The vocabulary has ``new_num_tokens`` tokens then, whether or not the table had rows for them; rows beyond are never produced.
        """
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows = embedding.weight.shape[0]
        tokens = min(self.core.cfg.vocab_size, rows) if new_num_tokens is None else new_num_tokens
        multiples = (pad_to_multiple_of, self.core.cfg.pad_vocab_size_multiple, 1, rows)
        multiple = next(m for m in multiples if m and -(-tokens // m) * m == rows)
        sizes = {"vocab_size": tokens, "pad_vocab_size_multiple": multiple}
        self.core.cfg.update(sizes)
        self.config.zoo = {**(self.config.zoo or {}), **sizes}
        self.config.vocab_size = rows
        return embedding


AutoConfig.register("hybridzoo", HybridZooConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridZooConfig, HybridZooForCausalLM, exist_ok=True)
AutoModelForImageClassification.register(HybridZooConfig, HybridZooForImageClassification, exist_ok=True)
AutoModelForTokenClassification.register(HybridZooConfig, HybridZooForTokenClassification, exist_ok=True)
# the Trainer's label smoothing shifts the labels of the models that stand here by name, and of no others
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("hybridzoo", HybridZooForCausalLM.__name__)
if importlib.util.find_spec("PIL"):
    from .hf_pixels import HybridZooImageProcessor

    __all__ += ["HybridZooImageProcessor"]
    processors = {"pil": HybridZooImageProcessor}
    AutoImageProcessor.register(HybridZooConfig, image_processor_classes=processors, exist_ok=True)
# pipelines complain of models that do not stand here
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.setdefault("hybridzoo", HybridZooForImageClassification.__name__)
MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.setdefault("hybridzoo", HybridZooForTokenClassification.__name__)

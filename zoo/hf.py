"""One thin adapter to transformers: Trainer, ``generate``, lm-eval's HFLM and ``AutoModelForCausalLM`` see a zoo model through it.

The only file that imports transformers for modelling. The adapter owns no weights: its submodules *are* those of the
:class:`~hybridzoo.zoo.models.causal_lm.CausalLM` in ``core``, so the state-dict keys are the same.
"""

import copy
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..layers.base import Mixer
from .checkpoint.native import as_it_is, hf_config, known_about_text, superseded, write_config
from .checkpoint.publish import GENERATION, publishing, steady
from .config.resolve import validate
from .hf_calls import CACHE_NAMES, Finite, Generation, Rows, one_cache, refuse_others
from .layout import expand
from .models.causal_lm import padded_vocab
from .models.model import Model
from .models.redraw import redraw
from .models.state import StateCache
from .models.tasks import task_of
from .tokenizer import byte_tokenizer

__all__ = ["HybridZooConfig", "HybridZooForCausalLM", "StateCache", "byte_tokenizer"]

_FOLLOWS = (
    "{name}: {value!r}, but the config's zoo part makes it {own!r}. Change it there: zoo.config(..., overrides), or zoo.load and "
    "resize_token_embeddings for another vocabulary."
)


class HybridZooConfig(PreTrainedConfig):
    """transformers' view of a zoo config.

    Args:
        zoo: The resolved config as plain data (``zoo.config(...)``); the other fields of transformers follow from it.
    """

    model_type = "hybridzoo"
    keys_to_ignore_at_inference = [*CACHE_NAMES, "router"]  # noqa: RUF012

    zoo: dict | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.zoo is not None:
            cfg = validate(self.zoo, saved=True)
            self.zoo = dict(OmegaConf.to_container(cfg))  # type: ignore[arg-type]
            self.vocab_size = padded_vocab(cfg)  # the width of the logits
            self.hidden_size = cfg.d_model
            if cfg.max_length is not None:
                self.max_position_embeddings = cfg.max_length
            self.tie_word_embeddings = bool(cfg.tie_embeddings)
            if cfg.tokenizer == "byte":
                # another tokenizer brings its own; a wrong id here would end texts at the wrong token
                for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                    setattr(self, name, 0 if getattr(self, name) is None else getattr(self, name))
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers, with the ``config.yaml`` that says the same."""
        if self.zoo is not None:
            write_config(validate(self.zoo), Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Residual blocks."""
        return 0 if self.zoo is None else len(expand(self.zoo["layers"]))

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        if value != self.num_hidden_layers:
            raise ValueError(_FOLLOWS.format(name="num_hidden_layers", value=value, own=self.num_hidden_layers))

    def check(self) -> None:
        """Raise a ``ValueError`` where a field says something else than the ``zoo`` part that it follows from."""
        if self.zoo is None:
            raise ValueError(
                "HybridZooConfig.zoo: is missing. Build the config with HybridZooConfig(zoo=...) from a zoo config."
            )
        as_it_should = HybridZooConfig(zoo=self.zoo)
        longest = getattr(self, "max_position_embeddings", None)
        if longest != self.zoo["max_length"]:
            # decides nothing but how far the model is evaluated
            self.zoo = {**self.zoo, "max_length": longest}
        for name in ("vocab_size", "hidden_size", "tie_word_embeddings"):
            value, own = getattr(self, name), getattr(as_it_should, name)
            if value != own:
                raise ValueError(_FOLLOWS.format(name=name, value=value, own=own))


class HybridZooForCausalLM(Generation, PreTrainedModel, GenerationMixin):
    """A zoo language model as transformers knows it; ``core`` is the model itself."""

    config: HybridZooConfig
    config_class = HybridZooConfig
    base_model_prefix = "backbone"
    cache_name = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # the auxiliary loss and the routers' statistics of the last call, for which transformers' outputs have no place
    reported: tuple[Tensor | None, list[dict[str, Any]]] = (None, [])
    _is_stateful = True  # recurrent states cannot be rolled back: assisted decoding is refused
    _no_split_modules = ["Block"]  # noqa: RUF012
    _fsdp_plan = {  # noqa: RUF012
        "backbone.embedding": "free_full_weight",
        "backbone.layers.*": "free_full_weight",
        "backbone.norm_f": "keep_full_weight",
        "lm_head": "keep_full_weight",
    }
    _supports_sdpa = True
    _skip_keys_device_placement = [*CACHE_NAMES]  # noqa: RUF012

    def __init__(self, config: HybridZooConfig, core: Model | None = None):
        super().__init__(config)
        config.check()
        made: Any = task_of(config.zoo or {})(config.zoo) if core is None else core
        # not registered as a submodule: its parts are, under the keys they have in the core itself
        object.__setattr__(self, "core", made)
        self.backbone, self.lm_head = made.backbone, made.lm_head
        # one table of parts for both: what PEFT or a new vocabulary puts in the place of one is what the core computes with
        made._modules = self._modules
        self._tied_weights_keys = _tied_names(made)
        mixers = (mixer for mixer in made.modules() if isinstance(mixer, Mixer))
        self._keep_in_fp32_modules_strict = {name for mixer in mixers for name in mixer.fp32_parameters}
        for p in made.parameters():
            # by its layer; one without memory is still to be loaded
            p._is_hf_initialized = not p.is_meta
        self.post_init()

    @classmethod
    def wrap(cls, model: Model) -> "HybridZooForCausalLM":
        """The adapter around an existing model; both share every weight.

        Raises:
            ValueError: It has another task.
        """
        if model.hf_class != cls.__name__:
            raise ValueError(
                f"{cls.__name__}: cannot be around a model whose task is {model.task!r}. Use the model itself."
            )
        content = hf_config(model)
        ids = model.metadata.get("config.json", {})
        config = HybridZooConfig(zoo=content["zoo"], auto_map=content["auto_map"], dtype=content["dtype"], **ids)
        adapter = cls(config, core=model)
        if GENERATION in model.metadata:
            adapter.generation_config = GenerationConfig.from_dict(model.metadata[GENERATION])
        return adapter

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers, from a folder that nobody saves to meanwhile."""
        name, load = pretrained_model_name_or_path, super().from_pretrained
        folder = Path(name, kwargs.get("subfolder") or "") if name is not None and os.path.isdir(name) else None
        loaded = load(name, *args, **kwargs) if folder is None else steady(folder, lambda: load(name, *args, **kwargs))
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.core.source, model.core.metadata = folder, known_about_text(model)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As transformers; but all files take their places at once, and those of the model that was there go, as with ``zoo.save``."""
        folder, core = Path(save_directory), as_it_is(self.core)
        if core.cfg.tie_embeddings != self.core.cfg.tie_embeddings:
            self.core.cfg.tie_embeddings = self.config.tie_word_embeddings = core.cfg.tie_embeddings
            self.config.zoo = {**(self.config.zoo or {}), "tie_embeddings": core.cfg.tie_embeddings}
        kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
        shared = getattr(self.config, "distributed_config", None) is not None or kwargs.get("distributed_checkpoint")
        if shared or push_to_hub or not is_main_process or folder.is_file():
            super().save_pretrained(save_directory, **kwargs)
            return
        with publishing(folder, lambda new: superseded(folder, new)) as place:
            super().save_pretrained(place, **kwargs)

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
        cache = one_cache(cache, past_key_values)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if attention_mask is not None and tokens is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"attention_mask: expected shape (b, l), got {tuple(attention_mask.shape)}. What a token sees is the layers' to say; "
                    "pass one 0/1 row per sequence."
                )
            attention_mask = attention_mask[:, -tokens.shape[1] :]
        refuse_others(self, kwargs, output_attentions=self.config.output_attentions)
        packed = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx, "position_ids": position_ids}
        rows = Rows(tokens, attention_mask, cache, **packed, **kwargs)
        use_cache = self._uses_cache(use_cache, labels, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        out = self.core(
            input_ids, labels, rows.attention_mask, None, None if cache is None else cache.state,
            return_state=use_cache, inputs_embeds=inputs_embeds, num_items=num_items_in_batch, seq_idx=rows.documents,
            seq=seq, logits_to_keep=logits_to_keep, output_hidden_states=bool(output_hidden_states),
        )  # fmt: skip
        self.reported = None if out.aux_loss is None else out.aux_loss.detach(), out.router
        left = None
        if use_cache and out.state is not None and tokens is not None:
            left = StateCache(out.state, tokens.shape[1] + (0 if cache is None else cache.length))
        # the Trainer in training wants the loss alone; forming all logits would undo the sliced cross-entropy
        logits = None if self.training and labels is not None else out.logits
        output = CausalLMOutputWithPast(
            loss=out.loss, logits=logits, hidden_states=out.hidden_states, **{self.cache_name: left}
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

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

    def _set_gradient_checkpointing(self, *args, every_n_layers: int = 1, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        # transformers counts layers of its own kind alone
        self.backbone.checkpoint_every = every_n_layers

    def _replicate_for_data_parallel(self) -> "HybridZooForCausalLM":
        # nn.DataParallel gives a replica a table of parts of its own, on its device; so must its core have it
        replica = super()._replicate_for_data_parallel()
        object.__setattr__(replica, "core", copy.copy(self.core))
        replica.core._modules = replica._modules
        return replica

    def initialize_weights(self) -> None:
        """Give the tensors that a file lacks the values of a new model; all others have theirs, from the file or from their layers."""
        if getattr(self, "_is_hf_initialized", False):
            return  # another process has the values, and sends them
        lacking = [name for name, p in self.core.named_parameters() if not getattr(p, "_is_hf_initialized", p.is_meta)]
        redraw(self.core, lacking)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Not as transformers: tied names are one parameter here, which is missing if the file has none of them."""
        untied = loading_info.missing_keys - set(self.all_tied_weights_keys)
        there = {name for name in untied if getattr(self.get_parameter_or_buffer(name), "_is_hf_initialized", False)}
        loading_info.missing_keys -= there

    def _init_weights(self, module: nn.Module) -> None:
        # asked for rows of a new vocabulary
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=self.core.cfg.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another token embedding in place."""
        self.backbone.embedding = value

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


def _tied_names(core: Model) -> dict[str, str]:
    first: dict[int, str] = {}
    sources = ((name, first.setdefault(id(p), name)) for name, p in core.named_parameters(remove_duplicate=False))
    return {name: source for name, source in sources if source != name}


AutoConfig.register("hybridzoo", HybridZooConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridZooConfig, HybridZooForCausalLM, exist_ok=True)
# the Trainer's label smoothing shifts the labels of the models that stand here by name, and of no others
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("hybridzoo", HybridZooForCausalLM.__name__)

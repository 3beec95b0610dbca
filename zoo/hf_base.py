"""The base of the adapters to transformers: the config, how a model gets in and out, and the names of its tensors.

An adapter owns no weights: its submodules *are* those of the zoo model in ``core``, so the state-dict keys are the same.
"""

import copy
import os
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..layers.base import Mixer
from .checkpoint.native import as_it_is, hf_config, known_about_text, superseded, write_config
from .checkpoint.publish import GENERATION, publishing, steady
from .config.resolve import block_specs, resolve, validate
from .hf_calls import CACHE_NAMES
from .models.model import Model
from .models.redraw import redraw
from .models.tasks import task_of
from .models.text import padded_vocab
from .tokenizer import AsciiTokenizer

__all__ = ["Adapter", "HybridZooConfig"]

# as transformers calls classes without names
_UNNAMED = "LABEL_{}"
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
            resolved = resolve(self.zoo, saved=True)
            cfg = resolved.config
            self.zoo = dict(OmegaConf.to_container(cfg))  # type: ignore[arg-type]
            self.hidden_size = resolved.specs[-1].d_model
            self.tie_word_embeddings = bool(cfg.get("tie_embeddings"))
            if "vocab_size" in cfg:
                self._follow_text(cfg)
            if "image_size" in cfg:
                self.image_size, self.num_channels = cfg.image_size, cfg.in_channels
            if "n_classes" in cfg and getattr(self, "id2label", None) is None:
                names = cfg.labels or [_UNNAMED.format(i) for i in range(cfg.n_classes)]
                self.id2label, self.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        super().__post_init__(**kwargs)

    def _follow_text(self, cfg: Any) -> None:
        self.vocab_size = padded_vocab(cfg)  # the width of the logits, of a language model
        if cfg.max_length is not None:
            self.max_position_embeddings = cfg.max_length
        if cfg.tokenizer == "byte":
            # another tokenizer brings its own; a wrong id here would end texts at the wrong token
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(self, name, 0 if getattr(self, name) is None else getattr(self, name))
        elif cfg.tokenizer == "ascii" and self.pad_token_id is None:
            self.pad_token_id = AsciiTokenizer.pad_token_id

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers, with the ``config.yaml`` that says the same."""
        if self.zoo is not None:
            write_config(validate(self.zoo), Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Residual blocks."""
        return 0 if self.zoo is None else len(block_specs(self.zoo))

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
        if (
            "max_length" in self.zoo
            and (longest := getattr(self, "max_position_embeddings", None)) != self.zoo["max_length"]
        ):
            # decides nothing but how far the model is evaluated
            self.zoo = {**self.zoo, "max_length": longest}
        for name in ("vocab_size", "hidden_size", "tie_word_embeddings", "image_size", "num_channels"):
            value, own = (getattr(config, name, None) for config in (self, as_it_should))
            if value != own:
                raise ValueError(_FOLLOWS.format(name=name, value=value, own=own))
        if self.id2label != as_it_should.id2label and "n_classes" in self.zoo:
            # another number of classes, or other names, are for fine-tuning: transformers asks for them so
            self.zoo = {**self.zoo, **_classes(self.id2label or {})}


def _classes(id2label: dict[int, str]) -> dict[str, Any]:
    n = len(id2label)
    if sorted(id2label) != list(range(n)) or len(set(id2label.values())) != n:
        raise ValueError(f"id2label: expected a name of its own for every class from 0 to {n - 1}, got {id2label}.")
    names = [str(id2label[i]) for i in range(n)]
    unnamed = all(name == _UNNAMED.format(i) for i, name in enumerate(names))
    return {"n_classes": n, "labels": None if unnamed else names}


class Adapter(PreTrainedModel):
    """A zoo model as transformers knows it; ``core`` is the model itself. The subclass of a task has the name in its ``hf_class``."""

    config: HybridZooConfig
    config_class = HybridZooConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    # the auxiliary loss and the routers' statistics of the last call, for which transformers' outputs have no place
    reported: tuple[Tensor | None, list[dict[str, Any]]] = (None, [])
    _no_split_modules = ["Block"]  # noqa: RUF012
    _fsdp_plan = {  # noqa: RUF012
        "backbone.embedding": "free_full_weight",
        "backbone.layers.*": "free_full_weight",
        "backbone.norm_f": "keep_full_weight",
        "head": "keep_full_weight",
    }

    def __init__(self, config: HybridZooConfig, core: Model | None = None):
        super().__init__(config)
        config.check()
        made: Any = task_of(config.zoo or {})(config.zoo) if core is None else core
        if made.hf_class not in {cls.__name__ for cls in type(self).__mro__}:
            raise ValueError(
                f"{type(self).__name__}: cannot be around a model whose task is {made.task!r}. Use "
                f"{made.hf_class or 'the model itself'}."
            )
        # not registered as a submodule: its parts are, under the keys they have in the core itself
        object.__setattr__(self, "core", made)
        for name, part in made.named_children():
            setattr(self, name, part)
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
    def wrap(cls, model: Model) -> Self:
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
        if core.cfg.get("tie_embeddings") != self.core.cfg.get("tie_embeddings"):
            self.core.cfg.tie_embeddings = self.config.tie_word_embeddings = core.cfg.tie_embeddings
            self.config.zoo = {**(self.config.zoo or {}), "tie_embeddings": core.cfg.tie_embeddings}
        kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
        shared = getattr(self.config, "distributed_config", None) is not None or kwargs.get("distributed_checkpoint")
        if shared or push_to_hub or not is_main_process or folder.is_file():
            super().save_pretrained(save_directory, **kwargs)
            return
        with publishing(folder, lambda new: superseded(folder, new)) as place:
            super().save_pretrained(place, **kwargs)

    def _answer(self, out: Any, output: ModelOutput, return_dict: bool | None) -> Any:
        """The output in the form that is asked for; what it has no place for is in ``reported``."""
        self.reported = None if out.aux_loss is None else out.aux_loss.detach(), out.router
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding: of tokens, or the stem of an image model."""
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in place."""
        self.backbone.embedding = value

    def _init_weights(self, module: nn.Module) -> None:
        # layers have drawn their own, and initialize_weights what a file lacks
        return

    def _set_gradient_checkpointing(self, *args, every_n_layers: int = 1, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        # transformers counts layers of its own kind alone
        self.backbone.checkpoint_every = every_n_layers

    def _replicate_for_data_parallel(self) -> Self:
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


def _tied_names(core: Model) -> dict[str, str]:
    first: dict[int, str] = {}
    sources = ((name, first.setdefault(id(p), name)) for name, p in core.named_parameters(remove_duplicate=False))
    return {name: source for name, source in sources if source != name}

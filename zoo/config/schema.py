"""The keys of a config: their names, types, defaults and ranges."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, ClassVar, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...layers.norm import NORMS
from ..errors import ConfigError, nearest
from ..layout import BlockSpec
from ..registry import of_another_kind
from .plain import first_line

__all__ = [
    "MAX_MIXERS",
    "SCHEMAS",
    "WORDS",
    "ConfigSchema",
    "NormSchema",
    "TrunkSchema",
    "check_choice",
    "check_labels",
    "typed",
]

# nobody writes down more; each is checked and built on the meta device, which takes milliseconds
MAX_MIXERS = 256
# the largest sizes that anybody means; beyond them lies a slip of the keyboard, or an overflow
_RANGES = {
    "vocab_size": (1, 2**24),
    "pad_vocab_size_multiple": (1, 2**16),
    "d_model": (1, 2**20),
    "inputs": (1, 2**20),
    "outputs": (1, 2**20),
    "max_length": (1, 2**31),
    "initializer_range": (0, 10),
    "n_classes": (0, 2**24),
    "in_channels": (1, 2**16),
    "image_size": (1, 2**16),
    "stem.patch": (1, 2**12),
    "drop_path": (0, 0.99),
    "crop": (0.01, 1),
    "norm.eps": (0, 1),
    "embedding_multiplier": (0, 2**20),
    "residual_multiplier": (0, 2**20),
    "logits_multiplier": (0, 2**20),
}


@dataclasses.dataclass
class NormSchema:
    """The norm in front of every block and after the last: ``rmsnorm`` or ``layernorm``."""

    type: str = "rmsnorm"
    eps: float = 1e-5


@dataclasses.dataclass
class TrunkSchema:
    """The keys that the configs of every task have: what the trunk is, between what reads the inputs and what gives the answers.

    Attributes:
        task: What the model does; ``causal_lm``, or another that is registered (:mod:`hybridzoo.zoo.models.tasks`).
        base: A config to inherit from: a shipped name, or a path relative to this file.
        d_model: Channels of the residual stream.
        layers: The pattern, see :mod:`hybridzoo.zoo.layout.expand`.
        mixers: What each name of the pattern is: ``{type: registered mixer, **options}``. Two options are the block's and not the
            mixer's. ``reads``: the ``residual`` stream (default); ``residual_and_embedding``, it and the embedded tokens side by
            side; the ``side`` stream; or ``residual_plus_side``, the side stream added after a linear layer. ``writes``: add to the
            ``residual`` stream (default), or replace the ``side`` stream.
        override: Exceptions by index of the residual block: ``{at: 0 | [0, -1], set: {option: value}}``.
        norm: See :class:`NormSchema`.
        residual_in_fp32: Whether the residual stream stays float32 in a half-precision model.
        residual_multiplier: Factor of what every block adds to the residual stream.
        imports: Filled in: the Python module that each registered mixer of somebody else's came from, ``{my_mixer: mine}``. A name to
            import, for the message where the mixer is not registered; reading a config never imports it.
        needs: No key: the capabilities that every mixer must declare, each with a word for the model that needs it.
    """

    needs: ClassVar[dict[str, str]] = {}
    task: str = MISSING
    base: str | None = None
    d_model: int = MISSING
    layers: Any = MISSING
    mixers: dict[str, Any] = MISSING
    override: list[Any] = dataclasses.field(default_factory=list)
    norm: NormSchema = dataclasses.field(default_factory=NormSchema)
    residual_in_fp32: bool = False
    residual_multiplier: float = 1.0
    imports: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def check(cls, values: dict[str, Any]) -> None:
        """Raise a :class:`ConfigError` where values that are right by themselves do not fit each other."""

    @classmethod
    def check_specs(cls, values: dict[str, Any], specs: list[BlockSpec]) -> None:
        """Raise a :class:`ConfigError` where a block, which can be built, has no place in such a model."""


@dataclasses.dataclass
class ConfigSchema(TrunkSchema):
    """The keys of a language model's config, those of :class:`TrunkSchema` included.

    Attributes:
        vocab_size: Token ids that exist.
        pad_vocab_size_multiple: The embedding table is rounded up to a multiple of this.
        tie_embeddings: Whether the head is the embedding table.
        max_length: Tokens that evaluation gives the model at once; where nothing is stated, what the tokenizer states.
        tokenizer: ``byte``, ``ascii``, a hub id or a folder.
        initializer_range: Standard deviation of the embedding at initialisation.
        embedding_multiplier: Factor of the embedded tokens (muP, arXiv:2203.03466; Granite, Falcon-H1).
        logits_multiplier: Factor of the logits.
    """

    needs: ClassVar[dict[str, str]] = {"causal": "a causal language model"}
    task: str = "causal_lm"
    vocab_size: int = MISSING
    pad_vocab_size_multiple: int = 1
    tie_embeddings: bool = True
    max_length: int | None = None
    tokenizer: str = "byte"
    initializer_range: float = 0.02
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0


# the keys of each task's configs; a task that is registered adds its own
SCHEMAS: dict[str, type[TrunkSchema]] = {"causal_lm": ConfigSchema}
# checked by who knows what is in them, and not by OmegaConf
_NESTED = ("layers", "stages", "mixers", "override")
# what other libraries call keys of ours
WORDS = {
    "num_classes": "n_classes", "num_labels": "n_classes", "in_chans": "in_channels", "num_channels": "in_channels",
    "img_size": "image_size", "drop_path_rate": "drop_path", "hidden_size": "d_model", "embed_dim": "d_model",
}  # fmt: skip
# the order in which a message lists what every config has
_FIRST = ("d_model", "vocab_size", "layers", "mixers")
_KINDS = {
    "mixers": (dict, "a mapping, such as {mamba: {d_state: 16}}"),
    "norm": (dict, "a mapping, such as {type: rmsnorm, eps: 1.0e-5}"),
    "stem": (dict, "a mapping, such as {type: conv, patch: 4}"),
    "stages": (list, "a list, such as [{layers: ss2d * 2}, {layers: ss2d * 8}]"),
    "imports": (dict, "a mapping, such as {my_mixer: my_package.mixers}"),
    "override": (list, "a list, such as [{at: 0, set: {d_state: 128}}]"),
}


def typed(data: dict[str, Any]) -> dict[str, Any]:
    """Return the top level with defaults filled in, unknown keys refused and every scalar of its type and in its range."""
    given = {key: value for key, value in data.items() if key != "base"}
    schema: type[TrunkSchema] = ConfigSchema
    if isinstance(task := given.get("task", schema.task), str):  # other kinds are refused below
        check_choice("task", task, SCHEMAS)
        schema = SCHEMAS[task]
    _check_keys(given, schema)
    try:
        scalars = {key: value for key, value in given.items() if key not in _NESTED}
        values: Any = OmegaConf.to_container(OmegaConf.merge(_structured(cast(Any, schema)), scalars))
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as e:
        raise ConfigError(f"{getattr(e, 'full_key', None) or 'config'}: {first_line(e)}. Correct the value.") from None
    for key in _NESTED:  # last, behind what takes a line each
        if key in values and (value := given.get(key, values.pop(key))) is not None:
            values[key] = value
    for key, value in values.items():
        if value == MISSING:
            raise ConfigError(f"{key}: is missing (found {MISSING!r}). Give it a value.")
        if key in scalars and (problem := of_another_kind(scalars[key], value)):
            raise ConfigError(f"{key}: {problem}.")
    del values["base"]
    leaves = values | {f"{part}.{key}": value for part in _parts(schema) for key, value in values[part].items()}
    check_choice("norm.type", leaves["norm.type"], NORMS)
    for key, (low, high) in _RANGES.items():
        if (value := leaves.get(key)) is not None and not low <= value <= high:
            raise ConfigError(f"{key}: is {value}, outside {low} to {high}. Choose a value in that range.")
    schema.check(values)
    return values


@functools.cache
def _structured(schema: Any) -> Any:
    return OmegaConf.structured(schema)  # a third of a config's reading; merging copies it


def _parts(schema: type) -> dict[str, type]:
    """The keys that hold keys of their own, and what types those."""
    made: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(schema)}
    return {name: made for name, made in made.items() if isinstance(made, type) and dataclasses.is_dataclass(made)}


def check_labels(values: dict[str, Any]) -> None:
    """Refuse names of classes that are not one for each."""
    labels, n = values["labels"], values["n_classes"]
    if labels is not None and len(labels) != n:
        raise ConfigError(f"labels: names {len(labels)} classes, and n_classes is {n}. Give one name to each, or null.")


def check_choice(key: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ConfigError(f"{key}: unknown value {value!r}.{nearest(value, choices)} Known: {', '.join(choices)}.")


def _check_keys(given: dict[str, Any], schema: type) -> None:
    """Refuse keys that do not exist, those that every config has where they are missing, and values of another kind or size."""
    parts = _parts(schema)
    for prefix, keys, of in (("", given, schema), *((f"{name}.", given.get(name), of) for name, of in parts.items())):
        known = [f.name for f in dataclasses.fields(of)]
        for key in keys if isinstance(keys, dict) else ():
            if key not in known:
                raise ConfigError(
                    f"{prefix}{key}: unknown key.{nearest(WORDS.get(key, key), known)} Keys: {', '.join(known)}."
                )
    needed = [f.name for f in dataclasses.fields(schema) if f.default == MISSING]
    needed.sort(key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))
    for key in needed:
        if given.get(key, MISSING) in (None, MISSING):
            every = f"{', '.join(needed[:-1])} and {needed[-1]}"
            raise ConfigError(f"{key}: is missing. Every config sets {every}, itself or through base.")
    for key, (kind, example) in _KINDS.items():
        if not isinstance(value := given.get(key, kind()), kind):
            raise ConfigError(f"{key}: found {value!r}, expected {example}.")
        if kind is dict and len(value) > MAX_MIXERS:
            raise ConfigError(f"{key}: has {len(value)} entries, more than {MAX_MIXERS}. Leave out unused ones.")
    for name, module in given.get("imports", {}).items():
        if not isinstance(module, str) or not all(part.isidentifier() for part in module.split(".")):
            raise ConfigError(f"imports.{name}: found {module!r}, expected the name of a Python module.")

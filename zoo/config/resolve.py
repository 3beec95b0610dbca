"""From a config, written in whatever way, to a checked and resolved one. What a config says is what runs.

Every key, type, pattern and cross-field rule is checked, the latter by building each distinct mixer on the meta device,
so that a config either works or fails as one :class:`ConfigError` before anything is allocated. Two rules make files
short:

- A mixer entry without ``type`` is of the type it is named after.
- ``layers`` need not use every entry of ``mixers``, so that one table serves all patterns of an ablation. The options
  of an unused entry are checked too, only not whether they fit ``d_model``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError
from ..layout.expand import BlockSpec, compress, expand
from ..layout.pattern import MAX_NAME
from ..registry import (
    HOW_TO_IMPORT,
    build_mixer,
    check_capability,
    check_mixer_options,
    home_of,
    list_mixers,
    nearest,
    of_another_kind,
    refuse_broken,
)
from .files import apply_overrides, find_config, inherit, read_config
from .plain import first_line, plain
from .shipped import list_models
from .specs import STREAMS, block_specs, without_streams

__all__ = ["ConfigSchema", "block_specs", "find_config", "list_models", "load_config", "validate"]

_NORMS = ("rmsnorm", "layernorm")
_TASKS = ("causal_lm",)
# nobody writes down more; each is checked and built on the meta device, which takes milliseconds
_MAX_MIXERS = 256
# the largest sizes that anybody means; beyond them lies a slip of the keyboard, or an overflow
_RANGES = {
    "vocab_size": (1, 2**24),
    "pad_vocab_size_multiple": (1, 2**16),
    "d_model": (1, 2**20),
    "max_length": (1, 2**31),
    "initializer_range": (0, 10),
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
class ConfigSchema:
    """The keys of a config file.

    Attributes:
        task: What the model does; ``causal_lm``.
        base: A config to inherit from: a shipped name, or a path relative to this file.
        vocab_size: Token ids that exist.
        pad_vocab_size_multiple: The embedding table is rounded up to a multiple of this.
        d_model: Channels of the residual stream.
        layers: The pattern, see :mod:`hybridzoo.zoo.layout.expand`.
        mixers: What each name of the pattern is: ``{type: registered mixer, **options}``. Two options are the block's and not the
            mixer's. ``reads``: the ``residual`` stream (default); ``residual_and_embedding``, it and the embedded tokens side by
            side; the ``side`` stream; or ``residual_plus_side``, the side stream added after a linear layer. ``writes``: add to the
            ``residual`` stream (default), or replace the ``side`` stream.
        override: Exceptions by index of the residual block: ``{at: 0 | [0, -1], set: {option: value}}``.
        norm: See :class:`NormSchema`.
        tie_embeddings: Whether the head is the embedding table.
        residual_in_fp32: Whether the residual stream stays float32 in a half-precision model.
        max_length: Tokens that evaluation gives the model at once; where nothing is stated, what the tokenizer states.
        tokenizer: ``byte``, a hub id or a folder.
        initializer_range: Standard deviation of the embedding at initialisation.
        embedding_multiplier: Factor of the embedded tokens (muP, arXiv:2203.03466; Granite, Falcon-H1).
        residual_multiplier: Factor of what every block adds to the residual stream.
        logits_multiplier: Factor of the logits.
        imports: Filled in: the Python module that each registered mixer of somebody else's came from, ``{my_mixer: mine}``. A name to
            import, for the message where the mixer is not registered; reading a config never imports it.
    """

    task: str = "causal_lm"
    base: str | None = None
    vocab_size: int = MISSING
    pad_vocab_size_multiple: int = 1
    d_model: int = MISSING
    layers: Any = MISSING
    mixers: dict[str, Any] = MISSING
    override: list[Any] = dataclasses.field(default_factory=list)
    norm: NormSchema = dataclasses.field(default_factory=NormSchema)
    tie_embeddings: bool = True
    residual_in_fp32: bool = False
    max_length: int | None = None
    tokenizer: str = "byte"
    initializer_range: float = 0.02
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    imports: dict[str, str] = dataclasses.field(default_factory=dict)


def load_config(source: Any, overrides: Sequence[str] | Mapping[str, Any] | None = None, **changes: Any) -> DictConfig:
    """Read, merge and check a config.

    Args:
        source: A shipped name (:func:`list_models`), a YAML file, a folder that holds a ``config.yaml``, a dict, or a
            ``DictConfig`` such as Hydra's, which is resolved first. Nothing else is evaluated: an interpolation is an error.
        overrides: Applied next: dotlist entries such as ``["d_model=256", "mixers.mamba.d_state=8"]``, or a mapping of keys, dotted or
            nested, such as ``{"mixers": {"mamba": {"d_state": 8}}}``.
        **changes: Keys of the config, applied last: ``d_model=256``.

    Returns:
        Every key with its final value, plain data only; ``layers`` is a pattern text. Saved as YAML and read again it
        is the same.

    Raises:
        ConfigError: Anything that cannot work.
    """
    return _load(source, overrides or [], changes)


def validate(cfg: Any, *, saved: bool = False) -> DictConfig:
    """:func:`load_config` without overrides: check a config from anywhere and fill in its defaults.

    Args:
        cfg: As there.
        saved: Whether it is what a saved model's ``config.json`` says, and may therefore name no file as its ``base``.
    """
    return _load(cfg, [], {}, saved=saved)


def _load(source: Any, overrides: Any, changes: Mapping[str, Any], saved: bool = False) -> DictConfig:
    if isinstance(source, str | Path) and not saved:
        path = find_config(source)
        data = inherit(read_config(path), path)
    else:
        data = inherit(_plain(source, saved), None, saved=saved)
    return _check(apply_overrides(apply_overrides(data, overrides), changes))


def _plain(cfg: Any, saved: bool) -> dict[str, Any]:
    if not isinstance(cfg, Mapping | DictConfig | ConfigSchema):
        raise ConfigError(
            f"config: found {type(cfg).__name__}, expected a mapping, a DictConfig, a model's name or a path."
            if not saved
            else f"zoo: found {type(cfg).__name__}, expected a mapping: a saved config is whole, and names no other file."
        )
    data = plain(dataclasses.asdict(cfg) if isinstance(cfg, ConfigSchema) else cfg)
    if not isinstance(data, dict):
        raise ConfigError("config: is an empty node. Pass a mapping.")
    return data


def _check(data: dict[str, Any]) -> DictConfig:
    values = _typed(data)
    _check_imports(values)
    values["mixers"] = {name: _filled(name, entry) for name, entry in values["mixers"].items()}
    values["layers"] = compress(expand(values["layers"]))
    specs = block_specs(values)
    built: dict[tuple[int, str], tuple[Any, str, BlockSpec]] = {}
    for spec in specs:
        for _, part, where in spec.parts:
            built.setdefault((id(part), spec.reads), (part, where, spec))
    if len(built) > _MAX_MIXERS:
        raise ConfigError(
            f"override: makes {len(built)} different mixers, more than {_MAX_MIXERS}. Make fewer exceptions."
        )
    for part, where, spec in built.values():
        _try_build(part, where, values["d_model"], len(specs), spec)
    # the plain data has been read as text and typed; OmegaConf only holds it
    return OmegaConf.create(values)


def _check_imports(values: dict[str, Any]) -> None:
    """Say what to import for a mixer that is not registered, and note where the registered ones of others came from."""
    known, homes = list_mixers(), {}
    for name, entry in values["mixers"].items():
        kind = entry.get("type", name) if isinstance(entry, dict) else None
        if not isinstance(kind, str):
            continue
        refuse_broken(kind, f"mixers.{name}")
        if kind not in known and (home := values["imports"].get(kind)) is not None:
            raise ConfigError(
                f"mixers.{name}: its type {kind!r} is no mixer of hybridzoo; it came from the Python module {home!r}, and a config never "
                f"imports one. If you trust that module, import it first: 'import {home}' in Python, 'zoo --import {home}' or "
                "'zoo --import path/to/its/file.py'; a plug-in is installed by pip."
            )
        if kind in known and (home := home_of(kind)) is not None:
            homes[kind] = home
    if homes:
        values["imports"] = homes
    else:
        del values["imports"]


def _typed(data: dict[str, Any]) -> dict[str, Any]:
    """The top level with defaults filled in, unknown keys refused and every scalar of its type and in its range."""
    plain = dict(data)
    plain.pop("base", None)
    for prefix, keys, schema in (("", plain, ConfigSchema), ("norm.", plain.get("norm"), NormSchema)):
        known = [f.name for f in dataclasses.fields(schema)]
        for key in keys if isinstance(keys, dict) else ():
            if key not in known:
                raise ConfigError(f"{prefix}{key}: unknown key.{nearest(key, known)} Keys: {', '.join(known)}.")
    for key in ("d_model", "vocab_size", "layers", "mixers"):
        if plain.get(key, MISSING) in (None, MISSING):
            raise ConfigError(
                f"{key}: is missing. Every config sets d_model, vocab_size, layers and mixers, itself or through base."
            )
    if not isinstance(plain["mixers"], dict):
        raise ConfigError(f"mixers: found {plain['mixers']!r}, expected a mapping, such as {{mamba: {{d_state: 16}}}}.")
    if len(plain["mixers"]) > _MAX_MIXERS:
        raise ConfigError(
            f"mixers: has {len(plain['mixers'])} entries, more than {_MAX_MIXERS}. Leave out unused ones."
        )
    for key, kind, example in (
        ("norm", dict, "a mapping, such as {type: rmsnorm, eps: 1.0e-5}"),
        ("imports", dict, "a mapping, such as {my_mixer: my_package.mixers}"),
        ("override", list, "a list, such as [{at: 0, set: {d_state: 128}}]"),
    ):
        if not isinstance(plain.get(key, kind()), kind):
            raise ConfigError(f"{key}: found {plain[key]!r}, expected {example}.")
    for key in ("mixers", "imports"):
        if len(plain.get(key, ())) > _MAX_MIXERS:
            raise ConfigError(f"{key}: has {len(plain[key])} entries, more than {_MAX_MIXERS}. Leave out unused ones.")
    for name, module in plain.get("imports", {}).items():
        if not isinstance(module, str) or not all(part.isidentifier() for part in module.split(".")):
            raise ConfigError(f"imports.{name}: found {module!r}, expected the name of a Python module.")
    nested = {key: plain.pop(key) for key in ("layers", "mixers", "override") if key in plain}
    try:
        values: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(ConfigSchema), plain))
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as e:
        raise _from_omegaconf(e, "config") from None
    values |= nested
    for key, value in values.items():
        if value == MISSING:
            raise ConfigError(f"{key}: is missing (found {MISSING!r}). Give it a value.")
        if key in plain and (problem := of_another_kind(plain[key], value)):
            raise ConfigError(f"{key}: {problem}.")
    del values["base"]
    for key, choices in (("task", _TASKS), ("norm.type", _NORMS)):
        value = values["norm"]["type"] if key == "norm.type" else values[key]
        if value not in choices:
            raise ConfigError(f"{key}: unknown value {value!r}.{nearest(value, choices)} Known: {', '.join(choices)}.")
    for key, (low, high) in _RANGES.items():
        value = values["norm"]["eps"] if key == "norm.eps" else values[key]
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{key}: is {value}, outside {low} to {high}. Choose a value in that range.")
    return values


def _filled(name: str, entry: Any) -> dict[str, Any]:
    where = f"mixers.{name}"
    if not (name.isascii() and name.isidentifier() and len(name) <= MAX_NAME):
        raise ConfigError(
            f"{where}: is not a name that a pattern can hold. Use letters, digits and underscores, {MAX_NAME} at most."
        )
    if not isinstance(entry, dict):
        raise ConfigError(
            f"{where}: found {entry!r}, expected options. Write {{type: {name}}}, or {{}} if nothing is to be set."
        )
    if "type" not in entry:
        if name not in list_mixers():
            refuse_broken(name, where)
            raise ConfigError(
                f"{where}: has no type, and no mixer is called {name!r}.{nearest(name, list_mixers())}"
                f" Add type: one of {', '.join(list_mixers())}. {HOW_TO_IMPORT}"
            )
        entry = {"type": name, **entry}
    streams = {key: entry[key] for key in STREAMS if key in entry}
    for key, value in streams.items():
        if value not in STREAMS[key]:
            known = ", ".join(STREAMS[key])
            raise ConfigError(f"{where}.{key}: unknown value {value!r}.{nearest(value, STREAMS[key])} Known: {known}.")
    return check_mixer_options(without_streams(entry), where) | streams


def _try_build(part: dict[str, Any], where: str, d_model: int, n_layer: int, spec: BlockSpec) -> None:
    d_in = spec.d_in(d_model)
    try:
        mixer = build_mixer(
            part, where, d_model=d_model, d_in=d_in, layer_idx=spec.index, n_layer=n_layer, device="meta"
        )
        check_capability("causal", mixer, part, where, f"block {spec.index} ({spec.token}) of a causal language model")
    except ConfigError:
        raise
    except Exception as e:
        # a constructor, perhaps a third party's, may fail in any way; to who wrote the config it is one kind of error
        raise ConfigError(
            f"{where} ({part['type']}): cannot be built with d_model = {d_model}: {first_line(e)}. Check its options."
        ) from e


def _from_omegaconf(e: Exception, where: str) -> ConfigError:
    return ConfigError(f"{getattr(e, 'full_key', None) or where}: {first_line(e)}. Correct the value.")

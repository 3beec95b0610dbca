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

from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from ..layout import BlockSpec
from .check import check_imports, check_mixers, filled
from .files import apply_overrides, find_config, inherit, read_config
from .images import ImageSchema
from .plain import plain
from .schema import SCHEMAS, ConfigSchema, TrunkSchema, typed
from .shipped import list_models
from .specs import block_specs, specs_of
from .stages import stages_of, written

__all__ = [
    "ConfigSchema",
    "ImageSchema",
    "Resolved",
    "block_specs",
    "find_config",
    "list_models",
    "load_config",
    "resolve",
    "validate",
]


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A config as :func:`load_config` returns it, and its residual blocks: read and checked once for all who build from it."""

    config: DictConfig
    specs: list[BlockSpec]


def resolve(
    source: Any,
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    saved: bool = False,
) -> Resolved:
    """As :func:`load_config`, with the blocks; what this has returned is not looked at again.

    ``saved`` says that it is what a saved model's ``config.json`` holds, which may therefore name no file as its ``base``.
    """
    if isinstance(source, Resolved):
        if not overrides and not changes:
            return source
        source = source.config
    if isinstance(source, str | Path) and not saved:
        path = find_config(source)
        data = inherit(read_config(path), path)
    else:
        data = inherit(_plain(source, saved), None, saved=saved)
    return _check(apply_overrides(apply_overrides(data, overrides or []), changes or {}))


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
    return resolve(source, overrides, changes).config


def validate(cfg: Any, *, saved: bool = False) -> DictConfig:
    """Check a config from anywhere and fill in its defaults, as :func:`resolve` does."""
    return resolve(cfg, saved=saved).config


def _plain(cfg: Any, saved: bool) -> dict[str, Any]:
    if not isinstance(cfg, Mapping | DictConfig | TrunkSchema):
        raise ConfigError(
            f"config: found {type(cfg).__name__}, expected a mapping, a DictConfig, a model's name or a path."
            if not saved
            else f"zoo: found {type(cfg).__name__}, expected a mapping: a saved config is whole, and names no other file."
        )
    data = plain(dataclasses.asdict(cfg) if isinstance(cfg, TrunkSchema) else cfg)
    if not isinstance(data, dict):
        raise ConfigError("config: is an empty node. Pass a mapping.")
    return data


def _check(data: dict[str, Any]) -> Resolved:
    values = typed(data)
    check_imports(values)
    values["mixers"] = {name: filled(name, entry) for name, entry in values["mixers"].items()}
    stages = stages_of(values)
    values |= written(values, stages)
    specs = specs_of(stages, values)
    schema = SCHEMAS[values["task"]]
    check_mixers(specs, schema.needs)
    schema.check_specs(values, specs)
    # the plain data has been read as text and typed; OmegaConf only holds it
    return Resolved(OmegaConf.create(values), specs)

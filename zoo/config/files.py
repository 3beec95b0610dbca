"""Config files: found by name or path, read safely, merged along ``base:`` and with overrides.

Mappings merge key by key; lists and values replace. A mixer whose ``type`` changes starts from that type's defaults,
since the old options are not its own. Nothing here knows what keys mean: :mod:`hybridzoo.zoo.config.resolve` checks the result.

``base`` in a file is a shipped name, or a path to another YAML file relative to that file. A ``config.yaml`` belongs to the folder that
it lies in, which may have been downloaded: its base is a shipped name or a file inside that folder, links followed. The ``zoo`` part of
a ``config.json`` inherits from shipped names alone. Any other file is one that somebody has named, and may say ``../other.yaml``.
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, nearest, shortened
from .plain import MAX_DEPTH, first_line, plain, refuse_interpolation
from .shipped import list_models, shipped
from .yaml_text import TooMuch, parse_yaml

__all__ = ["FOLDER_CONFIG", "apply_overrides", "find_config", "inherit", "merge", "overridden", "read_config"]

FOLDER_CONFIG = "config.yaml"
_MAX_BYTES = 1_000_000
_MAX_BASES = 16


def find_config(name: str | Path) -> Path:
    """Find the file of a shipped name, or of a path: a YAML file, or a folder with a ``config.yaml``."""
    if isinstance(name, str) and name in list_models() and (file := shipped(name)) is not None:
        return file
    path = Path(name)
    is_folder = os.path.isdir(path)  # unlike Path's, false for a name that no file system would take
    found = path / FOLDER_CONFIG if is_folder else path
    if os.path.isfile(found):
        return found
    if isinstance(name, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) != 1 or is_folder:
        raise ConfigError(f"model: there is no file {str(found)!r} in {Path.cwd()}. Check the path.")
    names = list_models()
    families = ", ".join(sorted({n.rsplit("-", 1)[0] for n in names}))
    raise ConfigError(
        f"model: unknown model {name!r}.{nearest(name, names)} Families: {families}. `zoo list` prints every name."
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read the mapping that a YAML file holds: plain data, nothing in it evaluated; errors name the line or the dotted key."""
    try:
        with open(path, "rb") as f:
            content = f.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path}: has {path.stat().st_size} bytes, more than {_MAX_BYTES}. Is it a config?")
        data = parse_yaml(content.decode("utf-8"))
    except ConfigError:
        raise
    except TooMuch as e:
        raise ConfigError(f"{path}: {e}.") from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{at}: {first_line(e.problem or e.context or 'no YAML')}. Correct it there.") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply. Write it flat.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, TypeError) as e:
        raise ConfigError(f"{path}: cannot be read: {first_line(e)}. Check that it is a YAML text file.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {'nothing' if data is None else 'no mapping'}. Write 'key: value' lines.")
    return plain(data, file=path)


def inherit(data: dict[str, Any], path: Path | None, *, saved: bool = False) -> dict[str, Any]:
    """Put ``data`` on top of the config that its ``base`` names, and that one's base, and so on.

    Without a ``path``, the file it came from, paths are relative to the working directory; ``saved`` says that it is a ``config.json``'s.
    """
    layers, chain = [data], [] if path is None else [path]
    folder: Path | None = None
    while (base := layers[-1].get("base")) is not None:
        if not isinstance(base, str):
            raise ConfigError(f"base: found {base!r}, expected one shipped name, or a path relative to the file.")
        if len(layers) > _MAX_BASES:
            raise ConfigError(f"base: more than {_MAX_BASES} configs inherit from one another. Merge some of them.")
        if base in list_models():
            path = find_config(base)
        elif saved:
            raise ConfigError(
                f"base: {base!r} in a saved config is no shipped name.{nearest(base, list_models())} Merge it into the config."
            )
        else:
            if folder is None and path is not None and path.name == FOLDER_CONFIG:
                folder = path.parent
            path = _find_base(base, path, folder)
        chain.append(path)
        if path.resolve() in [earlier.resolve() for earlier in chain[:-1]]:
            names = " -> ".join(p.name for p in chain)
            raise ConfigError(f"base: {names} comes back to itself. Remove one of these base lines.")
        layers.append(read_config(path))
    merged = functools.reduce(merge, reversed(layers))
    merged.pop("base", None)
    return merged


def _find_base(base: str, path: Path | None, folder: Path | None) -> Path:
    here = path.parent if path else Path.cwd()
    of = f" of {path}" if path else ""
    if path is not None and Path(base).is_absolute():
        raise ConfigError(
            f"base: {base!r}{of} is an absolute path. Write it relative to the file, or name a shipped config."
        )
    # nothing but YAML files is opened
    found = here / (base if base.endswith((".yaml", ".yml")) else f"{base}.yaml")
    if folder is not None and not found.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"base: {base!r}{of} leads out of the folder, and a {FOLDER_CONFIG} may have been downloaded with its folder. Name a shipped "
            "config or a file inside the folder, or call your own config otherwise, such as my.yaml."
        )
    if os.path.isfile(found):
        return found
    raise ConfigError(
        f"base: {base!r}{of} is no shipped config and no file in {here}.{nearest(base, list_models())}"
        " Give a name from `zoo list` or a path relative to the file."
    )


def apply_overrides(data: dict[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Apply changes, as :func:`~hybridzoo.zoo.config.resolve.load_config` takes them, in their order to a copy of a config."""
    if isinstance(overrides, Mapping):
        if not all(isinstance(key, str) for key in overrides):
            raise ConfigError(
                f"overrides: found the keys {shortened(list(overrides))}, expected texts, such as 'd_model'."
            )
        entries = [(key, value, f"{key}: {type(value).__name__}") for key, value in overrides.items()]
    elif isinstance(overrides, str) or not all(isinstance(entry, str) for entry in overrides):
        raise ConfigError(
            f"overrides: found {overrides!r}, expected a list of texts, such as ['d_model=256'], or a mapping."
        )
    else:
        entries = [_read_override(entry) for entry in overrides]
    if entries:
        data = plain(data)
    for key, value, entry in entries:
        # values that stand for one another in a dict of the caller's are told apart, since what follows changes them in place
        _put(data, key, plain(value, at=tuple(_keys(key, entry))), entry)
    return data


def overridden(overrides: Sequence[str] | Mapping[str, Any] | None) -> set[str]:
    """Return the keys of a config, of the first level, that some overrides are about."""
    keys = (entry.partition("=")[0].strip() for entry in overrides or ())
    return {re.split(r"[.\[]", key)[0] for key in keys}


def _read_override(entry: str) -> tuple[str, Any, str]:
    key, equals, text = entry.partition("=")
    key = key.strip()
    if not key or not equals:
        raise ConfigError(f"overrides: found {entry!r}, expected key=value, such as 'd_model=256'.")
    refuse_interpolation(entry, key)
    if len(entry) > _MAX_BYTES:
        raise ConfigError(f"{key}: has {len(entry)} characters, more than {_MAX_BYTES}. Is it a config?")
    try:
        return key, parse_yaml(text), entry
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as e:
        raise _unfit(key, entry, f"{first_line(e)}. Write the value as in YAML.") from None


def _unfit(key: str, entry: str, problem: str) -> ConfigError:
    return ConfigError(f"{key}: cannot be set by {shortened(entry)}: {problem}")


def _keys(key: str, entry: str) -> list[str]:
    refuse_interpolation(key, shortened(key))
    keys = re.sub(r"\[(\w*)\]", r".\1", key).split(".")
    if not all(keys) or len(keys) > MAX_DEPTH:
        raise _unfit(shortened(key), entry, "is no dotted key. Write it as in 'norm.eps=1e-5'.")
    if keys[0] == "base":
        raise ConfigError(
            f"base: cannot be overridden by {shortened(entry)}. Name the other config in place of this one."
        )
    return keys


def _put(data: dict[str, Any], key: str, value: Any, entry: str) -> None:
    keys = _keys(key, entry)
    node: Any = data
    place: Any
    for i, name in enumerate(keys):
        at, place, is_last = ".".join(keys[:i]), name, i + 1 == len(keys)
        if isinstance(node, list):
            if not re.fullmatch(r"-?\d{1,6}", name, re.ASCII) or not -len(node) <= int(name) < len(node):
                raise _unfit(key, entry, f"{at} is a list of {len(node)}. Use an index of it.")
            place = int(name)
        elif not isinstance(node, dict):
            raise _unfit(key, entry, f"{at} is {shortened(node)}, no mapping. Check the key.")
        else:
            if is_last and name == "type" and node.get(name, value) != value:
                node.clear()  # as in merge
            if node.get(name) is None:
                node[name] = None if is_last else {}
        if is_last:
            node[place] = merge(node[place], value)
        node = node[place]


def merge(base: Any, over: Any) -> Any:
    """Put ``over`` on top of ``base``, plain data both: mappings key by key, and of a ``type`` that changes nothing stays."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "type" in base and over.get("type", base["type"]) != base["type"]:
        return over
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}

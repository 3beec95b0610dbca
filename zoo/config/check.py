"""Checks of the mixers that a config names: that they are registered, that their options are theirs, and that they can be built."""

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, nearest
from ..layout import BlockSpec
from ..layout.pattern import MAX_NAME
from ..registry import (
    HOW_TO_IMPORT,
    build_mixer,
    check_capability,
    check_mixer_options,
    home_of,
    list_mixers,
    refuse_broken,
)
from .plain import first_line
from .schema import MAX_MIXERS, check_choice
from .specs import STREAMS, without_streams

__all__ = ["check_imports", "check_mixers", "filled"]


def check_imports(values: dict[str, Any]) -> None:
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
    values["imports"] = homes
    if not homes:
        del values["imports"]


def filled(name: str, entry: Any) -> dict[str, Any]:
    """Return an entry of ``mixers`` with its type, every option, and the streams that it names, all of them checked."""
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
        check_choice(f"{where}.{key}", value, STREAMS[key])
    return check_mixer_options(without_streams(entry), where) | streams


def check_mixers(specs: list[BlockSpec], needs: Mapping[str, str]) -> None:
    """Build each distinct mixer once, on the meta device; refuse what cannot be built or has not what the model ``needs``, and too many."""
    built: dict[tuple[int, str, int], tuple[Any, str, BlockSpec]] = {}
    for spec in specs:
        for _, part, where in spec.parts:
            built.setdefault((id(part), spec.reads, spec.d_model), (part, where, spec))
    if len(built) > MAX_MIXERS:
        raise ConfigError(
            f"override: makes {len(built)} different mixers, more than {MAX_MIXERS}. Make fewer exceptions."
        )
    for part, where, spec in built.values():
        place: dict[str, Any] = {"d_in": spec.d_in, "layer_idx": spec.index, "n_layer": len(specs)}
        try:
            mixer = build_mixer(part, where, d_model=spec.d_model, device="meta", **place)
            for capability, model in needs.items():
                check_capability(capability, mixer, part, where, f"block {spec.index} ({spec.token}) of {model}")
        except ConfigError:
            raise
        except Exception as e:
            # a constructor, perhaps a third party's, may fail in any way; to who wrote the config it is one kind of error
            raise ConfigError(
                f"{where} ({part['type']}): cannot be built with d_model = {spec.d_model}: {first_line(e)}. Check its options."
            ) from e

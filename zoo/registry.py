"""The table of mixers, and the schema of each, read from its constructor.

A mixer's options are its ``__init__`` parameters: their names, types and defaults are written once, there. The schema that validates
a YAML file is derived from that signature, so a third party's mixer is checked as strictly as ours.
"""

import copy
import dataclasses
import difflib
import importlib.metadata
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..layers import MLP, Attention, Mamba, Mamba2, Mixer, MoE
from ..layers.base import OptionError
from .errors import ConfigError

__all__ = [
    "ConfigError",
    "MixerEntry",
    "build_mixer",
    "check_mixer_options",
    "list_mixers",
    "nearest",
    "register_mixer",
]

# what the model decides, and a file therefore may not
_SHARED = ("d_model", "d_in", "layer_idx", "n_layer", "device", "dtype")
_GROUP = "hybridzoo.mixers"

T = TypeVar("T", bound=type[Mixer])


@dataclasses.dataclass(frozen=True)
class MixerEntry:
    """A registered mixer: its class, and the dataclass that types its options."""

    cls: type[Mixer]
    schema: type


_entries: dict[str, MixerEntry] = {}
_checked: dict[tuple[type, str], dict[str, Any]] = {}
_plugins_loaded = False


def nearest(name: object, known: Iterable[str]) -> str:
    """A ``Did you mean ...?`` sentence with a leading space, or an empty string when nothing is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def register_mixer(name: str) -> Callable[[T], T]:
    """Class decorator: make a :class:`Mixer` available in configs under ``name``.

    The class takes ``d_model`` and its options as annotated ``__init__`` parameters with defaults. Installed packages can register
    through the entry-point group ``hybridzoo.mixers`` instead (entry name = mixer name, value = the class).

    Raises:
        ValueError: The name is taken by another class, is not an identifier, or the class is not a ``Mixer`` with ``d_model``.
    """

    def wrap(cls: T) -> T:
        if not name.isidentifier():
            raise ValueError(f"register_mixer({name!r}): a mixer's name must be an identifier, such as 'my_mixer'.")
        if not (isinstance(cls, type) and issubclass(cls, Mixer)):
            raise ValueError(f"register_mixer({name!r}): {cls!r} is not a subclass of hybridzoo.Mixer.")
        taken = _entries.get(name)
        if taken is not None and (taken.cls.__module__, taken.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"register_mixer({name!r}): the name is taken by {taken.cls.__module__}.{taken.cls.__qualname__}. Choose another."
            )
        _entries[name] = MixerEntry(cls, _schema_of(name, cls))
        return cls

    return wrap


def _schema_of(name: str, cls: type[Mixer]) -> type:
    parameters = inspect.signature(cls.__init__).parameters
    if "d_model" not in parameters:
        raise ValueError(f"register_mixer({name!r}): {cls.__name__}.__init__ must take d_model.")
    hints = typing.get_type_hints(cls.__init__)
    fields: list[Any] = []
    for key, p in list(parameters.items())[1:]:
        if key in _SHARED or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        default: Any = dataclasses.field(default="???") if p.default is p.empty else p.default
        if isinstance(default, list | dict | tuple):
            values: Any = list(default) if isinstance(default, tuple) else default
            default = dataclasses.field(default_factory=values.copy)
        fields.append((key, hints.get(key, Any), default))
    return dataclasses.make_dataclass(f"{cls.__name__}Options", fields)


def _load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for point in importlib.metadata.entry_points(group=_GROUP):
        if point.name not in _entries:
            register_mixer(point.name)(point.load())


def list_mixers() -> list[str]:
    """The names of all registered mixers, sorted."""
    _load_plugins()
    return sorted(_entries)


def get_mixer(name: object, where: str) -> MixerEntry:
    """The entry registered as ``name``; ``where`` is the dotted key for the error."""
    _load_plugins()
    if not isinstance(name, str) or name not in _entries:
        raise ConfigError(
            f"{where}: unknown mixer {name!r}.{nearest(name, _entries)} Known: {', '.join(list_mixers())}."
        )
    return _entries[name]


def check_mixer_options(spec: dict[str, Any], where: str) -> dict[str, Any]:
    """Validate ``{"type": name, **options}`` against the mixer's schema and fill in its defaults.

    Args:
        spec: As read from YAML.
        where: Dotted path of ``spec`` in the file, for messages.

    Returns:
        A new plain dict with ``type`` and every option.

    Raises:
        ConfigError: Unknown type or option, wrong type of value, or a required option that is missing.
    """
    options = dict(spec)
    entry = get_mixer(options.pop("type", None), f"{where}.type")
    # a deep model asks the same for every block, and OmegaConf takes milliseconds
    memo = (entry.schema, repr(options))
    if memo in _checked:
        return copy.deepcopy(_checked[memo])
    known = [f.name for f in dataclasses.fields(entry.schema)]
    for key in options:
        if key in _SHARED:
            raise ConfigError(
                f"{where}.{key} ({spec['type']}): is decided by the model, not by a mixer. Remove it here."
            )
        if key not in known:
            raise ConfigError(
                f"{where}.{key} ({spec['type']}): unknown option.{nearest(key, known)} Options: {', '.join(known)}."
            )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(entry.schema), options)
        checked = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, TypeError, ValueError) as e:
        at = getattr(e, "full_key", None)
        key = f".{at}" if at else ""
        message = (getattr(e, "msg", None) or str(e)).splitlines()[0]
        raise ConfigError(f"{where}{key} ({spec['type']}): {message}. Options: {', '.join(known)}.") from e
    assert isinstance(checked, dict)
    _checked[memo] = {"type": spec["type"], **{str(k): v for k, v in checked.items()}}
    return copy.deepcopy(_checked[memo])


def build_mixer(
    spec: dict[str, Any],
    where: str,
    *,
    d_model: int,
    d_in: int | None = None,
    layer_idx: int = 0,
    n_layer: int = 1,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> Mixer:
    """Construct the mixer that ``spec`` describes.

    Args:
        spec: ``{"type": name, **options}``.
        where: Dotted path of ``spec``, for messages.
        d_model: Channels of the residual stream.
        d_in: Channels of the input, where they are not ``d_model``.
        layer_idx: Index of the residual block.
        n_layer: Number of residual blocks.
        device: As for ``torch.nn.Linear``.
        dtype: As for ``torch.nn.Linear``.

    Raises:
        ConfigError: As :func:`check_mixer_options`, or a combination of values that the mixer refuses.
    """
    options = check_mixer_options(spec, where)
    entry = get_mixer(options.pop("type"), f"{where}.type")
    shared = {"layer_idx": layer_idx, "n_layer": n_layer, "device": device, "dtype": dtype}
    accepted = inspect.signature(entry.cls.__init__).parameters
    if d_in not in (None, d_model):
        if "d_in" not in accepted:
            raise ConfigError(
                f"{where}.reads ({spec['type']}): reads {d_in} channels, and {spec['type']} takes d_model = {d_model} only. "
                "Use a mixer that takes d_in, such as attention."
            )
        shared["d_in"] = d_in
    try:
        return entry.cls(d_model=d_model, **options, **{k: v for k, v in shared.items() if k in accepted})
    except OptionError as e:
        raise ConfigError(f"{where}.{e.field} ({spec['type']}): {e.message}") from e


for _name, _cls in {"mamba": Mamba, "mamba2": Mamba2, "attention": Attention, "mlp": MLP, "moe": MoE}.items():
    register_mixer(_name)(_cls)

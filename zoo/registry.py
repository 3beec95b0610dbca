"""The table of mixers, and the schema of each, read from its constructor.

A mixer's options are its ``__init__`` parameters: their names, types and defaults are written once, there. The schema that validates
a YAML file is derived from that signature, so a third party's mixer is checked as strictly as ours.
"""

import copy
import dataclasses
import importlib.metadata
import inspect
import math
import threading
import typing
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..layers.base import Mixer
from ..layers.options import OptionError
from .config.plain import first_line
from .errors import ConfigError, nearest, printable

__all__ = [
    "ConfigError",
    "MixerEntry",
    "build_mixer",
    "check_capability",
    "check_mixer_options",
    "home_of",
    "list_mixers",
    "nearest",
    "of_another_kind",
    "register_mixer",
]

# what the model decides, and a file therefore may not
_SHARED = ("d_model", "d_in", "layer_idx", "n_layer", "device", "dtype")
_GROUP = "hybridzoo.mixers"
HOW_TO_IMPORT = "One of your own is imported first: 'import mine' in Python, or zoo --import mine.py."

T = TypeVar("T", bound=type[Mixer])


@dataclasses.dataclass(frozen=True)
class MixerEntry:
    """A registered mixer: its class, and the dataclass that types its options."""

    cls: type[Mixer]
    schema: type


_entries: dict[str, MixerEntry] = {}
_OURS: frozenset[str] = frozenset()
_defaults: dict[type, dict[str, Any]] = {}
_checked: dict[tuple[type, str, str], Any] = {}
_MAX_CHECKED = 10_000
_MAX_ITEMS = 1000  # in the value of one option
_broken: dict[str, str] = {}  # plug-ins that cannot be used, and why
_plugins_loaded = False
_lock = threading.RLock()


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
    # a plug-in may ask for the list of mixers while it is imported
    with _lock:
        if _plugins_loaded:
            return
        _plugins_loaded = True
        try:
            points = list(importlib.metadata.entry_points(group=_GROUP))
        except Exception as e:  # somebody's damaged metadata
            warnings.warn(f"mixer plug-ins cannot be listed: {_reason(e)}. Reinstall the package.", stacklevel=3)
            return
        for point in points:
            before = dict(_entries)
            try:
                register_mixer(point.name)(point.load())
            except (Exception, SystemExit) as e:
                # other configs work beside it, and so does the next call as this one
                _entries.clear()
                _entries.update(before)
                package = point.dist.name if point.dist else "unknown"
                reason = f"{point.value} of the package {package!r} cannot be used: {_reason(e)}"
                _broken.setdefault(point.name, reason)
                message = f"mixer plug-in {point.name!r}: {reason}. Reinstall or remove the package."
                warnings.warn(printable(message), stacklevel=3)
            except BaseException:
                _plugins_loaded = False
                raise


def _reason(e: BaseException) -> str:
    return f"{type(e).__name__}: {first_line(e)}"


def list_mixers() -> list[str]:
    """The names of all registered mixers, sorted."""
    _load_plugins()
    return sorted(_entries)


def get_mixer(name: object, where: str) -> MixerEntry:
    """The entry registered as ``name``; ``where`` is the dotted key for the error."""
    if not isinstance(name, str) or name not in list_mixers():
        refuse_broken(name, where)
        raise ConfigError(
            f"{where}: unknown mixer {name!r}.{nearest(name, _entries)} Known: {', '.join(list_mixers())}. {HOW_TO_IMPORT}"
        )
    return _entries[name]


def refuse_broken(name: object, where: str) -> None:
    """Raise a :class:`ConfigError` if ``name`` is a plug-in that cannot be used."""
    if isinstance(name, str) and name in _broken and name not in _entries:
        raise ConfigError(f"{where}: mixer {name!r} is a plug-in, and {_broken[name]}. Reinstall the package.")


def home_of(name: str) -> str | None:
    """The Python module that a registered mixer came from; ``None`` for one of hybridzoo's own."""
    return None if name in _OURS else _entries[name].cls.__module__


def check_mixer_options(spec: dict[str, Any], where: str) -> dict[str, Any]:
    """Validate ``{"type": name, **options}`` against the mixer's schema, and return it with every option, defaults filled in.

    ``where`` is the dotted path of ``spec`` in its file, for the :class:`ConfigError` about an unknown type or option, a value of a wrong
    type, or a required option that is missing.
    """
    options, kind = dict(spec), spec.get("type")
    entry = get_mixer(options.pop("type", None), f"{where}.type")
    known = [f.name for f in dataclasses.fields(entry.schema)]

    def refuse(key: str, message: str) -> NoReturn:
        raise ConfigError(f"{where}.{key} ({kind}): {message}") from None

    for key in options:
        if key in _SHARED:
            refuse(key, "is decided by the model, not by a mixer. Remove it here.")
        if key not in known:
            refuse(key, f"unknown option.{nearest(key, known)} Options: {', '.join(known)}.")
    if entry.schema not in _defaults:
        defaults: Any = OmegaConf.to_container(OmegaConf.structured(entry.schema))
        _defaults[entry.schema] = defaults
    checked = {"type": kind, **copy.deepcopy(_defaults[entry.schema])}
    for key, value in options.items():
        if isinstance(value, list | dict) and len(value) > _MAX_ITEMS:
            refuse(key, f"has {len(value)} entries, more than {_MAX_ITEMS}. Shorten it.")
        try:
            checked[key] = _typed_option(entry.schema, key, value)
        except (OmegaConfBaseException, TypeError, ValueError, OverflowError) as e:
            message = (getattr(e, "msg", None) or str(e)).splitlines()[0]
            refuse(getattr(e, "full_key", None) or key, f"{message}. Options: {', '.join(known)}.")
    for key in known:
        if checked[key] == MISSING:
            refuse(key, f"Missing mandatory value: {key}. Options: {', '.join(known)}.")
        if problem := _no_number(checked[key], _defaults[entry.schema][key]):
            refuse(key, f"{problem}. Choose a number within reason.")
    return checked


def _typed_option(schema: type, key: str, value: Any) -> Any:
    # each option by itself and once: OmegaConf takes milliseconds for all, and a deep or long config asks the same again and again
    memo = (schema, key, repr(value))
    if memo not in _checked:
        (field,) = (f for f in dataclasses.fields(schema) if f.name == key)
        one = dataclasses.make_dataclass(schema.__name__, [(key, field.type, dataclasses.field(default=MISSING))])
        typed: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(one), {key: value}))
        if problem := of_another_kind(value, typed[key]):
            raise ValueError(problem)
        if len(_checked) >= _MAX_CHECKED:
            _checked.clear()
        _checked[memo] = typed[key]
    return copy.deepcopy(_checked[memo])


def of_another_kind(given: Any, typed: Any) -> str | None:
    """Say what is wrong with a value that OmegaConf would convert all the same: a number as a text, or other than 0 and 1 as a flag."""
    if isinstance(typed, list) and isinstance(given, list):
        return next((problem for pair in zip(given, typed, strict=True) if (problem := of_another_kind(*pair))), None)
    if isinstance(typed, str) and not isinstance(given, str):
        return f"Value {given!r} of type {type(given).__name__!r} is no text. Write it in quotes"
    digits = isinstance(given, str) and given.strip("+-. ").isdigit()
    if isinstance(typed, bool) and (digits or (isinstance(given, int) and given not in (0, 1))):
        return f"Value {given!r} of type {type(given).__name__!r} is neither true nor false"
    return None


def _no_number(value: Any, default: Any) -> str | None:
    """Say what is wrong with a number in an option's value; an infinite one is right where the default has one."""
    if isinstance(value, list | tuple | dict):
        parts = value.values() if isinstance(value, dict) else value
        return next((problem for part in parts if (problem := _no_number(part, default))), None)
    if isinstance(value, int) and value.bit_length() > 63:
        return f"is a whole number of {value.bit_length()} bits, more than 63"
    if not isinstance(value, float) or math.isfinite(value):
        return None
    infinite = value in (default if isinstance(default, list | tuple) else [default])  # NaN equals nothing
    return None if infinite else f"is {value}, no finite number"


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
    """Construct the mixer that ``spec``, as :func:`check_mixer_options` returns it, describes; the rest is as for a mixer's constructor.

    Options are not checked again; a combination of values that the mixer refuses is a :class:`ConfigError` about ``where``.
    """
    options = copy.deepcopy(spec)
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


def check_capability(capability: str, mixer: Mixer, spec: dict[str, Any], where: str, block: str) -> None:
    """Raise a :class:`ConfigError` if a mixer, as built from ``spec``, lacks what ``block`` (in words) needs of every one."""
    try:
        mixer.require(capability)
    except NotImplementedError as e:
        remedy = f"{e} Or add {capability!r} to its capabilities, if it keeps that promise."
        raise ConfigError(f"{where} ({spec['type']}): {block} needs {capability!r}. {remedy}") from None


# a file of layers/ is named as configs name the class in it
_SHIPPED = {
    "attention": "Attention",
    "conv2d": "GatedConv2d",
    "mamba": "Mamba",
    "mamba2": "Mamba2",
    "mlp": "MLP",
    "moe": "MoE",
    "ss2d": "SS2D",
    "ss2d2": "SS2D2",
}
for _name, _cls in _SHIPPED.items():
    register_mixer(_name)(getattr(importlib.import_module(f"...layers.{_name}", __name__), _cls))
_OURS = frozenset(_entries)

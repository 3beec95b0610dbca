"""Plain data, as files, command lines and callers hand it over: what may be in it, and how much of it.

Nothing in it is ever evaluated. OmegaConf would take ``${...}`` in a text for a reference, or for the call of a function that some
library has registered, so a text that holds one is refused before OmegaConf sees it. Only a node that the caller's own code has made
(Hydra's ``cfg.model``, say) is resolved, by the rules of that code.
"""

import numbers
import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError

__all__ = ["MAX_DEPTH", "MAX_VALUES", "first_line", "plain", "refuse_interpolation"]

MAX_VALUES = 100_000
MAX_DEPTH = 32
# a whole number of more bits is no size of anything, and printing or converting it may take for ever
_MAX_BITS = 128
_MAX_KEY = 256
# paths are not longer; a layer pattern has a limit of its own
_MAX_TEXT = 4096
_LONG_TEXT_AT = "layers"


def plain(data: Any, file: object = None, at: tuple[str, ...] = ()) -> Any:
    """Copy ``data`` as dicts, lists, texts, numbers, booleans and ``None`` alone; errors name the ``file``, and the keys from ``at`` on."""
    root: list[Any] = [None]
    count = 0
    path: Any = None
    for key in at:
        path = (path, key)
    # where a value goes, and the keys that lead to it as a linked list, which is spelt out only for an error
    stack: list[tuple[Any, Any, Any, Any, int]] = [(data, root, 0, path, 0)]
    while stack:
        value, into, key, path, depth = stack.pop()
        if isinstance(value, DictConfig | ListConfig):
            value = _resolved(value, file, path)
        if isinstance(value, Mapping | list | tuple):
            count += len(value)
            if count > MAX_VALUES or depth >= MAX_DEPTH:
                what = f"{MAX_VALUES} values" if count > MAX_VALUES else f"{MAX_DEPTH} levels of nesting"
                raise ConfigError(f"{_where(file, path)}: has more than {what}. Is it a config?")
            if isinstance(value, Mapping):
                for name in value:
                    _check_key(name, file, path)
                items: Any = [(str.__str__(name), child) for name, child in value.items()]
                into[key] = dict.fromkeys(name for name, _ in items)
            else:
                into[key] = [None] * len(value)
                items = enumerate(value)
            children = [(child, into[key], name, (path, name), depth + 1) for name, child in items]
            stack += reversed(children)  # errors are about the first in the file
        else:
            into[key] = _scalar(value, file, path)
    return root[0]


def refuse_interpolation(text: str, where: str) -> None:
    """Raise a :class:`ConfigError` that names ``where`` if ``text`` holds a ``${``, escaped or not."""
    if "${" in text:
        raise ConfigError(
            f"{where}: holds '${{', an interpolation, and configs and overrides are read, never evaluated. Write the value itself; only a "
            "DictConfig that your own code hands over is resolved."
        )


def first_line(e: object) -> str:
    """The message of an exception, in one line without a full stop."""
    text = str(getattr(e, "msg", None) or e).strip()
    return text.splitlines()[0].rstrip(". ") if text else type(e).__name__


def _keys(path: Any) -> list[str]:
    keys = []
    while path is not None:
        path, key = path
        keys.append(str(key))
    return keys[::-1]


def _where(file: object, path: Any) -> str:
    dotted = ".".join(_keys(path)) or "config"
    return dotted if file is None else f"{file}: {dotted}"


def _check_key(key: Any, file: object, path: Any) -> None:
    if not isinstance(key, str):
        is_short = key is None or isinstance(key, float) or (isinstance(key, int) and key.bit_length() <= _MAX_BITS)
        shown = f"{key!r} ({type(key).__name__})" if is_short else f"of type {type(key).__name__}"
        raise ConfigError(f"{_where(file, path)}: key {shown} is no text. Write it in quotes, or correct it.")
    if len(key) > _MAX_KEY:
        raise ConfigError(
            f"{_where(file, path)}: key {key[:20]!r}... has {len(key)} characters, more than {_MAX_KEY}. Shorten it."
        )
    refuse_interpolation(key, _where(file, (path, key)))


def _scalar(value: Any, file: object, path: Any) -> Any:
    if value is None or type(value) in (bool, float):
        return value
    if isinstance(value, str):
        text = str.__str__(value)
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ConfigError(
                f"{_where(file, path)}: holds half a character (a lone surrogate), which no file can. Correct it."
            )
        refuse_interpolation(text, _where(file, path) if "${" in text else "")
        if len(text) > _MAX_TEXT and _keys(path)[:1] != [_LONG_TEXT_AT]:
            raise ConfigError(
                f"{_where(file, path)}: has {len(text)} characters, more than {_MAX_TEXT}, and begins with {text[:20]!r}. Shorten it."
            )
        return text
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if (bits := int(value).bit_length()) > _MAX_BITS:
            raise ConfigError(
                f"{_where(file, path)}: is a whole number of {bits} bits, more than {_MAX_BITS}. Choose a smaller one."
            )
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, os.PathLike) and isinstance(text := os.fspath(value), str):
        return _scalar(text, file, path)
    raise ConfigError(
        f"{_where(file, path)}: is a {type(value).__name__}, and a config holds texts, numbers, true, false, null, lists and mappings. "
        "Convert it."
    )


def _resolved(node: DictConfig | ListConfig, file: object, path: Any) -> Any:
    # a node inside a larger config may refer to its surroundings, which are lost once it is plain data
    try:
        return OmegaConf.to_container(node, resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as e:
        inner = getattr(e, "full_key", None)
        where = f"{_where(file, path)}.{inner}" if inner and path is not None else inner or _where(file, path)
        raise ConfigError(f"{where}: {first_line(e)}. Correct the value.") from None

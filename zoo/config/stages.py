"""The stages of a trunk: runs of residual blocks of one width. A text's trunk is one; between those of an image model the map shrinks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import ConfigError, nearest, shortened
from ..layout import compress, expand
from ..layout.pattern import MAX_BLOCKS

__all__ = ["Stage", "pattern_of", "stages_of", "written"]

_KEYS = ("layers", "d_model")
_MAX_STAGES = 64
_MAX_WIDTH = 2**20


class Stage(NamedTuple):
    """A run of blocks of one width, and the dotted key that says so."""

    d_model: int
    tokens: list[str]
    where: str


def stages_of(data: Mapping[str, Any]) -> list[Stage]:
    """Return the stages of a config, from its ``stages``, or the one that ``layers`` is.

    Raises:
        ConfigError: Both are given or neither is, or something in them is wrong.
    """
    listed, width = data.get("stages") or [], data["d_model"]
    if not listed:
        if data.get("layers") is None:
            raise ConfigError("layers: is missing. Say what stands where, by layers, or by stages of several widths.")
        return [Stage(width, expand(data["layers"]), "layers")]
    if data.get("layers") is not None:
        raise ConfigError("layers: is given beside stages, which have layers of their own. Leave one of the two out.")
    if len(listed) > _MAX_STAGES:
        raise ConfigError(f"stages: has {len(listed)} entries, more than {_MAX_STAGES}. Make fewer.")
    stages: list[Stage] = []
    for i, entry in enumerate(listed):
        where = f"stages.{i}"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}: found {shortened(entry)}, expected a mapping, such as {{layers: ss2d * 2}}.")
        for key in entry:
            if key not in _KEYS:
                raise ConfigError(f"{where}.{key}: unknown key.{nearest(key, _KEYS)} Keys: {', '.join(_KEYS)}.")
        if entry.get("layers") is None:
            raise ConfigError(f"{where}.layers: is missing. Say what stands there, as in {{layers: ss2d * 2}}.")
        width = _width(entry.get("d_model"), 2 * stages[-1].d_model if stages else width, f"{where}.d_model")
        stages.append(Stage(width, expand(entry["layers"], f"{where}.layers"), f"{where}.layers"))
    if (blocks := sum(len(stage.tokens) for stage in stages)) > MAX_BLOCKS:
        raise ConfigError(f"stages: stand for {blocks} blocks, more than {MAX_BLOCKS}. Shorten them.")
    return stages


def written(values: Mapping[str, Any], stages: list[Stage]) -> dict[str, Any]:
    """Return ``layers`` or ``stages`` as a resolved config has them; a width that only follows from others stays unsaid."""
    if not values.get("stages"):
        return {"layers": compress(stages[0].tokens)}
    entries = [
        {"layers": compress(stage.tokens)} | ({} if entry.get("d_model") is None else {"d_model": stage.d_model})
        for entry, stage in zip(values["stages"], stages, strict=True)
    ]
    return {"stages": entries}


def pattern_of(cfg: Mapping[str, Any]) -> str:
    """The pattern of a resolved config as one text, its stages with bars between them."""
    return " | ".join(stage["layers"] for stage in cfg.get("stages") or [cfg])


def _width(given: Any, default: int, where: str) -> int:
    width = default if given is None else given
    if type(width) is not int or not 1 <= width <= _MAX_WIDTH:
        whence = "" if given is not None else ", twice the stage before it,"
        raise ConfigError(f"{where}: is {shortened(width)}{whence} and no number from 1 to {_MAX_WIDTH}. Set it.")
    return width

"""The parts of data, and the names that they go by."""

from collections.abc import Mapping
from typing import TypeVar

from ..errors import SourceError

__all__ = ["SPLITS", "NoPart", "check_split", "part_called", "parts_called"]

T = TypeVar("T")


SPLITS = ("train", "val", "test")
_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
# few sets have both: the one that is there is what a model is judged by
_INSTEAD = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}


class NoPart(SourceError):
    """Data have parts, and neither the one that is asked for nor what stands in for it."""


def check_split(split: str, known: tuple[str, ...] = SPLITS) -> None:
    """Refuse a part that there is not, with a ValueError."""
    if split not in known:
        raise ValueError(f"split={split!r}: unknown. Known: {', '.join(known)}.")


def parts_called(there: Mapping[str, T]) -> dict[str, T]:
    """Return the things that are called as parts are, by the name that we have for the part."""
    lowered = {name.lower(): thing for name, thing in there.items()}
    return {part: lowered[name] for part, names in _NAMES.items() for name in names if name in lowered}


def part_called(there: Mapping[str, T], split: str, where: str) -> T:
    """Return the thing that is called as the part is, or as what stands in for it: ``test`` for a missing ``val``, and the reverse.

    Raises:
        NoPart: There is neither.
    """
    found = parts_called(there)
    for part in _INSTEAD[split]:
        if part in found:
            return found[part]
    raise NoPart(
        f"{where}: has no part {split!r}; its parts: {', '.join(sorted(there)) or 'none'}. Add it, or name other data."
    )

"""Facts about some data that are known before there is a model for them, and without reading the images."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .builtin import BUILT_IN
from .examples import pictures_of
from .pictures import ArrayPictures
from .splits import NoPart, parts_called

__all__ = ["Facts", "facts_of"]


class Facts(NamedTuple):
    """Facts about data.

    Attributes:
        classes: The names of the classes, by label.
        numbered: Whether labels are numbers only; there may be more classes than they show.
        shape: Height, width and channels, where all images have the same and are in memory.
        held_out: Whether a part of them is held out, ``val`` or else ``test``.
    """

    classes: list[str]
    numbered: bool
    shape: tuple[int, int, int] | None
    held_out: bool


def facts_of(data: Any, column: str | None = None) -> Facts:
    """Return what is known of data, as :func:`~hybridzoo.zoo.images.examples.images_from` takes them; it raises what that raises."""
    pictures = pictures_of(data, "train", None, column)
    shape = _shape(pictures.images.shape[1:]) if isinstance(pictures, ArrayPictures) else None
    return Facts(pictures.classes, pictures.numbered, shape, _is_held_out(data, pictures, column))


def _shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 2:
        return shape[0], shape[1], 1
    a, b, c = shape
    return (b, c, a) if c not in (1, 3) and a in (1, 3) else (a, b, c)


def _is_held_out(data: Any, train: Any, column: str | None) -> bool:
    if isinstance(data, str) and data in BUILT_IN:
        return True
    if isinstance(data, tuple | list):
        return False
    if isinstance(data, Mapping):
        return bool(parts_called(data).keys() & {"val", "test"})
    try:
        other = pictures_of(data, "val", train.classes, column)
    except NoPart:
        return False
    # data without parts are the same, whichever is asked for
    return other.identity() != train.identity()

"""Pictures with labels, wherever they lie: what every source of them offers, and arrays as one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import SourceError, nearest

__all__ = ["ArrayPictures", "FilePictures", "Pictures", "class_numbers", "pictures_in_arrays", "stamp"]


class Pictures(Protocol):
    """Pictures by number, each of one of several classes.

    Attributes:
        labels: The class of each, ``(n,)`` int64.
        classes: Their names.
        about: What there is to say of them, in lines.
        numbered: Whether labels are numbers only; there may be more classes than they show.
    """

    labels: np.ndarray
    classes: list[str]
    about: list[str]
    numbered: bool

    def content(self, number: int) -> bytes | np.ndarray:
        """Return one, as a file holds it or as numbers."""

    def name(self, number: int) -> str:
        """Return its name for messages."""

    def identity(self) -> tuple[str, list[Any]] | None:
        """Return where they lie, and what changes when what lies there does, without reading it; None where nobody knows."""


class FilePictures:
    """Pictures that are files."""

    numbered = False

    def __init__(self, files: Sequence[Path], labels: Sequence[int], classes: list[str], about: Sequence[str] = ()):
        self.files, self.labels, self.classes, self.about = files, np.asarray(labels, np.int64), classes, list(about)

    def content(self, number: int) -> bytes:
        """Return the bytes of a file."""
        return self.files[number].read_bytes()

    def name(self, number: int) -> str:
        """Return its path."""
        return str(self.files[number])

    def identity(self) -> tuple[str, list[Any]]:
        """Return the folder of all, and path, size and time of each."""
        return os.path.commonpath([os.path.abspath(file) for file in self.files]), [stamp(file) for file in self.files]


class ArrayPictures:
    """Pictures that are numbers in memory, ``(n, h, w)`` or ``(n, h, w, c)`` or ``(n, c, h, w)``."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, classes: list[str], name: str = "data", numbered: bool = False
    ):
        self.images, self.labels, self.classes, self.called, self.numbered = images, labels, classes, name, numbered
        self.about: list[str] = []

    def content(self, number: int) -> np.ndarray:
        """Return the numbers of one."""
        return self.images[number]

    def name(self, number: int) -> str:
        """Return its place."""
        return f"{self.called}, image {number}"

    def identity(self) -> None:
        """Return nothing: they are in memory, and read at once."""


def stamp(file: Path) -> list[Any]:
    """Return path, size and time of a file."""
    found = file.stat()
    return [os.path.abspath(file), found.st_size, found.st_mtime_ns]


def pictures_in_arrays(images: Any, labels: Any, classes: list[str] | None) -> ArrayPictures:
    """Return arrays or tensors as pictures; labels are numbers, or names.

    Raises:
        ValueError: Arrays of other shapes, of no image, or whose lengths differ.
    """
    images, labels = (np.asarray(x.detach().cpu() if hasattr(x, "detach") else x) for x in (images, labels))
    if images.ndim not in (3, 4) or labels.ndim != 1:
        raise ValueError(
            f"data: found images of shape {images.shape} and labels of shape {labels.shape}, expected (n, h, w), (n, h, w, c) or "
            "(n, c, h, w), and (n,)."
        )
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"data: holds {len(images)} images and {len(labels)} labels. There must be as many, and one at least."
        )
    numbers, names = class_numbers(labels, "data", classes)
    return ArrayPictures(images, numbers, names, numbered=classes is None and labels.dtype.kind in "iu")


def class_numbers(labels: np.ndarray, where: str, classes: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Return labels as numbers, ``(n,)`` int64, and the names of the classes.

    Args:
        labels: Numbers from 0, or names.
        where: Their place, for messages.
        classes: The names that are known already; without them numbers are their own names, and names count in alphabetical order.

    Raises:
        SourceError: A label that is none of the classes, or is not from 0 on.
    """
    if labels.dtype.kind in "iu":
        low, high = int(labels.min()), int(labels.max())
        names = classes or [str(i) for i in range(high + 1)]
        if low < 0 or high >= len(names):
            row, wrong = (int(labels.argmin()), low) if low < 0 else (int(labels.argmax()), high)
            raise SourceError(f"{where}: image {row} has the label {wrong}, and classes are 0 to {len(names) - 1}.")
        return labels.astype(np.int64), names
    if labels.dtype.kind not in "UO" or not all(isinstance(label, str) for label in labels):
        raise SourceError(f"{where}: labels are {labels.dtype}. Give numbers from 0, or names of classes.")
    names = classes or sorted(set(labels.tolist()))
    known = {name: i for i, name in enumerate(names)}
    for row, label in enumerate(labels.tolist()):
        if label not in known:
            raise SourceError(
                f"{where}: image {row} is of the class {label!r}, which the model does not know.{nearest(label, known)}"
            )
    return np.array([known[label] for label in labels.tolist()], dtype=np.int64), names

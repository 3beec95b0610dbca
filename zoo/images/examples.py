"""Images as examples for a training or an evaluation."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import SourceError, nearest
from ..named import check_there
from .augment import Augment, Augmented
from .builtin import BUILT_IN, builtin_set
from .folders import pictures_in_folder
from .pictures import ArrayPictures, Pictures, pictures_in_arrays
from .pixels import Pixels
from .scan import check_size, image_in, image_of, scanned
from .splits import check_split
from .tables import is_table, pictures_in_table

__all__ = ["ImageExamples", "ImageRows", "classes_of", "images_from", "pictures_of", "pixel_values"]


class ImageRows(Dataset):
    """All images of a source, by number, as pixels with their labels; those that are damaged cannot be read.

    Attributes:
        pictures: The images.
        pixels: What the model takes.
        augmented: How they are changed, or None: as in evaluation.
        kept: Those that are decoded already, by number.
        epoch: How often they were gone through; what is drawn depends on it.
    """

    def __init__(self, pictures: Pictures, pixels: Pixels, augmented: Augmented | None, kept: Any):
        self.pictures, self.pixels, self.augmented, self.kept = pictures, pixels, augmented, kept
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pictures.labels)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.read(number, self.epoch)

    def read(self, number: int, epoch: int) -> dict[str, Tensor]:
        """Return an image as it is in an epoch."""
        image = None if self.kept is None else self.kept[number]
        if image is None:
            image = image_of(self.pictures, number, self.pixels.channels)
        if self.augmented is None:
            made = torch.from_numpy(self.pixels.evaluated(image))
        else:
            made = self.augmented(image, number, epoch)
        return {"pixel_values": made, "labels": torch.tensor(self.pictures.labels[number])}


class ImageExamples(Dataset):
    """The images that can be used, ``{"pixel_values": (c, h, w) float32, "labels": int64, "row": int64}``, each with its number.

    Where images are changed, an index goes on behind the last of an epoch with the next one: a process that reads ahead need not be told
    of epochs.

    Attributes:
        rows: All images, by number.
        chosen: The numbers of those that are read, ``(n,)``.
        classes: The names of the classes, by label.
        digest: Of what all of them hold, of their order and their labels; how they are changed is an option of its own.
        about: What there is to say of them, in lines.
        draws: Whether images are changed, and other in every epoch.
    """

    def __init__(
        self, rows: ImageRows, chosen: np.ndarray, classes: Sequence[str], digest: str, about: Sequence[str] = ()
    ):
        self.rows, self.chosen, self.classes, self.digest, self.about = rows, chosen, list(classes), digest, list(about)
        self.draws = rows.augmented is not None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, index = divmod(index, len(self))
        number = int(self.chosen[index])
        return self.rows.read(number, epoch or self.epoch) | {"row": torch.tensor(number)}

    @property
    def labels(self) -> np.ndarray:
        """Labels of them, ``(n,)`` int64."""
        return self.rows.pictures.labels[self.chosen]

    @property
    def epoch(self) -> int:
        """Number of the pass."""
        return self.rows.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.rows.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Note which pass begins."""
        self.epoch = epoch

    def name(self, index: int) -> str:
        """Return the name of an image, a path where it has one."""
        return self.rows.pictures.name(int(self.chosen[index]))


def images_from(
    data: Any, cfg: Any, split: str = "train", *, augment: Augment | None = None, seed: int = 0,
    classes: Sequence[str] | None = None, column: str | None = None, damaged: str = "stop",
) -> ImageExamples:  # fmt: skip
    """Return the images in some data as examples for a model.

    Args:
        data: A folder of class folders (``root/cat/1.png``, or with ``train`` and ``val`` in front), one that ``datasets`` has saved, a
            parquet file or a folder of them, the name of a built-in set (``digits``, ``mnist-5k``; a folder that is called so is
            ``./digits``), a ``datasets.Dataset``, or a pair of arrays ``(images, labels)``: uint8, uint16 or float in [0, 1].
        cfg: The config of the model: ``in_channels``, ``image_size``, ``n_classes``, ``labels``, and how images are resized and normalised.
        split: The part of the data, where it has parts: ``train``, ``val`` or ``test``; of a built-in set also ``train+val``.
        augment: How images are changed in training; None: they are as in evaluation.
        seed: Of what is drawn.
        classes: The names of the classes in the order of their labels; without them the config's ``labels``, else those of the data.
        column: The images' name in a table; without it the only one there is.
        damaged: ``stop`` or ``skip``: what to do about files that are no whole images.

    Raises:
        FileNotFoundError: Nothing is there.
        ModuleNotFoundError: A package is missing, and the message says which.
        ValueError: What cannot be read, or does not fit the model; the message names it.
    """
    pixels = Pixels.of(cfg)
    named = cfg.labels if classes is None else classes
    pictures = pictures_of(data, split, None if named is None else list(named), column)
    there = len(pictures.classes)
    if pictures.numbered and there < cfg.n_classes:
        pictures.classes += map(str, range(there, cfg.n_classes))
    elif there != cfg.n_classes:
        raise ValueError(
            f"data: has {there} classes, and the model {cfg.n_classes} (n_classes). Build it with n_classes={there}."
        )
    digits = isinstance(data, str) and data in BUILT_IN
    how = None if augment is None else Augmented(augment.resolved(pixels.size, digits), pixels, seed)
    scan = scanned(pictures, pixels, damaged)
    rows = ImageRows(pictures, pixels, how, scan.kept)
    return ImageExamples(rows, scan.chosen, pictures.classes, scan.digest, scan.about)


def classes_of(data: Any, split: str = "train", column: str | None = None) -> list[str]:
    """Return the names of the classes of some data, as :func:`images_from` takes it, before there is a model and without reading images."""
    return pictures_of(data, split, None, column).classes


def pixel_values(image: str | os.PathLike[str] | np.ndarray, cfg: Any, name: str = "image") -> Tensor:
    """Return the pixels of one image, a file or numbers ``(h, w[, c])``, as a model takes them: ``(c, h, w)`` float32.

    Numbers go by ``name`` in messages.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedImage: It is no whole image, or none that the model can take.
    """
    pixels = Pixels.of(cfg)
    content: Any = image
    if isinstance(image, str | os.PathLike):
        name, content = str(image), Path(image).read_bytes()
    found = image_in(content, name, pixels.channels)
    check_size(found, name, pixels)
    return torch.from_numpy(pixels.evaluated(found))


def pictures_of(data: Any, split: str, classes: list[str] | None, column: str | None) -> Pictures:
    """Return the pictures of a part of some data, which are not read; arguments as of :func:`images_from`."""
    if isinstance(data, str) and data in BUILT_IN:
        images, labels, names = builtin_set(data, split)
        if classes is not None and classes != names:
            raise SourceError(
                f"{data}: has the classes {', '.join(names)}, and the model {', '.join(classes[:10])} (labels)."
            )
        return ArrayPictures(images, labels, names, data)
    check_split(split)
    if isinstance(data, tuple | list) and len(data) == 2:
        images, labels = data
        return pictures_in_arrays(images, labels, classes)
    if not isinstance(data, str | os.PathLike):
        return pictures_in_table(data, split, classes, column)
    path = Path(data)
    sets = f"a built-in set: {', '.join(BUILT_IN)}.{nearest(data, BUILT_IN)}"
    check_there(path, f"Give a folder of class folders, a parquet file, a folder saved by datasets, or {sets}")
    if is_table(path):
        return pictures_in_table(path, split, classes, column)
    if not path.is_dir():
        raise SourceError(
            f"{path}: is a file. Give a folder of class folders, root/cat/1.png, say, or a .parquet file; zoo predict takes single images."
        )
    return pictures_in_folder(path, split, classes)

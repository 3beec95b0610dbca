"""Classes that an image model takes images for."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import SourceError
from ..named import check_there
from .damaged import DamagedImage
from .decode import SUFFIXES
from .examples import pixel_values
from .folders import images_in
from .opened import check_head, evaluating, image_model

__all__ = ["files_of", "predict", "predictions"]

_AT_ONCE = 32
Image = str | os.PathLike[str] | np.ndarray


def predict(model: Any, images: Image | Iterable[Image], top: int = 5, *, device: Any = None) -> list[dict[str, Any]]:
    """Return the likeliest classes of images.

    Args:
        model: A saved folder, a hub id, the name of a config (untrained), or a model.
        images: A file, a folder of files, an array ``(h, w)`` or ``(h, w, c)`` of uint8 or of floats in [0, 1], or several of these.
        top: How many classes.
        device: A GPU by default, if there is one; a model stays where it is.

    Returns:
        Of each image ``{"image": name, "classes": [{"label": number, "name": text, "probability": p}, ...]}``, the likeliest first.

    Raises:
        DamagedImage: A file is no whole image; the message names it.
        ValueError: The model is none of images, or has no head.
    """
    return list(predictions(image_model(model, device), files_of(images), top))


def predictions(
    model: Any, images: Sequence[Image], top: int = 5, errors: list[DamagedImage] | None = None
) -> Iterator[dict[str, Any]]:
    """As :func:`predict`, one after another; images that are damaged are added to ``errors`` and left out, where there is such a list."""
    check_head(model)
    n = model.cfg.n_classes
    if top < 1:
        raise ValueError(f"top={top}: is no number of classes. Give 1 to {n}.")
    names = list(model.cfg.labels or map(str, range(n)))
    for start in range(0, len(images), _AT_ONCE):
        read = []
        for number, image in enumerate(images[start : start + _AT_ONCE], start):
            try:
                # an array has no name but its place
                name = f"image {number}" if isinstance(image, np.ndarray) else str(image)
                read.append((name, pixel_values(image, model.cfg, name)))
            except DamagedImage as e:
                if errors is None:
                    raise
                errors.append(e)
        if not read:
            continue
        x = torch.stack([pixels for _, pixels in read]).to(model.some_weight().device)
        with evaluating(model):
            found = model(x).logits.float().softmax(-1).topk(min(top, n))
        for (name, _), ps, labels in zip(read, found.values.tolist(), found.indices.tolist(), strict=True):
            classes = [{"label": i, "name": names[i], "probability": p} for i, p in zip(labels, ps, strict=True)]
            yield {"image": name, "classes": classes}


def files_of(images: Image | Iterable[Image]) -> list[Image]:
    """Return images one by one, those in folders by their paths.

    Raises:
        FileNotFoundError: A file or folder is not there.
        SourceError: A folder holds no images.
    """
    if isinstance(images, str | os.PathLike | np.ndarray) or not isinstance(images, Iterable):
        images = [images]
    found: list[Image] = []
    for image in images:
        if isinstance(image, np.ndarray):
            found.append(image)
            continue
        if not isinstance(image, str | os.PathLike):
            raise ValueError(
                f"images: found {type(image).__name__}, expected a file, a folder, or an array, (h, w) or (h, w, c). np.asarray(...) of "
                "a Pillow image is one."
            )
        path = Path(image)
        check_there(path, "Name an image, or a folder of some.")
        if not path.is_dir():
            found.append(path)
            continue
        if not (inside := images_in(path)):
            raise SourceError(f"{path}: holds no image (a file that ends in {', '.join(SUFFIXES)}).")
        found += inside
    return found

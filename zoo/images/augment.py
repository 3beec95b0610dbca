"""Pictures as training sees them: another part of each, mirrored or changed, drawn anew in every epoch.

What is drawn follows from the seed, the epoch and the number of the picture alone: it is the same whatever process reads it, and after a
resumption.
"""

import contextlib
import dataclasses
import math
import random
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pixels import PHOTO, Pixels, pillow
from .timm_parts import timm_part

__all__ = ["Augment", "Augmented", "drawing"]

_CROPS = ("auto", "resized", "shift", "none")
_TINY = 16
# Inception's, as every recipe since has them (arXiv:1409.4842, section 6)
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Changes of pictures in training.

    Attributes:
        crop: ``resized``: a part of 8 to 100 % of the area, brought to size (for photos); ``shift``: an eighth of the size to any side,
            black where nothing is, as for CIFAR (arXiv:1512.03385, section 4.2); ``none``; or ``auto``: ``resized`` for models of 64
            pixels and more, ``none`` for those of less than 16, where a pixel is much (scikit-learn's digits are the worse for being
            shifted), and ``shift`` between them.
        flip: Share of the pictures that are mirrored, left for right; without it half, and none of a built-in set, which are digits.
        rand_augment: timm's spelling of a RandAugment (arXiv:1909.13719), ``rand-m9-mstd0.5-inc1`` say; needs timm, and 1 or 3 channels.
        erasing: Share of the pictures of which a part is replaced by noise (arXiv:1708.04896); needs timm.

    Raises:
        ValueError: There is no such crop, or a share is none.
    """

    crop: str = "auto"
    flip: float | None = None
    rand_augment: str | None = None
    erasing: float = 0.0

    def __post_init__(self):
        if self.crop not in _CROPS:
            raise ValueError(f"crop={self.crop!r}: unknown. Known: {', '.join(_CROPS)}.")
        for name in ("flip", "erasing"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: is no share. Give a number from 0 to 1.")

    def resolved(self, size: int, digits: bool) -> "Augment":
        """Return this with what is left open decided, for a model of ``size`` pixels and pictures that may be digits."""
        auto = "resized" if size >= PHOTO else "shift" if size >= _TINY else "none"
        crop = auto if self.crop == "auto" else self.crop
        flip = (0.0 if digits else 0.5) if self.flip is None else self.flip
        return dataclasses.replace(self, crop=crop, flip=flip)


class Augmented:
    """The way from a picture to pixels in training.

    Args:
        augment: Resolved.
        pixels: What the model takes.
        seed: Of the training.

    Raises:
        ModuleNotFoundError: timm is needed, and not installed.
        ValueError: timm does not know the RandAugment, or the model's channels are no colours.
    """

    def __init__(self, augment: Augment, pixels: Pixels, seed: int):
        self.augment, self.pixels, self.seed = augment, pixels, seed
        if augment.rand_augment and pixels.channels not in (1, 3):
            raise ValueError(
                f"rand_augment: changes colours, and the model takes {pixels.channels} channels. Leave it out."
            )
        _ = self._policy, self._eraser

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("augment", "pixels", "seed")}  # timm's are made anew

    def __call__(self, image: np.ndarray, number: int, epoch: int) -> Tensor:
        """Return picture ``number``, ``(h, w, c)``, as it is in an epoch: ``(c, size, size)`` float32, normalised."""
        key = (self.seed, epoch, number)
        draw = np.random.default_rng(key)
        image = self._cropped(image, draw)
        if draw.random() < (self.augment.flip or 0):
            image = image[:, ::-1]
        if self._policy is None and self._eraser is None:
            return torch.from_numpy(self.pixels.normalised(image))
        with drawing(*key):
            if self._policy is not None:
                image = _through_pillow(self._policy, image)
            made = torch.from_numpy(self.pixels.normalised(image))
            return made if self._eraser is None else self._eraser(made)

    def _cropped(self, image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        size = self.pixels.size
        if self.augment.crop == "resized":
            return self.pixels.resized(image[_part(image.shape[0], image.shape[1], draw)], size, size)
        image = self.pixels.fitted(image)
        if self.augment.crop == "shift":
            by = max(1, size // 8)
            down, right = draw.integers(-by, by + 1, 2).tolist()
            whole, image = image, np.zeros_like(image)
            image[_onto(down, size), _onto(right, size)] = whole[_onto(-down, size), _onto(-right, size)]
        return image

    @cached_property
    def _policy(self) -> Any:
        if not self.augment.rand_augment:
            return None
        fill = [round(255 * mean) for mean in self.pixels.mean]
        given = {"translate_const": int(0.45 * self.pixels.size), "img_mean": tuple(fill) if len(fill) > 1 else fill[0]}
        try:
            return timm_part("auto_augment").rand_augment_transform(self.augment.rand_augment, given)
        except (AssertionError, ValueError, KeyError, IndexError) as e:
            raise ValueError(
                f"rand_augment={self.augment.rand_augment!r}: is none that timm knows. An example: rand-m9-mstd0.5-inc1."
            ) from e

    @cached_property
    def _eraser(self) -> Any:
        if not self.augment.erasing:
            return None
        return timm_part("random_erasing").RandomErasing(self.augment.erasing, mode="pixel", device="cpu")


@contextlib.contextmanager
def drawing(*key: int) -> Iterator[None]:
    """Let what draws from the generators of Python, NumPy and torch's CPU draw what follows from a key, and put these back."""
    words = np.random.SeedSequence(key).generate_state(3)
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.default_generator.manual_seed(int(words[2]))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def _part(h: int, w: int, draw: np.random.Generator) -> tuple[slice, slice]:
    """Draw a part of a picture; where none fits, it is the middle, of as extreme a shape as may be."""
    for _ in range(_TRIES):
        area = h * w * draw.uniform(*_AREA)
        ratio = math.exp(draw.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        part_h, part_w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < part_h <= h and 0 < part_w <= w:
            top, left = int(draw.integers(0, h - part_h + 1)), int(draw.integers(0, w - part_w + 1))
            return slice(top, top + part_h), slice(left, left + part_w)
    part_h, part_w = min(h, max(1, round(w / _RATIO[0]))), min(w, max(1, round(h * _RATIO[1])))
    top, left = (h - part_h) // 2, (w - part_w) // 2
    return slice(top, top + part_h), slice(left, left + part_w)


def _onto(by: int, size: int) -> slice:
    """Return the places that are taken once what is ``size`` long has moved by so many."""
    return slice(max(0, by), size + min(0, by))


def _through_pillow(policy: Any, image: np.ndarray) -> np.ndarray:
    """Change a picture by what knows Pillow's images, which have 8 bits."""
    if image.dtype != np.uint8:
        image = np.round(image * 255).astype(np.uint8)
    changed = np.asarray(
        policy(pillow().fromarray(np.ascontiguousarray(image.squeeze(2) if image.shape[2] == 1 else image)))
    )
    return changed.reshape(image.shape)

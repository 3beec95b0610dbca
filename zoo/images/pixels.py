"""Pixels as a model takes them: size, channels and normalisation, and the way from a picture to them in evaluation.

The shorter side becomes ``image_size / crop``, the middle is cut out, values become [0, 1] and are normalised. That is what transformers'
``BitImageProcessor`` does, and :func:`processor_config` is its configuration.
"""

import dataclasses
import math
from functools import cached_property
from typing import Any

import numpy as np

from ..config.images import INTERPOLATIONS
from ..errors import ConfigError
from ..lazily import needed
from .damaged import DamagedImage

__all__ = ["PHOTO", "Pixels", "pillow", "processor_config"]

# pixels from which on an image is taken for a photo: an eighth cut from one is margin; from a digit of 28 pixels it is part of the digit
PHOTO = 64
# Pillow's own bound for pictures, which a very long one would exceed once its shorter side is brought to size
_MOST_PIXELS = 89_478_485


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Size, channels and numbers of what an image model takes.

    Attributes:
        channels: 1 for grey, 3 for colour, or another number of bands.
        size: Height and width.
        mean: Of each channel, of values in [0, 1].
        std: Of each channel.
        shorter: Pixels of the shorter side before the middle is cut out.
        interpolation: The filter of resizing.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shorter: int
    interpolation: str = "bicubic"

    @classmethod
    def of(cls, cfg: Any) -> "Pixels":
        """Return what the config of an image model says.

        ``image_mean`` and ``image_std`` may hold one number for all channels; those of red, green and blue are averaged for a model of
        another number of channels. Images of less than 64 pixels are taken whole, whatever ``crop`` says.

        Raises:
            ConfigError: Values that do not fit ``in_channels``.
        """
        size, channels = int(cfg.image_size), int(cfg.in_channels)
        crop = 1.0 if size < PHOTO else float(cfg.crop)
        mean, std = (_per_channel(key, cfg[key], channels) for key in ("image_mean", "image_std"))
        # half a millionth for quotients such as 224 / 0.875, which are whole and may come out below
        return cls(channels, size, mean, std, math.floor(size / crop + 5e-7), cfg.interpolation)

    def evaluated(self, image: np.ndarray) -> np.ndarray:
        """Return the pixels of a picture, ``(h, w, channels)`` uint8 or float32 in [0, 1], as ``(channels, size, size)`` float32."""
        return self.normalised(self.fitted(image))

    def fitted(self, image: np.ndarray) -> np.ndarray:
        """Return the middle of a picture in the size of the model, ``(size, size, channels)``."""
        (h, w), size = self.resized_size(*image.shape[:2]), self.size
        image = self.resized(image, h, w)
        top, left = (h - size) // 2, (w - size) // 2
        return image[top : top + size, left : left + size]

    def resized_size(self, h: int, w: int) -> tuple[int, int]:
        """Return height and width once the shorter side is brought to size.

        Raises:
            DamagedImage: The longer one would then be too long.
        """
        longer = int(self.shorter * max(h, w) / min(h, w))
        if self.shorter * longer > _MOST_PIXELS:
            raise DamagedImage(
                f"is {h} x {w} pixels, and would be {self.shorter} x {longer} with the shorter side brought to size: cut it."
            )
        return (longer, self.shorter) if w <= h else (self.shorter, longer)

    def resized(self, image: np.ndarray, h: int, w: int) -> np.ndarray:
        """Return a picture as ``h`` x ``w`` pixels."""
        if image.shape[:2] == (h, w):
            return image
        library, kind = pillow(), INTERPOLATIONS[self.interpolation]
        if image.dtype == np.uint8 and image.shape[2] == 3:
            return np.asarray(library.fromarray(np.ascontiguousarray(image)).resize((w, h), kind))
        # band by band: Pillow takes four for colour and transparency, and has no float colours
        bands = [np.ascontiguousarray(image[:, :, band]) for band in range(image.shape[2])]
        made = np.stack([np.asarray(library.fromarray(band).resize((w, h), kind)) for band in bands], axis=2)
        # a cubic filter overshoots, which 8 bits cut off by themselves
        return made if made.dtype == np.uint8 else np.clip(made, 0, 1)

    def normalised(self, image: np.ndarray) -> np.ndarray:
        """Return ``(h, w, channels)`` uint8, or float32 in [0, 1], as normalised ``(channels, h, w)`` float32."""
        if image.dtype != np.uint8:
            mean, std = (np.array(x, dtype=np.float32)[:, None, None] for x in (self.mean, self.std))
            return (np.ascontiguousarray(image.transpose(2, 0, 1)) - mean) / std
        made = np.empty((self.channels, *image.shape[:2]), dtype=np.float32)
        for channel, values in enumerate(self._values):
            np.take(values, image[:, :, channel], out=made[channel], mode="clip")  # of all modes the fastest
        return made

    @cached_property
    def _values(self) -> np.ndarray:
        """The pixels that the 256 values of each channel become, ``(channels, 256)``."""
        unit = (np.arange(256) * (1 / 255)).astype(np.float32)
        return np.stack([(unit - np.float32(m)) / np.float32(s) for m, s in zip(self.mean, self.std, strict=True)])


def processor_config(cfg: Any) -> dict[str, Any]:
    """Return the content of ``preprocessor_config.json``, which lies beside the weights of an image model.

    ``AutoImageProcessor.from_pretrained(folder)`` makes of it transformers' ``BitImageProcessor``, whose pixels are those of
    :meth:`Pixels.evaluated`. It does not turn photos that a camera held upright, nor lay what is transparent on white, and takes a model
    of one channel grey images alone.
    """
    pixels = Pixels.of(cfg)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": pixels.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": pixels.shorter},
        "resample": INTERPOLATIONS[pixels.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": pixels.size, "width": pixels.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }


def pillow() -> Any:
    """Return the module ``PIL.Image``."""
    return needed("PIL.Image", "reads and resizes images", "'hybridzoo[vision]'")


def _per_channel(key: str, values: Any, channels: int) -> tuple[float, ...]:
    found = [float(value) for value in values]
    if len(found) == channels:
        return tuple(found)
    if len(found) not in (1, 3):
        raise ConfigError(
            f"{key}: holds {len(found)} numbers for {channels} channels. Give one for each, or one for all."
        )
    return (sum(found) / len(found),) * channels

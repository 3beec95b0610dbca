"""A picture's bytes, or its numbers, as an array of the channels that a model takes.

Photos that a camera held upright are turned (EXIF), what is transparent is laid on white, and of an animation the first image is taken.
Grey of 16 bits stays as fine as it is, as floats; of colours and transparency of 16 bits Pillow keeps the upper 8. A profile of colours
(ICC) is not applied, as in the data that published models have seen.
"""

import io
from typing import Any

import numpy as np

from ..config.plain import first_line
from .damaged import DamagedImage
from .pixels import pillow

__all__ = ["SUFFIXES", "as_channels", "decoded", "unit"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy")
_NPY = b"\x93NUMPY"


def decoded(content: bytes, name: str, channels: int) -> np.ndarray:
    """Return the image in the bytes of a file as ``(h, w, channels)``, uint8 or float32 in [0, 1].

    Raises:
        DamagedImage: Bytes that hold no whole image, one of too many pixels, or one of other channels.
    """
    if not content:
        raise DamagedImage(f"{name}: is empty (0 bytes).")
    if content.startswith(_NPY):
        try:
            array = np.load(io.BytesIO(content), allow_pickle=False)
        except Exception as e:  # a damaged header ends in whatever meets it
            raise DamagedImage(f"{name}: is not a whole NumPy array ({first_line(e)}).") from e
        return as_channels(array, name, channels)
    library = pillow()
    from PIL import UnidentifiedImageError

    try:
        with library.open(io.BytesIO(content)) as image:
            most = library.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise library.DecompressionBombError(f"{image.height} x {image.width} pixels, more than {most:,}")
            return _of_pillow(image, name, channels)
    except DamagedImage:
        raise
    except UnidentifiedImageError as e:
        raise DamagedImage(f"{name}: is no image that Pillow knows.") from e
    except library.DecompressionBombError as e:
        raise DamagedImage(f"{name}: is too large to be trusted ({first_line(e)}). Make it smaller.") from e
    except MemoryError:
        raise
    except Exception as e:  # what is damaged ends in whatever the part of Pillow that meets it raises
        raise DamagedImage(f"{name}: is damaged ({first_line(e)}).") from e


def as_channels(array: np.ndarray, name: str, channels: int) -> np.ndarray:
    """Return numbers as ``(h, w, channels)``, uint8 or float32 in [0, 1].

    Args:
        array: ``(h, w)``, ``(h, w, c)``, or ``(c, h, w)`` where the last axis can be no channels; bool, uint8, uint16, or float in [0, 1].
        name: Of the picture, for messages.
        channels: Of the model. Grey is repeated for three, and three become grey as ITU-R BT.601 weighs them.

    Raises:
        DamagedImage: Other numbers, shapes or channels.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise DamagedImage(f"{name}: has the shape {array.shape}. An image is (h, w), (h, w, c) or (c, h, w).")
    given = {1, 3, channels}
    if array.shape[2] not in given and array.shape[0] in given:
        array = np.moveaxis(array, 0, 2)
    array = unit(array, name)
    c = array.shape[2]
    if c == channels:
        return array
    if c == 1 and channels == 3:
        return np.repeat(array, 3, axis=2)
    if c == 3 and channels == 1:
        return _grey(array)
    raise DamagedImage(f"{name}: has {c} channels, and the model takes {channels} (in_channels).")


def unit(array: np.ndarray, name: str) -> np.ndarray:
    """Return numbers as uint8, or as float32 in [0, 1]."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return (array / 65535).astype(np.float32)
    if array.dtype.kind != "f":
        raise DamagedImage(f"{name}: holds {array.dtype}. Images are bool, uint8, uint16, or float in [0, 1].")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):  # which not-a-number is neither
        raise DamagedImage(
            f"{name}: holds {low:g} to {high:g}. Floats are in [0, 1]; divide by the largest there can be."
        )
    return array.astype(np.float32)


def _grey(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        return (array @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[:, :, None]
    # Pillow's fixed-point weights, so that an array and the file of it are the same
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)
    return ((array @ weights + 0x8000) >> 16).astype(np.uint8)[:, :, None]


def _of_pillow(image: Any, name: str, channels: int) -> np.ndarray:
    from PIL import ImageOps

    if channels not in (1, 3):
        return as_channels(_bands(image, channels), name, channels)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return as_channels(_deep(image), name, channels)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = pillow().alpha_composite(pillow().new("RGBA", image.size, "white"), image).convert("RGB")
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array.reshape(image.height, image.width, channels)


def _deep(image: Any) -> np.ndarray:
    """Numbers of more than 8 bits; those of 32 are taken for 16 where they are that small."""
    array = np.asarray(image)
    if image.mode == "I" and array.min() >= 0 and array.max() <= 65535:
        return array.astype(np.uint16)
    return array


def _bands(image: Any, channels: int) -> np.ndarray:
    """The bands of a file: its images, where there are as many, or those of one."""
    if getattr(image, "n_frames", 1) != channels:
        return _deep(image)
    frames = []
    for frame in range(channels):
        image.seek(frame)
        frames.append(_deep(image))
    return np.stack(frames, axis=2) if frames[0].ndim == 2 else np.concatenate(frames, axis=2)

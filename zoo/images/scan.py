"""A look at all pictures before the first step: which are damaged, what tells them from others, and whether they fit into memory."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ..errors import SourceError
from ..terminal import counted, progress_bar, stderr
from .damaged import DAMAGED, DamagedImage, refusal
from .decode import as_channels, decoded
from .pictures import Pictures
from .pixels import Pixels

__all__ = ["KEPT", "Scan", "check_size", "image_in", "image_of", "scanned"]

# the most bytes of decoded images that stay in memory; more are decoded whenever they are read
KEPT = 1 << 28
_AT_ONCE, _SILENT_SECONDS = 1024, 2.0


class Scan(NamedTuple):
    """Facts about pictures that were looked at.

    Attributes:
        chosen: The numbers of the pictures that can be used, ``(n,)``.
        kept: All pictures, decoded, by number, or None where they are too many.
        digest: Of the content of all pictures, their order, their labels and the names of these.
        about: What there is to say, in lines.
    """

    chosen: np.ndarray
    kept: list[np.ndarray | None] | None
    digest: str
    about: list[str]


def scanned(pictures: Pictures, pixels: Pixels, damaged: str) -> Scan:
    """Look at all pictures, on all cores.

    Args:
        pictures: To be looked at.
        pixels: What the model takes.
        damaged: ``stop``, or ``skip``: what to do about pictures that cannot be used.

    Raises:
        DamagedImage: There are some (the first are named), or no others.
    """
    if damaged not in DAMAGED:
        raise ValueError(f"damaged={damaged!r}: unknown. Known: {', '.join(DAMAGED)}.")
    n = len(pictures.labels)
    total = hashlib.sha256(json.dumps([pictures.classes, pictures.labels.tolist(), pixels.channels]).encode())
    found: list[DamagedImage] = []
    kept: list[np.ndarray | None] | None = []
    chosen, size = [], 0
    for number, (digest, image) in enumerate(_side_by_side(lambda i: _look(pictures, pixels, i), n)):
        total.update(digest)
        if isinstance(image, DamagedImage):
            found.append(image)
        else:
            chosen.append(number)
            size += image.nbytes
        if kept is not None:
            kept.append(None if isinstance(image, DamagedImage) else image)
            kept = kept if size <= KEPT else None
    if found and (damaged == "stop" or not chosen):
        raise refusal(found, n)
    about = [f"{counted(len(chosen), 'image')} of {len(pictures.classes):,} classes"]
    about[0] += f", {size / 2**20:,.1f} MiB in memory" if kept is not None else ", decoded whenever they are read"
    if found:
        named = " ".join(str(one) for one in found[:3]) + (" ..." if len(found) > 3 else "")
        about.append(f"{counted(len(found), 'image')} left out: {named}")
    return Scan(np.array(chosen, dtype=np.int64), kept, total.hexdigest(), [*about, *pictures.about])


def image_of(pictures: Pictures, number: int, channels: int) -> np.ndarray:
    """Return a picture as ``(h, w, channels)``, uint8 or float32 in [0, 1]; one that is damaged is a :class:`DamagedImage`."""
    return image_in(pictures.content(number), pictures.name(number), channels)


def image_in(content: bytes | np.ndarray, name: str, channels: int) -> np.ndarray:
    """As :func:`image_of`, of the bytes of a file or of numbers."""
    if isinstance(content, np.ndarray):
        return as_channels(content, name, channels)
    return decoded(content, name, channels)


def _look(pictures: Pictures, pixels: Pixels, number: int) -> tuple[bytes, np.ndarray | DamagedImage]:
    """Return the digest of a picture, and the picture, or why it cannot be used."""
    name = pictures.name(number)
    try:
        content = pictures.content(number)
    except OSError as e:
        raise SourceError(f"{name}: cannot be read ({e.strerror or e}).") from e
    if isinstance(content, np.ndarray):
        given = f"{content.shape} {content.dtype}".encode() + np.ascontiguousarray(content).tobytes()
    else:
        given = content
    digest = hashlib.sha256(given).digest()
    try:
        image = image_in(content, name, pixels.channels)
        check_size(image, name, pixels)
    except DamagedImage as e:
        return digest, e
    return digest, image


def check_size(image: np.ndarray, name: str, pixels: Pixels) -> None:
    """Refuse a picture whose sides differ too much to be brought to the size of a model."""
    try:
        pixels.resized_size(*image.shape[:2])
    except DamagedImage as e:
        raise DamagedImage(f"{name}: {e}") from None


def _side_by_side(look: Callable[[int], Any], n: int) -> Iterator[Any]:
    """Give ``look`` of all numbers below ``n``, in order; Pillow and hashlib let go of Python's lock."""
    begun, bar = time.monotonic(), None
    console = stderr()
    try:
        with ThreadPoolExecutor(min(n, os.cpu_count() or 1, 16)) as pool:
            for start in range(0, n, _AT_ONCE):
                for i, found in enumerate(pool.map(look, range(start, min(n, start + _AT_ONCE))), start + 1):
                    yield found
                    if bar is None and console.is_terminal and time.monotonic() - begun > _SILENT_SECONDS:
                        bar = progress_bar(console, transient=True)
                        bar.add_task("reading images", total=n, note="")
                        bar.start()
                    if bar is not None:
                        bar.update(bar.task_ids[0], completed=i)
    finally:
        if bar is not None:
            bar.stop()

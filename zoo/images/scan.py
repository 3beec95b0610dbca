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
from ..terminal import counted, counting
from .damaged import DAMAGED, DamagedImage, refusal
from .decode import as_channels, decoded
from .pictures import Pictures
from .pixels import Pixels
from .remembered import remembered

__all__ = ["KEPT", "MANY", "Scan", "check_size", "image_in", "image_of", "scanned"]

# the most bytes of decoded images that stay in memory; more are decoded whenever they are read
KEPT = 1 << 28
# of as many pictures it is remembered what was seen; fewer are looked at faster than that is written
MANY = 10_000
_AT_ONCE = 1024


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


class Seen(NamedTuple):
    """A look at all pictures, as it is remembered: their digest, their bytes, and what is wrong with those that are damaged, by number."""

    digest: str
    size: int
    damaged: dict[str, str]


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
    n, begun = len(pictures.labels), time.monotonic()
    looks: list[tuple[Seen, list[np.ndarray | None] | None]] = []

    def look() -> dict[str, Any]:
        looks.append(_look_at_all(pictures, pixels))
        return looks[-1][0]._asdict()

    if n < MANY:
        look()
    elif (facts := remembered(pictures, pixels, look)) is not None:
        known = Seen(**facts)
        if not looks and known.size <= KEPT:  # they are wanted as well
            look()
        elif not looks:
            looks.append((known, None))
    seen, kept = looks[-1]
    found = [DamagedImage(text) for text in seen.damaged.values()]
    if found and (damaged == "stop" or len(found) == n):
        raise refusal(found, n)
    chosen = np.setdiff1d(np.arange(n), [int(number) for number in seen.damaged])
    about = [f"{counted(len(chosen), 'image')} of {len(pictures.classes):,} classes"]
    about[0] += f", {seen.size / 2**20:,.1f} MiB in memory" if kept is not None else ", decoded whenever they are read"
    if n >= MANY:
        about[0] += f"; looked at in {time.monotonic() - begun:.1f} s"
    if found:
        named = " ".join(str(one) for one in found[:3]) + (" ..." if len(found) > 3 else "")
        about.append(f"{counted(len(found), 'image')} left out: {named}")
    return Scan(chosen, kept, seen.digest, [*about, *pictures.about])


def _look_at_all(pictures: Pictures, pixels: Pixels) -> tuple[Seen, list[np.ndarray | None] | None]:
    """Look at all pictures, and keep them while they fit."""
    labels = pictures.labels.tolist()
    total = hashlib.sha256(json.dumps([pictures.classes, labels, pixels.channels]).encode())
    damaged: dict[str, str] = {}
    kept: list[np.ndarray | None] | None = []
    size = 0
    for number, (digest, image) in enumerate(_side_by_side(lambda i: _look(pictures, pixels, i), len(labels))):
        total.update(digest)
        whole = not isinstance(image, DamagedImage)
        if whole:
            size += image.nbytes
        else:
            damaged[str(number)] = str(image)
        if kept is not None:
            kept.append(image if whole else None)
            kept = kept if size <= KEPT else None
    return Seen(total.hexdigest(), size, damaged), kept


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
    with counting("reading images", n) as done, ThreadPoolExecutor(min(n, os.cpu_count() or 1, 16)) as pool:
        for start in range(0, n, _AT_ONCE):
            for found in pool.map(look, range(start, min(n, start + _AT_ONCE))):
                yield found
                done(1)

"""The unit in which documents are read: whole, or in parts where they are long."""

from typing import NamedTuple

import numpy as np

__all__ = ["IDS", "Piece"]

IDS = 1 << 20  # of a long run of token ids, those that are read at once


class Piece(NamedTuple):
    """A document, or a part of one.

    Attributes:
        where: Its place, for errors: a file, and the line or the row.
        content: Text, or token ids ``(n,)``.
        begins: Whether a document begins with it; otherwise it goes on with the last one.
        read: Bytes of its file that were read so far.
    """

    where: str
    content: str | np.ndarray
    begins: bool
    read: int

"""Tokens on disk: every document after its separator, end to end, in the smallest integers that hold them.

::

    tokens.bin       separator, document, separator, document, ...
    documents.bin    int64, where each begins, and the end
    sealed.json      the type of the tokens and what else is known of them, sizes and digests
"""

import functools
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError
from .piece import Piece
from .sealed import NotWhole, seal, unseal

__all__ = ["TokenStore", "TokenWriter", "block_of", "mapped", "raw"]

_TOKENS, _DOCUMENTS = "tokens.bin", "documents.bin"
_BLOCK = 1 << 22  # numbers that are in memory at once


class TokenStore:
    """Token ids of documents, mapped.

    Attributes:
        folder: Their place.
        tokens: ``(n,)``, those of all documents, each after the separator; ``~id`` for what is read and not predicted.
        starts: ``(documents + 1,)`` int64, the places in ``tokens`` where they begin, and the end.
        separator: The id in front of each.
        skipped: Documents without a token, which are left out.
        low, high: The least and the greatest number in ``tokens``.
        digest: Of all of it.

    Raises:
        NotWhole: There is no store, or it is not as it was written.
    """

    def __init__(self, folder: Path):
        facts, files = unseal(folder)
        self.folder = folder
        try:
            kind = str(facts["kind"])
            self.separator, self.skipped = int(facts["separator"]), int(facts["skipped"])
            self.low, self.high = int(facts["low"]), int(facts["high"])
            self.tokens = mapped(folder / _TOKENS, kind)
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise NotWhole(f"{folder}: is not whole ({e})") from e
        self.starts = mapped(folder / _DOCUMENTS, "<i8")
        self.digest = hashlib.sha256(f"{kind} {self.separator} {files}".encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # a process that reads rows maps the files again, and is sent none of them
        return TokenStore, (self.folder,)

    @property
    def documents(self) -> int:
        """Documents that hold a token."""
        return len(self.starts) - 1

    @property
    def read_only(self) -> bool:
        """Return whether some tokens are not to be predicted."""
        return self.low < 0

    def beyond(self, vocab_size: int) -> tuple[int, int] | None:
        """Find the first id outside a vocabulary and the number of its document, from 1."""
        if max(self.high, ~self.low) < vocab_size:
            return None
        for at, ids in block_of(self.tokens):
            outside = np.flatnonzero((ids >= vocab_size) | (~ids.astype(np.int64) >= vocab_size))
            if outside.size:
                first = int(ids[outside[0]])
                return max(first, ~first), int(np.searchsorted(self.starts, at + outside[0], side="right"))
        return None


def mapped(file: Path, kind: str) -> np.ndarray:
    """Map a file of numbers as a plain array."""
    # a plain array: that of numpy.memmap takes several times as long to take a part of
    return np.asarray(np.memmap(file, dtype=np.dtype(kind), mode="r"))


def raw(numbers: np.ndarray, kind: str) -> memoryview:
    """Return numbers as a file takes them; that of NumPy (``tofile``) does not say that a disk is full."""
    return np.ascontiguousarray(numbers, dtype=kind).data


def block_of(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Go through a mapped array in blocks, each with its place."""
    for at in range(0, len(numbers), _BLOCK):
        yield at, numbers[at : at + _BLOCK]


class TokenWriter:
    """Writes a store, batch by batch: ``with TokenWriter(folder, 0, 256) as writer: writer.add(pieces, ids)``.

    Args:
        folder: An empty one.
        separator: Id in front of every document.
        vocab_size: All ids are below it.
        least: The vocabulary of the tokenizer, from which the type of the numbers follows as long as it holds them.
    """

    def __init__(self, folder: Path, separator: int, vocab_size: int, least: int):
        if separator >= vocab_size:
            raise SourceError(
                f"tokenizer: its end of text is id {separator}, which is outside the model's vocabulary of {vocab_size}. Set vocab_size, "
                "or name the model's tokenizer in its config (tokenizer)."
            )
        self.folder, self.separator, self.vocab_size = folder, separator, vocab_size
        self.kind = np.min_scalar_type(max(least - 1, separator))
        self.low, self.high = separator, separator
        self.size = self.documents = self.skipped = 0
        # whether a document has begun, and whether one of its tokens is written
        self.begun = self.holds = False

    def __enter__(self) -> "TokenWriter":
        self.tokens: io.BufferedWriter = (self.folder / _TOKENS).open("wb")
        self.starts = (self.folder / _DOCUMENTS).open("wb")
        return self

    def __exit__(self, *error: Any) -> None:
        # what a full disk says when a file is closed is said already, or is said here
        for file in (self.tokens, self.starts):
            try:
                file.close()
            except OSError:
                if error[0] is None:
                    raise

    def add(self, pieces: Sequence[Piece], ids: Sequence[np.ndarray]) -> None:
        """Write the ids of some pieces.

        Raises:
            ValueError: An id that is no integer, or outside the vocabulary; the message names the piece.
        """
        parts: list[np.ndarray] = []
        starts: list[int] = []
        size, front = self.size, np.array([self.separator], dtype=self.kind)
        for piece, part in zip(pieces, ids, strict=True):
            if piece.begins:
                self._end_document()
                self.begun = True
            if not part.size:
                continue
            if not self.holds:
                starts.append(size)
                parts.append(front)
                size, self.holds = size + 1, True
            parts.append(part)
            size += part.size
        if parts:
            self._write(parts, pieces, ids)
            self.starts.write(raw(np.array(starts), "<i8"))
        self.size, self.documents = size, self.documents + len(starts)

    def close(self) -> None:
        """Write what is left, and seal the folder; if there is no token at all, that is a ``ValueError``."""
        self._end_document()
        if not self.documents:
            raise SourceError(
                f"data: none of {self.skipped:,} documents holds a token. Give at least one that is not empty."
            )
        self.starts.write(raw(np.array([self.size]), "<i8"))
        self.starts.flush()
        self.tokens.flush()
        facts = {"kind": self.kind.newbyteorder("<").str, "separator": self.separator, "skipped": self.skipped}
        seal(self.folder, facts | {"low": self.low, "high": self.high})

    def _end_document(self) -> None:
        self.skipped += self.begun and not self.holds
        self.begun = self.holds = False

    def _write(self, parts: list[np.ndarray], pieces: Sequence[Piece], ids: Sequence[np.ndarray]) -> None:
        kinds = {part.dtype for part in parts}
        if any(kind.kind not in "iu" or kind == np.uint64 for kind in kinds):
            # together they would be floating-point numbers
            parts = [self._checked(part) for part in parts]
        flat = np.concatenate(parts)
        low, high = int(flat.min()), int(flat.max())
        if max(high, ~low) >= self.vocab_size:
            self._refuse(pieces, ids)
        self.low, self.high = min(self.low, low), max(self.high, high)
        wanted = functools.reduce(np.promote_types, map(np.min_scalar_type, (low, high)), self.kind)
        if wanted != self.kind:
            self._widen(wanted)
        self.tokens.write(raw(flat, self.kind.newbyteorder("<").str))

    def _checked(self, part: np.ndarray) -> np.ndarray:
        if part.dtype.kind in "iu" and int(part.max()) > np.iinfo(np.int64).max:
            raise SourceError(f"data: holds the id {part.max()}, which is none of any vocabulary.")
        return part.astype(np.int64, casting="same_kind" if part.dtype != np.uint64 else "unsafe")

    def _refuse(self, pieces: Sequence[Piece], ids: Sequence[np.ndarray]) -> None:
        piece, part = next(
            (piece, part) for piece, part in zip(pieces, ids, strict=True)
            if part.size and max(int(part.max()), ~int(part.min())) >= self.vocab_size
        )  # fmt: skip
        highest = max(int(part.max()), ~int(part.min()))
        text = isinstance(piece.content, str)
        remedy = (
            "Name the model's tokenizer in its config (tokenizer), or set vocab_size"
            if text
            else "Set vocab_size, or tokenize with the model's tokenizer"
        )
        raise SourceError(
            f"{piece.where}: {'the tokenizer gives' if text else 'holds'} id {highest}, which is outside the model's vocabulary of "
            f"{self.vocab_size}. {remedy}."
        )

    def _widen(self, kind: np.dtype) -> None:
        """Write what is written already in a wider type."""
        self.tokens.close()
        narrow = self.folder / "narrow.bin"
        (self.folder / _TOKENS).replace(narrow)
        self.tokens = (self.folder / _TOKENS).open("wb")
        if narrow.stat().st_size:
            for _, ids in block_of(mapped(narrow, self.kind.newbyteorder("<").str)):
                self.tokens.write(raw(ids, kind.newbyteorder("<").str))
        narrow.unlink()
        self.kind = kind

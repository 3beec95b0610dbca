"""Documents in, rows of tokens out: the built-in text, files of any size, packing, and mixing.

A document is a run of token ids. Documents are laid end to end, each after the separator (id 0 of the byte tokenizer,
and what an evaluation puts before a text), and cut into rows of equal length. A row is one training example.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..corpus.documents import Documents, read_documents, read_npy
from ..corpus.places import check_path
from ..corpus.rows import NO_TARGET

__all__ = ["Rows", "fingerprint", "mix", "pack", "read_documents", "rows_from", "rows_with_targets", "topics"]

# runs of this many words in common make two documents relatives; shorter ones are idioms
_SHINGLE = 9


def topics(validation_share: float = 0.1) -> dict[str, list[str]]:
    """The reference text that ships with CPython (``pydoc_data.topics``), split by document.

    Some topics quote others in full, so documents that have a run of 9 words in common are kept on one side of the
    split. The text differs between Python versions; :func:`fingerprint` says which one it was.

    Args:
        validation_share: The most that validation may hold, as a share of all bytes, in (0, 1).

    Returns:
        ``{"train": [...], "validation": [...]}``, whole documents in a fixed order.
    """
    from pydoc_data.topics import topics as text

    families = _families(text)
    # an order that has nothing to do with what the documents say
    families.sort(key=lambda names: hashlib.sha256(names[0].encode()).digest())
    room = validation_share * sum(map(len, text.values()))
    split: dict[str, list[str]] = {"train": [], "validation": []}
    for names in families:
        size = sum(len(text[name]) for name in names)
        held_out = size <= room
        room -= size if held_out else 0
        split["validation" if held_out else "train"] += [text[name] for name in names]
    return split


def _families(text: dict[str, str]) -> list[list[str]]:
    families = {name: [name] for name in text}
    first: dict[tuple[str, ...], str] = {}
    for name in sorted(text):
        words = re.findall(r"\w+", text[name].lower())
        for i in range(len(words) - _SHINGLE + 1):
            relative = first.setdefault(tuple(words[i : i + _SHINGLE]), name)
            if families[relative] is not families[name]:
                one = sorted(families[relative] + families[name])
                families |= dict.fromkeys(one, one)
    return [family for name, family in families.items() if name == family[0]]


def fingerprint(documents: Iterable[str]) -> str:
    """SHA-256 (hex) of the documents in order; changes when a byte or a boundary does."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def pack(documents: Documents, length: int, separator: int = 0) -> np.ndarray:
    """Lay documents end to end, each after a separator, and cut the run into rows.

    A document that fits into a row is never cut: where the rest of a row is too short for it, the rest stays empty.
    Longer ones are cut wherever a row ends, and the next document follows in the same row.

    Args:
        documents: Token ids, one sequence per document, ``~id`` for tokens that are read and not predicted; empty ones
            are left out.
        length: Tokens per row, at least 2.
        separator: Opens every document.

    Returns:
        ``(n, l)``, int32 where all ids fit, else int64. Where a row is empty it holds ``~separator``: see :class:`Rows` for what
        negative ids mean.

    Raises:
        ValueError: ``length`` is below 2, there is no token at all, or ids that are no integers.
    """
    if length < 2:
        raise ValueError(f"pack(length={length}): a row needs at least 2 tokens, one to read and one to predict.")
    pieces: list[np.ndarray] = []
    used = 0  # of the row being filled
    kind: type[np.signedinteger] = np.int32
    for document in documents:
        ids = np.asarray(document)  # an array, be it in memory or on disk, is not copied here
        if ids.size == 0:
            continue
        if ids.dtype.kind not in "iu":
            raise ValueError(f"pack: a document holds {ids.dtype}. Token ids are integers.")
        if int(ids.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"pack: a document holds the id {ids.max()}, which is none of any vocabulary.")
        if not (np.iinfo(np.int32).min <= int(ids.min()) and int(ids.max()) <= np.iinfo(np.int32).max):
            kind = np.int64
        elif not isinstance(document, np.ndarray):
            ids = ids.astype(np.int32)
        size = ids.size + 1
        if length - used < size <= length:
            pieces.append(np.full(length - used, ~separator))
            used = 0
        pieces += [np.array([separator]), ids]
        used = (used + size) % length
    if not pieces:
        raise ValueError("pack: the documents hold no tokens. Give at least one that is not empty.")
    pieces.append(np.full(-used % length, ~separator))
    return np.concatenate(pieces, dtype=kind, casting="unsafe").reshape(-1, length)


def mix(sources: Sequence[tuple[np.ndarray, float]], rows: int, seed: int = 0) -> np.ndarray:
    """Draw rows from several sources in given proportions, in random order.

    A source that is too small is gone through again, in another order, as often as it takes.

    Args:
        sources: Pairs of ``(n, l)`` rows and the source's share; shares are relative to their sum.
        rows: How many rows to draw.
        seed: Of the order.

    Returns:
        ``(rows, l)``.

    Raises:
        ValueError: No source, sources of unequal row length, or a share that is not positive.
    """
    if not sources:
        raise ValueError("mix: no source. Give at least one pair of rows and share.")
    lengths = sorted({source.shape[1] for source, _ in sources})
    if len(lengths) > 1:
        raise ValueError(
            f"mix: rows of {lengths[0]} and of {lengths[-1]} tokens cannot be mixed. Pack all sources to one length."
        )
    shares = [share for _, share in sources]
    if any(share <= 0 for share in shares):
        raise ValueError(f"mix: shares must be positive, got {shares}. Leave out what has none.")
    rng = np.random.default_rng(seed)
    ends = [round(rows * part) for part in np.cumsum(shares) / sum(shares)]
    drawn = []
    for (source, _), n in zip(sources, np.diff([0, *ends]), strict=True):
        passes = -(-int(n) // len(source))
        order = np.concatenate([np.zeros(0, np.int64), *(rng.permutation(len(source)) for _ in range(passes))])
        drawn.append(source[order[:n]])
    return rng.permutation(np.concatenate(drawn))


class Rows(Dataset):
    """Training examples ``{"input_ids": (l,), "labels": (l,)}`` from an ``(n, l)`` table of token ids.

    A negative id, ``~id``, stands for a token that is read but never a target.
    """

    def __init__(self, table: np.ndarray):
        if table.ndim != 2 or table.shape[0] == 0 or table.shape[1] < 2:
            raise ValueError(
                f"Rows: expected a table (n, l) with n >= 1 and l >= 2, got {table.shape}. Use pack(...) to make one."
            )
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(np.array(self.table[index], dtype=np.int64))
        return {"input_ids": torch.where(row < 0, ~row, row), "labels": row.masked_fill(row < 0, NO_TARGET)}


def rows_with_targets(table: np.ndarray) -> np.ndarray:
    """Indices of the rows of a table, as :class:`Rows` takes it, that hold something to predict; nothing can be learned from the others."""
    if table.dtype.kind == "u":
        return np.arange(len(table))
    step = max(1, (1 << 24) // table.shape[1])
    # what a row begins with is never predicted
    kept = [(table[i : i + step, 1:] >= 0).any(1) for i in range(0, len(table), step)]
    return np.flatnonzero(np.concatenate(kept))


def rows_from(
    path: str | Path, length: int | None, encode: Callable[[str], Sequence[int]], separator: int = 0, default: int = 512
) -> np.ndarray:
    """Pack what :func:`read_documents` finds into rows of ``length`` tokens; a ``.npy`` table holds rows already.

    Without a ``length`` a table keeps its own, and documents are packed into rows of ``default``.
    """
    if Path(path).suffix.lower() == ".npy" and (table := read_npy(check_path(path))).ndim == 2:
        if length is not None and table.shape[1] != length:
            raise ValueError(
                f"{path}: holds rows of {table.shape[1]} tokens, asked for {length}. Ask for that, or give a flat file."
            )
        return table
    return pack(read_documents(path, encode), length or default, separator)

"""Rows of equal length, laid out in a token store: which pieces of it stand in each row.

::

    pieces.bin    (m, 2) int64, begin and end in the tokens of every piece, row by row
    rows.bin      (n + 1,) int64, where the pieces of each row begin, and the end
    chosen.bin    (k,) int64, the rows that hold something to predict, if some do not
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .sealed import NotWhole, kept, seal, unseal
from .store import TokenStore, mapped, raw

__all__ = ["Layout", "best_fit", "layout_of"]

# pieces among which those that fill a row best are looked for; more would not fill them better
_WINDOW = 1 << 17


class Layout:
    """Rows of ``length`` tokens in a store, laid out before, in mapped files.

    Attributes:
        folder: Their place.
        pieces: ``(m, 2)`` int64, begin and end in the store's tokens.
        rows: ``(n + 1,)`` int64, the places in ``pieces`` where the rows begin, and the end.
        chosen: The rows that hold something to predict.
        most: The most pieces in a row, the empty rest of it counted as one.
    """

    def __init__(self, folder: Path):
        facts, _ = unseal(folder)
        self.folder = folder
        try:
            self.most, self.length = int(facts["most"]), int(facts["length"])
            self.pieces = mapped(folder / "pieces.bin", "<i8").reshape(-1, 2)
            self.rows = mapped(folder / "rows.bin", "<i8")
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise NotWhole(f"{folder}: is not whole ({e})") from e
        partly = (folder / "chosen.bin").exists()
        self.chosen = mapped(folder / "chosen.bin", "<i8") if partly else range(len(self.rows) - 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, (self.folder,)

    def __len__(self) -> int:
        return len(self.rows) - 1


def layout_of(store: TokenStore, length: int, packing: str) -> Layout:
    """Return the rows of a store, laid out now or earlier.

    Args:
        store: Tokens of documents.
        length: Tokens per row.
        packing: ``documents``: those that together fill a row best (arXiv:2404.10830), each apart from the others; one that fits is never
            cut, a longer one is cut into rows, and its last part is packed. ``padded``: a row for each. ``stream``: end to end, cut where
            a row ends, except that one that fits is not cut where it can begin in the next row.

    Raises:
        ValueError: No row holds anything to predict.
    """

    def make(folder: Path) -> None:
        _write(folder, store, length, packing)

    layout, _ = kept(store.folder / f"{packing}-{length}", make, Layout)
    return layout


def _write(folder: Path, store: TokenStore, length: int, packing: str) -> None:
    most = rows = chosen = 0
    begun = 0
    with (
        (folder / "pieces.bin").open("wb") as pieces_file,
        (folder / "rows.bin").open("wb") as rows_file,
        (folder / "chosen.bin").open("wb") as chosen_file,
    ):
        for pieces in _windows(store, length, packing):
            if packing == "documents":
                pieces, firsts = _packed(pieces, length)
            else:
                firsts = np.arange(len(pieces))
            sizes = pieces[:, 1] - pieces[:, 0]
            used = np.add.reduceat(sizes, firsts)
            counts = np.diff(firsts, append=len(pieces))
            most = max(most, int((counts + (used < length)).max()))
            with_targets = rows + np.flatnonzero(np.maximum.reduceat(_has_targets(store, pieces), firsts))
            pieces_file.write(raw(pieces, "<i8"))
            rows_file.write(raw((begun + firsts), "<i8"))
            chosen_file.write(raw(with_targets, "<i8"))
            rows, begun, chosen = rows + len(firsts), begun + len(pieces), chosen + len(with_targets)
        rows_file.write(raw(np.array([begun]), "<i8"))
    if chosen == rows:
        (folder / "chosen.bin").unlink()
    elif not chosen:
        raise ValueError("data: no row holds anything to predict: every document is a single token, or only read.")
    seal(folder, {"most": most, "length": length})


def _windows(store: TokenStore, length: int, packing: str) -> Iterator[np.ndarray]:
    """Cut documents, or what has no gap in a stream, into pieces of at most a row: ``(n, 2)`` begins and ends, a window at a time."""
    for begins, ends in _runs(store, length) if packing == "stream" else _documents(store):
        # the place of each one's first piece among all of them
        after = np.cumsum(-(-(ends - begins) // length))
        for at in range(0, int(after[-1]), _WINDOW):
            number = np.arange(at, min(at + _WINDOW, int(after[-1])))
            of = np.searchsorted(after, number, side="right")
            first = number - np.where(of > 0, after[of - 1], 0)
            begin = begins[of] + first * length
            yield np.stack([begin, np.minimum(begin + length, ends[of])], axis=1)


def _documents(store: TokenStore) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for at in range(0, store.documents, _WINDOW):
        edges = np.array(store.starts[at : at + _WINDOW + 1], dtype=np.int64)
        yield edges[:-1], edges[1:]


def _runs(store: TokenStore, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Find what follows each other without a gap, as :func:`~hybridzoo.zoo.train.data.pack` lays it."""
    begin = used = 0
    for begins, ends in _documents(store):
        found = []
        for start, size in zip(begins.tolist(), (ends - begins).tolist(), strict=True):
            if length - used < size <= length:
                found.append((begin, start))
                begin, used = start, 0
            used = (used + size) % length
        # the last one of a window may go on in the next, and then must begin where a row does
        end = (
            int(ends[-1]) if int(ends[-1]) == len(store.tokens) else begin + (int(ends[-1]) - begin) // length * length
        )
        found += [(begin, end)] if end > begin else []
        begin = end
        if found:
            edges = np.array(found)
            yield edges[:, 0], edges[:, 1]


def _has_targets(store: TokenStore, pieces: np.ndarray) -> np.ndarray:
    """Return for every piece whether something in it is predicted, which what it begins with never is."""
    long = pieces[:, 1] - pieces[:, 0] > 1
    if store.read_only:
        for i in np.flatnonzero(long):
            long[i] = bool((store.tokens[pieces[i, 0] + 1 : pieces[i, 1]] >= 0).any())
    return long


def _packed(pieces: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Order pieces by the row that each stands in; and where in them the rows begin."""
    row = best_fit(pieces[:, 1] - pieces[:, 0], length)
    order = np.argsort(row, kind="stable")
    return pieces[order], np.flatnonzero(np.diff(row[order], prepend=-1))


def best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """Put things into as few boxes as may be: the largest first, each where it leaves the least room (best-fit decreasing).

    All of one size are placed at once, so that it takes no longer for many.

    Args:
        sizes: ``(n,)``, from 1 to ``room``.
        room: Of a box.

    Returns:
        ``(n,)`` int64, the box of each, numbered from 0.
    """
    boxes = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    kinds, at = np.unique(-sizes[order], return_index=True)
    open_ones, count = _Boxes(), 0
    for size, things in zip((-kinds).tolist(), np.split(order, at[1:]), strict=True):
        while len(things):
            rest, found = open_ones.take(size)
            if not len(found):
                rest, found = room, np.arange(count, count + -(-len(things) // (room // size)))
                count += len(found)
            each = rest // size
            filled, unused = np.split(found, [-(-len(things) // each)])
            put = min(len(things), len(filled) * each)
            boxes[things[:put]] = np.repeat(filled, each)[:put]
            things = things[put:]
            # the last of them may have got fewer
            last = put - (len(filled) - 1) * each
            open_ones.add(rest - each * size, filled[:-1])
            open_ones.add(rest - last * size, filled[-1:])
            open_ones.add(rest, unused)
    return boxes


class _Boxes:
    """Boxes by the room that is left in them."""

    def __init__(self) -> None:
        self.by_room: dict[int, list[np.ndarray]] = defaultdict(list)
        self.rooms = 0  # a bit for each that there is

    def add(self, room: int, boxes: np.ndarray) -> None:
        if room and len(boxes):
            self.by_room[room].append(boxes)
            self.rooms |= 1 << room

    def take(self, least: int) -> tuple[int, np.ndarray]:
        """Take out those of the least room that is enough."""
        enough = self.rooms >> least
        if not enough:
            return 0, np.zeros(0, dtype=np.int64)
        room = least + (enough & -enough).bit_length() - 1
        self.rooms &= ~(1 << room)
        return room, np.concatenate(self.by_room.pop(room))

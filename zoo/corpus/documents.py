"""Documents as people have them, in a file, a folder of them, or standard input."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.plain import first_line
from ..errors import SourceError
from .columnar import dataset_folder, read_dataset, read_parquet
from .piece import IDS, Piece
from .places import check_path
from .text_files import opened, read_jsonl, read_text

__all__ = ["Documents", "Source", "read_documents", "read_npy", "read_pieces", "sources_at"]

_TEXT, _LINES = (".txt", ".md", ".rst", ".py"), (".jsonl", ".ndjson")

Documents = Iterable[Sequence[int] | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of documents, or a folder that is read as one.

    Attributes:
        path: Its place.
        kind: One of text, lines, npy, parquet and dataset.
        size: In bytes.
    """

    path: Path
    kind: str
    size: int

    def files(self) -> list[Path]:
        """Return the files that it consists of, in order."""
        return [self.path] if self.kind != "dataset" else sorted(f for f in self.path.rglob("*") if f.is_file())


def read_documents(path: str | Path, encode: Callable[[str], Sequence[int]], column: str = "text") -> Documents:
    """Token ids of the documents at ``path``, one after another.

    Text is UTF-8; a byte-order mark at its beginning is left out, and in text files every end of a line becomes a newline. Text and JSON
    Lines may be compressed (``.gz``). Where the column holds lists of integers, they are token ids already.

    Args:
        path: A text file (one document; those beyond 4 MB are encoded in parts), a ``.jsonl`` or ``.parquet`` file or a folder saved by
            ``datasets`` (one document per row, in the column), a ``.npy`` file of token ids, or a folder, in which all such files are
            read in the order of their names, hidden ones left out.
        encode: Text to token ids.
        column: The name of the text in a row.

    Raises:
        FileNotFoundError: Nothing is there; what is nearly called so is named.
        ValueError: A file that cannot be understood (the message names it, the line and the byte), or no file in a folder.
    """
    parts: list[Any] = []
    for piece in read_pieces(sources_at(check_path(path)), str(path), column):
        if piece.begins and parts:
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)
            parts = []
        parts.append(encode(piece.content) if isinstance(piece.content, str) else piece.content)
    yield parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_pieces(sources: Iterable[Source], name: str, column: str = "text") -> Iterator[Piece]:
    """Read the documents of several sources, which together are called ``name``; if all are empty, that is a ``ValueError``."""
    before, empty = 0, True
    for source in sources:
        for piece in _READ[source.kind](source.path, column):
            empty &= not len(piece.content)
            yield piece._replace(read=before + piece.read)
        before += source.size
    if empty:
        raise SourceError(f"{name}: is empty. Remove it, or fill it with text.")


def sources_at(root: Path) -> list[Source]:
    """Find what there is to read in a file or a folder.

    Raises:
        ValueError: Nothing of a kind that can be read, or a dataset whose split has to be named.
    """
    if not root.is_dir():
        if root.exists() and not root.is_file():
            raise SourceError(
                f"{root}: is a pipe or a device, which is read once only. Give it as standard input: --data - < {root}"
            )
        return [Source(root, _kind(root) or ("lines" if root.suffix.lower() == ".json" else "text"), _size(root))]
    if (saved := dataset_folder(root)) is not None:
        return [_dataset(saved)]
    # what file managers and notebooks leave behind begins with a dot, and is nobody's text
    seen = [f for f in root.rglob("*") if not any(part.startswith(".") for part in f.relative_to(root).parts)]
    # nor are the models that trainings leave there, one of this very data perhaps, which would be other data when it goes on
    runs = {lock.parent for lock in root.rglob(".train.lock")} - {root}
    seen = [f for f in seen if f.name != "modeling_hybridzoo.py" and runs.isdisjoint(f.parents)]
    saved_ones = {f.parent for f in seen if f.name == "state.json" and (f.parent / "dataset_info.json").is_file()}
    files = [f for f in seen if _kind(f) and f.is_file() and f.parent not in saved_ones]
    found = [Source(f, _kind(f) or "", _size(f)) for f in files] + [_dataset(folder) for folder in saved_ones]
    if not found:
        others = sorted({f.suffix for f in seen if f.suffix and f.is_file()})
        there = f" (there are {', '.join(others[:4])})" if others else ""
        raise SourceError(
            f"{root}: holds no file that ends in {', '.join((*_TEXT, *_LINES, '.parquet', '.npy'))}{there}. Put the text there, or name "
            "a single file."
        )
    return sorted(found, key=lambda source: source.path)


def _dataset(folder: Path) -> Source:
    return Source(folder, "dataset", sum(_size(f) for f in folder.glob("*.arrow")))


def _size(file: Path) -> int:
    return file.stat().st_size


def _kind(file: Path) -> str | None:
    last = file.suffix.lower()
    inner = Path(file.stem).suffix.lower() if last == ".gz" else last
    if inner in _TEXT:
        return "text"
    if inner in _LINES or (inner == ".json" and last == ".gz"):
        return "lines"
    return {".npy": "npy", ".parquet": "parquet"}.get(last)


def _read_text_file(file: Path, column: str) -> Iterator[Piece]:
    with opened(file) as (stream, position):
        yield from read_text(stream, str(file), position)


def _read_lines(file: Path, column: str) -> Iterator[Piece]:
    with opened(file) as (stream, position):
        yield from read_jsonl(stream, str(file), column, position)


def _read_ids(file: Path, column: str) -> Iterator[Piece]:
    ids = read_npy(file).reshape(-1)
    for i in range(0, ids.size, IDS):
        yield Piece(str(file), ids[i : i + IDS], i == 0, (i + IDS) * ids.itemsize)


_READ: dict[str, Callable[[Path, str], Iterator[Piece]]] = {
    "text": _read_text_file,
    "lines": _read_lines,
    "npy": _read_ids,
    "parquet": read_parquet,
    "dataset": read_dataset,
}


def read_npy(file: Path) -> np.ndarray:
    """Token ids of a ``.npy`` file, mapped: ``(n,)`` or ``(n, l)``, of any integer type.

    Raises:
        ValueError: Anything else; the message names the file.
    """
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    # a damaged header ends in whatever the part of NumPy or of Python's parser that meets it raises
    except Exception as e:
        cut = "it is cut short" if "mmap length" in str(e) or "EOF" in str(e) else first_line(e)
        raise SourceError(f"{file}: is not a NumPy array of numbers ({cut}). Write it with numpy.save.") from e
    if not isinstance(ids, np.ndarray):
        raise SourceError(
            f"{file}: is not a NumPy array of numbers, but an archive of several. Write one with numpy.save."
        )
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        raise SourceError(
            f"{file}: holds {ids.dtype} of shape {ids.shape}. Token ids are integers, in one row or a table (n, l)."
        )
    if ids.size == 0:
        raise SourceError(f"{file}: is empty. Give at least one row of token ids.")
    return ids

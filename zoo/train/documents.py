"""Documents as people have them: text, JSON Lines and token ids, in a file or a folder of them."""

import codecs
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ..config.plain import first_line
from ..errors import SourceError
from .options import check_path

__all__ = ["Documents", "read_documents", "read_npy"]

_TEXT = (".txt", ".md", ".rst", ".py")

Documents = Iterable[Sequence[int] | np.ndarray]


def read_documents(path: str | Path, encode: Callable[[str], Sequence[int]]) -> Documents:
    """Token ids of the documents at ``path``, one after another.

    Text is UTF-8; a byte-order mark at its beginning is left out, and in text files every end of a line becomes a newline.

    Args:
        path: A text file (one document), a ``.jsonl`` file (one document per line, in its ``"text"``), a ``.npy`` file
            of token ids, or a folder, in which all such files are read in the order of their names, hidden ones left out.
        encode: Text to token ids.

    Raises:
        FileNotFoundError: Nothing is there; what is nearly called so is named.
        ValueError: A file that cannot be understood (the message names it, the line and the byte), or no file in a folder.
    """
    root = check_path(path)
    for file in _files_of(root) if root.is_dir() else [root]:
        if file.suffix.lower() == ".npy":
            yield read_npy(file).reshape(-1)
        elif file.suffix.lower() == ".jsonl":
            yield from map(encode, _read_jsonl(file))
        else:
            yield encode(_read_text(file))


def _files_of(root: Path) -> list[Path]:
    kinds = (*_TEXT, ".jsonl", ".npy")
    # what file managers and notebooks leave behind begins with a dot, and is nobody's text
    seen = [f for f in root.rglob("*") if not any(part.startswith(".") for part in f.relative_to(root).parts)]
    files = sorted(f for f in seen if f.suffix.lower() in kinds and f.is_file())
    if not files:
        others = sorted({f.suffix for f in seen if f.suffix and f.is_file()})
        there = f" (there are {', '.join(others[:4])})" if others else ""
        raise SourceError(
            f"{root}: holds no file that ends in {', '.join(kinds)}{there}. Put the text there, or name a single file."
        )
    return files


def _read_text(file: Path) -> str:
    text = _decoded(file.read_bytes(), str(file), 0)
    if not text.strip():
        raise SourceError(f"{file}: is empty. Remove it, or fill it with text.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded(raw: bytes, where: str, offset: int) -> str:
    # the text of raw, which begins at byte offset of its file
    if offset == 0:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise SourceError(f"{where}: is UTF-16 text. Convert it: iconv -f UTF-16 -t UTF-8 {shlex.quote(where)}")
        skipped = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
        raw, offset = raw[skipped:], skipped
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise SourceError(
            f"{where}: is not UTF-8 text (byte {offset + e.start} is {raw[e.start]:#04x}). Convert it, or give token ids."
        ) from e


def _read_jsonl(file: Path) -> Iterable[str]:
    offset, found = 0, False
    with file.open("rb") as lines:
        # by newlines alone: str.splitlines would also cut at U+0085, U+2028 and others that may stand inside a text
        for number, raw in enumerate(lines, 1):
            where = f"{file}, line {number}"
            line = _decoded(raw, str(file) if offset == 0 else where, offset)
            offset += len(raw)
            if line.strip():
                found = True
                yield _text_of(line, where)
    if not found:
        raise SourceError(f"{file}: is empty. Remove it, or fill it with text.")


def _text_of(line: str, where: str) -> str:
    wanted = 'Write one {"text": "..."} per line.'
    try:
        # not strict: control characters inside a string are what people have
        row = json.loads(line, strict=False)
    except (ValueError, RecursionError) as e:
        raise SourceError(f'{where}: is not a JSON object with a "text" ({e}). {wanted}') from e
    if not isinstance(row, dict):
        raise SourceError(f'{where}: is not a JSON object with a "text", but a {type(row).__name__}. {wanted}')
    if "text" not in row:
        keys = ", ".join(map(repr, list(row)[:8])) or "none"
        raise SourceError(f'{where}: is not a JSON object with a "text"; its keys: {keys}. {wanted}')
    if not isinstance(text := row["text"], str):
        raise SourceError(f'{where}: "text" is a {type(text).__name__}, not a string.')
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise SourceError(
            f'{where}: "text" holds {text[e.start]!a}, half of a surrogate pair, which is no character. Leave it out.'
        ) from e
    return text


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

"""Text and JSON Lines, from files, compressed ones and standard input, in constant memory."""

import codecs
import contextlib
import gzip
import itertools
import json
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import SourceError
from .piece import Piece

__all__ = ["decoded", "opened", "read_jsonl", "read_text", "read_unnamed"]

# A text up to this size is tokenized as a whole, a longer one in pieces of about this size, cut behind a line.
_BLOCK = 1 << 22
_FIRST_LINE = 1 << 26  # of standard input, the most that is read to see what it is
# not strict: control characters inside a string are what people have
_DECODER = json.JSONDecoder(strict=False)


class _Joined:
    """A stream of which the beginning was read already."""

    def __init__(self, head: bytes, stream: IO[bytes]):
        self.head, self.stream = head, stream

    def read(self, size: int) -> bytes:
        head, self.head = self.head[:size], self.head[size:]
        return head if len(head) == size else head + self.stream.read(size - len(head))


@contextlib.contextmanager
def opened(file: Path) -> Iterator[tuple[Any, Callable[[], int]]]:
    """Open a file, ``.gz`` or not, for reading: its bytes, and what says how many of its own were read."""
    with file.open("rb") as raw:
        try:
            yield (gzip.GzipFile(fileobj=raw) if file.suffix.lower() == ".gz" else raw), raw.tell
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise SourceError(f"{file}: is not whole gzip data ({e}). Copy or compress it again.") from e


def read_text(stream: Any, where: str, position: Callable[[], int]) -> Iterator[Piece]:
    """Read one document of UTF-8 text; a byte-order mark is left out, and every end of a line becomes a newline."""
    kept, offset, begins = b"", 0, True
    while True:
        new = stream.read(_BLOCK)
        last, raw = len(new) < _BLOCK, kept + new
        cut = len(raw) if last else _cut(raw)
        text = decoded(raw[:cut], where, offset).replace("\r\n", "\n").replace("\r", "\n")
        kept, offset = raw[cut:], offset + cut
        if last and begins and not text.strip():
            text = ""  # blank is empty
        if text or begins:
            yield Piece(where, text, begins, position())
        begins = False
        if last:
            return


def _cut(raw: bytes) -> int:
    """Return where a long text may be cut: tokenizers see the same in both parts as in the whole where one newline stands alone."""
    end = len(raw)
    for _ in range(1000):
        end = raw.rfind(b"\n", 0, end)
        if end < 2:
            break
        before, after = raw[end - 2 : end].replace(b"\r", b"")[-1:], raw[end + 1 : end + 2]
        if before and after and not before.isspace() and not after.isspace():
            return end + 1
    if (newline := raw.rfind(b"\n")) >= 0:
        return newline + 1
    # before the last character that begins here, which may not end here
    end = next(i for i in range(len(raw) - 1, -1, -1) if raw[i] & 0xC0 != 0x80 or i < len(raw) - 4)
    return (end if raw[end - 1 : end] != b"\r" else end - 1) or len(raw)


def decoded(raw: bytes, where: str, offset: int, instead: str = ", or give token ids") -> str:
    """Return the text of ``raw``, which begins at byte ``offset`` of its file; an error ends with what else could be given ``instead``."""
    if offset == 0:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise SourceError(f"{where}: is UTF-16 text. Convert it: iconv -f UTF-16 -t UTF-8 {shlex.quote(where)}")
        skipped = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
        raw, offset = raw[skipped:], skipped
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise SourceError(
            f"{where}: is not UTF-8 text (byte {offset + e.start} is {raw[e.start]:#04x}). Convert it{instead}."
        ) from e


def read_jsonl(lines: Iterable[bytes], name: str, column: str, position: Callable[[], int]) -> Iterator[Piece]:
    """Read a document a line, the text or the token ids in a field of a JSON object; blank lines are no documents."""
    offset = 0
    # by newlines alone: str.splitlines would also cut at U+0085, U+2028 and others that may stand inside a text
    for number, raw in enumerate(lines, 1):
        where = f"{name}, line {number}"
        line = decoded(raw, name if offset == 0 else where, offset)
        offset += len(raw)
        if line.strip():
            yield Piece(where, _field(line, where, column), True, position())


def _field(line: str, where: str, column: str) -> str | np.ndarray:
    wanted = f'Write one {{"{column}": "..."}} per line, or name another column (--column).'
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError) as e:
        raise SourceError(f'{where}: is not a JSON object with a "{column}" ({e}). {wanted}') from e
    if not isinstance(row, dict):
        raise SourceError(f'{where}: is not a JSON object with a "{column}", but {_called(row)}. {wanted}')
    if column not in row:
        keys = ", ".join(map(repr, list(row)[:8])) or "none"
        raise SourceError(f'{where}: is not a JSON object with a "{column}"; its keys: {keys}. {wanted}')
    value = row[column]
    if isinstance(value, list):
        return _ids(value, where, column)
    if not isinstance(value, str):
        raise SourceError(f'{where}: "{column}" is {_called(value)}, not a string and no list of token ids.')
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise SourceError(
            f'{where}: "{column}" holds {value[e.start]!a}, half of a surrogate pair, which is no character. Leave it out.'
        ) from e
    return value


def _called(value: Any) -> str:
    """Return what JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[Any, str] = {dict: "an object", list: "a list", str: "a string"}
    return kinds.get(type(value), f"the number {value}")


def _ids(values: list[Any], where: str, column: str) -> np.ndarray:
    if odd := {_called(v) for v in values if type(v) is not int}:
        raise SourceError(f'{where}: "{column}" holds {min(odd)}. Token ids are integers.')
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise SourceError(f'{where}: "{column}" holds an id beyond 64 bits, which is none of any vocabulary.') from None


def read_unnamed(stream: Any, column: str) -> Iterator[Piece]:
    """Read standard input: JSON Lines if its first line is a JSON object, else one text."""
    name = "standard input"
    head = stream.readline(_FIRST_LINE)
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        try:
            is_jsonl = isinstance(_DECODER.decode(head.removeprefix(codecs.BOM_UTF8).decode()), dict)
        except (ValueError, RecursionError):
            is_jsonl = False
        if is_jsonl:
            return read_jsonl(itertools.chain([head], stream), name, column, lambda: 0)
    return read_text(_Joined(head, stream), name, lambda: 0)

"""Documents made tokens once: where the tokens are kept, and when they are made again.

They lie in ``tokens/`` in the folder of :mod:`~hybridzoo.kernels.gpu.cache`, under a name that says which files they come from (path, size,
time and samples of the content) and which tokenizer made them. Where there is no such folder they lie in the run's; and so do those of
standard input, which cannot be read again.
"""

import atexit
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...kernels.gpu import cache
from ..errors import SourceError
from ..terminal import progress_bar, stderr
from ..tokenizer import document_encoder
from .documents import Source, read_pieces, sources_at
from .encoding import batch_encoder, identity_of
from .piece import Piece
from .sealed import kept
from .store import TokenStore, TokenWriter

__all__ = ["Tokenizing", "tokens_at"]

_FORMAT = 1
# characters, or ids, that are tokenized at a time, and pieces
_BATCH, _PIECES = 1 << 22, 8192
_SAMPLES, _SAMPLE = 16, 1 << 16
_SILENT_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Tokenizing:
    """The way from documents to tokens.

    Attributes:
        tokenizer: As a model has it (``model.tokenizer``).
        vocab_size: The model's, which no id may reach.
        column: The name of the text in a row.
    """

    tokenizer: Any
    vocab_size: int
    column: str = "text"

    def write(self, folder: Path, pieces: Iterable[Piece], size: int = 0) -> None:
        """Fill a folder with a store of the tokens of ``pieces``, which are of ``size`` bytes."""
        encode, separator = batch_encoder(self.tokenizer), document_encoder(self.tokenizer)[1]
        least = getattr(self.tokenizer, "vocab_size", 1)
        batches = _batches(pieces)
        with TokenWriter(folder, separator, self.vocab_size, least) as writer, _Bar(size) as bar:
            # a pipe may keep a thread waiting when all else has ended
            for batch in _ahead(batches) if size else batches:
                writer.add(batch, encode(batch))
                bar.show(batch[-1].read)
            writer.close()


def tokens_at(path: Path, how: Tokenizing, out: Path | None) -> tuple[TokenStore, list[str]]:
    """Return the tokens of the documents at ``path``, made now or earlier, and what there is to say of them.

    Args:
        path: As :func:`~hybridzoo.zoo.corpus.documents.read_documents` takes it.
        how: Tokenizer, vocabulary and column.
        out: The run's folder, for tokens that can be kept nowhere else; a temporary one without it.

    Raises:
        ValueError: What cannot be read or does not fit the model; the message names the place.
        OSError: The tokens cannot be written.
    """
    sources = sources_at(path)
    before = _content_of(sources)
    root, why = _folder(out)
    # what was made of the same path before is of no use any more when the content is another
    family = _hash(str(path.resolve()), identity_of(how.tokenizer), how.column)
    place = root / f"{family}-{_hash(_FORMAT, before)}"

    def make(folder: Path) -> None:
        how.write(folder, read_pieces(sources, str(path), how.column), sum(source.size for source in sources))
        if (now := _content_of(sources_at(path))) != before:
            changed = next((a[0] for a, b in zip(now, before, strict=False) if a != b), str(path))
            raise SourceError(f"{changed}: has changed while it was read. Start again when nobody writes to it.")
        for old in root.glob(f"{family}-*"):
            shutil.rmtree(old, ignore_errors=True)

    begun = time.monotonic()
    store, was_there = kept(place, make, TokenStore)
    took = f"tokenized in {time.monotonic() - begun:.1f} s"
    where = (
        f"tokenized before, in {store.folder}"
        if was_there
        else f"{took}, kept in {store.folder}"
        if why is None
        else f"{took}, {why}"
    )
    return store, [where]


def _folder(out: Path | None) -> tuple[Path, str | None]:
    """Return the folder for tokens, and why it is not the usual one."""
    usual, why = cache.place()
    if usual is not None and why is None:
        try:
            (usual / "tokens").mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(usual / "tokens", os.W_OK):
                return usual / "tokens", None
            why = f"{usual / 'tokens'}: cannot be written"
        except OSError as e:
            why = f"{usual}: {e.strerror or type(e).__name__}"
    if out is not None:
        return out / "tokens", f"kept in {out / 'tokens'} ({why})"
    return _temporary(), f"not kept ({why})"


@functools.cache
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hybridzoo-tokens-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _content_of(sources: list[Source]) -> list[list[Any]]:
    """Return what tells the content of sources from what they hold at another time, without reading all of it."""
    return [_content_of_file(file) for source in sources for file in source.files()]


def _content_of_file(file: Path) -> list[Any]:
    found, digest = file.stat(), hashlib.sha256()
    step = max(_SAMPLE, found.st_size // _SAMPLES)
    with file.open("rb") as f:
        for at in (*range(0, max(1, found.st_size), step), max(0, found.st_size - _SAMPLE)):
            f.seek(at)
            digest.update(f.read(_SAMPLE))
    return [str(file.resolve()), found.st_size, found.st_mtime_ns, digest.hexdigest()]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.content)
        if size >= _BATCH or len(batch) == _PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ahead(batches: Iterator[list[Piece]]) -> Iterator[list[Piece]]:
    """Read a batch while the one before is tokenized, for which tokenizers let go of Python's lock."""
    with ThreadPoolExecutor(1) as pool:
        coming: Future[list[Piece]] = pool.submit(next, batches, [])
        while batch := coming.result():
            coming = pool.submit(next, batches, [])
            yield batch


class _Bar:
    """A bar of the bytes that were read, on a terminal, of what takes longer than a moment."""

    def __init__(self, size: int):
        self.size, self.begun = size, time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> "_Bar":
        return self

    def show(self, read: int) -> None:
        if self.bar is None:
            console = stderr()
            if time.monotonic() - self.begun < _SILENT_SECONDS or not console.is_terminal or console.is_jupyter:
                return
            self.bar = progress_bar(console, transient=True)
            self.bar.add_task("tokenizing", total=(self.size >> 20) or None, note="MiB")
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=read >> 20)

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

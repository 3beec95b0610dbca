"""Standard input made tokens, which the run's folder keeps: a run that goes on has nothing to read there any more."""

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .sealed import NotWhole, remake
from .store import TokenStore
from .text_files import read_unnamed
from .tokenized import Tokenizing

__all__ = ["OtherInput", "tokens_of_input"]

_POLL_SECONDS = 0.1


class OtherInput(ValueError):
    """Standard input is not what the tokens that are kept were made of."""


def tokens_of_input(how: Tokenizing, out: Path, replace: bool = True) -> tuple[TokenStore, list[str]]:
    """Return the tokens of standard input, or those that an earlier call left in the run's folder ``out`` if there is nothing to read.

    Of several processes on one machine (torchrun's), the first reads.

    Args:
        how: Tokenizer, vocabulary and column.
        out: The run's folder.
        replace: Whether what is kept there may make way for other input.

    Raises:
        OtherInput: It may not.
        ValueError: Nothing to read and nothing kept, what cannot be read, or processes on several machines.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return _read(how, out, replace)
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world:
        raise SourceError("standard input: is there on one machine only. Write it to a file, and name that (--data).")
    # the parent is the one of all; what it waits for it ends when one fails
    told = out / "tokens" / f".input-{os.getppid()}"
    if rank == 0:
        for old in told.parent.glob(".input-*"):
            old.unlink(missing_ok=True)
        found = _read(how, out, replace)
        told.touch()
        return found
    parent = os.getppid()
    while not told.exists():
        if os.getppid() != parent:
            raise SourceError("standard input: the process that reads it has ended.")
        time.sleep(_POLL_SECONDS)
    return TokenStore(out / "tokens" / "input"), []


def _read(how: Tokenizing, out: Path, replace: bool) -> tuple[TokenStore, list[str]]:
    place = out / "tokens" / "input"
    try:
        earlier = TokenStore(place)
    except NotWhole:
        earlier = None
    stream = _stream()
    if stream is None:
        if earlier is None:
            raise SourceError(
                f"standard input: is empty, and {out} keeps nothing that an earlier call has read. Pipe text or JSON Lines into it."
            )
        return earlier, [f"from an earlier call's standard input, in {place}"]

    def make(folder: Path) -> None:
        how.write(folder, read_unnamed(stream, how.column))
        if earlier is not None and not replace and TokenStore(folder).digest != earlier.digest:
            raise OtherInput(f"{out}: holds a run on another text than that of standard input.")

    remake(place, make)
    return TokenStore(place), [f"from standard input, kept in {place}"]


def _stream() -> Any:
    """Return the bytes of standard input, or ``None`` if there are none."""
    raw = getattr(sys.stdin, "buffer", None)
    if raw is None or raw.closed or raw.isatty():
        return None
    stream = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
    return stream if stream.peek(1) else None

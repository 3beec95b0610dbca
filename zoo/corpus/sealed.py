"""Folders that are whole or not there: made aside, renamed into place, and known by the sizes and digests of their files.

Any number of processes may ask for one at once: the first makes it, the others wait for its lock, which ends with its process.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoint.publish import discard, sync
from ..digests import digest_file

__all__ = ["NotWhole", "kept", "remake", "seal", "unseal"]

T = TypeVar("T")
_FORMAT, _SEAL = 1, "sealed.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NotWhole(ValueError):
    """A folder that is not there, or is not as it was sealed; the message says why."""


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Note the facts about a folder, and its files; nothing may be written to it after this."""
    files = {}
    for file in sorted(f for f in folder.iterdir() if f.is_file()):
        sync(file)
        found = file.stat()
        files[file.name] = [found.st_size, digest_file(file), found.st_mtime_ns]
    content = {"format": _FORMAT, "facts": facts, "files": files}
    (folder / _SEAL).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync(folder / _SEAL)
    sync(folder)


def unseal(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the facts about a folder whose files are what was sealed, and a text that two folders of the same files share.

    Bytes are read again where a file's time has changed.

    Raises:
        NotWhole: Anything else.
    """
    try:
        content = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise NotWhole(f"{folder}: is of format {content['format']}, and this version reads {_FORMAT}")
        files = {
            str(name): (int(size), str(digest), int(time)) for name, (size, digest, time) in content["files"].items()
        }
        facts = dict(content["facts"])
        for name, (size, digest, time) in files.items():
            found = (folder / name).stat()
            if found.st_size != size:
                raise NotWhole(f"{folder / name}: has {found.st_size} bytes, and {size} were written")
            if found.st_mtime_ns != time and digest_file(folder / name) != digest:
                raise NotWhole(f"{folder / name}: is not as it was written (its digest differs)")
    except NotWhole:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise NotWhole(f"{folder}: is not whole ({type(e).__name__}: {e})") from e
    return facts, json.dumps([[name, size, digest] for name, (size, digest, _) in sorted(files.items())])


def kept(place: Path, make: Callable[[Path], None], read: Callable[[Path], T]) -> tuple[T, bool]:
    """Read the folder ``place``, which is made first where it is not whole.

    Args:
        place: The folder.
        make: Fills an empty folder, and seals it.
        read: Opens one, or raises :class:`NotWhole`.

    Returns:
        What was read, and whether it was there already.

    Raises:
        OSError: It cannot be written; where the disk is full, the message says what to do.
    """
    with _locked(place):
        try:
            return read(place), True
        except NotWhole:
            _make(place, make)
            return read(place), False


def remake(place: Path, make: Callable[[Path], None]) -> None:
    """Make the folder ``place`` as :func:`kept` does, whether or not it is there; what was there stays if that fails."""
    with _locked(place):
        _make(place, make)


def _locked(place: Path) -> Any:
    from filelock import FileLock

    # for its owner alone: texts may be nobody else's to read
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileLock(place.with_name(f".{place.name}.lock"))


def _make(place: Path, make: Callable[[Path], None]) -> None:
    _sweep(place.parent)
    part = place.with_name(f".{place.name}.writing")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(mode=0o700)
        make(part)
        discard(place)
        part.replace(place)
    except OSError as e:
        if e.errno not in _FULL:
            raise
        raise OSError(
            f"{place.parent}: there is no room for the tokens ({os.strerror(e.errno or 0)}). Make some, or name a folder on a larger disk: "
            "HYBRIDZOO_CACHE, or out (--out) for those of standard input."
        ) from e
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove what processes that were killed have left of other folders; who is at work on one holds its lock."""
    from filelock import FileLock, Timeout

    for aside in parent.glob(".deleting-*"):
        shutil.rmtree(aside, ignore_errors=True)
    for part in parent.glob(".*.writing"):
        lock = FileLock(part.with_suffix(".lock"))
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(part, ignore_errors=True)
        except (Timeout, OSError):
            continue

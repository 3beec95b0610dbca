"""The errors of a disk that is full or takes nothing, which name the folder and what to do."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["naming_disk"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def naming_disk(out: Path) -> Iterator[None]:
    """Say of a disk that is full, or not to be written to, that the run's folder ``out`` lies there, with an OSError."""
    try:
        yield
    except OSError as e:
        why = os.strerror(e.errno or 0)
        if e.errno in _FULL:
            raise OSError(f"{out}: there is no room left ({why}). Make some, and the same call goes on.") from e
        if e.errno in _REFUSED and _concerns(e.filename, out):
            raise OSError(f"{out}: cannot be written to ({why}). Name another folder (--out).") from e
        raise


def _concerns(name: str | bytes | int | None, out: Path) -> bool:
    """Return whether a file that an error names lies in ``out``, or is a folder that ``out`` was to be made in."""
    if not isinstance(name, str):
        return False
    file, folder = Path(name).resolve(), out.resolve()
    return file.is_relative_to(folder) or folder.is_relative_to(file)

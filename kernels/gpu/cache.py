"""Keeps what the compiler made of a kernel on disk, and gives back only what is whole.

The folder is ``HYBRIDZOO_CACHE``, else ``$XDG_CACHE_HOME/hybridzoo``, else ``~/.cache/hybridzoo``. What lies in it is run, so it has to be
its user's own: it is made for its owner alone, and one that belongs to anybody but the user or root, or that everybody may write to, is not
used. An entry says its key and its SHA-256, so one that was cut, altered or put in another's place is as good as none, and is replaced.

Files appear by an atomic rename, so any number of processes can share the folder. Without one, or where it cannot be written, every process
compiles anew: slower, never an error, and said once.
"""

import contextlib
import hashlib
import os
import stat
import time
import uuid
import warnings
from pathlib import Path

__all__ = ["keep", "place", "read", "refused"]

_PART = ".hybridzoo-"
# what is being written is complete within seconds; older parts are of processes that were killed
_STALE_SECONDS = 3600
_said: set[str] = set()


def place() -> tuple[Path | None, str | None]:
    """The folder of the entries, and why there can be none; the folder need not exist yet."""
    own, base = os.environ.get("HYBRIDZOO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        folder = Path(own)
    # the XDG specification has relative paths ignored
    elif base and os.path.isabs(base):
        folder = Path(base, "hybridzoo")
    else:
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None, "there is no home folder. Set HYBRIDZOO_CACHE to a folder of yours"
        folder = Path(home, ".cache", "hybridzoo")
    return folder, refused(folder)


def refused(folder: Path) -> str | None:
    """Say why a folder must not hold code that is run, or ``None``; also for one that does not exist yet."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    except OSError as e:
        return f"{folder}: {e.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder}: is not a folder"
    if hasattr(os, "geteuid"):
        if found.st_uid not in (os.geteuid(), 0):
            return f"{folder}: belongs to another user ({found.st_uid}, not {os.geteuid()}). Set HYBRIDZOO_CACHE to a folder of yours"
        if found.st_mode & stat.S_IWOTH:
            return (
                f"{folder}: everybody may write to it. Run chmod o-w on it, or set HYBRIDZOO_CACHE to a folder of yours"
            )
    return None


def read(key: str) -> bytes | None:
    """Return what was kept under a key (hex), or ``None`` if there is nothing, or nothing whole."""
    folder, reason = place()
    if folder is None or reason is not None:
        return None
    file = _file(folder, key)
    try:
        content = file.read_bytes() if file.is_file() else b""
    except OSError:
        return None  # said when it cannot be replaced either
    header, _, body = content.partition(b"\n")
    return body if header == _header(key, body) else None


def keep(key: str, body: bytes) -> None:
    """Keep something under a key, or say once why it is not kept."""
    folder, reason = place()
    if folder is not None and reason is None:
        part = folder / f"{_PART}{uuid.uuid4().hex}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                with open(part, "xb") as f:
                    f.write(_header(key, body) + b"\n" + body)
                os.replace(part, _file(folder, key))
            finally:
                # gone already if all went well; a disk that gives no place may still take it away
                with contextlib.suppress(OSError):
                    part.unlink()
            _sweep(folder)
        except OSError as e:
            reason = f"{folder}: {e.strerror or type(e).__name__}"
    if reason is not None and reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"hybridzoo: compiled CUDA kernels are not kept on disk, so that every process compiles them anew: {reason}.",
            stacklevel=2,
        )


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key[:40]}.cubin"


def _header(key: str, body: bytes) -> bytes:
    return f"hybridzoo {key} {hashlib.sha256(key.encode() + body).hexdigest()}".encode()


def _sweep(folder: Path) -> None:
    for part in folder.glob(_PART + "*"):
        # another process may be quicker, and what is no file is nothing of ours
        with contextlib.suppress(OSError):
            if part.lstat().st_mtime < time.time() - _STALE_SECONDS:
                part.unlink()

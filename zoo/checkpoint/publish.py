"""Reading and writing the folder of a checkpoint while other processes do the same.

A save is decided by one rename. Its files are completed in ``.saving-*`` beside those that they replace, that folder is renamed to
``.decided``, and from then on it is the model: whoever comes next, be it a load or another save, moves the rest of the files into their
places if the process that began it has died. Before that rename the old model stands as it was.
"""

import contextlib
import errno
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from ..config.plain import first_line
from ..errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has none: there, two processes that save to one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "GENERATION",
    "check_new",
    "discard",
    "new_folder",
    "publishing",
    "steady",
    "sync",
    "whole_file",
    "why_unwritten",
    "write_whole",
]

GENERATION = "generation_config.json"
_SAVING, _DECIDED, _REMOVE = ".saving-", ".decided", ".remove.json"
# seconds: how long what a killed process left is kept; how long a load waits for a save, and a save for another's files to be in place
_STALE, _PATIENCE, _LOCK_PATIENCE = 600, 10, 60
T = TypeVar("T")
# how libraries that do not write in Python call what cannot be written, and the room that is left when a disk is full
_UNWRITTEN, _ROOM = ("I/O error", "inline_container", "PytorchStreamWriter"), 1 << 20
# folders that a thread has locked: device, inode, thread
_held: set[tuple[int, int, int]] = set()


def steady(folder: Path, read: Callable[[], T]) -> T:
    """Return what ``read`` gives for a folder that nobody changes meanwhile; it is called again while somebody does.

    It opens the files and reads the small ones. Values may be read later: an open file stays what it is when another takes its place. A
    save that was decided, and whose process died, is finished first.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        if os.path.lexists(folder / _DECIDED):
            try:
                with _locked(folder):
                    _finish(folder)
            except OSError as e:
                raise CheckpointError(
                    f"{folder}: a save to it was interrupted and cannot be finished here ({e.strerror}). Load it once as somebody who "
                    "may write to it, or save again."
                ) from e
        before = _identities(folder)
        error: Exception | None = None
        try:
            result = read()
        except (CheckpointError, OSError) as e:  # a file may vanish while it is asked for
            error = e
        if before == _identities(folder):
            if error is not None:
                raise error
            return result
        if time.monotonic() > end:
            raise CheckpointError(
                f"{folder}: was written to every time that it was read, for {_PATIENCE} s. Load it again when the other process is done."
            )
        time.sleep(0.01)


def _identities(folder: Path) -> dict[str, tuple[int, ...]]:
    """The files that make up the model at this moment; one that is replaced or written to is another one."""
    found: dict[str, tuple[int, ...]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name in ("config.json", "config.yaml", GENERATION, _DECIDED) or name.endswith(
                (".safetensors", ".bin", ".index.json")
            ):
                try:
                    s = entry.stat()
                    found[name] = (s.st_ino, s.st_size, s.st_mtime_ns)
                except OSError:  # gone since, or a link that leads nowhere
                    found[name] = ()
    return found


@contextlib.contextmanager
def publishing(folder: Path, stale: Callable[[set[str]], Iterable[str]] = lambda names: ()) -> Iterator[Path]:
    """A place to write files in, which take their places in ``folder`` all at once when the block ends well.

    Other files of the folder are left alone, but for those that ``stale`` says the new ones, given by name, make meaningless. A killed
    process leaves the old files or the new ones, never some of each; what it had not finished goes with a later save.
    """
    folder = folder.resolve()  # a link may lead to a folder that is still to be made
    with _made(folder), _scratch(folder) as new:
        yield new
        names = {p.name for p in new.iterdir()}
        if not names:
            return
        if gone := sorted(set(stale(names)) - names):
            (new / _REMOVE).write_text(json.dumps(gone), encoding="utf-8")
        _complete(new)
        with _locked(folder):
            _finish(folder)
            os.replace(new, folder / _DECIDED)
            sync(folder)
            _finish(folder)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder, which goes again if it is new and what is done in it fails and leaves nothing."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # somebody else's files
                folder.rmdir()
        raise


def _finish(folder: Path) -> None:
    """Move the files of a save that was decided into their places, if there is one. Who calls holds the lock."""
    decided = folder / _DECIDED
    if not decided.exists():
        return
    if decided.is_symlink() or not decided.is_dir():
        raise CheckpointError(f"{decided}: is not what a save leaves. Remove it.")
    files = [p for p in decided.iterdir() if p.name != _REMOVE]
    listed = decided / _REMOVE
    remove = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
    if not isinstance(remove, list) or not all(isinstance(n, str) and n == os.path.basename(n) for n in remove):
        raise CheckpointError(f"{listed}: names files outside the folder. Remove {decided}.")
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # where there are no locks, somebody else may have finished it
            os.replace(file, folder / file.name)
    for name in remove:
        (folder / name).unlink(missing_ok=True)
    sync(folder)
    shutil.rmtree(decided, ignore_errors=True)


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A new folder to prepare files in, which is gone afterwards unless it has been renamed; those of killed processes go before."""
    _sweep(parent, f"{_SAVING}*")
    # not of tempfile, whose folders are for their owner alone
    new = parent / f"{_SAVING}{uuid.uuid4().hex}"
    new.mkdir(parents=True)  # another save that failed may have taken the folder with it
    try:
        with _locked(new):
            yield new
    except (SafetensorError, RuntimeError) as e:
        if parent.name.startswith(_SAVING) or not any(words in str(e) for words in _UNWRITTEN):
            raise  # a scratch folder says nothing to anybody; what it is for is named by who made it
        raise OSError(
            f"{parent}: cannot be written to ({why_unwritten(e, parent)}). Make room, and do the same again."
        ) from e
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes have left: old, and held by nobody."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):  # somebody else's, or swept by another process at this moment
            is_folder = left.is_dir() and not left.is_symlink()
            inside = list(left.iterdir()) if is_folder else []
            if time.time() - max(p.lstat().st_mtime for p in (left, *inside)) < _STALE:
                continue
            if not is_folder:
                left.unlink()
                continue
            with _locked(left, patience=0):
                shutil.rmtree(left)


@contextlib.contextmanager
def _locked(folder: Path, patience: float = _LOCK_PATIENCE) -> Iterator[None]:
    """Alone among the processes that ask for this folder; where the file system knows no locks, without."""
    if fcntl is None:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    key = (os.fstat(fd).st_dev, os.fstat(fd).st_ino, threading.get_ident())
    mine = key in _held  # a save into the scratch folder of an export, say
    try:
        if mine and not patience:
            raise TimeoutError(f"{folder}: is being written to.")
        end = time.monotonic() + patience
        while not mine:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError(
                        f"{folder}: another process has been saving to it for {patience} s. Try again."
                    ) from None
                time.sleep(0.005)
                continue
            except OSError:
                pass  # a file system without locks
            break
        _held.add(key)
        yield
    finally:
        if not mine:
            _held.discard(key)
        os.close(fd)


def why_unwritten(error: Exception, folder: Path) -> str:
    """Return why a file could not be written to ``folder``; some libraries say of a full disk that a position is not the expected one."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < _ROOM:
            return os.strerror(errno.ENOSPC)
    return first_line(error)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and fcntl is None:
        return  # Windows opens no folders
    fd = os.open(path, os.O_RDWR if fcntl is None else os.O_RDONLY)  # where to write is to be asked for, it must be
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _complete(folder: Path) -> None:
    """Wait for all files of a scratch folder, with the rights that the umask leaves: safetensors' are for their owner alone."""
    mode = folder.stat().st_mode & 0o666  # the folder itself was made with them
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(folder)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Let a file be written so that no half of it is ever seen, with the rights that the umask leaves; its folder is made if it is missing.

    The value is where to write: what stands there at the end takes the file's place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent, ".writing-*")
    # not of tempfile, whose files are for their owner alone
    temporary = path.parent / f".writing-{uuid.uuid4().hex}"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o666
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file as :func:`whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_new(folder: Path) -> None:
    """Raise a :class:`CheckpointError` if ``folder`` exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already. Choose a new folder, or empty this one.")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place to write in, which becomes ``folder``, a new one, when the block ends well and vanishes when it does not."""
    check_new(folder)
    folder = folder.resolve()  # a link stays one, and what is made ready lies on its file system
    if folder.is_mount():
        # nothing can be renamed to it
        with publishing(folder) as new:
            yield new
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(folder.parent) as new:
        yield new
        _complete(new)
        os.replace(new, folder)
        sync(folder.parent)


def discard(folder: Path) -> None:
    """Remove a folder, if it is there, renamed first: nobody takes half of it for a whole one, and what is left lies in ``.deleting-*``."""
    if folder.exists():
        aside = folder.with_name(f".deleting-{uuid.uuid4().hex}")
        folder.replace(aside)
        shutil.rmtree(aside)

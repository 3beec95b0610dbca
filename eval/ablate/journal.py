"""The file that a queue is kept in where no database is named: Optuna's journal, which a killed writer or a full disk does not break.

Of Optuna's own, two things are replaced. Its lock is a file that a killed process leaves behind, for which all others then wait half a
minute, and may take twice; this one is the operating system's, and ends with its process. And half a record at the end, which the next
writer would make a broken line of, is taken away before anything is added.
"""

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from optuna.storages.journal import JournalFileBackend

__all__ = ["Journal", "QueueError"]

_PATIENCE = 60.0  # seconds that one record may be waited for
_TAIL = 1 << 16


class QueueError(ValueError):
    """A queue that cannot be read, written or reached; the message says where it is, why, and what to do."""


class Journal(JournalFileBackend):
    """Records of a queue, a line of JSON each, for any number of processes; of several hosts, where the file system's locks hold for all.

    Args:
        path: Made if it is missing; its folder has to be there.

    Raises:
        QueueError: It cannot be made, read or written; or a line of it is no record.
    """

    def __init__(self, path: Path):
        self.path = path.resolve()
        self._record_lock = FileLock(f"{self.path}.lock")
        try:
            super().__init__(str(self.path))
        except OSError as e:
            raise self._unusable("made", e) from e

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the records from a number on."""
        number = log_number_from
        try:
            for record in super().read_logs(log_number_from):
                number += 1
                if not (isinstance(record, dict) and "op_code" in record):
                    raise ValueError("is no record of a queue")
                yield record
        except OSError as e:
            raise self._unusable("read", e) from e
        except ValueError as e:
            raise QueueError(
                f"{self.path}: line {number + 1} or the one before it is damaged ({e}). Move the file away, with nobody at work, and run "
                "the study again: results are kept apart from it, and no finished cell is trained anew."
            ) from e

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add records: all of them, or none."""
        content = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        try:
            with self._record_lock.acquire(timeout=_PATIENCE):
                file = os.open(self.path, os.O_RDWR)
                try:
                    _append(file, content)
                finally:
                    os.close(file)
        except Timeout as e:
            raise QueueError(
                f"{self.path}: another process has held its lock for {_PATIENCE:.0f} s. See whether one of the study's is suspended."
            ) from e
        except OSError as e:
            raise self._unusable("written", e) from e

    def _unusable(self, done: str, e: OSError) -> QueueError:
        return QueueError(
            f"{self.path}: the study's queue cannot be {done} ({e.strerror or e}). Make room or give it rights there, or name another "
            "folder (--out) or a database (--storage)."
        )


def _append(file: int, content: bytes) -> None:
    end = _whole(file, os.fstat(file).st_size)
    os.ftruncate(file, end)
    written = 0
    try:
        while written < len(content):
            written += os.pwrite(file, content[written:], end + written)
        os.fsync(file)
    except OSError:
        os.ftruncate(file, end)
        raise


def _whole(file: int, size: int) -> int:
    """Return the length of a file up to its last line's end."""
    end = size
    while end:
        begin = max(0, end - _TAIL)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0

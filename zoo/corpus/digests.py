"""Digests of rows and files: every byte counts, and all cores take part.

A digest is SHA-256 (for which CPUs have instructions) over the digests of chunks, formed side by side: hashlib lets go of the lock.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["digest_chunks", "digest_file", "digest_rows"]

_CHUNK = 1 << 24


def digest_rows(table: np.ndarray) -> str:
    """Of an ``(n, l)`` table, in memory or mapped: its shape, its type and every id."""
    step = max(1, _CHUNK // max(1, table[:1].nbytes))
    kind = table.dtype.newbyteorder("<")

    def chunk(i: int) -> Any:
        return np.ascontiguousarray(table[i * step : (i + 1) * step], dtype=kind).data.cast("B")

    return digest_chunks(f"{table.shape} {kind.str}", -(-len(table) // step), chunk)


def digest_file(file: Path) -> str:
    """Of a file's bytes."""
    size = file.stat().st_size

    def chunk(i: int) -> bytes:
        with file.open("rb") as f:
            f.seek(i * _CHUNK)
            return f.read(_CHUNK)

    return digest_chunks(str(size), -(-size // _CHUNK), chunk)


def digest_chunks(about: str, chunks: int, chunk: Callable[[int], Any]) -> str:
    """Of ``about`` and of the bytes that ``chunk`` gives for each number below ``chunks``."""
    total = hashlib.sha256(about.encode())
    with ThreadPoolExecutor(max(1, min(chunks, os.cpu_count() or 1, 16))) as pool:
        for part in pool.map(lambda i: hashlib.sha256(chunk(i)).digest(), range(chunks)):
            total.update(part)
    return total.hexdigest()

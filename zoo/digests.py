"""Digests of rows, files and weights: every byte counts, and all cores take part.

A digest is SHA-256 (for which CPUs have instructions) over the digests of chunks, formed side by side: hashlib lets go of the lock.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["digest_file", "digest_rows", "digest_weights"]

_CHUNK = 1 << 24


def digest_rows(table: np.ndarray) -> str:
    """Of an ``(n, l)`` table, in memory or mapped: its shape, its type and every id."""
    step = max(1, _CHUNK // max(1, table[:1].nbytes))
    kind = table.dtype.newbyteorder("<")

    def chunk(i: int) -> Any:
        return np.ascontiguousarray(table[i * step : (i + 1) * step], dtype=kind).data.cast("B")

    return _digest_chunks(f"{table.shape} {kind.str}", -(-len(table) // step), chunk)


def digest_file(file: Path) -> str:
    """Of a file's bytes."""
    size = file.stat().st_size

    def chunk(i: int) -> bytes:
        with file.open("rb") as f:
            f.seek(i * _CHUNK)
            return f.read(_CHUNK)

    return _digest_chunks(str(size), -(-size // _CHUNK), chunk)


def digest_weights(model: nn.Module) -> str:
    """Of all parameters: names, shapes, types and every bit."""
    named = list(model.named_parameters())
    about = [(name, tuple(p.shape), str(p.dtype)) for name, p in named]

    def chunk(i: int) -> Any:
        return named[i][1].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return _digest_chunks(repr(about), len(named), chunk)


def _digest_chunks(about: str, chunks: int, chunk: Callable[[int], Any]) -> str:
    """Of ``about`` and of the bytes that ``chunk`` gives for each number below ``chunks``."""
    total = hashlib.sha256(about.encode())
    with ThreadPoolExecutor(max(1, min(chunks, os.cpu_count() or 1, 16))) as pool:
        for part in pool.map(lambda i: hashlib.sha256(chunk(i)).digest(), range(chunks)):
            total.update(part)
    return total.hexdigest()

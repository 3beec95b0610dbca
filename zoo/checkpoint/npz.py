"""Arrays in an ``.npz`` file (a zip archive of ``.npy`` files), one after the other, as :mod:`.tensors` reads tensors.

Nothing is unpickled, and no small file asks for much memory: an archive's arrays take at most eight times its size. JAX's *kernels* have
their outputs in the last dimension. They are given in torch's order: ``(in, out)`` as ``(out, in)``, ``(k, in, out)`` as ``(out, in, k)``.
"""

import contextlib
import functools
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensors import Stored, damaged

__all__ = ["stored_arrays"]

_MOST_ARRAYS, _MOST_TIMES = 10_000, 8
_KINDS = {"f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "i8": torch.int64, "i4": torch.int32}


def stored_arrays(file: Path, handle: BinaryIO) -> Iterator[tuple[str, Stored]]:
    """The arrays of an archive, by name; their values are checked against the archive's sums when they are read."""
    archive, entries = _opened(file, handle)
    names = set()
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        if name in names or name == entry.filename:
            raise damaged(file, f"its entry {entry.filename!r} is there twice, or is no .npy file")
        names.add(name)
        yield name, _described(file, archive, entry, name)


def _opened(file: Path, handle: BinaryIO) -> tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]:
    size = os.fstat(handle.fileno()).st_size
    with _damage(file):
        archive = zipfile.ZipFile(handle)
        entries = archive.infolist()
        if len(entries) > _MOST_ARRAYS:
            raise damaged(file, f"has {len(entries)} entries, more than {_MOST_ARRAYS}")
        if (total := sum(entry.file_size for entry in entries)) > _MOST_TIMES * size:
            raise damaged(
                file, f"its entries take {total} bytes, and it has {size}; at most {_MOST_TIMES} times that is read"
            )
    return archive, entries


def _described(file: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> Stored:
    with _damage(file), archive.open(entry) as f:
        version = np.lib.format.read_magic(f)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, kind = read(f)
        if f.tell() + math.prod(shape) * kind.itemsize != entry.file_size or kind.hasobject:
            raise damaged(
                file, f"array {name!r} of shape {shape} and kind {kind} does not take {entry.file_size} bytes"
            )
    dtype = _KINDS.get(kind.str[1:], str(kind))
    is_kernel = name.endswith("kernel") and len(shape) >= 2
    turned = (shape[-1], shape[-2], *shape[:-2]) if is_kernel else shape
    return Stored(file, turned, dtype, functools.partial(_values, file, archive, entry, is_kernel))


def _values(file: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, is_kernel: bool) -> Tensor:
    with _damage(file), archive.open(entry) as f:
        array = np.lib.format.read_array(f, allow_pickle=False)
        if f.read(1):  # and at the end, the sum is checked
            raise damaged(file, f"{entry.filename!r} is longer than its array")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if is_kernel:
        array = np.moveaxis(array, (-1, -2), (0, 1))
    return torch.from_numpy(np.array(array, order="C"))


@contextlib.contextmanager
def _damage(file: Path) -> Iterator[None]:
    try:
        yield
    # zipfile, zlib and numpy's reader meet a cut or a flipped bit with many kinds of exceptions
    except Exception as e:
        if isinstance(e, CheckpointError | MemoryError):
            raise
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise damaged(file, reason) from e

"""The kernels' parameter structs: pointers first, then what stays the same from call to call."""

import ctypes
import functools
import struct
from ctypes import c_void_p
from typing import Any

from torch import Tensor


def fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Fields of one type, for ``_fields_``."""
    return [(name, kind) for name in names.split()]


def strides(**tensors: tuple[int, ...]) -> dict[str, int]:
    """Field names and values: ``u=(s, t)`` gives ``u_b, u_l``, a third stride ``_g``."""
    return {f"{name}_{axis}": s for name, values in tensors.items() for axis, s in zip("blg", values, strict=False)}


def tail(p: ctypes.Structure) -> bytes:
    """A struct's bytes behind its leading pointers."""
    first = next(name for name, kind in p._fields_ if kind is not c_void_p)  # type: ignore[misc]
    return bytes(p)[getattr(type(p), first).offset :]


@functools.cache
def _head(count: int) -> struct.Struct:
    return struct.Struct(f"{count}Q")


def pack(rest: bytes, *tensors: Tensor | int | None) -> bytes:
    """The struct with these pointers, then ``rest`` as :func:`tail` made it."""
    pointers = [0 if x is None else x if type(x) is int else x.data_ptr() for x in tensors]  # type: ignore[union-attr]
    return _head(len(tensors)).pack(*pointers) + rest

"""Partial sums of the blocks of a launch, added up in a fixed order."""

import ctypes
import functools
from ctypes import c_int, c_void_p

from torch import Tensor

from . import nvrtc, structs
from .operands import TYPES, ceil_div


class SumParams(ctypes.Structure):
    """``ColumnSumsParams`` of ``sums.cu``."""

    _fields_ = [*structs.fields(c_void_p, "part gweight gbias"), *structs.fields(c_int, "rows k d")]


@functools.lru_cache(maxsize=1024)
def _tail(rows: int, k: int, d: int) -> bytes:
    return structs.tail(SumParams(rows=rows, k=k, d=d))


def add_up(part: Tensor, gweight: Tensor | None, gbias: Tensor) -> None:
    """Sum (rows, k + 1, d) float32 over the rows, always in the same order, into (d, k) and (d), of one type."""
    rows, k, d = part.shape[0], part.shape[1] - 1, part.shape[2]
    packed = structs.pack(_tail(rows, k, d), part, gweight, gbias)
    name = f"column_sums<{TYPES[gbias.dtype]}>"
    nvrtc.launch("sums.cu", name, packed, ceil_div((k + 1) * d, 32), 256, 0, part.device)

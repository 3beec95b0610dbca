"""The kernels' parameter structs, field for field as in ``*.cu``: pointers first, then what stays the same from call to call."""

import ctypes
import struct
from collections.abc import Sequence
from ctypes import c_int, c_longlong, c_uint, c_void_p

from ..gpu.structs import fields


class WalkParams(ctypes.Structure):
    """The order that a row's tokens are visited in."""

    _fields_ = [("magic", c_uint), *fields(c_int, "shift first turn jump step")]


class CutParams(ctypes.Structure):
    """A cut of rows along the length."""

    _fields_ = fields(c_int, "whole chunks first length")


def walk(path: tuple[int, ...] | None, l: int) -> WalkParams:
    """A path of :mod:`.paths` over ``l`` tokens; none is 0, 1, 2, ..."""
    _, inner, far, near, reverse = path or (1, l, 0, 1, False)
    shift = 31 + (inner - 1).bit_length()
    turn = (l - 1, -1) if reverse else (0, 1)
    return WalkParams(2**shift // inner + 1, shift, *turn, far - inner * near, near)


_SIZES = "l batch d n groups tiles_per_group softplus"


class ForwardParams(ctypes.Structure):
    """``ForwardParams`` of ``scan_forward.cu``."""

    _fields_ = [
        *fields(c_void_p, "u dt B C z A D bias h0 reset valid out last saved local decay before sum weight"),
        *fields(c_longlong, "u_b u_l dt_b dt_l B_b B_l B_g C_b C_l C_g z_b z_l out_b out_l"),
        ("walk", WalkParams),
        ("cut", CutParams),
        *fields(c_int, _SIZES),
        *fields(c_int, "rank first_tiles"),
    ]


class BackwardParams(ctypes.Structure):
    """``BackwardParams`` of ``scan_backward.cu``."""

    _fields_ = [
        *fields(
            c_void_p,
            "u dt B C z gout A D bias saved h0 glast local decay reset valid gu gdt gz gbc gA gskip ginit out",
        ),
        *fields(c_longlong, "u_b u_l dt_b dt_l B_b B_l B_g C_b C_l C_g z_b z_l"),
        *fields(c_longlong, "gout_b gout_l gu_b gu_l gdt_b gdt_l gz_b gz_l"),
        ("walk", WalkParams),
        ("cut", CutParams),
        *fields(c_int, _SIZES),
    ]


# SumParams of scan_backward.cu behind its pointers: of each array the size, stride, count, wide, first block
_SUMS = struct.Struct("qqiii4x" * 5)


def sums(parts: Sequence[tuple[int, int, int, bool]]) -> tuple[bytes, int]:
    """Five arrays to add up, each (elements, stride, how many, whether the result is float32), and the blocks for it."""
    values, block = [], 0
    for part in parts:
        values += [*part, block]
        block += (part[0] + 255) // 256
    return _SUMS.pack(*values), block

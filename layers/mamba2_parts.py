"""Mamba-2 in parts: what each way along the rows has of its own, and what its options have to be."""

from typing import NamedTuple

from torch import Tensor

from .conv import CausalConv1d
from .directions import names_of
from .options import check, check_divides


class Parts(NamedTuple):
    """The parts that each way along the rows has of its own, unless both have them in common."""

    conv1d: CausalConv1d
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor


NAMES = names_of(Parts)


def check_shapes(d_inner: int, what: str, d_ssm: int | None, headdim: int, ngroups: int) -> None:
    """Check that channels form heads, and heads groups; ``what`` names ``d_inner``."""
    check(
        d_ssm is None or d_ssm <= d_inner,
        "d_ssm",
        f"{d_ssm} exceeds {what} = {d_inner}. Use at most {d_inner}, or a larger {what.partition(' ')[0]}.",
    )
    width, what = (d_inner, what) if d_ssm is None else (d_ssm, "d_ssm")
    check_divides("headdim", headdim, what, width)
    nheads = width // headdim
    check(
        nheads % ngroups == 0,
        "ngroups",
        f"{nheads} heads ({what} / headdim) cannot form ngroups = {ngroups} equal groups. "
        f"Pick ngroups from the divisors of {nheads}.",
    )


def check_ranges(A_init_range: tuple, dt_limit: tuple, multipliers: tuple, norm_eps: float) -> None:
    """Check ranges and what has to be positive."""
    low, high = A_init_range
    rates = f"({low}, {high}) is not a range of positive rates. Use 0 < low <= high."
    check(0 < low <= high, "A_init_range", rates)
    low, high = dt_limit
    check(0 <= low < high, "dt_limit", f"({low}, {high}) is not a range of step sizes. Use 0 <= low < high.")
    check(len(multipliers) == 5, "multipliers", f"{len(multipliers)} numbers. Give 5, for z, x, B, C, dt.")
    check(norm_eps > 0, "norm_eps", f"{norm_eps} is not positive. The usual value is 1e-5.")

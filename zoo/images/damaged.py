"""The error of a picture that cannot be used."""

from collections.abc import Sequence

from ..errors import SourceError

__all__ = ["DAMAGED", "DamagedImage", "refusal"]

# what is done with one: training stops before its first step, or goes without it
DAMAGED = ("stop", "skip")
_NAMED = 5


class DamagedImage(SourceError):
    """A picture that is no whole image, or is one of a size or kind that a model cannot take; the message names it."""


def refusal(found: Sequence[DamagedImage], of: int) -> DamagedImage:
    """Return one error for all damaged pictures of a set of ``of``."""
    remedy = "Replace what is wrong, or go without it: damaged='skip' (--damaged skip)."
    if len(found) == 1:
        return DamagedImage(f"{found[0]} {remedy}")
    named = " ".join(map(str, found[:_NAMED])) + (" ..." if len(found) > _NAMED else "")
    return DamagedImage(f"{len(found):,} of {of:,} images cannot be used: {named} {remedy}")

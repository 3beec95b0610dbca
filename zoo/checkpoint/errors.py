"""The error of everything that reads and writes checkpoints."""

from ..errors import SourceError

__all__ = ["CheckpointError"]


class CheckpointError(SourceError):
    """A folder that does not hold a whole, matching model: which file, what is wrong with it, and the remedy."""

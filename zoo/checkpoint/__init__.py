"""Models on disk: the zoo's own folders, those of transformers and mamba-ssm, and the hub."""

from ..errors import CheckpointError
from .native import save
from .reading import load
from .writing import Report, convert, export

__all__ = ["CheckpointError", "Report", "convert", "export", "load", "save"]

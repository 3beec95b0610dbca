"""Models on disk: the zoo's own folders, those of transformers and mamba-ssm, and the hub."""

from ..errors import CheckpointError
from .loading import load
from .native import save
from .report import LoadReport, Report
from .writing import convert, export

__all__ = ["CheckpointError", "LoadReport", "Report", "convert", "export", "load", "save"]

"""Paths of data, looked at before anything heavy is imported: the standard library is all that this needs."""

import os
from pathlib import Path

from ..named import check_there

__all__ = ["STANDARD_INPUT", "check_path"]

STANDARD_INPUT = "-"
_KINDS = "a text, .jsonl, .parquet or .npy (token ids) file, a folder of them or of a dataset, or - for standard input"


def check_path(path: str | os.PathLike[str], more: str = ".") -> Path:
    """The path, if something is there or it is ``-``, standard input; otherwise a FileNotFoundError, which says what else may be given."""
    path = Path(path)
    if str(path) != STANDARD_INPUT:
        check_there(path, f"Give {_KINDS}{more}")
    return path

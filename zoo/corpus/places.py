"""Paths of data, looked at before anything heavy is imported: the standard library is all that this needs."""

import os
from pathlib import Path

from ..named import near_path

__all__ = ["STANDARD_INPUT", "check_path"]

STANDARD_INPUT = "-"


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, if something is there or it is ``-``, standard input; otherwise a FileNotFoundError that names what is nearly called so."""
    path = Path(path)
    if os.path.exists(path) or str(path) == STANDARD_INPUT:
        return path
    hint = f" Did you mean {near!r}?" if (near := near_path(path)) else ""
    raise FileNotFoundError(
        f"{path}: no such file or folder.{hint} Give a text, .jsonl, .parquet or .npy (token ids) file, a folder of them or of a "
        "dataset, or - for standard input."
    )

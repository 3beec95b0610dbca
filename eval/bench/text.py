"""Real text of real lengths that needs no network: Python's own documentation, a document per topic and per module."""

import ast
import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from ...zoo.tokenizer import ByteTokenizer

__all__ = ["documentation", "padded", "write_lines"]

# what explains nothing to a reader of the library
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def documentation() -> list[str]:
    """Return the topics of ``help()``, and for each module of the standard library all its docstrings."""
    from pydoc_data.topics import topics

    found = [topics[name] for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(file.relative_to(library).parts) and (text := _docstrings(file)):
            found.append(text)
    return found


def write_lines(documents: list[str], path: Path) -> Path:
    """Write documents as JSON Lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def padded(documents: Iterable[str], length: int) -> list[dict[str, list[int]]]:
    """Return a row for every document, or piece of one, filled up to a length, as somebody without packing has them."""
    encode, rows = ByteTokenizer().encode, []
    for text in documents:
        ids = [0, *encode(text)]
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            rest = length - len(piece)
            rows.append(
                {
                    "input_ids": piece + [0] * rest,
                    "attention_mask": [1] * len(piece) + [0] * rest,
                    "labels": piece + [-100] * rest,
                }
            )
    return rows


def _docstrings(file: Path) -> str:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # some files are there to be wrong
        return ""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in texts if text)

"""The base of the converters.

A family is a way to write models down: a ``config.json`` and names for tensors. Its converter turns the config into ours
(:meth:`Family.read`), ours into theirs (:meth:`Family.write`), and lists which tensor is which (:meth:`Family.keys`). It imports
nothing of the library that the family comes from.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from ..errors import CheckpointError, shortened
from .fields import Fields
from .keys import Piece, View

__all__ = ["Family", "FileFamily", "Pieces", "Shapes"]

# by the name of the tensor of theirs
Pieces = dict[str, list[Piece]]


class Family:
    """Base of the converters; stateless.

    Attributes:
        model_type: The field of this name in ``config.json``.
        architecture: transformers' class.
        told_by: What says which tensors there are, for messages.
        ignored: A regular expression for stored tensors that are no weights.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    told_by: ClassVar[str] = "config.json"
    ignored: ClassVar[str] = r".*\.rotary_emb\.inv_freq"

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config for theirs."""
        raise NotImplementedError

    def write(self, view: View) -> dict[str, Any]:
        """Their config for ours. May assume that ours has the family's form: whoever calls this reads the result back and compares."""
        raise NotImplementedError

    def keys(self, view: View) -> Iterator[Piece]:
        """Say which tensor is which, under the names that are on disk."""
        raise NotImplementedError

    def pieces(self, view: View) -> Pieces:
        """The pieces of :meth:`keys`, by the tensor of theirs that they make up."""
        found: Pieces = {}
        for piece in self.keys(view):
            found.setdefault(piece.theirs, []).append(piece)
        return found


class Shapes(dict[str, tuple[int, ...]]):
    """The shapes of a file's tensors by name, from which a config is found."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], file: Path):
        super().__init__(shapes)
        self.file = file

    def of(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with so many dimensions; a ``CheckpointError`` if not."""
        if name not in self:
            raise CheckpointError(f"{self.file}: tensor {shortened(name)} is missing. The file is not complete.")
        shape = self[name]
        if len(shape) != dims or 0 in shape:
            raise CheckpointError(
                f"{self.file}: tensor {shortened(name)} has shape {shape}, expected {dims} dimensions with something in them."
            )
        return shape

    def count(self, start: str) -> int:
        """Count the numbers from 0 that follow ``start`` in names: 12, of ``start.0.`` to ``start.11.``."""
        found = {name[len(start) + 1 :].partition(".")[0] for name in self if name.startswith(f"{start}.")}
        numbers = {int(part) for part in found if part.isdecimal() and len(part) < 6}
        if not numbers or max(numbers) + 1 != len(numbers):
            lacks = next(i for i in range(len(numbers) + 1) if i not in numbers)
            raise CheckpointError(f"{self.file}: no tensor begins with {start}.{lacks}. The file is not complete.")
        return len(numbers)


class FileFamily(Family):
    """Base of the converters for files of tensors without any config; what the model is follows from names and shapes.

    Attributes:
        mark: A regular expression for the name of one tensor that every file of this family has, and no other family's.
        configs: Patterns for the names of the shipped configs of such models, which say what tensors do not.
        is_written: Whether an export can be asked for such a file.
    """

    mark: ClassVar[str]
    configs: ClassVar[tuple[str, ...]] = ()
    is_written: ClassVar[bool] = True
    told_by = "the config"
    ignored = r"(?!)"

    def find(self, shapes: Shapes) -> dict[str, Any]:
        """Our config of the model whose tensors these are; a ``CheckpointError`` where they are none."""
        raise NotImplementedError

    def classes(self, shapes: Shapes) -> int:
        """Classes that the stored head tells apart; 0 if there is none."""
        raise NotImplementedError

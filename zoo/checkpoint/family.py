"""The base of the converters.

A family is a way to write models down: a ``config.json`` and names for tensors. Its converter turns the config into ours
(:meth:`Family.read`), ours into theirs (:meth:`Family.write`), and lists which tensor is which (:meth:`Family.keys`). It imports
nothing of the library that the family comes from.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from .fields import Fields
from .keys import Piece, View

__all__ = ["Family", "Pieces"]

# by the name of the tensor of theirs
Pieces = dict[str, list[Piece]]


class Family:
    """Base of the converters; stateless.

    Attributes:
        model_type: The field of this name in ``config.json``.
        architecture: transformers' class.
        ignored: A regular expression for stored tensors that are no weights.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
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

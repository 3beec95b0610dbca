"""Text: the next byte; the score is what held-out text takes, in bits per byte."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from ....zoo.options import at_least, option
from ....zoo.tokenizer import ByteTokenizer
from ....zoo.train.data import pack, read_documents, topics
from ...tasks.generators import IGNORED
from .base import Part, RowsTask, Table

__all__ = ["Text"]

# of ten documents of a path, one is validated on, and one tested
_SHARE = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(RowsTask):
    """Bytes of text, packed into rows. The score is per byte that is predicted, which is all but the first of a row."""

    name: ClassVar[str] = "text"
    metric: ClassVar[str] = "bits_per_byte"
    higher_is_better: ClassVar[bool] = False
    data: str = option(
        "topics", "topics: the reference text that ships with CPython, with held-out documents of its own; or a path, of whose documents "
        "one in ten is validated on and one tested.",
    )  # fmt: skip
    length: int = option(256, "Bytes of a row.", bound=at_least(2))

    @property
    def tokens_per_example(self) -> int:
        """As of :class:`RowsTask`."""
        return self.length

    def config(self) -> dict[str, Any]:
        """As of :class:`RowsTask`."""
        return {"vocab_size": 256, "tokenizer": "byte"}

    def training(self, seed: int, steps: int, batch_size: int) -> np.ndarray:
        """Return rows of bytes, ``(n, l)``; they are the same for every seed, their order is not."""
        return _rows(self.data, self.length)["train"]

    def validation(self) -> np.ndarray:
        """Return rows of bytes of other documents, ``(n, l)``."""
        return _rows(self.data, self.length)["valid"]

    def parts(self, part: str) -> Iterable[Part]:
        """As of :class:`RowsTask`: the label of a byte is the one that follows."""
        table = _rows(self.data, self.length)[part]
        following = np.where(table[:, 1:] >= 0, table[:, 1:], IGNORED)
        labels = np.pad(following, ((0, 0), (0, 1)), constant_values=IGNORED)
        asks = (labels != IGNORED).any(1)
        yield Part(Table(np.where(table < 0, ~table, table)[asks], labels[asks]), {})

    def score(self, model: Any, part: str, device: Any = None) -> dict[str, Any]:
        """As of :class:`RowsTask`, with ``bits_per_byte``."""
        found = super().score(model, part, device)
        return {"bits_per_byte": found["loss"] / math.log(2), **found}


@functools.lru_cache(maxsize=2)
def _rows(data: str, length: int) -> dict[str, np.ndarray]:
    encode = ByteTokenizer().encode
    documents: dict[str, list[Any]]
    if data == "topics":
        split = topics()
        documents = {"train": [encode(text) for text in split["train"]], "valid": [], "test": []}
        for text in split["validation"]:
            # to the one that has less
            some = min(documents["valid"], documents["test"], key=lambda found: sum(map(len, found)))
            some.append(encode(text))
    else:
        found = list(read_documents(data, encode))
        if len(found) < _SHARE:
            raise ValueError(
                f"text(data={data!r}): holds {len(found)} documents, of which one in {_SHARE} is to validate and one to test. Give "
                f"at least {_SHARE}, one per line of a .jsonl file, say."
            )
        documents = {"valid": found[::_SHARE], "test": found[1::_SHARE]}
        documents["train"] = [document for i, document in enumerate(found) if i % _SHARE > 1]
    return {part: pack(some, length) for part, some in documents.items()}

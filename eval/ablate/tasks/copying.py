"""Copying: data tokens from among blanks (Mamba, arXiv:2312.00752), and strings, or what follows a key in them (arXiv:2402.01032)."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from ....zoo.options import at_least, option
from ...tasks.generators import IGNORED, keyed_table, selective_copying
from .base import Drawn, Part, RowsTask, Table, answers_at_the_end, rng_of

__all__ = ["Copying", "SelectiveCopying"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(RowsTask):
    """Selective copying, as :func:`hybridzoo.eval.tasks.generators.selective_copying` draws it, new rows in every step."""

    name: ClassVar[str] = "selective_copying"
    length: int = option(256, "Blanks; the paper has 4096.", bound=at_least(0))
    tokens: int = option(16, "Data tokens among them.", bound=at_least(1))
    vocab: int = option(16, "Token ids, with the blank and the marker.", bound=at_least(3))
    valid_examples: int = option(512, "Rows of the validation.", bound=at_least(1))
    test_examples: int = option(1000, "Rows of the test.", bound=at_least(1))

    @property
    def chance(self) -> float | None:
        """The accuracy of a guess among the data tokens."""
        return 1 / (self.vocab - 2)

    @property
    def tokens_per_example(self) -> int:
        """As of :class:`RowsTask`."""
        return self.length + 2 * self.tokens

    def config(self) -> dict[str, Any]:
        """As of :class:`RowsTask`."""
        return {"vocab_size": self.vocab}

    def training(self, seed: int, steps: int, batch_size: int) -> Any:
        """As of :class:`RowsTask`; no row comes twice."""
        digest = f"selective_copying {self.length} {self.tokens} {self.vocab}"
        return Drawn(self._draw, steps, batch_size, seed, digest)

    def parts(self, part: str) -> Iterable[Part]:
        """As of :class:`RowsTask`."""
        n = self.valid_examples if part == "valid" else self.test_examples
        yield Part(self._draw(rng_of(part), n), {"length": self.length})

    def _draw(self, rng: Any, n: int) -> Table:
        return answers_at_the_end(*selective_copying(rng, n, self.length, self.tokens, self.vocab))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copying(RowsTask):
    """A string is to be copied, or the symbols that follow an n-gram of it, the key: ``$key|string|answer`` or ``$string|keyanswer``.

    Keys occur once, unlike in the authors' code (see :func:`hybridzoo.eval.tasks.generators.keyed_strings`). New rows in every step;
    shorter ones are filled up behind.
    """

    name: ClassVar[str] = "copying"
    length: int = option(24, "Symbols of the longest string in training.", bound=at_least(1))
    min_length: int | None = option(None, "Symbols of the shortest.", unset="all have the length", bound=at_least(1))
    ngram: int = option(2, "Symbols of the key.", bound=at_least(1))
    answer: int = option(4, "Symbols that are asked for behind the key.", bound=at_least(1))
    prefix: bool = option(True, "Whether the key stands in front of the string, or behind it.")
    whole: bool = option(
        False, "Whether all of the string is asked for, and its end; there is no key then: $string|string."
    )
    vocab: int = option(26, "Symbols; three ids beyond are marks.", bound=at_least(2))
    test_lengths: tuple = option((), "Lengths of the strings in the test.", unset="as in training")
    valid_examples: int = option(512, "Rows of the validation.", bound=at_least(1))
    test_examples: int = option(512, "Rows of a length in the test.", bound=at_least(1))

    def check(self) -> None:
        """As of :class:`RowsTask`."""
        lengths = tuple(self.test_lengths)
        if any(not isinstance(n, int) or n < 1 for n in lengths):
            raise ValueError(f"test_lengths: {list(lengths)} are not all positive integers.")
        object.__setattr__(self, "test_lengths", lengths)
        for length in (self.length, *lengths):
            self._draw(rng_of("test"), 1, length, None if length != self.length else self.min_length)

    @property
    def chance(self) -> float | None:
        """The accuracy of a guess."""
        return 1 / self.vocab

    @property
    def tokens_per_example(self) -> int:
        """As of :class:`RowsTask`: the longest row's."""
        return self._size(self.length)

    def _size(self, length: int) -> int:
        return 2 * length + 2 if self.whole else length + self.ngram + self.answer + (1 if self.prefix else 0) + 1

    def config(self) -> dict[str, Any]:
        """As of :class:`RowsTask`."""
        return {"vocab_size": self.vocab + 3}

    def training(self, seed: int, steps: int, batch_size: int) -> Any:
        """As of :class:`RowsTask`; no row comes twice."""
        digest = f"copying {[(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]}"
        return Drawn(
            lambda rng, n: self._draw(rng, n, self.length, self.min_length),
            steps,
            batch_size,
            seed,
            digest,
        )

    def parts(self, part: str) -> Iterable[Part]:
        """As of :class:`RowsTask`, the test by length."""
        if part == "valid" or not self.test_lengths:
            n = self.valid_examples if part == "valid" else self.test_examples
            yield Part(self._draw(rng_of(part), n, self.length, self.min_length), {"length": self.length})
            return
        for i, length in enumerate(self.test_lengths):
            yield Part(self._draw(rng_of(part, i), self.test_examples, length, None), {"length": length})

    def _draw(self, rng: Any, n: int, length: int, min_length: int | None) -> Table:
        start, bar, stop = self.vocab, self.vocab + 1, self.vocab + 2
        if self.whole:
            lengths = rng.integers(min_length or length, length + 1, n)
            strings, keys = rng.integers(0, self.vocab, (n, length), dtype=np.int32), np.zeros(n, np.int64)
        else:
            strings, lengths, keys = keyed_table(rng, n, length, min_length, self.ngram, self.answer, self.vocab)
        inputs = np.zeros((n, self._size(length)), dtype=np.int32)
        labels = np.full(inputs.shape, IGNORED, dtype=np.int32)
        for row, label, string, l, at in zip(inputs, labels, strings, lengths, keys, strict=True):
            string, key = string[:l], string[at : at + self.ngram]
            answer = string[at + self.ngram : at + self.ngram + self.answer]
            if self.whole:
                head, answer = [start, *string, bar], np.append(string, stop)
            else:
                head = [start, *key, bar, *string, bar] if self.prefix else [start, *string, bar, *key]
            asked = len(head) - 1
            row[: asked + 1] = head
            # each symbol of the answer is read before the next is asked for
            row[asked + 1 : asked + len(answer)] = answer[:-1]
            label[asked : asked + len(answer)] = answer
        return Table(inputs, labels)

"""Induction heads (H3, arXiv:2212.14052; Mamba, arXiv:2312.00752, table 2): what followed the special token the first time?"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from ....zoo.options import at_least, option
from ...tasks.generators import induction
from .base import Drawn, Part, RowsTask, Table, answers_at_the_end, rng_of

__all__ = ["Induction"]

# tokens of all rows of a length in the test
_TEST_TOKENS = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(RowsTask):
    """Induction heads, as :func:`hybridzoo.eval.tasks.generators.induction` draws them, new rows in every step."""

    name: ClassVar[str] = "induction"
    length: int = option(256, "Tokens before the one that asks, in training.", bound=at_least(3))
    vocab: int = option(16, "Ordinary tokens; the special one is another.", bound=at_least(2))
    test_lengths: tuple = option(
        (), "Lengths of the test.", unset="from a quarter of the length to 16 times it, doubling"
    )
    valid_examples: int = option(512, "Rows of the validation.", bound=at_least(1))
    test_examples: int = option(
        512, "Rows of a length in the test; of long ones fewer, 2**22 tokens, and 32 at least.", bound=at_least(1)
    )

    def check(self) -> None:
        """As of :class:`RowsTask`."""
        lengths = tuple(self.test_lengths) or tuple(n for k in range(-2, 5) if (n := int(self.length * 2.0**k)) >= 3)
        if any(not isinstance(n, int) or n < 3 for n in lengths):
            raise ValueError(f"test_lengths: {list(lengths)} are not all integers of at least 3.")
        object.__setattr__(self, "test_lengths", lengths)

    @property
    def chance(self) -> float | None:
        """The accuracy of a guess."""
        return 1 / self.vocab

    @property
    def tokens_per_example(self) -> int:
        """As of :class:`RowsTask`."""
        return self.length + 1

    def config(self) -> dict[str, Any]:
        """As of :class:`RowsTask`."""
        return {"vocab_size": self.vocab + 1}

    def training(self, seed: int, steps: int, batch_size: int) -> Any:
        """As of :class:`RowsTask`; no row comes twice."""
        return Drawn(self._draw, steps, batch_size, seed, f"induction {self.length} {self.vocab}")

    def parts(self, part: str) -> Iterable[Part]:
        """As of :class:`RowsTask`, the test by length."""
        if part == "valid":
            yield Part(self._draw(rng_of(part), self.valid_examples), {"length": self.length})
            return
        for i, length in enumerate(self.test_lengths):
            n = min(self.test_examples, max(32, _TEST_TOKENS // length))
            yield Part(self._draw(rng_of(part, i), n, length), {"length": length})

    def _draw(self, rng: Any, n: int, length: int | None = None) -> Table:
        inputs, answers = induction(rng, n, length or self.length, self.vocab)
        return answers_at_the_end(inputs, answers[:, None])

"""Multi-query associative recall (Zoology, arXiv:2312.04927): key-value pairs, then the keys again, each to give its value."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from ....zoo.options import at_least, option
from ...tasks.generators import mqar_table, training_rng
from .base import Part, RowsTask, Table, padded, rng_of

__all__ = ["MQAR"]


class _Setting(NamedTuple):
    length: int
    pairs: int
    examples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(RowsTask):
    """Multi-query associative recall, as :func:`hybridzoo.eval.tasks.generators.mqar` draws it.

    Zoology trains the segments of a mixture in batches of their own; here rows of all lengths are mixed, and shorter ones filled up behind,
    which changes nothing that a causal model says in them.
    """

    name: ClassVar[str] = "mqar"
    length: int = option(64, "Tokens of a row.", bound=at_least(4))
    pairs: int = option(4, "Keys, each with a value.", bound=at_least(1))
    vocab: int = option(8192, "Token ids; the lower half are keys, the upper half values.", bound=at_least(3))
    examples: int = option(100_000, "Rows of a training, gone through as often as it takes.", bound=at_least(1))
    settings: tuple = option(
        (), "Of a training on a mixture, in place of length, pairs and examples.", unset="one setting"
    )
    test: tuple = option((), "Settings of the test.", unset="those of the training")
    valid_examples: int = option(1000, "Rows of a setting in the validation.", bound=at_least(1))
    test_examples: int = option(1000, "Rows of a setting in the test.", bound=at_least(1))
    power: float = option(0.01, "Exponent of the law of distances.", bound=("above 0", lambda x: x > 0))
    passes: int = option(1, "How often the pairs are told.", bound=at_least(1))
    random_non_queries: bool = option(True, "Whether the tokens between are random, and not 0.")

    def check(self) -> None:
        """As of :class:`RowsTask`; settings become tuples."""
        for name, examples in (("settings", self.examples), ("test", self.test_examples)):
            object.__setattr__(self, name, tuple(_setting(one, name, examples) for one in getattr(self, name)))
        for one in (*self._trained(), *self.test):
            self._draw(training_rng(0), one, 0)

    @property
    def chance(self) -> float | None:
        """The accuracy of who guesses among the values of the row, in the test on average."""
        shares = [1 / one.pairs for one in self.test or self._trained()]
        return sum(shares) / len(shares)

    @property
    def tokens_per_example(self) -> int:
        """As of :class:`RowsTask`: the longest row's."""
        return max(one.length for one in self._trained())

    def config(self) -> dict[str, Any]:
        """As of :class:`RowsTask`."""
        return {"vocab_size": self.vocab}

    def training(self, seed: int, steps: int, batch_size: int) -> Any:
        """As of :class:`RowsTask`; no more rows than the steps read, in the proportions of the settings."""
        return _drawn(self, seed, min(steps * batch_size, sum(one.examples for one in self._trained())))

    def table(self, seed: int, n: int) -> tuple[Table, ...]:
        """Draw ``n`` rows of a training, or a few more, in the proportions of the settings; a table for each."""
        settings = self._trained()
        share = n / sum(one.examples for one in settings)
        rows = (math.ceil(one.examples * share) for one in settings)
        return tuple(
            self._draw(training_rng(seed, i), one, m) for i, (one, m) in enumerate(zip(settings, rows, strict=True))
        )

    def parts(self, part: str) -> Iterable[Part]:
        """As of :class:`RowsTask`, by length and by pairs."""
        settings, n = self._trained(), self.valid_examples
        if part == "test":
            settings, n = self.test or settings, self.test_examples
        for i, one in enumerate(settings):
            n = one.examples if part == "test" and self.test else n
            yield Part(self._draw(rng_of(part, i), one, n), {"length": one.length, "pairs": one.pairs})

    def _trained(self) -> tuple[_Setting, ...]:
        return self.settings or (_Setting(self.length, self.pairs, self.examples),)

    def _draw(self, rng: Any, one: _Setting, n: int) -> Table:
        more: dict[str, Any] = {
            "power": self.power,
            "passes": self.passes,
            "random_non_queries": self.random_non_queries,
        }
        return Table(*mqar_table(rng, n, one.length, one.pairs, self.vocab, **more))


@functools.lru_cache(maxsize=2)
def _drawn(task: MQAR, seed: int, n: int) -> tuple:
    return tuple(padded(task.table(seed, n)))


def _setting(given: Any, where: str, examples: int) -> _Setting:
    wrong = f"{where}: {given!r} is no setting. Write {{length: 64, pairs: 4, examples: 1000}}, or [64, 4]."
    values = dict(given) if isinstance(given, Mapping) else dict(zip(_Setting._fields, given, strict=False))
    values = {"examples": examples, **values}
    whole = all(isinstance(x, int) and x >= 1 for x in values.values())
    if set(values) != set(_Setting._fields) or not whole:
        raise ValueError(wrong)
    return _Setting(**values)

"""The base of tasks: rows with labels, made from seeds, and the count of what is right, in all and by slices."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ....zoo.options import check_options
from ...tasks.generators import IGNORED, evaluation_rng, training_rng

__all__ = ["Drawn", "Part", "RowsTask", "Table", "padded"]

# streams of an evaluation's seed
STREAMS = {"test": 0, "valid": 2}
# tokens that a model reads at once when it is scored; of longer rows, in a row after another
_AT_ONCE = {"cpu": 1 << 13, "cuda": 1 << 17}


class Table(NamedTuple):
    """Rows with labels: ids and labels ``(n, l)``, a label at the token whose logits are to say it, -100 where nothing is asked."""

    inputs: np.ndarray
    labels: np.ndarray


class Part(NamedTuple):
    """Rows that are scored, and the slices that they belong to, by what is the same in all of them: ``{"length": 64, "pairs": 4}``."""

    rows: Table
    about: dict[str, Any]


class Drawn:
    """Rows of a training that are never seen twice, drawn when they are asked for; who asks again gets the same.

    A batch is drawn at once, from a stream of the seed of its own, so that processes that read ahead need not draw those of others.

    Args:
        draw: Gives a number of rows from a generator.
        batches: All batches.
        rows: Of a batch.
        seed: Of the training.
        digest: A text that says what is drawn, but for the seed and the rows.
    """

    def __init__(
        self, draw: Callable[[np.random.Generator, int], Table], batches: int, rows: int, seed: int, digest: str
    ):
        self.draw, self.rows, self.n, self.seed = draw, rows, batches * rows, seed
        self.digest = f"{digest} {rows} {seed}"
        self.block: tuple[int, Table] | None = None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        number, at = divmod(index, self.rows)
        if self.block is None or self.block[0] != number:
            self.block = number, self.draw(training_rng(self.seed, number), self.rows)
        inputs, labels = self.block[1]
        return inputs[at], labels[at]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsTask:
    """A task of rows with labels; a subclass says how they are drawn. Fields are its sizes.

    Attributes:
        name: As studies call it.
        metric: The score that models are compared by.
        higher_is_better: Of the metric.
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self):
        check_options(self, self.name)
        self.check()

    def check(self) -> None:
        """Raise a ValueError for sizes that do not go together."""

    @property
    def chance(self) -> float | None:
        """The accuracy of a guess."""
        return None

    @property
    def tokens_per_example(self) -> int:
        """Tokens of a row in training."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Return what every model of the task has in its config."""
        raise NotImplementedError

    def training(self, seed: int, steps: int, batch_size: int) -> Any:
        """Return what so many steps are trained on, as ``zoo.train(data=)`` takes it."""
        raise NotImplementedError

    def parts(self, part: str) -> Iterable[Part]:
        """Return the rows of ``"valid"`` or ``"test"``."""
        raise NotImplementedError

    def validation(self) -> Any:
        """Return rows like those of the training, from an evaluation's seed, as ``zoo.train(val=)`` takes them."""
        return tuple(padded(part.rows for part in _kept(self, "valid")))

    def score(self, model: Any, part: str, device: Any = None) -> dict[str, Any]:
        """Score a model on ``"valid"`` or ``"test"``.

        Args:
            model: A causal language model; it is put into evaluation mode.
            part: The rows.
            device: Where it is to run; where it is, by default.

        Returns:
            ``accuracy``, the share of right answers in a row, on average over rows; ``exact``, the share of rows whose answers are all
            right; ``loss`` in nats per answer; ``n`` rows; and ``slices``, the same by what parts have in common, ``{"length=64": {...}}``.
        """
        from .scoring import row_scores, summed

        model = model if device is None else model.to(device)
        found = [(row_scores(model, *part_.rows, _AT_ONCE), part_.about) for part_ in _kept(self, part)]
        slices: dict[str, list[np.ndarray]] = {}
        for rows, about in found:
            for key, value in about.items():
                slices.setdefault(f"{key}={value}", []).append(rows)
        return {**summed([rows for rows, _ in found]), "slices": {name: summed(rows) for name, rows in slices.items()}}


@functools.lru_cache(maxsize=8)
def _kept(task: RowsTask, part: str) -> tuple[Part, ...]:
    if part not in STREAMS:
        raise ValueError(f"score(part={part!r}): there is no such part. Name one of {', '.join(STREAMS)}.")
    return tuple(task.parts(part))


def rng_of(part: str, seed: int = 0) -> np.random.Generator:
    """Return the source of the rows of ``"valid"`` or ``"test"``; ``seed`` numbers the tables of it."""
    return evaluation_rng(seed, STREAMS[part])


def padded(tables: Iterable[Table]) -> Table:
    """Lay tables of rows of several lengths on top of each other, shorter ones filled up behind with id 0, of which nothing is asked.

    In a causal model nothing behind a token changes what it says, so that a row is worth the same as alone.
    """
    tables = list(tables)
    length = max(table.inputs.shape[1] for table in tables)

    def filled(rows: np.ndarray, value: int) -> np.ndarray:
        return np.pad(rows, ((0, 0), (0, length - rows.shape[1])), constant_values=value)

    inputs = np.concatenate([filled(table.inputs, 0) for table in tables])
    return Table(inputs, np.concatenate([filled(table.labels, IGNORED) for table in tables]))


def answers_at_the_end(inputs: np.ndarray, answers: np.ndarray) -> Table:
    """Return rows whose last tokens are to give the answers, ``(n, k)``: one each."""
    labels = np.full(inputs.shape, IGNORED, dtype=np.int32)
    labels[:, inputs.shape[1] - answers.shape[1] :] = answers
    return Table(inputs.astype(np.int32), labels)

"""Functions learned in context (arXiv:2208.01066, arXiv:2402.04248): rows of vectors ``x1, y1, x2, y2, ...``, to predict y at x.

Every row has a function of its own, which only its examples tell. No curriculum: rows have the task's sizes from the first step on. Tables
are vectors ``(n, l, d)`` and targets ``(n, l, outputs)``, float32; a target stands at the place whose prediction it is, NaN elsewhere.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np

from ....zoo.options import at_least, option
from .base import STREAMS, Drawn, RowsTask, Table, rng_of

__all__ = ["LinearRegression", "Parity", "Retrieval", "linear_rows", "parity_rows", "retrieval_rows"]

# vectors that a model reads at once when it is scored
_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 18}


def parity_rows(rng: np.random.Generator, n: int, d: int = 10, k: int = 2, shots: int = 140) -> Table:
    """Draw sparse parities: x from {-1, 1}^d, y the product of the same k coordinates of every x of a row, drawn for the row.

    Returns:
        Rows of ``2 * shots`` vectors, y in the first coordinate of its own; one target for each x.
    """
    x = rng.integers(0, 2, (n, shots, d), dtype=np.int8) * np.float32(2) - 1
    hidden = rng.permuted(np.tile(np.arange(d), (n, 1)), axis=1)[:, :k]
    return _interleaved(x, np.take_along_axis(x, hidden[:, None], axis=2).prod(2))


def linear_rows(rng: np.random.Generator, n: int, d: int = 20, shots: int = 41) -> Table:
    """Draw linear functions: x and the row's w from N(0, 1)^d, y = w x, without noise.

    Returns:
        As :func:`parity_rows`.
    """
    x, w = (rng.standard_normal((n, size, d), dtype=np.float32) for size in (shots, 1))
    return _interleaved(x, (x * w).sum(2))


def retrieval_rows(rng: np.random.Generator, n: int, d: int = 20, pairs: int = 32, queries: int = 32) -> Table:
    """Draw recall of vectors: ``pairs`` of key and value from N(0, 1)^d, side by side, then some keys again, each to give its value.

    Returns:
        Rows of ``2 * pairs + queries`` vectors; a target at every query, whose keys differ.
    """
    told = rng.standard_normal((n, 2 * pairs, d), dtype=np.float32)
    asked = rng.permuted(np.tile(np.arange(pairs), (n, 1)), axis=1)[:, :queries, None]
    keys, values = (np.take_along_axis(told[:, i::2], asked, axis=1) for i in (0, 1))
    labels = np.concatenate([np.full_like(told, np.nan), values], 1)
    return Table(np.concatenate([told, keys], 1), labels)


def _interleaved(x: np.ndarray, y: np.ndarray) -> Table:
    n, shots, d = x.shape
    inputs = np.zeros((n, 2 * shots, d), dtype=np.float32)
    labels = np.full((n, 2 * shots, 1), np.nan, dtype=np.float32)
    inputs[:, ::2], inputs[:, 1::2, 0], labels[:, ::2, 0] = x, y, y
    return Table(inputs, labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContext(RowsTask):
    """A task of rows of vectors; a subclass says how they are drawn, and what is right. Fields are its sizes."""

    valid_examples: int = option(512, "Rows of the validation.", bound=at_least(1))
    test_examples: int = option(2048, "Rows of the test.", bound=at_least(1))

    def draw(self, rng: np.random.Generator, n: int) -> Table:
        """Draw rows as a training reads them."""
        raise NotImplementedError

    def judge(self, said: np.ndarray, rows: Table) -> dict[str, Any]:
        """Score predictions ``(n, l, outputs)``."""
        raise NotImplementedError

    def training(self, seed: int, steps: int, batch_size: int) -> Drawn:
        """As of :class:`RowsTask`; no row is seen twice."""
        return Drawn(self.draw, steps, batch_size, seed, str(self))

    def validation(self) -> Table:
        """As of :class:`RowsTask`."""
        return _evaluated(self, "valid")

    def score(self, model: Any, part: str, device: Any = None) -> dict[str, Any]:
        """Score a model on ``"valid"`` or ``"test"``.

        Args:
            model: A model of vectors; it is put into evaluation mode, and runs under the caller's autocast.
            part: The rows.
            device: Where it is to run; where it is, by default.

        Returns:
            The metric; ``loss``, the mean squared error; ``n`` rows; and ``slices``, the same by how many examples were seen before.

        Raises:
            ValueError: There is no such part.
        """
        rows = _evaluated(self, part)
        return self.judge(_predicted(model if device is None else model.to(device), rows.inputs), rows)


@functools.lru_cache(maxsize=8)
def _evaluated(task: InContext, part: str) -> Table:
    if part not in STREAMS:
        raise ValueError(f"score(part={part!r}): there is no such part. Name one of {', '.join(STREAMS)}.")
    return task.draw(rng_of(part), task.valid_examples if part == "valid" else task.test_examples)


def _predicted(model: Any, inputs: np.ndarray) -> np.ndarray:
    """Return a model's predictions, ``(n, l, outputs)`` float32, some rows at a time."""
    import torch

    model.eval()
    device = model.some_weight().device
    size = max(1, _AT_ONCE.get(device.type, 1 << 18) // inputs.shape[1])
    with torch.no_grad():
        parts = (model(rows.to(device)).logits.float().cpu() for rows in torch.from_numpy(inputs).split(size))
        return torch.cat(list(parts)).numpy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shots(InContext):
    """A task of examples ``(x, y)`` in turn, scored at the last ones: those before tell too little.

    Attributes:
        d: Coordinates of x.
        shots: Examples of a row.
    """

    d: int = option(10, "Coordinates of x.", bound=at_least(1))
    shots: int = option(140, "Examples of a row.", bound=at_least(2))
    scored: float = option(
        0.25, "Share of the examples, the last ones, that are scored.", bound=("above 0, up to 1", lambda x: 0 < x <= 1)
    )

    @property
    def tokens_per_example(self) -> int:
        """As of :class:`InContext`."""
        return 2 * self.shots

    def config(self) -> dict[str, Any]:
        """As of :class:`InContext`."""
        return {"task": "sequence_regression", "inputs": self.d, "outputs": 1}

    @property
    def first(self) -> int:
        """The first example that is scored."""
        return self.shots - max(1, round(self.scored * self.shots))

    def validation(self) -> Table:
        """As of :class:`InContext`, with targets at the examples that are scored alone."""
        inputs, labels = super().validation()
        return Table(inputs, np.where(np.arange(labels.shape[1])[:, None] < 2 * self.first, np.float32(np.nan), labels))

    def ranges(self) -> dict[str, slice]:
        """Return the examples of every slice, from one power of two to the next."""
        starts = [0, *(2**i for i in range(self.shots.bit_length()) if 2**i < self.shots)]
        return {f"shots={a}": slice(a, b) for a, b in zip(starts, [*starts[1:], self.shots], strict=True)}

    def judge(self, said: np.ndarray, rows: Table) -> dict[str, Any]:
        """As of :class:`InContext`, with slices."""
        found, true = said[:, ::2, 0].astype(np.float64), rows.labels[:, ::2, 0].astype(np.float64)
        slices = {name: self.mean(found[:, where], true[:, where]) for name, where in self.ranges().items()}
        return {**self.mean(found[:, self.first :], true[:, self.first :]), "slices": slices}

    def mean(self, said: np.ndarray, true: np.ndarray) -> dict[str, Any]:
        """Score predictions ``(n, some shots)``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(Shots):
    """Sparse parity, as :func:`parity_rows` draws it; the accuracy is that of the prediction's sign.

    MambaFormer's setting is d=10, k=2 and 140 shots; a Transformer fails there, and Mamba does not. Where x has few values, who remembers
    them needs no parity: ``lookup`` is the accuracy of repeating the y of the same x where it was seen, and of guessing elsewhere.
    """

    name: ClassVar[str] = "parity"
    k: int = option(2, "Coordinates that count.", bound=at_least(1))

    def check(self) -> None:
        """As of :class:`InContext`."""
        if self.k > self.d:
            raise ValueError(f"{self.name}(k={self.k}): counts more coordinates than the d={self.d} of x. Lower k.")

    @property
    def chance(self) -> float:
        """As of :class:`InContext`."""
        return 0.5

    def draw(self, rng: np.random.Generator, n: int) -> Table:
        """As of :class:`InContext`."""
        return parity_rows(rng, n, self.d, self.k, self.shots)

    def judge(self, said: np.ndarray, rows: Table) -> dict[str, Any]:
        """As of :class:`Shots`, and the accuracy of a lookup."""
        number = (rows.inputs[:, ::2] > 0) @ 2.0 ** np.arange(self.d)
        seen = np.tril(number[:, :, None] == number[:, None], -1).any(2)
        found = super().judge(said, rows)
        parts = ((where, found["slices"][name]) for name, where in self.ranges().items())
        for where, one in ((slice(self.first, None), found), *parts):
            one["lookup"] = float((0.5 + 0.5 * seen[:, where]).mean())
        return found

    def mean(self, said: np.ndarray, true: np.ndarray) -> dict[str, Any]:
        """As of :class:`Shots`."""
        right = np.sign(said) == true
        return {"accuracy": float(right.mean()), "loss": float(np.square(said - true).mean()), "n": len(said)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRegression(Shots):
    """Linear regression, as :func:`linear_rows` draws it; the error is divided by d, that of predicting 0.

    Beside it stands ``least_squares``, the error of the least squares fit of the examples before, of least norm where they are too few.
    """

    name: ClassVar[str] = "linear_regression"
    metric: ClassVar[str] = "error"
    higher_is_better: ClassVar[bool] = False
    d: int = option(20, "Coordinates of x.", bound=at_least(1))
    shots: int = option(41, "Examples of a row.", bound=at_least(2))

    @property
    def chance(self) -> float:
        """As of :class:`InContext`."""
        return 1.0

    def draw(self, rng: np.random.Generator, n: int) -> Table:
        """As of :class:`InContext`."""
        return linear_rows(rng, n, self.d, self.shots)

    def judge(self, said: np.ndarray, rows: Table) -> dict[str, Any]:
        """As of :class:`Shots`, and the same of least squares."""
        fitted = np.full_like(said, np.nan)
        fitted[:, ::2, 0] = least_squares(rows.inputs[:, ::2], rows.labels[:, ::2, 0])
        ours, theirs = super().judge(said, rows), super().judge(fitted, rows)
        for mine, other in ((ours, theirs), *((ours["slices"][s], theirs["slices"][s]) for s in ours["slices"])):
            mine["least_squares"] = other["error"]
        return ours

    def mean(self, said: np.ndarray, true: np.ndarray) -> dict[str, Any]:
        """As of :class:`Shots`."""
        loss = float(np.square(said - true).mean())
        return {"error": loss / self.d, "loss": loss, "n": len(said)}


def least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Predict each y, ``(n, shots)``, from x, ``(n, shots, d)``, by the fit of least norm to the examples before; 0 for the first."""
    said, x, y = np.zeros(y.shape), x.astype(np.float64), y[..., None].astype(np.float64)
    for i in range(1, y.shape[1]):
        before, known, turned = x[:, :i], y[:, :i], x[:, :i].transpose(0, 2, 1)
        if i < x.shape[2]:
            w = turned @ np.linalg.solve(before @ turned, known)
        elif i == x.shape[2]:  # the worst conditioned: not squared
            w = np.linalg.solve(before, known)
        else:
            w = np.linalg.solve(turned @ before, turned @ known)
        said[:, i] = (x[:, i] * w[..., 0]).sum(1)
    return said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(InContext):
    """Recall of vectors, as :func:`retrieval_rows` draws it: an answer is right where no other value of the row is nearer.

    MambaFormer's setting, "vector-valued MQAR", is d=20; Mamba fails there, and a Transformer does not.
    """

    name: ClassVar[str] = "retrieval"
    d: int = option(20, "Coordinates of keys and values.", bound=at_least(1))
    pairs: int = option(32, "Keys with their values.", bound=at_least(1))
    queries: int | None = option(None, "Keys that are asked for.", unset="all", bound=at_least(1))

    def check(self) -> None:
        """As of :class:`InContext`."""
        if self.asked > self.pairs:
            raise ValueError(
                f"{self.name}(queries={self.asked}): asks for more keys than the pairs={self.pairs} that there are. Lower queries."
            )

    @property
    def asked(self) -> int:
        """Queries of a row."""
        return self.pairs if self.queries is None else self.queries

    @property
    def chance(self) -> float:
        """As of :class:`InContext`."""
        return 1 / self.pairs

    @property
    def tokens_per_example(self) -> int:
        """As of :class:`InContext`."""
        return 2 * self.pairs + self.asked

    def config(self) -> dict[str, Any]:
        """As of :class:`InContext`."""
        return {"task": "sequence_regression", "inputs": self.d, "outputs": self.d}

    def draw(self, rng: np.random.Generator, n: int) -> Table:
        """As of :class:`InContext`."""
        return retrieval_rows(rng, n, self.d, self.pairs, self.asked)

    def judge(self, said: np.ndarray, rows: Table) -> dict[str, Any]:
        """As of :class:`InContext`; slices are by the distance in pairs from a query's own to the end of the pairs."""
        told = 2 * self.pairs
        said, true, values = said[:, told:], rows.labels[:, told:], rows.inputs[:, 1:told:2]
        # the squares of the predictions are the same for all values
        far = np.square(values).sum(2)[:, None] - 2 * said @ values.transpose(0, 2, 1)
        own = (true[:, :, None] == values[:, None]).all(3).argmax(2)
        right, loss = far.argmin(2) == own, np.square(said - true).mean(2)
        back = self.pairs - own

        def mean(where: np.ndarray) -> dict[str, Any]:
            return {"accuracy": float(right[where].mean()), "loss": float(loss[where].mean()), "n": len(said)}

        starts = [2**i for i in range(self.pairs.bit_length()) if 2**i <= self.pairs]
        chosen = {f"back={a}": (back >= a) & (back < 2 * a) for a in starts}
        slices = {name: mean(where) for name, where in chosen.items() if where.any()}
        return {**mean(np.ones_like(right)), "slices": slices}

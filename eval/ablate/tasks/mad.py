"""Tasks of MAD (arXiv:2403.17844), small tests of what a mixer can do: recall in context, memorisation, and selective copying.

They are drawn as mad-lab's ``instances.py`` does, but where that goes wrong: the blanks of selective copying may stand behind the last data
token, and follow from the seed; a fuzzy query has always been told; and accuracy is the mean over rows of the share of right answers, where
mad-lab weighs classes alike. Training rows of recall ask for every next token, as there, those of the test for recalled values alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np

from ....zoo.options import at_least, option, within
from ...tasks.generators import IGNORED, training_rng
from .base import Part, RowsTask, Table, rng_of

__all__ = ["MAD"]

# by kind: token ids, length, rows of a training
_SIZES = {
    "in_context_recall": (16, 128, 12_800),
    "fuzzy_recall": (16, 128, 12_800),
    "noisy_recall": (32, 128, 12_800),
    "selective_copying": (16, 256, 12_800),
    "memorization": (256, 32, 256),
}
# of the map that is to be memorised
_MAP_SEED = 12345


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAD(RowsTask):
    """A task of MAD.

    Compression, the sixth, is none for a causal model: its decoder sees the last token's vector alone.
    """

    name: ClassVar[str] = "mad"
    kind: str = option(
        "in_context_recall",
        "in_context_recall, fuzzy_recall, noisy_recall, selective_copying or memorization.",
        choices=tuple(_SIZES),
    )
    vocab: int | None = option(
        None, "Token ids.", unset="16, of noisy_recall 32, of memorization 256", bound=at_least(4)
    )
    length: int | None = option(
        None, "Tokens.", unset="128, of selective_copying 256, of memorization 32", bound=at_least(4)
    )
    examples: int | None = option(None, "Rows of a training.", unset="12,800, of memorization 256", bound=at_least(1))
    tokens: int = option(16, "Tokens to copy (selective_copying).", bound=at_least(1))
    motif: int = option(3, "The most tokens of a key, and of a value (fuzzy_recall).", bound=at_least(1))
    noise: float = option(0.2, "Share of the pairs that are noise (noisy_recall).", bound=within(0, 1))
    noise_vocab: int = option(16, "Token ids that are noise (noisy_recall).", bound=at_least(1))
    valid_examples: int = option(1280, "Rows of the validation.", bound=at_least(1))
    test_examples: int = option(1280, "Rows of the test.", bound=at_least(1))

    def check(self) -> None:
        """As of :class:`RowsTask`; sizes that were left open become those of the kind."""
        for name, value in zip(("vocab", "length", "examples"), _SIZES[self.kind], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        values = self._values()
        if values < 1 or (self.kind == "fuzzy_recall" and values < self.motif):
            raise ValueError(
                f"mad(kind={self.kind!r}, vocab={self.vocab}): leaves {values} tokens for values. Enlarge vocab."
            )
        least = {"selective_copying": 2 * self.tokens + 2, "fuzzy_recall": 6 * self.motif + 1}.get(self.kind, 4)
        length = int(self.length or 0)
        if length < least or (length % 2 and self.kind not in ("selective_copying", "fuzzy_recall")):
            raise ValueError(
                f"mad(kind={self.kind!r}, length={self.length}): must be at least {least}, and even where tokens come in pairs."
            )

    @property
    def chance(self) -> float | None:
        """The accuracy of a guess among what an answer can be."""
        return 1 / self._values()

    @property
    def tokens_per_example(self) -> int:
        """As of :class:`RowsTask`."""
        return int(self.length or 0) - (self.kind in ("in_context_recall", "noisy_recall"))

    def config(self) -> dict[str, Any]:
        """As of :class:`RowsTask`."""
        return {"vocab_size": self.vocab}

    def training(self, seed: int, steps: int, batch_size: int) -> Any:
        """As of :class:`RowsTask`: a table that is gone through again and again, as in MAD, which counts epochs."""
        return _drawn(self, seed)

    def parts(self, part: str) -> Iterable[Part]:
        """As of :class:`RowsTask`."""
        n = self.valid_examples if part == "valid" else self.test_examples
        yield Part(self.draw(rng_of(part), n, False), {"length": self.length})

    def _values(self) -> int:
        vocab = int(self.vocab or 0)
        if self.kind == "selective_copying":
            return vocab - 2
        special = {"fuzzy_recall": 1, "memorization": 1, "noisy_recall": self.noise_vocab}.get(self.kind, 0)
        return (vocab - special) // 2

    def draw(self, rng: np.random.Generator, n: int, training: bool) -> Table:
        """Draw ``n`` rows of a training, or of an evaluation."""
        vocab, length = int(self.vocab or 0), int(self.length or 0)
        draw: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
            "in_context_recall": lambda: recall(rng, n, length, vocab, training),
            "noisy_recall": lambda: recall(rng, n, length, vocab, training, self.noise, self.noise_vocab),
            "fuzzy_recall": lambda: fuzzy_recall(rng, n, length, vocab, training, self.motif),
            "selective_copying": lambda: scattered(rng, n, length, vocab, self.tokens),
            "memorization": lambda: memorization(rng, n, length, vocab),
        }
        return Table(*(x.astype(np.int32) for x in draw[self.kind]()))


@functools.lru_cache(maxsize=2)
def _drawn(task: MAD, seed: int) -> tuple:
    return tuple(task.draw(training_rng(seed), task.examples or 0, True))


def recall(
    rng: np.random.Generator, n: int, length: int, vocab: int, training: bool, noise: float = 0.0, noise_vocab: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Key-value pairs that come again and again, the value of a key the same within a row; pairs of noise may stand between them.

    Returns:
        Ids and labels ``(n, length - 1)``: the last pair is a key that was told before, and its value the label of the last token. In
        training the labels are all next tokens, else the values of keys that were told before.
    """
    ordinary, pairs, rows = vocab - noise_vocab, length // 2, np.arange(n)
    keys = rng.integers(0, ordinary // 2, (n, pairs))
    values = rng.integers(ordinary // 2, ordinary, (n, ordinary // 2))
    noisy = rng.random((n, pairs)) < noise
    noisy[rows, rng.integers(0, pairs - 1, n)] = False  # one pair at least is told
    told, again = np.zeros((n, ordinary // 2), dtype=bool), np.zeros((n, pairs), dtype=bool)
    for i in range(pairs - 1):
        again[:, i] = told[rows, keys[:, i]] & ~noisy[:, i]
        told[rows, keys[:, i]] |= ~noisy[:, i]
    # the last pair asks for any of the keys
    keys[:, -1] = np.where(told, rng.random(told.shape), -1.0).argmax(1)
    noisy[:, -1], again[:, -1] = False, True
    both = np.stack([keys, np.take_along_axis(values, keys, 1)], 2)
    filled = rng.integers(ordinary, vocab, both.shape) if noise_vocab else both
    ids = np.where(noisy[..., None], filled, both).reshape(n, -1)
    asked = np.stack([np.zeros_like(again), again], 2).reshape(n, -1)
    labels = ids if training else np.where(asked, ids, IGNORED)
    return ids[:, :-1], labels[:, 1:]


def fuzzy_recall(
    rng: np.random.Generator, n: int, length: int, vocab: int, training: bool, motif: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Recall of keys and values of one to ``motif`` different tokens; in the test, keys have ``motif``. Rows are filled up in front.

    Returns:
        Ids and labels ``(n, length)``, as of :func:`recall`; what fills up is never a label.
    """
    least, pad = 1 if training else motif, vocab - 1
    out, labels = np.full((n, length + 1), pad), np.full((n, length + 1), IGNORED)
    for row, label, drawn in zip(
        out, labels, _motifs(rng, n, length // (least + 1) + 2, vocab, least, motif), strict=True
    ):
        probe = drawn[0]
        room = length - sum(map(len, probe)) - 2 * motif
        # the probe is told at the first pair that begins here or later, and one does that has room
        place = int(rng.integers(0, room - 2 * motif + 1))
        ids: list[int] = []
        asked: list[bool] = []
        told: dict[tuple, tuple] = {}
        for key, value in [*drawn[1:], probe]:
            last = len(ids) >= room
            if last or key == probe[0] or (len(ids) >= place and probe[0] not in told):
                key, value = probe
            known, value = key in told, told.setdefault(key, value)
            asked += [False] * len(key) + [known] * len(value)
            ids += [*key, *value]
            if last:
                break
        row[length + 1 - len(ids) :] = ids
        label[length + 1 - len(ids) :] = ids if training else np.where(asked, ids, IGNORED)
    return out[:, :-1], labels[:, 1:]


def _motifs(
    rng: np.random.Generator, n: int, many: int, vocab: int, least: int, most: int
) -> Iterator[list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Draw ``many`` keys and values for each of ``n`` rows: different tokens, of keys ``least`` to ``most``, of values 1 to ``most``."""
    half = (vocab - 1) // 2
    for i in range(0, n, 256):
        rows = min(256, n - i)
        sizes = np.stack([rng.integers(least, most + 1, (rows, many)), rng.integers(1, most + 1, (rows, many))], 2)
        keys, values = (np.argsort(rng.random((rows, many, m)), 2)[..., :most] for m in (half, vocab - 1 - half))
        for size, key, value in zip(sizes.tolist(), keys.tolist(), (values + half).tolist(), strict=True):
            yield [(tuple(k[:a]), tuple(v[:b])) for (a, b), k, v in zip(size, key, value, strict=True)]


def scattered(rng: np.random.Generator, n: int, length: int, vocab: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Selective copying as MAD has it: data tokens among blanks, a mark, and blanks at which they are to be said in order.

    Returns:
        Ids and labels ``(n, length)``; the blank is id ``vocab - 2``, the mark ``vocab - 1``.
    """
    body = length - tokens - 1
    ids, labels = np.full((n, length), vocab - 2), np.full((n, length), IGNORED)
    data = rng.integers(0, vocab - 2, (n, tokens))
    at = np.sort(np.argsort(rng.random((n, body)), 1)[:, :tokens], 1)
    np.put_along_axis(ids, at, data, 1)
    ids[:, body] = vocab - 1
    labels[:, body + 1 :] = data
    return ids, labels


def memorization(rng: np.random.Generator, n: int, length: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys, each followed by a mark at which its value is asked for; the map from keys to values is the same in all rows of all seeds.

    Returns:
        Ids and labels ``(n, length)``; the mark is id ``vocab - 1``.
    """
    half = (vocab - 1) // 2
    fixed = np.random.default_rng(_MAP_SEED)
    values = half + fixed.permutation(vocab - 1 - half)[:half]
    keys = rng.integers(0, half, (n, length // 2))
    ids, labels = np.full((n, length), vocab - 1), np.full((n, length), IGNORED)
    ids[:, ::2], labels[:, 1::2] = keys, values[keys]
    return ids, labels

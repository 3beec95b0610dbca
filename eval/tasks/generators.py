"""Synthetic recall data as arrays of token ids, as the tasks' authors define it: ``n`` examples, int64, a pure function of ``rng``.

Sources: multi-query associative recall from Zoology (arXiv:2312.04927; ``multiquery_ar`` of its repository),
selective copying from Mamba (arXiv:2312.00752, section 4.1.1) in the form of S4's ``copying.py`` with
``variable=True``, induction heads from H3 (arXiv:2212.14052) and safari's ``generate_induction_head``, n-gram lookup
from "Repeat After Me" (arXiv:2402.01032).
"""

import numpy as np

__all__ = [
    "IGNORED", "evaluation_rng", "induction", "keyed_strings", "keyed_table", "mqar", "mqar_table", "selective_copying", "training_rng",
]  # fmt: skip

IGNORED = -100  # a position without a label
_RARE = "keyed_strings(ngram={}, vocab={}): hardly any string of {} symbols has a unique key. Lengthen the key."
_ROWS = 4096  # that are drawn at once
_SPLIT = 2**31  # training draws from seeds below, evaluation from this one on, as Zoology's data segments do


def training_rng(seed: int, stream: int | None = None) -> np.random.Generator:
    """The source of training data number ``seed``, in [0, 2**31); of a part of it, independent of others, where a ``stream`` is given."""
    return np.random.default_rng(_checked_seed(seed) if stream is None else [_checked_seed(seed), stream])


def evaluation_rng(seed: int, stream: int = 0) -> np.random.Generator:
    """The source of evaluation data number ``seed``, in [0, 2**31): never one that :func:`training_rng` gives.

    ``stream`` is a part of the data set, independent of others: 0 holds what is scored, 1 few-shot examples.
    """
    return np.random.default_rng([_SPLIT + _checked_seed(seed), stream])


def mqar(
    rng: np.random.Generator,
    n: int,
    length: int = 64,
    pairs: int = 8,
    vocab: int = 8192,
    *,
    power: float = 0.01,
    passes: int = 1,
    random_non_queries: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Multi-query associative recall: key-value pairs, then the keys again at random distances, each to give its value.

    Keys come from [1, vocab/2), values from [vocab/2, vocab), each without replacement. After the pairs stand
    ``(length - context) / 2`` slots of two tokens; key i is asked for in the first token of a slot drawn without
    replacement, slot g with probability proportional to ``power * (g + 1) ** (power - 1)``. The label stands at the
    query's own index. The list of pairs is given ``passes`` times, and ``random_non_queries`` fills what is left with uniform
    tokens from [0, vocab) instead of 0.

    Returns:
        Inputs and labels, ``(n, length)``; labels are -100 where nothing is asked.

    Raises:
        ValueError: The pairs do not fit into the length or the vocabulary.
    """
    half, context, weight = _mqar_sizes(length, pairs, vocab, power, passes)
    slots = len(weight)
    inputs = np.zeros((n, length), dtype=np.int64)
    labels = np.full((n, length), IGNORED, dtype=np.int64)
    for row, label in zip(inputs, labels, strict=True):
        keys = rng.choice(np.arange(1, half), pairs, replace=False)
        values = rng.choice(np.arange(half, vocab), pairs, replace=False)
        row[:context] = np.tile(np.stack([keys, values], 1).reshape(-1), passes)
        at = context + 2 * rng.choice(slots, pairs, replace=False, p=weight / weight.sum())
        row[at], label[at] = keys, values
    if random_non_queries:
        inputs = np.where(inputs == 0, rng.integers(0, vocab, inputs.shape), inputs)
    return inputs, labels


def mqar_table(
    rng: np.random.Generator,
    n: int,
    length: int = 64,
    pairs: int = 8,
    vocab: int = 8192,
    *,
    power: float = 0.01,
    passes: int = 1,
    random_non_queries: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw what :func:`mqar` draws, all rows at once: the same distribution, other values of a seed, ten times as fast; int32.

    Subsets are drawn by Floyd's algorithm, and slots as the largest of Gumbel numbers shifted by the logarithm of their weight, which is
    to draw them one after another without replacement. Arguments, shapes and errors are those of :func:`mqar`.
    """
    half, context, weight = _mqar_sizes(length, pairs, vocab, power, passes)
    inputs = np.zeros((n, length), dtype=np.int32)
    labels = np.full((n, length), IGNORED, dtype=np.int32)
    for i in range(0, n, _ROWS):
        row, label = inputs[i : i + _ROWS], labels[i : i + _ROWS]
        keys = 1 + _distinct(rng, len(row), pairs, half - 1)
        values = half + _distinct(rng, len(row), pairs, vocab - half)
        row[:, :context] = np.tile(np.stack([keys, values], 2).reshape(len(row), -1), passes)
        score = np.log(weight) + rng.gumbel(size=(len(row), len(weight)))
        at = context + 2 * np.argsort(-score, 1)[:, :pairs]
        np.put_along_axis(row, at, keys, 1)
        np.put_along_axis(label, at, values, 1)
        if random_non_queries:
            np.copyto(row, rng.integers(0, vocab, row.shape, dtype=np.int32), where=row == 0)
    return inputs, labels


def _mqar_sizes(length: int, pairs: int, vocab: int, power: float, passes: int) -> tuple[int, int, np.ndarray]:
    """Return where values begin, how many tokens the pairs take, and the weight of every slot behind them, or raise a ValueError."""
    context = 2 * pairs * passes
    _require(length % 2 == 0, f"mqar(length={length}): a key and its value are two tokens. Make it even.")
    takes = f"mqar(length={length}, pairs={pairs}): pairs and queries take {context + 2 * pairs} tokens."
    fits = pairs >= 1 and context + 2 * pairs <= length
    _require(fits, f"{takes} Lengthen, or ask for fewer pairs.")
    _require(vocab > length, f"mqar(vocab={vocab}, length={length}): vocab must exceed length. Enlarge vocab.")
    slots = (length - context) // 2
    return vocab // 2, context, power * np.arange(1, slots + 1) ** (power - 1.0)


def _distinct(rng: np.random.Generator, n: int, k: int, below: int) -> np.ndarray:
    """Draw ``n`` rows of ``k`` different numbers from [0, below), in random order: ``(n, k)``."""
    drawn = np.empty((n, k), dtype=np.int64)
    for i in range(k):
        # R. W. Floyd: a number that is there already makes way for the largest that could have been drawn
        number = rng.integers(0, below - k + i + 1, n)
        there = (drawn[:, :i] == number[:, None]).any(1)
        drawn[:, i] = np.where(there, below - k + i, number)
    return rng.permuted(drawn, axis=1)


def induction(rng: np.random.Generator, n: int, length: int = 256, vocab: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Induction heads: a special token stands among random ones and again at the end; what followed it is the answer.

    Ordinary tokens have the ids [0, vocab), so that a guess is right 1 in ``vocab`` times; the special token is id ``vocab``.

    Returns:
        Inputs ``(n, length + 1)`` and answers ``(n,)``.
    """
    roomy = "Leave room for the special token and what follows it."
    _require(length >= 3, f"induction(length={length}): is below 3. {roomy}")
    _require(vocab >= 2, f"induction(vocab={vocab}): is below 2. Give at least two tokens to choose from.")
    inputs = rng.integers(0, vocab, (n, length + 1))
    at, rows = rng.integers(0, length - 2, n), np.arange(n)
    inputs[rows, at] = vocab
    inputs[:, -1] = vocab
    return inputs, inputs[rows, at + 1]


def selective_copying(
    rng: np.random.Generator, n: int, length: int = 4096, tokens: int = 16, vocab: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Selective copying: a few data tokens scattered among blanks, to be repeated in order.

    Blanks are token 0, and there are ``length`` of them; data tokens are uniform in {1 ... vocab - 2}, at random positions of the
    first ``length + tokens``; token ``vocab - 1`` marks the positions where the copy is due.

    Returns:
        Inputs ``(n, length + 2 * tokens)``, ending in ``tokens`` markers, and targets ``(n, tokens)`` for those.
    """
    needed = "A blank, a marker and at least one data token are needed."
    _require(vocab >= 3, f"selective_copying(vocab={vocab}): is below 3. {needed}")
    given = f"selective_copying(length={length}, tokens={tokens})"
    _require(tokens >= 1 and length >= 0, f"{given}: give at least one data token, and no negative length.")
    targets = rng.integers(1, vocab - 1, (n, tokens))
    inputs = np.zeros((n, length + 2 * tokens), dtype=np.int64)
    inputs[:, length + tokens :] = vocab - 1
    at = np.stack([np.sort(rng.permutation(length + tokens)[:tokens]) for _ in range(n)])
    np.put_along_axis(inputs, at, targets, 1)
    return inputs, targets


def keyed_strings(
    rng: np.random.Generator,
    n: int,
    length: int = 24,
    min_length: int | None = None,
    ngram: int = 2,
    answer: int = 4,
    vocab: int = 26,
) -> list[tuple[np.ndarray, int]]:
    """Uniformly random strings, each with the place of an n-gram that occurs in it once: the key to what follows.

    Differs from the authors' code, which may pick an n-gram that occurs twice and whose continuation is then a matter
    of luck. Lengths are uniform from ``min_length`` to ``length``; all have ``length`` by default. At least ``answer`` symbols follow
    the ``ngram`` of the key.

    Returns:
        Pairs of a string ``(l,)`` and the index at which its key starts.
    """
    min_length = _keyed_sizes(length, min_length, ngram, answer)
    out: list[tuple[np.ndarray, int]] = []
    failures = 0
    while len(out) < n:
        string = rng.integers(0, vocab, rng.integers(min_length, length + 1))
        grams = np.lib.stride_tricks.sliding_window_view(string, ngram)
        _, inverse, counts = np.unique(grams, axis=0, return_inverse=True, return_counts=True)
        unique = np.flatnonzero(counts[inverse.reshape(-1)] == 1)
        unique = unique[unique + ngram + answer <= len(string)]
        if len(unique):
            out.append((string, int(rng.choice(unique))))
        failures += not len(unique)
        _require(failures <= 100 + 10 * n, _RARE.format(ngram, vocab, length))
    return out


def keyed_table(
    rng: np.random.Generator,
    n: int,
    length: int = 24,
    min_length: int | None = None,
    ngram: int = 2,
    answer: int = 4,
    vocab: int = 26,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw what :func:`keyed_strings` draws, all rows at once: the same distribution, other values of a seed.

    Returns:
        Strings ``(n, length)`` int32, of which the first ``lengths`` ``(n,)`` symbols count, and where keys start, ``(n,)``.
    """
    min_length = _keyed_sizes(length, min_length, ngram, answer)
    strings = np.empty((n, length), dtype=np.int32)
    lengths, at = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    todo = np.arange(n)
    for _ in range(100 + 10 * -(-n // _ROWS)):
        some = todo[:_ROWS]
        string, l = (
            rng.integers(0, vocab, (len(some), length), dtype=np.int32),
            rng.integers(min_length, length + 1, len(some)),
        )
        # an n-gram as one number; those that run beyond the end of a string are different from all others
        grams = sum(string[:, i : length - ngram + i + 1].astype(np.int64) * vocab**i for i in range(ngram))
        places = np.arange(grams.shape[1])
        grams = np.where(places <= l[:, None] - ngram, grams, -1 - places)
        order = np.argsort(grams, 1, kind="stable")
        ranked = np.take_along_axis(grams, order, 1)
        same = np.pad(ranked[:, 1:] == ranked[:, :-1], ((0, 0), (1, 1)))
        unique = np.empty(grams.shape, dtype=bool)
        np.put_along_axis(unique, order, ~(same[:, 1:] | same[:, :-1]), 1)
        unique &= places <= l[:, None] - ngram - answer
        found = unique.any(1)
        chosen = np.where(unique, rng.random(unique.shape), -1.0).argmax(1)
        strings[some[found]], lengths[some[found]], at[some[found]] = string[found], l[found], chosen[found]
        todo = np.concatenate([some[~found], todo[_ROWS:]])
        if not len(todo):
            return strings, lengths, at
    raise ValueError(_RARE.format(ngram, vocab, length))


def _keyed_sizes(length: int, min_length: int | None, ngram: int, answer: int) -> int:
    """Return the least length, or raise a ValueError where strings have no room for a key and an answer."""
    min_length = length if min_length is None else min_length
    given = f"keyed_strings(min_length={min_length}, length={length})"
    held = f"a key of {ngram} and an answer of {answer}"
    _require(ngram + answer <= min_length <= length, f"{given}: strings must hold {held}. Lengthen them.")
    return min_length


def _checked_seed(seed: int) -> int:
    apart = "Training and evaluation keep apart by it; choose another."
    _require(0 <= seed < _SPLIT, f"seed: {seed} is outside [0, 2**31). {apart}")
    return seed


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)

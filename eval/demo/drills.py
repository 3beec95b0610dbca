"""Training documents for the recall tasks, with many questions each: the tasks' formats, and a signal at every turn.

A task asks once per key, or once per document, which is right for a test and thin for learning. A drill goes on asking in the
same document. All draw ``n`` documents of at most ``length`` tokens from ``rng``, with the task's own sizes, and return token ids,
arrays ``(l,)`` int64, for :func:`~hybridzoo.zoo.train.data.pack`: ``~id`` is read and not predicted, which is all but the answers.
"""

import numpy as np

from ..tasks.render import selective_copying_documents, symbols

__all__ = ["induction_drills", "mqar_drills", "selective_copying_drills"]


def mqar_drills(rng: np.random.Generator, n: int, length: int, pairs: int = 8, vocab: int = 34) -> list[np.ndarray]:
    """Key-value pairs, then keys drawn again and again, each followed by its value."""
    ids, half = _ids(vocab), vocab // 2
    out = []
    for _ in range(n):
        keys = ids[rng.choice(np.arange(1, half), pairs, replace=False)]
        values = ids[rng.choice(np.arange(half, vocab), pairs, replace=False)]
        asked = rng.integers(0, pairs, length // 2 - pairs)
        given = ~np.stack([keys, values], 1)
        questions = np.stack([~keys[asked], values[asked]], 1)
        out.append(np.concatenate([given, questions]).reshape(-1))
    return out


def induction_drills(rng: np.random.Generator, n: int, length: int, vocab: int = 16) -> list[np.ndarray]:
    """Random letters with the marker now and then, always followed by the same one."""
    ids, marker = _ids(vocab + 1)[1:], ord(">")
    out = []
    for _ in range(n):
        row, answer = ~ids[rng.integers(0, vocab, length)], ids[rng.integers(0, vocab)]
        at, known = int(rng.integers(0, 8)), False
        while at + 1 < length:
            row[at], row[at + 1] = ~marker, answer if known else ~answer
            known = True
            at += 2 + int(rng.integers(0, 12))
        out.append(row)
    return out


def selective_copying_drills(
    rng: np.random.Generator, n: int, length: int, tokens: int, vocab: int
) -> list[np.ndarray]:
    """The task's own documents: every letter of the copy is an answer."""
    out = []
    for document in selective_copying_documents(rng, n, length, tokens, vocab):
        ids = np.frombuffer(document.text.encode("ascii"), np.uint8).astype(np.int64)
        answers = np.isin(np.arange(ids.size), [q.end for q in document.questions])
        out.append(np.where(answers, ids, ~ids))
    return out


def _ids(vocab: int) -> np.ndarray:
    # a character is a token of the byte tokenizer
    return np.array([ord(symbol) for symbol in symbols(vocab)], np.int64)

"""Recall data as text: documents a language model can be trained on, and the questions that can be put along them.

A training document and an evaluation prompt are the same text: a prompt is a document cut off where an answer is due.
Tokens are written as single printable characters (``style="chars"``: one token each for a byte-level model) or as
space-separated made-up words (``style="words"``: for BPE models, and for vocabularies above 94).

A language model reads its own answers, so the slot after a query of MQAR, which Zoology fills at random, holds the
value, and the copy of selective copying follows one marker instead of standing under several. ``reveal=False`` gives
MQAR's literal input.
"""

import dataclasses
import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from .generators import IGNORED, induction, keyed_strings, mqar, selective_copying

__all__ = [
    "Document", "Example", "Question", "copy_documents", "induction_documents", "mqar_documents", "passkey_documents",
    "selective_copying_documents", "symbols",
]  # fmt: skip

_CHARS = "." + string.ascii_letters + string.digits + "".join(c for c in string.punctuation if c != ".")
_SYLLABLES = [c + v for c in "bcdfghjklmnprstvwxyz" for v in "aeiou"]


@dataclasses.dataclass(frozen=True)
class Question:
    """An answer that is due inside a document.

    Attributes:
        end: Length of the prompt: the document's characters before the answer.
        choices: Possible continuations, each different.
        gold: Index of the right one.
    """

    end: int
    choices: tuple[str, ...]
    gold: int


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its possible continuations; ``choices[gold]`` is the right one."""

    prompt: str
    choices: tuple[str, ...]
    gold: int

    @property
    def answer(self) -> str:
        """The right continuation."""
        return self.choices[self.gold]


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to train on, and the questions along it to evaluate with."""

    text: str
    questions: tuple[Question, ...]

    def examples(self) -> list[Example]:
        """One prompt per question, in order."""
        return [Example(self.text[: q.end], q.choices, q.gold) for q in self.questions]


def mqar_documents(
    rng: np.random.Generator, n: int, length: int = 64, pairs: int = 8, vocab: int = 80, *,
    reveal: bool = True, style: str = "chars", **settings: Any,
) -> list[Document]:  # fmt: skip
    """Documents of :func:`~.generators.mqar`, sizes in tokens; the choices of a query are the values that the document's pairs hold.

    ``reveal`` writes the value behind each query; otherwise the text is Zoology's input, letter for letter.
    """

    def written(ids: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, Asked]:
        at, values = np.flatnonzero(label != IGNORED), ids[1 : 2 * pairs : 2].tolist()
        asked = {int(i): (values, values.index(label[i])) for i in at}
        if reveal:
            ids[at + 1] = label[at]
        return ids, asked

    drawn = mqar(rng, n, length, pairs, vocab, **settings)
    return _documents(_names(vocab, style), style, map(written, *drawn))


def induction_documents(
    rng: np.random.Generator, n: int, length: int = 64, vocab: int = 16, *, style: str = "chars"
) -> list[Document]:
    """Documents of :func:`~.generators.induction`: letters with ``>`` in two places; the choices are all ordinary tokens."""
    names, drawn = [*_names(vocab + 1, style)[1:], ">"], zip(*induction(rng, n, length, vocab), strict=True)
    return _documents(names, style, (([*ids, answer], {length: (range(vocab), int(answer))}) for ids, answer in drawn))


def selective_copying_documents(
    rng: np.random.Generator, n: int, length: int = 48, tokens: int = 8, vocab: int = 16, *, style: str = "chars"
) -> list[Document]:
    """Documents of :func:`~.generators.selective_copying`: dots and letters, ``|``, the letters again; a question per letter."""

    def written(ids: np.ndarray, target: np.ndarray) -> tuple[list[int], Asked]:
        body = length + tokens
        asked = {body + i: (range(1, vocab - 1), int(t) - 1) for i, t in enumerate(target)}
        return [*ids[: body + 1], *target], asked

    names = [*_names(vocab - 1, style), "|"]
    return _documents(names, style, map(written, *selective_copying(rng, n, length, tokens, vocab)))


def copy_documents(
    rng: np.random.Generator, n: int, *, ngram: int = 2, answer: int = 4, vocab: int = 26, prefix: bool = True, style: str = "chars",
    **lengths: Any,
) -> list[Document]:  # fmt: skip
    """Documents of :func:`~.generators.keyed_strings`; a question per symbol of the answer, all symbols to choose from.

    ``prefix`` puts the key in front, ``$key|string|answer.``, or else it stands behind, ``$string|keyanswer.``.
    """
    names = [*_names(vocab + 1, style)[1:], "$", "|", "."]
    start, bar, stop = vocab, vocab + 1, vocab + 2

    def written(drawn: tuple[np.ndarray, int]) -> tuple[list[int], Asked]:
        text, at = drawn
        key, target = text[at : at + ngram], text[at + ngram : at + ngram + answer]
        head = [start, *key, bar, *text, bar] if prefix else [start, *text, bar, *key]
        asked = {len(head) - 1 + i: (range(vocab), int(t)) for i, t in enumerate(target)}
        return [*head, *target, stop], asked

    strings = keyed_strings(rng, n, ngram=ngram, answer=answer, vocab=vocab, **lengths)
    return _documents(names, style, map(written, strings))


# the wording of arXiv:2305.16300, section 4.2
_OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
_FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
_CLOSING = "\nWhat is the pass key? The pass key is"


def passkey_documents(rng: np.random.Generator, n: int, length: int = 512, choices: int = 10) -> list[Document]:
    """Passkey retrieval (arXiv:2305.16300): five digits hidden at a uniform depth of filler sentences.

    A prompt has at most ``length`` characters; the right one of ``choices`` different keys stands among them in a random place.
    """
    documents = []
    for _ in range(n):
        keys = [f" {k}" for k in rng.choice(90_000, choices, replace=False) + 10_000]
        gold = int(rng.integers(choices))
        needle = f"The pass key is{keys[gold]}. Remember it.{keys[gold]} is the pass key."
        room = length - len(_OPENING + needle + _CLOSING)
        if room < 0:
            raise ValueError(
                f"passkey(length={length}): the question alone takes {length - room} characters. Lengthen it."
            )
        filler: list[str] = []
        while room > len(sentence := _FILLER[len(filler) % len(_FILLER)]):
            filler.append(sentence)
            room -= len(sentence) + 1
        filler.insert(int(rng.integers(len(filler) + 1)), needle)
        prompt = _OPENING + " ".join(filler) + _CLOSING
        documents.append(Document(f"{prompt}{keys[gold]}.", (Question(len(prompt), tuple(keys), gold),)))
    return documents


def symbols(vocab: int) -> list[str]:
    """The characters that stand for the token ids 0 ... ``vocab - 1`` under ``style="chars"``."""
    return _names(vocab, "chars")


def _names(vocab: int, style: str) -> list[str]:
    if style not in ("chars", "words"):
        raise ValueError(f"style: is {style!r}. Choose 'chars' (single characters) or 'words' (separated by spaces).")
    if style == "chars":
        if vocab > len(_CHARS):
            raise ValueError(f"vocab: {vocab} tokens exceed the {len(_CHARS)} printable characters. Use style='words'.")
        return list(_CHARS[:vocab])
    if vocab > len(_SYLLABLES) ** 2 + 1:
        raise ValueError(f"vocab: {vocab} tokens exceed the {len(_SYLLABLES) ** 2 + 1} words there are. Use fewer.")
    # every pair of syllables once; neighbours in the list share none
    words = (_SYLLABLES[i % 100] + _SYLLABLES[(i // 100 + i) % 100] for i in range(vocab - 1))
    return [".", *words]


# the index of the last token of a prompt, with its choices and which of them is right
Asked = Mapping[int, tuple[Sequence[int], int]]


def _documents(names: list[str], style: str, drawn: Iterable[tuple[Iterable[int], Asked]]) -> list[Document]:
    """Write tokens as text, with what is asked along them."""
    separator, documents = " " if style == "words" else "", []
    for ids, asked in drawn:
        words = [names[int(i)] for i in ids]
        ends = [len(separator) * i + end for i, end in enumerate(accumulate(map(len, words)))]
        questions = (
            Question(ends[i], tuple(separator + names[c] for c in of), gold) for i, (of, gold) in asked.items()
        )
        documents.append(Document(separator.join(words), tuple(questions)))
    return documents

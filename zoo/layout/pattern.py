"""The text form of a layer pattern: a tokenizer, a recursive-descent parser, and the printer that is their inverse.

The grammar, small on purpose::

    pattern  = item, { item } ;                      (* one after another *)
    item     = block, { "*", count } ;               (* "mamba * 9", "(mamba mlp) * 4" *)
    block    = name, [ "@", label ]
             | name, "+", name, { "+", name }        (* side by side on one input, outputs summed *)
             | "(", pattern, ")", [ "@", label ] ;   (* a label needs a group of one block: "(mamba2 + attention)@a" *)
    name     = letter | "_", { letter | digit | "_" } ;
    label    = letter | digit | "_", { letter | digit | "_" } ;
    count    = digit, { digit } ;                    (* 1 or more *)

Letters and digits are ASCII; blanks and line breaks may stand between any two symbols. ``+`` binds tighter than
sequence. What could be read two ways is refused with the remedy: ``a + b * 2`` needs parentheses, and as a label
belongs to a whole block, so does ``a + b@x``. Parentheses nest 32 deep, names and labels have at most 128 characters, 16 mixers stand
side by side, and a pattern stands for at most 10 000 blocks.
"""

import re
from collections.abc import Sequence
from typing import NoReturn

from ..errors import ConfigError

__all__ = ["MAX_BLOCKS", "MAX_NAME", "compress", "parse", "split_token"]

MAX_BLOCKS = 10_000
_MAX_DEPTH = 32
_MAX_CHARS = 1_000_000
MAX_NAME = 128
_MAX_BRANCHES = 16
_MAX_PERIOD = 128
_MAX_WORK = 200_000
_BLANKS = re.compile(r"\s*", re.ASCII)
_SYMBOL = re.compile(r"\w+|[^\w\s]", re.ASCII)


def parse(text: str, where: str = "layers") -> list[str]:
    """The tokens that a pattern text stands for, one per residual block; an error says where, what was found and what was expected."""
    if len(text) > _MAX_CHARS:
        raise ConfigError(f"{where}: has {len(text)} characters, more than {_MAX_CHARS}. Use repetition, '(a b) * 9'.")
    return _Parser(text, where).parse()


def split_token(token: str) -> tuple[list[str], str | None]:
    """The mixer names of one token of :func:`parse`, and its label or ``None``."""
    names, _, label = token.partition("@")
    return names.strip("()").split("+"), label or None


class _Parser:
    """One method per rule of the grammar; ``self.symbol`` is the next symbol, which starts at ``self.at``; the last is the empty text."""

    def __init__(self, text: str, where: str):
        self.text, self.where = text, where
        self.symbol, self.at, self.end = "", 0, 0
        self._next()

    def _next(self) -> None:
        # one symbol at a time, blanks before it apart: whatever the text, it is walked through once, and no further than an error
        self.at = _BLANKS.match(self.text, self.end).end()  # type: ignore[union-attr]
        found = _SYMBOL.match(self.text, self.at)
        self.symbol, self.end = (found[0], found.end()) if found else ("", len(self.text))

    def parse(self) -> list[str]:
        if not self.symbol:
            raise ConfigError(f"{self.where}: the pattern is empty. Name at least one mixer.")
        tokens = self._pattern(0)
        if self.symbol:
            self._fail("expected a mixer name or the end: no '(' is open")
        return tokens

    def _pattern(self, depth: int) -> list[str]:
        tokens: list[str] = []
        while self.symbol not in ("", ")") or not tokens:
            item = self._block(depth)
            while self._accept("*"):
                item = self._times(item)
            if self.symbol == "+":
                self._fail("expected a mixer name: what is repeated cannot stand beside another, only '(a + b) * 2'")
            tokens += item
            self._bound(len(tokens))
        return tokens

    def _times(self, item: list[str]) -> list[str]:
        if not (self.symbol.isascii() and self.symbol.isdecimal() and self.symbol.strip("0")):
            self._fail("expected how often to repeat, 1 or more, after '*'")
        # int() refuses endless numbers with an error of its own
        count = int(self.symbol) if len(self.symbol) < 9 else MAX_BLOCKS + 1
        self._bound(len(item) * count)
        self._next()
        return item if count == 1 else item * count

    def _block(self, depth: int) -> list[str]:
        if self.symbol == "(":
            return self._group(depth)
        names = [self._name("or '('")]
        if self._accept("@"):
            token = f"{names[0]}@{self._label()}"
            if self.symbol == "+":
                self._fail("expected no '+' after a label, which belongs to a whole block: '(a + b)@x'")
            return [token]
        while self._accept("+"):
            if self.symbol == "(":
                self._fail("expected a mixer name after '+': write 'a + b + c' without parentheses")
            if len(names) == _MAX_BRANCHES:
                self._fail(f"expected at most {_MAX_BRANCHES} mixers side by side")
            names.append(self._name("after '+'"))
        if len(names) > 1 and self.symbol in ("*", "@"):
            block = " + ".join(names)
            self._fail(f"expected parentheses before it, '({block})', to say that it means the whole block")
        return ["+".join(names)]

    def _group(self, depth: int) -> list[str]:
        if depth == _MAX_DEPTH:
            self._fail(f"expected at most {_MAX_DEPTH} nested parentheses")
        opened = self.at
        self._next()
        tokens = self._pattern(depth + 1)
        if not self._accept(")"):
            self._fail(f"expected ')' for the '(' at {self._column(opened)}")
        if self.symbol == "@":
            if len(tokens) > 1 or "@" in tokens[0]:
                self._fail("expected no label here, it marks one block that has none: label the names inside")
            self._next()
            name = f"({tokens[0]})" if "+" in tokens[0] else tokens[0]
            tokens = [f"{name}@{self._label()}"]
        if self.symbol == "+":
            self._fail("expected no '+' after ')': only names stand side by side, 'a + b + c'")
        return tokens

    def _name(self, place: str) -> str:
        fits = self.symbol.isascii() and self.symbol.isidentifier()
        return self._word("name", fits, f"expected a mixer name {place}")

    def _label(self) -> str:
        fits = re.fullmatch(r"\w+", self.symbol, re.ASCII) is not None
        return self._word("label", fits, "expected a label after '@', such as 'attention@a'")

    def _word(self, what: str, fits: bool, expected: str) -> str:
        symbol = self.symbol
        if not fits:
            self._fail(expected)
        if len(symbol) > MAX_NAME:
            self._fail(f"expected a {what} of at most {MAX_NAME} characters, and this one has {len(symbol)}")
        self._next()
        return symbol

    def _accept(self, symbol: str) -> bool:
        found = self.symbol == symbol
        if found:
            self._next()
        return found

    def _bound(self, blocks: int) -> None:
        if blocks > MAX_BLOCKS:
            problem = f"stands for {blocks} blocks, more than {MAX_BLOCKS}. Repeat less often."
            raise ConfigError(f"{self.where}: {self._column(self.at)}: {problem}")

    def _column(self, at: int) -> str:
        column = f"column {at - self.text.rfind(chr(10), 0, at)}"
        return f"line {self.text.count(chr(10), 0, at) + 1}, {column}" if "\n" in self.text.strip() else column

    def _fail(self, expected: str) -> NoReturn:
        found = repr(self.symbol[:40]) if self.symbol else "the end"
        raise ConfigError(f"{self.where}: {self._column(self.at)}: found {found}, {expected}.")


def compress(tokens: Sequence[str]) -> str:
    """A short pattern that :func:`parse` reads back as ``tokens``: ``"(mamba mlp) * 4 attention"``."""
    folds: dict[tuple[str, ...], _Fold] = {}
    whole = tuple(tokens)
    _fold(whole, folds)
    return _printed(whole, folds)


# for the rest of some tokens from each one on: the length of the shortest text found, and what it begins with, where that unit ends and
# how often it stands there. Texts are put together at the end alone: those of all units that are tried would take gigabytes
_Fold = list[tuple[int, int, int]]


def _fold(tokens: tuple[str, ...], known: dict[tuple[str, ...], _Fold]) -> int:
    """The length of a short text, by dynamic programming over suffixes: next comes one token, or a unit and how often it repeats."""
    if tokens in known:
        return known[tokens][0][0] - 1
    n = len(tokens)
    copies = _copies(tokens)
    # a text is one blank too long here, and none stands after the last
    best: _Fold = [(0, n, 0)] * (n + 1)
    for i in range(n - 1, -1, -1):
        best[i] = (len(tokens[i]) + 1 + best[i + 1][0], i + 1, 1)
        for period, times in copies[i]:
            unit = tokens[i : i + period]
            around = len(f" * {times}") if _is_name(unit) else len(f"() * {times}")
            length = _fold(unit, known) + around + 1 + best[i + period * times][0]
            if length < best[i][0]:
                best[i] = (length, i + period, times)
    known[tokens] = best
    return best[0][0] - 1


def _is_name(unit: tuple[str, ...]) -> bool:
    return len(unit) == 1 and "+" not in unit[0]


def _printed(tokens: tuple[str, ...], known: dict[tuple[str, ...], _Fold]) -> str:
    texts, i = [], 0
    while i < len(tokens):
        _, end, times = known[tokens][i]
        unit = tokens[i:end]
        text = unit[0] if len(unit) == 1 else _printed(unit, known)
        texts.append(text if times == 1 else f"{text} * {times}" if _is_name(unit) else f"({text}) * {times}")
        i += len(unit) * times
    return " ".join(texts)


def _copies(tokens: tuple[str, ...]) -> list[list[tuple[int, int]]]:
    """For every start, the units that repeat from there: their lengths, and how many copies follow one another."""
    n = len(tokens)
    copies: list[list[tuple[int, int]]] = [[] for _ in range(n)]
    # absurdly long patterns get shorter units, so that the work stays bounded
    longest = min(n // 2, _MAX_PERIOD, max(16, _MAX_WORK // (n + 1)))
    for period in range(1, longest + 1):
        run = 0  # how many tokens from here on equal the one a period later
        for i in range(n - period - 1, -1, -1):
            run = run + 1 if tokens[i] == tokens[i + period] else 0
            # a unit that is itself a repetition of a shorter one adds nothing
            if run >= period and not any(period % p == 0 and p * k >= run for p, k in copies[i]):
                copies[i].append((period, run // period + 1))
    return copies

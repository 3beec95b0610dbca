"""Errors about what a file says. Their texts go to terminals and logs, so they are one bounded line of printable characters."""

import difflib
import re
from collections.abc import Iterable

__all__ = ["CheckpointError", "ConfigError", "SourceError", "nearest", "printable", "shortened"]

_LONGEST, _TAIL, _QUOTED = 1200, 300, 80


class SourceError(ValueError):
    """An error whose text quotes a file or a command line: control characters become escapes, and the middle of a long one is cut."""

    def __init__(self, message: object = ""):
        text = str(message)
        if len(text) > _LONGEST:
            left_out = len(text) - _LONGEST
            text = f"{text[: _LONGEST - _TAIL]} [... {left_out} characters left out ...] {text[-_TAIL:]}"
        super().__init__(printable(text))


class ConfigError(SourceError):
    """A config that cannot work: the dotted key, what is wrong with it, and the remedy, in one line."""


class CheckpointError(SourceError):
    """A folder that does not hold a whole, matching model: which file, what is wrong with it, and the remedy."""


def shortened(value: object) -> str:
    """Return the ``repr`` of a value that an error quotes; of a long one, its beginning and its length."""
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:60]}... ({len(text)} characters)"


def printable(text: object, keep: str = "") -> str:
    """``text`` with all that a terminal may act on (control characters, line breaks, marks of direction) as escapes; ``keep`` stays."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def nearest(name: object, known: Iterable[str]) -> str:
    """A ``Did you mean ...?`` sentence with a leading space if ``name`` is a slip of the keyboard for one of ``known``; else empty.

    A slip leaves out, adds or swaps letters, one in five of them; a letter in another's place counts twice. Names that differ in their
    digits, such as ``mamba`` and ``mamba2``, are different things.
    """
    name = str(name)[:100]
    for close in difflib.get_close_matches(name, list(known), n=3):
        if _slips(name, close) <= max(1, len(name) // 5) and re.findall(r"\d+", name) == re.findall(r"\d+", close):
            return f" Did you mean {close!r}?"
    return ""


def _slips(a: str, b: str) -> int:
    # edit distance with neighbours swapped at the price of one insertion
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i in range(1, len(a) + 1):
        row = [i]
        for j in range(1, len(b) + 1):
            same = a[i - 1] == b[j - 1]
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] if same else last[j - 1] + 2))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1] and not same:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]

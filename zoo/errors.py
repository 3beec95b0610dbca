"""Errors about what a file says. Their texts go to terminals and logs, so they are one bounded line of printable characters."""

__all__ = ["CheckpointError", "ConfigError", "SourceError", "printable", "shortened"]

_LONGEST = 1200
_TAIL = 300
_QUOTED = 80


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
    """``text`` with everything that a terminal may act on (control characters, other line breaks, marks of direction) as escapes.

    Args:
        text: Anything; ``str`` is called.
        keep: Characters that stay as they are, such as line breaks of our own.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)

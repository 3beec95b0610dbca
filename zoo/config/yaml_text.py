"""YAML, read as data alone and within bounds: no tags, no key twice, no numbers in base 60, and aliases that end."""

import re
from typing import Any

import yaml

from .plain import MAX_DEPTH, MAX_VALUES

__all__ = ["TooMuch", "parse_yaml"]

# libyaml's, which is in every wheel of PyYAML, is linear in the text and ten times as fast as the other
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
# a longer number is a text, which is then refused where a number belongs; converting it could take minutes
_SHORT = r"^(?=.{1,64}$)"
_DIGITS = r"[0-9]+(?:_[0-9]+)*"


class TooMuch(yaml.YAMLError):
    """A text that stands for more values than any config has."""


class _Loader(_Base):
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_TAG) not in ("int", "float", "timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    _TAG + "int",
    re.compile(_SHORT + r"[-+]?(?:0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
# unlike YAML 1.1, and as everybody expects: 1e-3 is a number
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(
        _SHORT
        + rf"(?:[-+]?(?:{_DIGITS}\.[0-9_]*(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+|\.{_DIGITS}(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Return the data that a YAML text stands for; a ``yaml.YAMLError`` where it is none, or :class:`TooMuch`."""
    _measure(text)
    return yaml.load(text, Loader=_Loader)


def _measure(text: str) -> None:
    # the parser's events before any of them becomes an object: a file of one megabyte can hold half a million
    documents, total = 0, 0
    sizes: dict[str, int] = {}  # of what an anchor names, aliases filled in; known when it has ended
    opened: list[_Open] = []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _at(event, "found a second document, expected one. Remove the line '---'")
        elif isinstance(event, yaml.NodeEvent):
            if getattr(event, "tag", None):
                raise _at(event, f"found the tag {event.tag[:40]!r}, expected plain data. Remove it")
            if opened:
                opened[-1].take(event)
            # what is not defined at all is left to the loader, which says so
            total += sizes.get(event.anchor, 1) if isinstance(event, yaml.AliasEvent) else 1
            if total > MAX_VALUES:
                raise TooMuch(f"stands for more than {MAX_VALUES} values with its aliases filled in. Write fewer")
            if isinstance(event, yaml.CollectionStartEvent):
                if len(opened) >= MAX_DEPTH:
                    raise _at(event, f"found more than {MAX_DEPTH} levels of nesting. Write it flat")
                opened.append(_Open(isinstance(event, yaml.MappingStartEvent), event.anchor, total))
                if event.anchor:  # an alias inside what it names would never end
                    sizes.setdefault(event.anchor, MAX_VALUES + 1)
            elif event.anchor and not isinstance(event, yaml.AliasEvent):
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            ended = opened.pop()
            if ended.anchor:
                sizes[ended.anchor] = total - ended.before + 1


class _Open:
    """A collection whose end has not been read yet."""

    def __init__(self, is_mapping: bool, anchor: str | None, before: int):
        self.keys: set[str] | None = set() if is_mapping else None
        self.anchor, self.before, self.children = anchor, before, 0

    def take(self, event: yaml.NodeEvent) -> None:
        """One more child; every second one of a mapping is a key, which must be new."""
        self.children += 1
        if self.keys is None or self.children % 2 == 0 or not isinstance(event, yaml.ScalarEvent):
            return
        if event.value in self.keys:
            raise _at(event, f"found duplicate key {event.value[:80]}")
        self.keys.add(event.value)


def _at(event: yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)

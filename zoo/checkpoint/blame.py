"""The field of a file that is to blame: errors about our config, in the words of the file that it was read from.

No table says which field became which option. It is found out when it is needed: the file is read again with one field changed, and
what changes of our config comes from that field.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .family import Family
from .fields import Fields

__all__ = ["culprit", "in_words_of_file"]

_FAILS = (TypeError, AttributeError, KeyError, IndexError, ValueError, ZeroDivisionError, OverflowError)


def culprit(family: Family, fields: Fields) -> str | None:
    """The field without which, or with another value of which, a file could be read that cannot be read as it is."""
    given = fields.data
    without = [(name, {key: value for key, value in given.items() if key != name}) for name in given]
    other = [(name, {**given, name: value}) for name, old in given.items() for _, value in _changes(name, old)]
    for name, data in without + other:
        try:
            family.read(Fields(data, fields.file))
        except _FAILS:
            continue
        return name
    return None


def in_words_of_file(text: str, family: Family, fields: Fields, cfg: Mapping[str, Any]) -> str:
    """An error about a config of ours, ``mixers.mamba2.dt_max: is ...``, with the names of the fields that it was read from."""
    names = dict(_origins(family, fields, cfg))
    if not names:
        return text
    where = re.match(r"mixers\.(\w+)", text)
    # an option's own name, as errors use it, if it is one of the mixer that the error is about or of no mixer
    words = {path.rpartition(".")[2]: name for path, name in names.items() if not path.startswith("mixers.")}
    if where:
        inside = f"{where[0]}."
        words |= {path.removeprefix(inside): name for path, name in names.items() if path.startswith(inside)}
    text = re.sub(
        r"^mixers\.\w+(\.(\w+))?( \(\w+\))?", lambda m: words.get(m[2] or "", m[2]) or f"{m[0].split('.')[1]}", text
    )
    return re.sub(r"(?<![\w.])[a-z]\w*(\.\w+)?(?![\w.(])", lambda m: names.get(m[0], words.get(m[0], m[0])), text)


def _origins(family: Family, fields: Fields, cfg: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each option that a field decides, and the field; of several fields that which decides least else."""
    before, decides = _flat(cfg), dict[str, set[str]]()
    for field in sorted(fields.known | fields.data.keys()):
        for name, other in _changes(field, fields.data.get(field)):
            try:
                after = _flat(family.read(Fields({**fields.data, field: other}, fields.file)))
            except _FAILS:
                continue
            differs = {path for path in before.keys() | after.keys() if repr(before.get(path)) != repr(after.get(path))}
            decides[name] = decides.get(name, set()) | differs
    for path in before:
        of = sorted((len(paths), name) for name, paths in decides.items() if path in paths)
        # where a file lacks a field that has older names, any of them would do
        of = [entry for entry in of if entry[1].partition(".")[0] in fields.data] or of
        if of:
            yield path, of[0][1]


def _changes(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Other values of a field, or of what is in it, and the name of that."""
    if not isinstance(value, dict):
        yield from ((name, other) for other in _varied(value))
        return
    for key, inner in value.items():
        yield from ((f"{name}.{key}", {**value, key: other}) for other in _varied(inner))


def _varied(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value or 4, 3]
    if isinstance(value, float):
        return [2 * value + 1, value + 0.25, 1.5]
    if isinstance(value, list):
        return [value[:-1], [_varied(v)[0] if _varied(v) else v for v in value]]
    return [1, 2.5, True] if value is None else []


def _flat(cfg: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(cfg, Mapping):
        return {path: cfg}
    inside = f"{path}." if path else ""
    return {key: v for name, part in cfg.items() for key, v in _flat(part, f"{inside}{name}").items()}

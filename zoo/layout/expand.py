"""The layout of a model, a mixer for each residual block: every way to write it down becomes one explicit list.

One token of that list is one residual block (norm, mixer, add): a name from the config's ``mixers``, names joined by
``+`` where several stand side by side, and ``@label`` where a block shares its weights with the others of that label.
:func:`~hybridzoo.zoo.layout.pattern.compress` prints a list as a text, and :func:`expand` reads it back as the same list.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, nearest
from .pattern import MAX_BLOCKS, parse

__all__ = ["READS", "WRITES", "BlockSpec", "allocate", "expand"]

# a second stream beside the residual one, and the embedded tokens again: what Zamba needs (arXiv:2405.16712 §2)
READS = ("residual", "residual_and_embedding", "side", "residual_plus_side")
WRITES = ("residual", "side")

_PLACES = ("even", "first", "last", "middle")
_KEYS = ("n_layer", "allocate", "fill", "place", "then")
_MAX_KINDS = 64


@dataclasses.dataclass
class BlockSpec:
    """One residual block: its mixers, and the streams around them.

    Attributes:
        index: Of the block, from 0.
        token: As :func:`expand` gives it.
        label: Blocks with the same label are one set of weights; ``None`` for a block of its own.
        parts: One triple for each of the mixers that stand side by side: its name in ``mixers``, ``{"type": ...,
            **options}``, and the dotted key for messages.
        reads: What goes into the block, one of :data:`READS`.
        writes: Where what comes out of it goes, one of :data:`WRITES`.
        d_model: Channels of the residual stream there.
        stage: Which part of the trunk it stands in, from 0; each has a width of its own, and a text's trunk is one.
        drop: The probability that training leaves the block out, for one row of a batch (stochastic depth, arXiv:1603.09382).
    """

    index: int
    token: str
    label: str | None
    parts: list[tuple[str, dict[str, Any], str]]
    reads: str = "residual"
    writes: str = "residual"
    d_model: int = 0
    stage: int = 0
    drop: float = 0.0

    @property
    def d_in(self) -> int:
        """Channels of the block's input."""
        return 2 * self.d_model if self.reads == "residual_and_embedding" else self.d_model


def expand(spec: Any, where: str = "layers") -> list[str]:
    """The explicit list of tokens that a layout stands for.

    Args:
        spec: A pattern text (:mod:`hybridzoo.zoo.layout.pattern` has the grammar), a list of them, or a mapping for :func:`allocate`;
            OmegaConf containers work too.
        where: Dotted key for messages.

    Returns:
        One token per residual block: ``"mamba"``, ``"attention@a"``, ``"mamba2+attention"`` or
        ``"(mamba2+attention)@a"``. A list of tokens expands to itself.

    Raises:
        ConfigError: ``spec`` is no layout.
    """
    if isinstance(spec, str):
        return parse(spec, where)
    if isinstance(spec, Mapping):
        return allocate(spec, where)
    if not isinstance(spec, Sequence) or isinstance(spec, bytes | bytearray | memoryview):
        raise ConfigError(
            f"{where}: found {_show(spec)}, expected a pattern such as '(mamba mlp) * 4', a list, or a mapping."
        )
    if not len(spec):
        raise ConfigError(f"{where}: the list is empty. Name at least one mixer.")
    tokens: list[str] = []
    for i, item in enumerate(spec):
        if not isinstance(item, str):
            raise ConfigError(
                f"{where}[{i}]: found {_show(item)}, expected a pattern such as 'mamba'. Write it as text."
            )
        tokens += parse(item, f"{where}[{i}]")
        if len(tokens) > MAX_BLOCKS:
            raise ConfigError(f"{where}: stands for more than {MAX_BLOCKS} blocks. Shorten the list.")
    return tokens


def allocate(spec: Mapping[Any, Any], where: str = "layers") -> list[str]:
    """Turn ratios into a pattern by Megatron's rule, which gives NVIDIA's 56-block hybrid (arXiv:2406.07887) exactly.

    Args:
        spec: A mapping of

            - ``n_layer``: blocks in all;
            - ``allocate``: tokens and the share of ``n_layer`` that each takes, in [0, 1], rounded to whole blocks;
            - ``fill``: the token of all other blocks;
            - ``place``: where allocated blocks stand. ``even`` (the default) spreads them, ``first``, ``middle`` and
              ``last`` are one contiguous run, a list gives block indices, from the end where negative. It holds for
              every kind; a mapping such as ``{attention: middle, mlp: even}`` says it for each;
            - ``then``: a token that follows every one of these blocks and is not counted among them, ``mlp`` say.

            Kinds are placed in their order: the first among all blocks, each later one among those still unfilled.
        where: Dotted key for messages.

    Raises:
        ConfigError: A key, ratio or place that cannot be met.
    """
    for key in spec:
        if key not in _KEYS:
            raise ConfigError(f"{where}.{key}: unknown key.{nearest(key, _KEYS)} Keys: {', '.join(_KEYS)}.")
    n, ratios = spec.get("n_layer"), spec.get("allocate")
    if not isinstance(n, int) or isinstance(n, bool) or not 0 < n <= MAX_BLOCKS:
        raise ConfigError(f"{where}.n_layer: found {_show(n)}, expected a whole number from 1 to {MAX_BLOCKS}.")
    if not isinstance(ratios, Mapping):
        raise ConfigError(
            f"{where}.allocate: found {_show(ratios)}, expected mixers and ratios, such as {{attention: 0.125}}."
        )
    if len(ratios) > _MAX_KINDS:
        raise ConfigError(f"{where}.allocate: has {len(ratios)} kinds, more than {_MAX_KINDS}. Allocate fewer.")
    fill = _one_token(spec.get("fill"), f"{where}.fill")
    places = _places(spec.get("place", "even"), list(ratios), f"{where}.place")
    slots: list[str | None] = [None] * n
    for kind, ratio in ratios.items():
        at = f"{where}.allocate.{kind}"
        token = _one_token(kind, at)
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 <= ratio <= 1:
            raise ConfigError(
                f"{at}: found {_show(ratio)}, expected a ratio from 0 to 1. To have k blocks, write k / {n}."
            )
        free = [i for i, slot in enumerate(slots) if slot is None]
        count = round(n * ratio)
        if count > len(free):
            raise ConfigError(f"{at}: {ratio} of {n} blocks is {count}, and {len(free)} are left. Lower the ratios.")
        chosen = places[kind]
        if chosen == "even":
            positions = _spread(count, free, first=kind == next(iter(ratios)))
        elif isinstance(chosen, str):
            start = {"first": 0, "middle": (len(free) - count) // 2, "last": len(free) - count}[chosen]
            positions = free[start : start + count]
        else:
            positions = _indices(chosen, count, free, n, f"{where}.place")
        for i in positions:
            slots[i] = token
    blocks = [fill if slot is None else slot for slot in slots]
    if spec.get("then") is None:
        return blocks
    then = _one_token(spec["then"], f"{where}.then")
    if 2 * n > MAX_BLOCKS:
        raise ConfigError(f"{where}.n_layer: {n}, each followed by {then}, are more than {MAX_BLOCKS}. Lower it.")
    return [token for block in blocks for token in (block, then)]


def _spread(count: int, free: list[int], first: bool) -> list[int]:
    """Megatron's walk: the first kind is set between equal sections, a later one ends each of its sections."""
    # in floating point, as Megatron computes it: a tie at 0.5 falls on the same side as theirs
    section = (len(free) - count) / (count + first) if count else float("inf")
    x, positions = section, []
    for i in free:
        if x < 0.5:
            positions.append(i)
            x += section
        else:
            x -= 1
    return positions


def _indices(chosen: Sequence[int], count: int, free: list[int], n: int, where: str) -> list[int]:
    positions = [i + n if i < 0 else i for i in chosen]
    often = Counter(positions)
    left = set(free)
    for i, position in zip(chosen, positions, strict=True):
        if not 0 <= position < n:
            raise ConfigError(f"{where}: block {i} is out of range. There are {n} blocks: use {-n} to {n - 1}.")
        if position not in left or often[position] > 1:
            raise ConfigError(f"{where}: block {i} is given away twice. Name every block once.")
    if len(positions) != count:
        raise ConfigError(f"{where}: names {len(positions)} blocks, and the ratio gives {count}. Make the two agree.")
    return positions


def _one_token(text: Any, where: str) -> str:
    tokens = parse(text, where) if isinstance(text, str) else []
    if len(tokens) != 1:
        raise ConfigError(f"{where}: found {_show(text)}, expected the name of one mixer, such as 'mamba2'.")
    return tokens[0]


def _places(place: Any, kinds: list[Any], where: str) -> dict[Any, Any]:
    names = [str(kind) for kind in kinds]
    for key in place if isinstance(place, Mapping) else ():
        if key not in kinds:
            raise ConfigError(f"{where}.{key}: is not allocated.{nearest(key, names)} Allocated: {', '.join(names)}.")
    places = dict.fromkeys(kinds, "even") | dict(place) if isinstance(place, Mapping) else dict.fromkeys(kinds, place)
    for kind, value in places.items():
        if isinstance(value, str) and value in _PLACES:
            continue
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(type(i) is int for i in value):
            known = f"{', '.join(_PLACES)}, or a list of block indices"
            raise ConfigError(f"{where}: found {_show(value)}, expected {known}.{nearest(value, _PLACES)}")
        if len(kinds) > 1 and not isinstance(place, Mapping):
            raise ConfigError(f"{where}: one list cannot place {len(kinds)} kinds. Write {{{kind}: [...]}}.")
    return places


def _show(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}" if value is not None else "nothing"

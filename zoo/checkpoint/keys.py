"""Rules that say which of our tensors is which of theirs: data, read in both directions.

A :class:`Piece` says that a part of one of our parameters equals a part of one of their tensors. Loading copies theirs to ours,
exporting ours to theirs, so what goes out is bit for bit what came in.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..models.model import Model
from ..registry import get_mixer

__all__ = ["Part", "Piece", "View", "attention", "experts", "gated_mlp", "halves", "layer_count", "rows", "same"]

# None is a dimension of size 1 more
Index = tuple[slice | int | None, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """``ours[at] == theirs[of]``; an empty index is the whole tensor."""

    ours: str
    theirs: str
    at: Index = ()
    of: tuple[slice, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """One mixer of one block: its registered type, its options with every derived value filled in, and where its keys begin."""

    type: str
    options: dict[str, Any]
    key: str

    def __getitem__(self, option: str) -> Any:
        return self.options[option]


class View:
    """A model, perhaps on the meta device, as a converter sees it: its blocks, and the names and shapes of its parameters.

    ``stored`` has the shapes of the tensors to be read, none when writing. Where a family's files have come in two forms, they tell which.
    """

    def __init__(self, model: Model, stored: Mapping[str, tuple[int, ...]] | None = None):
        self.cfg, self.stored = model.cfg, stored or {}
        # shared blocks once, under their first name
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        specs = model.specs
        self.streams = [(spec.reads, spec.writes) for spec in specs]
        # for each block the one whose weights it has: itself, or the first with its label
        labels = [spec.label or f"block {spec.index}" for spec in specs]
        self.source = [labels.index(label) for label in labels]
        self.blocks: list[list[Part]] = []
        for spec in specs:
            key = f"backbone.layers.{spec.index}.mixer"
            keys = [key] if len(spec.parts) == 1 else [f"{key}.branches.{i}" for i in range(len(spec.parts))]
            parts = []
            for (_, options, where), k in zip(spec.parts, keys, strict=True):
                mixer = get_mixer(options["type"], where).cls
                parts.append(Part(options["type"], mixer.effective_options(options, spec.d_model), k))
            self.blocks.append(parts)

    @property
    def layout(self) -> list[str]:
        """The mixer types of each block, joined by ``+``."""
        return ["+".join(part.type for part in block) for block in self.blocks]

    def first(self, type: str) -> Mapping[str, Any]:
        """The options of the first mixer of a type; empty if there is none."""
        return next((part.options for block in self.blocks for part in block if part.type == type), {})

    def whole(self, type: str) -> dict[str, Any]:
        """As :meth:`first`, with the options that only matter at initialisation or for speed."""
        spec: Any = next((spec for spec in self.cfg.mixers.values() if spec.type == type), {})
        return {**spec, **self.first(type)}

    def norm(self, block: int, theirs: str) -> Iterator[Piece]:
        """The norm in front of a block."""
        return same(self, f"backbone.layers.{block}.norm", theirs)

    def frame(self, embedding: str, norm: str) -> Iterator[Piece]:
        """The pieces that are in no block: the embedding, the last norm, and the head unless it is tied."""
        yield Piece("backbone.embedding.weight", embedding)
        yield from same(self, "backbone.norm_f", norm)
        if not self.cfg.tie_embeddings:
            yield Piece("lm_head.weight", "lm_head.weight")


def same(view: View, ours: str, theirs: str, rename: Mapping[str, str] | None = None) -> Iterator[Piece]:
    """Every parameter under ``ours`` has the same name under ``theirs``, but for parts of it in ``rename``."""
    for name in view.shapes:
        if name.startswith(f"{ours}."):
            parts = [(rename or {}).get(part, part) for part in name.removeprefix(f"{ours}.").split(".")]
            yield Piece(name, ".".join([theirs, *parts]))


def rows(view: View, ours: str, theirs: Mapping[str, int]) -> Iterator[Piece]:
    """A linear layer whose output rows are, in this order, those of several layers: their names, and how many rows each has."""
    for kind in ("weight", "bias"):
        start = 0
        for name, size in theirs.items():
            if f"{ours}.{kind}" in view.shapes:
                yield Piece(f"{ours}.{kind}", f"{name}.{kind}", (slice(start, start + size),))
            start += size


def attention(view: View, part: Part, theirs: str) -> Iterator[Piece]:
    """``{q,k,v,o}_proj``, as transformers has them, and the norms of heads, if any."""
    heads = {"q": part["nheads"], "k": part["nheads_kv"], "v": part["nheads_kv"]}
    sizes = {f"{theirs}.{name}_proj": n * part["headdim"] for name, n in heads.items()}
    yield from rows(view, f"{part.key}.in_proj", sizes)
    for ours, name in (("out_proj", "o_proj"), ("q_norm", "q_norm"), ("k_norm", "k_norm")):
        yield from same(view, f"{part.key}.{ours}", f"{theirs}.{name}")


def gated_mlp(view: View, part: Part, theirs: str) -> Iterator[Piece]:
    """``{gate,up,down}_proj``, as transformers has them; the up projection is our value."""
    h = part["d_intermediate"]
    yield from rows(view, f"{part.key}.fc1", {f"{theirs}.up_proj": h, f"{theirs}.gate_proj": h})
    yield from same(view, f"{part.key}.fc2", f"{theirs}.down_proj")


def halves(ours: str, theirs: str, h: int, lead: tuple[slice, ...] = ()) -> Iterator[Piece]:
    """A gated layer's two halves in the other order: our value comes first, their gate does. ``lead`` skips dimensions."""
    first, second = (*lead, slice(0, h)), (*lead, slice(h, 2 * h))
    yield Piece(ours, theirs, first, second)
    yield Piece(ours, theirs, second, first)


def experts(part: Part, theirs: str, gate: str, up: str, down: str, fused: bool) -> Iterator[Piece]:
    """Gated experts, one tensor each, or ``fused`` as transformers 5 has them in memory: ``gate_up_proj`` and ``down_proj``."""
    h, w1, w2 = part["d_intermediate"], f"{part.key}.experts.w1", f"{part.key}.experts.w2"
    if fused:
        yield from halves(w1, f"{theirs}.gate_up_proj", h, (slice(None),))
        yield Piece(w2, f"{theirs}.down_proj")
        return
    for e in range(part["num_experts"]):
        yield Piece(w1, f"{theirs}.{e}.{up}.weight", (e, slice(0, h)))
        yield Piece(w1, f"{theirs}.{e}.{gate}.weight", (e, slice(h, 2 * h)))
        yield Piece(w2, f"{theirs}.{e}.{down}.weight", (e,))


def layer_count(stored: frozenset[str]) -> int:
    """One more than the largest layer number among tensor names."""
    return max((int(n) + 1 for name in stored for n in re.findall(r"\.layers\.(\d{1,9})\.", name)), default=0)

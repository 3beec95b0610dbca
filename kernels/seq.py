"""Padding, packing and maps in one small description of the tokens of a batch.

A batch row holds one document, or several one after another (packing), and may end in padding. Everything else, left padding and
masks with holes, is brought into that form once per forward by :meth:`Seq.align` and undone by :meth:`Seq.restore`, so that a mixer
has two things to honour: *reset at document boundaries* and *ignore the tail*. Or every row is a map of one size, top row first.
"""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .torch_private import assert_later, is_wrapped, transforms_active


@dataclass(frozen=True)
class Seq:
    """Document ids and positions of a batch of token rows, real tokens first.

    Attributes:
        doc: ``(b, l)`` int64, the document a token belongs to; contiguous in a row, ``-1`` for padding, which stands at the end.
        pos: ``(b, l)`` int64, the token's position inside its document, counted from 0 in this call.
        lengths: ``(b,)`` int64, real tokens per row.
        valid: ``(b, l)`` bool: a real token, not padding.
        resets: ``(b, l)`` bool: a document starts here and another one stood before it in the row. Never true at index 0.
        order: ``(b, l)`` int64, the gather index that brings the caller's tokens into this order; ``None`` if they already are.
        packed: Whether a row may hold more than one document.
        padded: Whether a row may end in padding.
        clean: Whether padding is known to hold zeros (:meth:`clear`), so that nothing behind has to see to it.
        known: The documents as :meth:`documents` gives them, where they were described by the host and the tokens are elsewhere.
        grid: ``(h, w)`` of the maps that the rows are, top row first, one size for all; ``None`` for text.
        offsets: ``(n + 1,)`` int32, where the documents of packed rows start in the ``b * l`` tokens, and where the last one ends; the
            padding at a row's end is one more. Some may be empty, those behind the last one are. ``None`` where nobody has counted them.
        longest: Tokens of the longest document, where the host knows it.

    Raises:
        ValueError: ``grid`` is of another number of tokens, or of rows that are packed or padded.
    """

    doc: Tensor
    pos: Tensor
    lengths: Tensor
    valid: Tensor
    resets: Tensor
    order: Tensor | None
    packed: bool
    padded: bool
    clean: bool = False
    known: tuple[tuple[int, int, int], ...] | None = None
    grid: tuple[int, int] | None = None
    offsets: Tensor | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        if self.grid is None:
            return
        (h, w), l = self.grid, self.doc.shape[1]
        if self.packed or self.padded:
            way = "packed" if self.packed else "padded"
            raise ValueError(f"grid: rows that are {way} are no maps of {h} x {w}. Leave out one of the two.")
        if h < 1 or h * w != l:
            raise ValueError(
                f"grid: {h} x {w} is a map of {h * w} tokens, the rows have {l}. Use sizes whose product is {l}."
            )

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> "Seq | None":
        """Describe rows of one document each, from a mask that is nonzero at real tokens.

        Args:
            attention_mask: ``(b, l)``, any dtype; padding may stand on the left, on the right or in between.

        Returns:
            The description, or ``None`` when nothing is padded.

        Raises:
            ValueError: The mask is not two-dimensional.
        """
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask: expected shape (b, l), got {tuple(attention_mask.shape)}. Pass one 0/1 row per sequence."
            )
        real = attention_mask != 0
        # the check costs a device sync, so a compiled graph leaves it out and always takes the general path
        if not torch.compiler.is_compiling() and bool(real.all()):
            return None
        order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
        return replace(cls.from_lengths(real.sum(1), real.shape[1]), order=order)

    @classmethod
    def from_lengths(cls, lengths: Tensor, length: int) -> "Seq":
        """Describe rows of one document each, ``lengths``, ``(b,)`` int64, tokens long, and padding behind it up to ``length``."""
        pos = torch.arange(length, device=lengths.device).expand(lengths.shape[0], length)
        valid = pos < lengths[:, None]
        doc = torch.where(valid, 0, -1)
        return cls(doc, pos, lengths, valid, torch.zeros_like(valid), None, packed=False, padded=True)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Any, batch: int, length: int, device: Any = None) -> "Seq":
        """Describe one packed row from the cumulative document lengths ``[0, l_0, l_0 + l_1, ..., l]``.

        Args:
            cu_seqlens: ``(n + 1,)`` integers, starting at 0 and ending at ``length``: a tensor, an array or a list.
            batch: Rows of the batch; packing into a single row is what ``cu_seqlens`` can say.
            length: Tokens in the row.
            device: Where the tokens are; where ``cu_seqlens`` is, by default.

        Raises:
            ValueError: More than one row, or offsets that are no integers or do not cover ``0 ... length`` in order.
        """
        if batch != 1:
            raise ValueError(
                f"cu_seqlens: describes one packed row, got a batch of {batch}. Concatenate the rows: input_ids of shape (1, l)."
            )
        ends, known, longest = _offsets(cu_seqlens), None, None
        if not torch.compiler.is_compiling():
            offsets = tuple(ends.tolist())
            falls = next((f", falls from {a} to {b}" for a, b in itertools.pairwise(offsets) if b < a), "")
            if offsets[0] != 0 or offsets[-1] != length or falls:
                raise ValueError(
                    f"cu_seqlens: runs from {offsets[0]} to {offsets[-1]}{falls}, the row has {length} tokens. "
                    f"Start at 0, never fall, end at {length}."
                )
            known = tuple((0, a, b) for a, b in itertools.pairwise(offsets) if b > a)
            longest = max((b - a for _, a, b in known), default=0)
        ends = ends if device is None else _sent(ends, torch.device(device))
        at = torch.arange(length, device=ends.device)
        doc = torch.searchsorted(ends, at, right=True) - 1
        # the offsets cover the row: no place is padding
        described = replace(cls._described(doc[None]), padded=False)
        return replace(described, known=known, offsets=ends.to(torch.int32), longest=longest)

    @classmethod
    def from_documents(cls, doc: Tensor, device: Any = None, most: int | None = None) -> "Seq":
        """Describe rows of packed documents from per-token ids, ``(b, l)`` integers; ``-1`` is padding at the end of a row.

        Args:
            doc: The ids. Ids of the host's are best left there: a device would have to be asked where documents start.
            device: Where the tokens are; where ``doc`` is, by default.
            most: At least the documents of any one row, the padding at its end counted as one more. With it, a device finds by itself
                where documents start, and :attr:`offsets` have one size, ``b * most + 1``, whatever the documents: what a CUDA graph
                and a compiled one ask for. More documents are an error that stops a device.

        Raises:
            ValueError: A row holds more documents than ``most``, where the host can see it.
        """
        if device is not None and doc.device != torch.device(device):
            return cls.from_documents(doc, most=most)._on(torch.device(device))
        seq = cls._described(doc.long())
        offsets, longest = _starts(seq.doc, most)
        return replace(seq, offsets=offsets, longest=longest)

    @classmethod
    def _described(cls, doc: Tensor) -> "Seq":
        b, l = doc.shape
        at = torch.arange(l, device=doc.device).expand(b, l)
        first = _first(doc)
        pos = at - torch.where(first, at, 0).cummax(1).values
        valid = doc >= 0
        resets = first & valid & (at > 0)
        return cls(doc, pos, valid.sum(1), valid, resets, None, packed=True, padded=True)

    @classmethod
    def from_grid(cls, grid: tuple[int, int], batch: int, length: int, device: Any = None) -> "Seq":
        """Describe rows that are maps.

        Args:
            grid: ``(h, w)``, height and width in tokens.
            batch: Rows of the batch.
            length: Tokens in a row, ``h * w``.
            device: Where the tokens are.

        Raises:
            ValueError: ``h * w`` is not ``length``.
        """
        doc = torch.zeros(batch, length, dtype=torch.long, device=device)
        pos, none = torch.arange(length, device=device).expand_as(doc), torch.zeros_like(doc, dtype=torch.bool)
        h, w = grid
        # what is traced stays free: a number would be a constant of the graph
        size = (h, w) if torch.compiler.is_compiling() else (int(h), int(w))
        return cls(doc, pos, torch.full_like(doc[:, 0], length), ~none, none, None, False, False, grid=size)

    def _on(self, device: torch.device) -> "Seq":
        documents, fields = self.documents(), ("doc", "pos", "lengths", "valid", "resets")
        sent: dict[str, Any] = {name: _sent(getattr(self, name), device) for name in fields}
        sent |= {"offsets": None if self.offsets is None else _sent(self.offsets, device)}
        return replace(self, **sent, known=None if documents is None else tuple(documents))

    def marks(self) -> tuple[Tensor | None, Tensor | None]:
        """Marks of where the state is dropped and of the real tokens; ``None`` where nothing is dropped, and where all are real."""
        return self.resets if self.packed else None, self.valid if self.padded else None

    def align(self, x: Tensor) -> Tensor:
        """Bring the caller's ``(b, l, ...)`` tokens into the order described here, real tokens first, and :meth:`clear` the rest."""
        return self.clear(x if self.order is None else _gather(x, self.order))

    def clear(self, x: Tensor) -> Tensor:
        """``(b, l, ...)`` with zeros at padding, whatever stood there; integers stay as they are.

        A selection: NaN and infinity would survive a product with zero, in sums over tokens and in gradients.
        """
        if self.clean or not self.padded or not x.is_floating_point():
            return x
        return x.masked_fill(~self.valid.view(*self.valid.shape, *(1,) * (x.dim() - 2)), 0.0)

    @property
    def cleared(self) -> "Seq":
        """The same, of rows that have been through :meth:`clear`."""
        return self if self.clean or not self.padded else replace(self, clean=True)

    def documents(self) -> list[tuple[int, int, int]] | None:
        """Every document as ``(row, start, end)``; ``None`` where the host cannot know them without waiting for a device."""
        if self.known is not None:
            return list(self.known)
        if not readable(self.doc):
            return None
        out = []
        for row, (starts, end) in enumerate(zip(self.resets.tolist(), self.lengths.tolist(), strict=True)):
            ends = [0, *(t for t, start in enumerate(starts) if start), end]
            out += [(row, a, b) for a, b in itertools.pairwise(ends) if b > a]
        return out

    @property
    def side_by_side(self) -> tuple[list[Tensor | tuple[int, int, int]], Tensor] | None:
        """Documents apart from each other, those of about one length as a batch; ``None`` where :meth:`documents` are not known.

        Returns:
            Batches, each of them one document ``(row, start, end)`` or an index ``(m, n)`` into ``b * l`` tokens, a document's last
            token repeated behind it. And ``(b, l)``: where a token is in the outputs of all batches, one after the other; a place
            behind them for padding.
        """
        if transforms_active():
            # what is made inside of a transform must not be seen after it
            return self._side_by_side()
        return self._kept_side_by_side

    @functools.cached_property
    def _kept_side_by_side(self) -> tuple[list[Tensor | tuple[int, int, int]], Tensor] | None:
        return self._side_by_side()

    def _side_by_side(self) -> tuple[list[Tensor | tuple[int, int, int]], Tensor] | None:
        documents = self.documents()
        if documents is None:
            return None
        length, device = self.doc.shape[1], self.doc.device
        place = torch.full(self.doc.shape, -1)
        batches: list[Tensor | tuple[int, int, int]] = []
        rest, used = sorted(documents, key=lambda d: (d[1] - d[2], d)), 0
        while rest:
            longest = rest[0][2] - rest[0][1]
            count = next((i for i, (_, start, end) in enumerate(rest) if 2 * (end - start) <= longest), len(rest))
            some, rest = rest[:count], rest[count:]
            if len(some) == 1:
                batches.append(some[0])
            else:
                row, start, end = torch.tensor(some).t()[..., None]
                batches.append(_sent(row * length + torch.minimum(start + torch.arange(longest), end - 1), device))
            for row, start, end in some:
                place[row, start:end] = torch.arange(used, used + end - start)
                used += longest
        return batches, _sent(place.masked_fill_(place < 0, used), device)

    def restore(self, x: Tensor) -> Tensor:
        """Undo :meth:`align`."""
        return x if self.order is None else _gather(x, torch.argsort(self.order, dim=1))


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on its way to a device; nobody waits for it to arrive."""
    pinned = x.is_cpu and device.type == "cuda" and not torch.compiler.is_compiling()
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)


def _first(doc: Tensor) -> Tensor:
    """Tell of every token of (b, l) whether its document, or the padding at the row's end, starts with it."""
    # rows that are one row expanded are one in memory, too, and written apart
    first = torch.ones_like(doc, dtype=torch.bool, memory_format=torch.contiguous_format)
    first[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return first


def _starts(doc: Tensor, most: int | None) -> tuple[Tensor | None, int | None]:
    """:attr:`Seq.offsets` and :attr:`Seq.longest`, as far as they can be told without waiting for a device."""
    if most is not None and most < 1:
        raise ValueError(f"most: {most} documents in a row. Pass 1 or more.")
    first, (b, l), seen = _first(doc), doc.shape, readable(doc)
    if not seen:
        if most is None or (not torch.compiler.is_compiling() and is_wrapped(doc)):
            return None, None
        if doc.numel():
            assert_later(first.sum(1).amax() <= most, "Seq.from_documents: a row holds more documents than `most` says")
        starts = torch.nonzero_static(first.flatten(), size=b * most, fill_value=b * l).squeeze(1)
        return F.pad(starts, (0, 1), value=b * l).to(torch.int32), None
    found = int(first.sum(1).amax()) if doc.numel() else 0
    if most is not None and found > most:
        raise ValueError(
            f"most: a row holds {found} documents, its padding counted as one, and most is {most}. Pass {found}."
        )
    starts = first.flatten().nonzero().squeeze(1).to(torch.int32)
    places = len(starts) if most is None else b * most
    offsets = F.pad(starts, (0, places + 1 - len(starts)), value=b * l)
    return offsets, int(offsets.diff().max()) if len(offsets) > 1 else 0


def readable(x: Tensor) -> bool:
    """Tell whether the host may look at numbers: they are its own, and neither traced nor transformed."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.device.type == "cpu" and not is_wrapped(x)


def as_tensor(name: str, given: Any, shape: str, remedy: str) -> Tensor:
    """Integers of an argument, in a tensor, an array or lists, as a tensor; the error says in words what ``shape`` they should have."""
    if isinstance(given, Tensor):
        return given
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{name}: {type(given).__name__} is not {shape} integers ({e}). {remedy}") from e


def _offsets(given: Any) -> Tensor:
    """Offsets as an int64 tensor, from whatever holds integers."""
    ends = as_tensor("cu_seqlens", given, "(n + 1,)", "Pass offsets such as [0, 5, 12].")
    if ends.dim() != 1 or ends.numel() < 2:
        raise ValueError(f"cu_seqlens: expected shape (n + 1,) with n >= 1, got {tuple(ends.shape)}.")
    if ends.dtype == torch.bool or ends.is_floating_point() or ends.is_complex():
        raise ValueError(f"cu_seqlens: has dtype {ends.dtype}, expected integers. Pass offsets such as [0, 5, 12].")
    return ends.long()


def _gather(x: Tensor, index: Tensor) -> Tensor:
    index = index.reshape(index.shape + (1,) * (x.dim() - 2)).expand_as(x) if x.dim() > 2 else index
    return x.gather(1, index)


def clear_padding(seq: Seq | None, *rows: Any) -> tuple[Any, ...]:
    """Rows (b, l, ...) with zeros at padding, so that neither what stands there nor what comes back from there counts anywhere."""
    return rows if seq is None or seq.clean else tuple(x if x is None else seq.clear(x) for x in rows)


def marks_of(seq: Seq | None) -> tuple[Tensor | None, Tensor | None]:
    """:meth:`Seq.marks`, of rows of one document and no padding too."""
    return (None, None) if seq is None else seq.marks()

"""Which tokens belong together: padding and packing in one small description.

A batch row holds one document, or several one after another (packing), and may end in padding. Everything else, left padding and
masks with holes, is brought into that form once per forward by :meth:`Seq.align` and undone by :meth:`Seq.restore`, so that a mixer
has two things to honour: *reset at document boundaries* and *ignore the tail*.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """

    doc: Tensor
    pos: Tensor
    lengths: Tensor
    valid: Tensor
    resets: Tensor
    order: Tensor | None
    packed: bool
    padded: bool

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
        lengths = real.sum(1)
        pos = torch.arange(real.shape[1], device=real.device).expand_as(order)
        valid = pos < lengths[:, None]
        doc = torch.where(valid, 0, -1)
        return cls(doc, pos, lengths, valid, torch.zeros_like(valid), order, packed=False, padded=True)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, batch: int, length: int) -> "Seq":
        """Describe one packed row from the cumulative document lengths ``[0, l_0, l_0 + l_1, ..., l]``.

        Args:
            cu_seqlens: ``(n + 1,)`` integers, starting at 0 and ending at ``length``.
            batch: Rows of the batch; packing into a single row is what ``cu_seqlens`` can say.
            length: Tokens in the row.

        Raises:
            ValueError: More than one row, or offsets that do not cover ``0 ... length`` in order.
        """
        if batch != 1:
            raise ValueError(
                f"cu_seqlens: describes one packed row, got a batch of {batch}. Concatenate the rows: input_ids of shape (1, l)."
            )
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ValueError(f"cu_seqlens: expected shape (n + 1,) with n >= 1, got {tuple(cu_seqlens.shape)}.")
        if not torch.compiler.is_compiling():
            offsets = cu_seqlens.tolist()
            falls = next((f", falls from {a} to {b}" for a, b in itertools.pairwise(offsets) if b < a), "")
            if offsets[0] != 0 or offsets[-1] != length or falls:
                raise ValueError(
                    f"cu_seqlens: runs from {offsets[0]} to {offsets[-1]}{falls}, the row has {length} tokens. "
                    f"Start at 0, never fall, end at {length}."
                )
        at = torch.arange(length, device=cu_seqlens.device)
        doc = torch.searchsorted(cu_seqlens, at, right=True) - 1
        return cls.from_documents(doc[None])

    @classmethod
    def from_documents(cls, doc: Tensor) -> "Seq":
        """Describe rows of packed documents from per-token ids, ``(b, l)`` integers; ``-1`` is padding at the end of a row."""
        doc = doc.long()
        b, l = doc.shape
        at = torch.arange(l, device=doc.device).expand(b, l)
        first = torch.ones_like(doc, dtype=torch.bool)
        first[:, 1:] = doc[:, 1:] != doc[:, :-1]
        pos = at - torch.where(first, at, 0).cummax(1).values
        valid = doc >= 0
        resets = first & valid & (at > 0)
        return cls(doc, pos, valid.sum(1), valid, resets, None, packed=True, padded=True)

    def marks(self) -> tuple[Tensor | None, Tensor | None]:
        """Where the state is dropped, and which tokens are real; ``None`` where nothing is, and where all are."""
        return self.resets if self.packed else None, self.valid if self.padded else None

    def align(self, x: Tensor) -> Tensor:
        """Bring the caller's ``(b, l, ...)`` tokens into the order described here: real tokens first."""
        return x if self.order is None else _gather(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """Undo :meth:`align`."""
        return x if self.order is None else _gather(x, torch.argsort(self.order, dim=1))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    index = index.reshape(index.shape + (1,) * (x.dim() - 2)).expand_as(x) if x.dim() > 2 else index
    return x.gather(1, index)

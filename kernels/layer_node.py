"""A layer as one node of autograd: what such layers have in common, whatever they consist of."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .conv import cuda as conv_kernels
from .conv.inputs import ConvInputs
from .dispatch import BackendError, Facts, choose
from .numerics import cast, product
from .seq import Seq

# what forms a tensor, and from which
Again = tuple[Callable[[Sequence[Tensor]], Tensor], list[Tensor]]


class Marks(NamedTuple):
    """Documents and padding, ``(b, l)`` each, where there are any."""

    doc: Tensor | None = None
    reset: Tensor | None = None
    valid: Tensor | None = None

    @classmethod
    def of(cls, seq: Seq | None) -> "Marks":
        """Read them from the rows' description."""
        return cls() if seq is None else cls(seq.doc if seq.packed else None, *seq.marks())


class Gradients:
    """Gradients of a node's tensors, as far as they are wanted, each in the type of what it belongs to.

    Args:
        names: The tensors.
        types: Their types, ``None`` of what is not there.
        wanted: Whether autograd asks for the gradient of each.
    """

    def __init__(self, names: Iterable[str], types: Iterable[torch.dtype | None], wanted: Iterable[bool]):
        self.types = dict(zip(names, types, strict=True))
        self.wanted = dict(zip(self.types, wanted, strict=True))
        self.found: dict[str, Any] = {}

    def weight(self, name: str, g: Tensor, of: Tensor) -> None:
        """Form that of a matrix which has multiplied ``of``, from that of the products; float32 sums are not rounded on the way."""
        if self.wanted[name]:
            self.found[name] = product(flat(g).t(), flat(of), self.types[name])  # type: ignore[arg-type]

    def offset(self, name: str, g: Tensor) -> None:
        """Form that of a bias."""
        if self.wanted[name]:
            self.found[name] = flat(g).sum(0, dtype=torch.float32)

    def in_order(self) -> list[Tensor | None]:
        """All of them, ``None`` where nobody asks."""
        return [cast(self.found[name], self.types[name]) if self.wanted[name] else None for name in self.types]  # type: ignore[arg-type]


def flat(x: Tensor) -> Tensor:
    """``(..., d)`` as ``(m, d)``."""
    return x.reshape(-1, x.shape[-1])


def filtered(x: Tensor, weight: Tensor, bias: Tensor | None, marks: Marks) -> ConvInputs:
    """The operands of a layer's convolution, as the kernels read them; ``weight`` is ``(d, 1, k)``."""
    return conv_kernels.readable(ConvInputs(x, weight.squeeze(1), bias, None, marks.doc))


def refuse(ops: Iterable[str], facts: Facts) -> str | None:
    """Say which op of a layer would not be by our kernels, and so why the layer is no node of ours; ``None`` if it may be one."""
    for op in ops:
        try:
            name = choose(op, **facts).name
        except BackendError as e:
            return str(e)
        if name != "cuda":
            return f"{op} is not by our kernels (backend: {name})"
    return None

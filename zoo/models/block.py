"""The residual block, ``x + mixer(norm(x))``: the one place where parts meet the trunk."""

import sys
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...layers.adapter import Adapter
from ...layers.base import Mixer, Seq, Sharing
from ...layers.common import dtype_read, linear, reset_linear, scaled
from ...layers.norm import NORMS, make_norm
from ..layout.expand import BlockSpec
from ..registry import build_mixer
from .hooks import is_hooked

__all__ = ["Block", "Parallel", "Stream", "is_plain_norm", "is_sharded", "keep_sharing", "share"]


class Stream(NamedTuple):
    """The residual stream between two blocks; the next norm adds up what the last one left, in one pass on a GPU.

    Attributes:
        x: ``(b, l, d)``, or ``(b, d)`` for one token.
        add: What is still to be added to it, of the same shape, if anything.
    """

    x: Tensor
    add: Tensor | None = None

    def sum(self) -> Tensor:
        """The residual stream as one tensor."""
        return self.x if self.add is None else self.x + self.add


class Branches(Sharing, nn.ModuleList):
    """A list of mixers, some of which another block may own."""


class Parallel(Mixer):
    """Mixers side by side on the same input, outputs summed (Falcon-H1, arXiv:2507.22448; Hymba, arXiv:2411.13676)."""

    def __init__(self, branches: list[Mixer]):
        super().__init__()
        self.branches = Branches(branches)
        self.capabilities = frozenset.intersection(*(m.capabilities for m in branches))  # type: ignore[misc]
        self.rounds_input = all(m.rounds_input for m in branches)

    @property
    def mixers(self) -> list[Mixer]:
        """The branches, typed."""
        return cast(list[Mixer], list(self.branches))

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False):
        """As :meth:`Mixer.forward`; the state is a tuple, one entry per branch."""
        states = [None] * len(self.branches) if state is None else state
        outs = [m(x, s, seq, aux, return_state=return_state) for m, s in zip(self.mixers, states, strict=True)]
        if not return_state:
            return sum(outs[1:], outs[0])
        ys = [y for y, _ in outs]
        return sum(ys[1:], ys[0]), tuple(s for _, s in outs)

    def step(self, x: Tensor, state: Any) -> Tensor:
        """As :meth:`Mixer.step`."""
        ys = [m.step(x, s) for m, s in zip(self.mixers, state, strict=True)]
        return sum(ys[1:], ys[0])

    def init_state(self, batch, max_len=0, device=None, dtype=None):
        """A tuple, one entry per branch."""
        return tuple(m.init_state(batch, max_len, device, dtype) for m in self.mixers)

    def flops(self, seq_len: int) -> int:
        """The sum over branches."""
        return sum(m.flops(seq_len) for m in self.mixers)


class Block(Sharing):
    """One token of a pattern: pre-norm, mixer, residual addition.

    Args:
        spec: The mixers of this block, options resolved, and the streams it reads and writes.
        d_model: Channels.
        n_layer: Residual blocks of the model, for initialisation.
        norm: ``{"type": ..., "eps": ...}``.
        multiplier: Factor of what the block adds to the residual stream.
        device: As for ``torch.nn.Linear``.
        dtype: As for ``torch.nn.Linear``.
    """

    def __init__(
        self,
        spec: BlockSpec,
        d_model: int,
        n_layer: int,
        norm: dict[str, Any],
        multiplier: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        # in a tuple, so that it is no child: the block that owns the parts which this one borrows
        self.owner: tuple[Block, ...] = ()
        self.multiplier, self.reads, self.writes = multiplier, spec.reads, spec.writes
        d_in, place = spec.d_in(d_model), {"layer_idx": spec.index, "n_layer": n_layer}
        self.side_proj: nn.Linear | None = None
        if spec.reads == "residual_plus_side":
            self.side_proj = linear(d_model, d_model, False, device, dtype)
            reset_linear(self.side_proj)
        self.norm = make_norm(norm["type"], d_in, norm["eps"], device=device, dtype=dtype)
        mixers = [
            build_mixer(part, where, d_model=d_model, d_in=d_in, device=device, dtype=dtype, **place)
            for _, part, where in spec.parts
        ]
        self.mixer = mixers[0] if len(mixers) == 1 else Parallel(mixers)
        # kept here, because an adapter (PEFT) may stand in the mixer's place
        self.rounds_input = self.mixer.rounds_input

    def forward(
        self,
        stream: Stream | Tensor,
        state: Any,
        seq: Seq | None,
        return_state: bool,
        embedding: Tensor,
        side: Tensor | None = None,
        run: nn.Module | None = None,
    ) -> tuple[Stream | Tensor, Any, dict[str, list], Tensor | None]:
        """One residual block over ``(b, l, d)``.

        Args:
            stream: The residual stream, or its value, in which case a value comes back: what backward hooks see.
            state: What the rows left behind here, if anything.
            seq: Padding or packing of the rows.
            return_state: Whether to return the new state.
            embedding: The residual stream's first value.
            side: The side stream, if an earlier block has written one.
            run: A block with parts in common to run instead, whose weights are there while this one is called (FSDP).

        Returns:
            The new residual stream, whose value is ``stream.sum()``; the state (``None`` unless asked for); what the mixer put into
            ``aux``, in a dict made here and not handed in, so that recomputing a checkpointed block does not fill it twice; and the
            side stream.
        """
        if run is not None:
            return run(stream, state, seq, return_state, embedding, side)
        aux: dict[str, list] = {"balance": []}
        before = Stream(stream) if isinstance(stream, Tensor) else stream
        h, before = self._normed(before, embedding, side)
        if return_state:
            y, state = self.mixer(h, state, seq, aux, return_state=True)
        else:
            y, state = self.mixer(h, state, seq, aux), None
        after, side = self._written(before, side, y)
        return after.sum() if isinstance(stream, Tensor) else after, state, aux, side

    def step(
        self, stream: Stream, state: Any, embedding: Tensor, side: Tensor | None = None
    ) -> tuple[Stream, Tensor | None]:
        """One token per row, ``(b, d)``, to the new residual and side streams; ``state`` is updated in place."""
        h, stream = self._normed(stream, embedding, side)
        return self._written(stream, side, self.mixer.step(h, state))

    def flops(self, seq_len: int) -> int:
        """As :meth:`Mixer.flops`, for the mixer and what leads to it."""
        side = self.side_proj
        return self.mixer.flops(seq_len) + (0 if side is None else 2 * side.in_features * side.out_features)

    def _normed(self, stream: Stream, embedding: Tensor, side: Any) -> tuple[Tensor, Stream]:
        """What the mixer reads, and the residual stream to go on with, in one tensor."""
        plain = is_plain_norm(self.norm)
        if self.reads == "residual" and plain:
            h, x = self.norm(stream.x, self._dtype_read(self.norm.weight), branch=True, add=stream.add)
            return h, Stream(x)
        x = read = stream.sum()
        if self.reads == "residual_and_embedding":
            read = torch.cat([x, embedding], dim=-1)
        elif self.reads == "side":
            read = side
        elif self.side_proj is not None:
            read = x + self.side_proj(side)
        if plain:
            return self.norm(read, self._dtype_read(self.norm.weight), branch=True)[0], Stream(x)
        # hooks, and what somebody has put in the norm's place, are given one tensor and give one
        h = self.norm(read)
        return h.to(self._dtype_read(next(self.norm.parameters(), h))), Stream(x)

    def _dtype_read(self, weight: Any) -> torch.dtype:
        # a float32 residual stream meets half-precision weights, or autocast, here
        return dtype_read(weight) if self.rounds_input else weight.dtype

    def _written(self, stream: Stream, side: Tensor | None, y: Tensor) -> tuple[Stream, Tensor | None]:
        if self.writes == "side":
            return stream, y
        return Stream(stream.x, scaled(y, self.multiplier)), side


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether a norm is one of ours, without hooks: one that may be asked to add before, and for a second output."""
    return type(norm) in NORMS.values() and not is_hooked(norm)


def share(twin: nn.Module, first: nn.Module) -> None:
    """Give a block, built on the meta device, the parts of another; only its adapters, and what they stand in, are its own."""
    if isinstance(twin, Block) and isinstance(first, Block):
        twin.owner = (first,)
    if isinstance(twin, Adapter) and isinstance(first, Adapter):
        if not first.down.weight.is_meta:  # there, both would import sympy: seconds
            twin.to_empty(device=first.down.weight.device)
            twin.reset_parameters()
        return
    twin._parameters.update(first._parameters)
    for name, child in list(twin.named_children()):
        part = first.get_submodule(name)
        if isinstance(twin, Sharing) and not any(isinstance(m, Adapter) for m in child.modules()):
            twin.borrow(name, part)
        else:
            share(child, part)


def keep_sharing(twin: nn.Module, first: nn.Module) -> None:
    """Let a block follow where somebody has put something (an adapter, a quantised layer) in the place of a part that it borrows."""
    for name, child in twin._modules.items():
        part = first._modules.get(name)
        if part is None or part is child:
            continue
        if isinstance(twin, Sharing) and name in twin.borrowed:
            if twin.borrowed[name] is child:  # or somebody has put something here, too
                twin.borrow(name, part)
        elif child is not None:
            keep_sharing(child, part)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module by itself."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # what is not imported has sharded nothing
    return bool(fsdp) and isinstance(module, fsdp.FSDPModule)

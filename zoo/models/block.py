"""The residual block, ``x + mixer(norm(x))``: the one place where parts meet the trunk."""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...layers.adapter import Adapter
from ...layers.base import Mixer, Seq, Sharing
from ...layers.common import drop_rows, dtype_read, linear, reset_linear, scaled
from ...layers.fused import Token, fused_step, step_norm, why_apart
from ...layers.norm import NORMS, make_norm
from ...layers.reading import Reading, like_rows, mixed, mixed_and_added, why_not_read
from ..config.resolve import Resolved
from ..registry import build_mixer
from .hooks import is_hooked

__all__ = ["Block", "Parallel", "Stream", "is_plain_norm", "is_sharded", "keep_sharing", "share"]


class Stream(NamedTuple):
    """All that passes from one block to the next; the next norm adds up what the last one left, in one pass on a GPU.

    Attributes:
        x: The residual stream, ``(b, l, d)``, or ``(b, d)`` for one token.
        add: A tensor of the same shape that is still to be added to it, if anything is.
        embedding: The residual stream's first value.
        side: The side stream, once a block has written one.
        shared: Tensors by name that earlier blocks have written for later ones (:attr:`Mixer.shares`).
    """

    x: Tensor
    add: Tensor | None = None
    embedding: Tensor | None = None
    side: Tensor | None = None
    shared: dict[str, Tensor] | None = None

    def sum(self) -> Tensor:
        """The residual stream as one tensor."""
        return self.x if self.add is None else self.x + self.add

    def replaced_by(self, after: "Stream | Tensor") -> "Stream":
        """Return a stream in whose place a hook has put ``after``: as it is, or with the rest of this one where it is a value alone."""
        if isinstance(after, Tensor):
            return self._replace(x=after, add=None)
        return after if after.embedding is not None else self._replace(x=after.x, add=after.add)


class Branches(Sharing, nn.ModuleList):
    """A list of mixers, some of which another block may own."""


class Parallel(Mixer):
    """Mixers side by side on the same input, outputs summed (Falcon-H1, arXiv:2507.22448; Hymba, arXiv:2411.13676)."""

    def __init__(self, branches: list[Mixer]):
        super().__init__()
        self.branches = Branches(branches)
        self.capabilities = frozenset.intersection(*(m.capabilities for m in branches))  # type: ignore[misc]
        self.mixes_tokens = any(m.mixes_tokens for m in branches)  # type: ignore[misc]
        self.rounds_input = all(m.rounds_input for m in branches)
        self.shares = tuple(dict.fromkeys(name for m in branches for name in m.shares))  # type: ignore[misc]

    @property
    def mixers(self) -> list[Mixer]:
        """The branches, typed."""
        return cast(list[Mixer], list(self.branches))

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False, shared=None):
        """As :meth:`Mixer.forward`; the state is a tuple, one entry per branch."""
        states = [None] * len(self.branches) if state is None else state
        ys: Any = [
            m(x, s, seq, aux, return_state=return_state, **given_to(m, shared))
            for m, s in zip(self.mixers, states, strict=True)
        ]
        if return_state:
            ys, states = zip(*ys, strict=True)
        y = sum(ys[1:], ys[0])
        return (y, states) if return_state else y

    def step(self, x: Tensor, state: Any, shared: Any = None) -> Tensor:
        """As :meth:`Mixer.step`."""
        ys = [m.step(x, s, **given_to(m, shared)) for m, s in zip(self.mixers, state, strict=True)]
        return sum(ys[1:], ys[0])

    def init_state(self, batch, max_len=0, device=None, dtype=None):
        """A tuple, one entry per branch."""
        return tuple(m.init_state(batch, max_len, device, dtype) for m in self.mixers)

    def flops(self, seq_len: int) -> int:
        """The sum over branches."""
        return sum(m.flops(seq_len) for m in self.mixers)


class Block(Sharing):
    """The block of one token of a pattern: pre-norm, mixer, residual addition."""

    def __init__(self, resolved: Resolved, index: int, device=None, dtype=None):
        super().__init__()
        cfg, spec = resolved.config, resolved.specs[index]
        d_model, d_in = spec.d_model, spec.d_in
        # in a tuple, so that it is no child: the block that owns the parts which this one borrows
        self.owner: tuple[Block, ...] = ()
        self.multiplier, self.reads, self.writes = cfg.residual_multiplier, spec.reads, spec.writes
        self.drop = spec.drop
        self.side_proj: nn.Linear | None = None
        if spec.reads == "residual_plus_side":
            self.side_proj = linear(d_model, d_model, False, device, dtype)
            reset_linear(self.side_proj)
        self.norm = make_norm(cfg.norm.type, d_in, cfg.norm.eps, device=device, dtype=dtype)
        place = {"layer_idx": index, "n_layer": len(resolved.specs)}
        mixers = [
            build_mixer(part, where, d_model=d_model, d_in=d_in, device=device, dtype=dtype, **place)
            for _, part, where in spec.parts
        ]
        self.mixer = mixers[0] if len(mixers) == 1 else Parallel(mixers)
        # kept here, because an adapter (PEFT) may stand in the mixer's place
        self.rounds_input, self.shares = self.mixer.rounds_input, self.mixer.shares

    def forward(
        self,
        stream: Stream | Tensor,
        state: Any,
        seq: Seq | None,
        return_state: bool,
        run: nn.Module | None = None,
        beside: Stream | None = None,
    ) -> tuple[Stream | Tensor, Any, dict[str, list], Stream]:
        """Run one residual block over ``(b, l, d)``.

        Args:
            stream: The stream; or the residual stream as one tensor, which backward hooks are given the gradient of.
            state: The state that the rows left behind here, if any.
            seq: Padding or packing of the rows.
            return_state: Whether to return the new state.
            run: A block with parts in common to run instead, whose weights are there while this one is called (FSDP).
            beside: The stream, where its value stands in ``stream``.

        Returns:
            The new stream, or its value where ``stream`` is one; the state (``None`` unless asked for); what the mixer put into ``aux``;
            and the new stream once more, which is whole also where a hook puts a residual stream alone into the first place.
        """
        if run is not None:
            return run(stream, state, seq, return_state, beside=beside)
        before = stream if beside is None else beside.replaced_by(stream)
        assert isinstance(before, Stream)
        # made here and not handed in, so that recomputing a checkpointed block does not fill it twice
        aux: dict[str, list] = {"balance": []}
        h, x = self._normed(before)
        shared = self._shared(before)
        given = given_to(self, shared)
        if return_state:
            y, state = self.mixer(h, state, seq, aux, return_state=True, **given)
        else:
            y, state = self.mixer(h, state, seq, aux, **given), None
        after = self._written(before, x, y, shared)
        return after if beside is None else after.sum(), state, aux, after

    def step(self, stream: Stream, state: Any) -> Stream:
        """One token per row, ``(b, d)``, to the new stream; ``state`` is updated in place."""
        if self.why_apart(stream.x, state) is None:
            x = after = stream.sum()
            for mixer, own in self._mixers(state):
                after = fused_step(mixer, Token(x, step_norm(self.norm), after, self.multiplier), own)
            return stream._replace(x=after, add=None)
        h, x = self._normed(stream)
        shared = self._shared(stream)
        return self._written(stream, x, self.mixer.step(h, state, **given_to(self, shared)), shared)

    def why_not_read(self, x: Tensor, state: Any) -> str | None:
        """Say why tokens such as ``x``, ``(b, w, d)``, are not for :meth:`read` but for :meth:`forward`; ``None`` if they are."""
        if (why := self.why_apart(x[:1, 0], state)) is not None:
            return why
        each = (why_not_read(mixer, own) for mixer, own in self._mixers(state))
        return next((why for why in each if why is not None), None)

    def read(self, stream: Stream, state: Any, reading: Reading) -> Stream:
        """Some tokens per row, ``(b, w, d)``, to the new stream; ``state`` stays as it is until ``reading`` is taken over."""
        if self.why_apart(like_rows(stream.x), state) is None:
            x = after = stream.sum()
            for mixer, own in self._mixers(state):
                after = mixed_and_added(mixer, Token(x, step_norm(self.norm), after, self.multiplier), own, reading)
            return stream._replace(x=after, add=None)
        h, x = self._normed(stream)
        ys = [mixed(mixer, h, own, reading) for mixer, own in self._mixers(state)]
        return self._written(stream, x, sum(ys[1:], ys[0]), None)

    def why_apart(self, x: Tensor, state: Any) -> str | None:
        """Say why norm, mixer and residual addition are taken apart in a step from ``x``; ``None`` if they are done together."""
        if self.reads != "residual" or self.writes == "side" or self.shares:
            return "it reads or writes more than the residual stream"
        if self.training and self.drop:
            return "its output is dropped at random"
        each = (why_apart(mixer, self.norm, x, own) for mixer, own in self._mixers(state))
        return next((why for why in each if why is not None), None)

    def _mixers(self, state: Any) -> Iterable[tuple[Mixer, Any]]:
        """The mixers side by side, each with its state."""
        return zip(self.mixer.mixers, state, strict=True) if type(self.mixer) is Parallel else [(self.mixer, state)]

    def flops(self, seq_len: int) -> int:
        """As :meth:`Mixer.flops`, for the mixer and what leads to it."""
        side = self.side_proj
        return self.mixer.flops(seq_len) + (0 if side is None else 2 * side.in_features * side.out_features)

    def _normed(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The mixer's input, and the residual stream to go on with."""
        norm: Any = self.norm
        plain = is_plain_norm(norm)
        if self.reads == "residual" and plain:
            return norm(stream.x, self._dtype_read(norm.weight), branch=True, add=stream.add)
        x = read = stream.sum()
        side: Any = stream.side
        if self.reads == "residual_and_embedding":
            read = torch.cat([x, cast(Tensor, stream.embedding)], dim=-1)
        elif self.reads == "side":
            read = side
        elif self.side_proj is not None:
            read = x + self.side_proj(side)
        if plain:
            return norm(read, self._dtype_read(norm.weight), branch=True)[0], x
        # hooks, and what somebody has put in the norm's place, are given one tensor and give one
        h = norm(read)
        return h.to(self._dtype_read(next(norm.parameters(), h))), x

    def _dtype_read(self, weight: Any) -> torch.dtype:
        # a float32 residual stream meets half-precision weights, or autocast, here
        return dtype_read(weight) if self.rounds_input else weight.dtype

    def _shared(self, stream: Stream) -> dict[str, Tensor] | None:
        # a dict of this block's own: a checkpointed one is recomputed from what it was given
        return dict(stream.shared or {}) if self.shares else stream.shared

    def _written(self, before: Stream, x: Tensor, y: Tensor, shared: dict[str, Tensor] | None) -> Stream:
        if self.training and self.drop:
            y = drop_rows(y, self.drop)
        if self.writes == "side":
            return Stream(x, None, before.embedding, y, shared)
        return Stream(x, scaled(y, self.multiplier), before.embedding, before.side, shared)


def given_to(mixer: Any, shared: dict[str, Tensor] | None) -> dict[str, Any]:
    """The argument ``shared`` of a mixer that declares to share something, or of a block around it; for others none."""
    return {"shared": shared} if mixer.shares else {}


def is_plain_norm(norm: nn.Module) -> bool:
    """Return whether a norm is one of ours, without hooks: one that may be asked to add before, and for a second output."""
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
    """Return whether FSDP2 shards a module by itself."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # what is not imported has sharded nothing
    return bool(fsdp) and isinstance(module, fsdp.FSDPModule)

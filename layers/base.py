"""The mixer contract: what a part must do to stand anywhere in any model.

A mixer maps ``(b, l, d)`` to ``(b, l, d)``. Sequence mixers (Mamba, attention) carry a state from one call to the next; channel mixers
(MLP, MoE) have none, ``()``. ``forward`` is the one path for training, prefill and chunked prefill; ``step`` is its fast twin for one
token. ``hybridzoo.layers.testing.check_mixer`` holds a class to every sentence here.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..kernels import checks
from ..kernels.seq import Seq
from .common import Device, Dtype
from .state import (
    State,
    copy_state,
    each_state,
    map_state,
    nbytes_of,
    paired,
    put_together,
    shapes,
    states_in,
    take_apart,
    tree,
)

__all__ = [
    "Aux",
    "Mixer",
    "Seq",
    "Sharing",
    "State",
    "copy_state",
    "each_state",
    "map_state",
    "nbytes_of",
    "paired",
    "put_together",
    "shapes",
    "states_in",
    "take_apart",
    "tree",
]


Aux = dict[str, list] | None


class Sharing(nn.Module):
    """A module that may have parts in common with another.

    Such a part stands under its name in both, so the state dict has it twice, but is a child of the other alone: what visits the tree to
    move, initialise or shard (FSDP) a module's own finds it there.
    """

    borrowed: ClassVar[dict[str, nn.Module]] = {}  # by name

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts that are this module's own."""
        for name, module in super().named_children():
            if self.borrowed.get(name) is not module:
                yield name, module

    def borrow(self, name: str, module: nn.Module) -> None:
        """Have a part in common with another module."""
        self._modules[name] = module
        self.borrowed = {**self.borrowed, name: module}  # type: ignore[misc]


class Mixer(Sharing):
    """Base of every mixer.

    A subclass takes ``d_model`` first, then its options by the field's names, and optionally ``layer_idx``, ``n_layer`` (its place
    among the residual blocks, for initialisation), ``device`` and ``dtype``. Its ``__init__`` ends with ``reset_parameters``.

    Attributes:
        capabilities: What the mixer can do beyond a plain forward; asking for one that is missing is an error that says so.
            ``"state"``: carry one across calls, and ``step``. ``"packing"``: several documents in a row. ``"padding"``.
            ``"causal"``: no output depends on a later token, as language models need; implied by ``"state"``, since a row in pieces is
            the row at once. ``"grid"``: a row is a map where ``seq.grid`` says so, and has neighbours above and below; such a mixer
            may refuse a row that is none (:meth:`grid_of`). The others see the tokens of a map as those of a row, top row first, as Vim
            and MambaVision scan images, so that Mamba, attention and a 2-D scan may stand in one pattern.
        fp32_parameters: Dotted names, inside the mixer, of parameters that stay float32 when it is cast to half precision (decay
            rates, step biases). By name and not by a mark on the tensor: loaders and wrappers replace tensors.
        no_decay_parameters: Dotted names of parameters that weight decay must not touch; ``zoo.param_groups`` honours them.
        without_effect: Options that decide initialisation, losses or speed, and nothing of what is computed.
        attends: Whether it is attention, whose share in a model is stated.
        mixes_tokens: Whether an output depends on other tokens; not so in channel mixers.
        shares: Names of values that mixers of this kind write for those in later blocks, such as RWKV-7's ``v_first``. One that names any
            has a ``step`` of its own, and takes ``shared`` there and in ``forward``: a dict of per-token tensors, ``(b, l, ...)`` and
            ``(b, ...)``, to read from and to write to; ``None`` outside a model.
        rounds_input: Whether nothing but linear layers reads the input. Under autocast they round it, so whoever makes it may hand it
            over rounded; a mixer that scales or routes by it first gets it in its parameters' dtype.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({"state", "packing", "padding", "causal"})
    fp32_parameters: ClassVar[tuple[str, ...]] = ()
    no_decay_parameters: ClassVar[tuple[str, ...]] = ()
    without_effect: ClassVar[frozenset[str]] = frozenset()
    attends: ClassVar[bool] = False
    mixes_tokens: ClassVar[bool] = True
    shares: ClassVar[tuple[str, ...]] = ()
    rounds_input: bool = False

    def forward(
        self, x: Tensor, state: Any = None, seq: Seq | None = None, aux: Aux = None, *, return_state: bool = False
    ) -> Any:
        """Mix a batch of token rows.

        Args:
            x: ``(b, l, d)``, any ``l >= 1``, unless the mixer needs a map. With ``seq``, rows are in its order (:meth:`Seq.align`).
            state: What an earlier call returned, or ``init_state``; never modified. ``None`` starts fresh.
            seq: Padding or packing of the rows, or the size of the maps that they are; ``None`` means one full document per row.
                Packing takes no ``state``.
            aux: A dict to fill: ``aux["loss"]`` collects weighted scalar losses, ``aux["router"]`` statistics. A list that the caller
                put under ``"balance"`` collects what is balanced over several layers, see :func:`.moe.balance_loss`.
            return_state: Also return the state after each row's last real token.

        Returns:
            ``(b, l, d)`` in x's dtype, or ``((b, l, d), state)``; differentiable in ``x`` and ``state``.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: Any) -> Tensor:
        """Mix one token per row, ``(b, d) -> (b, d)``, and update ``state`` in place. Equals ``forward`` with ``l = 1``."""
        y, new = self(x.unsqueeze(1), state, return_state=True)
        copy_state(state, new)
        return y.squeeze(1)

    def init_state(self, batch: int, max_len: int = 0, device: Device = None, dtype: Dtype = None) -> Any:
        """The state before the first token, as a :class:`State`; ``()`` for a mixer that keeps none.

        Args:
            batch: Rows.
            max_len: Tokens a row may reach, where that decides the size (attention).
            device: Where the tensors live; the parameters' device by default.
            dtype: Of what is kept in the model's precision; the parameters' dtype by default. Recurrent states are float32.
        """
        return ()

    def flops(self, seq_len: int) -> int:
        """Forward FLOPs per token (2 per multiply-add) in a sequence of ``seq_len`` tokens; here, 2 per parameter."""
        return 2 * sum(p.numel() for p in self.parameters())

    def scan_ops(self) -> int:
        """Those of :meth:`flops` that are a scan's, per token: the field counts 9 n + 1 per channel (state-spaces/mamba#110)."""
        return 0

    def state_bytes(self, seq_len: int) -> int:
        """Bytes that one sequence of ``seq_len`` tokens leaves behind in this layer."""
        return nbytes_of(self.init_state(1, seq_len, device="meta"))

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes through."""
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def effective_options(cls, options: dict[str, Any], d_model: int) -> dict[str, Any]:
        """The options as they take effect, complete and comparable: derived values filled in, what decides nothing left out or ``None``.

        Two mixers whose options agree in this form compute the same function of the same weights.
        """
        return {name: value for name, value in options.items() if name not in cls.without_effect}

    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1) -> None:
        """Draw the initial values, knowing the layer's place among ``n_layer`` residual blocks. Called once, by ``__init__``."""

    def reach(self, length: int, grid: tuple[int, int] | None = None) -> Tensor | None:
        """The inputs that each output depends on, ``(l, l)`` bool, output by input, in a mixer that is not causal; ``None`` for all."""
        return None

    def can(self, capability: str) -> bool:
        """Return whether ``capability`` is declared, or implied by what is."""
        return capability in self.capabilities or (capability == "causal" and "state" in self.capabilities)

    def require(self, capability: str) -> None:
        """Raise ``NotImplementedError`` with the mixer's name unless it can."""
        if not self.can(capability):
            has = ", ".join(sorted(self.capabilities)) or "none"
            raise NotImplementedError(
                f"{type(self).__name__} does not support {capability!r} (it declares: {has}). Choose another mixer for this use."
            )

    def _refuse_state(self, state: Any, return_state: bool) -> None:
        """Refuse a call of ``forward`` that passes or wants a state, unless the mixer keeps one."""
        if return_state or state is not None:
            self.require("state")

    def grid_of(self, x: Tensor, seq: Seq | None) -> tuple[int, int]:
        """``(h, w)`` of the maps that the rows of ``x`` are.

        Raises:
            NotImplementedError: They are packed or padded, and the mixer takes no such rows.
            ValueError: Nothing says that they are maps, or of other numbers of tokens.
        """
        if seq is not None and (seq.packed or seq.padded):
            self.require("packing" if seq.packed else "padding")
        checks.fits(type(self).__name__, seq, x)
        if seq is None or seq.grid is None:
            raise ValueError(
                f"{type(self).__name__}: mixes maps, and got rows of {x.shape[1]} tokens. Pass seq=Seq.from_grid((h, w), b, l)."
            )
        return seq.grid

    def _enter(self, x: Tensor, state: Any, seq: Seq | None) -> tuple[Tensor, Seq | None]:
        """The input with zeros at padding, and the rows' description if there is more to say than that they are maps."""
        if seq is None:
            return x, None
        if state is not None and seq.packed:
            raise ValueError(
                f"{type(self).__name__}: a packed row (packed=True) starts fresh documents and cannot continue a state. "
                "Pass the state without packing, or pack without a state."
            )
        checks.fits(type(self).__name__, seq, x)
        if not (seq.packed or seq.padded):
            return x, None
        return seq.clear(x), seq.cleared

    @staticmethod
    def _leave(y: Tensor, seq: Seq | None) -> Tensor:
        """The output with zeros at padding, so that no gradient comes from there; ``seq`` as the caller gave it."""
        return y if seq is None else seq.clear(y)

    @property
    def _dtype(self) -> torch.dtype:
        # of the projections: what fp32-pinned parameters say does not count, nor how a quantised one is packed, in integers or bytes
        free = (p.dtype for name, p in self.named_parameters() if name not in self.fp32_parameters)
        return next((kind for kind in free if kind.is_floating_point and kind.itemsize > 1), torch.get_default_dtype())

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        before = {name: p.detach() for name, p in self._pinned()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = self.get_parameter(name)
            if now.is_floating_point() and now.dtype.itemsize < 4:
                # take the old values, not the rounded ones, to wherever the cast moved them
                now.data = old.to(device=now.device, dtype=torch.float32)
        return self

    def _pinned(self) -> Iterator[tuple[str, nn.Parameter]]:
        # by attribute and not by what named_parameters lists: an adapter (PEFT) around a projection passes on its bias
        for name in self.fp32_parameters:
            with contextlib.suppress(AttributeError):
                p = self.get_parameter(name)
                if not any(type(m) is nn.Linear and m.bias is p for m in self.modules()):
                    # torch's own linear layer, put in a projection's place, wants one type
                    yield name, p

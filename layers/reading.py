"""A few tokens of every row at once through a residual block, from a state that stays as it is until somebody knows which rows go on.

Whoever checks guesses reads some tokens of a row together, and keeps what they leave behind only where all of them were right. A layer's
ordinary forward would form its new state apart, a copy of the whole cache in attention, in launches that each do next to nothing. Here
projections take norm and residual along, as they do in a step (:mod:`.fused`), keys and values go straight into the slots of their
positions, where nobody looks before the row's length says so, and one launch takes over what is right, of all layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import causal_conv1d, step_linear
from ..kernels.few.cuda import SURE_ROWS
from ..kernels.step.take import Taken, TakenInputs, TakenKeys, TakenValues, take_rows
from .attend_token import attend_tokens, why_not_at_once
from .attention import Attention
from .base import Seq, paired
from .common import is_captured, scaled, upcast
from .conv import CausalConv1d
from .fused import Token, fused_step, gated_step_norm
from .mamba import Mamba
from .mamba2 import Mamba2
from .mlp import MLP

__all__ = ["Rates", "Reading", "like_rows", "mixed", "mixed_and_added", "why_not_read"]

# rows up to which products norm them, each block all of them anew, whatever the size of the weight; more only where that takes far longer
_NORMED = 8
# decay rates, which stay the same from one reading to the next, by the address of their logarithms
Rates = dict[int, Tensor]


class Reading:
    """Tokens on their way through a model, and what they leave behind in it.

    Args:
        lengths: ``(b,)`` int64, real tokens of each row; padding stands behind them.
        width: Tokens of a row with its padding.
        rates: Decay rates of readings before this one; those that are missing are added.

    Attributes:
        seq: The rows.
    """

    def __init__(self, lengths: Tensor, width: int, rates: Rates):
        self.lengths, self.seq, self._rates = lengths, Seq.from_lengths(lengths, width), rates
        self._taken: list[Taken] = []
        self._formed: list[tuple[Any, Any]] = []

    def leave(self, *taken: Taken) -> None:
        """Have this taken over with the rest."""
        self._taken += taken

    def form(self, state: Any, new: Any) -> None:
        """Have a state, or tuple of them, take over what a forward has made of it."""
        self._formed += paired(state, new)

    def take(self, rows: Tensor) -> None:
        """Bring the states of ``rows``, ``(b,)`` bool, to behind the tokens; the others stay where they are. Nobody waits for a device."""
        take_rows(self._taken, rows, self.lengths)
        for state, new in self._formed:
            state.take(rows, new)

    def rate(self, logarithm: Tensor) -> Tensor:
        """``-exp(A_log)`` in float32."""
        found = self._rates.get(logarithm.data_ptr())
        if found is None:
            found = -upcast(logarithm).exp()
            # what is formed while a graph is recorded is there only when it runs
            if not is_captured(logarithm):
                self._rates[logarithm.data_ptr()] = found
        return found


def why_not_read(mixer: nn.Module, state: Any) -> str | None:
    """Say why a mixer whose step is one with its norm (:func:`.fused.why_apart`) does not read so; ``None`` if it does."""
    if isinstance(mixer, Attention):
        return "a window's slots are taken again" if state.window else why_not_at_once(mixer, state.k)
    return None if type(mixer) is MLP or type(mixer) in _WAYS else f"{type(mixer).__name__} has no such way"


def like_rows(x: Tensor) -> Tensor:
    """Rows of a step of which :func:`.fused.why_apart` says whether :func:`mixed_and_added` pays for ``x``, ``(b, w, d)``."""
    rows = x.shape[0] * x.shape[1]
    return x[:1, 0].expand(rows if rows <= _NORMED else max(rows, SURE_ROWS + 1), -1)


def mixed_and_added(mixer: Any, token: Token, state: Any, reading: Reading) -> Tensor:
    """``residual + multiplier * mixer(norm(x))``, ``(b, w, d)``, where products of so few rows take the rest along."""
    b, w, _ = token.x.shape
    flat = token._replace(x=token.x.flatten(0, 1), residual=token.residual.flatten(0, 1))
    if type(mixer) is MLP:
        return fused_step(mixer, flat, state).unflatten(0, (b, w))

    def project(m: nn.Linear) -> Tensor:
        return step_linear(flat.x, m.weight, m.bias, norm=flat.norm).unflatten(0, (b, w))

    y, gate = _WAYS[type(mixer)](mixer, project, state, reading)
    norm = None if gate is None else gated_step_norm(mixer.norm, gate.flatten(0, 1))
    how: dict[str, Any] = {"norm": norm, "multiplier": flat.multiplier * getattr(mixer, "out_multiplier", 1.0)}
    out = mixer.out_proj
    return step_linear(y.flatten(0, 1), out.weight, out.bias, residual=flat.residual, **how).unflatten(0, (b, w))


def mixed(mixer: Any, x: Tensor, state: Any, reading: Reading) -> Tensor:
    """``mixer(x)``, ``(b, w, d)``, where there are more rows than that pays for."""
    if type(mixer) is MLP:
        return mixer(x)
    y, gate = _WAYS[type(mixer)](mixer, lambda m: m(x), state, reading)
    y = mixer.out_proj(y if gate is None else mixer.norm(y, gate))
    return scaled(y, getattr(mixer, "out_multiplier", 1.0))


class _Read(NamedTuple):
    """The operand of the last projection, ``(b, w, d)``, and the gate of a norm in front of it, if there is one."""

    y: Tensor
    gate: Tensor | None = None


Project = Callable[[nn.Linear], Tensor]


def _filtered(conv: CausalConv1d, x: Tensor, state: Tensor, reading: Reading) -> Tensor:
    reading.leave(TakenInputs(state, x))
    # padding stands behind what is read, and no filter looks ahead
    return causal_conv1d(x, conv.weight.squeeze(1), conv.bias, activation=conv.activation, initial_state=state)


def _mamba(m: Mamba, project: Project, state: Any, reading: Reading) -> _Read:
    u, z = project(m.in_proj).chunk(2, dim=-1)
    u = _filtered(m.conv1d, u, state.conv, reading)
    y, ssm = m.parts().read(u, z, reading.rate(m.A_log), state.ssm, reading.seq.cleared)
    reading.leave(TakenValues(state.ssm, ssm.to(state.ssm.dtype)))
    return _Read(y)


def _mamba2(m: Mamba2, project: Project, state: Any, reading: Reading) -> _Read:
    gate, value, z, xBC, dt = m.split(project(m.in_proj))
    xBC = _filtered(m.conv1d, xBC, state.conv, reading)
    y, ssm = m.scan_read(xBC, z, dt, reading.rate(m.A_log), state.ssm, reading.seq.cleared)
    reading.leave(TakenValues(state.ssm, ssm.to(state.ssm.dtype)))
    if not m.d_mlp:
        return _Read(y, None if m.norm is None else z)
    y = y if m.norm is None else m.norm(y, z)
    return _Read(torch.cat([nn.functional.silu(gate) * value, y], dim=-1))


def _attention(m: Attention, project: Project, state: Any, reading: Reading) -> _Read:
    qkv = project(m.in_proj)
    if m.conv1d is not None:
        qkv = _filtered(m.conv1d, qkv, state.conv, reading)
    y = attend_tokens(m, qkv, state, reading.lengths)
    reading.leave(TakenKeys(state.k, state.v, state.pos, state.length))
    # as far as rows may have come
    state.bound = -1 if state.bound < 0 or is_captured(qkv) else state.bound + qkv.shape[1]
    return _Read(y)


_WAYS: dict[type[nn.Module], Callable[[Any, Project, Any, Reading], _Read]] = {
    Mamba: _mamba,
    Mamba2: _mamba2,
    Attention: _attention,
}

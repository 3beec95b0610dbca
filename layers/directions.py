"""Rows that are read from both ends, as images, DNA and time series are: what the mixers that scan rows have in common there.

Vim (arXiv:2401.09417) and Caduceus (arXiv:2403.03234) share the projections between both ways, and give each a convolution and a scan of
its own. A way back is the same walk from a document's last token to its first: in place, where a row is one document, and over turned rows
(:mod:`.turning`) where it holds several or the op knows no walks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..kernels import causal_conv1d
from .base import Aux, Mixer, Seq
from .common import Device, Dtype
from .conv import CausalConv1d
from .options import check, check_known
from .reverse_complement import both_strands
from .turning import turning

__all__ = ["Directions", "RowConv1d", "RowMixer", "names_of", "silenced"]


@dataclass(frozen=True)
class Directions:
    """The options of both mixers, checked.

    Attributes:
        two: Whether rows are read from the end, too.
        tied: Whether the way back has no parameters of its own.
        mean: Whether outputs are averaged, and not summed.
        same: Whether the convolution reads around a token, in the row's own order for both ways.
        strands: Whether the layer is equivariant under reverse complements.
    """

    two: bool = False
    tied: bool = False
    mean: bool = False
    same: bool = False
    strands: bool = False

    @classmethod
    def of(cls, directions: int, tie: str, combine: str, conv_padding: str, reverse_complement: bool) -> "Directions":
        """Check the options.

        Raises:
            OptionError: A value is unknown, or has no meaning for rows that are read in one direction.
        """
        check_known("directions", directions, (1, 2))
        check_known("tie_directions", tie, ("none", "all"))
        check_known("combine_directions", combine, ("sum", "mean"))
        check_known("conv_padding", conv_padding, ("causal", "same"))
        same, two = conv_padding == "same", directions == 2
        check(two or not same, "conv_padding", "'same' reads tokens ahead, which takes directions: 2. Use 'causal'.")
        return cls(two, tie == "all", combine == "mean", same, reverse_complement)

    @property
    def sets(self) -> tuple[str, ...]:
        """Ends of the parameters' names: of each way, where the way back has its own; of both, otherwise."""
        return ("", "_b") if self.two and not self.tied else ("",)

    @property
    def joined(self) -> bool:
        """Say whether both ways scan the same inputs."""
        return self.tied and self.same

    @property
    def causal(self) -> bool:
        """Say whether no output depends on a later token."""
        return not (self.two or self.strands)

    @property
    def share(self) -> float:
        """The factor of the sum of both outputs."""
        return 0.5 if self.two and self.mean else 1.0

    def flops(self, shared: int, filtered: int, scanned: int) -> int:
        """FLOPs per token, from those that both ways share, those of a filter and what is projected from it, and those of a scan."""
        filters, scans = 1 if self.joined or not self.two else 2, 2 if self.two else 1
        return (2 if self.strands else 1) * (shared + filters * filtered + scans * scanned)

    def width(self, d_model: int) -> int:
        """The channels that the projections read, of a residual stream of ``d_model``: of one strand."""
        if not self.strands:
            return d_model
        check(
            d_model % 2 == 0,
            "reverse_complement",
            f"splits the channels in two halves, and d_model = {d_model} is odd. Use {d_model + 1}.",
        )
        return d_model // 2

    def mirrored(self, back: bool, turned: bool) -> bool:
        """Say whether a filter is read from its other end: causal ones in place on the way back, the others over turned rows."""
        return back and turned == self.same

    def convolution(self, d: int, k: int, bias: bool, device: Device, dtype: Dtype) -> CausalConv1d:
        """The filter in front of a scan."""
        if not self.two:
            return CausalConv1d(d, k, bias, "silu", device, dtype)
        return RowConv1d(d, k, bias, self.same, device, dtype)

    @staticmethod
    def effective(o: dict[str, Any]) -> dict[str, Any]:
        """The options in which those without an effect are ``None``."""
        return o if o["directions"] == 2 else o | {"tie_directions": None, "combine_directions": None}


class RowConv1d(CausalConv1d):
    """The filter of rows that are read from both ends. Parameters and options are those of :class:`.conv.CausalConv1d`, but for ``same``.

    Args:
        same: Whether it reads around a token: tap j of k reads token ``t + j - (k - 1) // 2``, so that a width of 4 reads one token
            before and two behind; otherwise the last tap reads the token itself, the others those before.
    """

    def __init__(self, d: int, k: int, bias: bool, same: bool, device: Device = None, dtype: Dtype = None):
        super().__init__(d, k, bias, "silu", device, dtype)
        self.same = same

    def forward(self, x: Tensor, seq: Seq | None = None, mirrored: bool = False) -> Tensor:  # type: ignore[override]
        """Filter ``(b, l, d)``, each document by itself; ``mirrored`` with what is before and what is behind exchanged."""
        taps, k = self.weight.squeeze(1), self.weight.shape[-1]
        behind = (k - 1) // 2 if self.same else k - 1
        if mirrored:
            taps, behind = taps.flip(-1), k - 1 - behind
        ahead = k - 1 - behind
        if not (mirrored or ahead):
            return super().forward(x, None, seq)[0]
        if not (ahead and x.shape[1]):
            return causal_conv1d(x, taps, self.bias, activation="silu", seq=seq)
        if seq is None or not seq.packed:
            # the outputs of a causal filter some tokens later; padding and what lies behind the row are zeros alike
            late = causal_conv1d(F.pad(silenced(x, seq), (0, 0, 0, ahead)), taps, self.bias, activation="silu")
            return late[:, ahead:]
        turn = turning(seq)
        y = causal_conv1d(x, taps[:, : behind + 1], self.bias, seq=seq)
        y = y + turn(causal_conv1d(turn(x), F.pad(taps[:, behind + 1 :].flip(-1), (0, 1)), seq=seq))
        return F.silu(y)


def silenced(x: Tensor, seq: Seq | None) -> Tensor:
    """Zeros at padding, also where a linear layer has put a bias since the rows were cleared."""
    return x.masked_fill(~seq.valid[..., None], 0.0) if seq is not None and seq.padded else x


class RowMixer(Mixer):
    """A mixer of rows in one direction or both. A subclass sets ``ways``, and has a method for each."""

    ways: Directions

    def _go(self, ways: Directions, d_model: int) -> int:
        """Take over the options; returns the channels that the projections read."""
        self.ways, self.width = ways, ways.width(d_model)
        if not ways.causal:
            self.capabilities = type(self).capabilities - {"state", "causal"}  # type: ignore[misc]
        if "_b" in ways.sets:
            twins = tuple(map(_twin, type(self).fp32_parameters))
            self.fp32_parameters = (*type(self).fp32_parameters, *twins)  # type: ignore[misc]
            self.no_decay_parameters = (*type(self).no_decay_parameters, *twins)  # type: ignore[misc]
        return self.width

    def _set(self, names: Sequence[str], parts: Iterable[Any]) -> None:
        for name, part in zip(names, parts, strict=True):
            setattr(self, name, part)

    def _along(self, x: Tensor, state: Any, seq: Seq | None, return_state: bool) -> Any:
        """Mix in one direction; as :meth:`Mixer.forward`."""
        raise NotImplementedError

    def _both(self, x: Tensor, seq: Seq | None) -> Tensor:
        """Mix in both directions."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: Any = None, seq: Seq | None = None, aux: Aux = None, *, return_state: bool = False
    ) -> Any:
        """Mix ``(b, l, d)`` along its rows; see :meth:`Mixer.forward`."""
        if self.ways.causal:
            return self._along(x, state, seq, return_state)
        self._refuse_state(state, return_state)
        if not self.ways.strands:
            return self._both(x, seq)
        return both_strands(self._both if self.ways.two else self._one_way, x, seq)

    def _one_way(self, x: Tensor, seq: Seq | None) -> Tensor:
        return self._along(x, None, seq, False)

    def require(self, capability: str) -> None:
        """As :meth:`Mixer.require`; says which option it was that took a capability away."""
        if not self.can(capability) and capability in type(self).capabilities:
            option, other = ("directions: 2", "directions: 1") if self.ways.two else ("reverse_complement", "false")
            raise NotImplementedError(
                f"{type(self).__name__} with {option} reads a row from both ends: an output depends on later tokens, and there is no "
                f"{capability!r}. Use {other} here, or a task that is not causal."
            )
        super().require(capability)


def names_of(parts: Any) -> dict[str, tuple[str, ...]]:
    """The names of a way's parts (a class of named tuples), by their ends (:attr:`Directions.sets`)."""
    return {"": parts._fields, "_b": tuple(map(_twin, parts._fields))}


def _twin(name: str) -> str:
    """The name of the same parameter on the way back, as Vim has it."""
    first, dot, rest = name.partition(".")
    return "A_b_log" if name == "A_log" else f"{first}_b{dot}{rest}"

"""The operands of one scan in the form that the CUDA kernels read, and how they look to the launches."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..gpu import nvrtc
from ..gpu.operands import NARROW, UNALIGNED, ceil_div, common_type, in_one_piece, in_rows
from . import low_rank
from .inputs import ScanInputs
from .shapes import BACKWARD, instance


class WideGradients(NamedTuple):
    """Room for the gradients of what has a number for every token."""

    u: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None


@dataclass
class ScanOperands:
    """One scan's inputs in the form that the kernels read: one element type, unit strides along channels and states.

    B and C may be without an axis for groups. With a ``dt_weight`` (d, r), dt is (b, l, r).
    """

    i: ScanInputs
    dt_softplus: bool
    walk: tuple[int, ...] | None = None  # one of :mod:`.paths`
    before: Tensor | None = None  # (b, l, d) float32: what the outputs of earlier walks add up to
    sum: Tensor | None = None  # the same with this walk's, in place of an output

    @classmethod
    def of(cls, i: ScanInputs, dt_softplus: bool, walk: tuple[int, ...] | None = None) -> "ScanOperands":
        """From the op's inputs; those of different types meet in float32, and ``dt_weight`` is read in their type."""
        dtype = common_type(i.u, i.dt, i.B, i.C, i.z)
        u, dt, B, C, z = (in_rows(m, dtype) for m in (i.u, i.dt, i.B, i.C, i.z))
        A, D, dt_bias, state = (in_one_piece(m) for m in (i.A, i.D, i.dt_bias, i.initial_state))
        reset, valid = (in_one_piece(m, torch.bool) for m in (i.reset, i.valid))
        weight = in_one_piece(i.dt_weight, dtype)
        return cls(ScanInputs(u, dt, A, B, C, D, z, dt_bias, state, reset, valid, weight), dt_softplus, walk)

    def ready(self) -> "ScanOperands":
        """The operands that a forward scans: these, or, where the scan cannot form the step sizes, :meth:`with_step_sizes`."""
        return self if self.is_ready else self.with_step_sizes()

    @property
    def is_ready(self) -> bool:
        """True where step sizes are there, or the scan can form them."""
        weight = self.i.dt_weight
        if weight is None:
            return True
        facts = {"dtype": self.i.u.dtype, "rank": weight.shape[1], "d_state": self.i.A.shape[1]}
        return low_rank.refuse(facts | {"in_vectors": low_rank.in_vectors(self.i.dt)}) is None

    def with_step_sizes(self) -> "ScanOperands":
        """The same with dt (b, l, d), whether or not the scan can form it."""
        dt, weight = self.i.dt, self.i.dt_weight
        if weight is None:
            return self
        # in autograd's thread this may be what comes first, and cuBLAS warns where there is no context
        nvrtc.enter(dt.device)
        return replace(self, i=self.i._replace(dt=low_rank.step_sizes(dt, weight), dt_weight=None))

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """b, l, d, n, g."""
        B = self.i.B
        return *self.i.u.shape, self.i.A.shape[1], B.shape[2] if B.dim() == 4 else 1

    def signature(self, *wide: Tensor | None) -> tuple:
        """All that the launches depend on besides addresses, ``wide`` being the (b, l, d) tensors that they move besides these."""
        u, dt, z, B, C, weight = self.i.u, self.i.dt, self.i.z, self.i.B, self.i.C, self.i.dt_weight
        off = any([x is not None and x.data_ptr() % 16 for x in (u, dt, z, *wide)]) * UNALIGNED
        off |= any([x.data_ptr() % 16 for x in (B, C)]) * NARROW
        return (
            u.dtype,
            self.sizes,
            *[x.stride()[:3] if x.dim() == 4 else (*x.stride()[:2], 0) for x in (B, C)],
            off,
            self.i.reset is not None,
            self.walk,
            self.dt_softplus,
            0 if weight is None else weight.shape[1],
            *[(0, 0) if x is None else x.stride()[:2] for x in (u, dt, z, *wide)],
        )

    @property
    def scanned(self) -> tuple:
        """The tensors that a scan reads besides its wide input, in the order of its parameters."""
        i = self.i
        return i.dt, i.B, i.C, i.z, i.A, i.D, i.dt_bias

    def last_state(self, *lead: int) -> Tensor:
        """Room for the last state, with these leading axes."""
        b, _, d, n, _ = self.sizes
        return self.i.A.new_empty((*lead, b, d, n))

    def saved_states(self, *lead: int) -> Tensor:
        """Room for the states that the backward starts from, with these leading axes."""
        b, l, d, n, _ = self.sizes
        return self.i.A.new_empty((*lead, b, ceil_div(l, BACKWARD[instance(n)].k), d, n))

    def gradients(self, *lead: int, dt: Tensor | None = None, z: Tensor | None = None) -> WideGradients:
        """Room with these leading axes; for (b, l, d) step sizes, and for z, there may be some."""
        gu, gB, gC = (self.i.u.new_empty((*lead, *x.shape)) for x in (self.i.u, self.i.B, self.i.C))
        z = torch.empty_like(gu) if z is None and self.i.z is not None else z
        return WideGradients(gu, torch.empty_like(gu) if dt is None else dt, gB, gC, z)

"""The operands of one scan in the form that the CUDA kernels read, and how they look to the launches."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..gpu import nvrtc
from ..gpu.operands import NARROW, TYPES, UNALIGNED, ceil_div, in_one_piece, in_rows
from . import low_rank
from .shapes import BACKWARD, instance


@dataclass
class Call:
    """One scan's operands in the form that the kernels read: one element type, unit strides along channels and states.

    B and C may be without an axis for groups. With a ``dt_weight`` (d, r), dt is (b, l, r).
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    reset: Tensor | None
    valid: Tensor | None
    dt_softplus: bool
    dt_weight: Tensor | None = None
    walk: tuple[int, ...] | None = None  # one of :mod:`.paths`
    before: Tensor | None = None  # (b, l, d) float32: what the outputs of earlier walks add up to
    sum: Tensor | None = None  # the same with this walk's, in place of an output

    @classmethod
    def of(
        cls, u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus, dt_weight=None, walk=None
    ) -> "Call":
        """From the op's arguments; operands of different types meet in float32, and ``dt_weight`` is read in their type."""
        same = all(m is None or m.dtype == u.dtype for m in (dt, B, C, z))
        dtype = u.dtype if same and u.dtype in TYPES else torch.float32
        u, dt, B, C, z = (in_rows(m, dtype) for m in (u, dt, B, C, z))
        A, D, dt_bias, initial_state = (in_one_piece(m, torch.float32) for m in (A, D, dt_bias, initial_state))
        reset, valid = (in_one_piece(m, torch.bool) for m in (reset, valid))
        dt_weight = in_one_piece(dt_weight, dtype)
        return cls(u, dt, A, B, C, D, z, dt_bias, initial_state, reset, valid, dt_softplus, dt_weight, walk)

    def ready(self) -> "Call":
        """What a forward scans: this call, or, where the scan cannot form the step sizes, :meth:`with_step_sizes`."""
        if self.dt_weight is None:
            return self
        facts = {"dtype": self.u.dtype, "rank": self.dt_weight.shape[1], "d_state": self.A.shape[1]}
        refused = low_rank.refuse(facts | {"in_vectors": low_rank.in_vectors(self.dt)})
        return self.with_step_sizes() if refused else self

    def with_step_sizes(self) -> "Call":
        """The same with dt (b, l, d), whether or not the scan can form it."""
        if self.dt_weight is None:
            return self
        # in autograd's thread this may be what comes first, and cuBLAS warns where there is no context
        nvrtc.enter(self.dt.device)
        return replace(self, dt=low_rank.step_sizes(self.dt, self.dt_weight), dt_weight=None)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """b, l, d, n, g."""
        b, l, d = self.u.shape
        return b, l, d, self.A.shape[1], self.B.shape[2] if self.B.dim() == 4 else 1

    def signature(self, *wide: Tensor | None) -> tuple:
        """What the non-pointer parameters of the launches depend on, ``wide`` being the (b, l, d) tensors that they move besides these."""
        u, dt, z, B, C, weight = self.u, self.dt, self.z, self.B, self.C, self.dt_weight
        off = any([x is not None and x.data_ptr() % 16 for x in (u, dt, z, *wide)]) * UNALIGNED
        off |= any([x.data_ptr() % 16 for x in (B, C)]) * NARROW
        return (
            u.dtype,
            self.sizes,
            *[x.stride()[:3] if x.dim() == 4 else (*x.stride()[:2], 0) for x in (B, C)],
            off,
            self.reset is not None,
            self.walk,
            self.dt_softplus,
            0 if weight is None else weight.shape[1],
            *[(0, 0) if x is None else x.stride()[:2] for x in (u, dt, z, *wide)],
        )

    @property
    def scanned(self) -> tuple:
        """What a scan reads besides its wide input, in the order of its parameters."""
        return self.dt, self.B, self.C, self.z, self.A, self.D, self.dt_bias

    def last_state(self, *lead: int) -> Tensor:
        """Room for the last state, with these leading axes."""
        b, _, d, n, _ = self.sizes
        return self.A.new_empty((*lead, b, d, n))

    def saved_states(self, *lead: int) -> Tensor:
        """Room for the states that the backward starts from, with these leading axes."""
        b, l, d, n, _ = self.sizes
        return self.A.new_empty((*lead, b, ceil_div(l, BACKWARD[instance(n)].k), d, n))

    def gradients(
        self, *lead: int, gdt: Tensor | None = None, gz: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Room for the gradients of u, (b, l, d) step sizes, B, C and z, with these leading axes; those of dt and z may be there."""
        gu, gB, gC = (self.u.new_empty((*lead, *x.shape)) for x in (self.u, self.B, self.C))
        gdt = torch.empty_like(gu) if gdt is None else gdt
        return gu, gdt, gB, gC, torch.empty_like(gu) if gz is None and self.z is not None else gz

"""SS2D on Mamba-2's scan (VMamba, arXiv:2401.10166, operator ``m0``): one decay rate per head, in matrix products, and larger states.

Same parameters, names, shapes and initialisation as VMamba's ``SS2Dm0`` with its ``v2`` scheme. Different from it: one projection in the
tokens' own order in place of one per copy. The op knows no walks, so what each of them reads is gathered, and its outputs are brought back.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ssd
from .common import Device, Dtype, acc_dtype, upcast
from .options import check_divides, check_positive
from .orders import orders_of
from .ss2d import SS2D
from .turning import reordered

__all__ = ["SS2D2"]


class SS2D2(SS2D):
    """VMamba's mixer with the state space dual scan (arXiv:2405.21060). Whatever is not named here is as in :class:`.ss2d.SS2D`.

    Args:
        d_model: Channels of the residual stream.
        d_state: State size per channel and direction, ``n``.
        d_conv: Height and width of the depthwise convolution.
        ssm_ratio: ``d_inner = ssm_ratio * d_model``.
        nheads: Heads per direction, each with one step size and one decay rate; ``ceil(d_model / 16)`` by default.
        directions: As for ``SS2D``.
        gate, gate_activation, conv_bias, out_norm, out_norm_eps, out_activation: As for ``SS2D``.
        chunk_size: Tokens per block of the matmul form; decides speed, not results.
        device, dtype: As for ``torch.nn.Linear``; ``A_logs``, ``Ds`` and ``dt_projs_bias`` are float32 at least.

    Raises:
        OptionError: An option cannot work.
    """

    without_effect = frozenset({"chunk_size"})

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 3,
        ssm_ratio: float = 1.0,
        nheads: int | None = None,
        directions: Any = 4,
        gate: bool = False,
        gate_activation: str | None = "silu",
        conv_bias: bool = False,
        out_norm: str | None = "layernorm",
        out_norm_eps: float = 1e-5,
        out_activation: str | None = None,
        chunk_size: int = 64,
        device: Device = None,
        dtype: Dtype = None,
    ):
        check_positive(nheads=nheads, chunk_size=chunk_size)
        super().__init__(
            d_model,
            d_state,
            d_conv,
            ssm_ratio,
            nheads,
            directions,
            gate,
            gate_activation,
            conv_bias,
            out_norm,
            out_norm_eps,
            out_activation,
            device=device,
            dtype=dtype,
        )
        self.chunk_size = chunk_size

    @property
    def nheads(self) -> int:
        """Heads per direction."""
        return self.dt_rank

    def _add_scans(self, k: int, device: Device, dtype: Dtype) -> None:
        check_divides("nheads", self.nheads, "ssm_ratio * d_model", self.d_inner)
        heads, pinned = (k, self.nheads), acc_dtype(dtype)
        self.dt_projs_bias = nn.Parameter(torch.empty(heads, device=device, dtype=pinned))
        self.A_logs = nn.Parameter(torch.empty(heads, device=device, dtype=pinned))
        self.Ds = nn.Parameter(torch.empty(*heads, self.d_inner // self.nheads, device=device, dtype=pinned))

    def _reset_scans(self) -> None:
        self.dt_projs_bias.uniform_(0, 0.1)
        self.A_logs.zero_()
        self.Ds.fill_(1.0)

    @classmethod
    def effective_options(cls, options: dict[str, Any], d_model: int) -> dict[str, Any]:
        """As :meth:`Mixer.effective_options`."""
        o = super().effective_options({**options, "dt_rank": options["nheads"]}, d_model)
        o["nheads"] = o.pop("dt_rank")
        return o

    def _scan(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        n, each = self.d_state, orders_of(self.directions, grid, u.device)
        # of all directions, head by head: (b, l, k, ...)
        read = torch.stack([reordered(x, *order) for x, order in zip(self._read(u), each, strict=True)], 2)
        dt, B, C = read.split([self.nheads, n, n], dim=-1)
        x = torch.stack([reordered(u, *order) for order in each], 2)
        heads = (-1, self.d_inner // self.nheads)
        y = ssd(
            x.flatten(2).unflatten(-1, heads),
            dt.flatten(2),
            -upcast(self.A_logs).exp().flatten(),
            B,
            C,
            self.Ds.flatten(0, 1),
            dt_bias=upcast(self.dt_projs_bias).flatten(),
            dt_softplus=True,
            chunk_size=self.chunk_size,
        )
        ways = y.flatten(2).unflatten(-1, (len(each), -1)).unbind(2)
        back = [reordered(way, inverse, order) for way, (order, inverse) in zip(ways, each, strict=True)]
        return torch.stack(back).sum(0)

    def flops(self, seq_len: int) -> int:
        """FLOPs per token: those around the scans as for ``SS2D``, and each scan in its matmul form as for ``Mamba2``."""
        d, n, q = self.d_inner, self.d_state, min(self.chunk_size, seq_len)
        return self._flops_around + len(self.directions) * (2 * d * (2 * n + q) + 2 * n * q)

    def scan_ops(self) -> int:
        """As :meth:`Mixer.scan_ops`: none, its scans are products."""
        return 0

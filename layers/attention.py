"""Attention with grouped keys and values, causal or not, on PyTorch's scaled dot product.

Multi-query and grouped-query heads (arXiv:1911.02150, arXiv:2305.13245), rotary positions, sliding windows (arXiv:2004.05150) and a
convolution over q, k and v as in mamba-ssm's ``MHA``, whose parameter names and row order (q, k, v) this layer follows. Unlike there, no
flash-attn is needed, and the convolution's state holds its inputs.

The rule: a query sees a key of the same document if ``0 <= pos_k <= pos_q``, and ``pos_k > pos_q - window`` where there is one. Without
causality it sees all of them, or those with ``|pos_k - pos_q| < window``.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import contain
from ..kernels.dispatch import choose
from . import attend
from .adapter import Adapter
from .attend_token import attend_token
from .base import Aux, Mixer, Seq
from .common import Device, Dtype, linear, reset_linear, scaled
from .conv import CausalConv1d
from .kv import AttentionState, remember
from .norm import RMSNorm
from .options import check, check_divides, check_positive, check_rank
from .rope import check_rope, rotate

__all__ = ["Attention", "AttentionState"]

_BLOCK = 1024


class Attention(Mixer):
    """Self-attention; without a state where it is not causal.

    Args:
        d_model: Channels of the residual stream.
        nheads: Query heads, ``h``.
        nheads_kv: Key and value heads; ``nheads`` by default.
        headdim: Channels per head, ``p``; ``d_model / nheads`` by default.
        rope: Base of the rotary position embedding; ``None`` for no positions at all.
        rotary_dim: Channels per head that rotate; all by default.
        rope_interleaved: Rotate neighbouring channels, instead of one half against the other.
        rope_scaling: Llama 3.1's stretching of the positions for long contexts (arXiv:2407.21783 §3.4.2): factor, low and high
            frequency factor, and the context it starts from.
        window: Tokens a query sees, itself included; all earlier ones by default. Without causality, as many behind it.
        qk_norm: RMS-normalise every query and key head.
        norm_eps: The epsilon of those norms.
        qkv_bias: Whether ``in_proj`` has a bias.
        out_bias: Whether ``out_proj`` has a bias.
        softmax_scale: Factor of the scores; ``headdim ** -0.5`` by default.
        d_conv: Width of a causal convolution over q, k and v; 0 for none.
        in_multiplier: Factor of the input; this and the next two are muP's (arXiv:2203.03466), as in Falcon-H1.
        key_multiplier: Factor of the keys.
        out_multiplier: Factor of the output.
        adapter_rank: Rank of an addition to q, k and v that is not shared where the block is, see :class:`Adapter`; 0 for none.
        causal: Whether a query sees no later token, which images and labels of tokens need not hide.
        d_in: Channels of the input, where they are not ``d_model``; the model decides it.
        layer_idx, n_layer: Place among the residual blocks; ``out_proj`` is drawn smaller by the square root of their number.
        device, dtype: As for ``torch.nn.Linear``.

    Raises:
        OptionError: An option cannot work.
    """

    attends = True

    def __init__(
        self,
        d_model: int,
        nheads: int = 8,
        nheads_kv: int | None = None,
        headdim: int | None = None,
        rope: float | None = 10000.0,
        rotary_dim: int | None = None,
        rope_interleaved: bool = False,
        rope_scaling: tuple[float, float, float, float] | None = None,
        window: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        out_bias: bool = False,
        softmax_scale: float | None = None,
        d_conv: int = 0,
        in_multiplier: float = 1.0,
        key_multiplier: float = 1.0,
        out_multiplier: float = 1.0,
        adapter_rank: int = 0,
        causal: bool = True,
        d_in: int | None = None,
        layer_idx: int = 0,
        n_layer: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        check_positive(d_model=d_model, nheads=nheads, nheads_kv=nheads_kv, headdim=headdim, window=window)
        _check_numbers(d_conv, causal, norm_eps, softmax_scale)
        check_rank(adapter_rank)
        if headdim is None:
            check_divides("nheads", nheads, "d_model", d_model, ", or set headdim")
        self.nheads, self.nheads_kv = nheads, nheads_kv or nheads
        check_divides("nheads_kv", self.nheads_kv, "nheads", nheads)
        self.headdim = headdim or d_model // nheads
        check_rope(rope, rotary_dim, self.headdim, rope_scaling)
        self.rope, self.rope_interleaved = rope, rope_interleaved
        self.rope_scaling = None if rope_scaling is None else tuple(rope_scaling)
        self.rotary_dim = self.headdim if rotary_dim is None else rotary_dim
        self.window, self.softmax_scale, self.d_conv, self.causal = window, softmax_scale, d_conv, causal
        if not causal:
            self.capabilities = frozenset({"packing", "padding"})  # type: ignore[misc]
        self.in_multiplier, self.key_multiplier, self.out_multiplier = in_multiplier, key_multiplier, out_multiplier
        self.rounds_input = in_multiplier == 1

        heads = (nheads, self.nheads_kv, self.nheads_kv)
        d_qkv, d_in = sum(heads) * self.headdim, d_in or d_model
        self.d_model, self.d_in, self.d_qkv = d_model, d_in, d_qkv
        self.in_proj = linear(d_in, d_qkv, qkv_bias, device, dtype)
        sizes = [h * self.headdim for h in heads]
        self.adapter = Adapter(d_in, sizes, adapter_rank, device, dtype) if adapter_rank else None
        self.conv1d = CausalConv1d(d_qkv, d_conv, True, None, device, dtype) if d_conv else None
        norm = functools.partial(RMSNorm, self.headdim, norm_eps, device=device, dtype=dtype)
        self.q_norm, self.k_norm = (norm() if qk_norm else None for _ in "qk")
        self.out_proj = linear(nheads * self.headdim, d_model, out_bias, device, dtype)
        self.reset_parameters(layer_idx, n_layer)

    @classmethod
    def effective_options(cls, options: dict[str, Any], d_model: int) -> dict[str, Any]:
        """As :meth:`Mixer.effective_options`."""
        o = super().effective_options(options, d_model)
        o["nheads_kv"] = o["nheads_kv"] or o["nheads"]
        o["headdim"] = o["headdim"] or d_model // o["nheads"]
        o["softmax_scale"] = o["headdim"] ** -0.5 if o["softmax_scale"] is None else o["softmax_scale"]
        o["rotary_dim"] = o["rotary_dim"] or o["headdim"]
        o["rope_scaling"] = o["rope_scaling"] and [float(number) for number in o["rope_scaling"]]
        if o["rope"] is None:
            o |= {"rotary_dim": None, "rope_interleaved": False, "rope_scaling": None}
        return o if o["qk_norm"] else o | {"norm_eps": None}

    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1) -> None:
        """Draw the weights as mamba-ssm does."""
        reset_linear(self.in_proj)
        for part in (self.adapter, self.conv1d, self.q_norm, self.k_norm):
            if part is not None:
                part.reset_parameters()
        reset_linear(self.out_proj, shrink=n_layer**0.5)

    def forward(
        self, x: Tensor, state: Any = None, seq: Seq | None = None, aux: Aux = None, *, return_state: bool = False
    ) -> Any:
        """Mix ``(b, l, d)`` along its rows; see :meth:`Mixer.forward`."""
        self._refuse_state(state, return_state)
        given, (x, seq) = seq, self._enter(x, state, seq)
        qkv, conv = self._project(x), None
        if self.conv1d is not None:
            qkv, conv = self.conv1d(qkv, None if state is None else state.conv, seq, return_state)
        past = state if state is not None and state.used else None
        pos = torch.arange(x.shape[1], device=x.device)  # (l,) or (b, l)
        if seq is not None and seq.packed:
            pos = seq.pos
        elif past is not None:
            pos = past.length[:, None] + pos
        q, k, v = self._heads(qkv, pos)
        if past is None or (seq is not None and seq.packed):
            y = self.mix(q, k, v, seq)
        else:
            k, v = (torch.cat([old[:, : past.used].to(new.dtype), new], 1) for old, new in ((past.k, k), (past.v, v)))
            docs = [] if seq is None else [seq.doc, F.pad(seq.doc, (past.used, 0))]
            y = self._mix(q, k, v, pos, torch.cat([past.pos[:, : past.used], pos], 1), *docs)
        y = self._leave(self._finish(y), given)
        return (y, remember(state, k, v, conv, seq, x.shape[1], self.window)) if return_state else y

    def step(self, x: Tensor, state: AttentionState) -> Tensor:
        """Mix one token per row, ``(b, d)``, and update ``state`` in place; it grows when full."""
        self.require("state")
        qkv = self._project(x)
        if self.conv1d is not None and state.conv is not None:
            qkv = self.conv1d.step(qkv, state.conv)
        return self._finish(self.look(qkv, state))

    def look(self, qkv: Tensor, state: AttentionState) -> Tensor:
        """Attend from one projected token per row, ``(b, d_qkv)`` to ``(b, h * p)``; its key and value go into ``state``."""
        state.make_room(self.window)
        if (at_once := attend_token(self, qkv, state)) is not None:
            return at_once
        pos = state.length[:, None]
        q, k, v = self._heads(qkv[:, None], pos)
        state.write(k, v)
        y = self._attend(q, state.k.to(q.dtype), state.v.to(q.dtype), self._sees(pos, state.pos))
        state.length.add_(1)
        return y.squeeze(1)

    def _project(self, x: Tensor) -> Tensor:
        x = scaled(x, self.in_multiplier)
        return self.in_proj(x) if self.adapter is None else self.in_proj(x) + self.adapter(x)

    def _finish(self, y: Tensor) -> Tensor:
        return scaled(self.out_proj(y), self.out_multiplier)

    def _heads(self, qkv: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.unflatten(-1, (-1, self.headdim))  # (b, l, h + 2 h_kv, p)
        sizes = [self.nheads, self.nheads_kv]
        qk, v = heads.split_with_sizes([sum(sizes), self.nheads_kv], dim=2)
        if (self.q_norm is not None and self.k_norm is not None) or self.key_multiplier != 1:
            q, k = qk.split(sizes, dim=2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            qk = torch.cat([q, scaled(k, self.key_multiplier)], dim=2)
        if self.rope is not None:
            qk = rotate(qk, pos, self.rope, self.rotary_dim, self.rope_interleaved, self.rope_scaling)
        return *qk.split_with_sizes(sizes, dim=2), v

    def _sees(self, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        # (..., lq), (..., lk) -> (..., lq, lk)
        before, (left, right) = pos_q[..., :, None] - pos_k[..., None, :], self.span
        sees = (pos_k >= 0)[..., None, :] if right < 0 else (pos_k >= 0)[..., None, :] & (before >= -right)
        return sees if left < 0 else sees & (before <= left)

    @property
    def span(self) -> attend.Span:
        """Tokens before and behind it that a query sees, -1 for all of its document."""
        left = -1 if self.window is None else self.window - 1
        return left, 0 if self.causal else left

    def mix(self, q: Tensor, k: Tensor, v: Tensor, seq: Seq | None = None, backend: str | None = None) -> Tensor:
        """Sum values by scaled dot products, which is what stands between the projections: ``(b, l, h, p)`` to ``(b, l, h * p)``.

        ``k`` and ``v`` have ``nheads_kv`` heads; ``backend`` is as of :func:`~hybridzoo.kernels.dispatch.choose`.
        """
        if seq is None or not self._apart(seq):
            # padding stands behind the real tokens, where causality hides it anyway
            return self._mix(q, k, v, backend=backend)
        chosen = choose("attention", backend=backend, **self.facts(q, seq))
        if chosen.run is not None and q.shape[1]:
            return chosen.run(q, k, v, seq, self.softmax_scale, self.span).flatten(-2)
        apart = None if torch.compiler.is_compiling() else seq.side_by_side
        if apart is not None:
            return self._mix_apart(q, k, v, *apart, backend)
        q, k, v, mark = contain.enter_attention(q, k, v, seq, self.span)
        return contain.leave_attention(self._mix(q, k, v, seq.pos, seq.pos, seq.doc, seq.doc, backend=backend), mark)

    def facts(self, q: Tensor, seq: Seq | None = None) -> dict[str, Any]:
        """Facts that the choice of a backend for queries ``(b, l, h, p)`` depends on."""
        l, packed = q.shape[1], seq is not None and self._apart(seq)
        # of rows and their padding, the lengths say where documents start
        counted = seq is not None and (seq.offsets is not None or not seq.packed)
        rows = {"length": l, "packed": packed, "counted": counted}
        sees = {"window": self.window is not None and self.window < l, "causal": self.causal}
        return {"device": q.device.type, "dtype": q.dtype, "headdim": self.headdim, **rows, **sees}

    def _apart(self, seq: Seq) -> bool:
        # whether a row has tokens that must not see each other, though they could
        return seq.packed or (seq.padded and not self.causal)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, *where: Tensor, backend: str | None = None) -> Tensor:
        # (b, lq, h, p), (b, lk, h_kv, p), and the position of each, which their order says by default, perhaps the document; the last lq
        # keys are the queries' own
        length, window = q.shape[1], self.window
        if not length:
            return q.flatten(-2)
        past, docs = k.shape[1] - length, where[2:]
        plain = not past and len(docs) == 0
        if past or not docs:  # packed rows have asked
            chosen = choose("attention", backend=backend, masked=not plain, **self.facts(q))
            if chosen.run is not None:
                return chosen.run(q, k, v, None, self.softmax_scale, self.span).flatten(-2)
        if plain and (window is None or window >= length):
            return self._attend(q, k, v, None, backend)
        pos, pos_k = where[:2] or (torch.arange(length, device=q.device),) * 2
        if past and not docs and window is None and attend.follow(q, pos, past):
            return self._attend(q, k, v, attend.behind(q, k), backend)
        # block by block, so that neither the mask nor the work grows with the square of the length under a window
        block = _BLOCK if window is None else min(_BLOCK, max(window, 256))
        ys = []
        for i in range(0, length, block):
            first = 0 if window is None or i < window else past + i - window + 1
            ahead = 0 if self.causal else (window or length) - 1
            rows, cols = slice(i, i + block), slice(first, past + i + block + ahead)
            mask = self._sees(pos[..., rows], pos_k[..., cols])
            if len(docs) == 2:
                mask = mask & (docs[0][:, rows, None] == docs[1][:, None, cols])
            ys.append(self._attend(q[:, rows], k[:, cols], v[:, cols], mask, backend))
        return torch.cat(ys, 1) if len(ys) > 1 else ys[0]

    def _mix_apart(self, q: Tensor, k: Tensor, v: Tensor, batches: list, place: Tensor, backend: str | None) -> Tensor:
        # document by document: a mask would multiply what it hides by zero, and NaN stays NaN; see Seq.side_by_side
        ys: list[Tensor] = []
        for batch in batches:
            docs: tuple[Tensor, ...] = ()
            if isinstance(batch, tuple):
                row, start, end = batch
                parts = (x[row : row + 1, start:end] for x in (q, k, v))
            else:
                flat = batch.flatten()
                parts = (x.flatten(0, 1).index_select(0, flat).unflatten(0, batch.shape) for x in (q, k, v))
                if not self.causal:
                    # nor does it hide the last token's copies behind a document
                    docs = (F.pad((batch[:, 1:] != batch[:, :-1]).long(), (1, 0), value=1),) * 2
            q_, k_, v_ = parts
            mine = torch.arange(q_.shape[1], device=q.device)
            ys.append(self._mix(q_, k_, v_, mine, mine, *docs, backend=backend).flatten(0, 1))
        # for padding, which reads what nobody else does
        ys.append(q.new_zeros(1, self.nheads * self.headdim))
        return torch.cat(ys).index_select(0, place.flatten()).unflatten(0, place.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str | None = None) -> Tensor:
        return attend.dot_product(q, k, v, self.causal if mask is None else mask, self.softmax_scale, backend)

    def reach(self, length: int, grid: tuple[int, int] | None = None) -> Tensor | None:
        """As :meth:`Mixer.reach`: all of a row, or as far as the window goes on both sides."""
        at = torch.arange(length)
        return None if self.causal or self.window is None else (at[:, None] - at).abs() < self.window

    def init_state(self, batch: int, max_len: int = 0, device: Device = None, dtype: Dtype = None) -> Any:
        """An empty state with room for ``max_len`` tokens, or for the window if that is less or all that is known."""
        if not self.causal:
            return ()
        device = device or self._device
        cap = min(max_len or self.window or 1, self.window or max(1, max_len))
        zeros = functools.partial(torch.zeros, device=device, dtype=dtype or self._dtype)
        k, v = (zeros(batch, cap, self.nheads_kv, self.headdim) for _ in "kv")
        pos, length = torch.full((batch, cap), -1, device=device), zeros(batch, dtype=torch.long)
        conv = None if self.conv1d is None else zeros(batch, self.d_conv - 1, self.d_qkv)
        return AttentionState(k, v, pos, length, conv, bound=0, window=self.window or 0)

    def flops(self, seq_len: int) -> int:
        """FLOPs per token, 2 per multiply-add: projections, convolution, scores and values.

        Scores and values count the average context: ``(seq_len + 1) / 2`` tokens, or ``seq_len``, or fewer with a window.
        """
        w = min(self.window or seq_len, seq_len)
        pairs = w * (w + 1) // 2 + (seq_len - w) * w
        pairs = pairs if self.causal else 2 * pairs - seq_len
        mixing = int(4 * self.nheads * self.headdim * (pairs / seq_len))
        extra = sum(part.flops() for part in (self.conv1d, self.adapter) if part is not None)
        # of sizes, not of weights, which quantised layers keep in other shapes
        return 2 * (self.d_in * self.d_qkv + self.nheads * self.headdim * self.d_model) + extra + mixing


def _check_numbers(d_conv: int, causal: bool, norm_eps: float, softmax_scale: float | None) -> None:
    check(d_conv >= 0, "d_conv", f"{d_conv} is not a filter width. Use 0 for no convolution, or 1 or more.")
    ahead = f"{d_conv} is the width of a causal convolution, and causal is false. Use 0."
    check(causal or not d_conv, "d_conv", ahead)
    check(norm_eps > 0, "norm_eps", f"{norm_eps} is not positive. The usual value is 1e-6.")
    nan = f"{softmax_scale} is not positive, and PyTorch's kernels would give NaN. The usual value is headdim ** -0.5."
    check(softmax_scale is None or softmax_scale > 0, "softmax_scale", nan)

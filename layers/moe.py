"""Mixture of experts, dropless (Switch Transformer arXiv:2101.03961, Mixtral arXiv:2401.04088, Jamba arXiv:2403.19887).

Tokens are sorted by expert and every expert multiplies its own run of rows; no capacity, nothing dropped, nothing
padded. A token's output therefore depends on that token alone. Losses and statistics go into the caller's ``aux``,
and padding counts in neither.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import dispatch
from .base import Aux, Mixer, Seq
from .common import Device, Dtype, acc_dtype, autocasts, dtype_read, linear, reset_linear, reset_weight, scaled, upcast
from .experts import grouped_linear
from .mlp import ACTIVATIONS, MLP, activate
from .options import check, check_known, check_positive

__all__ = ["Experts", "MoE", "balance_loss"]

_ROUTERS = ("softmax_topk", "topk_softmax", "sigmoid")


class Router(nn.Linear):
    """A linear layer that computes in float32, also under autocast: rounded scores would change the choice."""

    def forward(self, x: Tensor) -> Tensor:
        """Score tokens ``(t, d)`` for ``e`` experts."""
        with torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext():
            return F.linear(upcast(x), upcast(self.weight))


class Experts(nn.Module):
    """The experts' weights, stacked: ``w1`` ``(e, 2h or h, d)``, value rows first, and ``w2`` ``(e, d, h)``."""

    def __init__(
        self, num_experts: int, d_model: int, hidden: int, activation: str, gated: bool, device: Any, dtype: Any
    ):
        super().__init__()
        self.activation, self.gated = activation, gated
        into = hidden * (2 if gated else 1)
        self.w1 = nn.Parameter(torch.empty(num_experts, into, d_model, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(num_experts, d_model, hidden, device=device, dtype=dtype))

    def reset_parameters(self, shrink: float = 1.0) -> None:
        """Draw every expert as a linear layer of its own."""
        reset_weight(self.w1)
        reset_weight(self.w2, shrink)

    def forward(self, x: Tensor, offsets: Tensor, backend: str) -> Tensor:
        """Map rows ``(t, d)``, sorted by expert, whose runs end at ``offsets``."""
        w1, w2 = self.w1.to(x.dtype), self.w2.to(x.dtype)
        h = activate(grouped_linear(x, w1, offsets, backend), self.activation, self.gated)
        # autocast squares in float32 on a GPU
        return grouped_linear(h.to(x.dtype), w2, offsets, backend)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.w1.shape[0]} x ({self.w1.shape[2]} -> {self.w2.shape[2]}), {self.activation}, gated={self.gated}"


class MoE(Mixer):
    """``top_k`` of ``num_experts`` feed-forward layers per token, chosen and weighted by a linear router.

    Args:
        d_model: Channels of the residual stream.
        d_intermediate: Hidden channels of one expert.
        num_experts: Experts, ``e``.
        top_k: Experts per token.
        activation: As for :class:`MLP`.
        gated: As for :class:`MLP`.
        router: ``"softmax_topk"``, softmax over all experts and then the best (Jamba); ``"topk_softmax"``, the best
            and then softmax over those (Mixtral); ``"sigmoid"``, a sigmoid for each, the best after a correction per expert
            was added, weighted without it (DeepSeek-V3, arXiv:2412.19437; Nemotron-H).
        renormalize: Whether the weights of the chosen experts are scaled to sum to 1; with ``"topk_softmax"`` they do
            anyway.
        num_groups: With ``"sigmoid"``, experts stand in this many groups, and the choice is among the experts of the
            ``top_groups`` whose two best sum highest.
        top_groups: See ``num_groups``.
        routed_scale: Factor of the weights of the chosen experts.
        d_latent: Width in which the experts work, behind one projection down and before one up; the router and the shared
            experts see the full width (Nemotron 3 Super). None for ``d_model`` and no projections.
        num_shared_experts: Experts that see every token with weight 1 (DeepSeekMoE, arXiv:2401.06066), as one wide MLP.
        aux_loss_coef: Weight of the load-balancing loss; see :meth:`forward`. In a model it is the weight of one loss over all of its
            layers, as in transformers (``router_aux_loss_coef``), see :func:`balance_loss`.
        z_loss_coef: Weight of the router's z-loss (ST-MoE, arXiv:2202.08906).
        backend: ``"grouped_mm"``, ``"megablocks"`` or ``"loop"``; by default the first that can, which :meth:`explain` tells.
        layer_idx, n_layer: Place among the residual blocks; ``w2`` is drawn smaller by the square root of their number.
        device, dtype: As for ``torch.nn.Linear``.

    Raises:
        OptionError: An option cannot work.
    """

    fp32_parameters = ("correction",)
    no_decay_parameters = ("correction",)
    without_effect = frozenset({"aux_loss_coef", "z_loss_coef", "backend"})
    mixes_tokens = False

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        num_experts: int = 8,
        top_k: int = 2,
        activation: str = "silu",
        gated: bool = True,
        router: str = "softmax_topk",
        renormalize: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        routed_scale: float = 1.0,
        d_latent: int | None = None,
        num_shared_experts: int = 0,
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        backend: str | None = None,
        layer_idx: int = 0,
        n_layer: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        check_positive(d_model=d_model, d_intermediate=d_intermediate, num_experts=num_experts, top_k=top_k)
        check_positive(d_latent=d_latent, num_groups=num_groups, top_groups=top_groups)
        check(top_k <= num_experts, "top_k", f"{top_k} exceeds num_experts = {num_experts}. Use at most {num_experts}.")
        check_known("activation", activation, ACTIVATIONS)
        check_known("router", router, _ROUTERS)
        check_known("backend", backend, (None, *dispatch.TABLES["moe"]))
        self._check_groups(num_experts, top_k, router, num_groups, top_groups)
        check(num_shared_experts >= 0, "num_shared_experts", f"{num_shared_experts} is negative. Use 0 or more.")
        for field, coef in (("aux_loss_coef", aux_loss_coef), ("z_loss_coef", z_loss_coef)):
            check(coef >= 0, field, f"{coef} is negative. Use 0 to switch the loss off.")
        self.num_experts, self.top_k, self.router_type, self.renormalize = num_experts, top_k, router, renormalize
        self.aux_loss_coef, self.z_loss_coef = aux_loss_coef, z_loss_coef
        self.backend, self.layer_idx = backend, layer_idx
        self.num_groups, self.top_groups, self.routed_scale = num_groups, top_groups, routed_scale
        self.router = linear(d_model, num_experts, False, device, dtype, Router)
        # no gradient trains it: a balancing rule sets it (arXiv:2408.15664)
        zeros = torch.zeros(num_experts, device=device, dtype=acc_dtype(dtype))
        self.correction = nn.Parameter(zeros, requires_grad=False) if router == "sigmoid" else None
        self.latent_in = self.latent_out = None
        if d_latent is not None:
            self.latent_in = linear(d_model, d_latent, False, device, dtype)
            self.latent_out = linear(d_latent, d_model, False, device, dtype)
        self.experts = Experts(num_experts, d_latent or d_model, d_intermediate, activation, gated, device, dtype)
        # kept here, because an adapter (PEFT) may stand in the experts' place
        self.widths = (d_latent or d_model, d_intermediate * (2 if gated else 1), d_intermediate)
        self.shared = None
        if num_shared_experts:
            width = num_shared_experts * d_intermediate
            place: dict[str, Any] = {"layer_idx": layer_idx, "n_layer": n_layer, "device": device, "dtype": dtype}
            self.shared = MLP(d_model, width, activation=activation, gated=gated, **place)
        self.reset_parameters(layer_idx, n_layer)

    @staticmethod
    def _check_groups(num_experts: int, top_k: int, router: str, num_groups: int, top_groups: int) -> None:
        if num_groups == 1:
            return
        size, rest = divmod(num_experts, num_groups)
        check(router == "sigmoid", "num_groups", f"{num_groups} needs router: sigmoid, found {router!r}.")
        check(
            rest == 0 and size >= 2,
            "num_groups",
            f"{num_experts} experts cannot form {num_groups} equal groups of 2 or more. Pick a divisor of {num_experts}.",
        )
        check(
            top_groups <= num_groups and top_groups * size >= top_k,
            "top_groups",
            f"{top_groups} of {num_groups} groups hold {top_groups * size} experts, and top_k = {top_k}. Use more groups.",
        )

    @classmethod
    def effective_options(cls, options: dict[str, Any], d_model: int) -> dict[str, Any]:
        """As :meth:`Mixer.effective_options`."""
        o = super().effective_options(options, d_model)
        # renormalising the softmax over all and the softmax over the best are the same weights
        if o["router"] == "topk_softmax" or (o["router"] == "softmax_topk" and o["renormalize"]):
            o |= {"router": "topk_softmax", "renormalize": True}
        return o if o["num_groups"] > 1 else o | {"top_groups": 1}

    @torch.no_grad()
    def reset_parameters(self, layer_idx: int = 0, n_layer: int = 1) -> None:
        """Draw the weights as mamba-ssm draws an MLP's, every expert for itself; corrections are 0."""
        reset_linear(self.router)
        if self.correction is not None and not self.correction.is_meta:
            self.correction.zero_()
        if self.latent_in is not None and self.latent_out is not None:
            reset_linear(self.latent_in)
            reset_linear(self.latent_out)
        self.experts.reset_parameters(shrink=n_layer**0.5)
        if self.shared is not None:
            self.shared.reset_parameters(layer_idx, n_layer)

    def forward(
        self, x: Tensor, state: Any = None, seq: Seq | None = None, aux: Aux = None, *, return_state: bool = False
    ) -> Any:
        """Map every token of ``(b, l, d)`` by itself; the state is ``()``.

        With ``aux``, appends to ``aux["loss"]`` the scalar ``aux_loss_coef * e * sum_e(f_e P_e) + z_loss_coef *
        mean(logsumexp^2)``, or only the second term where the caller put a list under ``aux["balance"]``, which then gets what
        :func:`balance_loss` needs of this layer; where ``f_e`` is the number of choices of expert e per token and ``P_e`` its mean
        probability (as in transformers, so a perfect balance gives ``top_k``), and to ``aux["router"]`` a dict of the
        ``layer_idx``, the ``load`` ``(e,)`` (shares that sum to 1), the mean ``prob`` ``(e,)`` and the mean
        ``entropy`` of the router's distribution, in nats.
        """
        tokens = x.flatten(0, -2)  # (t, d)
        logits, prob, weight, expert = self._route(tokens)
        y = self._mix(tokens if self.latent_in is None else self.latent_in(tokens), weight, expert)
        y = (y if self.latent_out is None else self.latent_out(y)).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        if aux is not None:
            self._report(aux, logits, prob, expert, None if seq is None else seq.valid.flatten())
        return (y, ()) if return_state else y

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # logits and prob (t, e), weight and expert (t, k)
        logits = self.router(tokens)
        if self.correction is not None:
            return self._route_by_sigmoid(logits, self.correction)
        prob = logits.softmax(-1)
        if self.router_type == "softmax_topk":
            weight, expert = prob.topk(self.top_k, dim=-1)
            if self.renormalize:
                weight = weight / weight.sum(-1, keepdim=True)
        else:
            best, expert = logits.topk(self.top_k, dim=-1)
            weight = best.softmax(-1)
        return logits, prob, scaled(weight, self.routed_scale), expert

    def _route_by_sigmoid(self, logits: Tensor, correction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        score = logits.sigmoid()
        choice = score.detach() + correction.to(score.dtype)
        if self.num_groups > 1:
            groups = choice.unflatten(-1, (self.num_groups, -1))
            best = groups.topk(2, dim=-1)[0].sum(-1).topk(self.top_groups, dim=-1)[1]
            out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            choice = groups.masked_fill(out[..., None], -torch.inf).flatten(-2)
        expert = choice.topk(self.top_k, dim=-1)[1]
        weight = score.gather(-1, expert)
        if self.renormalize:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        # the share of each expert, where losses and statistics expect probabilities
        return logits, score / (score.sum(-1, keepdim=True) + 1e-20), scaled(weight, self.routed_scale), expert

    def _mix(self, tokens: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        device, dtype = tokens.device.type, dtype_read(tokens)
        chosen = expert.flatten()  # (t * k,)
        order = chosen.argsort(stable=True)
        ids = torch.arange(self.num_experts, device=tokens.device)
        offsets = torch.searchsorted(chosen[order], ids, right=True).to(torch.int32)
        rows = tokens.to(dtype)[order // self.top_k]
        backend = dispatch.choose("moe", backend=self.backend, **self._facts(device, dtype))
        rows = self.experts(rows, offsets, backend.name)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        rows = rows[back].unflatten(0, (-1, self.top_k))  # (t, k, d)
        return (rows.to(weight.dtype) * weight[..., None]).sum(1).to(dtype)

    def explain(self, device: str | None = None, dtype: torch.dtype | None = None) -> list[tuple[str, bool, str]]:
        """The backends in order of preference: name, whether a call would take it, and why or why not.

        Args:
            device: Type of the inputs' device; the parameters' by default.
            dtype: The inputs'; the parameters' by default.
        """
        rows = dispatch.explain("moe", **self._facts(device or self._device.type, dtype or self._dtype))
        if self.backend is None:
            return rows
        asked = f"backend={self.backend!r} was asked for"
        return [(name, name == self.backend, reason if name == self.backend else asked) for name, _, reason in rows]

    def _facts(self, device: str, dtype: torch.dtype) -> dict[str, Any]:
        return {"device": device, "dtype": dtype, "widths": self.widths}

    def _report(self, aux: dict[str, list], logits: Tensor, prob: Tensor, expert: Tensor, valid: Tensor | None) -> None:
        real = torch.ones_like(logits[:, 0]) if valid is None else valid.to(logits.dtype)
        count = real.sum().clamp(min=1)
        chosen = torch.zeros_like(prob).scatter(1, expert, 1.0)
        share = (chosen * real[:, None]).sum(0) / count  # choices per token, sums to k
        mean = (prob * real[:, None]).sum(0) / count
        balance = [(self.aux_loss_coef, self.top_k, share, mean)] if self.aux_loss_coef else []
        jointly = "balance" in aux
        if jointly:
            aux["balance"] += balance
        if self.z_loss_coef or (balance and not jointly):
            z = self.z_loss_coef * (logits.logsumexp(-1).square() * real).sum() / count
            aux.setdefault("loss", []).append(z if jointly else balance_loss(balance) + z)
        with torch.no_grad():
            entropy = (torch.special.entr(prob).sum(-1) * real).sum() / count
            stats = {"layer_idx": self.layer_idx, "load": share / self.top_k, "prob": mean.detach(), "entropy": entropy}
        aux.setdefault("router", []).append(stats)

    def flops(self, seq_len: int) -> int:
        """FLOPs per token of the router, the projections around the experts, ``top_k`` experts and the shared ones, 2 per multiply-add."""
        shared = 0 if self.shared is None else self.shared.flops(seq_len)
        around = sum(m.weight.numel() for m in (self.router, self.latent_in, self.latent_out) if m is not None)
        return 2 * (around + self.top_k * self._per_expert) + shared

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes through."""
        return super().active_parameters - (self.num_experts - self.top_k) * self._per_expert

    @property
    def _per_expert(self) -> int:
        d, into, out_of = self.widths
        return d * (into + out_of)


def balance_loss(
    layers: list[tuple[float, int, Tensor, Tensor]], batch_mean: Callable[[Tensor], Tensor] | None = None
) -> Tensor | float:
    """The load-balancing loss of one or more layers together: ``coef * e * sum_e(f_e P_e)``, f and P averaged over the layers.

    As transformers has it for Mixtral, Jamba, Granite and Qwen 3: the tokens of all layers count as one batch, so that the loss does not
    grow with the number of layers, and layers whose imbalances differ may make up for each other. Layers with other coefficients,
    another number of experts or another ``top_k`` form batches of their own. Of each of ``layers`` there is the coefficient, ``top_k``,
    the choices of every expert per token ``(e,)``, and the mean probabilities ``(e,)``; the sum is 0.0 without any.

    Where processes read parts of a batch, ``batch_mean`` averages the choices over them. The loss is linear in the probabilities, so the
    mean of the processes' losses is then that of the whole batch, and so is its gradient.
    """
    groups: dict[tuple[float, int, int], list[tuple[Tensor, Tensor]]] = {}
    for coef, top_k, share, mean in layers:
        groups.setdefault((coef, top_k, share.numel()), []).append((share, mean))
    total: Tensor | float = 0.0
    for (coef, _, num_experts), members in groups.items():
        share, mean = (torch.stack(part).mean(0) for part in zip(*members, strict=True))
        share = share if batch_mean is None else batch_mean(share.detach())
        total = total + coef * num_experts * (share * mean).sum()
    return total

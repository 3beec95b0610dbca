"""Muon and AdamW as one optimiser, each for the parameters that it is made for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from ..models.build import param_groups

__all__ = ["MuonAdamW", "hidden_matrices", "muon_and_adamw"]


def hidden_matrices(model: nn.Module) -> set[int]:
    """Return the ``id`` of every matrix in a model's blocks; embedding, head, vectors, filters and stacks of experts are none."""
    return {id(p) for p in model.get_submodule("backbone.layers").parameters() if p.dim() == 2}


def muon_and_adamw(model: nn.Module, args: Any) -> "MuonAdamW":
    """Return Muon for the matrices of a model's blocks that decay, and AdamW for the rest, as transformers' arguments say."""
    decayed, rest = param_groups(model, args.weight_decay)
    hidden = hidden_matrices(model)
    muon = decayed | {"params": [p for p in decayed["params"] if id(p) in hidden]}
    others = decayed | {"params": [p for p in decayed["params"] if id(p) not in hidden]}
    betas = (args.adam_beta1, args.adam_beta2)
    return MuonAdamW([muon], [others, rest], args.learning_rate, betas, args.adam_epsilon)


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` for some groups of parameters and ``torch.optim.AdamW`` for the others, as one optimiser.

    Muon's updates are as long as AdamW's (``match_rms_adamw``, arXiv:2502.16982), so that one rate and one decay are right for both.
    Schedulers and checkpoints see one list of groups, Muon's first, and one state. Where ``found_inf`` is 1 (as
    ``torch.amp.GradScaler`` sets it), a step changes no weight, and nobody waits for a device to know.

    Args:
        muon: Groups of matrices.
        adamw: Groups of anything.
        lr: Of all.
        betas: AdamW's.
        eps: AdamW's.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ):
        self.muon = Muon(muon, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW(adamw, lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let both work on this optimiser's groups and state."""
        n = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:n], self.param_groups[n:]
        self.muon.state = self.adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As of any optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        bad = self.found_inf
        # AdamW's kernel reads it, Muon knows nothing of it
        self.adamw.found_inf = bad  # type: ignore[attr-defined]
        matrices = [p for group in self.muon.param_groups for p in group["params"] if p.grad is not None]
        before = [] if bad is None else [p.clone() for p in matrices]
        self.muon.step()
        if bad is not None:
            for p, old in zip(matrices, before, strict=True):
                p.copy_(torch.where(bad > 0, old, p))
        self.adamw.step()
        return loss

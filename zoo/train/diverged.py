"""The error of a training whose numbers are no longer finite, and the place that the first of them came from."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..models.model import Model

__all__ = ["Diverged", "first_nonfinite", "nonfinite_weight"]


class Diverged(FloatingPointError):
    """A loss, a gradient or a weight is not finite; nothing of it has been saved.

    Attributes:
        step: The optimiser step that could not be taken (or, for weights, the last one that was).
        rows: Of the data, in that step's batch of this process.
        where: The first value that is not finite: a layer's output, a gradient or a weight.
    """

    def __init__(self, message: str, step: int = 0, rows: tuple[int, ...] = (), where: str = ""):
        super().__init__(message)
        self.step, self.rows, self.where = step, rows, where


def nonfinite_weight(model: torch.nn.Module) -> str | None:
    """The name of the first parameter that holds a value that is not finite."""
    named = list(model.named_parameters())
    # one answer for all, so that a device is waited for once
    if not named or bool(torch.stack([torch.isfinite(p.detach()).all() for _, p in named]).all()):
        return None
    return next(name for name, p in named if not torch.isfinite(p.detach()).all())


def first_nonfinite(model: Model, input_ids: Tensor, labels: Tensor) -> str | None:
    """Run one batch, ``(b, l)``, forward and back, and name the first value on the way that is not finite; gradients are dropped."""
    if (weight := nonfinite_weight(model)) is not None:
        return f"the weight {weight}"
    found: list[str] = []

    def look(what: str, values: Any) -> None:
        tensors = (x.detach() for x in pytree.tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point())
        if not found and not all(bool(torch.isfinite(x).all()) for x in tensors):
            found.append(what)

    def look_forward(name: str) -> Any:
        return lambda module, args, output: look(f"the output of {name}", output)

    def look_back(name: str) -> Any:
        return lambda p: look(f"the gradient of {name}", p.grad)

    with contextlib.ExitStack() as hooks:
        hooks.callback(model.zero_grad)
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(look_forward(name)).remove)
        for name, p in model.named_parameters():
            if p.requires_grad:
                hooks.callback(p.register_post_accumulate_grad_hook(look_back(name)).remove)
        model.zero_grad()
        loss = model(input_ids, labels).loss
        look("the loss", loss)
        if loss is not None and not found:
            loss.backward()
    return found[0] if found else None

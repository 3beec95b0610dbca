"""The error of a training whose numbers are no longer finite, or whose loss has risen for good, and the place that it came from."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..models.model import Model

__all__ = ["Diverged", "first_nonfinite", "largest_gradient", "nonfinite_weight"]

Batches = list[dict[str, Tensor]]


class Diverged(FloatingPointError):
    """A loss, a gradient or a weight is not finite, or the loss has risen too far; nothing of that step has been saved.

    Attributes:
        step: The optimiser step that could not be taken (or, for weights, the last one that was).
        rows: Of the data, in that step's batch of this process.
        where: The first value that is not finite, a layer's output, a gradient or a weight; or the largest gradient.
    """

    def __init__(self, message: str, step: int = 0, rows: tuple[int, ...] = (), where: str = ""):
        super().__init__(message)
        self.step, self.rows, self.where = step, rows, where


def nonfinite_weight(model: torch.nn.Module) -> str | None:
    """The name of the first parameter that holds a value that is not finite."""
    named = list(model.named_parameters())
    # one answer for all, so that a device is waited for once
    if not named or bool((finite := torch.stack([_is_finite(p) for _, p in named])).all()):
        return None
    return named[finite.tolist().index(False)][0]


def _is_finite(p: Any) -> Tensor:
    if not hasattr(p, "full_tensor"):
        return torch.isfinite(p.detach()).all()
    # of a sharded one, what every process has of it
    broken = (~torch.isfinite(p.detach().to_local())).any().to(torch.int32)
    torch.distributed.all_reduce(broken, group=p.device_mesh.get_group())
    return broken == 0


def first_nonfinite(model: Model, batches: Batches) -> str | None:
    """Run the batches of a step forward and back, and name the first value on the way that is not finite; gradients are dropped.

    Args:
        model: The model.
        batches: The arguments of its forward, of every batch.
    """
    if (weight := nonfinite_weight(model)) is not None:
        return f"the weight {weight}"
    found: list[str] = []

    def look(what: str, values: Any) -> None:
        tensors = (x.detach() for x in pytree.tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point())
        if not found and not all(bool(torch.isfinite(x).all()) for x in tensors):
            found.append(what)

    with _hooked(model, look):
        for batch in batches:
            model.zero_grad()
            loss = model(**batch).loss
            look("the loss", loss)
            if loss is not None and not found:
                loss.backward()
    return found[0] if found else None


@contextlib.contextmanager
def _hooked(model: Model, look: Callable[[str, Any], None]) -> Iterator[None]:
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
        yield


def largest_gradient(model: Model, batches: Batches) -> str:
    """Name the parameter whose gradient is the largest in a step; arguments as of :func:`first_nonfinite`, gradients are dropped."""
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    values = torch.stack(list(norms.values()))
    largest = int(values.argmax())
    name, norm, total = list(norms)[largest], float(values[largest]), float(values.norm())
    return f"the gradient of {name}, of norm {norm:.3g} of {total:.3g} in all"

"""The part of an image that an image model sees: its effective receptive field (arXiv:1701.04128), as a whole and by walks.

As in VMamba's figure (arXiv:2401.10166, section 4.4): how much the middle of the last map depends on every pixel.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.common import acc_dtype

__all__ = ["central_share", "effective_receptive_field", "receptive_fields", "walks_of"]

_AT_ONCE = 8


def effective_receptive_field(
    model: Any,
    images: Tensor,
    *,
    walk: str | None = None,
    report: Callable[[int], Any] = lambda done: None,
) -> Tensor:
    """Return how much the middle of a model's last map depends on every pixel.

    ``|d(sum of the channels at (h' // 2, w' // 2)) / d(pixel)|``, summed over the colours, averaged over the images, and divided by its
    largest value. The last map is that of ``forward_features(x, return_stages=True)``: behind a LayerNorm, the sum of the channels would
    be a constant. The model computes as in an evaluation, and is left as it was.

    Args:
        model: An :class:`~hybridzoo.zoo.models.image_classification.ImageClassifier`, or what has its ``forward_features``.
        images: ``(b, c, h, w)``, normalised.
        walk: The order of a scan (``rows``, ``columns-back``, see :mod:`hybridzoo.layers.orders`), to see what it contributes: the part
            of the gradient that passes through the states of walks in this order, in one SS2D or in several, and through those of no
            other. All outputs stay what they are. In a model of one SS2D, these parts and what passes through no state add up to the
            whole gradient.
        report: Called with the number of images that are done.

    Returns:
        ``(h, w)`` float64 on the CPU, from 0 to 1.

    Raises:
        ValueError: The model is none of images, no scan of it goes in this order, or the middle depends on no pixel.
    """
    (field,) = receptive_fields(model, images, (walk,), report)
    return field


def receptive_fields(
    model: Any, images: Tensor, walks: Sequence[str | None], report: Callable[[int], Any] = lambda done: None
) -> list[Tensor]:
    """Return the field of each of some walks, and of the whole for None; as :func:`effective_receptive_field`, and what they share once."""
    if not hasattr(model, "forward_features"):
        task = getattr(model, "task", type(model).__name__)
        raise ValueError(f"model: is one of {task}, and receptive fields are those of image models. Name one of those.")
    known = walks_of(model)
    for walk in walks:
        if walk is not None and walk not in known:
            there = ", ".join(known) or "none"
            raise ValueError(f"walk={walk!r}: no scan of the model goes in this order. Its orders: {there}.")
    fields = [torch.zeros(images.shape[2:], dtype=torch.float64) for _ in walks]
    device = next(model.parameters()).device
    with _evaluated(model):
        for part in images.split(_AT_ONCE):
            x = part.to(device)
            rest = _gradient(model, x, ()) if any(walks) else torch.zeros_like(x)
            for field, walk in zip(fields, walks, strict=True):
                found = _gradient(model, x, None) if walk is None else _gradient(model, x, (walk,)) - rest
                field += found.abs().sum((0, 1)).double().cpu()
                report(len(part))
    for field in fields:
        if not bool(torch.isfinite(field).all()) or not field.max() > 0:
            raise ValueError("model: the middle of its last map depends on no pixel, or its gradient is no number.")
    return [field / field.max() for field in fields]


def central_share(field: Tensor, side: float) -> float:
    """Return the share of a receptive field's sum that lies in its middle, of ``side`` times its height and width, in (0, 1]."""
    inside = [(torch.arange(n) + 0.5 - n / 2).abs() <= side * n / 2 for n in field.shape]
    return float(field.double()[inside[0]][:, inside[1]].sum() / field.double().sum())


def walks_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the orders in which a model's scans go through maps, each once."""
    names = [name for layer in _scanning(model) for name in layer.directions]
    return tuple(dict.fromkeys(names))


def _gradient(model: Any, images: Tensor, walks: tuple[str, ...] | None) -> Tensor:
    """The gradient of the middle of the last map; of all walks, those of some names alone pass it on."""
    x = images.detach().requires_grad_()
    with _through(model, walks), torch.enable_grad():
        last = model.forward_features(x, return_stages=True)[-1]
        middle = last[:, :, last.shape[2] // 2, last.shape[3] // 2]
        return torch.autograd.grad(middle.to(acc_dtype(middle.dtype)).sum(), x)[0]


def _scanning(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "through")]


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Let a model compute as in an evaluation, without gradients of its parameters."""
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        model.train(training)


@contextlib.contextmanager
def _through(model: nn.Module, walks: tuple[str, ...] | None) -> Iterator[None]:
    layers = _scanning(model)
    try:
        for layer in layers:
            layer.through = walks
        yield
    finally:
        for layer in layers:
            layer.through = None

"""Data of what an image model sees: receptive fields of the whole and of each walk, before and after training."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.publish import write_whole
from ..config.resolve import load_config
from ..models.receptive_field import central_share, receptive_fields, walks_of
from ..report.cells import pooled
from ..report.explained import explained_page, explained_picture, explained_png
from ..terminal import counting
from .examples import pixel_values
from .opened import image_model, name_of, untrained
from .predict import Image, files_of

__all__ = ["FORMATS", "explain", "write_explained"]

FORMATS: dict[str, Callable[[dict[str, Any]], str | bytes]] = {
    ".html": explained_page,
    ".svg": explained_picture,
    ".png": explained_png,
    ".json": lambda result: json.dumps(result) + "\n",
}
# what the middle of an image is, as shares of its height and width
_MIDDLES = (0.25, 0.5)
_NOISE = 8


def explain(
    model: Any, images: Image | Iterable[Image] | None = None, *, size: int | None = None, device: Any = None
) -> dict[str, Any]:
    """Return what the middle of a model's last map depends on, see :func:`.effective_receptive_field`.

    Args:
        model: As for :func:`~.predict.predict`. Unless it is a config, there is also what it saw before training: its config's model.
        images: As for :func:`~.predict.predict`; noise by default.
        size: Height and width that images are brought to; the config's ``image_size`` by default. A model runs at any.
        device: A GPU by default, if there is one; a model stays where it is.

    Returns:
        ``{"model", "size", "images", "noise", "states": [{"name": "untrained" or "trained", "fields": [...]}]}``. A field is ``{"walk":
        the order's name, or None for the whole, "middle": {"0.25": share of its sum in the middle quarter of height and width, "0.5":
        ...}, "field": rows of values from 0 to 1}``; of large images, each value is a mean over some pixels.

    Raises:
        ValueError: The model is none of images, or an image is damaged.
    """
    built = image_model(model, device, "What a text model makes of a prompt: zoo generate.")
    x = _pixels(built.cfg, images, size)
    if isinstance(model, str | os.PathLike) and built.source is None:
        states = {"untrained": built}
    else:
        states = {"untrained": untrained(built.cfg).to(built.some_weight().device), "trained": built}
    kinds: tuple[str | None, ...] = (None, *walks_of(built))
    found = []
    with counting("images", len(x) * len(kinds) * len(states)) as done:
        for name, one in states.items():
            fields = []
            for walk, field in zip(kinds, receptive_fields(one, x, kinds, report=done), strict=True):
                shares = {str(side): round(central_share(field, side), 4) for side in _MIDDLES}
                cells = [[round(v, 4) for v in row] for row in pooled(field.tolist())]
                fields.append({"walk": walk, "middle": shares, "field": cells})
            found.append({"name": name, "fields": fields})
    return {
        "model": name_of(model),
        "size": list(x.shape[2:]),
        "images": len(x),
        "noise": images is None,
        "states": found,
    }


def write_explained(result: dict[str, Any], out: Path) -> None:
    """Write a file, whole or not at all: what the end of its name says (:data:`FORMATS`), a page, a picture, or the result itself."""
    write_whole(out, FORMATS[out.suffix](result))


def _pixels(cfg: Any, images: Image | Iterable[Image] | None, size: int | None) -> Tensor:
    if size is not None:
        cfg = load_config(cfg, {"image_size": size})
    if images is not None:
        return torch.stack([pixel_values(image, cfg) for image in files_of(images)])
    drawn_by = torch.Generator().manual_seed(0)
    return torch.randn(_NOISE, cfg.in_channels, cfg.image_size, cfg.image_size, generator=drawn_by)

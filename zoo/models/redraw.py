"""Initial values for single tensors of a model that exists, as a new model has them."""

import re
from collections.abc import Iterable

import torch
from torch import nn

from ...layers.norm import make_norm
from ..config.resolve import Resolved
from .block import Block
from .model import Model

__all__ = ["redraw"]

_PART = re.compile(r"(backbone\.layers\.(?P<block>\d+)|(backbone\.)?\w+)\.(?P<rest>.+)")


@torch.no_grad()
def redraw(model: Model, names: Iterable[str]) -> None:
    """Draw the named parameters anew, in place; for those in a block, it is built a second time, on the CPU and in float32."""
    cfg = model.cfg
    fresh: dict[str, nn.Module] = {}
    for name in names:
        place, tensor = _PART.fullmatch(name), model.get_parameter(name)
        assert place is not None
        part, rest = place[1], place["rest"]
        if part not in fresh and place["block"]:
            fresh[part] = Block(Resolved(cfg, model.specs), int(place["block"]), dtype=torch.float32)
        elif part == "backbone.norm_f":
            width = model.specs[-1].d_model
            fresh[part] = make_norm(cfg.norm.type, width, cfg.norm.eps, dtype=torch.float32)
        elif part not in fresh and (made := model.make_end(part)) is not None:
            fresh[part] = made
        if part in fresh:
            tensor.copy_(fresh[part].get_parameter(rest))
        else:  # a table and its head
            nn.init.normal_(tensor, std=cfg.initializer_range)

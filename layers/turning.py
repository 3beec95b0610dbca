"""Rows turned around, for whoever reads them from the end."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Seq

__all__ = ["turning"]


def turning(seq: Seq | None) -> Callable[[Tensor], Tensor]:
    """The function that turns rows ``(b, l, d)`` around, each document in its own place, padding left alone; it is its own inverse."""
    if seq is None or not (seq.packed or seq.padded):
        return lambda x: x.flip(1)
    doc = seq.doc
    at = torch.arange(doc.shape[1], device=doc.device).expand_as(doc)
    last = F.pad(doc[:, 1:] != doc[:, :-1], (0, 1), value=True)[:, : doc.shape[1]]
    end = torch.where(last, at, doc.shape[1]).flip(1).cummin(1).values.flip(1)
    index = torch.where(seq.valid, end - seq.pos, at)[..., None]
    return lambda x: x.gather(1, index.expand_as(x))

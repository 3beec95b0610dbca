"""Digests of data, weights and files, each of every byte."""

from typing import Any

import torch
from torch import nn

from ..corpus.digests import digest_chunks, digest_file, digest_rows

__all__ = ["digest_file", "digest_rows", "digest_weights"]


def digest_weights(model: nn.Module) -> str:
    """Of all parameters: names, shapes, types and every bit."""
    named = list(model.named_parameters())
    about = [(name, tuple(p.shape), str(p.dtype)) for name, p in named]

    def chunk(i: int) -> Any:
        return named[i][1].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return digest_chunks(repr(about), len(named), chunk)

"""Multiply-adds of an image model as papers count them, which is not how FLOPs are counted elsewhere."""

from typing import Any, NamedTuple

from torch import nn

from ...layers.norm import LayerNorm, RMSNorm

__all__ = ["Macs", "macs"]


class Macs(NamedTuple):
    """Counts per image, by fvcore's rules and with state-spaces/mamba#110's for the scan, which papers call FLOPs or MACs.

    Attributes:
        products: Multiply-adds of linear layers and convolutions.
        scan: 9 n + 1 per channel, direction and token.
        norms: 5 per value that is normalised.
    """

    products: int
    scan: int
    norms: int

    @property
    def total(self) -> int:
        """The number that is published, a sum of numbers that are not of one kind."""
        return sum(self)


def macs(model: Any, size: int | None = None) -> Macs:
    """Count an image classifier's forward.

    Args:
        model: An image classifier, on whatever device.
        size: Height and width of the image, in pixels; the config's by default.
    """
    size = model.usual_size if size is None else size
    tokens, stem = model.tokens(size), model.backbone.embedding
    scan = sum(l * block.mixer.scan_ops() for l, block in zip(tokens, model.backbone.blocks, strict=True))
    norms = sum(5 * l * _normed(block) for l, block in zip(tokens, model.backbone.blocks, strict=True))
    grids = model.grids(size, size)
    for part, grid in zip(model.backbone.downsample, grids[1:], strict=True):
        norms += 5 * grid[0] * grid[1] * _normed(part)
    at = {"norm1": stem.halfway(size, size), "norm2": grids[0], "norm": grids[0]}
    norms += sum(5 * at[name][0] * at[name][1] * _normed(part) for name, part in stem.named_children() if name in at)
    norms += 5 * tokens[-1] * _normed(model.backbone.norm_f)
    return Macs((model.flops(size) - scan) // 2, scan, norms)


def _normed(module: nn.Module) -> int:
    """Values per token that norms in a module read."""
    norms = (m for m in module.modules() if isinstance(m, LayerNorm | RMSNorm))
    return sum(m.d if isinstance(m, RMSNorm) else m.normalized_shape[0] for m in norms)

"""Maps of a model's stages, for what is built on top: detectors, segmenters, one's own nets."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from ...layers.norm import LayerNorm
from ...layers.patches import to_image, to_tokens

__all__ = ["FeatureInfo", "FeatureMaps"]


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """Facts about the maps of a model's stages, asked for as timm's ``feature_info`` is.

    Attributes:
        widths: Channels of every stage.
        strides: Pixels per token, in each direction.
        modules: The block that each ends with.
    """

    widths: list[int]
    strides: list[int]
    modules: list[str]

    def channels(self) -> list[int]:
        """Channels of every map."""
        return self.widths

    def reduction(self) -> list[int]:
        """Pixels of the image per token, in each direction, of every map."""
        return self.strides

    def module_name(self) -> list[str]:
        """The module that each map comes from."""
        return self.modules


class FeatureMaps(nn.Module):
    """A model as the backbone of a detector: images in, a list of maps ``(b, d, h, w)`` out, fine ones first.

    Args:
        model: An image classifier; its head is not used.
        stages: Which of its stages, from the end where negative; all by default.
        norm: Whether a LayerNorm of its own stands behind each, as VMamba's detectors have (``outnorm0`` ...).

    Attributes:
        channels: Of every map.
        strides: Pixels of the image per token, in each direction.

    Raises:
        ValueError: There is no such stage.
    """

    def __init__(self, model: Any, stages: list[int] | None = None, norm: bool = True):
        super().__init__()
        info, n = model.feature_info, len(model.widths)
        chosen = list(range(n)) if stages is None else stages
        if not chosen or not all(-n <= i < n for i in chosen):
            raise ValueError(f"FeatureMaps: stages {chosen} of {n}. Use some of {-n} to {n - 1}.")
        self.model, self.stages = model, [i % n for i in chosen]
        self.channels, self.strides = ([given[i] for i in self.stages] for given in (info.widths, info.strides))
        weight = model.some_weight()
        for i, d in zip(self.stages, self.channels, strict=True):
            self.add_module(f"outnorm{i}", LayerNorm(d, device=weight.device, dtype=weight.dtype) if norm else None)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """From ``(b, c, h, w)`` to the maps."""
        maps = self.model.forward_features(pixel_values, return_stages=True)
        return [self._normed(i, maps[i]) for i in self.stages]

    def _normed(self, i: int, image: Tensor) -> Tensor:
        norm = self._modules[f"outnorm{i}"]
        if norm is None:
            return image
        x, grid = to_tokens(image)
        return to_image(norm(x), grid)

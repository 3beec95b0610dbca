"""transformers' image processor for models of grey images, whose own ones know three channels alone. Needs Pillow."""

from typing import Any

import numpy as np
from PIL.Image import Image, fromarray
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

__all__ = ["HybridZooImageProcessor"]


class HybridZooImageProcessor(BitImageProcessorPil):
    """As ``BitImageProcessor``, once pictures in colour are grey: pipelines hand over nothing else."""

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """As of ``BitImageProcessor``, of one picture of Pillow's, a list of them, or arrays that are grey already."""
        return super().preprocess(_grey(images), *args, **kwargs)


def _grey(images: Any) -> Any:
    if isinstance(images, list | tuple):
        return [_grey(image) for image in images]
    if not isinstance(images, Image):
        return images
    if images.mode.startswith("I;16"):  # of which transformers makes no 8 bits
        return fromarray((np.asarray(images) / 257).round().astype(np.uint8))
    return images if images.mode in ("L", "F", "I") else images.convert("L")

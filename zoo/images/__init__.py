"""From pictures as people have them to batches of pixels: sources, decoding, transforms, and what they are resized and normalised by."""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .augment import Augment
    from .damaged import DamagedImage
    from .examples import ImageExamples, classes_of, images_from, pixel_values
    from .mixing import Mixing
    from .pixels import Pixels, processor_config

__all__ = [
    "Augment",
    "DamagedImage",
    "ImageExamples",
    "Mixing",
    "Pixels",
    "classes_of",
    "images_from",
    "pixel_values",
    "processor_config",
]
__getattr__, __dir__ = lazily(
    __name__,
    Augment="augment",
    DamagedImage="damaged",
    ImageExamples="examples",
    Mixing="mixing",
    Pixels="pixels",
    classes_of="examples",
    images_from="examples",
    pixel_values="examples",
    processor_config="pixels",
)

"""The keys of an image model's config."""

import dataclasses
from typing import Any, ClassVar

from ...layers.patches import DOWNSAMPLING, STEMS
from ..errors import ConfigError
from ..layout import BlockSpec
from ..registry import get_mixer
from .schema import SCHEMAS, NormSchema, TrunkSchema, check_choice, check_labels

__all__ = ["INTERPOLATIONS", "ImageSchema", "StemSchema"]

CLASS_TOKENS = ("none", "first", "middle", "last")
POOLS = ("mean", "token")
# by the numbers that Pillow and transformers' files have for them
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
_IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclasses.dataclass
class StemSchema:
    """From pixels to tokens: ``conv`` or ``patch``, pixels per token, and whether it is normed (:class:`hybridzoo.layers.patches.Stem`)."""

    type: str = "conv"
    patch: int = 4
    norm: bool = True


@dataclasses.dataclass
class ImageNormSchema(NormSchema):
    """As :class:`NormSchema`, with the norm that image models have unless they say otherwise."""

    type: str = "layernorm"


@dataclasses.dataclass
class ImageSchema(TrunkSchema):
    """The keys of an image model's config, those of :class:`~hybridzoo.zoo.config.schema.TrunkSchema` included.

    Attributes:
        d_model: Channels of the first stage.
        layers: The pattern of a trunk of one stage, in place of ``stages``.
        stages: ``{layers: pattern, d_model: channels}`` of every stage; without channels, a stage has twice those of the one before.
        n_classes: What it tells apart; 0 for no head, and features as the answer.
        in_channels: Of the images: 3 for colours, 1 for grey ones.
        image_size: Pixels in each direction that it is trained at, to which data are brought. It runs at any other size, too.
        stem: See :class:`StemSchema`.
        downsample: Between stages: ``conv``, ``conv2`` or ``merge``, see :class:`hybridzoo.layers.patches.Downsample`.
        drop_path: Stochastic depth of the last block; it grows from 0 in equal steps, by a step at every block that mixes tokens.
        class_token: Where a token stands that belongs to no pixel: ``none``, ``first``, ``middle`` or ``last``. With one, rows are no maps.
        pos_embed: Whether positions are learned; they are interpolated for images of another size.
        pool: What the head reads: the ``mean`` of all tokens, or the class ``token``.
        image_mean: What is subtracted from every channel, of pixels from 0 to 1; of other numbers of channels, its mean.
        image_std: What they are divided by then.
        crop: Share of the image that is left, in each direction, where an evaluation cuts out its centre.
        interpolation: By which an image is brought to another size.
        labels: The names of the classes, where they are known.
    """

    needs: ClassVar[dict[str, str]] = {}
    task: str = "image_classification"
    layers: Any = None
    stages: list[Any] = dataclasses.field(default_factory=list)
    norm: ImageNormSchema = dataclasses.field(default_factory=ImageNormSchema)
    n_classes: int = 1000
    in_channels: int = 3
    image_size: int = 224
    stem: StemSchema = dataclasses.field(default_factory=StemSchema)
    downsample: str = "conv"
    drop_path: float = 0.0
    class_token: str = "none"
    pos_embed: bool = False
    pool: str = "mean"
    image_mean: list[float] = dataclasses.field(default_factory=lambda: list(_IMAGENET[0]))
    image_std: list[float] = dataclasses.field(default_factory=lambda: list(_IMAGENET[1]))
    crop: float = 0.875
    interpolation: str = "bicubic"
    labels: list[str] | None = None

    @classmethod
    def check(cls, values: dict[str, Any]) -> None:
        """As :meth:`TrunkSchema.check`."""
        stem, size = values["stem"], values["image_size"]
        choices = {
            "stem.type": (stem["type"], STEMS), "downsample": (values["downsample"], DOWNSAMPLING),
            "class_token": (values["class_token"], CLASS_TOKENS), "pool": (values["pool"], POOLS),
            "interpolation": (values["interpolation"], INTERPOLATIONS),
        }  # fmt: skip
        for key, (value, known) in choices.items():
            check_choice(key, value, known)
        if stem["type"] == "conv" and (stem["patch"] not in (1, 2, 4) or not stem["norm"]):
            which = "stem.norm: is false" if stem["patch"] in (1, 2, 4) else f"stem.patch: is {stem['patch']}"
            raise ConfigError(f"{which}, and a conv stem has patches of 1, 2 or 4, and norms. Use type: patch.")
        if stem["type"] == "patch" and size < stem["patch"]:
            raise ConfigError(f"image_size: is {size}, less than a patch of {stem['patch']}. Lower stem.patch.")
        if values["pool"] == "token" and values["class_token"] == "none":
            raise ConfigError("pool: is token, and there is none. Set class_token: middle, say, or pool: mean.")
        if values["class_token"] != "none" and len(values.get("stages") or []) > 1:
            raise ConfigError("class_token: has no place in a map that stages make smaller. Set it to none.")
        check_labels(values)
        for key in ("image_mean", "image_std"):
            if not values[key] or (key == "image_std" and min(values[key]) <= 0):
                raise ConfigError(f"{key}: is {values[key]}. Give a number for every channel; deviations are positive.")

    @classmethod
    def check_specs(cls, values: dict[str, Any], specs: list[BlockSpec]) -> None:
        """As :meth:`TrunkSchema.check_specs`."""
        for spec in specs if values["class_token"] != "none" else ():
            for _, part, where in spec.parts:
                if "grid" in get_mixer(part["type"], where).cls.capabilities:
                    raise ConfigError(
                        f"{where} ({part['type']}): mixes maps, and with a class token (class_token: {values['class_token']}) a row is "
                        "none. Set class_token to none, and pool to mean."
                    )


SCHEMAS["image_classification"] = ImageSchema

"""The image classifier: pixels in, logits out, and maps of every stage on the way (VMamba, arXiv:2401.10166; Vim, arXiv:2401.09417).

State-dict keys are those of the trunk, its stem under ``backbone.embedding``, and ``head.{weight,bias}``.
"""

import dataclasses
import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.base import Seq, shapes, tree
from ...layers.common import linear, reset_normal, weight_dtype
from ...layers.patches import STD, Downsample, Map, Stem, stem_grid, to_image
from ..config.images import ImageSchema
from ..config.resolve import resolve
from .features import FeatureInfo
from .model import Model

__all__ = ["ImageClassificationOutput", "ImageClassifier"]


@dataclasses.dataclass(repr=False)
class ImageClassificationOutput:
    """The output of a forward; a pytree of its tensors.

    Attributes:
        loss: With ``labels``: mean cross-entropy in nats per image, plus ``aux_loss``.
        logits: ``(b, n_classes)``; what the head would read, ``(b, d)``, of a model without one.
        aux_loss: The weighted sum of the mixers' auxiliary losses; ``None`` where no mixer has one.
        hidden: ``(b, l, d)`` after the final norm.
        hidden_states: Where asked for: ``(b, l, d)`` of the stem and after every block, the last one after the final norm.
        router: Statistics of every MoE block, a list of dicts.
    """

    loss: Tensor | None
    logits: Tensor
    aux_loss: Tensor | None
    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None
    router: list[dict[str, Any]]

    __repr__ = shapes


tree(ImageClassificationOutput)


class ImageClassifier(Model):
    """A classifier of images; arguments and attributes are those of :class:`~hybridzoo.zoo.models.model.Model`."""

    schema = ImageSchema
    main_input_name = "pixel_values"
    head_name, hf_class, unit = "head", "HybridZooForImageClassification", "image"

    def make_embedding(self, device: Any, dtype: torch.dtype | None) -> Stem:
        """The stem, see :class:`~hybridzoo.layers.patches.Stem`."""
        cfg, stem = self.cfg, self.cfg.stem
        norm = (cfg.norm.type, cfg.norm.eps) if stem.norm else None
        at = stem_grid(stem.type, stem.patch, cfg.image_size, cfg.image_size) if cfg.pos_embed else None
        width = self.specs[0].d_model
        made = {"device": device, "dtype": dtype}
        return Stem(cfg.in_channels, width, stem.type, stem.patch, norm, cfg.class_token, at, **made)

    def make_downsample(self, device: Any, dtype: torch.dtype | None) -> list[nn.Module]:
        """As :meth:`Model.make_downsample`: one :class:`~hybridzoo.layers.patches.Downsample` between two stages."""
        cfg, widths = self.cfg, self.widths
        norm = cfg.norm.type, cfg.norm.eps
        pairs = itertools.pairwise(widths)
        return [Downsample(d, d_out, cfg.downsample, norm, device, dtype) for d, d_out in pairs]

    def make_head(self, device: Any, dtype: torch.dtype | None) -> nn.Module:
        """A linear layer; nothing where there are no classes."""
        if not self.cfg.n_classes:
            return nn.Identity()
        head = linear(self.widths[-1], self.cfg.n_classes, True, device, dtype)
        reset_normal(head, STD)
        return head

    @classmethod
    def auto_classes(cls, cfg: Any) -> dict[str, str]:
        """As :meth:`Model.auto_classes`."""
        # transformers' own processor lets colours through, which its pipeline makes of grey pictures, too
        grey = {"AutoImageProcessor": "HybridZooImageProcessor"} if cfg.in_channels == 1 else {}
        return super().auto_classes(cfg) | grey

    @classmethod
    def companions(cls, cfg: Any) -> dict[str, dict[str, Any]]:
        """As :meth:`Model.companions`: how images are brought to the size and the range of numbers that the model was trained with."""
        from ..images.pixels import processor_config

        content = processor_config(cfg)
        if "AutoImageProcessor" in cls.auto_classes(cfg):
            del content["image_processor_type"]
        return {"preprocessor_config.json": content}

    def make_end(self, part: str) -> nn.Module | None:
        """As of :class:`Model`: all of them draw their own values."""
        made = {"backbone.embedding": self.make_embedding, self.head_name: self.make_head}
        if part in made:
            return made[part](None, torch.float32)
        return nn.ModuleList(self.make_downsample(None, torch.float32)) if part == "backbone.downsample" else None

    @property
    def usual_size(self) -> int:
        """Pixels in each direction."""
        return self.cfg.image_size

    def grids(self, h: int, w: int) -> list[tuple[int, int]]:
        """``(h, w)`` in tokens of every stage, for images of ``h`` and ``w`` pixels."""
        grids = [self._stem.grid(h, w)]
        for _ in self.backbone.downsample:
            h, w = grids[-1]
            grids.append((-(-h // 2), -(-w // 2)))
        return grids

    def tokens(self, size: int) -> list[int]:
        """Tokens in every block, a class token included."""
        more, grids = self._stem.class_token is not None, self.grids(size, size)
        return [grids[spec.stage][0] * grids[spec.stage][1] + more for spec in self.specs]

    def embedding_flops(self, size: int) -> int:
        """As of :class:`Model`: the stem's convolutions."""
        return self._stem.flops(size, size)

    def block_flops(self, size: int) -> list[int]:
        """As of :class:`Model`, per image: of all tokens of a map."""
        return [l * block.flops(l) for l, block in zip(self.tokens(size), self.backbone.blocks, strict=True)]

    def between_flops(self, size: int) -> list[int]:
        """As of :class:`Model`: of what makes maps smaller."""
        parts = zip(self.backbone.downsample, self.grids(size, size)[1:], strict=True)
        return [2 * h * w * cast(Downsample, part).proj.weight.numel() for part, (h, w) in parts]  # type: ignore[operator]

    @property
    def _stem(self) -> Stem:
        return cast(Stem, self.backbone.embedding)

    @property
    def widths(self) -> list[int]:
        """Channels of every stage."""
        return list({spec.stage: spec.d_model for spec in self.specs}.values())

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels, pixels per token and the module of what :meth:`forward_features` gives of every stage."""
        last = {spec.stage: spec.index for spec in self.specs}
        strides = [self.cfg.stem.patch * 2**stage for stage in last]
        return FeatureInfo(self.widths, strides, [f"backbone.layers.{i}" for i in last.values()])

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        *,
        num_items: Tensor | int | None = None,
        label_smoothing: float = 0.0,
        output_hidden_states: bool = False,
    ) -> ImageClassificationOutput:
        """Classify images, and train on them.

        Args:
            pixel_values: ``(b, c, h, w)``, floating-point, as the config's mean and deviation make them.
            labels: ``(b,)`` int64; or ``(b, n_classes)``, the probability of every class, as mixing images makes them.
            num_items: What the summed cross-entropy is divided by in place of ``b``: the images of the larger batch that this is part of.
            label_smoothing: The share of a label's probability that is spread over all classes (arXiv:1512.00567 §7).
            output_hidden_states: Whether ``out.hidden_states`` is filled.

        Raises:
            ValueError: Another shape or number of channels, an image smaller than a patch, or labels that do not fit.
        """
        self._check(pixel_values, labels)
        passed: list[Tensor] | None = [] if output_hidden_states else None
        hidden, _, aux = self._run(pixel_values, passed, None)
        logits = self.head(self._pooled(hidden))
        loss, aux_loss = None, self.aux_loss(aux)
        if labels is not None:
            b = logits.shape[0]
            loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
            loss = loss / (b if num_items is None else num_items)
            if aux_loss is not None:
                loss = loss + aux_loss * (1 if num_items is None else b / num_items)
        states = None if passed is None else tuple(passed)
        return ImageClassificationOutput(loss, logits, aux_loss, hidden, states, aux.get("router", []))

    def forward_features(self, pixel_values: Tensor, return_stages: bool = False) -> Any:
        """Return the map in front of the head, ``(b, d, h, w)`` after the final norm, or those that the stages leave.

        Args:
            pixel_values: ``(b, c, h, w)``.
            return_stages: Return a list with the map of every stage, not normed and before it is made smaller, see
                :attr:`feature_info`. Memory is channels last.

        Returns:
            A map or the list; of a model with a class token, the tokens of the pixels alone are in it.
        """
        self._check(pixel_values, None)
        maps: list[Map] = []
        hidden, _, _ = self._run(pixel_values, None, maps)
        stem, grid = self._stem, self._stem.grid(*pixel_values.shape[2:])

        def image(x: Tensor, size: tuple[int, int]) -> Tensor:
            return to_image(stem.pixels(x), size if stem.class_token is None else grid)

        return [image(*one) for one in maps] if return_stages else image(hidden, maps[-1][1])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits ``(b, n_classes)`` of a map ``(b, d, h, w)``, or what the head reads of it, ``(b, d)``; with ``pool: mean``.

        Raises:
            ValueError: The head reads a class token, which is not in a map.
        """
        if self.cfg.pool != "mean":
            raise ValueError("forward_head: the head reads the class token, and a map has none. Call the model itself.")
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.head(pooled.to(weight_dtype(self.head) or pooled.dtype))

    def reset_head(self, n_classes: int, labels: list[str] | None = None) -> None:
        """Put a new head in place of the one there, for other classes; 0 for none. Everything else is kept.

        Raises:
            ConfigError: No such number of classes, or another number of names.
        """
        weight = self.some_weight()
        self.cfg = resolve(self.cfg, {"n_classes": n_classes, "labels": labels}).config
        self._modules[self.head_name] = self.make_head(weight.device, weight.dtype)

    def freeze(self, stages: int) -> None:
        """Keep the stem, the first ``stages`` stages and what stands behind them as they are in a training; 0 frees everything.

        Raises:
            ValueError: There are fewer stages.
        """
        n = len(self.widths)
        if not 0 <= stages <= n:
            raise ValueError(f"freeze: {stages} of {n} stages. Use 0 to {n}.")
        backbone = self.backbone
        parts: list[nn.Module] = [backbone.embedding] if stages else []
        parts += [block for spec, block in zip(self.specs, backbone.blocks, strict=True) if spec.stage < stages]
        kept = {id(p) for part in [*parts, *backbone.downsample[:stages]] for p in part.parameters()}
        for p in self.parameters():
            p.requires_grad_(id(p) not in kept)

    def _run(self, pixel_values: Tensor, passed: list[Tensor] | None, maps: list[Map] | None) -> Any:
        x, grid = self.backbone.embedding(pixel_values)
        # rows with a class token are no maps
        seq = Seq.from_grid(grid, x.shape[0], x.shape[1], x.device) if x.shape[1] == grid[0] * grid[1] else None
        return self.backbone(x, seq, passed=passed, maps=maps)

    def _pooled(self, hidden: Tensor) -> Tensor:
        if self.cfg.pool == "mean":
            return hidden.mean(1)
        return hidden[:, self._stem.index(hidden.shape[1] - 1)]

    def _check(self, pixel_values: Tensor, labels: Tensor | None) -> None:
        c, patch = self.cfg.in_channels, self.cfg.stem.patch
        if pixel_values.dim() != 4 or pixel_values.shape[1] != c:
            raise ValueError(f"pixel_values: expected shape (b, {c}, h, w), got {tuple(pixel_values.shape)}.")
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values: are {pixel_values.dtype}. Divide by 255, subtract image_mean and divide by image_std."
            )
        smallest = patch if self.cfg.stem.type == "patch" else 1
        if min(pixel_values.shape[2:]) < smallest:
            h, w = pixel_values.shape[2:]
            raise ValueError(f"pixel_values: images of {h} x {w} are smaller than a patch of {patch}. Enlarge them.")
        if labels is None:
            return
        b, n = pixel_values.shape[0], self.cfg.n_classes
        if not n:
            raise ValueError("labels: the model has no head (n_classes = 0). Call reset_head first.")
        hard = labels.dim() == 1 and not labels.is_floating_point()
        if hard and labels.dtype not in (torch.int64, torch.uint8):
            raise ValueError(f"labels: are {labels.dtype}. Numbers of classes are torch.int64: labels.long().")
        if labels.shape != ((b,) if hard else (b, n)):
            raise ValueError(
                f"labels: expected ({b},) integers or ({b}, {n}) probabilities, got {tuple(labels.shape)}."
            )

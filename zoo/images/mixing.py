"""Batches mixed: mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) by timm, and smoothed labels."""

import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .augment import drawing
from .timm_parts import timm_part

__all__ = ["Mixing"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixes the images of a batch, each with the one at the mirrored place; what is drawn follows from seed and step alone.

    Attributes:
        n_classes: Of the model.
        mixup: Parameter of the beta distribution of the shares; 0: there is none.
        cutmix: The same for the areas; with both, each batch has one of them, by the toss of a coin.
        smoothing: What is spread over all classes of each label's weight.

    Raises:
        ValueError: Numbers below 0, or a smoothing of 1 or more.
        ModuleNotFoundError: timm is needed for mixing, and not installed.
    """

    n_classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self):
        if min(self.mixup, self.cutmix) < 0 or not 0 <= self.smoothing < 1:
            raise ValueError(
                f"mixup={self.mixup:g}, cutmix={self.cutmix:g}, smoothing={self.smoothing:g}: numbers from 0 are needed, and a smoothing "
                "below 1."
            )
        if self.mixes:
            _ = self._timm

    @property
    def mixes(self) -> bool:
        """Return whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, pixel_values: Tensor, labels: Tensor, *key: int, padded: bool = False) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft labels.

        Args:
            pixel_values: ``(b, c, h, w)``, changed in place; where their number is odd, the last one stays as it is.
            labels: ``(b,)`` int64.
            *key: What the draws follow from: seed, step, the part of the step and the process.
            padded: Whether labels below 0 may be among them, of rows that only fill a batch up: these stay as they are, and their soft
                labels are 0. Looking for them waits for the device.

        Returns:
            The images, and ``(b, n_classes)`` in their type, of sum 1.
        """
        if padded and not bool((real := labels >= 0).all()):
            soft = pixel_values.new_zeros(len(labels), self.n_classes)
            pixel_values[real], soft[real] = self(pixel_values[real], labels[real], *key)
            return pixel_values, soft
        soft = self._softened(labels, pixel_values.dtype)
        even = len(labels) // 2 * 2
        if self.mixes and even:
            with drawing(*key):
                _, mixed = self._timm(pixel_values[:even], labels[:even])
            soft[:even] = mixed
        return pixel_values, soft

    def _softened(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        rest = self.smoothing / self.n_classes
        soft = torch.full((len(labels), self.n_classes), rest, dtype=dtype, device=labels.device)
        return soft.scatter_(1, labels[:, None], 1 - self.smoothing + rest)

    @cached_property
    def _timm(self) -> Any:
        return timm_part("mixup").Mixup(
            self.mixup, self.cutmix, label_smoothing=self.smoothing, num_classes=self.n_classes
        )  # fmt: skip

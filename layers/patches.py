"""Stems, which make tokens of an image, and layers that make fewer and wider ones of a map; channels last.

A map is ``(b, h * w, d)``, top row first, with its ``(h, w)`` beside it. Convolutions are torch's, on channels-last memory: no token is
copied to another place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Device, Dtype, linear, reset_normal, weight_dtype
from .norm import make_norm

__all__ = ["DOWNSAMPLING", "STD", "STEMS", "Downsample", "Map", "Stem", "stem_grid", "to_image", "to_tokens"]

# of linear layers, tokens and positions, in every published vision model of this kind
STD = 0.02
STEMS = ("conv", "patch")
DOWNSAMPLING = ("conv", "conv2", "merge")

Map = tuple[Tensor, tuple[int, int]]


def to_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map ``(b, h * w, d)`` as ``(b, d, h, w)``, a view in channels-last memory."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(image: Tensor) -> Map:
    """An image ``(b, d, h, w)`` as a map; a view where its memory is channels last."""
    return image.permute(0, 2, 3, 1).flatten(1, 2), (image.shape[2], image.shape[3])


def stem_grid(kind: str, patch: int, h: int, w: int) -> tuple[int, int]:
    """Height and width in tokens, of images of ``h`` and ``w`` pixels; patches are whole, convolutions reach over the border."""
    return (h // patch, w // patch) if kind == "patch" else (-(-h // patch), -(-w // patch))


class Stem(nn.Module):
    """From pixels to tokens.

    Args:
        in_channels: Of the images.
        d: Channels of the tokens.
        kind: ``"conv"``: two 3 x 3 convolutions, with a norm and a GELU between them (VMamba, arXiv:2401.10166). ``"patch"``: one
            convolution over patches that do not overlap (ViT, arXiv:2010.11929).
        patch: Pixels per token, in each direction; of ``"conv"`` 1, 2 or 4: a convolution goes in steps of two as often as is needed.
        norm: Type and eps of the norm behind (and between); ``None`` for none behind.
        class_token: Where one more token stands that belongs to no pixel: ``"first"``, ``"middle"``, ``"last"``; ``"none"`` for none.
        positions: ``(h, w)`` in tokens of a learned position embedding, which is interpolated for maps of another size.
        **made: ``device`` and ``dtype``, as for ``torch.nn.Linear``.
    """

    no_decay_parameters = ("pos_embed", "class_token")

    def __init__(
        self,
        in_channels: int,
        d: int,
        kind: str = "conv",
        patch: int = 4,
        norm: tuple[str, float] | None = ("layernorm", 1e-5),
        class_token: str = "none",
        positions: tuple[int, int] | None = None,
        **made: Any,
    ):
        super().__init__()
        if kind not in STEMS or (kind == "conv" and (patch not in (1, 2, 4) or norm is None)):
            raise ValueError(
                f"Stem: kind = {kind!r}, patch = {patch}, norm = {norm}. Kinds: {', '.join(STEMS)}; conv has patches of 1, 2 or 4, and a "
                "norm."
            )
        self.kind, self.patch, self.at, self.positions = kind, patch, class_token, positions
        if kind == "patch":
            self.proj = nn.Conv2d(in_channels, d, patch, patch, **made)
            self.norm = make_norm(norm[0], d, norm[1], **made) if norm else None
        elif norm is not None:
            first, second = (2 if patch >= 2 else 1), (2 if patch == 4 else 1)
            self.conv1 = nn.Conv2d(in_channels, -(-d // 2), 3, first, 1, **made)
            self.norm1 = make_norm(norm[0], -(-d // 2), norm[1], **made)
            self.conv2 = nn.Conv2d(-(-d // 2), d, 3, second, 1, **made)
            self.norm2 = make_norm(norm[0], d, norm[1], **made)
        tokens = 0 if positions is None else positions[0] * positions[1] + (class_token != "none")
        self.class_token = nn.Parameter(torch.empty(1, 1, d, **made)) if class_token != "none" else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, d, **made)) if positions else None
        for p in (self.class_token, self.pos_embed):
            if p is not None and not p.is_meta:
                nn.init.trunc_normal_(p, std=STD)

    def forward(self, images: Tensor) -> Map:
        """Embed ``(b, c, h, w)``; tokens ``(b, l, d)`` with the class token in its place, and the size of the map without it."""
        images = images.to(weight_dtype(self))
        if self.kind == "patch":
            image = self.proj(images.contiguous(memory_format=torch.channels_last))
            x, grid = to_tokens(image)
            x = x if self.norm is None else self.norm(x)
        else:
            x, grid = to_tokens(self.conv1(images.contiguous(memory_format=torch.channels_last)))
            x = F.gelu(self.norm1(x))
            x, grid = to_tokens(self.conv2(to_image(x, grid)))
            x = self.norm2(x)
        return self._placed(x, grid), grid

    def halfway(self, h: int, w: int) -> tuple[int, int]:
        """Height and width between the two convolutions."""
        return stem_grid("conv", min(self.patch, 2), h, w)

    def grid(self, h: int, w: int) -> tuple[int, int]:
        """As :func:`stem_grid`, of this one."""
        return stem_grid(self.kind, self.patch, h, w)

    def flops(self, h: int, w: int) -> int:
        """FLOPs of an image, 2 per multiply-add."""
        grid = self.grid(h, w)
        if self.kind == "patch":
            return 2 * grid[0] * grid[1] * self.proj.weight.numel()
        half = self.halfway(h, w)
        return 2 * (half[0] * half[1] * self.conv1.weight.numel() + grid[0] * grid[1] * self.conv2.weight.numel())

    def index(self, tokens: int) -> int:
        """The place of the class token among ``tokens`` others."""
        return {"first": 0, "middle": tokens // 2, "last": tokens}[self.at]

    def pixels(self, x: Tensor) -> Tensor:
        """Tokens ``(b, l, d)`` without the class token."""
        if self.class_token is None:
            return x
        at = self.index(x.shape[1] - 1)
        return torch.cat([x[:, :at], x[:, at + 1 :]], dim=1)

    def _with(self, token: Tensor, x: Tensor) -> Tensor:
        at = self.index(x.shape[1])
        return torch.cat([x[:, :at], token, x[:, at:]], dim=1)

    def _placed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.class_token is not None:
            x = self._with(self.class_token.expand(x.shape[0], -1, -1).to(x.dtype), x)
        return x if self.pos_embed is None else x + self._positions(grid).to(x.dtype)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        table, size = self.pos_embed, self.positions
        assert table is not None and size is not None
        if grid == size:
            return table
        image = to_image(self.pixels(table).float(), size)
        wide = F.interpolate(image, grid, mode="bicubic", antialias=True, align_corners=False)
        rest = to_tokens(wide.to(table.dtype))[0]
        if self.class_token is None:
            return rest
        at = self.index(size[0] * size[1])
        return self._with(table[:, at : at + 1], rest)


class Downsample(nn.Module):
    """From a map to one of half the height and width, rounded up, and other channels.

    Args:
        d: Channels of the map.
        d_out: Channels of what becomes of it.
        kind: ``"conv"``: 3 x 3 in steps of two, and a norm (VMamba's v3). ``"conv2"``: 2 x 2, and a norm (v2). ``"merge"``: a norm over
            every 2 x 2 tokens side by side, and a linear layer (Swin, arXiv:2103.14030). The last two see zeros beyond an odd border.
        norm: Type and eps.
        device, dtype: As for ``torch.nn.Linear``.
    """

    def __init__(
        self,
        d: int,
        d_out: int,
        kind: str = "conv",
        norm: tuple[str, float] = ("layernorm", 1e-5),
        device: Device = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        if kind not in DOWNSAMPLING:
            raise ValueError(f"Downsample: unknown kind {kind!r}. Known: {', '.join(DOWNSAMPLING)}.")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kind = kind
        if kind == "merge":
            self.norm: nn.Module = make_norm(norm[0], 4 * d, norm[1], **made)
            self.proj: nn.Module = linear(4 * d, d_out, False, device, dtype)
            reset_normal(self.proj, STD)
        else:
            size, around = (3, 1) if kind == "conv" else (2, 0)
            self.proj = nn.Conv2d(d, d_out, size, 2, around, **made)
            self.norm = make_norm(norm[0], d_out, norm[1], **made)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Map:
        """From ``(b, h * w, d)`` and ``(h, w)`` to half of that."""
        image = to_image(x.to(weight_dtype(self)), grid)
        if self.kind == "conv":
            x, grid = to_tokens(self.proj(image))
            return self.norm(x), grid
        if grid[0] % 2 or grid[1] % 2:
            image = F.pad(image, (0, grid[1] % 2, 0, grid[0] % 2))
        if self.kind == "conv2":
            x, grid = to_tokens(self.proj(image.contiguous(memory_format=torch.channels_last)))
            return self.norm(x), grid
        # columns of a pair are apart, then its rows: (0, 0), (1, 0), (0, 1), (1, 1), as Swin joins them
        parts = image.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 5, 3, 1)
        merged = parts.flatten(3).flatten(1, 2)
        return self.proj(self.norm(merged)), (image.shape[2] // 2, image.shape[3] // 2)

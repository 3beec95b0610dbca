"""VMamba as it is published, the other side of ``zoo bench vision``; and timm's models.

Written anew from the paper (arXiv:2401.10166) and from how its authors' code goes about it (MzeroMiko/VMamba, MIT): the second version
(``v05_noz``) has channels first, so 1 x 1 convolutions for linear layers and norms between two permutations, grouped convolutions on four
copies of the map, 16-bit operands of the scan, and sums and the norm behind it in float32; the first has channels last, products in place
of the convolutions, and a scan in float32. Their own kernel writes float32 out of 16-bit operands; mamba-ssm's, which stands here for it,
writes 16 bits, so that what is measured moves fewer bytes than what is published. Parameters have our names: a state dict fits both.
"""

import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers.common import drop_rows
from ...layers.mlp import MLP
from ...layers.patches import Downsample, Stem
from ...layers.ss2d import SS2D
from ...zoo.models.image_classification import ImageClassifier

__all__ = ["Parts", "library_parts", "plain_parts", "plain_scan", "published", "timm_model"]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The functions that a published model is made of.

    Attributes:
        scan: As mamba-ssm's ``selective_scan_fn``, channels first.
        spread: From a map (b, d, h, w) to the four sequences that it is read as, (b, 4, d, h * w).
        merge: From those, and h and w, to their sum where the tokens are, (b, d, h, w) in float32.
        about: Who makes the copies.
    """

    scan: Callable[..., Tensor]
    spread: Callable[[Tensor], Tensor]
    merge: Callable[[Tensor, int, int], Tensor]
    about: str


def spread(x: Tensor) -> Tensor:
    """Copy a map (b, d, h, w) into rows, columns, and both from the end, (b, 4, d, h * w)."""
    forth = torch.stack([x.flatten(2), x.mT.flatten(2)], 1)
    return torch.cat([forth, forth.flip(-1)], 1)


def merge(ys: Tensor, h: int, w: int) -> Tensor:
    """Sum four sequences where their tokens are, in float32."""
    ys = ys.float()
    forth = ys[:, :2] + ys[:, 2:].flip(-1)
    return forth[:, 0].unflatten(-1, (h, w)) + forth[:, 1].unflatten(-1, (w, h)).mT


def plain_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *more: Any) -> Tensor:
    """``selective_scan_fn`` of mamba-ssm as a loop over time: u and dt (b, d, l), B and C (b, g, n, l), then D, no z, a bias, softplus."""
    D, z, bias, softplus = more
    if z is not None or not softplus:
        raise ValueError("plain_scan: has no gate, and steps through softplus. Pass z = None and softplus = True.")
    dt = F.softplus(dt + bias[:, None])
    B, C = (m.repeat_interleave(u.shape[1] // m.shape[1], 1) for m in (B, C))
    decay, step = torch.exp(dt[:, :, None] * A[..., None]), (dt * u)[:, :, None] * B
    h, ys = torch.zeros_like(step[..., 0]), []
    # the backward of an indexed read would be as large as all of it at every step
    for a, x, c in zip(decay.unbind(-1), step.unbind(-1), C.unbind(-1), strict=True):
        h = a * h + x
        ys.append((h * c).sum(-1))
    return torch.stack(ys, -1) + D[:, None] * u


def plain_parts() -> Parts:
    """Return parts in plain torch, for any device."""
    return Parts(plain_scan, spread, merge, "torch")


def library_parts() -> Parts:
    """Return mamba-ssm's scan, and copies by a Triton kernel as the authors have one; by torch where there is no Triton.

    Raises:
        ImportError: mamba_ssm is not there.
    """
    scan = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    try:
        copies: Any = import_module(".vision_copies", __package__)
    except ImportError:
        return Parts(scan, spread, merge, "torch")
    return Parts(scan, copies.Spread.apply, copies.Merge.apply, "Triton")


def published(model: ImageClassifier, parts: Parts) -> nn.Module:
    """Build the published network with the sizes and the weights of one of ours.

    Raises:
        ValueError: The model is no VMamba.
    """
    mixers = [block.mixer for block in model.backbone.blocks]
    scans = [m for m in mixers if isinstance(m, SS2D)]
    walked = all(m.directions == ("rows", "columns", "rows-back", "columns-back") and m.conv2d for m in scans)
    if not scans or not walked or not all(isinstance(m, SS2D | MLP) for m in mixers):
        raise ValueError(
            f"published: {model.cfg.get('name', 'the model')} is no VMamba. Choose one of `zoo list vmamba`."
        )
    net = Published(model, parts)
    net.load_state_dict(model.state_dict())
    return net.to(model.some_weight().device)


def timm_model(name: str) -> nn.Module:
    """Build a model of timm's without its weights, with the stochastic depth that it is published with.

    Raises:
        ImportError: timm is not there.
    """
    return import_module("timm").create_model(name, pretrained=False, drop_path_rate=0.2)


class Norm2d(nn.LayerNorm):
    """A norm over the channels of ``(b, d, h, w)``, between two permutations."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Linear2d(nn.Linear):
    """A linear layer over the channels of ``(b, d, h, w)``, as a 1 x 1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


def _norm(like: Any, first: bool) -> nn.Module:
    return (Norm2d if first else nn.LayerNorm)(like.normalized_shape, like.eps)


def _linear(like: Any, first: bool) -> nn.Module:
    return (Linear2d if first else nn.Linear)(like.in_features, like.out_features, like.bias is not None)


def _conv(like: Any) -> nn.Conv2d:
    options = {"groups": like.groups, "bias": like.bias is not None}
    return nn.Conv2d(like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding, **options)


class Embed(nn.Module):
    """From pixels to the first map: two convolutions with norms, or one over patches."""

    def __init__(self, like: Stem, first: bool):
        super().__init__()
        self.kind, self.first = like.kind, first
        if like.kind == "patch":
            self.proj, self.norm = _conv(like.proj), _norm(like.norm, first)
        else:
            self.conv1, self.norm1 = _conv(like.conv1), _norm(like.norm1, first)
            self.conv2, self.norm2 = _conv(like.conv2), _norm(like.norm2, first)

    def forward(self, x: Tensor) -> Tensor:
        """Embed."""

        def laid(x: Tensor) -> Tensor:
            return x if self.first else x.permute(0, 2, 3, 1)

        if self.kind == "patch":
            return self.norm(laid(self.proj(x)))
        x = F.gelu(self.norm1(laid(self.conv1(x))))
        return self.norm2(laid(self.conv2(x if self.first else x.permute(0, 3, 1, 2))))


class Smaller(nn.Module):
    """Between stages: a convolution in steps of two, and a norm; or Swin's merging of patches, channels last."""

    def __init__(self, like: Downsample, first: bool):
        super().__init__()
        self.merges, self.first = like.kind == "merge", first
        if like.kind == "conv2" or (self.merges and first):
            raise ValueError(
                f"published: downsample = {like.kind} is of neither version. Use conv, or merge with gates."
            )
        self.norm = _norm(like.norm, first)
        self.proj = _linear(like.proj, first) if self.merges else _conv(like.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Halve height and width."""
        if self.merges:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            return self.proj(self.norm(torch.cat(parts, -1)))
        if self.first:
            return self.norm(self.proj(x))
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Scan2d(nn.Module):
    """The scan of a map on four copies of it."""

    x_proj_weight: Any
    dt_projs_weight: Any
    dt_projs_bias: Any
    A_logs: Any
    Ds: Any

    def __init__(self, like: SS2D, first: bool, parts: Parts):
        super().__init__()
        self.first, self.parts, self.sizes = first, parts, [like.dt_rank, like.d_state, like.d_state]
        self.in_proj, self.conv2d = _linear(like.in_proj, first), _conv(like.conv2d)
        self.out_norm, self.out_proj = _norm(like.out_norm, first), _linear(like.out_proj, first)
        for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"):
            self.register_parameter(name, nn.Parameter(torch.empty_like(getattr(like, name), device="cpu")))

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map, in either layout."""
        if self.first:
            x = F.silu(self.conv2d(self.in_proj(x)))
            return self.out_proj(self.out_norm(self._scan(x)).to(x.dtype))
        x, z = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        y = self.out_norm(self._scan(x).permute(0, 2, 3, 1).contiguous()).to(x.dtype)
        return self.out_proj(y * F.silu(z))

    def _scan(self, x: Tensor) -> Tensor:
        xs = self.parts.spread(x)
        if self.first:
            each = F.conv1d(xs.flatten(1, 2), self.x_proj_weight.flatten(0, 1)[..., None], groups=4)
            dt, B, C = each.unflatten(1, (4, -1)).split(self.sizes, 2)
            dt = F.conv1d(dt.flatten(1, 2), self.dt_projs_weight.flatten(0, 1)[..., None], groups=4)
        else:
            each = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj_weight)
            dt, B, C = each.split(self.sizes, 2)
            dt = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_projs_weight).flatten(1, 2)
            xs, dt, B, C = xs.float(), dt.float(), B.float(), C.float()
        A, bias = -self.A_logs.float().exp(), self.dt_projs_bias.flatten().float()
        operands = (xs.flatten(1, 2), dt, A, B.contiguous(), C.contiguous(), self.Ds.float())
        ys = self.parts.scan(*operands, None, bias, True)
        return self.parts.merge(ys.unflatten(1, (4, -1)), *x.shape[2:])


class Feed(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, like: MLP, first: bool):
        super().__init__()
        self.fc1, self.fc2 = _linear(like.fc1, first), _linear(like.fc2, first)

    def forward(self, x: Tensor) -> Tensor:
        """Map every token."""
        return self.fc2(F.gelu(self.fc1(x)))


class Residual(nn.Module):
    """``x + drop(mixer(norm(x)))``."""

    def __init__(self, like: Any, first: bool, parts: Parts):
        super().__init__()
        mixer = like.mixer
        self.drop, self.norm = like.drop, _norm(like.norm, first)
        self.mixer = Scan2d(mixer, first, parts) if isinstance(mixer, SS2D) else Feed(mixer, first)

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        y = self.mixer(self.norm(x))
        return x + (drop_rows(y, self.drop) if self.training and self.drop else y)


class Published(nn.Module):
    """The network: stem, blocks with smaller maps between stages, norm, mean, linear layer. With gates it is the first version."""

    def __init__(self, like: ImageClassifier, parts: Parts):
        super().__init__()
        old: Any = like.backbone
        self.first = not any(isinstance(b.mixer, SS2D) and b.mixer.gate for b in old.blocks)
        self.begins = old.begins
        self.backbone: Any = nn.Module()
        self.backbone.embedding = Embed(old.embedding, self.first)
        self.backbone.layers = nn.ModuleList(Residual(block, self.first, parts) for block in old.blocks)
        self.backbone.downsample = nn.ModuleList(Smaller(part, self.first) for part in old.downsample)
        self.backbone.norm_f = _norm(old.norm_f, self.first)
        self.head = _linear(like.head, False)

    def forward(self, images: Tensor) -> Tensor:
        """Classify ``(b, c, h, w)``: logits."""
        x = self.backbone.embedding(images)
        for i, block in enumerate(self.backbone.layers):
            if i in self.begins:
                x = self.backbone.downsample[self.begins[i]](x)
            x = block(x)
        x = self.backbone.norm_f(x)
        x = x if self.first else x.permute(0, 3, 1, 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

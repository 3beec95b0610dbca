"""The published structures of VMamba and Vim as plain PyTorch, to judge ours by: explicit copies of every walk, a loop over time.

Written from arXiv:2401.10166 and arXiv:2401.09417 with the names and shapes of the published files. Nothing of the zoo is used.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def scan(u, dt, A, B, C, D):
    """``h = exp(dt A) h + dt B u; y = C h + D u``, one step after the other: u, dt (b, k, d, l), A (k, d, n), B, C (b, k, n, l), D (k, d)."""
    h, ys = torch.zeros(*u.shape[:3], A.shape[-1], dtype=u.dtype), []
    for ut, dtt, Bt, Ct in zip(u.unbind(-1), dt.unbind(-1), B.unbind(-1), C.unbind(-1), strict=True):
        h = torch.exp(dtt[..., None] * A) * h + (dtt * ut)[..., None] * Bt[:, :, None]
        ys.append((h * Ct[:, :, None]).sum(-1) + D * ut)
    return torch.stack(ys, -1)


def cross_scan(x):
    """A map (b, d, h, w) as four sequences (b, 4, d, l): rows, columns, and both from their end."""
    two = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
    return torch.cat([two, two.flip(-1)], 1)


def cross_merge(y, h, w):
    """The reverse, summed: (b, 4, d, l) to (b, d, h, w)."""
    two = y[:, :2] + y[:, 2:].flip(-1)
    return two[:, 0].unflatten(-1, (h, w)) + two[:, 1].unflatten(-1, (w, h)).transpose(2, 3)


class Projection(nn.Module):
    """A linear layer on the last dimension, whose weight is stored as (out, in), or as a 1 x 1 convolution's (out, in, 1, 1)."""

    def __init__(self, n, m, bias, convolution):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(m, n, 1, 1) if convolution else torch.empty(m, n))
        self.bias = nn.Parameter(torch.empty(m)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight.flatten(1), self.bias)


class SS2D(nn.Module):
    def __init__(self, d, ratio, n, gate, era, convolution):
        super().__init__()
        inner, rank = int(ratio * d), math.ceil(d / 16)
        self.n, self.rank, self.gate, self.era = n, rank, gate, era
        self.in_proj = Projection(d, 2 * inner if gate else inner, False, convolution)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=gate)
        if era == "C":
            self.x_proj = Projection(inner, 4 * (rank + 2 * n), False, False)
            self.dt_projs = Projection(rank, 4 * inner, False, False)
        else:
            self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * n, inner))
            self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
        self.A_logs, self.Ds = nn.Parameter(torch.empty(4 * inner, n)), nn.Parameter(torch.empty(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = Projection(inner, d, False, convolution)

    def forward(self, x):  # (b, h, w, d)
        h, w = x.shape[1:3]
        x, z = self.in_proj(x).chunk(2, -1) if self.gate else (self.in_proj(x), None)
        xs = cross_scan(F.silu(self.conv2d(x.permute(0, 3, 1, 2))))
        down = (self.x_proj.weight if self.era == "C" else self.x_proj_weight).reshape(4, -1, xs.shape[2])
        up = (self.dt_projs.weight if self.era == "C" else self.dt_projs_weight).reshape(4, -1, self.rank)
        dt, B, C = torch.einsum("bkdl,kcd->bkcl", xs, down).split([self.rank, self.n, self.n], 2)
        dt = F.softplus(torch.einsum("bkrl,kdr->bkdl", dt, up) + self.dt_projs_bias[..., None])
        y = scan(xs, dt, -self.A_logs.exp().unflatten(0, (4, -1)), B, C, self.Ds.unflatten(0, (4, -1)))
        y = self.out_norm(cross_merge(y, h, w).permute(0, 2, 3, 1))
        return self.out_proj(y * F.silu(z) if self.gate else y)


class Feedforward(nn.Module):
    def __init__(self, d, hidden, convolution):
        super().__init__()
        self.fc1, self.fc2 = Projection(d, hidden, True, convolution), Projection(hidden, d, True, convolution)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class VSSBlock(nn.Module):
    def __init__(self, d, ratio, n, mlp, gate, era, convolution):
        super().__init__()
        self.names = ("ln_1", "self_attention") if era == "A" else ("norm", "op")
        setattr(self, self.names[0], nn.LayerNorm(d))
        setattr(self, self.names[1], SS2D(d, ratio, n, gate, era, convolution))
        if mlp:
            self.norm2, self.mlp = nn.LayerNorm(d), Feedforward(d, int(mlp * d), convolution)

    def forward(self, x):
        norm, op = (getattr(self, name) for name in self.names)
        x = x + op(norm(x))
        return x + self.mlp(self.norm2(x)) if hasattr(self, "mlp") else x


class Merge(nn.Module):
    """Swin's patch merging; the root file has its parts at 1 and 2 of a sequence."""

    def __init__(self, d, era):
        super().__init__()
        self.names = ("1", "2") if era == "C" else ("norm", "reduction")
        self.add_module(self.names[0], nn.LayerNorm(4 * d))
        self.add_module(self.names[1], Projection(4 * d, 2 * d, False, False))

    def forward(self, x):
        norm, reduction = (getattr(self, name) for name in self.names)
        return reduction(norm(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)))


def convolved(conv, norm, x):
    """A convolution and a norm of maps (b, h, w, d)."""
    return norm(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Numbered(nn.Module):
    """Parts under the numbers that they have in a sequence of others without weights."""

    def __init__(self, **parts):
        super().__init__()
        for number, part in parts.items():
            self.add_module(number.removeprefix("n"), part)

    def __getitem__(self, number):
        return self._modules[str(number)]


class VSSM(nn.Module):
    """VMamba.

    Args:
        vanilla: The first version: gate, bias of the convolution, no MLP, patch merging; or the second, ``v05_noz``.
        era: Whose names: ``"A"`` January 2024 (vanilla alone), ``"B"`` the classification folder's, ``"C"`` the root file's.
        convolution: Whether linear layers are stored as 1 x 1 convolutions.
        downsample: ``"v1"`` patch merging, ``"v2"`` 2 x 2 convolutions, ``"v3"`` 3 x 3 ones; of the version by default.
        outnorm: Whether it is a detector's backbone: a norm per stage, and no classifier.
    """

    def __init__(
        self, depths=(1, 1, 2, 1), dim=16, ratio=1.0, n=1, *, mlp=4.0, vanilla=False, era="B", convolution=False, downsample=None,
        n_classes=7, in_channels=3, outnorm=False,
    ):  # fmt: skip
        super().__init__()
        kind = downsample or ("v1" if vanilla else "v3")
        self.vanilla, self.era, self.kind, self.outnorm = vanilla, era, kind, outnorm
        if vanilla:
            conv, norm = nn.Conv2d(in_channels, dim, 4, 4), nn.LayerNorm(dim)
            self.patch_embed = nn.Module() if era == "A" else Numbered(n0=conv, n2=norm)
            if era == "A":
                self.patch_embed.proj, self.patch_embed.norm = conv, norm
        else:
            half = dim // 2
            first, second = nn.Conv2d(in_channels, half, 3, 2, 1), nn.Conv2d(half, dim, 3, 2, 1)
            self.patch_embed = Numbered(n0=first, n2=nn.LayerNorm(half), n5=second, n7=nn.LayerNorm(dim))
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            d, stage = dim * 2**i, nn.Module()
            block = (d, ratio, n, 0 if vanilla else mlp, vanilla, era, convolution)
            stage.blocks = nn.ModuleList(VSSBlock(*block) for _ in range(depth))
            if i + 1 < len(depths):
                k, stride, pad = (3, 2, 1) if kind == "v3" else (2, 2, 0)
                down = nn.Conv2d(d, 2 * d, k, stride, pad)
                stage.downsample = Merge(d, era) if kind == "v1" else Numbered(n1=down, n3=nn.LayerNorm(2 * d))
            self.layers.append(stage)
        if outnorm:
            for i in range(len(depths)):
                self.add_module(f"outnorm{i}", nn.LayerNorm(dim * 2**i))
            return
        norm, head = nn.LayerNorm(d), nn.Linear(d, n_classes)
        if era == "A":
            self.norm, self.head = norm, head
        else:
            self.classifier = nn.Module()
            self.classifier.norm, self.classifier.head = norm, head

    def stages(self, x):
        """Maps (b, h, w, d) of every stage, before its downsampling."""
        x = x.permute(0, 2, 3, 1)
        if self.era == "A":
            x = convolved(self.patch_embed.proj, self.patch_embed.norm, x)
        elif self.vanilla:
            x = convolved(self.patch_embed[0], self.patch_embed[2], x)
        else:
            x = F.gelu(convolved(self.patch_embed[0], self.patch_embed[2], x))
            x = convolved(self.patch_embed[5], self.patch_embed[7], x)
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
            yield x
            if hasattr(stage, "downsample"):
                down = stage.downsample
                x = down(x) if self.kind == "v1" else convolved(down[1], down[3], x)

    def forward(self, x):
        *_, x = self.stages(x)
        norm, head = (self.norm, self.head) if self.era == "A" else (self.classifier.norm, self.classifier.head)
        return head(norm(x).mean((1, 2)))


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Bimamba(nn.Module):
    """Vim's mixer, "bimamba v2": one projection in and out, and everything between them once per direction."""

    def __init__(self, d, n, width, div2):
        super().__init__()
        inner, rank = 2 * d, math.ceil(d / 16)
        self.n, self.rank, self.div2 = n, rank, div2
        self.in_proj, self.out_proj = nn.Linear(d, 2 * inner, bias=False), nn.Linear(inner, d, bias=False)
        for back in ("", "_b"):
            conv = nn.Conv1d(inner, inner, width, groups=inner, padding=width - 1)
            self.add_module(f"conv1d{back}", conv)
            self.add_module(f"x_proj{back}", nn.Linear(inner, rank + 2 * n, bias=False))
            self.add_module(f"dt_proj{back}", nn.Linear(rank, inner))
            self.register_parameter(f"A{back}_log", nn.Parameter(torch.empty(inner, n)))
            self.register_parameter(f"D{back}", nn.Parameter(torch.empty(inner)))

    def one_way(self, xz, back):
        conv, x_proj, dt_proj = (getattr(self, f"{name}{back}") for name in ("conv1d", "x_proj", "dt_proj"))
        x, z = xz.chunk(2, 1)
        x = F.silu(conv(x)[..., : x.shape[-1]])
        dt, B, C = x_proj(x.transpose(1, 2)).split([self.rank, self.n, self.n], -1)
        dt = F.softplus(dt_proj(dt)).transpose(1, 2)
        A, D = -getattr(self, f"A{back}_log").exp()[None], getattr(self, f"D{back}")[None]
        y = scan(x[:, None], dt[:, None], A, B.transpose(1, 2)[:, None], C.transpose(1, 2)[:, None], D)
        return y[:, 0] * F.silu(z)

    def forward(self, x):  # (b, l, d)
        xz = self.in_proj(x).transpose(1, 2)
        y = self.one_way(xz, "") + self.one_way(xz.flip(-1), "_b").flip(-1)
        return self.out_proj((y / 2 if self.div2 else y).transpose(1, 2))


class Vim(nn.Module):
    """Vim: patches, a class token in their middle, learned positions, blocks whose residual stream stays in float32 at least."""

    def __init__(
        self, depth=3, d=24, n=16, width=4, *, patch=16, image=64, n_classes=7, in_channels=3, token="middle", div2=True
    ):
        super().__init__()
        tokens = (image // patch) ** 2
        self.at = {"middle": tokens // 2, "first": 0, "last": tokens}[token]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(in_channels, d, patch, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens + 1, d))
        self.layers = nn.ModuleList()
        for _ in range(depth):
            layer = nn.Module()
            layer.mixer, layer.norm = Bimamba(d, n, width, div2), RMSNorm(d)
            self.layers.append(layer)
        self.norm_f, self.head = RMSNorm(d), nn.Linear(d, n_classes)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([x[:, : self.at], token, x[:, self.at :]], 1) + self.pos_embed
        residual = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for layer in self.layers:
            residual = residual + x
            x = layer.mixer(layer.norm(residual).to(x.dtype))
        return self.head(self.norm_f(residual + x)[:, self.at])


@torch.no_grad()
def drawn(model, seed=0, dtype=torch.float64):
    """The same model with values that make every path matter, in evaluation mode."""
    torch.manual_seed(seed)
    for name, p in model.to(dtype).named_parameters():
        last = name.rpartition(".")[2]
        p.normal_(std=0.3 if p.dim() < 2 else 1.5 / math.sqrt(p[0].numel()))
        if p.dim() == 1 and last in ("weight", "Ds", "D", "D_b"):
            p.add_(1.0)
        elif last == "A_logs" or last.endswith("_log"):
            p.mul_(0.5)
        elif last in ("pos_embed", "cls_token"):
            p.normal_(std=0.5)
    return model.eval()

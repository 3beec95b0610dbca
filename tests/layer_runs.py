"""Runs of a layer that a node of autograd and the calls of its parts are compared by, on the CPU and on a GPU."""

import torch

from hybridzoo.layers import Seq


def run(layer, x, seq=None, autocast=None):
    """Outputs, and the gradients of a loss that reads all real tokens, in the order of ``x`` and the named parameters."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = layer(x, seq=seq)
    out = y.double() if seq is None else y.double() * seq.valid[..., None]
    scale = torch.linspace(-1, 1, out.numel(), dtype=torch.double, device=x.device).view_as(out)
    named = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad((out * scale).sum(), list(named.values()))
    return y.detach(), dict(zip(named, grads, strict=True))


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def two_rows(kind, b, l):
    """Two rows on the CPU, packed, padded, or whole."""
    if kind == "packed":
        doc = torch.tensor([[0] * 3 + [1] * (l - 8) + [2] + [-1] * 4, [0] * (l - 7) + [1] * 7])
        return Seq.from_documents(doc)
    if kind == "padded":
        return Seq.from_mask(torch.arange(l) < torch.tensor([[l], [9]]))
    return None


def four_rows(kind, l):
    """Four long rows on a GPU, packed, padded, or whole."""
    if kind == "packed":
        doc = (torch.arange(l, device="cuda") // 300).expand(4, l).clone()
        doc[1:, l - 70 :] = -1
        return Seq.from_documents(doc)
    if kind == "padded":
        return Seq.from_mask(torch.arange(l, device="cuda") < torch.tensor([[l], [9], [l - 1], [1]], device="cuda"))
    return None

"""Gradients written side by side: the same values as from two tensors put together, and no memory given out twice."""

import shutil

import pytest
import torch

from hybridzoo.kernels import dispatch
from hybridzoo.kernels.conv import cuda as cuda_conv
from hybridzoo.kernels.conv import op as conv_op
from hybridzoo.kernels.gpu.split_gradients import halves, room
from hybridzoo.kernels.scan import op as scan_op
from hybridzoo.layers import Mamba, mamba

BF16 = torch.bfloat16
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Write(torch.autograd.Function):
    """Twice a half, with a gradient that is written where there is room for it."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        out = room(ctx.next_functions[0], g.dtype)
        assert out.shape == g.shape and out.stride(-1) == 1
        return out.copy_(2 * g)


@pytest.fixture
def joined(monkeypatch):
    """How often two gradients were put together."""
    calls, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *args, **kwargs: calls.append(1) or cat(*args, **kwargs))
    return calls


@pytest.fixture
def whole():
    return torch.randn(2, 5, 12, requires_grad=True)


def weighted(a, b):
    return (a * torch.arange(60.0).view(2, 5, 6)).sum() + (b * torch.arange(60.0, 120.0).view(2, 5, 6)).sum()


def expected(whole):
    return torch.autograd.grad(weighted(*(2 * m for m in whole.chunk(2, dim=-1))), whole)[0]


@pytest.mark.parametrize("later", [0, 1])
def test_two_gradients_become_one_tensor(later, whole, joined):
    parts = list(halves(whole * 1))
    outs = {i: Write.apply(parts[i]) for i in (later, 1 - later)}
    (g,) = torch.autograd.grad(weighted(outs[0], outs[1]), whole)
    assert torch.equal(g, expected(whole)) and joined == []


def test_gradients_from_elsewhere_are_put_together(whole, joined):
    a, b = halves(whole * 1)
    (g,) = torch.autograd.grad(weighted(2 * a, Write.apply(b)), whole)
    assert torch.equal(g, expected(whole)) and joined == [1]
    a, b = halves(whole * 1)
    (g,) = torch.autograd.grad(weighted(2 * a, 2 * b), whole)
    assert torch.equal(g, expected(whole)) and joined == [1, 1]


def test_a_half_that_is_read_twice_or_not_at_all(whole):
    a, b = halves(whole * 1)
    (g,) = torch.autograd.grad(weighted(Write.apply(a) / 2 + a, Write.apply(b)), whole)
    assert torch.equal(g, expected(whole))
    for used in (0, 1):
        part = halves(whole * 1)[used]
        (g,) = torch.autograd.grad(Write.apply(part).sum(), whole)
        ones = torch.zeros_like(whole)
        ones.chunk(2, dim=-1)[used].fill_(2)
        assert torch.equal(g, ones)


@pytest.mark.parametrize("which", [0, 1])
def test_a_hook_that_replaces_a_gradient(which, whole, joined):
    parts = halves(whole * 1)
    parts[which].register_hook(lambda g: g + 1)
    (g,) = torch.autograd.grad(weighted(*map(Write.apply, parts)), whole)
    want = expected(whole)
    want.chunk(2, dim=-1)[which].add_(1)
    assert torch.equal(g, want) and joined == [1]


def test_memory_is_given_out_once(whole):
    a, b = halves(whole * 1)
    loss = weighted(Write.apply(a), Write.apply(b))
    early = torch.autograd.grad(loss, b, retain_graph=True)[0]
    copy = early.clone()
    runs = [torch.autograd.grad(loss, whole, retain_graph=True)[0] for _ in range(3)]
    more = torch.autograd.grad(loss, (a, b), retain_graph=True)
    loss.backward()
    assert torch.equal(early, copy)
    everything = [early, *runs, *more, whole.grad]
    addresses = [m.data_ptr() for m in everything]
    assert len(set(addresses)) == len(addresses)
    for g in (*runs, torch.cat(more, -1), whole.grad):
        assert torch.equal(g, expected(whole))
    node = a.grad_fn
    given = [room((node, i), BF16) for i in (0, 0, 1, 1, 0)]
    assert len({m.data_ptr() for m in given}) == 5


def test_second_derivatives(whole):
    x = whole.double().detach().requires_grad_()

    def f(x):
        a, b = halves(x.sin())
        return a * b.exp()

    assert torch.autograd.gradgradcheck(f, x)


def test_nothing_else_has_room(whole):
    assert room((None, 0), BF16) is None
    assert room(((2 * whole).grad_fn, 0), BF16) is None


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "options", [{}, {"expand": 1, "d_model": 21}, {"dtype": BF16}], ids=["even", "odd", "bfloat16"]
)
def test_a_layer_on_our_kernels_joins_nothing(options, monkeypatch, joined):
    for module in (scan_op, conv_op):
        monkeypatch.setattr(module, "choose", lambda op, **facts: dispatch.TABLES[op]["cuda"])
    layer = Mamba(**{"d_model": 16, "d_state": 4, **options})
    x = torch.randn(2, 40, layer.in_proj.in_features, dtype=options.get("dtype"), requires_grad=True)
    leaves, results = [x, *layer.parameters()], []
    for how in (halves, lambda x: x.chunk(2, dim=-1)):
        monkeypatch.setattr(mamba, "halves", how)
        results.append(torch.autograd.grad(layer(x).square().sum(), leaves))
    assert joined == []
    for g, want in zip(*results, strict=True):
        assert torch.isfinite(g).all() and torch.equal(g, want)


@needs_compiler
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("d", "dtype"), [(40, torch.float32), (21, BF16), (40, BF16)], ids=["fp32", "odd", "bf16"])
def test_the_convolution_writes_into_a_half_and_nowhere_else(d, dtype):
    x, gout, weight = torch.randn(2, 70, d).to(dtype), torch.randn(2, 70, d).to(dtype), torch.randn(d, 4)
    call = cuda_conv.Call.of(x, weight, None, torch.randn(2, 3, d).to(dtype), None, True)
    want = cuda_conv.backward(call, gout)
    for half in (0, 1):
        around = torch.full((2, 70, 2 * d), float("nan"), dtype=dtype)
        got = cuda_conv.backward(call, gout, gx=around.chunk(2, dim=-1)[half])
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
        assert around.chunk(2, dim=-1)[1 - half].isnan().all()

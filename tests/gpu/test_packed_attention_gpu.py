"""Attention of packed rows on a GPU by documents' offsets: against documents one by one, compiled, captured, asking nobody."""

import math

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.kernels import Seq
from hybridzoo.kernels.dispatch import choose
from hybridzoo.layers import Attention

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
LENGTHS = [[1, 130, 64, 200], [395, 1], [100, 100, 100]]
L = 400
OPTIONS = {
    "plain": {},
    "groups": {"nheads_kv": 2},
    "window": {"window": 50, "nheads_kv": 1},
    "around": {"causal": False},
    "around window": {"causal": False, "window": 40, "nheads_kv": 2},
    "wide": {"headdim": 128, "nheads": 3},
    "odd": {"headdim": 96, "nheads": 2, "softmax_scale": 0.2, "qk_norm": True, "d_conv": 3},
}


def documents():
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS]
    return torch.stack([F.pad(row, (0, L - len(row)), value=-1) for row in rows])


def made(kind, dtype=BF16):
    torch.manual_seed(0)
    return Attention(256, **{"nheads": 4, **OPTIONS[kind]}, device="cuda", dtype=dtype)


def run(layer, x, g, seq):
    x = x.clone().requires_grad_()
    y = layer(x, seq=seq)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], g)
    # not y itself: its graph would keep the parameters to the stream of this call, which a later one may not record from
    return [y.detach(), *grads]


def worst(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("kind", OPTIONS)
def test_documents_are_alone(kind, dtype):
    """No further from float64 than twice what documents one by one are, in torch's scaled dot product."""
    layer, exact = made(kind, dtype), made(kind, torch.float64)
    exact.load_state_dict(layer.state_dict())
    doc = documents()
    torch.manual_seed(1)
    x, g = torch.randn(2, 3, L, 256, device="cuda", dtype=dtype)
    g[(doc < 0).cuda()] = 0
    facts = {
        "packed": True,
        "device": "cuda",
        "dtype": dtype,
        "headdim": layer.headdim,
        "window": layer.window is not None,
    }
    assert choose("attention", **facts).name == "varlen"

    wanted = run(exact, x.double(), g.double(), Seq.from_documents(doc, "cuda"))
    alone = [torch.zeros_like(t) for t in wanted]
    for row, lengths in enumerate(LENGTHS):
        for a, b in zip(
            [sum(lengths[:i]) for i in range(len(lengths))],
            [sum(lengths[: i + 1]) for i in range(len(lengths))],
            strict=True,
        ):
            y, gx, *rest = run(layer, x[row : row + 1, a:b], g[row : row + 1, a:b], None)
            alone[0][row, a:b], alone[1][row, a:b] = y[0], gx[0]
            for into, part in zip(alone[2:], rest, strict=True):
                into += part
    real = (doc >= 0).cuda()
    for seq in (
        Seq.from_documents(doc, "cuda"),
        Seq.from_documents(doc.cuda(), most=5),
        Seq.from_documents(doc, "cuda", most=30),
    ):
        got = run(layer, x, g, seq)
        for i, (a, b, c) in enumerate(zip(got, wanted, alone, strict=True)):
            if i < 2:
                a, b, c = a[real], b[real], c[real]
            assert worst(a, b) < 2 * worst(c, b) + 1e-3, i


def test_windows_of_rows_that_are_not_packed():
    layer = made("window")
    x, g = torch.randn(2, 2, 1500, 256, device="cuda", dtype=BF16)
    assert choose("attention", window=True, device="cuda", dtype=BF16).name == "varlen"
    exact = made("window", torch.float64)
    exact.load_state_dict(layer.state_dict())
    for got, want in zip(run(layer, x, g, None), run(exact, x.double(), g.double(), None), strict=True):
        assert worst(got, want) < 2e-2


@pytest.mark.parametrize("kind", ["groups", "window"])
def test_compiled(kind):
    layer, doc = made(kind), documents().cuda()
    x, g = torch.randn(2, 3, L, 256, device="cuda", dtype=BF16)
    compiled = torch.compile(lambda x, doc: layer(x, seq=Seq.from_documents(doc, most=5)), fullgraph=True)
    rows = x.clone().requires_grad_()
    y = compiled(rows, doc)
    got = [y, *torch.autograd.grad(y, [rows, *layer.parameters()], g)]
    for a, b in zip(got, run(layer, x, g, Seq.from_documents(doc, most=5)), strict=True):
        assert worst(a, b) < 2e-2


@pytest.mark.parametrize("kind", OPTIONS)
def test_nobody_waits_and_a_graph_records_it(kind):
    layer, doc = made(kind), documents().cuda()
    x, g = torch.randn(2, 3, L, 256, device="cuda", dtype=BF16)
    want = run(layer, x, g, Seq.from_documents(doc, most=5))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layer, x, g, Seq.from_documents(doc, most=5))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = doc.clone()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run(layer, x, g, Seq.from_documents(held, most=5))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(layer, x, g, Seq.from_documents(held, most=5))
    held.copy_(doc.roll(1, 0))
    graph.replay()
    other = run(layer, x, g, Seq.from_documents(doc.roll(1, 0), most=5))
    real = doc.roll(1, 0) >= 0
    assert torch.equal(got[0][real], other[0][real]) and not torch.equal(got[0][real], want[0][real])
    for a, b in zip(got[1:], other[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_second_derivatives_are_refused():
    layer, x = made("plain"), torch.randn(3, L, 256, device="cuda", dtype=BF16, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x, seq=Seq.from_documents(documents(), "cuda")).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: a kernel computes its gradient"):
        g.square().sum().backward()


@pytest.mark.parametrize("kind", OPTIONS)
def test_damage_stays_in_its_document(kind):
    layer, doc, hurt = made(kind), documents(), (0, 150)
    others = (doc != doc[hurt]).cuda()
    others[1:] = True
    x, g = torch.randn(2, 3, L, 256, device="cuda", dtype=BF16)
    want = run(layer, x, g, Seq.from_documents(doc, "cuda"))
    for which in (0, 1):
        damaged = [x.clone(), g.clone()]
        damaged[which][hurt] = math.nan
        got = run(layer, *damaged, Seq.from_documents(doc, "cuda"))
        assert torch.equal(got[0][others], want[0][others])
        torch.testing.assert_close(got[1][others], want[1][others], rtol=1e-2, atol=1e-2)
        assert got[1][0][doc[0] == doc[hurt]].isnan().any()

"""flash-attn, whichever generations are installed, against float64 and torch's scaled dot product, as attention calls it."""

import math

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.kernels import Seq, dispatch
from hybridzoo.kernels.dispatch import TABLES, choose
from hybridzoo.layers import Attention

NAMES = ("flash_attn", "flash_attn_4")
pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture(params=NAMES)
def flash(request, monkeypatch):
    """A generation that is installed and asked for by name."""
    reason = TABLES["attention"][request.param].refuse({"device": "cuda", "dtype": BF16})
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv(dispatch.ENV, request.param)
    return request.param


def seen(span, doc):
    """Which keys a query sees, (b, l, l): so many before it and behind it, of its document."""
    at, (left, right) = torch.arange(doc.shape[1], device=doc.device), span
    before = at[:, None] - at
    sees = doc[:, :, None] == doc[:, None, :]
    sees = sees if left < 0 else sees & (before <= left)
    return sees if right < 0 else sees & (before >= -right)


def by_formula(q, k, v, scale, sees):
    """In float64: q, k, v (b, l, h, p), and which keys a query sees."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhp,bkhp->bhqk", q, k) * (scale or q.shape[3] ** -0.5)
    return torch.einsum("bhqk,bkhp->bqhp", scores.masked_fill(~sees[:, None], -math.inf).softmax(-1), v)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


SHAPES = [
    # b, l, h, h_kv, p
    (2, 256, 4, 4, 64),
    (2, 301, 4, 2, 64),
    (1, 515, 6, 1, 128),
    (3, 77, 4, 4, 96),
    (2, 1, 4, 2, 128),
    (1, 129, 2, 2, 80),
]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(
    "rows", ["plain", "packed", "window", "packed window", "around", "packed around", "packed around window"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_further_from_float64_than_twice_sdpa(shape, rows, dtype, flash):
    b, l, h, h_kv, p = shape
    reason = TABLES["attention"][flash].refuse({"device": "cuda", "dtype": dtype, "headdim": p})
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(l)
    q, g = torch.randn(2, b, l, h, p, device="cuda", dtype=dtype)
    k, v = torch.randn(2, b, l, h_kv, p, device="cuda", dtype=dtype)
    left, scale = 32 if "window" in rows else -1, 0.2 if h_kv == 1 else None
    span = left, left if "around" in rows else 0
    doc = torch.zeros(b, l, dtype=torch.long, device="cuda")
    if "packed" in rows:
        doc = (torch.rand(b, l, device="cuda") < 0.03).cumsum(1)
    seq = Seq.from_documents(doc, most=int(doc.max()) + 2) if "packed" in rows else None

    def outputs(f, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        y = f(*inputs)
        return [y, *torch.autograd.grad(y, inputs, g.to(dtype))]

    sees = seen(span, doc)

    def sdpa(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, sees[:, None], scale=scale, enable_gqa=True).transpose(1, 2)

    exact = outputs(lambda q, k, v: by_formula(q, k, v, scale, sees), torch.float64)
    got = outputs(lambda q, k, v: TABLES["attention"][flash].run(q, k, v, seq, scale, span), dtype)
    torchs = outputs(sdpa, dtype)
    for name, a, b_, c in zip("yqkv", got, torchs, exact, strict=True):
        if c.norm() == 0:  # of one key, q and k have no gradient
            assert a.norm() < 1e-3 * g.norm()
            continue
        assert relative(a, c) < 2 * relative(b_, c) + 1e-3, name


@pytest.mark.parametrize(
    "options", [{}, {"nheads_kv": 2, "window": 60}, {"headdim": 128, "qk_norm": True}, {"causal": False}], ids=str
)
def test_a_layer_by_name(options, flash, monkeypatch):
    layer = Attention(256, 4, **options, device="cuda", dtype=BF16)
    x, g = torch.randn(2, 2, 300, 256, device="cuda", dtype=BF16)
    doc = torch.tensor([[0] * 100 + [1] * 150 + [-1] * 50, [0] * 299 + [1]]).cuda()
    for seq in (None, Seq.from_documents(doc, most=3)):
        results = []
        for name in (flash, "sdpa"):
            monkeypatch.setenv(dispatch.ENV, name)
            rows = x.clone().requires_grad_()
            y = layer(rows, seq=seq)
            grads = torch.autograd.grad(y, [rows, *layer.parameters()], g.masked_fill((doc < 0)[..., None], 0))
            results.append([y if seq is None else y[seq.valid], *grads])
        for got, want in zip(*results, strict=True):
            assert relative(got, want.double()) < 2e-2


@pytest.mark.parametrize("causal", [True, False])
def test_damage_stays_in_its_document(causal, flash):
    layer = Attention(256, 4, 2, causal=causal, device="cuda", dtype=BF16)
    doc = torch.tensor([[0] * 130 + [1] * 120 + [2] * 50]).cuda()
    x, g = torch.randn(2, 1, 300, 256, device="cuda", dtype=BF16)
    others, results = (doc != 1)[0], []
    for which in (None, 0, 1):
        rows, grad = x.clone(), g.clone()
        if which is not None:
            (rows, grad)[which][0, 200] = math.nan
        rows.requires_grad_()
        y = layer(rows, seq=Seq.from_documents(doc, most=3))
        results.append((y, torch.autograd.grad(y, rows, grad)[0]))
    for y, gx in results[1:]:
        torch.testing.assert_close(y[0, others], results[0][0][0, others])
        torch.testing.assert_close(gx[0, others], results[0][1][0, others], rtol=1e-2, atol=1e-2)
        assert gx[0, ~others].isnan().any()


def test_a_graph_records_it(flash):
    layer = Attention(512, 4, 2, device="cuda", dtype=BF16)
    x, doc = torch.randn(2, 256, 512, device="cuda", dtype=BF16), torch.zeros(2, 256, dtype=torch.long, device="cuda")

    def step():
        rows = x.detach().requires_grad_()
        y = layer(rows, seq=Seq.from_documents(doc, most=3))
        return y, torch.autograd.grad(y.sum(), rows)[0]

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gx = step()
    doc[:, 100:] = 1
    graph.replay()
    want, wanted = step()
    assert torch.equal(y, want)
    torch.testing.assert_close(gx, wanted, rtol=1e-2, atol=1e-2)


def test_second_derivatives_are_refused(flash):
    layer, x = Attention(256, 4, device="cuda", dtype=BF16), torch.randn(1, 64, 256, device="cuda", dtype=BF16)
    x.requires_grad_()
    (g,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: a kernel computes its gradient"):
        g.square().sum().backward()


def test_generation_4_is_chosen_where_it_pays():
    reason = TABLES["attention"]["flash_attn_4"].refuse({"device": "cuda", "dtype": BF16})
    if reason is not None:
        pytest.skip(reason)
    facts = {"device": "cuda", "dtype": BF16}
    assert choose("attention", headdim=128, length=4096, **facts).name == "flash_attn_4"
    assert choose("attention", headdim=64, length=2048, **facts).name == "sdpa"
    assert choose("attention", headdim=64, length=4096, window=True, **facts).name == "flash_attn_4"
    assert choose("attention", headdim=64, length=512, window=True, **facts).name == "varlen"
    assert choose("attention", headdim=80, length=4096, window=True, **facts).name == "varlen"

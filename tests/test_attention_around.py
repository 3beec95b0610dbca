"""Attention without causality: against torch.nn.MultiheadAttention and a loop over tokens, and what its rows must not see."""

import math

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.kernels import Seq
from hybridzoo.layers import Attention

NAN, INF = math.nan, math.inf
OPTIONS = [{}, {"window": 1}, {"window": 4}, {"window": 40}, {"nheads_kv": 1, "rope": None, "window": 3}]
MASK = torch.tensor([[0] * 3 + [1] * 20, [1] * 23, [1] * 9 + [0] * 14, [1] + [0] * 22, [1, 0] * 11 + [1]])
DOC = torch.tensor([[0] * 9 + [1] * 4 + [2] * 7 + [-1] * 3, [0] * 1 + [1] * 22])


def around(options, d=16, nheads=4):
    return Attention(d, nheads, causal=False, **options).double()


def loop(layer, x):
    """Every token of (l, d) by itself."""
    h, g, p, window = layer.nheads, layer.nheads_kv, layer.headdim, layer.window or len(x)
    q, k, v = (t.unflatten(1, (-1, p)) for t in (x @ layer.in_proj.weight.t()).split([h * p, g * p, g * p], 1))
    if layer.rope is not None:
        angles = torch.outer(torch.arange(len(x)), layer.rope ** (-torch.arange(0, p, 2) / p)).double()
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        q, k = (torch.complex(*t.chunk(2, -1)) * turn for t in (q, k))
        q, k = (torch.cat([t.real, t.imag], -1) for t in (q, k))
    out = []
    for i in range(len(x)):
        near = range(max(0, i - window + 1), min(len(x), i + window))
        heads = []
        for head in range(h):
            kv = head // (h // g)
            weights = torch.stack([q[i, head] @ k[j, kv] * p**-0.5 for j in near]).softmax(0)
            heads.append(sum(w * v[j, kv] for w, j in zip(weights, near, strict=True)))
        out.append(torch.cat(heads) @ layer.out_proj.weight.t())
    return torch.stack(out)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_outputs_and_gradients_equal_a_loop_over_tokens(length, options):
    layer, x = around(options), torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    y, want = layer(x), torch.stack([loop(layer, row) for row in x])
    torch.testing.assert_close(y, want, atol=1e-6, rtol=1e-6)  # the layer's angles are float32
    leaves, weight = [x, *layer.parameters()], torch.randn_like(y)
    for got, ref in zip(*(torch.autograd.grad((m * weight).sum(), leaves) for m in (y, want)), strict=True):
        torch.testing.assert_close(got, ref, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["apart", "masked", "compiled"])
def test_padded_rows_equal_multihead_attention(how, monkeypatch):
    layer = Attention(16, 4, rope=None, qkv_bias=True, out_bias=True, causal=False).double()
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight, theirs.in_proj_bias = layer.in_proj.weight, layer.in_proj.bias
    theirs.out_proj.weight, theirs.out_proj.bias = layer.out_proj.weight, layer.out_proj.bias
    for p in layer.parameters():
        p.data.normal_()
    if how == "masked":
        monkeypatch.setattr(Seq, "documents", lambda seq: None)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if how == "compiled" else layer
    x, seq, real = torch.randn(5, 23, 16, dtype=torch.float64), Seq.from_mask(MASK), MASK.bool()
    leaves = [x.requires_grad_(), *layer.parameters()]
    y = seq.restore(call(seq.align(x), seq=seq))
    # with weights, it is matrix products and a softmax
    want, _ = theirs(x, x, x, key_padding_mask=~real, need_weights=True)
    torch.testing.assert_close(y[real], want[real], atol=1e-10, rtol=1e-10)
    assert not y[~real].any()
    for got, ref in zip(*(torch.autograd.grad(m[real].sin().sum(), leaves) for m in (y, want)), strict=True):
        torch.testing.assert_close(got, ref, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"window": 300}], ids=str)
def test_long_rows_are_cut_into_blocks(options):
    layer, x = around(options), torch.randn(1, 2100, 16, dtype=torch.float64)
    at = torch.arange(2100)
    near = (at[:, None] - at).abs() < options.get("window", 2100)

    def by_one_mask(x):
        q, k, v = layer._heads(layer._project(x), at[: x.shape[1]])
        here = near[: x.shape[1], : x.shape[1]]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.mT * 2**-1).masked_fill(~here, -INF)
        return layer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_one_mask(x), atol=1e-10, rtol=1e-10)
        want = torch.cat([by_one_mask(x[:, :900]), by_one_mask(x[:, 900:])], 1)
        packed = Seq.from_cu_seqlens([0, 900, 2100], 1, 2100)
        torch.testing.assert_close(layer(x, seq=packed), want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("how", ["apart", "masked", "compiled"])
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_what_is_not_finite_stays_in_its_document(rows, how, window, monkeypatch):
    layer = Attention(16, 4, 2, causal=False, window=window, qkv_bias=True)
    seq = Seq.from_documents(DOC) if rows == "packed" else Seq.from_mask((DOC >= 0).long() * (DOC < 2))
    if how == "masked":
        monkeypatch.setattr(Seq, "documents", lambda seq: None)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if how == "compiled" else layer
    x, gout = torch.randn(2, 2, 23, 16)
    hurt_at, mine = 10, torch.zeros(2, 23, dtype=torch.bool)
    mine[0] = (seq.doc[0] == seq.doc[0, hurt_at]) & seq.valid[0]
    others = seq.valid & ~mine

    def run(x, g):
        x = x.clone().requires_grad_()
        y = call(x, seq=seq)
        return y, *torch.autograd.grad(y, [x, layer.in_proj.weight], g)

    want_y, want_gx, _ = run(x, gout)
    for hurt in ("x", "gout"):
        for value in (NAN, INF):
            damaged, g = x.clone(), gout.clone()
            (damaged if hurt == "x" else g)[0, hurt_at, 0] = value
            y, gx, gw = run(damaged, g)
            torch.testing.assert_close(y[others], want_y[others])
            torch.testing.assert_close(gx[others], want_gx[others])
            assert not gw.isfinite().all() and gx[0, hurt_at].isnan().any()
            if hurt == "gout":
                torch.testing.assert_close(y, want_y)
            elif value is NAN:
                near = (torch.arange(23) - hurt_at).abs() < (window or 23)
                assert y[0, mine[0] & near].isnan().all()
            if hurt == "gout" and window is None:
                assert gx[mine].isnan().any(1).all()


def test_there_is_no_state_and_no_token_by_token():
    layer, x = around({}), torch.randn(2, 5, 16, dtype=torch.float64)
    assert layer.capabilities == {"packing", "padding"} and not layer.can("causal")
    assert Attention(16, 4).can("state") and layer.init_state(2, 5) == () and layer.state_bytes(64) == 0
    for call in (
        lambda: layer(x, return_state=True),
        lambda: layer(x, Attention(16, 4).init_state(2, 5)),
        lambda: layer.step(x[:, 0], ()),
    ):
        with pytest.raises(
            NotImplementedError, match=r"Attention does not support 'state' \(it declares: packing, padd"
        ):
            call()


def test_a_language_model_with_it_is_an_error():
    with pytest.raises(
        zoo.ConfigError, match=r"mixers\.attention \(attention\): block 0 .* language model needs 'causal'"
    ):
        zoo.config("transformer-tiny", ["mixers.attention.causal=false"])


def test_a_map_is_seen_whole():
    """An attention among mixers of maps takes their rows as they are, whatever the size."""
    layer, x = around({"rope": None}), torch.randn(2, 15, 16, dtype=torch.float64)
    turned = torch.randperm(15)
    y = layer(x, seq=Seq.from_grid((3, 5), 2, 15))
    torch.testing.assert_close(layer(x[:, turned], seq=Seq.from_grid((5, 3), 2, 15)), y[:, turned])

"""NaN and infinity stay where they belong: in their packed document, and at padding nowhere at all; forward, backward and in the state."""

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.kernels import Seq, causal_conv1d, selective_scan, ssd
from hybridzoo.layers import Attention, Mamba, Mamba2

L, WHERE = 44, slice(13, 30)
OTHERS = [t for t in range(L) if not WHERE.start <= t < WHERE.stop]
PACKED = Seq.from_cu_seqlens([0, 13, 30, 44], 1, L)
ROWS = Seq.from_documents(torch.tensor([[0] * 13 + [1] * 17 + [2] * 10 + [-1] * 4, [0] * 30 + [1] * 14]))
NAN, INF = float("nan"), float("inf")


def scan(b):
    d, n = 4, 3
    u, dt, z = torch.randn(3, b, L, d)
    B, C = torch.randn(2, b, L, 2, n)
    state = torch.randn(b, d, n)
    return {
        "u": u,
        "dt": dt,
        "A": -torch.rand(d, n),
        "B": B,
        "C": C,
        "D": torch.randn(d),
        "z": z,
        "initial_state": state,
    }


def dual(b):
    h, p, n = 4, 3, 5
    x, z = torch.randn(2, b, L, h, p)
    B, C = torch.randn(2, b, L, 2, n)
    state = torch.randn(b, h, p, n)
    rest = {"D": torch.randn(h, p), "z": z, "dt_bias": torch.randn(h), "initial_state": state}
    return {"x": x, "dt": torch.randn(b, L, h), "A": -torch.rand(h), "B": B, "C": C, **rest}


def conv(b):
    return {
        "x": torch.randn(b, L, 4),
        "weight": torch.randn(4, 4),
        "bias": torch.randn(4),
        "initial_state": torch.randn(b, 3, 4),
    }


OPS = {
    "scan": (scan, lambda **x: selective_scan(**x, dt_softplus=True, return_final_state=True)),
    "ssd": (dual, lambda **x: ssd(**x, dt_softplus=True, chunk_size=8, return_final_state=True)),
    "conv": (conv, lambda **x: causal_conv1d(**x, activation="silu", return_final_state=True)),
}


def run(op, inputs, seq, gout, backend):
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y, state = op(**inputs, seq=seq, backend=backend)
    grads = torch.autograd.grad([y, state], list(inputs.values()), [gout, torch.ones_like(state)])
    return {"y": y, "state": state, **{f"g{name}": g for name, g in zip(inputs, grads, strict=True)}}


def in_rows(results):
    return {name: x for name, x in results.items() if x.dim() > 2 and x.shape[1] == L}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("op", OPS)
def test_packed_documents_are_alone(op, backend):
    make, call = OPS[op]
    inputs = make(1)
    gout = torch.randn_like(inputs["u" if op == "scan" else "x"])
    want = run(call, inputs, PACKED, gout, backend)
    for name in [*in_rows(inputs), "gout"]:
        for value, at in ((NAN, 20), (INF, 13), (-INF, 29)):
            damaged, g = {n: x.clone() for n, x in inputs.items()}, gout.clone()
            (g if name == "gout" else damaged[name])[0, at, ..., 0] = value
            got = run(call, damaged, PACKED, g, backend)
            for what, x in in_rows(got).items():
                assert torch.equal(x[:, OTHERS], want[what][:, OTHERS]), (name, value, what)
            for what in ("state", "ginitial_state"):
                assert torch.equal(got[what], want[what]), (name, value, what)
            # and it is not hidden
            if (name, value) not in (("dt", -INF), ("dt", INF), ("x", -INF)):
                assert not all(x.isfinite().all() for x in got.values()), (name, value)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("op", OPS)
def test_padding_is_not_there(op, backend):
    make, call = OPS[op]
    inputs, pads = make(2), ~ROWS.valid
    gout = torch.randn_like(inputs["u" if op == "scan" else "x"])
    want = run(call, inputs, ROWS, gout, backend)
    for name in [*in_rows(inputs), "gout"]:
        damaged, g = {n: x.clone() for n, x in inputs.items()}, gout.clone()
        (g if name == "gout" else damaged[name])[pads] = NAN
        got = run(call, damaged, ROWS, g, backend)
        for what, x in got.items():
            keep = ROWS.valid if what in in_rows(got) else slice(None)
            assert torch.equal(x[keep], want[what][keep]), (name, what)


LAYERS = {
    "mamba": lambda: Mamba(8, d_state=4, bcdt_norm=True),
    "mamba2": lambda: Mamba2(8, d_state=4, headdim=4, chunk_size=8),
    "attention": lambda: Attention(8, nheads=2, nheads_kv=1, d_conv=3, qkv_bias=True),
    "window": lambda: Attention(8, nheads=2, window=6),
}


def layered(layer, x, seq, gout):
    x = x.clone().requires_grad_()
    y, state = layer(x, seq=seq, return_state=True)
    after = layer.step(torch.ones(x.shape[0], x.shape[2]), state)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], gout)
    return y, after, grads[0], grads[1:]


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_over_packed_documents(kind):
    layer, x, gout = LAYERS[kind](), torch.randn(1, L, 8), torch.randn(1, L, 8)
    y, after, gx, _ = layered(layer, x, PACKED, gout)
    for hurt in ("x", "gout"):
        damaged, g = x.clone(), gout.clone()
        (damaged if hurt == "x" else g)[0, 20, 0] = NAN
        got, later, ggot, gweights = layered(layer, damaged, PACKED, g)
        for one, other in ((got, y), (ggot, gx)):
            torch.testing.assert_close(one[:, OTHERS], other[:, OTHERS])
        torch.testing.assert_close(later, after)
        assert ggot[:, WHERE].isnan().any() and any(w.isnan().any() for w in gweights)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_over_padding(kind, left):
    layer, x, gout = LAYERS[kind](), torch.randn(2, L, 8), torch.randn(2, L, 8)
    mask = torch.ones(2, L)
    mask[0, slice(0, 9) if left else slice(L - 9, L)] = 0
    if not left:
        mask[1, 7] = 0
    seq = Seq.from_mask(mask)
    rows, grows = seq.align(x), gout
    y, after, gx, gweights = layered(layer, rows, seq, grows)
    pads = ~seq.valid
    rows, grows = rows.clone(), grows.clone()
    rows[pads], grows[pads] = NAN, INF
    got, later, ggot, gw = layered(layer, rows, seq, grows)
    for one, other in ((got, y), (ggot, gx)):
        assert torch.equal(one[seq.valid], other[seq.valid])
    assert torch.equal(later, after) and all(torch.equal(a, b) for a, b in zip(gw, gweights, strict=True))


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny", "transformer-tiny", "zamba2-tiny", "jamba-tiny"])
def test_models(name):
    # in float64: an expert that gets another number of rows sums up in another order, and gradients here reach hundreds
    model = zoo.build(name, ["tie_embeddings=false"]).double().eval()
    x = model.backbone.embed(torch.randint(1, 256, (1, 24))).detach()
    mask = torch.ones(1, 24, dtype=torch.long)
    mask[0, :3] = mask[0, 9] = 0
    ways = {
        "packed": ({"cu_seqlens": [0, 7, 15, 24]}, [*range(7), *range(15, 24)]),
        "padded": ({"attention_mask": mask}, [*range(3, 9), *range(10, 24)]),
    }
    for how, places in ways.values():
        results = []
        for bad in (0.0, NAN):
            embeds = x.clone()
            embeds[0, 9] += bad
            embeds.requires_grad_()
            out = model(inputs_embeds=embeds, **how)
            weights = torch.zeros_like(out.logits).index_fill(1, torch.tensor(places), 1.0)
            loss = torch.where(weights > 0, out.logits.sin(), 0.0).sum()
            grad = torch.autograd.grad(loss, embeds)[0]
            step = model.step(torch.tensor([5]), out.state)
            results.append((out.logits[0, places], grad[0, places], step))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "compiled"),
    [({"nheads_kv": 1, "d_conv": 3, "qkv_bias": True}, True), ({}, False), ({"window": 6}, False)],
)
def test_attention_that_does_not_know_the_documents(options, compiled, monkeypatch):
    layer = Attention(8, nheads=2, **options)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    monkeypatch.setattr(Seq, "documents", lambda seq: None)

    def run(x, g):
        x = x.clone().requires_grad_()
        y = call(x, seq=Seq.from_documents(ROWS.doc))
        return y, *torch.autograd.grad(y, [x, layer.in_proj.weight], g)

    x, gout = torch.randn(2, 2, L, 8)
    want_y, want_gx, _ = run(x, gout)
    others = torch.ones(2, L, dtype=torch.bool)
    others[0, WHERE] = False
    for hurt in ("x", "gout"):
        for value, at in ((NAN, 20), (INF, 13), (-INF, 29)):
            damaged, g = x.clone(), gout.clone()
            (damaged if hurt == "x" else g)[0, at, 0] = value
            y, gx, gw = run(damaged, g)
            assert torch.equal(y[others], want_y[others]) and torch.equal(gx[others], want_gx[others])
            assert gx[0, at].isnan().all() and not gw.isfinite().all()
            # what may see it, and nothing else
            seen = range(at, min(at + options.get("window", L), WHERE.stop)) if hurt == "x" else []
            assert y[0].isnan().any(1).nonzero()[:, 0].tolist() == [*seen]


def test_attention_apart_is_attention_behind_a_mask():
    for layer in (Attention(16, nheads=2, nheads_kv=1), Attention(16, nheads=2, window=5)):
        for seq in (
            PACKED,
            ROWS,
            Seq.from_documents(torch.arange(L)[None] // 3),
            Seq.from_cu_seqlens([0, 0, L, L], 1, L),
        ):
            x = torch.randn(*seq.doc.shape, 16, requires_grad=True)
            ys = [layer(x, seq=seq), layer(x, seq=seq)]
            q, k, v = layer._heads(layer._project(x), seq.pos)
            masked = layer.out_proj(layer._mix(q, k, v, seq.pos, seq.pos, seq.doc, seq.doc))
            ys[1] = masked
            ys = [y[seq.valid] for y in ys]
            torch.testing.assert_close(*ys)
            torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in ys))

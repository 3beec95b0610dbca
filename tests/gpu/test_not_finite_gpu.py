"""On a GPU too, NaN and infinity stay in their packed document, and padding is not there; the host does not wait to find out."""

import pytest
import torch

from hybridzoo.kernels import Seq, causal_conv1d, selective_scan, ssd
from hybridzoo.layers import Attention, Mamba, Mamba2

pytestmark = pytest.mark.gpu

L, WHERE, HURT = 700, slice(260, 471), 300
OTHERS = [t for t in range(L) if not WHERE.start <= t < WHERE.stop]


def packed():
    return Seq.from_cu_seqlens([0, WHERE.start, WHERE.stop, L], 1, L, "cuda")


def operands(op, dtype):
    if op == "conv":
        return {"x": torch.randn(1, L, 64), "weight": torch.randn(64, 4)}
    if op == "ssd":
        x, z = torch.randn(2, 1, L, 4, 16)
        B, C = torch.randn(2, 1, L, 2, 16)
        return {"x": x, "dt": torch.randn(1, L, 4), "A": -torch.rand(4), "B": B, "C": C, "z": z}
    u, dt, z = torch.randn(3, 1, L, 64)
    B, C = torch.randn(2, 1, L, 2, 16)
    return {"u": u, "dt": dt, "A": -torch.rand(64, 16), "B": B, "C": C, "z": z}


def call(op, inputs, gout):
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    options = {"scan": {"dt_softplus": True}, "ssd": {"dt_softplus": True}, "conv": {"activation": "silu"}}[op]
    y = {"scan": selective_scan, "ssd": ssd, "conv": causal_conv1d}[op](**inputs, **options, seq=packed())
    grads = torch.autograd.grad(y, list(inputs.values()), gout)
    return {
        "y": y,
        **{name: g for (name, x), g in zip(inputs.items(), grads, strict=True) if x.dim() > 1 and x.shape[1] == L},
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["scan", "ssd", "conv"])
def test_packed_documents_are_alone(op, dtype, value):
    inputs = {
        name: x.cuda() if name in ("A", "weight") else x.to("cuda", dtype) for name, x in operands(op, dtype).items()
    }
    gout = torch.randn_like(next(iter(inputs.values())))
    want = call(op, inputs, gout)
    for name in [*(n for n, x in inputs.items() if x.dim() > 1 and x.shape[1] == L), "gout"]:
        damaged, g = {n: x.clone() for n, x in inputs.items()}, gout.clone()
        (g if name == "gout" else damaged[name])[0, HURT] = value
        got = call(op, damaged, g)
        for what, x in got.items():
            assert torch.equal(x[:, OTHERS], want[what][:, OTHERS]), (name, what)
        assert not all(x.isfinite().all() for x in got.values()) or (op, name) == ("conv", "x")


LAYERS = {
    "mamba": lambda: Mamba(64, device="cuda"),
    "mamba2": lambda: Mamba2(64, d_state=16, headdim=16, device="cuda"),
    "attention": lambda: Attention(64, nheads=4, device="cuda"),
    "window": lambda: Attention(64, nheads=4, window=100, device="cuda"),
    "around": lambda: Attention(64, nheads=4, causal=False, device="cuda"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind):
    layer, x = LAYERS[kind](), torch.randn(1, L, 64, device="cuda")
    gout = torch.randn_like(x)
    results = []
    for hurt in (None, "x", "gout"):
        rows, g = x.clone(), gout.clone()
        if hurt is not None:
            (rows if hurt == "x" else g)[0, HURT] = float("nan")
        rows.requires_grad_()
        y = layer(rows, seq=packed())
        results.append((y, torch.autograd.grad(y, rows, g)[0]))
    for got in results[1:]:
        for one, other in zip(got, results[0], strict=True):
            torch.testing.assert_close(one[:, OTHERS], other[:, OTHERS], atol=1e-5, rtol=1e-4)
        assert got[1][:, WHERE].isnan().any()


@pytest.mark.parametrize("kind", LAYERS)
def test_padding_is_not_there(kind):
    layer, x = LAYERS[kind](), torch.randn(2, L, 64, device="cuda")
    mask = torch.ones(2, L, device="cuda")
    mask[0, -50:] = 0
    seq, results = Seq.from_mask(mask), []
    for fill in (0.0, float("nan")):
        rows, g = x.clone(), torch.ones_like(x)
        rows[0, -50:] = g[0, -50:] = fill
        rows.requires_grad_()
        y = layer(rows, seq=seq)
        grads = torch.autograd.grad(y, [rows, *layer.parameters()], g)
        results.append((y[seq.valid], grads[0][seq.valid], *grads[1:]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_nobody_waits_for_the_device(kind):
    layer, x = LAYERS[kind](), torch.randn(1, L, 64, device="cuda", requires_grad=True)
    seq, fresh = packed(), packed()
    layer(x, seq=seq).sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, seq=fresh).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""Calls at the edge: no token, an empty batch, and types that nothing is computed in."""

import pytest
import torch

import hybridzoo as zoo
from hybridzoo import kernels
from hybridzoo.layers import MLP, Attention, Mamba, Mamba2, MoE


def scan(b, l):
    u, dt, B, C = torch.randn(b, l, 4), torch.rand(b, l, 4), torch.randn(b, l, 2), torch.randn(b, l, 2)
    return {"u": u, "dt": dt, "A": -torch.rand(4, 2), "B": B, "C": C, "initial_state": torch.randn(b, 4, 2)}


def ssd(b, l):
    B, C = torch.randn(2, b, l, 1, 2)
    x, dt = torch.randn(b, l, 2, 3), torch.rand(b, l, 2)
    return {"x": x, "dt": dt, "A": -torch.rand(2), "B": B, "C": C, "initial_state": torch.randn(b, 2, 3, 2)}


def conv(b, l):
    return {
        "x": torch.randn(b, l, 4),
        "weight": torch.randn(4, 3),
        "bias": torch.randn(4),
        "initial_state": torch.randn(b, 2, 4),
    }


def scan_step(b, l):
    made = {name: x[:, 0] if x.dim() == 3 and x.shape[1] == l else x for name, x in scan(b, l).items()}
    return {"state": made.pop("initial_state")} | made


def ssd_step(b, l):
    made = {name: x[:, 0] if x.dim() > 2 and x.shape[1] == l else x for name, x in ssd(b, l).items()}
    return {"state": made.pop("initial_state")} | made


def conv_step(b, l):
    made = conv(b, l)
    return {"x": made["x"][:, 0], "state": made["initial_state"], "weight": made["weight"], "bias": made["bias"]}


SEQUENCES = {"selective_scan": scan, "ssd": ssd, "causal_conv1d": conv}
OPS = SEQUENCES | {
    "selective_state_update": scan_step,
    "ssd_state_update": ssd_step,
    "causal_conv1d_update": conv_step,
    "rms_norm": lambda b, l: {"x": torch.randn(b, l, 4), "weight": torch.randn(4)},
    "layer_norm": lambda b, l: {"x": torch.randn(b, l, 4), "weight": torch.randn(4), "bias": torch.randn(4)},
    "gated_rms_norm": lambda b, l: {"x": torch.randn(b, l, 4), "gate": torch.randn(b, l, 4), "weight": torch.randn(4)},
}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("sizes", [(2, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("op", SEQUENCES)
def test_nothing_to_do(op, sizes, backend):
    made = {name: x.requires_grad_() for name, x in SEQUENCES[op](*sizes).items()}
    wide = made["u" if op == "selective_scan" else "x"]
    y, state = getattr(kernels, op)(**made, backend=backend, return_final_state=True)
    assert y.shape == wide.shape and state.shape == made["initial_state"].shape
    if not sizes[1]:
        assert torch.equal(state, made["initial_state"])
    loss = y.sum() + (state * 3).sum()
    grads = torch.autograd.grad(loss, [wide, made["initial_state"]])
    assert grads[0].shape == wide.shape and (sizes[1] or torch.equal(grads[1], torch.full_like(state, 3.0)))


LAYERS = {
    "mamba": lambda: Mamba(8),
    "mamba2": lambda: Mamba2(8, headdim=4, d_state=4),
    "attention": lambda: Attention(8, nheads=2, d_conv=3),
    "window": lambda: Attention(8, nheads=2, window=3),
    "mlp": lambda: MLP(8, 4),
    "moe": lambda: MoE(8, 4, num_experts=2, top_k=1),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_with_nothing_to_do(kind):
    layer = LAYERS[kind]()
    x = torch.randn(2, 5, 8)
    y, state = layer(x, return_state=True)
    # no token, in the middle of a row and at its start, changes nothing
    none, same = layer(x[:, :0], state, return_state=True)
    _, fresh = layer(x[:, :0], return_state=True)
    assert none.shape == (2, 0, 8)
    more = torch.randn(2, 3, 8)
    torch.testing.assert_close(layer(more, same, return_state=True)[0], layer(more, state, return_state=True)[0])
    torch.testing.assert_close(layer(x, fresh, return_state=True)[0], y)
    empty, state = layer(x[:0].requires_grad_(), return_state=True)
    empty.sum().backward()
    assert empty.shape == (0, 5, 8) and layer(x[:0, :2], state, return_state=True)[0].shape == (0, 2, 8)
    assert layer.step(x[:0, 0], layer.init_state(0, 4)).shape == (0, 8)


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
@pytest.mark.parametrize("batch", [0, 2])
def test_a_state_with_gradients_can_be_stepped_whatever_its_sizes(kind, batch):
    for d_state in (1, 2):
        layer = kind(8, d_state=d_state, **{"headdim": 4} if kind is Mamba2 else {})
        x = torch.randn(batch, 4, 8, requires_grad=True)
        _, state = layer(x[:, :3], return_state=True)
        stepped = layer.step(x[:, 3], state)
        torch.testing.assert_close(stepped, layer(x)[:, 3])
        (gx,) = torch.autograd.grad(stepped.sin().sum(), x)
        torch.testing.assert_close(gx, torch.autograd.grad(layer(x)[:, 3].sin().sum(), x)[0])


def test_models_with_nothing_to_do():
    model = zoo.build("jamba-tiny")
    ids = torch.zeros(0, 5, dtype=torch.long)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.loss == 0 and model(ids).logits.shape == (0, 5, 256)
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(b, l\) with l >= 1, got \(1, 0\)"):
        model(torch.zeros(1, 0, dtype=torch.long))


def test_token_ids_of_every_integer_type():
    model, ids = zoo.build("mamba-tiny"), torch.randint(1, 256, (2, 5))
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16):
        got, want = (model(i, labels=i, return_state=True) for i in (ids.to(dtype), ids))
        assert torch.equal(got.logits, want.logits) and got.loss == want.loss
        with torch.no_grad():
            assert torch.equal(model.step(ids[:, 0].to(dtype), got.state), model.step(ids[:, 0], want.state))
    with pytest.raises(ValueError, match=r"labels: expected integers, got torch\.float32"):
        model(ids, labels=ids.float())
    with pytest.raises(ValueError, match=r"input_ids: expected integers, got torch\.bool"):
        model.step(ids[:, 0] > 0, want.state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("op", OPS)
def test_types_that_nothing_is_computed_in(op, dtype):
    for name, x in OPS[op](2, 5).items():
        made = OPS[op](2, 5) | {name: x.to(dtype)}
        more = {"eps": 1e-5} if op.endswith("_norm") else {}
        what = f"{op}: ({name}|{name.replace('_', ' ')}) has dtype {dtype}, expected"
        with pytest.raises(ValueError, match=what):
            getattr(kernels, op)(**made, **more)


def test_types_may_be_mixed():
    for op, make in SEQUENCES.items():
        made = make(2, 5)
        want = getattr(kernels, op)(**made)
        for name, x in made.items():
            for dtype in (torch.float64, torch.bfloat16):
                got = getattr(kernels, op)(**made | {name: x.to(dtype)})
                torch.testing.assert_close(got.float(), want, atol=0.1, rtol=0.1)

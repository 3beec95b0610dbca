"""What Mamba layers keep for their backward on a GPU, by the allocator's count, and that it changes no bit of a gradient.

Layers whose parts are called one by one; what keeps the same as one node of autograd is in ``test_mamba_layer.py``.
"""

import contextlib

import pytest
import torch
from torch import nn

from hybridzoo.kernels.scan import cuda as cuda_ops
from hybridzoo.layers import Mamba, Seq, mamba

pytestmark = pytest.mark.gpu

BF16, D, B = torch.bfloat16, 768, 4


@pytest.fixture(autouse=True)
def _parts(monkeypatch):
    monkeypatch.setattr(Mamba, "_as_one", lambda self, x: None)


@contextlib.contextmanager
def keeping():
    """Autograd keeps everything, as without recomputation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba, "recomputing", lambda: contextlib.nullcontext(lambda x: x))
        yield


def bytes_now(when="current"):
    torch.cuda.synchronize()
    # what was asked for: blocks of the allocator may be larger
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def warm_up(layer):
    """What the first products of a thread take and keep is not ours to count."""
    for _ in range(2):
        under_autocast(layer, torch.randn(B, 1024, D, device="cuda")).sum().backward()
    layer.zero_grad()


def under_autocast(layer, x):
    with torch.autocast("cuda", BF16):
        return layer(x)


def kept(layer, l, way):
    x = torch.randn(B, l, D, device="cuda", requires_grad=True)
    before = bytes_now()
    with way(), torch.autocast("cuda", BF16):
        y = layer(x)
    held = bytes_now() - before - y.untyped_storage().nbytes()
    y.sum().backward()
    del y
    x.grad = None
    layer.zero_grad()
    assert bytes_now() == before
    return held


def test_bytes_kept_per_token():
    layer = Mamba(D, device="cuda")
    warm_up(layer)
    # the inputs of in_proj 2, x and z 8, states 4, outputs 4; then what x_proj gives
    expected = 18 + 2 * (layer.dt_rank + 2 * layer.d_state) / D
    for way, more in ((contextlib.nullcontext, 0), (keeping, 8)):
        each = (kept(layer, 2048, way) - kept(layer, 1024, way)) / (B * 1024 * D)
        assert each == pytest.approx(expected + more, abs=0.01)


def peak(layers, l, way):
    x = torch.randn(B, l, D, device="cuda", requires_grad=True)
    before = bytes_now()
    torch.cuda.reset_peak_memory_stats()
    with way(), torch.autocast("cuda", BF16):
        y = layers(x)
    y.sum().backward()
    highest = bytes_now("peak") - before
    layers.zero_grad()
    return highest


@pytest.mark.parametrize("n_layer", [1, 4])
def test_peak_of_forward_and_backward(n_layer):
    layers = nn.Sequential(*(Mamba(D, device="cuda") for _ in range(n_layer)))
    warm_up(layers)
    less = (peak(layers, 1024, keeping) - peak(layers, 1024, contextlib.nullcontext)) / (B * 1024 * D)
    # of one layer at a time, all that its backward needs is there
    assert less >= 8 * (n_layer - 1) - 0.05


def packed(layer, x):
    l = x.shape[1]
    doc = (torch.arange(l, device="cuda") // 300).expand(B, l).clone()
    doc[1:, l - 70 :] = -1
    return layer(x, seq=Seq.from_documents(doc)) * (doc >= 0)[..., None]


def with_a_state(layer, x):
    y, middle = layer(x, layer.init_state(B).map(torch.ones_like), return_state=True)
    y2, after = layer(x, middle, return_state=True)
    return torch.cat([m.float().flatten() for m in (y, y2, after.conv, after.ssm)])


CASES = {
    "autocast": (under_autocast, None, {}),
    "normed, autocast": (under_autocast, None, {"bcdt_norm": True}),
    "float32": (lambda layer, x: layer(x), None, {}),
    "bfloat16": (lambda layer, x: layer(x), BF16, {}),
    "packed": (packed, BF16, {}),
    "states": (with_a_state, None, {"bcdt_norm": True}),
    "odd channels": (under_autocast, None, {"d_model": 333, "expand": 1}),
}


@pytest.mark.parametrize(("run", "dtype", "options"), CASES.values(), ids=CASES)
def test_gradients_are_the_same_bits(run, dtype, options):
    layer = Mamba(**{"d_model": D, **options}, device="cuda", dtype=dtype)
    x = torch.randn(B, 1024, layer.in_proj.in_features, device="cuda", dtype=dtype, requires_grad=True)
    leaves, results = [x, *layer.parameters()], []
    for way in (contextlib.nullcontext, keeping):
        with way():
            loss = run(layer, x).float().square().mean()
        # what is in the allocator's memory must not show
        torch.full((1 << 28,), float("nan"), device="cuda")
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for other in results[1:]:
        for name, got, want in zip(["loss", "x", *dict(layer.named_parameters())], other, results[0], strict=True):
            assert torch.isfinite(got).all() and torch.equal(got, want), name


def test_the_scan_runs_forward_once(monkeypatch):
    calls, forward = [], cuda_ops._forward
    monkeypatch.setattr(cuda_ops, "_forward", lambda *args: calls.append(1) or forward(*args))
    layer = Mamba(D, device="cuda")
    under_autocast(layer, torch.randn(B, 64, D, device="cuda")).sum().backward()
    assert calls == [1]

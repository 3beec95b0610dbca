"""The CUDA products of few rows on a GPU: real sizes against float64, the same bits in any batch, and in any order of launches."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from hybridzoo.kernels import StepConv, StepNorm, gated_rms_norm, selective_state_update
from hybridzoo.kernels.gpu import nvrtc

pytestmark = pytest.mark.gpu

# tests are no package, so the file is loaded by its path
_spec = importlib.util.spec_from_file_location("few", Path(__file__).parents[1] / "test_cuda_few.py")
_few = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_few)
check, exactly = _few.check, _few.exactly

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# (k, n) of mamba-2.8b's and mamba2-2.7b's projections, of mamba-130m's, and of the head
SIZES = [(2560, 10240), (5120, 192), (5120, 2560), (2560, 10576), (768, 3072), (1536, 80), (1536, 768), (2560, 50280)]


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("b", [1, 3, 8, 16, 32, 64])
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_products_of_real_sizes(k, n, b):
    part = _few.cuda.part_of(b, k, n, _few.cuda._room(torch.device("cuda")))
    if isinstance(part, str):
        pytest.skip(part)
    check(_few.product(b, k, n))
    norm = StepNorm(torch.randn(k).to(BF16), 1e-5)
    i = _few.product(b, k, n, norm=norm)._replace(x=_few.stream_of(b, k, F32))
    check(i._replace(bias=None))
    check(i, 1.0) if n > 20000 else check(i._replace(residual=torch.randn(b, n), multiplier=0.5), 2.0)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("b", [1, 8])
def test_everything_behind_a_product(b, dtype):
    k, n = 2560, 10240
    taps, bias = torch.randn(5120, 4).to(dtype), torch.randn(5120).to(dtype)
    check(_few.product(b, k, n, dtype, conv=StepConv(0, torch.randn(b, 3, 5120).to(dtype), taps, bias)), 2.0)
    for activation in ("silu", "gelu", "relu", "relu2"):
        check(_few.product(b, k, n, dtype, activation=activation, gated=True))
        check(_few.product(b, k, n, dtype, activation=activation))
    gate = torch.randn(b, 10576).to(dtype)[:, :5120]
    norm = StepNorm(torch.randn(5120).to(dtype), 1e-5, gate=gate)
    i = _few.product(b, 5120, k, dtype, norm=norm)._replace(x=_few.stream_of(b, 5120, dtype))
    check(i._replace(residual=torch.randn(b, k)), 2.0)
    check(i._replace(norm=StepNorm(norm.weight, 1e-5, torch.randn(5120).to(dtype), True)))


def test_a_rows_bits_do_not_depend_on_the_others():
    norm = StepNorm(torch.randn(2560).to(BF16), 1e-5)
    i = _few.product(16, 2560, 10240, norm=norm)._replace(x=_few.stream_of(16, 2560, F32))
    whole = _run(i)
    for rows in (slice(0, 1), slice(3, 6), slice(8, 16)):
        assert torch.equal(_run(i._replace(x=i.x[rows])), whole[rows])
    assert all(torch.equal(_run(i), whole) for _ in range(20))


def _run(i):
    return _few.cuda.step_linear(i)


@pytest.mark.parametrize("shape", [(64, 5120), (3, 700, 5120)])
def test_the_gated_norm(shape):
    x, gate, weight = torch.randn(*shape).to(BF16), torch.randn(*shape).to(BF16), torch.randn(5120).to(BF16)
    for size, before in ((5120, False), (640, True)):
        got = gated_rms_norm(x, gate, weight, 1e-5, size, before, backend="cuda")
        want = gated_rms_norm(x.double(), gate.double(), weight.double(), 1e-5, size, before, backend="torch")
        assert (got.double() - want).norm() <= 2**-8 * want.norm()


MODELS = {
    "mamba": (768, _few.mamba),
    "mamba-2.8b": (2560, _few.mamba),
    "mamba2": (768, _few.mamba2),
    "mamba2 with states of 16 bits": (2560, functools.partial(_few.mamba2, state=BF16)),
}


@pytest.mark.parametrize("b", [1, 3, 8])
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_layers_in_any_order_of_launches(model, b, monkeypatch):
    """One after the other, overlapping, and as a graph: the same bits; and near to PyTorch's operations."""
    width, make = MODELS[model]
    step, states = make(b, width)
    xs = [torch.randn(b, width) for _ in range(4)]

    def run(overlap, take=step, **how):
        monkeypatch.setattr(nvrtc, "OVERLAP", overlap)
        for s in states:
            s.zero_()
        outs = [take(x, **how).clone() for x in xs]
        torch.cuda.synchronize()
        return outs + [s.clone() for s in states]

    apart, overlapping = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(apart, overlapping, strict=True))
    assert all(all(torch.equal(a, b) for a, b in zip(apart, run(True), strict=True)) for _ in range(5))
    # PyTorch rounds between any two operations
    for a, want in zip(apart, run(True, backend="torch"), strict=True):
        assert (a.double() - want.double()).norm() <= 0.05 * want.double().norm()

    x, graph = torch.zeros_like(xs[0]), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # what is in front of a launch that may overlap is no kernel here
        out = step(torch.empty_like(x).copy_(x))

    def replayed(given):
        x.copy_(given)
        graph.replay()
        return out

    assert all(torch.equal(a, b) for a, b in zip(apart, run(True, replayed), strict=True))


def test_steps_from_low_rank_forms_follow_each_other_closely():
    # the same state again and again, with nothing between the launches
    b, d, n, r = 2, 1536, 16, 48
    state, low = torch.zeros(b, d, n), torch.randn(64, b, r).to(BF16)
    u, B, C, z = (torch.randn(b, size).to(BF16) for size in (d, n, n, d))
    A, weight = torch.rand(d, n), (torch.randn(d, r) / 7).to(BF16)
    twin = state.clone()

    def run(state):
        return [
            selective_state_update(state, u, x, A, B, C, z=z, dt_weight=weight, log_rates=True, dt_softplus=True)
            for x in low
        ]

    overlapping = run(state)
    torch.cuda.synchronize()
    nvrtc.OVERLAP = False
    try:
        apart = run(twin)
    finally:
        nvrtc.OVERLAP = True
    assert torch.equal(torch.stack(apart), torch.stack(overlapping)) and torch.equal(state, twin)

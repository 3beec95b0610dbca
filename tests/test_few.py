"""Products of few rows and the steps between them, in PyTorch operations, against what layers do one after the other."""

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.kernels import (
    BackendError,
    ScanNorms,
    StepConv,
    StepNorm,
    causal_conv1d_update,
    dispatch,
    selective_state_update,
    ssd_state_update,
    step_linear,
)
from hybridzoo.kernels.few import cuda
from hybridzoo.kernels.few.op import _fits, fits
from hybridzoo.layers.norm import GatedRMSNorm, LayerNorm, RMSNorm

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def product(b=3, k=24, n=40, dtype=F64):
    return torch.randn(b, k, dtype=dtype), torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@torch.no_grad()
def test_a_norm_in_front(kind):
    x, weight, bias = product(dtype=F32)
    norm = kind(24, 1e-5)
    torch.nn.init.normal_(norm.weight)
    centred = kind is LayerNorm
    given = StepNorm(norm.weight, norm.eps, norm.bias if centred else None, centred)
    assert torch.equal(step_linear(x, weight, bias, norm=given), F.linear(norm(x), weight, bias))


@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_a_gated_norm_in_front(before):
    x, weight, bias = product(dtype=F32)
    norm, z = GatedRMSNorm(24, 1e-5, 8, before), torch.randn(3, 24)
    given = StepNorm(norm.weight, 1e-5, gate=z, group_size=8, norm_before_gate=before)
    assert torch.equal(step_linear(x, weight, bias, norm=given), F.linear(norm(x, z), weight, bias))


@torch.no_grad()
def test_a_convolution_behind_some_rows():
    x, weight, bias = product()
    states = [s := torch.randn(3, 3, 16, dtype=F64), s.clone()]
    taps, add = torch.randn(16, 4, dtype=F64), torch.randn(16, dtype=F64)
    got = step_linear(x, weight, bias, conv=StepConv(8, states[0], taps, add))
    y = F.linear(x, weight, bias)
    want = causal_conv1d_update(y[:, 8:24], states[1], taps, add, activation="silu")
    assert torch.equal(got[:, 8:24], want) and torch.equal(*states)
    assert torch.equal(got[:, :8], y[:, :8]) and torch.equal(got[:, 24:], y[:, 24:])


@torch.no_grad()
def test_activations_and_residuals():
    x, weight, bias = product()
    y = F.linear(x, weight, bias)
    torch.testing.assert_close(step_linear(x, weight, bias, activation="relu2"), F.relu(y).square())
    got = step_linear(x, weight, bias, activation="silu", gated=True, gate_multiplier=0.5)
    torch.testing.assert_close(got, y[:, :20] * F.silu(0.5 * y[:, 20:]))
    stream = torch.randn(3, 40, dtype=F64)
    kept = stream.clone()
    torch.testing.assert_close(step_linear(x, weight, bias, residual=stream, multiplier=0.5), kept + 0.5 * y)
    assert torch.equal(stream, kept)
    x, weight, bias = product(dtype=BF16)
    assert step_linear(x, weight, bias, residual=torch.randn(3, 40)).dtype == F32


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(x=torch.zeros(3, 25)), r"weight has shape \(40, 24\), expected \(40, 25\)"),
        (dict(x=torch.zeros(3, 24).bfloat16()), "x has dtype torch.bfloat16, the weight torch.float32"),
        (dict(activation="tanh"), "unknown activation 'tanh'. Known: 'silu'"),
        (dict(activation="silu", residual=torch.zeros(3, 40)), "exclude each other"),
        (dict(residual=torch.zeros(3, 41)), r"residual has shape \(3, 41\), expected \(3, 40\)"),
        (dict(norm=StepNorm(torch.ones(24), 1e-5, group_size=9)), "k = 24 is not a multiple of norm.group_size = 9"),
        (dict(conv=StepConv(30, torch.zeros(3, 3, 16), torch.zeros(16, 4))), "30 and 16 filters go past the 40 rows"),
    ],
)
def test_what_does_not_fit_is_named(options, reason):
    given = {"x": torch.zeros(3, 24), "weight": torch.zeros(40, 24)} | options
    with pytest.raises(ValueError, match=reason):
        step_linear(given.pop("x"), given.pop("weight"), **given)


def test_whether_it_pays_can_be_asked(monkeypatch):
    assert "need CUDA tensors, got cpu" in fits("cpu", BF16, 1, 768)
    with monkeypatch.context() as m:
        m.setattr(cuda.nvrtc, "unavailable", lambda: None)
        m.setattr(cuda, "shared_memory", lambda device: 228 << 10)
        assert fits("cuda", BF16, 32, 768) is None and fits("cuda", BF16, 16, 5120) is None
        assert "1 to 32 rows, got 33" in fits("cuda", BF16, 33, 64)
        # many rows by what is small do not pay, and are done where the kernel is asked for
        assert fits("cuda", BF16, 16, 768, 3072) is None and fits("cuda", BF16, 17, 2560, 10240) is None
        assert "weight of 3072 x 768 too often for 17 rows" in fits("cuda", BF16, 17, 768, 3072)
        facts = {"device": "cuda", "dtype": BF16, "rows": 17, "d": 768, "n": 3072}
        assert dispatch.choose("step_linear", **facts).name == "torch"
        assert dispatch.choose("step_linear", backend="cuda", **facts).name == "cuda"
        m.setenv("HYBRIDZOO_BACKEND", "cuda")
        assert fits("cuda", BF16, 17, 768, 3072) is None
        _fits.cache_clear()
    monkeypatch.setenv("HYBRIDZOO_BACKEND", "torch")
    assert fits("cpu", BF16, 1, 768) is None
    monkeypatch.setenv("HYBRIDZOO_BACKEND", "chunked")
    monkeypatch.setattr(cuda, "refuse", lambda facts: None)
    assert fits("cuda", BF16, 2, 768) == "HYBRIDZOO_BACKEND=chunked asks for another"


@torch.no_grad()
def test_where_our_kernels_are_asked_for_what_they_leave_to_pytorch_still_runs(monkeypatch):
    monkeypatch.setenv("HYBRIDZOO_BACKEND", "cuda")
    assert "need CUDA tensors, got cpu" in fits("cpu", BF16, 3, 768)
    x, weight, bias = product(dtype=F32)
    assert torch.equal(step_linear(x, weight, bias), F.linear(x, weight, bias))
    with pytest.raises(BackendError, match="need CUDA tensors, got cpu"):
        step_linear(x, weight, bias, backend="cuda")


def test_step_sizes_from_their_low_rank_form_and_rates_from_their_logarithms():
    b, d, n, r = 3, 10, 4, 6
    A, D = torch.rand(d, n, dtype=F64), torch.randn(d, dtype=F64)
    u, z, low = torch.randn(b, d, dtype=F64), torch.randn(b, d, dtype=F64), torch.randn(b, r, dtype=F64)
    B, C = torch.randn(2, b, n, dtype=F64)
    weight, bias = torch.randn(d, r, dtype=F64), torch.randn(d, dtype=F64)
    norms = ScanNorms(1e-6, torch.rand(r, dtype=F64), None, torch.rand(n, dtype=F64))
    for given in (None, norms):
        one = [low, B, C]
        if given is not None:
            one = [F.rms_norm(m, m.shape[-1:], w, 1e-6) for m, w in zip(one, given[1:], strict=True)]
        states = [s := torch.randn(b, d, n, dtype=F64), s.clone()]
        options = dict(dt_bias=bias, dt_softplus=True)
        want = selective_state_update(states[0], u, one[0] @ weight.T, -A.exp(), *one[1:], D, z, **options)
        more = dict(dt_weight=weight, norms=given, log_rates=True)
        got = selective_state_update(states[1], u, low, A, B, C, D, z, **options, **more)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*states)
    with pytest.raises(ValueError, match=r"dt_weight has shape \(9, 6\), expected \(10, 6\)"):
        selective_state_update(states[0], u, low, A, B, C, dt_weight=weight[:9])
    with pytest.raises(ValueError, match="Pass dt_weight"):
        selective_state_update(states[0], u, u, A, B, C, norms=norms)


def test_a_state_of_16_bits_is_the_rounded_one():
    b, h, p, n = 2, 3, 4, 8
    x, dt = torch.randn(b, h, p), torch.randn(b, h)
    B, C = torch.randn(2, b, 1, n)
    A = torch.rand(h)
    half = torch.randn(b, h, p, n).bfloat16()
    wide = half.float()
    for _ in range(3):
        got, want = (ssd_state_update(s, x, dt, A, B, C, dt_softplus=True, log_rates=True) for s in (half, wide))
        assert torch.equal(got, want)
        wide = wide.bfloat16().float()
        assert torch.equal(half.float(), wide)

"""The CUDA kernels of one token on a GPU, against PyTorch's operations in float64."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from hybridzoo.kernels import causal_conv1d_update, conv_ssd_update, selective_state_update, ssd_state_update
from hybridzoo.kernels.step import chunked as update_torch
from hybridzoo.kernels.step import cuda as cuda_update
from hybridzoo.layers import Mamba, Mamba2

pytestmark = pytest.mark.gpu

# tests are no package, so the file is loaded by its path
_spec = importlib.util.spec_from_file_location("steps", Path(__file__).parents[1] / "test_cuda_update.py")
_steps = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_steps)
step, exactly = _steps.step, _steps.exactly

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FLOOR = {F32: 1e-6, BF16: 2e-3, F16: 3e-4}
FREE = (0.0, math.inf)


def rand(*shape, dtype=F32):
    return torch.randn(*shape, device="cuda").to(dtype)


def check(op, states, *arguments):
    """Twice from the same states, three steps long: equal bit for bit; and no further from float64 than twice PyTorch's own error."""

    def results(module, change):
        # a state keeps its type in PyTorch's operations, so that they accumulate in it
        copies = {id(s): change(s).clone() for s in states}
        given = [copies[id(m)] if id(m) in copies else change(m) for m in arguments]
        # what is left in the allocator's memory must not show
        del_me = torch.full((1 << 20,), float("nan"), device="cuda")
        del del_me
        outs = [step(module, op, *given) for _ in range(3)]
        return [*outs, *copies.values()]

    got, again = (results(cuda_update, lambda m: m) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    exact, same = results(update_torch, exactly), results(update_torch, lambda m: m)
    for a, b, want in zip(got, same, exact, strict=True):
        scale = want.norm().clamp_min(1e-30)
        error, allowed = ((m.double() - want).norm() / scale for m in (a, b))
        assert error <= 2 * allowed + FLOOR[a.dtype], (error.item(), allowed.item())


def rows_of(b, total, dtype=torch.int64):
    rows = torch.randperm(total, device="cuda")[:b].to(dtype)
    return rows.masked_fill(torch.arange(b, device="cuda") % 5 == 3, -1)


def scan(b, d, n, g=1, dtype=F32, total=None):
    B, C = rand(2, b, g, n, dtype=dtype)
    A = -4 * torch.rand(d, n, device="cuda") - 0.1
    state = rand(total or b, d, n)
    u, dt, z = (rand(b, d, dtype=dtype) for _ in range(3))
    return [state, u, dt, A, B, C, rand(d), z, rand(d), True, None]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 24, 32, 64, 100, 128, 200, 256])
def test_selective_state_update(n, dtype):
    for b, d, g in ((1, 1536, 1), (3, 21, 3), (64, 200, 1)):
        made = scan(b, d, n, g, dtype)
        check("selective", made[:1], *made)


@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
def test_selective_state_update_of_rows(wide):
    made = scan(33, 200, 16, 2, BF16, total=50)
    made[-1] = rows_of(33, 50, wide)
    check("selective", made[:1], *made)


def heads(b, h, p, n, dtype, total=None, per_channel=False):
    A = -4 * torch.rand(h, device="cuda") - 0.1
    D = rand(h, p) if per_channel else rand(h)
    return rand(total or b, h, p, n), rand(b, h, dtype=dtype), A, D, rand(b, h, p, dtype=dtype), rand(h)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("b", "h", "p", "n", "g"), [(1, 24, 64, 128, 1), (5, 8, 64, 64, 4), (64, 24, 64, 128, 1), (2, 6, 5, 100, 2)]
)
def test_ssd_state_update(b, h, p, n, g, dtype):
    for total, per_channel, limit in ((None, False, FREE), (b + 7, True, (0.1, 1.0))):
        state, dt, A, D, z, bias = heads(b, h, p, n, dtype, total, per_channel)
        x, (B, C) = rand(b, h, p, dtype=dtype), rand(2, b, g, n, dtype=dtype)
        rows = None if total is None else rows_of(b, total)
        check("ssd", [state], state, x, dt, A, B, C, D, z, bias, True, limit, rows)


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("dtype", "state_dtype"), [(F32, F32), (BF16, BF16), (F16, F32)], ids=str)
def test_causal_conv1d_update(k, dtype, state_dtype):
    for b, d in ((1, 1536), (64, 1792), (5, 33)):
        for total in (b, b + 9):
            rows = None if total == b else rows_of(b, total)
            state = rand(total, k - 1, d, dtype=state_dtype)
            x = rand(b, d + 16, dtype=dtype)[:, 16:]
            check("conv", [state], x, state, rand(d, k), rand(d), True, rows)


def mamba2(b, h=24, p=64, n=128, g=1, k=4, dtype=BF16, total=None, wide=None):
    state, dt, A, D, z, bias = heads(b, h, p, n, dtype, total)
    width = h * p + 2 * g * n
    conv_state = rand(total or b, k - 1, width, dtype=dtype)
    filter_ = (rand(width, k, dtype=wide or dtype), rand(width, dtype=wide or dtype))
    return [rand(b, width, dtype=dtype), conv_state, *filter_, True, state, dt, A, D, z, g, bias, True, FREE, None]


@pytest.mark.parametrize(
    "sizes",
    [
        dict(b=1),
        dict(b=64),
        dict(b=256, wide=F32),
        dict(b=3, h=6, p=5, n=100, g=2, dtype=F32),
        dict(b=7, h=8, g=4, k=3, dtype=F16, total=20),
    ],
    ids=str,
)
def test_mamba2_in_one_launch(sizes):
    made = mamba2(**sizes)
    if sizes.get("total"):
        made[-1] = rows_of(sizes["b"], sizes["total"])
    check("conv_ssd", [made[1], made[5]], *made)


def test_no_block_reads_what_another_has_shifted():
    # many blocks per group, many times: a block that read B or C too late would be off by a token
    xBC, conv_state, weight, bias, silu, state, *rest = mamba2(64, g=1)
    two_conv, two_state = conv_state.clone(), state.clone()
    for t in range(200):
        x = torch.roll(xBC, t, 0)
        got = step(cuda_update, "conv_ssd", x, conv_state, weight, bias, silu, state, *rest)
        u, B, C = step(cuda_update, "conv", x, two_conv, weight, bias, silu, None).split([1536, 128, 128], -1)
        dt, A, D, z, _, dt_bias, softplus, limit, _ = rest
        B, C = B.view(64, 1, 128), C.view(64, 1, 128)
        want = step(
            cuda_update, "ssd", two_state, u.view(64, 24, 64), dt, A, B, C, D, z, dt_bias, softplus, limit, None
        )
        assert torch.equal(got, want), t
    assert torch.equal(conv_state, two_conv) and torch.equal(state, two_state)
    assert not cuda_update.tickets(conv_state, (len(conv_state), 1)).any()


@pytest.mark.parametrize("warm", [True, False])
def test_graph_capture(warm):
    made = mamba2(8)
    kept = made[1].clone(), made[5].clone()
    want = [step(cuda_update, "conv_ssd", *made).clone() for _ in range(3)]
    made[1], made[5] = (kept[0].clone(), kept[1].clone())
    if warm:
        step(cuda_update, "conv_ssd", *made)
        made[1].copy_(kept[0]), made[5].copy_(kept[1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(cuda_update, "conv_ssd", *made)
    for y in want:
        graph.replay()
        assert torch.equal(out, y)
    # outside the graph, from the same states
    after = step(cuda_update, "conv_ssd", *made)
    graph.replay()
    assert after.isfinite().all() and out.isfinite().all()


def test_public_functions_take_them_by_name():
    xBC, conv_state, weight, bias, _, state, dt, A, D, z, g, dt_bias, *_ = mamba2(3)
    options = dict(ngroups=g, activation="silu", dt_bias=dt_bias, dt_softplus=True)
    pair = [(conv_state.clone(), state.clone()) for _ in range(2)]
    got, want = (
        conv_ssd_update(xBC, c, weight, bias, s, dt, A, D, z, **options, backend=name)
        for (c, s), name in zip(pair, ("cuda", "chunked"), strict=True)
    )
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)
    made = scan(3, 40, 16)
    for op, arguments in (
        (selective_state_update, made[:8]),
        (ssd_state_update, [rand(3, 4, 8, 16), rand(3, 4, 8), rand(3, 4), -rand(4).abs(), *rand(2, 3, 2, 16)]),
        (causal_conv1d_update, [rand(3, 40), rand(3, 3, 40), rand(40, 4)]),
    ):
        copies = [[x.clone() for x in arguments] for _ in range(2)]
        got, want = (op(*c, backend=name) for c, name in zip(copies, ("cuda", "chunked"), strict=True))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_ops_and_compile():
    xBC, conv_state, weight, bias, silu, state, dt, A, D, z, g, dt_bias, *_ = mamba2(3)
    one = (xBC, conv_state, weight, bias, state, dt, A, D, z, dt_bias, None, g, silu, True, -math.inf, math.inf)
    torch.library.opcheck(torch.ops.hybridzoo.conv_ssd_update_cuda, one)
    torch.library.opcheck(torch.ops.hybridzoo.causal_conv1d_update_cuda, (xBC, conv_state, weight, bias, None, True))
    made = scan(3, 150, 16, 3, BF16)
    torch.library.opcheck(torch.ops.hybridzoo.state_update_cuda, (*made[:9], None, True, -math.inf, math.inf))

    def step(x, conv_state, state):
        return conv_ssd_update(x, conv_state, weight, bias, state, dt, A, D, z, activation="silu", backend="cuda") * 2

    compiled = torch.compile(step, fullgraph=True)
    states = [(conv_state.clone(), state.clone()) for _ in range(2)]
    with torch.no_grad():
        for _ in range(3):
            got, want = (f(xBC, *s) for f, s in zip((compiled, step), states, strict=True))
            torch.testing.assert_close(got, want)
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: Mamba(64, d_state=16, **o),
        lambda **o: Mamba2(64, d_state=64, headdim=16, ngroups=2, **o),
        lambda **o: Mamba2(64, d_state=64, headdim=16, rmsnorm=False, dt_limit=(0.01, 0.5), **o),
    ],
    ids=["mamba", "mamba2", "mamba2 without norm"],
)
def test_a_layers_steps_equal_its_forward(make, dtype, monkeypatch):
    layer = make(device="cuda", dtype=dtype)
    x = rand(3, 9, 64, dtype=dtype)
    with torch.no_grad():
        want, last = layer(x, return_state=True)
        _ask_for_cuda(monkeypatch)  # nothing may fall back
        state = layer.init_state(3)
        got = torch.stack([layer.step(x[:, t], state) for t in range(9)], 1)
    tolerance = 1e-4 if dtype == F32 else 0.05
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state.conv, last.conv, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state.ssm, last.ssm, atol=tolerance, rtol=tolerance)


def _ask_for_cuda(monkeypatch):
    """As if the kernels were chosen by themselves, for steps only."""
    from hybridzoo.kernels import dispatch

    table = dispatch.TABLES["update"]
    monkeypatch.setitem(table, "chunked", dataclasses.replace(table["chunked"], run=None))


def test_a_row_outside_the_states_is_refused_by_the_device():
    # in a process of its own: the device is lost to it
    import subprocess
    import sys

    code = """
import torch
from hybridzoo.kernels import causal_conv1d_update
x, state, weight = torch.randn(1, 8).cuda(), torch.randn(2, 3, 8).cuda(), torch.randn(8, 4).cuda()
causal_conv1d_update(x, state, weight, rows=torch.tensor([2]).cuda(), backend="cuda")
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "CUDA" in done.stderr

"""SSD's gradients by the CUDA kernels on a GPU: numbers, every shape, great lengths and strides, graphs, compilation, and bits."""

import math

import pytest
import torch

from hybridzoo.kernels import Seq, dispatch, ssd
from hybridzoo.kernels.gpu import launch_plans
from hybridzoo.kernels.ssd import backward_plans, cuda_backward
from hybridzoo.kernels.ssd.backward_plans import ChunkShape
from hybridzoo.layers import Mamba2

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
PER_TOKEN = ("x", "dt", "B", "C", "z")


def leaves(b, l, h, p, n, g=1, dtype=BF16, gate=False, skip=1, state=True, scale=1.0):
    torch.manual_seed(0)

    def made(*shape, dtype=F32):
        return torch.randn(shape, device="cuda").to(dtype)

    out = {"x": (made(b, l, h, p) * scale).to(dtype), "dt": (made(b, l, h) - 2).to(dtype), "A": -made(h).abs() - 0.1}
    out |= {"B": made(b, l, g, n, dtype=dtype), "C": made(b, l, g, n, dtype=dtype), "dt_bias": made(h) - 1}
    if skip:
        out["D"] = made(h) if skip == 1 else made(h, p)
    if gate:
        out["z"] = made(b, l, h, p, dtype=dtype)
    if state:
        out["initial_state"] = made(b, h, p, n)
    return {name: out[name].requires_grad_() for name in NAMES if name in out}


def documents(b, l):
    starts = torch.rand(b, l, device="cuda") < 4 / l
    doc = starts.cumsum(1)
    return Seq.from_documents(doc.masked_fill(torch.arange(l, device="cuda") >= l - l // 10, -1))


def gradients(made, backend, weights, dtype=None, **options):
    """By name; the inputs converted to ``dtype``."""
    made = {name: (m if dtype is None else m.to(dtype)).detach().requires_grad_() for name, m in made.items()}
    out, last = ssd(**made, **({"dt_softplus": True} | options), backend=backend, return_final_state=True)
    grads = torch.autograd.grad(
        [out, last], list(made.values()), [w.to(m.dtype) for w, m in zip(weights, (out, last), strict=True)]
    )
    return dict(zip(made, grads, strict=True))


def weights_for(made):
    b, _, h, p = made["x"].shape
    return torch.randn_like(made["x"]), torch.randn(b, h, p, made["B"].shape[3], device="cuda")


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def compare(made, exact="reference", **options):
    """At most twice the chunked backend's errors; of what is float32 beside 16-bit operands, twice one of these operands' rounding errors."""
    weights, dtype = weights_for(made), made["x"].dtype
    want = gradients(made, exact, weights, torch.float64, **options)
    ours, theirs = (gradients(made, backend, weights, **options) for backend in ("cuda", "chunked"))
    for name, exactly in want.items():
        got = ours[name]
        assert got.dtype == made[name].dtype and got.shape == exactly.shape
        error, allowed = relative(got, exactly), 2 * relative(theirs[name], exactly) + 1e-6
        if got.dtype != dtype:
            # sums over all tokens, whose terms have random signs here
            allowed = 4 * torch.finfo(dtype).eps
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


def test_a_gradient_takes_the_kernels_by_default():
    for dtype in (F32, BF16, F16):
        assert dispatch.choose("ssd", device="cuda", dtype=dtype, d_state=128, grad=True, packed=True).name == "cuda"


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 300, 8, 64, 128, 2), (1, 200, 3, 50, 27, 1), (3, 129, 4, 32, 64, 4)], ids=str)
def test_errors_are_at_most_twice_those_of_torch(sizes, dtype, gate, packed):
    made = leaves(*sizes, dtype=dtype, gate=gate, skip=1 + gate)
    compare(made, **({"seq": documents(*made["x"].shape[:2])} if packed else {}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("p", [16, 32, 64, 80, 256])
@pytest.mark.parametrize("n", [16, 32, 64, 128, 200, 256])
def test_every_size_of_heads_and_states(p, n, dtype):
    compare(leaves(1, 150, 2, p, n, dtype=dtype), dt_limit=(0.01, 0.5))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_small_gradients_keep_their_digits(dtype):
    compare(leaves(1, 200, 4, 64, 128, dtype=dtype, scale=2**-9))


@pytest.mark.parametrize(
    "shape",
    [ChunkShape(64, 128, *rest) for rest in ((2, 4, 2, 8), (4, 4, 2, 4), (2, 4, 1, 1), (4, 2, 2, 8), (4, 2, 1, 1))],
    ids=str,
)
def test_other_shapes_of_blocks_give_the_same(shape, monkeypatch):
    made = leaves(2, 300, 8, 64, 128)
    cuda_backward.plan.cache_clear()
    monkeypatch.setattr(launch_plans, "_known", {})
    monkeypatch.setattr(backward_plans, "chunk_shape", lambda *_: shape)
    compare(made)
    cuda_backward.plan.cache_clear()


@pytest.mark.parametrize("sizes", [(8, 2048, 24, 64, 128), (1, 16384, 16, 64, 128), (1, 100_003, 2, 64, 64)], ids=str)
def test_lengths_of_training(sizes):
    compare(leaves(*sizes, state=False), exact="chunked")


def test_bits_are_the_same_every_time():
    for dtype in (BF16, F32):
        made = leaves(2, 1000, 24, 64, 128, dtype=dtype)
        weights = weights_for(made)
        first, second = (gradients(made, "cuda", weights) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides_beyond_31_bits():
    made = leaves(2, 200, 2, 64, 64, state=False)
    weights = weights_for(made)
    want = gradients(made, "cuda", weights)
    far = torch.empty(2**31 + 10**6, dtype=BF16, device="cuda")
    x = far.as_strided((2, 200, 2, 64), (2**31 + 8, 128, 64, 1))
    x.copy_(made["x"].detach())
    got = gradients(made | {"x": x}, "cuda", weights)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_parts_of_a_projection_are_read_where_they_lie():
    h, p, n = 24, 64, 128
    whole = torch.randn(2, 500, h * p + 2 * n + h, device="cuda", dtype=BF16)
    x, B, C, dt = whole.split([h * p, n, n, h], 2)
    views = {"x": x.unflatten(2, (h, p)), "B": B[:, :, None], "C": C[:, :, None], "dt": dt}
    made = leaves(2, 500, h, p, n) | views
    weights = weights_for(made)
    got, want = (gradients(m, "cuda", weights) for m in (made, {name: m.contiguous() for name, m in made.items()}))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("hurt", ["x", "dt", "B", "C"])
def test_what_is_not_finite_stays_in_its_document(hurt):
    made, where = leaves(1, 300, 4, 64, 128), slice(100, 190)
    seq = Seq.from_cu_seqlens([0, 100, 150, 190, 300], 1, 300, device="cuda")
    weights = weights_for(made)
    want = gradients(made, "cuda", weights, seq=seq)
    for value, at in ((math.nan, 160), (math.inf, 120)):
        changed = made[hurt].detach().clone()
        changed[0, at] = value
        got = gradients(made | {hurt: changed}, "cuda", weights, seq=seq)
        for name in PER_TOKEN:
            if name in got:
                assert torch.equal(got[name][:, : where.start], want[name][:, : where.start])
                assert torch.equal(got[name][:, where.stop :], want[name][:, where.stop :])
        assert torch.equal(got["initial_state"], want["initial_state"])
        assert not got["x"][:, where].isfinite().all() or not got["dt"][:, where].isfinite().all()


def test_a_graph_of_forward_and_backward_replays_on_new_inputs():
    made = leaves(2, 300, 8, 64, 128)
    weights = weights_for(made)
    gradients(made, "cuda", weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(made, "cuda", weights)
    with torch.no_grad():
        made["x"].copy_(torch.randn_like(made["x"]))
    graph.replay()
    want = gradients(made, "cuda", weights)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_compiles_into_one_graph_with_its_gradients():
    made = leaves(2, 300, 8, 64, 128)
    names, given = list(made), list(made.values())

    def run(*tensors):
        out, last = ssd(
            **dict(zip(names, tensors, strict=True)), dt_softplus=True, return_final_state=True, backend="cuda"
        )
        return out.float().square().sum() + last.square().sum()

    want = torch.autograd.grad(run(*given), given)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True)(*given), given)
    assert all(relative(a, b) < 1e-2 for a, b in zip(got, want, strict=True))


def test_a_second_derivative_is_refused():
    made = leaves(1, 100, 2, 64, 64)
    out = ssd(**made, dt_softplus=True, backend="cuda")
    (g,) = torch.autograd.grad(out.float().square().sum(), made["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        g.float().sum().backward()


def test_a_layer_trains_as_with_torch(monkeypatch):
    layer = Mamba2(256, d_state=128, headdim=64, device="cuda", dtype=BF16)
    x = torch.randn(2, 500, 256, device="cuda", dtype=BF16)
    grads = []
    for backend in ("cuda", "chunked"):
        monkeypatch.setenv("HYBRIDZOO_BACKEND", backend)
        y = layer(x)
        grads.append(torch.autograd.grad(y.float().square().sum(), list(layer.parameters())))
    assert all(relative(a, b) < 3e-2 for a, b in zip(*grads, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
def test_every_plan_of_a_small_gpu_runs(gate, monkeypatch):
    """Shared memory as of an A100 and of a laptop's GPU: other stages and tiles, on this one."""
    for space in (164 << 10, 100 << 10):
        monkeypatch.setattr(cuda_backward, "shared_memory", lambda device, space=space: space)
        for dtype, n in ((BF16, 128), (BF16, 64), (F32, 64)):
            compare(leaves(1, 150, 2, 64, n, dtype=dtype, gate=gate))

"""The kernels on a CUDA device: our own against float64 loops, and the optional libraries where they are installed."""

import pytest
import torch

from hybridzoo.kernels import (
    Seq,
    causal_conv1d,
    causal_conv1d_update,
    dispatch,
    selective_scan,
    selective_state_update,
    ssd,
    ssd_state_update,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PER_TOKEN = ("u", "x", "dt", "B", "C", "z")


def scan_inputs(b=2, l=193, d=64, n=16, g=2, dtype=torch.float32, state=True):
    made = {
        "u": torch.randn(b, l, d, dtype=dtype),
        "dt": torch.randn(b, l, d, dtype=dtype),
        "A": -4 * torch.rand(d, n),
        "B": torch.randn(b, l, g, n, dtype=dtype),
        "C": torch.randn(b, l, g, n, dtype=dtype),
        "D": torch.randn(d),
        "z": torch.randn(b, l, d, dtype=dtype),
        "dt_bias": torch.randn(d) - 3,
    }
    if state:
        made["initial_state"] = torch.randn(b, d, n)
    return {name: x.cuda().requires_grad_() for name, x in made.items()}


def ssd_inputs(b=2, l=193, h=4, p=64, n=64, g=2, dtype=torch.float32, state=True):
    made = {
        "x": torch.randn(b, l, h, p, dtype=dtype),
        "dt": torch.randn(b, l, h, dtype=dtype),
        "A": -4 * torch.rand(h),
        "B": torch.randn(b, l, g, n, dtype=dtype),
        "C": torch.randn(b, l, g, n, dtype=dtype),
        "D": torch.randn(h),
        "z": torch.randn(b, l, h, p, dtype=dtype),
        "dt_bias": torch.randn(h) - 3,
    }
    if state:
        made["initial_state"] = torch.randn(b, h, p, n)
    return {name: x.cuda().requires_grad_() for name, x in made.items()}


def conv_inputs(b=2, l=193, d=64, k=4, dtype=torch.float32, state=True):
    made = {
        "x": torch.randn(b, l, d, dtype=dtype),
        "weight": torch.randn(d, k, dtype=dtype),
        "bias": torch.randn(d, dtype=dtype),
    }
    if state:
        made["initial_state"] = torch.randn(b, k - 1, d, dtype=dtype)
    return {name: x.cuda().requires_grad_() for name, x in made.items()}


def documents(b, l, pads=9):
    """Rows of documents of length 1 and up, some across block boundaries, with padding behind."""
    lengths = [1, 30, 33, 1, l - 65 - pads]
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    return Seq.from_documents(torch.cat([ids, torch.full((pads,), -1)]).expand(b, l).contiguous().cuda())


def results(op, made, valid=None, state_grad=True, **options):
    """Output, final state and gradients; what stands at padding counts for nothing."""
    if state_grad:
        out, state = op(**made, **options, return_final_state=True)
    else:
        out = op(**made, **options)
        with torch.no_grad():
            state = op(**made, **options, return_final_state=True)[1]
    generator = torch.Generator("cuda").manual_seed(1)

    def weights(x):
        return torch.randn(x.shape, generator=generator, device="cuda", dtype=torch.float64).to(x.dtype).double()

    out = out if valid is None else out.masked_fill(~valid.view(*valid.shape, *[1] * (out.dim() - 2)), 0.0)
    loss = (out.double() * weights(out)).sum()
    if state_grad:
        loss = loss + (state.double() * weights(state)).sum()
    grads = torch.autograd.grad(loss, list(made.values()))
    return {"out": out, "state": state, **{f"grad {name}": grad for name, grad in zip(made, grads, strict=True)}}


def assert_close_to_exact(op, made, dtype, scale=1.0, **options):
    """Within a few roundings of the float64 loop, relative to the largest value of each result."""
    backend = options.pop("backend", None)
    exact = {name: x.detach().double().requires_grad_() for name, x in made.items()}
    want = results(op, exact, **options, backend="reference")
    got = results(op, made, **options, backend=backend)
    rtol = scale * (2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    for name in want:
        error = (got[name].double() - want[name]).abs().max() / want[name].abs().max().clamp(min=1e-30)
        assert error <= rtol, f"{name}: relative error {error:.2e}, allowed {rtol:.2e}"


CASES = [
    (selective_scan, scan_inputs, {"dt_softplus": True}),
    (ssd, ssd_inputs, {"dt_softplus": True}),
    (causal_conv1d, conv_inputs, {"activation": "silu"}),
]
IDS = ["scan", "ssd", "conv"]


@pytest.fixture
def exact_matmuls():
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = was


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("l", [1, 65, 193])
@pytest.mark.parametrize(("op", "make", "options"), CASES, ids=IDS)
def test_chunked_on_the_gpu_equals_the_exact_loop(op, make, options, l, dtype, exact_matmuls):
    assert_close_to_exact(op, make(l=l, dtype=dtype), dtype, **options, backend="chunked")


@pytest.mark.parametrize(("op", "make", "options"), CASES, ids=IDS)
def test_chunked_on_the_gpu_keeps_documents_apart(op, make, options, exact_matmuls):
    seq = documents(2, 193)
    assert_close_to_exact(op, make(), torch.float32, **options, seq=seq, valid=seq.valid, backend="chunked")


def test_paths_on_the_gpu(exact_matmuls):
    made = scan_inputs(l=15 * 13, state=False)
    paths = [(15, 13, 13, 1, 0), (13, 15, 1, 13, 0), (15, 13, 13, 1, 1), (13, 15, 1, 13, 1)]
    assert_close_to_exact(selective_scan, made, torch.float32, dt_softplus=True, paths=paths, backend="chunked")


@pytest.mark.parametrize(
    ("op", "update", "make", "options"),
    [
        (selective_scan, selective_state_update, scan_inputs, {"dt_softplus": True}),
        (ssd, ssd_state_update, ssd_inputs, {"dt_softplus": True}),
        (causal_conv1d, causal_conv1d_update, conv_inputs, {"activation": "silu"}),
    ],
    ids=IDS,
)
def test_updates_in_a_cuda_graph_equal_the_whole(op, update, make, options, exact_matmuls):
    made = {name: x.detach() for name, x in make(l=6).items()}
    want, last = op(**made, **options, return_final_state=True, backend="chunked")
    state = made.pop("initial_state").clone()
    kept = state.clone()
    now = {name: (x[:, 0].clone() if name in PER_TOKEN else x) for name, x in made.items()}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        update(state=state, **now, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = update(state=state, **now, **options)
    state.copy_(kept)
    for t in range(6):
        for name in now:
            if name in PER_TOKEN:
                now[name].copy_(made[name][:, t])
        graph.replay()
        torch.testing.assert_close(out, want[:, t], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-3, atol=1e-4)


def test_compiled_on_the_gpu_in_one_graph():
    made = scan_inputs(state=False)
    f = torch.compile(lambda m: selective_scan(**m, dt_softplus=True).sin(), backend="aot_eager", fullgraph=True)
    # the same kernels on the same numbers
    assert torch.equal(f(made), selective_scan(**made, dt_softplus=True, backend="cuda").sin())


def require(name):
    module = dispatch.library(name) if dispatch.installed[name] else f"{name} is not installed"
    if isinstance(module, str):
        pytest.skip(module)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mamba_ssm_scan(dtype, exact_matmuls):
    require("mamba_ssm")
    made = scan_inputs(dtype=dtype, state=False)
    assert_close_to_exact(selective_scan, made, dtype, 4.0, dt_softplus=True, backend="mamba_ssm", state_grad=False)
    with pytest.raises(dispatch.BackendError, match="drops the gradient of the final state"):
        selective_scan(**made, return_final_state=True, backend="mamba_ssm")


@pytest.mark.parametrize("case", ["plain", "state", "packed", "padded", "limited"])
def test_mamba_ssm_ssd(case, exact_matmuls):
    require("mamba_ssm")
    made = ssd_inputs(dtype=torch.bfloat16, state=case == "state")
    options = {"dt_softplus": True, "chunk_size": 64}
    if case == "packed":
        seq = documents(2, 193)
        options |= {"seq": seq, "valid": seq.valid}
    elif case == "padded":
        seq = Seq.from_mask(torch.arange(193, device="cuda") < torch.tensor([[193], [100]], device="cuda"))
        options |= {"seq": seq, "valid": seq.valid}
    elif case == "limited":
        options |= {"dt_limit": (0.01, 0.5)}
    assert_close_to_exact(ssd, made, torch.bfloat16, 2.0, **options, backend="mamba_ssm")


@pytest.mark.parametrize("case", ["plain", "state", "packed", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_conv1d_library(dtype, case):
    require("causal_conv1d")
    made = conv_inputs(dtype=dtype, state=case == "state")
    options = {"activation": "silu"}
    if case in ("packed", "padded"):
        mask = torch.arange(193, device="cuda") < torch.tensor([[193], [100]], device="cuda")
        seq = documents(2, 193) if case == "packed" else Seq.from_mask(mask)
        options |= {"seq": seq, "valid": seq.valid}
    assert_close_to_exact(causal_conv1d, made, dtype, 2.0, **options, backend="causal_conv1d")


def test_our_kernels_go_before_the_libraries():
    facts = {"device": "cuda", "dtype": torch.bfloat16}
    for more in ({}, {"packed": True}, {"initial_state": True}):
        assert dispatch.choose("selective_scan", **facts, **more).name == "cuda"
        assert dispatch.choose("causal_conv1d", **facts, **more).name == "cuda"
    require("mamba_ssm")
    rows = dispatch.explain("selective_scan", **facts, initial_state=True)
    assert ("mamba_ssm", False, "mamba_ssm has no initial state in its selective scan") in rows

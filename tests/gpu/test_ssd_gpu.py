"""The CUDA kernels of SSD's forward on a GPU, against PyTorch's chunks in float64, and in the same type for how far off one may be."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from hybridzoo.kernels import Seq, ssd
from hybridzoo.kernels.ssd import chunked, cuda
from hybridzoo.kernels.ssd.inputs import SsdInputs, SsdOptions
from hybridzoo.layers import Mamba2

pytestmark = pytest.mark.gpu

# tests are no package, so the file is loaded by its path
_spec = importlib.util.spec_from_file_location("duals", Path(__file__).parents[1] / "test_cuda_ssd.py")
_duals = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_duals)
exactly, errors, ROUNDING, USUAL = _duals.exactly, _duals.errors, _duals.ROUNDING, _duals.USUAL
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)


@pytest.fixture(autouse=True)
def _no_tf32():
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = was


def operands(*sizes, **options):
    i = _duals.operands(*sizes, **options)
    return SsdInputs(*(x if x is None else x.cuda() for x in i))


def check(i, options=USUAL):
    """Twice: equal bit for bit, and no further from float64 than twice PyTorch's own error in the same type."""
    got = cuda.forward(i, options, True)
    # what is left in the allocator's memory must not show
    junk = torch.full((1 << 22,), math.nan, device="cuda")
    del junk
    again = cuda.forward(i, options, True)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
    want = chunked.ssd(exactly(i), options)
    (error, off), (allowed, _) = errors(got[:2], want, i.valid), errors(chunked.ssd(i, options), want, i.valid)
    # a float32 rounding of slack, for few numbers that happen to be exact
    assert error <= 2 * allowed + torch.finfo(F32).eps, (error, allowed)
    # sums of products come from the tensor cores without their last bit
    assert off <= 1.5 * ROUNDING[torch.promote_types(i.x.dtype, i.B.dtype)], off
    return got


SIZES = [(16, 16), (64, 32), (32, 64), (64, 64), (40, 100), (64, 128), (100, 128), (128, 128), (64, 256), (256, 200)]


@TYPES
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("p", "n"), SIZES)
def test_every_size(p, n, marked, dtype):
    for b, l, h, g in ((4, 1, 8, 1), (2, 63, 4, 2), (3, 700, 8, 1)):
        check(operands(b, l, h, p, g, n, dtype, marked=marked))


@TYPES
@pytest.mark.parametrize("space", [100, 164, 228])
def test_every_amount_of_shared_memory(space, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "shared_memory", lambda device: space << 10)
    for p, n in ((32, 32), (64, 64), (32, 128), (64, 128), (64, 256)):
        if cuda.tile_of(p, n, dtype.itemsize, space << 10).resident(dtype.itemsize, space << 10):
            check(operands(2, 400, 4, p, 2, n, dtype, marked=True))


@TYPES
def test_cases_of_models(dtype):
    for b, l, h in ((8, 2048, 24), (2, 2048, 64), (1, 16384, 64), (1, 2048, 24)):
        check(operands(b, l, h, 64, 1, 128, dtype))


@TYPES
def test_a_hundred_thousand_tokens(dtype):
    check(operands(1, 100_000, 4, 64, 1, 64, dtype, marked=True))


@TYPES
def test_a_length_that_is_cut(dtype, monkeypatch):
    i = operands(1, 5000, 3, 64, 1, 128, dtype, marked=True)
    whole, parts = [], []
    for count, results in ((1, whole), (132, parts)):
        monkeypatch.setattr(cuda, "processors", lambda device, count=count: count)
        results += check(i)
    for x, y in zip(parts, whole, strict=True):
        assert ((x.float() - y.float()).norm() / y.float().norm()).item() < 2 * ROUNDING[dtype]


@TYPES
def test_slices_limits_and_a_skip_per_channel(dtype):
    for shift in (0, 2, 3):
        wide = torch.randn(2, 300, shift + 2 * 256 + 4 * 64, device="cuda").to(dtype)
        x, z, B, C = wide[..., shift:].split([256, 256, 128, 128], -1)
        i = operands(2, 300, 4, 64, 2, 64, dtype)._replace(D=torch.randn(4, 64, device="cuda"))
        i = i._replace(x=x.unflatten(2, (4, 64)), z=z.unflatten(2, (4, 64)))
        i = i._replace(B=B.unflatten(2, (2, 64)), C=C.unflatten(2, (2, 64)))
        check(i, SsdOptions(True, 0.1, 0.5))
        check(i._replace(dt=i.dt.float()))


def test_offsets_beyond_two_to_the_31():
    l, far = 70, 2**31 // 60 // 8 * 8
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    base = torch.zeros(l * far, device="cuda", dtype=BF16)
    i = operands(1, l, 2, 64, 1, 64, BF16)
    strange = {}
    for k, name in enumerate(("x", "z", "B", "C")):
        m = getattr(i, name)
        view = base.as_strided(m.shape, (0, far, m.shape[3], 1), 1024 * k)
        strange[name] = view.copy_(m)
    assert far * (l - 1) > 2**31
    for x, y in zip(
        cuda.forward(i._replace(**strange), USUAL, False)[:2], cuda.forward(i, USUAL, False)[:2], strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("scale", [(300.0, 30.0, 1e-5), (1.0, 1e-4, 1e-4), (1e-3, 1e-3, 30.0)], ids=str)
def test_fp16_holds_states_and_weights_that_it_has_no_room_for(scale):
    i = operands(2, 1000, 4, 64, 1, 128, F16)
    scaled = {name: (getattr(i, name) * by).to(F16) for name, by in zip(("x", "B", "C"), scale, strict=True)}
    check(i._replace(**scaled, D=None, initial_state=None, A=i.A / 64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_document(value):
    i = operands(1, 900, 4, 64, 1, 128, BF16)
    reset = torch.zeros(1, 900, dtype=torch.bool, device="cuda")
    reset[:, [200, 600]] = True
    i = i._replace(reset=reset)
    want, last, _ = cuda.forward(i, USUAL, False)
    for name in ("x", "dt", "B", "C", "z"):
        hurt = getattr(i, name).clone()
        hurt[0, 333] = value
        got, state, _ = cuda.forward(i._replace(**{name: hurt}), USUAL, False)
        there = [*range(333), *range(600, 900)]
        assert torch.equal(got[:, there], want[:, there]) and torch.equal(state, last), name
        assert not got[0, 333].isfinite().any(), name


def test_graph_capture_and_compiled_programs():
    i = operands(2, 700, 8, 64, 1, 128, BF16)

    def call(x, dt, B, C):
        return ssd(x, dt, i.A, B, C, i.D, i.z, dt_bias=i.dt_bias, dt_softplus=True, backend="cuda") * 2

    with torch.no_grad():
        want = call(i.x, i.dt, i.B, i.C)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(i.x, i.dt, i.B, i.C)
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)
        assert torch.equal(torch.compile(call, fullgraph=True)(i.x, i.dt, i.B, i.C), want)
    torch.library.opcheck(
        torch.ops.hybridzoo.ssd_cuda, (*i, True, 0.0, math.inf, 64, True), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_layer_takes_it(dtype, monkeypatch):
    layer = Mamba2(256, d_state=128, headdim=64, device="cuda", dtype=dtype)
    x, seq = (
        torch.randn(2, 300, 256, device="cuda", dtype=dtype),
        Seq.from_documents(torch.arange(300).expand(2, 300).cuda() // 70),
    )
    with torch.no_grad():
        got = layer(x, seq=seq)
        monkeypatch.setenv("HYBRIDZOO_BACKEND", "reference")
        want = layer(x, seq=seq)
    tolerance = 1e-4 if dtype == F32 else 0.05
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)

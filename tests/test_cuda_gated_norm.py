"""The CUDA norm with a gate, run on the CPU thread by thread (tests/emulator), against float64: numbers, not speed."""

import shutil

import pytest
import torch

from hybridzoo.kernels import BackendError, dispatch, gated_rms_norm
from hybridzoo.kernels.norm import gated, gated_cuda
from hybridzoo.kernels.norm.gated_cuda import Gating, backward, forward, plan
from hybridzoo.layers.norm import GatedRMSNorm

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HALF = {F32: 0.0, BF16: 2**-8, F16: 2**-11}
EPS = 1e-5
pytestmark = [
    pytest.mark.usefixtures("emulated"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def operands(shape, x=F32, z=F32, weight=F32):
    """Input, gate, weight and the gradient of the output."""
    gains = torch.rand(shape[-1]).add(0.5).to(weight)
    return torch.randn(shape).to(x), torch.randn(shape).mul(2).to(z), gains, torch.randn(shape).to(x)


def reference(x, z, weight, how, gh):
    """Output and gradients by PyTorch's operations, in the types that come in."""
    leaves = [m.detach().requires_grad_() for m in (x, z, weight)]
    h = gated._torch(*leaves, *how)
    return h.detach(), *torch.autograd.grad(h, leaves, gh)


def exact(x, z, weight, how, gh):
    """The same in float64."""
    return reference(*(m.double() for m in (x, z, weight)), how, gh.double())


def poisoned():
    # what the allocator hands out next, in the sizes of these tests
    for size in (1 << n for n in range(6, 20)):
        torch.full((size,), float("nan"))


def compare(x, z, weight, how, gh):
    poisoned()
    h = forward(x, z, weight, how)
    poisoned()
    found = backward(x, z, weight, how, gh, out=True)
    assert torch.equal(found.out, h)
    results = (h, *found[:3]), reference(x, z, weight, how, gh), exact(x, z, weight, how, gh)
    for a, b, want in zip(*results, strict=True):
        assert a.shape == want.shape and a.is_contiguous()
        # no further from the truth than twice PyTorch's own operations in the same types
        error, theirs = ((m.double() - want).norm() for m in (a, b))
        assert error <= 2 * theirs + 1e-6 * want.norm(), (a.dtype, error.item(), theirs.item())
    assert [m.dtype for m in found[:3]] == [m.dtype for m in (x, z, weight)]


def test_a_norm_like_one_before_is_launched_as_that_was(monkeypatch):
    cuda = dispatch.Backend("cuda", "emulated", run=gated_cuda.gated_rms_norm)
    monkeypatch.setitem(dispatch.TABLES["gated_rms_norm"], "cuda", cuda)
    planned, plan_of = [], gated_cuda.plan_of
    monkeypatch.setattr(gated_cuda, "plan_of", lambda *given: planned.append(given) or plan_of(*given))
    weight = torch.randn(24)
    for lie, copied in ((lambda m: m[..., 8:32], False), (lambda m: m[..., :48:2], True)):
        gated_rms_norm(torch.randn(2, 5, 24), lie(torch.randn(2, 5, 60)), weight, EPS, 12)
        x, z = torch.randn(2, 5, 24), lie(torch.randn(2, 5, 60))
        want = forward(x, z, weight, Gating(EPS, 12, False))
        planned.clear()
        assert torch.equal(gated_rms_norm(x, z, weight, EPS, 12), want) and bool(planned) == copied


@pytest.mark.parametrize(
    ("d", "size", "before"),
    [(1, 1, False), (24, 24, False), (24, 8, True), (30, 10, False), (1536, 1536, True), (2560, 2560, False)],
)
def test_every_width_of_a_row_and_of_a_group(d, size, before):
    compare(*operands((7, d))[:3], Gating(EPS, size, before), torch.randn(7, d))


@pytest.mark.parametrize(
    ("types", "before"),
    [((F32, BF16, F16), True), ((BF16, BF16, F32), False), ((F16, F32, BF16), False)],
)
def test_types_may_be_mixed(types, before):
    *tensors, gh = operands((2, 5, 24), *types)
    compare(*tensors, Gating(EPS, 12, before), gh)


@pytest.mark.parametrize(("m", "d", "size"), [(300, 20, 20), (130, 48, 16), (9, 2560, 2560)])
def test_blocks_go_on_to_further_rows(m, d, size, monkeypatch):
    # one multiprocessor: two blocks or three take all the rows, and the last turn is not full
    monkeypatch.setattr(gated_cuda, "processors", lambda device: 1)
    *tensors, gh = operands((m, d))
    how = Gating(EPS, size, False)
    compare(*tensors, how, gh)
    first, again = (backward(*tensors, how, gh)[:3] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("first", [0, 8, 10])
def test_rows_are_read_and_written_where_they_lie(first):
    *_, weight, gh = operands((2, 5, 24))
    packed, gradient = torch.randn(2, 5, 60), torch.full((2, 5, 60), 7.0)
    x, z = packed[..., 36:], packed[..., first : first + 24]
    compare(x, z, weight, Gating(EPS, 12, False), gh.expand(2, 5, 24))
    gz = gradient[..., first : first + 24]
    found = backward(x, z, weight, Gating(EPS, 12, False), gh, gz=gz)
    assert found.z is gz
    # what lies beside it is left alone
    assert (gradient[..., :first] == 7).all() and (gradient[..., first + 24 :] == 7).all()
    want = backward(x.contiguous(), z.contiguous(), weight, Gating(EPS, 12, False), gh)
    for a, b in zip((found.x, gz, found.weight), want[:3], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    compare(x, z.transpose(0, 1).contiguous().transpose(0, 1), torch.randn(48)[::2], Gating(EPS, 24, True), gh)
    # the gradient of a sum has strides of zero
    compare(x, z, weight, Gating(EPS, 24, False), torch.randn(()).expand(2, 5, 24))


def test_large_small_and_broken_rows():
    values = [(3e15, 1.0), (1e-3, -200.0), (0.0, 200.0), (float("nan"), 1.0), (1.0, float("nan")), (1.0, 1.0)]
    x, z = (torch.tensor(column)[:, None].expand(6, 40).contiguous() for column in zip(*values, strict=True))
    how, weight = Gating(EPS, 20, False), torch.ones(40)
    want = gated._torch(x, z, weight, *how)
    torch.testing.assert_close(forward(x, z, weight, how), want, equal_nan=True, atol=1e-6, rtol=1e-5)
    gx, gz, *_ = backward(x, z, weight, how, torch.ones_like(x), False)
    for g in (gx, gz):
        assert g[[0, 1, 2, 5]].isfinite().all() and g[[3, 4]].isnan().all()


def test_without_a_weight():
    x, z, _, gh = operands((5, 24))
    how, ones = Gating(EPS, 12, False), torch.ones(24)
    assert torch.equal(forward(x, z, None, how), forward(x, z, ones, how))
    gx, gz, gweight, _ = backward(x, z, None, how, gh)
    want = backward(x, z, ones, how, gh)
    assert gweight is None and torch.equal(gx, want.x) and torch.equal(gz, want.z)
    leaves = x.requires_grad_(), z.requires_grad_()
    op = torch.ops.hybridzoo.gated_norm_cuda
    assert all(map(torch.equal, torch.autograd.grad(op(*leaves, None, *how), leaves, gh), (gx, gz)))


def test_no_rows():
    *tensors, gh = operands((2, 0, 24), BF16)
    how = Gating(EPS, 8, False)
    assert forward(*tensors, how).shape == (2, 0, 24)
    gx, gz, gweight, out = backward(*tensors, how, gh, out=True)
    assert gx.shape == gz.shape == out.shape == gh.shape and not gweight.any()


@pytest.fixture
def ours(monkeypatch):
    monkeypatch.setattr(gated, "choose", lambda op, **facts: dispatch.TABLES[op]["cuda"])


def test_the_layer_takes_it(ours, monkeypatch):
    norm, (x, z, _, gh) = GatedRMSNorm(24, group_size=12), operands((2, 5, 24), BF16, BF16)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    leaves, launched, real = (x.requires_grad_(), z.requires_grad_(), norm.weight), [], gated_cuda.backward
    monkeypatch.setattr(gated_cuda, "backward", lambda *a: launched.append(a) or real(*a))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda m: kept.append(m) or m, lambda m: m):
        h = norm(x, z)
    assert h.dtype == BF16 and [m.data_ptr() for m in kept] == [m.data_ptr() for m in leaves]
    got = torch.autograd.grad(h, leaves, gh)
    want = exact(*(m.detach() for m in leaves), Gating(norm.eps, 12, False), gh)
    for a, b in zip((h, *got), want, strict=True):
        assert (a.double() - b).norm() <= (HALF[a.dtype] + 1e-6) * b.norm()
    # what needs no gradient of the weight forms none
    h = norm(x, z)
    norm.weight.requires_grad_(False)
    torch.autograd.grad(norm(x, z), (x, z), gh)
    assert [a[-1] for a in launched] == [True, False]
    # a derivative of the backward is an error and not a zero
    (once,) = torch.autograd.grad(h.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative\. Use backend='reference', or HYBRIDZOO_BACKEND=reference"):
        once.sum().backward()


def test_ops_are_registered_as_torch_wants_them(ours):
    x, z, weight, gh = operands((2, 5, 24))
    leaves = x.requires_grad_(), z.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.hybridzoo.gated_norm_cuda, (*leaves, EPS, 12, False))

    def run(x, z, weight):
        return gated_rms_norm(x, z, weight, EPS, group_size=12)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*leaves), leaves, gh) for f in (run, compiled)), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_arguments_are_named():
    x, z, weight, _ = operands((2, 24))
    with pytest.raises(
        ValueError, match=r"gated_rms_norm: gate has shape \(2, 23\), expected \(2, 24\) \(..., d\) like x"
    ):
        gated_rms_norm(x, z[:, 1:], weight, EPS)
    with pytest.raises(ValueError, match=r"gated_rms_norm: weight has shape \(23,\), expected \(24,\)"):
        gated_rms_norm(x, z, weight[1:], EPS)
    with pytest.raises(
        ValueError, match=r"gated_rms_norm: d = 24 is not a multiple of group_size = 7\. Pass a divisor"
    ):
        gated_rms_norm(x, z, weight, EPS, group_size=7)
    with pytest.raises(BackendError, match="the CUDA kernels need CUDA tensors, got cpu"):
        gated_rms_norm(x, z, weight, EPS, backend="cuda")


@pytest.mark.parametrize(
    ("d", "size", "backward", "lanes", "vectors", "blocks"),
    [
        (1536, 1536, False, 128, 3, 396),
        (1536, 1536, True, 128, 3, 264),
        (2048, 2048, True, 128, 4, 264),
        (5120, 5120, True, 512, 3, 132),
        (8192, 1024, True, 64, 4, 33),
        (24, 24, False, 8, 1, 396),
    ],
)
def test_how_rows_are_cut(d, size, backward, lanes, vectors, blocks):
    cut = plan((BF16, BF16, F32), 1 << 15, d, (d, 2 * d + 8, d, d), Gating(EPS, size, False), True, 132, backward)
    assert cut.arguments.startswith(f"<bf16, bf16, float, {lanes}, {vectors}, 0, ") and cut.blocks == blocks

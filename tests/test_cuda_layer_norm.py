"""The CUDA LayerNorm, run on the CPU thread by thread (tests/emulator), against float64: numbers, not speed."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from test_cuda_norm import poisoned

from hybridzoo.kernels import dispatch
from hybridzoo.kernels.norm import cuda as cuda_norm
from hybridzoo.kernels.norm.cuda import CENTRED, backward, branch_layer_norm, forward, plan
from hybridzoo.kernels.seq import Seq
from hybridzoo.layers.norm import LayerNorm
from hybridzoo.layers.ss2d import SS2D

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-5
# half a unit in the last place
ROUNDED = {F32: 0.0, BF16: 2**-8, F16: 2**-11}
pytestmark = [
    pytest.mark.usefixtures("emulated"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def operands(shape, x=F32, h=F32, weight=F32, past=True):
    """Input, weight, bias, and the gradients of the output and of what goes past it; the mean of a row is of the size of its spread."""
    gains = [torch.randn(shape[-1]).to(weight) for _ in range(2)] if weight else [None, None]
    rows = torch.randn(shape) + torch.randn(*shape[:-1], 1)
    return rows.to(x), *gains, torch.randn(shape).to(h), torch.randn(shape).to(x) if past else None


def exact(x, weight, bias, gh, past):
    """Output and gradients in float64."""
    x, *gains = [m.double().requires_grad_() for m in (x, weight, bias) if m is not None]
    h = F.layer_norm(x, x.shape[-1:], *gains, eps=EPS)
    gx, *ggains = torch.autograd.grad(h, [x, *gains], gh.double())
    return h, gx if past is None else gx + past.double(), *ggains


def ours(x, weight, bias, gh, past):
    poisoned()
    h, same = forward(x, weight, EPS, gh.dtype, None, bias, True)
    assert same is x
    gx, *ggains, gadd = backward(x, weight, EPS, gh, past, True, None, True)
    assert gadd is None
    return [m for m in (h, gx, *ggains) if m is not None]


def compare(x, weight, bias, gh, past):
    got, wants = ours(x, weight, bias, gh, past), exact(x, weight, bias, gh, past)
    assert [m.dtype for m in got] == [m.dtype for m in (gh, x, weight, bias) if m is not None]
    for a, b in zip(got, wants, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= ROUNDED[a.dtype] + 2e-6, (a.dtype, error.item())


@pytest.mark.parametrize("d", [33, 96, 768, 8192])
def test_every_width_of_a_row(d):
    for m in (1, 9) if d < 8192 else (2,):
        compare(*operands((m, d)))


def test_a_row_of_one_channel_is_its_bias():
    x, weight, bias, gh, past = operands((5, 1))
    h, gx, gweight, gbias = ours(x, weight, bias, gh, past)
    assert torch.equal(h, bias.expand(5, 1)) and torch.equal(gx, past) and not gweight.any()
    torch.testing.assert_close(gbias, gh.sum(0))


@pytest.mark.parametrize("types", [(F32, BF16, F32), (BF16, BF16, F32), (F16, F32, F16), (BF16, F16, None)], ids=str)
def test_combinations_of_types(types):
    compare(*operands((2, 5, 24), *types))
    compare(*operands((7, 24), *types, past=False))


def test_blocks_go_on_to_further_rows_and_sums_keep_their_order(monkeypatch):
    # one multiprocessor: a few blocks take all the rows, and the last turn is not full
    monkeypatch.setattr(cuda_norm, "processors", lambda device: 1)
    for m, d in ((140, 96), (19, 768)):
        inputs = operands((m, d))
        compare(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(ours(*inputs), ours(*inputs), strict=True))


def test_a_mean_far_from_zero_costs_no_more_than_with_torch():
    x, weight, bias, gh, past = operands((9, 96))
    # numbers that float32 has exactly; it has no such mean of them
    x = (x * 64).round() / 64 + 4096
    leaves = [m.clone().requires_grad_() for m in (x, weight, bias)]
    own = F.layer_norm(leaves[0], (96,), *leaves[1:], eps=EPS)
    gx, *ggains = torch.autograd.grad(own, leaves, gh)
    theirs, wants = (own, gx + past, *ggains), exact(x, weight, bias, gh, past)
    for a, b, want in zip(ours(x, weight, bias, gh, past), theirs, wants, strict=True):
        error, least = ((m.double() - want).norm() / want.norm() for m in (a, b))
        assert error <= 2 * least + 1e-6 and error < 1e-3, (error.item(), least.item())
    # rows without any spread
    h, gx, *_ = ours(torch.full((3, 96), 1e4), weight, bias, gh[:3], None)
    torch.testing.assert_close(h, bias.expand(3, 96))
    assert gx.isfinite().all()


def test_rows_are_read_where_they_lie():
    _, weight, bias, gh, past = operands((2, 5, 96))
    x = torch.randn(2, 5, 200)[..., 8:104]
    rows, stride = cuda_norm._rows(x, 10, 96)
    assert rows.data_ptr() == x.data_ptr() and stride == 200
    compare(x, weight, bias, gh, past)
    compare(
        torch.randn(96, 5, 2).transpose(0, 2), weight, bias, gh[:1, :1].expand_as(gh), past[..., :1].expand_as(past)
    )
    compare(x, torch.randn(192)[::2], torch.randn(97)[1:], gh, past)


def test_no_rows():
    x, weight, bias, gh, past = operands((2, 0, 24), BF16)
    h, gx, gweight, gbias = ours(x, weight, bias, gh, past)
    assert h.shape == gx.shape == x.shape and not gweight.any() and not gbias.any()


@pytest.mark.parametrize("type_added", [F32, BF16], ids=str)
def test_all_gradients_meet_where_something_is_added_first(type_added):
    x, weight, bias, gh, past = operands((3, 4, 24), F32, BF16)
    add = torch.randn(3, 4, 24).to(type_added)
    leaves = [m.requires_grad_() for m in (x, weight, bias, add)]
    h, total = branch_layer_norm(x, weight, bias, EPS, BF16, add)
    assert torch.equal(total, x + add) and total.dtype == F32 and h.grad_fn is total.grad_fn and h.dtype == BF16
    gx, *ggains, gadd = torch.autograd.grad((h, total), leaves, (gh, past), retain_graph=True)
    want = exact(*(m.detach() for m in (total, weight, bias)), gh, past)
    for a, b in zip((h, gx, *ggains), want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=2**-8 if a.dtype == BF16 else 1e-5)
    assert gadd.dtype == type_added and torch.equal(gadd, gx.to(type_added))
    # one of the two results, and one of the leaves, alone
    assert torch.equal(torch.autograd.grad(total, x, past, retain_graph=True)[0], past)
    for leaf, b in zip(leaves[1:3], want[2:], strict=True):
        (g,) = torch.autograd.grad(h, leaf, gh, retain_graph=True)
        torch.testing.assert_close(g.double(), b, atol=1e-5, rtol=1e-5)
    (once,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative\. Use backend='reference', or HYBRIDZOO_BACKEND=reference"):
        once.sum().backward()


def test_a_frozen_weight_and_a_bias_of_another_type():
    x, weight, bias, gh, _ = operands((7, 24), BF16, BF16)
    bias = bias.bfloat16().requires_grad_()
    h, same = branch_layer_norm(x, weight, bias, EPS, BF16)
    assert same is x
    (g,) = torch.autograd.grad(h, bias, gh)
    assert g.dtype == BF16
    torch.testing.assert_close(g.float(), gh.float().sum(0), atol=0.05, rtol=0.01)
    wants = exact(x, weight, bias.detach(), gh, None)[0]
    assert (h.double() - wants).norm() <= (2**-8) * wants.norm()


def test_ops_are_registered_as_torch_wants_them():
    x, weight, bias, gh, _ = operands((2, 5, 24), F32, BF16)
    leaves = [m.requires_grad_() for m in (x, weight, bias)]
    op = torch.ops.hybridzoo.norm_cuda
    torch.library.opcheck(op, (x, weight, bias, EPS, BF16, True))
    torch.library.opcheck(op, (x, weight, None, EPS, BF16, True))
    got = torch.autograd.grad(op(x, weight, bias, EPS, BF16, True), leaves, gh)
    for a, b in zip(got, exact(*(m.detach() for m in leaves), gh, None)[1:], strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)

    def both(x):
        h, past = branch_layer_norm(x, weight, bias, EPS, BF16)
        h, past = branch_layer_norm(past, weight, bias, EPS, BF16, h)
        return (h * gh).sum() + past.sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(x), leaves) for f in (both, compiled)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def launched(monkeypatch):
    """The emulated kernels in the place of PyTorch's operations, and what they were launched for: direction and type of the output."""
    seen = []
    table = dispatch.TABLES["layer_norm"]
    monkeypatch.setitem(table, "cuda", dispatch.Backend("cuda", "emulated", run=branch_layer_norm))
    real = cuda_norm.forward, cuda_norm.backward
    monkeypatch.setattr(cuda_norm, "forward", lambda *a: seen.append(("forward", a[3])) or real[0](*a))
    monkeypatch.setattr(cuda_norm, "backward", lambda *a: seen.append(("backward", a[3].dtype)) or real[1](*a))
    return seen


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_layer_reads_once_and_writes_what_a_linear_layer_reads(dtype, launched, monkeypatch):
    norm, following = LayerNorm(24), torch.nn.Linear(24, 8, bias=False)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x, add = torch.randn(3, 24).to(dtype).requires_grad_(), torch.randn(3, 24).bfloat16()
    leaves, kept = [x, *norm.parameters()], []

    def keep(m):
        kept.extend([m.dtype] if m.shape == x.shape else [])
        return m

    def run():
        with torch.autocast("cpu", BF16), torch.autograd.graph.saved_tensors_hooks(keep, lambda m: m):
            h, past = norm(x, BF16, branch=True, add=add)
            y = following(h)
        return h, past, *torch.autograd.grad(y.float().square().sum() + past.float().sum(), leaves)

    got = run()
    # no wide copy: the sum, and what the linear layer reads
    assert launched == [("forward", BF16), ("backward", BF16)] and kept == [dtype, BF16]
    monkeypatch.setenv(dispatch.ENV, "reference")
    want = run()
    assert len(launched) == 2
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and (a - b).float().norm() <= 0.02 * b.float().norm()


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_what_ss2d_hands_to_its_projection_is_formed_again_by_the_kernel(activation, launched, monkeypatch):
    mixer = SS2D(24, out_activation=activation)
    x, seq = torch.randn(1, 6, 24, requires_grad=True), Seq.from_grid((2, 3), 1, 6, "cpu")
    # sums of the walks in float32
    scan = SS2D._scan
    monkeypatch.setattr(SS2D, "_scan", lambda *a: scan(*a).float())

    def run():
        with torch.autocast("cpu", BF16):
            y = mixer(x, seq=seq)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *mixer.parameters()])]

    got = run()
    if activation is None:
        assert launched == [("forward", BF16), ("forward", BF16), ("backward", BF16)]
    else:
        # the activation reads float32, as before
        assert launched == [("forward", F32), ("backward", F32)]
    monkeypatch.setenv(dispatch.ENV, "reference")
    for a, b in zip(got, run(), strict=True):
        assert (a - b).float().norm() <= 0.02 * b.float().norm()


@pytest.mark.parametrize(
    ("d", "backward", "lanes", "vectors", "blocks"),
    [
        (32, False, 8, 1, 528),
        (96, False, 8, 3, 528),
        (96, True, 8, 3, 396),
        (128, True, 8, 4, 264),
        (192, True, 16, 3, 396),
        (384, True, 32, 3, 396),
        (768, False, 64, 3, 528),
        (1025, True, 128, 3, 264),
        (6147, False, 512, 4, 132),
        (8192, False, 512, 4, 264),
        (8192, True, 512, 4, 132),
    ],
)
def test_how_rows_are_cut(d, backward, lanes, vectors, blocks):
    cut = plan((BF16, None, BF16, F32), 1 << 17, d, (d, d, d, d), CENTRED, EPS, 132, backward)
    flags = CENTRED if d % 4 == 0 else CENTRED + 4
    assert cut.arguments.startswith(f"<bf16, bf16, bf16, float, {lanes}, {vectors}, {flags}, ")
    assert cut.blocks == blocks and lanes * vectors * 4 >= d

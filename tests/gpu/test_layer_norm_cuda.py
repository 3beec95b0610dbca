"""The CUDA LayerNorm on a GPU, against float64: at most twice the error of torch's own operations in the same dtype."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils import checkpoint

import hybridzoo as zoo
from hybridzoo.kernels import branch_layer_norm, dispatch
from hybridzoo.kernels.gpu import launch_plans
from hybridzoo.kernels.norm import cuda as cuda_norm
from hybridzoo.kernels.norm.cuda import _Eager

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
EPS = 1e-5
WIDTHS = (
    1,
    3,
    32,
    33,
    48,
    96,
    127,
    128,
    192,
    384,
    511,
    768,
    1000,
    1024,
    1025,
    1536,
    2049,
    3072,
    4096,
    6148,
    8190,
    8192,
)


def operands(shape, x=F32, h=BF16, weight=F32, past=True):
    """Input, weight, bias, and the gradients of the output and of what goes past it."""

    def made(size, dtype):
        return torch.randn(size, device="cuda").to(dtype)

    gains = [made(shape[-1], weight) for _ in range(2)] if weight else [None, None]
    rows = torch.randn(shape, device="cuda") + torch.randn(*shape[:-1], 1, device="cuda")
    return rows.to(x), *gains, made(shape, h), made(shape, x) if past else None


def plain(x, weight, bias, gh, past):
    """Output and gradients by torch's operations, in the input's dtype."""
    leaves = [m.detach().requires_grad_() for m in (x, weight, bias) if m is not None]
    h = F.layer_norm(leaves[0], x.shape[-1:], *(m.to(x.dtype) for m in leaves[1:]), eps=EPS).to(gh.dtype)
    gx, *ggains = torch.autograd.grad(h, leaves, gh)
    return h, gx if past is None else gx + past, *ggains


def ours(x, weight, bias, gh, past, add=None):
    leaves = [None if m is None else m.detach().requires_grad_() for m in (x, weight, bias, add)]
    h, same = _Eager.apply(*leaves, EPS, gh.dtype, True)
    assert same.data_ptr() == x.data_ptr() if add is None else torch.equal(same, x + add)
    outs, gouts = ((h,), (gh,)) if past is None else ((h, same), (gh, past))
    return h, *torch.autograd.grad(outs, [m for m in leaves if m is not None], gouts)


def check(x, weight, bias, gh, past):
    # what is left in the allocator's memory must not show
    del_me = torch.full((1 << 24,), float("nan"), device="cuda")
    del del_me
    got, again = (ours(x, weight, bias, gh, past) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    for dtype in DTYPES:
        add = torch.randn(x.shape, device="cuda").to(dtype)
        if torch.promote_types(dtype, x.dtype) == x.dtype:
            # the bits of PyTorch's sum, and then those of its norm
            *outs, gadd = ours(x, weight, bias, gh, past, add)
            assert all(torch.equal(a, b) for a, b in zip(outs, ours(x + add, weight, bias, gh, past), strict=True))
            assert gadd.dtype == dtype and torch.equal(gadd, outs[1].to(dtype))
    exact = [None if m is None else m.double() for m in (x, weight, bias, gh, past)]
    wants = plain(*exact)
    # what comes through the norm cancels to almost nothing in a row of one or two channels: rounding is relative to its terms
    wide, gain, _, gwide, _ = exact
    rstd = (wide.var(-1, correction=0, keepdim=True) + EPS).rsqrt()
    through = gwide * (1 if gain is None else gain) * rstd
    scales = [wants[0].norm(), torch.maximum(wants[1].norm(), through.norm()), *(m.norm() for m in wants[2:])]
    for a, b, want, scale in zip(got, plain(x, weight, bias, gh, past), wants, scales, strict=True):
        scale = scale.clamp_min(1e-30)
        error, theirs = ((m.double() - want).norm() / scale for m in (a, b))
        floor = {F32: 2e-6, BF16: 2e-3, F16: 3e-4}[a.dtype]
        assert error <= 2 * theirs + floor, (a.dtype, error.item(), theirs.item())


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("m", [1, 37, 5000])
def test_every_width_of_a_row(d, m):
    check(*operands((m, d)))


@pytest.mark.parametrize("types", list(itertools.product(DTYPES, DTYPES, (*DTYPES, None))), ids=str)
def test_every_combination_of_types(types):
    check(*operands((3, 41, 96), *types))
    check(*operands((129, 77), *types, past=False))


def test_a_training_batch():
    check(*operands((16, 3136, 96), BF16, BF16, F32))
    check(*operands((16, 3136, 96), F32, BF16, F32))
    check(*operands((4, 784, 768), BF16, BF16, F32))


def test_rows_are_read_where_they_lie():
    x, weight, bias, gh, past = operands((2, 50, 64))
    wide = torch.randn(2, 50, 200, device="cuda")
    for first in (64, 66, 65):  # 16-, 8- and 4-byte borders
        check(wide[..., first : first + 64], weight, bias, gh, past)
    check(x.transpose(1, 2).contiguous().transpose(1, 2), weight, bias, gh, past)
    check(x, torch.randn(65, device="cuda")[1:], torch.randn(66, device="cuda")[2:], gh, past)
    check(x, weight, bias, gh[:1, :1].expand_as(gh), past[..., :1].expand_as(past))


def test_no_rows():
    x, weight, bias, gh, past = operands((2, 0, 24))
    h, gx, gweight, gbias = ours(x, weight, bias, gh, past)
    assert h.shape == gx.shape == x.shape and not gweight.any() and not gbias.any()


def test_offsets_beyond_two_to_the_31():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    m, d = (1 << 18) + 3, 8192
    x = torch.zeros(m, d, dtype=BF16, device="cuda")
    x[-3:] = torch.randn(3, d, device="cuda")
    weight = torch.ones(d, device="cuda")
    with torch.no_grad():
        h, _ = branch_layer_norm(x, weight, weight, EPS, BF16, backend="cuda")
        assert torch.equal(h[-3:], branch_layer_norm(x[-3:], weight, weight, EPS, BF16, backend="cuda")[0])
        gx, *_ = cuda_norm.backward(x, weight, EPS, h, h, False, None, True)
        assert torch.equal(gx[-3:], cuda_norm.backward(x[-3:], weight, EPS, h[-3:], h[-3:], False, None, True)[0])


def test_graph_capture():
    x, weight, bias, *_ = operands((3, 100, 768))
    with torch.no_grad():
        want = branch_layer_norm(x, weight, bias, EPS, BF16, backend="cuda")[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = branch_layer_norm(x / 2, weight, bias, EPS, BF16, add=x / 2, backend="cuda")
        out.zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


def test_compiles_without_graph_breaks():
    x, weight, bias, gh, past = operands((2, 40, 768))
    leaves = [m.requires_grad_() for m in (x, weight, bias)]

    def loss(x):
        h, same = branch_layer_norm(x, weight, bias, EPS, BF16, backend="cuda")
        h, same = branch_layer_norm(same, weight, bias, EPS, BF16, add=h, backend="cuda")
        return (h * gh).float().sum() + (same * past).sum()

    want = torch.autograd.grad(loss(x), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), leaves)
    for a, b in zip(got, want, strict=True):
        # gains of 80 rows: relative to the largest
        torch.testing.assert_close(a, b, atol=0.01 * b.abs().max().item(), rtol=0.02)
    torch.library.opcheck(torch.ops.hybridzoo.norm_cuda, (x, weight, bias, EPS, BF16, True))
    torch.library.opcheck(torch.ops.hybridzoo.norm_cuda, (x, None, None, EPS, F32, True))


def test_checkpointing_recomputes_it():
    x, weight, bias, *_ = operands((2, 40, 768))
    x.requires_grad_()

    def layer(x):
        h, same = branch_layer_norm(x, weight, bias, EPS, BF16, add=x.sin(), backend="cuda")
        return same + h.sigmoid()

    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(got, want)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_image_model_is_what_it_is_on_torchs_operations(autocast, monkeypatch):
    model = zoo.build("vmamba-micro", ["d_model=64", "in_channels=3", "stem={type: conv, patch: 4}"], device="cuda")
    model.train()
    images, labels = torch.randn(4, 3, 64, 64, device="cuda"), torch.arange(4, device="cuda")
    norms = sum(isinstance(m, torch.nn.LayerNorm) for m in model.modules())
    launched = []
    forward, backward = cuda_norm.forward, cuda_norm.backward
    monkeypatch.setattr(cuda_norm, "forward", lambda *a: launched.append(("forward", a[3])) or forward(*a))
    monkeypatch.setattr(cuda_norm, "backward", lambda *a: launched.append(("backward", a[3].dtype)) or backward(*a))

    def run():
        model.zero_grad()
        torch.manual_seed(0)  # of blocks that are left out
        with torch.autocast("cuda", BF16, enabled=autocast):
            loss = model(images, labels).loss
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    got = run()
    assert sum(way == "backward" for way, _ in launched) == norms
    # those in front of linear layers are formed again
    assert norms < sum(way == "forward" for way, _ in launched) <= 2 * norms
    if autocast:
        assert {dtype for _, dtype in launched} == {BF16}
    before = len(launched)
    table = dispatch.TABLES["layer_norm"]
    monkeypatch.setitem(table, "cuda", dispatch.Backend("cuda", "", lambda facts: "not this time"))
    monkeypatch.setattr(launch_plans, "_known", {})
    want = run()
    assert len(launched) == before
    for a, b in zip(got, want, strict=True):
        error = (a - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= (0.05 if autocast else 1e-3), error.item()

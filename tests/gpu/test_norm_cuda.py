"""The CUDA RMSNorm on a GPU, against float64: at most twice the error of torch's own operations in the same dtype."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils import checkpoint

import hybridzoo as zoo
from hybridzoo.kernels import branch_rms_norm, dispatch
from hybridzoo.kernels.gpu import launch_plans
from hybridzoo.kernels.norm import cuda as cuda_norm
from hybridzoo.kernels.norm.cuda import _Eager

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
EPS = 1e-5
WIDTHS = (1, 3, 8, 24, 64, 127, 256, 768, 1000, 1024, 1025, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8190, 8192)


def operands(shape, x=F32, h=BF16, weight=F32, past=True):
    """Input, weight, and the gradients of the output and of what goes past it."""

    def made(size, dtype):
        return torch.randn(size, device="cuda").to(dtype)

    gains = None if weight is None else made(shape[-1], weight)
    return made(shape, x), gains, made(shape, h), made(shape, x) if past else None


def plain(x, weight, gh, past):
    """Output and gradients by torch's operations, in the input's dtype."""
    leaves = [m.detach().requires_grad_() for m in (x, weight) if m is not None]
    wide = leaves[1].to(x.dtype) if weight is not None else None
    h = F.rms_norm(leaves[0], x.shape[-1:], wide, EPS).to(gh.dtype)
    gx, *gweight = torch.autograd.grad(h, leaves, gh)
    return h, gx if past is None else gx + past, *gweight


def ours(x, weight, gh, past, add=None):
    leaves = [None if m is None else m.detach().requires_grad_() for m in (x, weight, None, add)]
    h, same = _Eager.apply(*leaves, EPS, gh.dtype, False)
    assert same.data_ptr() == x.data_ptr() if add is None else torch.equal(same, x + add)
    outs, gouts = ((h,), (gh,)) if past is None else ((h, same), (gh, past))
    return h, *torch.autograd.grad(outs, [m for m in leaves if m is not None], gouts)


def check(x, weight, gh, past):
    # what is left in the allocator's memory must not show
    del_me = torch.full((1 << 24,), float("nan"), device="cuda")
    del del_me
    got, again = (ours(x, weight, gh, past) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    for dtype in DTYPES:
        add = torch.randn(x.shape, device="cuda").to(dtype)
        if torch.promote_types(dtype, x.dtype) == x.dtype:
            # the bits of PyTorch's sum, and then those of its norm
            *outs, gadd = ours(x, weight, gh, past, add)
            assert all(torch.equal(a, b) for a, b in zip(outs, ours(x + add, weight, gh, past), strict=True))
            assert gadd.dtype == dtype and torch.equal(gadd, outs[1].to(dtype))
    exact = [None if m is None else m.double() for m in (x, weight, gh, past)]
    wants = plain(*exact)
    # what comes through the norm cancels to almost nothing in a row of one channel: rounding is relative to its terms
    wide, gain, gwide, _ = exact
    through = gwide * (1 if gain is None else gain) * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    scales = [wants[0].norm(), torch.maximum(wants[1].norm(), through.norm()), *(m.norm() for m in wants[2:])]
    for a, b, want, scale in zip(got, plain(x, weight, gh, past), wants, scales, strict=True):
        scale = scale.clamp_min(1e-30)
        error, theirs = ((m.double() - want).norm() / scale for m in (a, b))
        floor = {F32: 1e-6, BF16: 2e-3, F16: 3e-4}[a.dtype]
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
    check(*operands((8, 2048, 768)))
    check(*operands((2, 1024, 5120), BF16, BF16, BF16))


def test_rows_are_read_where_they_lie():
    x, weight, gh, past = operands((2, 50, 64))
    wide = torch.randn(2, 50, 200, device="cuda")
    for first in (64, 66, 65):  # 16-, 8- and 4-byte borders
        check(wide[..., first : first + 64], weight, gh, past)
    check(x.transpose(1, 2).contiguous().transpose(1, 2), weight, gh, past)
    check(x, torch.randn(65, device="cuda")[1:], gh, past)
    check(x, weight, gh[:1, :1].expand_as(gh), past[..., :1].expand_as(past))
    check(torch.randn(2, 50, 6, 64, device="cuda")[:, :, 2], weight, gh, past)


def test_no_rows():
    x, weight, gh, past = operands((2, 0, 24))
    h, gx, gweight = ours(x, weight, gh, past)
    assert h.shape == gx.shape == x.shape and not gweight.any()


def test_offsets_beyond_two_to_the_31():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    m, d = (1 << 18) + 3, 8192
    x = torch.zeros(m, d, dtype=BF16, device="cuda")
    x[-3:] = torch.randn(3, d, device="cuda")
    with torch.no_grad():
        h, _ = branch_rms_norm(x, None, EPS, BF16, backend="cuda")
        assert torch.equal(h[-3:], branch_rms_norm(x[-3:], None, EPS, BF16, backend="cuda")[0])
        past = h
        gx, *_ = cuda_norm.backward(x, None, EPS, h, past, False)
        assert torch.equal(gx[-3:], cuda_norm.backward(x[-3:], None, EPS, h[-3:], past[-3:], False)[0])
        del gx
        h, past = branch_rms_norm(x, None, EPS, BF16, add=h, backend="cuda")
        want = branch_rms_norm(x[-3:], None, EPS, BF16, add=branch_rms_norm(x[-3:], None, EPS)[0])
        assert torch.equal(h[-3:], want[0]) and torch.equal(past[-3:], want[1])


def test_graph_capture_and_other_streams():
    x, weight, *_ = operands((3, 100, 768))
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        want = branch_rms_norm(x, weight, EPS, BF16, backend="cuda")[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = branch_rms_norm(x / 2, weight, EPS, BF16, add=x / 2, backend="cuda")
        out.zero_()
        graph.replay()
    side.synchronize()
    assert torch.equal(out, want)


def test_compiles_without_graph_breaks():
    x, weight, gh, past = operands((2, 40, 768))
    leaves = x.requires_grad_(), weight.requires_grad_()

    def loss(x):
        h, same = branch_rms_norm(x, weight, EPS, BF16, backend="cuda")
        h, same = branch_rms_norm(same, weight, EPS, BF16, add=h, backend="cuda")
        return (h * gh).float().sum() + (same * past).sum()

    want = torch.autograd.grad(loss(x), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0.02)
    torch.library.opcheck(torch.ops.hybridzoo.norm_cuda, (x, weight, None, EPS, BF16, False))
    torch.library.opcheck(torch.ops.hybridzoo.norm_cuda, (x, None, None, EPS, F32, False))


def test_checkpointing_recomputes_it():
    x, weight, *_ = operands((2, 40, 768))
    x.requires_grad_()

    def layer(x):
        h, same = branch_rms_norm(x, weight, EPS, BF16, add=x.sin(), backend="cuda")
        return same + h.sigmoid()

    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(got, want)


MIXERS = {
    "mamba": {"type": "mamba"},
    "mlp": {"type": "mlp", "d_intermediate": 128},
    "attention": {"type": "attention", "nheads": 2},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_is_what_it_is_on_torchs_operations(autocast, checkpointed, monkeypatch):
    config = {
        "vocab_size": 64,
        "d_model": 64,
        "layers": "(mamba mlp attention) * 2",
        "mixers": MIXERS,
    }
    model = zoo.build(config, device="cuda").train()
    model.gradient_checkpointing_enable(checkpointed)
    ids = torch.randint(0, 64, (2, 70), device="cuda")

    def run():
        model.zero_grad()
        with torch.autocast("cuda", BF16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    launched = []
    forward, backward = cuda_norm.forward, cuda_norm.backward
    monkeypatch.setattr(cuda_norm, "forward", lambda *a: launched.append("forward") or forward(*a))
    monkeypatch.setattr(cuda_norm, "backward", lambda *a: launched.append("backward") or backward(*a))
    got = run()
    # those in front of the two Mamba layers are formed again, all but the last where activations are checkpointed
    assert launched.count("backward") == 7 and launched.count("forward") == (13 if checkpointed else 9)
    monkeypatch.setitem(
        dispatch.TABLES["rms_norm"], "cuda", dispatch.Backend("cuda", "", lambda facts: "not this time")
    )
    monkeypatch.setattr(launch_plans, "_known", {})
    want = run()
    assert launched.count("backward") == 7
    for a, b in zip(got, want, strict=True):
        error = (a - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= (0.03 if autocast else 1e-4), error.item()


def test_decoding_is_the_full_pass():
    config = {"vocab_size": 64, "d_model": 64, "layers": "(mamba mlp) * 2", "mixers": MIXERS, "residual_in_fp32": True}
    model = zoo.build(config, device="cuda", dtype=BF16).eval()
    ids = torch.randint(0, 64, (3, 12), device="cuda")
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :6])
        steps = torch.stack([model.step(ids[:, t], out.state) for t in range(6, 12)], 1)
    torch.testing.assert_close(steps, whole[:, 6:], atol=0.05, rtol=0.05)

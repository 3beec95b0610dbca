"""The CUDA norm with a gate on a GPU, against float64: at most twice the error of torch's own operations in the same types."""

import itertools

import pytest
import torch

from hybridzoo.kernels import gated_rms_norm
from hybridzoo.kernels.norm import gated, gated_cuda
from hybridzoo.kernels.norm.gated_cuda import Gating

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-5


def operands(shape, x=BF16, z=BF16, weight=F32):
    """Input, gate, weight and the gradient of the output."""

    def made(size, dtype):
        return torch.randn(size, device="cuda").to(dtype)

    return made(shape, x), made(shape, z) * 2, made(shape[-1], weight), made(shape, x)


def plain(x, z, weight, gh, how):
    leaves = [m.detach().requires_grad_() for m in (x, z, weight)]
    h = gated._torch(*leaves, *how)
    return h.detach(), *torch.autograd.grad(h, leaves, gh)


def ours(x, z, weight, gh, how):
    h = gated_cuda.forward(x, z, weight, how)
    found = gated_cuda.backward(x, z, weight, how, gh, out=True)
    assert torch.equal(found.out, h)
    return h, *found[:3]


def check(x, z, weight, gh, how):
    # what is left in the allocator's memory must not show
    del_me = torch.full((1 << 24,), float("nan"), device="cuda")
    del del_me
    got, again = (ours(x, z, weight, gh, how) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    exact = [m.double() for m in (x, z, weight, gh)]
    for a, b, want in zip(got, plain(x, z, weight, gh, how), plain(*exact, how), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        error, theirs = ((m.double() - want).norm() for m in (a, b))
        assert error <= 2 * theirs + 1e-6 * want.norm(), (a.dtype, error.item(), theirs.item())


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("d", "groups"),
    [(8, 1), (24, 3), (127, 1), (768, 2), (1536, 1), (2048, 1), (2050, 2), (4096, 1), (5120, 1), (8192, 8), (8192, 1)],
)
@pytest.mark.parametrize("m", [1, 37, 5000])
def test_every_width_of_a_row_and_of_a_group(m, d, groups, before):
    check(*operands((m, d)), Gating(EPS, d // groups, before))


@pytest.mark.parametrize("types", list(itertools.product((F32, BF16, F16), repeat=3)), ids=str)
def test_every_combination_of_types(types):
    check(*operands((3, 41, 96), *types), Gating(EPS, 48, False))
    check(*operands((129, 77), *types), Gating(EPS, 77, True))


def test_a_training_batch_in_the_slices_of_a_projection():
    x, _, weight, gh = operands((8, 2048, 1536))
    packed, gradient = (torch.randn(8, 2048, 3352, device="cuda").to(BF16) for _ in range(2))
    for first in (0, 4, 1):  # 16-, 8- and 2-byte borders
        z, before = packed[..., first : first + 1536], gradient.clone()
        check(x, z, weight, gh, Gating(EPS, 1536, False))
        gz = gradient[..., first : first + 1536]
        want = gated_cuda.backward(x, z, weight, Gating(EPS, 1536, False), gh).z
        gated_cuda.backward(x, z, weight, Gating(EPS, 1536, False), gh, gz=gz)
        assert torch.equal(gz, want)
        before[..., first : first + 1536] = want
        # what lies beside it is left alone
        assert torch.equal(gradient, before)


def test_offsets_beyond_two_to_the_31():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    m, d = (1 << 18) + 3, 8192
    x, weight, how = (
        torch.zeros(m, d, dtype=BF16, device="cuda"),
        torch.ones(d, device="cuda"),
        Gating(EPS, 1024, False),
    )
    x[-3:] = torch.randn(3, d, device="cuda")
    h = gated_cuda.forward(x, x, weight, how)
    assert torch.equal(h[-3:], gated_cuda.forward(x[-3:], x[-3:], weight, how))
    found = gated_cuda.backward(x, x, weight, how, h, False)
    want = gated_cuda.backward(x[-3:], x[-3:], weight, how, h[-3:], False)
    assert torch.equal(found.x[-3:], want.x) and torch.equal(found.z[-3:], want.z)


def test_graph_capture_compilation_and_autograd():
    x, z, weight, gh = operands((2, 40, 768))
    leaves = x.requires_grad_(), z.requires_grad_(), weight.requires_grad_()

    def loss(x, z, weight):
        return (gated_rms_norm(x, z, weight, EPS, backend="cuda") * gh).float().sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0.02)
    torch.library.opcheck(torch.ops.hybridzoo.gated_norm_cuda, (*leaves, EPS, 384, False))
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        want = gated_rms_norm(x, z, weight, EPS, backend="cuda").clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = gated_rms_norm(x, z, weight, EPS, backend="cuda")
        out.zero_()
        graph.replay()
    side.synchronize()
    assert torch.equal(out, want)

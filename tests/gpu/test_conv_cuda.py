"""The CUDA convolution on a GPU, against the float64 reference: at most twice the error of the PyTorch reference in the same dtype."""

import pytest
import torch
from torch.utils import checkpoint

from hybridzoo.kernels import Seq, causal_conv1d, dispatch
from hybridzoo.kernels.conv import chunked as conv
from hybridzoo.kernels.conv import cuda as cuda_conv
from hybridzoo.kernels.conv import reference
from hybridzoo.kernels.conv.inputs import ConvInputs

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("x", "weight", "bias", "initial_state")
# (b, l, d, k, dtype of the inputs, of the filter)
SIZES = [
    (2, 1, 33, 4, F32, F32),
    (2, 2, 64, 4, BF16, BF16),
    (3, 3, 96, 4, BF16, F32),
    (3, 63, 96, 4, F16, F16),
    (2, 65, 20, 4, F32, F32),
    (1, 127, 257, 4, BF16, F32),
    (2, 257, 3084, 4, BF16, BF16),
    (1, 1000, 72, 4, F16, F32),
    (1, 2049, 40, 4, BF16, BF16),
    (1, 4097, 24, 4, F32, F32),
    (1, 40001, 16, 4, BF16, F32),
    (8, 512, 1024, 4, BF16, BF16),
    *(
        (2, 130, d, k, dtype, dtype)
        for d, dtype in ((72, F32), (72, BF16), (36, BF16), (7, F16))
        for k in cuda_conv.WIDTHS
    ),
]


def operands(b, l, d, k, dtype, wide, state=True, bias=True):
    def made(*shape, dtype):
        return torch.randn(*shape, device="cuda").to(dtype)

    return [
        made(b, l, d, dtype=dtype),
        made(d, k, dtype=wide),
        made(d, dtype=wide) if bias else None,
        made(b, k - 1, d, dtype=dtype) if state else None,
    ]


def documents(b, l):
    """Documents of length 1 and up, padding behind the last."""
    ids = (torch.rand(b, l, device="cuda") < 0.2).cumsum(1)
    return ids.masked_fill(torch.arange(l, device="cuda") >= torch.randint(1, l + 1, (b, 1), device="cuda"), -1)


def run(op, inputs, doc, silu, gout):
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = op(*leaves, doc, silu)
    grads = iter(torch.autograd.grad(out, [x for x in leaves if x is not None], gout.to(out.dtype)))
    return {"out": out, **{name: next(grads) for name, x in zip(NAMES, leaves, strict=True) if x is not None}}


def check(inputs, doc=None, silu=True):
    x = inputs[0]
    gout = torch.randn(x.shape, device="cuda").to(x.dtype)
    # what is left in the allocator's memory must not show
    del_me = torch.full((1 << 24,), float("nan"), device="cuda")
    del del_me
    got, again = (run(torch.ops.hybridzoo.causal_conv1d_cuda, inputs, doc, silu, gout) for _ in range(2))
    assert all(torch.equal(got[name], again[name]) for name in got)
    definition = reference.causal_conv1d if x.shape[1] <= 300 else conv.causal_conv1d

    def plain(*args):
        return definition(ConvInputs(*args[:-1]), args[-1])

    exact = run(plain, [None if m is None else m.double() for m in inputs], doc, silu, gout)
    same = run(plain, inputs, doc, silu, gout)
    floor = {F32: 1e-6, BF16: 2e-3, F16: 3e-4}[x.dtype]
    for name, want in exact.items():
        scale = want.norm().clamp_min(1e-30)
        error, allowed = ((m[name].double() - want).norm() / scale for m in (got, same))
        assert error <= 2 * allowed + floor, (name, error.item(), allowed.item())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outputs_and_gradients(sizes):
    check(operands(*sizes))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_what_may_be_left_out(state, bias, silu):
    check(operands(2, 77, 72, 4, BF16, BF16, state, bias), silu=silu)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("l", [1, 7, 130, 1000])
def test_documents(l, k, dtype):
    for d in (48, 21):
        check(operands(3, l, d, k, dtype, F32), documents(3, l))


def test_slices_of_a_projection_are_read_in_place():
    x, *rest = operands(2, 200, 64, 4, BF16, BF16)
    wide = torch.randn(2, 200, 3 * 64 + 8, device="cuda").to(BF16)
    for first in (64, 60, 57):  # 16-, 8- and 2-byte borders
        check([wide[..., first : first + 64], *rest])
    check([x.transpose(1, 2).contiguous().transpose(1, 2), *rest])


def test_an_incoming_gradient_that_is_one_number():
    inputs = [m.requires_grad_() for m in operands(2, 50, 64, 4, BF16, BF16)]
    got = torch.autograd.grad(causal_conv1d(*inputs[:3], initial_state=inputs[3], backend="cuda").sum(), inputs)
    want = torch.autograd.grad(causal_conv1d(*inputs[:3], initial_state=inputs[3], backend="chunked").sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


def test_offsets_beyond_two_to_the_31():
    b, l, d = 2, 16385, 65792
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    small = operands(1, l, 64, 4, BF16, BF16)
    wide = torch.zeros(b, l, d, dtype=BF16, device="cuda")[..., -64:]
    assert wide.stride(0) + l * wide.stride(1) > 2**31
    wide[1] = small[0][0]
    state = small[3].expand(2, 3, 64)
    got = causal_conv1d(wide, *small[1:3], initial_state=state, backend="cuda")
    assert torch.equal(got[1:], causal_conv1d(*small[:3], initial_state=small[3], backend="cuda"))


def test_public_op_with_packed_text_and_final_state():
    x, weight, bias, state = operands(1, 30, 64, 4, BF16, BF16)
    seq = Seq.from_documents(torch.tensor([[0] * 11 + [1] * 12 + [-1] * 7], device="cuda"))
    options = dict(activation="silu", initial_state=state, seq=seq, return_final_state=True)
    got, want = (causal_conv1d(x, weight, bias, backend=name, **options) for name in ("cuda", "reference"))
    torch.testing.assert_close(got[0][:, :23], want[0][:, :23], atol=0.05, rtol=0.05)
    assert torch.equal(got[1], want[1])


def test_graph_capture_and_other_streams():
    inputs = operands(2, 100, 64, 4, BF16, BF16)
    doc = documents(2, 100)
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        want = cuda_conv.causal_conv1d(ConvInputs(*inputs, doc), True).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cuda_conv.causal_conv1d(ConvInputs(*inputs, doc), True)
        out.zero_()
        graph.replay()
    side.synchronize()
    assert torch.equal(out, want)


def test_compiles_without_graph_breaks():
    x, weight, bias, state = inputs = [m.requires_grad_() for m in operands(2, 40, 64, 4, BF16, BF16)]

    def loss(x):
        out, last = causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, return_final_state=True, backend="cuda"
        )
        return out.float().square().sum() + last.float().sum()

    want = torch.autograd.grad(loss(x), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0.02)
    torch.library.opcheck(torch.ops.hybridzoo.causal_conv1d_cuda, (*inputs, documents(2, 40), True))
    torch.library.opcheck(torch.ops.hybridzoo.causal_conv1d_cuda, (x, weight, None, None, None, False))


def test_checkpointing_recomputes_it():
    x, *rest = operands(2, 40, 64, 4, BF16, BF16)
    x.requires_grad_()

    def layer(x):
        return causal_conv1d(x, *rest[:2], activation="silu", initial_state=rest[2], backend="cuda")

    want = torch.autograd.grad(layer(x).float().sum(), x)
    got = torch.autograd.grad(checkpoint.checkpoint(layer, x, use_reentrant=False).float().sum(), x)
    assert torch.equal(got[0], want[0])


def test_autocast_keeps_inputs_and_filter_as_they_are():
    x, weight, bias, state = operands(2, 40, 64, 4, BF16, F32)
    with torch.autocast("cuda", torch.bfloat16):
        out = causal_conv1d(x, weight, bias, initial_state=state, backend="cuda")
    assert out.dtype == BF16
    assert torch.equal(out, causal_conv1d(x, weight, bias, initial_state=state, backend="cuda"))


@pytest.mark.parametrize("case", ["plain", "state", "packed"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_no_further_from_the_truth_than_the_causal_conv1d_library(dtype, case):
    if not dispatch.installed["causal_conv1d"] or isinstance(dispatch.library("causal_conv1d"), str):
        pytest.skip("causal_conv1d is not installed")
    inputs = operands(2, 515, 256, 4, dtype, dtype, state=case == "state")
    options = {"activation": "silu", "initial_state": inputs[3]}
    if case == "packed":
        options["seq"] = Seq.from_documents(documents(2, 515).clamp(min=0))
    present = [m for m in inputs if m is not None]
    gout = torch.randn(2, 515, 256, device="cuda").to(dtype)

    def results(backend, change=lambda m: m):
        leaves = [None if m is None else change(m.detach()).requires_grad_() for m in inputs]
        out = causal_conv1d(*leaves[:3], **options | {"initial_state": leaves[3]}, backend=backend)
        return [out, *torch.autograd.grad(out, [m for m in leaves if m is not None], change(gout))]

    exact = results("chunked", lambda m: m.double())
    for a, b, want in zip(results("cuda"), results("causal_conv1d"), exact, strict=True):
        error, theirs = ((m.double() - want).norm() / want.norm() for m in (a, b))
        assert error <= 1.5 * theirs + 1e-6, (error.item(), theirs.item())
    assert len(exact) == len(present) + 1

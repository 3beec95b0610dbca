"""The CUDA convolution, run on the CPU thread by thread (tests/emulator), against the float64 reference: numbers, not speed."""

import os
import shutil

import pytest
import torch

from hybridzoo.kernels import Seq, causal_conv1d
from hybridzoo.kernels.conv import cuda as cuda_conv
from hybridzoo.kernels.conv import op as api
from hybridzoo.kernels.conv import reference
from hybridzoo.kernels.conv.inputs import ConvInputs
from hybridzoo.kernels.gpu import nvrtc

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes of g++; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
pytestmark = pytest.mark.usefixtures("emulated")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
TOLERANCE = {F32: 1e-6, BF16: 4e-3, F16: 5e-4}


def operands(b, l, d, k, dtype=F32, filter_dtype=F32, state=True, bias=True):
    return [
        torch.randn(b, l, d).to(dtype),
        torch.randn(d, k).to(filter_dtype),
        torch.randn(d).to(filter_dtype) if bias else None,
        torch.randn(b, k - 1, d).to(dtype) if state else None,
    ]


def documents(b, l):
    """Documents of length 1 and up, padding behind the last."""
    ids = (torch.rand(b, l) < 0.3).cumsum(1)
    return ids.masked_fill(torch.arange(l) >= torch.randint(1, l + 1, (b, 1)), -1)


def poisoned():
    # what the allocator hands out next, in the sizes of these tests
    for size in (1 << n for n in range(6, 20)):
        torch.full((size,), float("nan"))


def compare(inputs, doc=None, silu=True, strip=None):
    x = inputs[0]
    call = cuda_conv.readable(ConvInputs(*inputs, doc))
    poisoned()
    out = cuda_conv.forward(call, silu, strip)
    exact = [None if m is None else m.double().requires_grad_() for m in inputs]
    want = reference.causal_conv1d(ConvInputs(*exact, doc), silu)
    gout = torch.randn(x.shape).to(x.dtype)
    grads = torch.autograd.grad(want, [m for m in exact if m is not None], gout.double())
    got = [g for g, m in zip(cuda_conv.backward(call, silu, gout, strip)[:4], inputs, strict=True) if m is not None]
    for a, b in zip((out, *got), (want, *grads), strict=True):
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-30)
        assert error < TOLERANCE[x.dtype], error


CASES = {
    "plain": ((2, 70, 40, 4), {}),
    "packed, with a state": ((2, 41, 40, 4), dict(packed=True)),
    "odd channels, one step": ((3, 1, 21, 2, F16), {}),
    "odd channels, packed, wide": ((1, 37, 13, 8, BF16), dict(packed=True)),
    "eight-byte rows, nothing optional": ((1, 33, 36, 3, BF16, BF16, False, False), dict(silu=False)),
}


@needs_compiler
@pytest.mark.parametrize(("sizes", "more"), CASES.values(), ids=CASES)
def test_outputs_and_gradients(sizes, more):
    doc = documents(*sizes[:2]) if more.get("packed") else None
    compare(operands(*sizes), doc, more.get("silu", True))


@needs_compiler
@exhaustive
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("k", cuda_conv.WIDTHS)
def test_every_width(k, dtype):
    for d in (16, 20, 7):
        for packed in (False, True):
            compare(operands(2, 67, d, k, dtype), documents(2, 67) if packed else None, strip=8)


@needs_compiler
def test_strips_and_short_rows_give_the_same():
    for l in (1, 2, 3, 65, 129):
        for strip in (8, 32):
            compare(operands(1, l, 40, 4), strip=strip)


@needs_compiler
def test_slices_of_a_projection_are_read_in_place():
    x, *rest = operands(2, 30, 40, 4)
    wide = torch.randn(2, 30, 104)
    sliced = wide[..., 64:]
    call = cuda_conv.readable(ConvInputs(sliced, *rest, None))
    assert call.x is sliced
    compare([sliced, *rest])
    # an incoming gradient of stride zero, a state cut from a longer one, channels that are not neighbours
    compare([x.transpose(1, 2).contiguous().transpose(1, 2), *rest[:2], torch.randn(2, 7, 40)[:, 2:5]])
    got = cuda_conv.backward(call, True, torch.ones(()).expand(2, 30, 40))
    want = cuda_conv.backward(call, True, torch.ones(2, 30, 40))
    assert all(torch.equal(a, b) for a, b in zip(got[:4], want[:4], strict=True))


@needs_compiler
@pytest.mark.parametrize(("d", "dtype"), [(40, F32), (21, BF16), (40, BF16)], ids=["fp32", "odd", "bf16"])
def test_the_convolution_writes_into_a_half_and_nowhere_else(d, dtype):
    x, gout, weight = torch.randn(2, 70, d).to(dtype), torch.randn(2, 70, d).to(dtype), torch.randn(d, 4)
    call = cuda_conv.readable(ConvInputs(x, weight, None, torch.randn(2, 3, d).to(dtype), None))
    want = cuda_conv.backward(call, True, gout)
    for half in (0, 1):
        around = torch.full((2, 70, 2 * d), float("nan"), dtype=dtype)
        got = cuda_conv.backward(call, True, gout, gx=around.chunk(2, dim=-1)[half])
        for g, w in zip(got, want, strict=True):
            assert g is w or torch.equal(g, w)
        assert around.chunk(2, dim=-1)[1 - half].isnan().all()


@needs_compiler
def test_ops_are_registered_as_torch_wants_them():
    inputs = [x.requires_grad_() for x in operands(2, 9, 40, 4)]
    doc = Seq.from_documents(torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3, -1]] * 2)).doc
    torch.library.opcheck(torch.ops.hybridzoo.causal_conv1d_cuda, (*inputs, doc, True))
    torch.library.opcheck(torch.ops.hybridzoo.causal_conv1d_cuda, (*inputs[:2], None, None, None, False))
    out, want = (f(ConvInputs(*inputs, doc), True) for f in (cuda_conv.causal_conv1d, reference.causal_conv1d))
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad((y * weights).sum(), inputs) for y in (out, want)]
    for a, b in zip((out, *grads[0]), (want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@needs_compiler
def test_mixed_types_meet_in_float32_and_results_keep_their_own():
    x, weight, bias, state = (m.requires_grad_() for m in operands(1, 9, 40, 4))
    half = [x.to(BF16), weight.to(F16), bias, state]
    out = cuda_conv.causal_conv1d(ConvInputs(*half, None), True)
    grads = torch.autograd.grad(out.float().sum(), half)
    assert [m.dtype for m in (out, *grads)] == [BF16, BF16, F16, F32, F32]
    torch.testing.assert_close(
        out.float(), reference.causal_conv1d(ConvInputs(*half, None), True).float(), atol=0.02, rtol=0.02
    )


def test_rows_of_no_tokens():
    call = cuda_conv.readable(ConvInputs(*operands(2, 0, 40, 4), None))
    assert cuda_conv.forward(call, True).shape == (2, 0, 40)
    assert all(not g.any() for g in cuda_conv.backward(call, True, call.x)[:4])


@pytest.mark.parametrize(
    ("shape", "arguments", "blocks"),
    [
        # eight channels a thread, four in the backward; strips as long as leaves every multiprocessor its blocks
        (((8, 2048, 3072), False), "<bf16, bf16, 4, 8, 8, 4>", 8 * 16 * 12),
        (((8, 2048, 3072), True), "<bf16, bf16, 4, 4, 8, 3>", 8 * 8 * 24),
        (((1, 2048, 1536), False), "<bf16, bf16, 4, 8, 8, 4>", 64 * 6),
        (((8, 2048, 3076), False), "<bf16, bf16, 4, 4, 8, 4>", 8 * 8 * 25),
        (((8, 2048, 3073), False), "<bf16, bf16, 4, 4, 12, 4>", 8 * 8 * 25),
    ],
)
def test_how_a_call_is_cut(shape, arguments, blocks):
    (b, l, d), backward = shape
    strides = (l * d, d, 1)
    signature = (BF16, BF16, (b, l, d), 4, strides, (0, 0), strides, strides, 16, False, True)
    cut = cuda_conv.plan(signature, 132, backward)
    assert (cut.arguments, cut.blocks) == (arguments, blocks)


@needs_compiler
def test_a_convolution_like_one_before_is_not_looked_at_again(monkeypatch):
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_conv, "refuse_tensors", lambda facts: None)
    x, weight, bias, state = (m.requires_grad_() for m in operands(2, 40, 24, 4))

    def run(x=x, bias=bias, **options):
        y = causal_conv1d(x, weight, bias, initial_state=state, **{"activation": "silu"} | options)
        return (y, *torch.autograd.grad(y.square().sum(), (x, weight, state)))

    want = run()
    chosen, looked = api.choose, []
    monkeypatch.setattr(api, "choose", lambda op, **facts: looked.append(op) or chosen(op, **facts))
    assert all(map(torch.equal, run(), want)) and not looked
    with torch.no_grad():
        y = causal_conv1d(x, weight, bias, initial_state=state, activation="silu")
        both = causal_conv1d(x, weight, bias, initial_state=state, activation="silu", return_final_state=True)
        short = causal_conv1d(x[:, :2], weight, bias, initial_state=state, activation="silu", return_final_state=True)
        again = causal_conv1d(x[:, :2], weight, bias, initial_state=state, activation="silu", return_final_state=True)
    assert torch.equal(y, want[0]) and torch.equal(both[0], y) and torch.equal(both[1], x[:, -3:])
    assert all(map(torch.equal, short, again)) and torch.equal(short[1], torch.cat([state[:, 2:], x[:, :2]], 1))
    assert len(looked) == 1
    looked.clear()
    run(activation=None), run(bias=None), run(x[:, 1:].detach().requires_grad_())
    assert len(looked) == 3
    assert torch.allclose(run(backend="chunked")[0], want[0], atol=1e-5) and len(looked) == 4
    with pytest.raises(ValueError, match="activation is 'relu'"):
        run(activation="relu")


@needs_compiler
def test_a_second_derivative_is_an_error(monkeypatch):
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_conv, "refuse_tensors", lambda facts: None)
    x, weight, *_ = (m.requires_grad_() for m in operands(1, 9, 8, 4))
    (gx,) = torch.autograd.grad(causal_conv1d(x, weight, activation="silu").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative\. Use backend='reference', or HYBRIDZOO_BACKEND=reference"):
        gx.sum().backward()
    (gx,) = torch.autograd.grad(causal_conv1d(x, weight, activation="silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.autograd.grad((gx + x.square()).sum(), x)

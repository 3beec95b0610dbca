"""The CUDA product of few rows, run on the CPU thread by thread (tests/emulator), against PyTorch's operations in float64."""

import shutil

import pytest
import torch

from hybridzoo.kernels.few import cuda, plain
from hybridzoo.kernels.few.inputs import StepConv, StepNorm, StepProduct
from hybridzoo.kernels.norm import gated

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = [
    pytest.mark.usefixtures("emulated"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]
# half a unit in the last place
UNIT = {F32: 2**-20, BF16: 2**-8, F16: 2**-11}


def exactly(x):
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    # a tuple with names
    return type(x)(*map(exactly, x)) if isinstance(x, tuple) else x


def near(got, want, of, scale=1.0):
    # x is rounded to 16 bits behind a norm, and what goes into a convolution
    assert (got.double() - want).norm() <= scale * UNIT[of] * want.norm().clamp_min(1e-30), (
        (got.double() - want).norm() / want.norm()
    ).item()


def product(b=3, k=136, n=70, dtype=BF16, **more):
    x, weight, bias = torch.randn(b, k).to(dtype), torch.randn(n, k).to(dtype) / k**0.5, torch.randn(n).to(dtype)
    return StepProduct(x, weight, bias, **more)


def check(i, scale=1.0):
    assert cuda.misfit(i) is None
    states = [] if i.conv is None else [s := i.conv.state.clone(), s.double()]
    wide = exactly(i)
    if states:
        i, wide = (
            i._replace(conv=i.conv._replace(state=states[0])),
            wide._replace(conv=wide.conv._replace(state=states[1])),
        )
    got, want = cuda.step_linear(i), plain.step_linear(wide)
    assert got.shape == want.shape and got.dtype == (i.weight.dtype if i.residual is None else i.residual.dtype)
    near(got, want, got.dtype if i.norm is None and i.residual is None else i.weight.dtype, scale)
    if states:
        near(*states, i.weight.dtype)
    return got


@pytest.mark.parametrize(
    ("b", "k", "n", "dtype"), [(1, 8, 3, BF16), (8, 520, 33, BF16), (17, 264, 40, BF16), (3, 136, 70, F16)], ids=str
)
def test_sizes(b, k, n, dtype):
    check(product(b, k, n, dtype))


def stream_of(b, k, dtype):
    # far from zero and of unequal rows, so that a norm has work to do
    return ((torch.randn(b, k) + 1) * torch.linspace(0.1, 10, b)[:, None]).to(dtype)


# every instance of a kernel takes the compiler a second or two
@pytest.mark.parametrize(("stream", "centred"), [(F32, False), (BF16, True)], ids=str)
def test_a_norm_in_front(stream, centred):
    for b, k in ((1, 136), (6, 264)):
        gain, shift = torch.randn(2, k).to(BF16)
        i = product(b, k, norm=StepNorm(gain, 1e-5, shift if centred else None, centred))
        check(i._replace(x=stream_of(b, k, stream)))
    check(product(norm=StepNorm(None, 1e-5, None, centred))._replace(x=stream_of(3, 136, stream)))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("group_size", [None, 68])
def test_a_gated_norm_in_front(group_size, behind):
    wide = torch.randn(3, 300).to(BF16)
    gate = wide[:, 4:140]  # 8-byte borders
    norm = StepNorm(torch.randn(136).to(BF16), 1e-5, gate=gate, group_size=group_size, norm_before_gate=behind)
    check(product(norm=norm)._replace(x=stream_of(3, 136, BF16)))


@pytest.mark.parametrize("behind", [False, True])
def test_the_gated_norm_alone(behind):
    wide = torch.randn(2, 3, 304).to(BF16)
    x, gate, gain = wide[..., 4:140], wide[..., 144:280], torch.randn(136).to(BF16)
    for size in (136, 34 * 2):
        got = gated._cuda(x, gate, gain, 1e-5, size, behind)
        assert gated._misfit(x, gate, gain, size) is None
        near(got, gated._torch(*map(exactly, (x, gate, gain)), 1e-5, size, behind), BF16)
        # the bits of the one in front of a product
        assert torch.equal(got[1, 1:2], gated._cuda(x[1, 1:2], gate[1, 1:2], gain, 1e-5, size, behind))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_residual_stream_behind(dtype):
    stream = torch.randn(3, 90).to(dtype)[:, 9:79]
    kept = stream.clone()
    check(product(residual=stream, multiplier=0.5), 2.0)
    assert torch.equal(stream, kept)


@pytest.mark.parametrize("activation", cuda.ACTIVATIONS)
def test_activations(activation):
    check(product(activation=activation))
    check(product(b=1, n=52, activation=activation, gated=True, gate_multiplier=0.5))


@pytest.mark.parametrize("silu", [False, True])
def test_a_convolution_behind_some_rows(silu):
    for width, batch in ((4, 3), (2, 1)):
        state = torch.randn(batch, width - 1, 60).to(BF16)[:, :, 20:]
        taps, bias = torch.randn(40, width).to(BF16), torch.randn(40).to(BF16)
        check(product(batch, conv=StepConv(9, state, taps, bias if silu else None, silu)), 2.0)


def test_a_rows_bits_do_not_depend_on_the_others():
    gain = torch.randn(520).to(BF16)
    i = product(17, 520, 40, norm=StepNorm(gain, 1e-5))
    i = i._replace(x=stream_of(17, 520, F32))
    whole = cuda.step_linear(i)
    for rows in (slice(0, 1), slice(3, 5), slice(16, 17)):
        assert torch.equal(cuda.step_linear(i._replace(x=i.x[rows])), whole[rows])


def test_numbers_that_are_none_stay_in_their_row():
    i = product(3)
    i.x[1, 5] = float("nan")
    got = check_finite = cuda.step_linear(i)
    assert got[1].isnan().all() and check_finite[::2].isfinite().all()
    relu = cuda.step_linear(i._replace(activation="relu"))
    assert relu[1].isnan().all()


def test_blocks_take_one_tile_after_the_other(monkeypatch):
    monkeypatch.setattr(cuda, "processors", lambda device: 2)
    check(product(2, 520, 150))
    check(product(2, 264, 300, gated=True, activation="silu"))


@pytest.mark.parametrize(
    ("n", "most", "rows"), [(2560, 16, 10), (10240, 16, 16), (192, 16, 2), (5120, 16, 13), (50280, 16, 16), (768, 8, 6)]
)
def test_how_rows_are_cut(n, most, rows):
    assert cuda.tiles_of(n, most, 132) == rows

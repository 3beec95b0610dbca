"""The CUDA product of few rows, run on the CPU thread by thread (tests/emulator), against PyTorch's operations in float64."""

import shutil

import pytest
import torch

from hybridzoo.kernels import (
    ScanNorms,
    conv_ssd_update,
    dispatch,
    selective_state_update,
    ssd_state_update,
    step_linear,
)
from hybridzoo.kernels.few import cuda, plain
from hybridzoo.kernels.few.inputs import StepConv, StepNorm, StepProduct
from hybridzoo.kernels.step import cuda as cuda_update

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
    ("b", "k", "n", "dtype"),
    [
        (1, 8, 3, BF16), (8, 520, 33, BF16), (17, 264, 40, BF16), (39, 264, 40, BF16), (3, 136, 70, F16),
        (2, 3000, 12, BF16), (1, 5048, 9, BF16),
    ],
    ids=str,
)  # fmt: skip
def test_sizes(b, k, n, dtype):
    # every number of pieces at a time, and shares of k that end within
    check(product(b, k, n, dtype))


def test_the_order_of_sums_depends_on_k_alone(monkeypatch):
    i, results = product(2, 5048, 300), []
    monkeypatch.setattr(cuda, "processors", lambda device: 8)
    for ring in ((5, 2), (4, 2), (2, 5)):
        monkeypatch.setattr(cuda, "ring_of", lambda k, most, total, ring=ring: ring)
        cuda.cut.cache_clear()
        results.append(cuda.step_linear(i))
    cuda.cut.cache_clear()
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize(
    ("k", "most", "total", "ring"),
    [
        (2560, 12, 50, (2, 6)), (5120, 10, 40, (2, 5)), (5120, 20, 20, (5, 4)), (768, 12, 6, (3, 4)), (1536, 24, 6, (3, 8)),
        (2560, 6, 50, (2, 3)), (4096, 10, 32, (2, 5)), (4096, 20, 16, (4, 5)),
    ],
)  # fmt: skip
def test_what_a_warp_takes_at_a_time(k, most, total, ring):
    assert cuda.ring_of(k, most, total) == ring


def stream_of(b, k, dtype):
    # far from zero and of unequal rows, so that a norm has work to do
    return ((torch.randn(b, k) + 1) * torch.linspace(0.1, 10, b)[:, None]).to(dtype)


# every instance of a kernel takes the compiler a second or two
@pytest.mark.parametrize(("stream", "centred"), [(F32, False), (BF16, True)], ids=str)
def test_a_norm_in_front(stream, centred):
    for b, k in ((1, 136), (5, 264)):
        gain, shift = torch.randn(2, k).to(BF16)
        i = product(b, k, norm=StepNorm(gain, 1e-5, shift if centred else None, centred))
        check(i._replace(x=stream_of(b, k, stream)))
    check(product(norm=StepNorm(None, 1e-5, None, centred))._replace(x=stream_of(3, 136, stream)))


@pytest.mark.parametrize(("group_size", "behind"), [(None, False), (68, True)])
def test_a_gated_norm_in_front(group_size, behind):
    wide = torch.randn(3, 300).to(BF16)
    gate = wide[:, 4:140]  # 8-byte borders
    norm = StepNorm(torch.randn(136).to(BF16), 1e-5, gate=gate, group_size=group_size, norm_before_gate=behind)
    check(product(norm=norm)._replace(x=stream_of(3, 136, BF16)))


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
    i = product(9, 520, 20, norm=StepNorm(gain, 1e-5))
    i = i._replace(x=stream_of(9, 520, F32))
    whole = cuda.step_linear(i)
    for rows in (slice(3, 4), slice(5, 7)):
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
    # an A100's shared memory, and less
    monkeypatch.setattr(cuda, "_room", lambda device: 64 << 10)
    check(product(2, 520, 150))
    check(product(2, 264, 300, gated=True, activation="silu"))


@pytest.mark.parametrize(
    ("n", "most", "rows"), [(2560, 16, 10), (10240, 16, 16), (192, 16, 2), (5120, 16, 13), (50280, 16, 16), (768, 8, 6)]
)
def test_how_rows_are_cut(n, most, rows):
    assert cuda.tiles_of(n, most, 132) == rows


@pytest.mark.parametrize(
    ("b", "k", "n", "part"),
    [
        (1, 2560, 10240, (1, 12)),
        (1, 5120, 2560, (1, 10)),
        (8, 2560, 10240, (8, 12)),
        (8, 5120, 2560, (8, 12)),
        (16, 5120, 2560, (16, 4)),
        (32, 768, 50280, (32, 12)),
        (64, 5120, 192, (16, 4)),
        (64, 1536, 768, (32, 10)),
        (64, 2560, 10240, "would read a weight of k = 2560 4 times for 64 rows"),
        (32, 5120, 2560, "would read a weight of k = 5120 2 times for 32 rows"),
        (32, 5120, None, "would read a weight"),
        (64, 768, None, "is for 1 to 32 rows, got 64"),
        (8, 12288, 192, "240128 bytes of shared memory for 8 rows of 12288, and has 232448"),
    ],
)
def test_how_rows_of_the_batch_are_parted(b, k, n, part):
    got = cuda.part_of(b, k, n, 227 << 10)
    assert got == part or (isinstance(part, str) and part in got), got


def mamba(b, d_model, layers=4):
    """A step of several Mamba layers, its states, and what it reads."""
    d, r, n = 2 * d_model, d_model // 16, 16
    rand = lambda *shape, scale=1.0: (torch.randn(*shape) * scale).to(BF16)  # noqa: E731
    weights = [
        {
            "norm": rand(d_model), "inner": rand(2 * d, d_model, scale=d_model**-0.5), "taps": rand(d, 4), "bias": rand(d),
            "x": rand(r + 2 * n, d, scale=d**-0.5), "dt": rand(d, r, scale=r**-0.5), "dt_bias": torch.randn(d) - 2,
            "A": torch.rand(d, n), "D": torch.randn(d), "outer": rand(d_model, d, scale=d**-0.5),
            "norms": ScanNorms(1e-6, rand(r), rand(n), rand(n)) if layer % 2 else None,
        }
        for layer in range(layers)
    ]  # fmt: skip
    states = [(torch.zeros(b, 3, d, dtype=BF16), torch.zeros(b, d, n)) for _ in range(layers)]

    def step(x, backend=None):
        for w, (conv, ssm) in zip(weights, states, strict=True):
            behind = StepConv(0, conv, w["taps"], w["bias"])
            h = step_linear(x, w["inner"], norm=StepNorm(w["norm"], 1e-5), conv=behind, backend=backend)
            u, z = h.chunk(2, -1)
            low, B, C = step_linear(u, w["x"], backend=backend).split([r, n, n], -1)
            y = selective_state_update(
                ssm, u, low, w["A"], B, C, w["D"], z, dt_weight=w["dt"], norms=w["norms"], log_rates=True,
                dt_bias=w["dt_bias"], dt_softplus=True, backend="chunked" if backend else None,
            )  # fmt: skip
            x = step_linear(y, w["outer"], residual=x, backend=backend)
        return x

    return step, [s for pair in states for s in pair]


def mamba2(b, d_model, layers=4, state=F32):
    """The same of Mamba-2, whose convolution is every other time with the product, or with the state update."""
    d, n, h = 2 * d_model, 128, d_model // 32
    rand = lambda *shape, scale=1.0: (torch.randn(*shape) * scale).to(BF16)  # noqa: E731
    width = d + 2 * n
    weights = [
        {
            "norm": rand(d_model), "inner": rand(d + width + h, d_model, scale=d_model**-0.5), "taps": rand(width, 4),
            "bias": rand(width), "dt_bias": torch.randn(h) - 2, "A": torch.rand(h), "D": torch.randn(h), "gain": rand(d),
            "outer": rand(d_model, d, scale=d**-0.5),
        }
        for _ in range(layers)
    ]  # fmt: skip
    states = [(torch.zeros(b, 3, width, dtype=BF16), torch.zeros(b, h, 64, n, dtype=state)) for _ in range(layers)]

    def step(x, backend=None):
        for layer, (w, (conv, ssm)) in enumerate(zip(weights, states, strict=True)):
            options = dict(
                log_rates=True, dt_bias=w["dt_bias"], dt_softplus=True, backend="chunked" if backend else None
            )
            behind = StepConv(d, conv, w["taps"], w["bias"]) if layer % 2 else None
            y = step_linear(x, w["inner"], norm=StepNorm(w["norm"], 1e-5), conv=behind, backend=backend)
            z, xBC, dt = y.split([d, width, h], -1)
            if behind is None:
                y = conv_ssd_update(
                    xBC, conv, w["taps"], w["bias"], ssm, dt, w["A"], w["D"], activation="silu", **options
                )
            else:
                u, B, C = xBC.split([d, n, n], -1)
                y = ssd_state_update(
                    ssm, u.unflatten(-1, (h, 64)), dt, w["A"], B[:, None], C[:, None], w["D"], **options
                )
            x = step_linear(
                y.flatten(1), w["outer"], norm=StepNorm(w["gain"], 1e-5, gate=z), residual=x, backend=backend
            )
        return x

    return step, [s for pair in states for s in pair]


@torch.no_grad()
def test_layers_from_one_kernel_to_the_next(monkeypatch):
    step, states = mamba(2, 64, 2)
    xs = torch.randn(2, 2, 64)
    want = [*(step(x, backend="torch") for x in xs), *(s.clone() for s in states)]
    for s in states:
        s.zero_()
    for op, run in (("step_linear", cuda.step_linear), ("update", cuda_update.update)):
        monkeypatch.setitem(dispatch.TABLES[op], "cuda", dispatch.Backend("cuda", "emulated", run=run))
    for a, b in zip([*map(step, xs), *states], want, strict=True):
        # PyTorch rounds between any two operations
        assert (a.double() - b.double()).norm() <= 0.03 * b.double().norm()

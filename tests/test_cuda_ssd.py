"""The CUDA kernels of SSD's forward, run on the CPU thread by thread (tests/emulator), against the loop in float64."""

import math
import os
import shutil

import pytest
import torch
from torch.utils import deterministic

from hybridzoo.kernels import Seq, dispatch, ssd
from hybridzoo.kernels.gpu import launch_plans, nvrtc
from hybridzoo.kernels.ssd import chunked, cuda, cuda_backward, op, reference
from hybridzoo.kernels.ssd.inputs import SsdInputs, SsdOptions

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes of g++; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
pytestmark = pytest.mark.usefixtures("emulated", "_one_processor")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
USUAL = SsdOptions(dt_softplus=True)
# one rounding of the operands of a product, as the state and what it takes up have it
ROUNDING = {F32: 2e-7, BF16: 2.5e-3, F16: 3.2e-4}


def processors(monkeypatch, count):
    monkeypatch.setattr(cuda, "processors", lambda device: count)


@pytest.fixture
def _one_processor(monkeypatch):
    processors(monkeypatch, 1)


def operands(b, l, h, p, g, n, dtype, optional=True, marked=False, spread=1.0):
    x, z = torch.randn(2, b, l, h, p).mul(spread).to(dtype)
    B, C = torch.randn(2, b, l, g, n).to(dtype)
    i = SsdInputs(x, (torch.randn(b, l, h) - 1).to(dtype), -4 * torch.rand(h) - 0.05, B, C)
    if optional:
        i = i._replace(D=torch.randn(h), z=z, dt_bias=torch.randn(h) - 1, initial_state=torch.randn(b, h, p, n))
    if marked:
        reset = torch.rand(b, l) < 0.05
        reset[:, 0] = False
        # a row ends in padding, behind which no document starts
        valid = torch.arange(l) < torch.tensor([l, max(1, l - 21)] * b)[:b, None]
        i = i._replace(reset=reset & valid, valid=valid)
    return i


def exactly(i):
    return SsdInputs(*(x.double() if x is not None and x.is_floating_point() else x for x in i))


def errors(got, want, real=None):
    """Relative errors of outputs, of those the ones of real tokens, and of states."""
    if real is not None:
        got, want = ((out.masked_fill(~real[..., None, None], 0), last) for out, last in (got, want))
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, want, strict=True)]


def compare(i, options=USUAL, save=False):
    """The forward of a call, held to twice the error of PyTorch's operations, and its state to the rounding of its operands."""
    out, last, saved = cuda.forward(i, options, save)
    want = reference.ssd(exactly(i), options)
    assert out.dtype == i.x.dtype and last.dtype == F32
    (error, off), (allowed, _) = errors((out, last), want, i.valid), errors(chunked.ssd(i, options), want, i.valid)
    assert error <= 2 * allowed, (error, allowed)
    assert off <= ROUNDING[torch.promote_types(i.x.dtype, i.B.dtype)], off
    return out, last, saved


CASES = {
    "bf16": dict(b=2, l=70, h=4, p=24, g=2, n=32, dtype=BF16),
    "fp16, marked": dict(b=2, l=150, h=2, p=16, g=1, n=16, dtype=F16, marked=True),
    "float32, marked": dict(b=2, l=70, h=2, p=16, g=1, n=16, dtype=F32, marked=True),
    "odd sizes, nothing optional": dict(b=1, l=67, h=3, p=21, g=3, n=27, dtype=BF16, optional=False),
    "one token": dict(b=1, l=1, h=4, p=24, g=2, n=32, dtype=BF16),
}


@needs_compiler
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_states(case):
    compare(operands(**case))


@needs_compiler
@exhaustive
@pytest.mark.timeout(0)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("l", [63, 129, 300])
@pytest.mark.parametrize(
    ("p", "n"), [(16, 16), (64, 32), (32, 64), (64, 64), (24, 100), (64, 128), (100, 128), (128, 200), (256, 256)]
)
def test_every_size(p, n, l, marked, dtype, monkeypatch):
    i = operands(2, l, 2, p, 1, n, dtype, marked=marked)
    compare(i)
    processors(monkeypatch, 64)
    compare(i, save=True)


@needs_compiler
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_length_that_is_cut(dtype, monkeypatch):
    i = operands(1, 400, 2, 16, 2, 16, dtype, marked=True)
    i = i._replace(reset=i.reset & (torch.arange(400) % 9 == 4))
    names, launch = [], nvrtc.launch
    monkeypatch.setattr(nvrtc, "launch", lambda source, name, *rest: names.append(name) or launch(source, name, *rest))
    _, _, whole = compare(i, save=True)
    processors(monkeypatch, 5)
    _, _, parts = compare(i, save=True)
    assert len(names) == 4 and names[2] == "ssd_pass_states"
    # what is saved for a backward does not depend on how the length is cut, but for rounding
    torch.testing.assert_close(parts, whole, rtol=0.05 if dtype == BF16 else 1e-4, atol=0.05 if dtype == BF16 else 1e-5)


@needs_compiler
@pytest.mark.parametrize("marked", [False, True])
def test_blocks_that_take_segments_in_turn_change_no_bit(marked, monkeypatch):
    # three walks for two places
    i = operands(1, 515, 3, 16, 3, 16, F32, marked=marked)
    launches, launch = [], nvrtc.launch
    monkeypatch.setattr(nvrtc, "launch", lambda source, *rest: launches.append(rest) or launch(source, *rest))
    got = compare(i, save=True)
    monkeypatch.setattr(cuda, "share", lambda blocks, chunks, places: chunks)
    monkeypatch.setattr(launch_plans, "_known", {})
    cuda.plan_of.cache_clear()
    want = cuda.forward(i, USUAL, True)
    cuda.plan_of.cache_clear()
    assert [grid for _, _, grid, *_ in launches] == [6, 3]
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_saved_are_the_states_at_the_starts_of_chunks(dtype):
    i = operands(2, 150, 2, 16, 1, 16, dtype, marked=True)
    _, _, saved = compare(i, save=True)
    assert saved.shape == (2, 3, 2, 16, 16) and saved.dtype == cuda.saved_dtype(dtype)
    for c, state in enumerate(saved.unbind(1)):
        if c == 0:
            torch.testing.assert_close(state.float(), i.initial_state, rtol=4e-3, atol=0)
            continue
        part = SsdInputs(*(m[:, : 64 * c] if m is not None and m.dim() > 1 and m.shape[1] == 150 else m for m in i))
        want = reference.ssd(exactly(part), USUAL)[1]
        assert ((state - want).norm() / want.norm()).item() < 2 * ROUNDING[dtype]


@needs_compiler
@pytest.mark.parametrize("off", [2, 3])
def test_limits_and_slices_of_a_projection_and_a_skip_per_channel(off):
    wide = torch.randn(1, 70, off + 2 * 24 + 2 * 32).to(BF16)
    x, B, C = wide[..., off:].split([48, 32, 32], -1)
    i = operands(1, 70, 2, 24, 1, 32, BF16)._replace(D=torch.randn(2, 24))
    i = i._replace(x=x.unflatten(2, (2, 24)), B=B.unflatten(2, (1, 32)), C=C.unflatten(2, (1, 32)))
    for change in (
        {},
        {"dt": i.dt.float()},
        {"dt": i.dt[..., :1].expand(1, 70, 2)},
        {"z": i.z.transpose(1, 2).contiguous().transpose(1, 2)},
    ):
        compare(i._replace(**change), SsdOptions(True, 0.1, 0.5))
    # four bytes go at once, or one number
    assert x.data_ptr() % 4 == (0 if off == 2 else 2)


@needs_compiler
def test_operands_of_different_types_meet_in_float32():
    i = operands(1, 70, 2, 16, 1, 16, BF16, marked=True)
    compare(i._replace(B=i.B.float()))


@needs_compiler
@pytest.mark.parametrize("scale", [(300.0, 30.0, 1e-5), (1.0, 1e-4, 1e-4), (1e-3, 1e-3, 30.0)], ids=str)
def test_fp16_holds_states_and_weights_that_it_has_no_room_for(scale):
    """States beyond 65504, and weights whose digits would end below 6e-8."""
    i = operands(1, 150, 2, 24, 1, 32, F16, marked=True)
    i = i._replace(reset=i.reset & False)
    i = i._replace(**{name: (getattr(i, name) * by).to(F16) for name, by in zip(("x", "B", "C"), scale, strict=True)})
    _, last, _ = compare(i._replace(D=None, initial_state=None, A=i.A / 64))
    assert scale[0] < 300 or last.abs().max() > 65504


@needs_compiler
def test_small_steps_behind_a_large_one_keep_their_digits():
    i = operands(1, 64, 2, 16, 1, 16, F32, marked=True)
    dt = torch.full((1, 64, 2), 1e-3)
    dt[:, 3] = 1e5
    i = i._replace(dt=dt, dt_bias=None, A=-torch.ones(2), reset=torch.zeros(1, 64, dtype=torch.bool))
    compare(i, SsdOptions())


@needs_compiler
def test_a_rate_of_minus_infinity_forgets_all_and_padding_forgets_nothing():
    i = operands(2, 70, 2, 16, 1, 16, F32, marked=True)
    i = i._replace(A=torch.tensor([-math.inf, -1.0]))
    compare(i, SsdOptions(True, 0.1, 2.0))


@needs_compiler
@pytest.mark.parametrize(("value", "dtype"), [(math.nan, BF16), (math.inf, F32), (math.nan, F16)], ids=str)
def test_what_is_not_finite_stays_in_its_document(value, dtype, monkeypatch):
    i = operands(1, 270, 2, 24, 1, 32, dtype)
    reset = torch.zeros(1, 270, dtype=torch.bool)
    reset[:, [70, 210]] = True
    i = i._replace(reset=reset)
    for count in (1, 5):
        processors(monkeypatch, count)
        want, last, _ = cuda.forward(i, USUAL, False)
        for name, at in (("x", 100), ("dt", 100), ("B", 130), ("C", 150), ("z", 80)):
            hurt = getattr(i, name).clone()
            hurt[0, at, 0] = value
            got, state, _ = cuda.forward(i._replace(**{name: hurt}), USUAL, False)
            there = [*range(at), *range(210, 270)]
            assert torch.equal(got[:, there], want[:, there]) and torch.equal(state, last), name
            after = got[0, at:210, 0].isfinite()
            assert not after[0].any() and (name in ("C", "z") or not after.any()), name
            assert name not in ("C", "z") or after[1:].all()
        # the state that came in belongs to the first document
        got, state, _ = cuda.forward(i._replace(initial_state=i.initial_state * value), USUAL, False)
        assert got[:, :70].isnan().all() and torch.equal(got[:, 70:], want[:, 70:]) and torch.equal(state, last)
        # in the last document it is in the state that is left
        hurt = i.x.clone()
        hurt[0, 240, 1] = value
        got, state, _ = cuda.forward(i._replace(x=hurt), USUAL, False)
        assert state[0, 1].isnan().all() and torch.equal(state[0, 0], last[0, 0])


@needs_compiler
def test_nothing_uninitialised_is_read_and_runs_are_equal(monkeypatch):
    i = operands(2, 150, 2, 16, 1, 16, BF16, marked=True)
    processors(monkeypatch, 3)
    first = cuda.forward(i, USUAL, True)
    was = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = True  # every torch.empty is full of NaN
        # and the emulator fills shared memory with something else in every other launch
        for _ in range(2):
            again = cuda.forward(i, USUAL, True)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(was[0])
        deterministic.fill_uninitialized_memory = was[1]


def test_a_length_is_cut_where_blocks_are_few():
    for blocks, chunks, places, want in [
        (512, 32, 264, 32),  # 8 rows of 64 heads fill a GPU
        (64, 256, 264, 64),
        (24, 32, 264, 3),
        (24, 2, 264, 2),
        (200, 32, 264, 32),
        (1, 1000, 264, 4),
    ]:
        assert cuda.cut(blocks, chunks, places) == want


def test_segments_are_taken_in_turn_where_rounds_of_blocks_leave_places_empty():
    for blocks, chunks, places, want in [
        (512, 32, 264, 32),  # 1.94 rounds
        (320, 32, 264, 8),
        (320, 256, 264, 32),
        (320, 15, 264, 15),
        (192, 32, 264, 32),
    ]:
        assert cuda.share(blocks, chunks, places) == want


def test_two_blocks_of_two_stages_have_shared_memory():
    for p, n, element in [(64, 128, 2), (64, 64, 2), (32, 32, 2), (64, 64, 4)]:
        tile = cuda.tile_of(p, n, element, 228 << 10)
        assert tile.stages == 2 and tile.resident(element, 228 << 10) == 2


def test_empty_calls_and_many_states():
    for size in ({"b": 0}, {"h": 0, "g": 1}):
        sizes = dict(b=1, l=5, h=2, p=16, g=1, n=16, dtype=F32) | size
        i = operands(**sizes)
        out, last, _ = cuda.forward(i, USUAL, False)
        assert out.shape == i.x.shape and torch.equal(last, i.initial_state)


GPU = {"device": "cuda", "dtype": BF16}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"device": "cpu"}, "need CUDA tensors, got cpu"),
        ({"dtype": torch.float64}, "take float32, float16 and bfloat16, got float64"),
        ({"d_state": 300}, "up to d_state = 256, got 300"),
    ],
)
def test_refusals(facts, reason):
    with pytest.raises(dispatch.BackendError, match=reason):
        dispatch.choose("ssd", backend="cuda", **GPU | facts)
    assert dispatch.choose("ssd", **GPU | facts).name == "chunked"


def test_too_little_shared_memory_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "shared_memory", lambda device: 100 << 10)
    assert cuda._too_big(256, 2) is None and cuda._too_big(128, 4) is None
    assert "100 KiB here" in cuda._too_big(256, 4)


@needs_compiler
def test_the_public_function_takes_it(monkeypatch):
    monkeypatch.setitem(dispatch.TABLES["ssd"], "cuda", dispatch.Backend("cuda", "emulated", run=cuda_backward.ssd))
    i = operands(1, 70, 2, 16, 1, 16, BF16)
    seq = Seq.from_documents(torch.tensor([[0] * 20 + [1] * 40 + [-1] * 10]))
    options = dict(dt_bias=i.dt_bias, dt_softplus=True, seq=seq, return_final_state=True)
    got, want = (ssd(*i[:7], **options, backend=name) for name in ("cuda", "chunked"))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02)


@needs_compiler
def test_a_call_that_looks_like_another_takes_its_plan(monkeypatch):
    monkeypatch.setitem(dispatch.TABLES["ssd"], "cuda", dispatch.Backend("cuda", "emulated", run=cuda_backward.ssd))
    i = operands(1, 70, 2, 16, 1, 16, BF16)
    options = dict(dt_bias=i.dt_bias, dt_softplus=True, backend="cuda")
    want = ssd(*i[:7], **options)

    def planned(*_, **facts):
        raise LookupError

    monkeypatch.setattr(cuda, "planned", planned)
    assert torch.equal(ssd(*(x.clone() for x in i[:7]), **options), want)
    for change in ({"dt_softplus": False}, {"dt_limit": (0.0, 1.0)}, {"initial_state": i.initial_state}):
        with pytest.raises(LookupError):
            ssd(*i[:7], **options | change)
    # one that needs gradients is another call, for which another backend may be chosen
    monkeypatch.setattr(op, "choose", planned)
    with pytest.raises(LookupError):
        ssd(i.x.clone().requires_grad_(), *i[1:7], **options)


@needs_compiler
def test_the_op_is_registered_as_torch_wants_it():
    i = operands(1, 70, 2, 16, 1, 16, BF16, marked=True)
    for save in (False, True):
        torch.library.opcheck(
            torch.ops.hybridzoo.ssd_cuda,
            (*i, True, 0.0, math.inf, 64, save),
            test_utils=("test_schema", "test_faketensor"),
        )

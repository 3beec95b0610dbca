"""The CUDA kernels of one token, run on the CPU thread by thread (tests/emulator), against PyTorch's operations in float64."""

import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.kernels import dispatch
from hybridzoo.kernels.conv import cuda as cuda_conv
from hybridzoo.kernels.step import chunked as update_torch
from hybridzoo.kernels.step import cuda as cuda_update
from hybridzoo.kernels.step.inputs import ConvStep, ScanNorms, ScanStep, StepOptions

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes of g++; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
TOLERANCE = {F32: 1e-6, BF16: 4e-3, F16: 5e-4}
FREE = (0.0, math.inf)


def step(module, op, *given):
    """One step by a module, from the arguments of its public function in their order."""
    if op == "conv":
        x, state, weight, bias, silu, rows = given
        return module.update(ConvStep(x, state, weight, bias, rows), None, StepOptions(silu))
    if op == "conv_ssd":
        xBC, conv_state, weight, bias, silu, state, dt, A, D, z, groups, dt_bias, softplus, limit, rows = given
        scan = ScanStep(state, None, dt, A, None, None, D, z, dt_bias, rows)
        return module.update(
            ConvStep(xBC, conv_state, weight, bias, rows), scan, StepOptions(silu, softplus, limit, groups)
        )
    *tensors, softplus, rows = given if op == "selective" else (*given[:-2], given[-1])
    limit = FREE if op == "selective" else given[-2]
    return module.update(None, ScanStep(*tensors, rows), StepOptions(dt_softplus=softplus, dt_limit=limit))


@pytest.fixture(autouse=True)
def one_processor(emulated, monkeypatch):
    monkeypatch.setattr(cuda_update, "processors", lambda device: 1)


def exactly(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def compare(op, states, *arguments):
    """``op`` of both modules from copies of the states, which the arguments hold: outputs and what became of the states."""
    mine = [s.clone() for s in states]
    exact = [s.double() for s in states]

    def given(copies, change=lambda x: x):
        by_id = {id(s): c for s, c in zip(states, copies, strict=True)}
        return [by_id.get(id(m)) if id(m) in by_id else change(m) for m in arguments]

    for _ in range(2):
        out = step(cuda_update, op, *given(mine))
        want = step(update_torch, op, *given(exact, exactly))
        for a, b in zip((out, *mine), (want, *exact), strict=True):
            error = (a.double() - b).norm() / b.norm().clamp_min(1e-30)
            assert error < TOLERANCE[a.dtype], error
    return mine, out


def rows_of(b, skip=True):
    rows = torch.randperm(b + 2)[:b]
    return rows.masked_fill(torch.arange(b) == 1, -1) if skip else rows.int()


def scan_operands(b, d, n, g=1, dtype=F32, total=None, gate=True):
    state, A = torch.randn(total or b, d, n), -4 * torch.rand(d, n) - 0.1
    B, C = torch.randn(2, b, g, n).to(dtype)
    D, bias, z = torch.randn(d), torch.randn(d), torch.randn(b, d).to(dtype)
    return (
        state,
        torch.randn(b, d).to(dtype),
        torch.randn(b, d).to(dtype),
        A,
        B,
        C,
        *((D, z, bias) if gate else (None,) * 3),
    )


@needs_compiler
@pytest.mark.parametrize(
    ("sizes", "indexed"),
    [
        (dict(b=3, d=150, n=16, g=3, dtype=BF16), True),
        (dict(b=1, d=21, n=3, gate=False), False),
        (dict(b=2, d=24, n=100), True),
    ],
    ids=["groups and rows", "three states, odd channels", "a hundred states"],
)
def test_selective_state_update(sizes, indexed):
    state, *rest = scan_operands(**sizes, total=sizes["b"] + 2 if indexed else None)
    compare("selective", [state], state, *rest, True, rows_of(sizes["b"]) if indexed else None)


@needs_compiler
def test_blocks_whose_lanes_all_have_work(monkeypatch):
    # few multiprocessors: wide blocks, two channels per thread
    monkeypatch.setattr(cuda_update, "processors", lambda device: 0)
    state, *rest = scan_operands(b=2, d=256, n=16, dtype=BF16)
    compare("selective", [state], state, *rest, True, None)


@needs_compiler
@exhaustive
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 4, 5, 8, 24, 32, 64, 128, 200, 256])
def test_every_state_size(n, dtype):
    state, *rest = scan_operands(2, 70, n, 2, dtype)
    compare("selective", [state], state, *rest, True, None)


@needs_compiler
def test_slices_of_a_projection_are_read_in_place():
    state, u, dt, A, B, C, *rest = scan_operands(2, 150, 16, 3, BF16)
    wide = torch.randn(2, 17 + 150 + 2 * 48).to(BF16)
    u, B, C = wide[:, 17:167], wide[:, 167:215].view(2, 3, 16), wide[:, 215:].view(2, 3, 16)
    compare("selective", [state], state, u, dt, A, B, C, *rest, True, None)


def heads(b, h, p, n, g, dtype, total, per_channel=False):
    state, bias, A = torch.randn(total, h, p, n), torch.randn(h), -4 * torch.rand(h) - 0.1
    D = torch.randn(h, p) if per_channel else torch.randn(h)
    z, dt = torch.randn(b, h, p).to(dtype), torch.randn(b, h).to(dtype)
    return state, dt, A, D, z, bias


@needs_compiler
def test_ssd_state_update():
    b, h, p, n, g = 3, 4, 20, 64, 2
    state, dt, A, D, z, bias = heads(b, h, p, n, g, BF16, b + 2, per_channel=True)
    x, (B, C) = torch.randn(b, h, p).to(BF16), torch.randn(2, b, g, n).to(BF16)
    for limit, rows in ((FREE, rows_of(b)), ((0.1, 1.0), rows_of(b, skip=False))):
        compare("ssd", [state], state, x, dt, A, B, C, D, z, bias, True, limit, rows)


@needs_compiler
@pytest.mark.parametrize("form", ["selective", "ssd"])
def test_a_rate_of_minus_infinity_and_a_step_of_nan(form):
    b, h, p, n = 2, 4, 20, 64
    B, C = torch.randn(2, b, 1, n)
    if form == "ssd":
        state, dt, A, D, z, bias = heads(b, h, p, n, 1, F32, b)
        x, more = torch.randn(b, h, p), ((0.0, 1.0),)
    else:
        state, x, dt, A, _, _, D, z, bias = scan_operands(b, h, n)
        more = ()
    A[1], bias = -math.inf, torch.zeros_like(bias)
    dt = dt.abs()
    dt[0, 1] = 0.0
    compare(form, [state], state, x, dt, A, B, C, D, z, bias, False, *more, None)
    dt[0, 2] = math.nan
    out = [s := state.clone(), step(cuda_update, form, s, x, dt, A, B, C, D, z, bias, True, *more, None)]
    for got in out:
        bad = got.isnan().flatten(2).all(2) if got.dim() > 2 else got.isnan()
        assert bad.nonzero().tolist() == [[0, 2]] and got.isnan().sum() == got[0, 2].numel()


CONVS = {
    "wide": dict(b=2, d=140, k=4, dtype=BF16, rows=True),
    "odd channels": dict(b=3, d=21, k=8, dtype=F32, rows=False),
    "a float32 state": dict(b=2, d=24, k=2, dtype=F16, rows=True, state=F32),
}


@needs_compiler
@pytest.mark.parametrize("case", CONVS.values(), ids=CONVS)
def test_causal_conv1d_update(case):
    b, d, k, dtype = (case[name] for name in ("b", "d", "k", "dtype"))
    state = torch.randn(b + 2 if case["rows"] else b, k - 1, d).to(case.get("state", dtype))
    x = torch.randn(b, d + 8).to(dtype)[:, 8:]
    compare("conv", [state], x, state, torch.randn(d, k), torch.randn(d), k != 2, rows_of(b) if case["rows"] else None)


def mamba2(b=3, h=4, p=20, n=64, g=2, k=4, dtype=F32, total=None):
    state, dt, A, D, z, bias = heads(b, h, p, n, g, dtype, total or b)
    width = h * p + 2 * g * n
    xBC, conv_state = torch.randn(b, width + 3).to(dtype)[:, 3:], torch.randn(total or b, k - 1, width).to(dtype)
    conv = (xBC, conv_state, torch.randn(width, k).to(dtype), torch.randn(width).to(dtype), True)
    return [*conv, state, dt, A, D, z, g, bias, True, FREE, None]


@needs_compiler
@pytest.mark.parametrize("indexed", [True, False])
def test_mamba2_in_one_launch(indexed, monkeypatch):
    # few multiprocessors: a group is one block's, and needs no counter
    monkeypatch.setattr(cuda_update, "processors", lambda device: 0 if indexed else 132)
    made = mamba2(total=5 if indexed else None)
    made[-1] = rows_of(3) if indexed else None
    tiles = []
    launch = cuda_update._scan_launch
    monkeypatch.setattr(cuda_update, "_scan_launch", lambda *a: tiles.append(launch(*a)[3]) or launch(*a))
    (conv_state, state), _ = compare("conv_ssd", [made[1], made[5]], *made)
    assert set(tiles) == ({1} if indexed else {3})
    if indexed:
        assert torch.equal(state[made[-1][2]] == made[5][made[-1][2]], torch.zeros(4, 20, 64, dtype=torch.bool))
    else:
        # the block that drew the last ticket left the counters as it found them
        assert not cuda_update.tickets(conv_state, (len(conv_state), 2)).any()


def low_rank(b, d, n, r, dtype, normed):
    """Operands of a step in low-rank form, and those of the same step with everything formed before, in float64."""
    state, u, _, A, B, C, D, z, bias = scan_operands(b, d, n, 1, dtype)
    low, weight = torch.randn(b, r).to(dtype), (torch.randn(d, r) / r**0.5).to(dtype)
    norms = ScanNorms(1e-6, torch.rand(r).to(dtype), None, torch.rand(n).to(dtype)) if normed else None
    scan = ScanStep(state, u, low, A.abs().log(), B, C, D, z, bias, None, weight, norms)
    wide = [exactly(m) for m in (low, B, C)]
    if normed:
        # a norm of its own would be rounded to the operands' type
        wide = [
            F.rms_norm(m, m.shape[-1:], exactly(w), 1e-6).to(dtype).double()
            for m, w in zip(wide, norms[1:], strict=True)
        ]
    dt, B, C = wide
    return scan, ScanStep(
        exactly(state), exactly(u), dt @ exactly(weight).T, exactly(A), B, C, *map(exactly, (D, z, bias))
    )


@needs_compiler
@pytest.mark.parametrize(
    ("sizes", "launched"),
    [
        (dict(b=2, d=70, n=16, r=24, dtype=BF16, normed=False), True),
        (dict(b=2, d=70, n=16, r=24, dtype=BF16, normed=True), True),
        (dict(b=9, d=40, n=16, r=24, dtype=BF16, normed=False), False),
        (dict(b=2, d=40, n=3, r=5, dtype=F32, normed=True), False),
    ],
    ids=["in the kernel", "with norms", "many rows", "an odd rank"],
)
def test_step_sizes_in_low_rank_form(sizes, launched):
    scan, exact = low_rank(**sizes)
    assert cuda_update._formed_here(scan, sizes["b"], sizes["dtype"]) == launched
    for _ in range(2):
        got = cuda_update.update(None, scan, StepOptions(dt_softplus=True, log_rates=True))
        want = update_torch.update(None, exact, StepOptions(dt_softplus=True))
        for a, b in ((got, want), (scan.state, exact.state)):
            # a product in front is rounded to the operands' type
            error = (a.double() - b).norm() / b.norm()
            assert error < (TOLERANCE[sizes["dtype"]] if a is got or not launched else 1e-5), error


@needs_compiler
@pytest.mark.parametrize("form", ["selective", "conv_ssd"])
def test_a_state_of_16_bits(form):
    if form == "selective":
        state, *rest = scan_operands(2, 70, 16, 2, BF16)
        made, at = [state.bfloat16(), *rest, True, None], [0]
    else:
        made, at = mamba2(2, dtype=BF16), [1, 5]
        made[5] = made[5].bfloat16()
    twins = list(made)
    for i in at:
        twins[i] = made[i].clone()
    twins[at[-1]] = twins[at[-1]].float()
    for _ in range(3):
        got, want = (step(cuda_update, form, *each) for each in (made, twins))
        # the same step of the same numbers, but for the rounding of what is kept
        assert torch.equal(got, want)
        twins[at[-1]] = twins[at[-1]].bfloat16().float()
        assert torch.equal(made[at[-1]].float(), twins[at[-1]])


@needs_compiler
def test_one_launch_equals_two():
    made = mamba2(dtype=BF16)
    xBC, conv_state, weight, bias, silu, state, dt, A, D, z, _, dt_bias, softplus, limit, _ = made
    states = [s.clone() for s in (conv_state, state, conv_state, state)]
    got = step(cuda_update, "conv_ssd", xBC, states[0], weight, bias, silu, states[1], *made[6:])
    x, B, C = step(cuda_update, "conv", xBC, states[2], weight, bias, silu, None).split([80, 128, 128], -1)
    B, C = B.view(3, 2, 64), C.view(3, 2, 64)
    want = step(cuda_update, "ssd", states[3], x.view(3, 4, 20), dt, A, B, C, D, z, dt_bias, softplus, limit, None)
    assert torch.equal(got, want) and torch.equal(states[0], states[2]) and torch.equal(states[1], states[3])


@needs_compiler
def test_skipped_entries_leave_nothing_behind():
    made = mamba2(total=5)
    kept = made[1].clone(), made[5].clone()
    made[-1] = torch.tensor([-1, -7, -1])
    assert not step(cuda_update, "conv_ssd", *made).any()
    assert torch.equal(made[1], kept[0]) and torch.equal(made[5], kept[1])


@needs_compiler
def test_ops_are_registered_as_torch_wants_them():
    xBC, conv_state, weight, bias, silu, state, dt, A, D, z, g, dt_bias, *_ = mamba2()
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.hybridzoo
    one = (xBC, conv_state, weight, bias, state, dt, A, D, z, dt_bias, None, g, silu, True, -math.inf, math.inf)
    torch.library.opcheck(ops.conv_ssd_update_cuda, one, test_utils=(*tests, "test_aot_dispatch_static"))
    torch.library.opcheck(ops.causal_conv1d_update_cuda, (xBC, conv_state, weight, bias, None, True), test_utils=tests)
    state, *rest, z, bias = scan_operands(3, 150, 16, 3, BF16)
    operands = (state, *rest, z, bias, None, True, -math.inf, math.inf)
    torch.library.opcheck(ops.state_update_cuda, operands, test_utils=tests)


@needs_compiler
def test_a_state_that_somebody_saved_is_known_to_have_changed():
    made = mamba2()
    versions = made[1]._version, made[5]._version
    step(cuda_update, "conv_ssd", *made)
    assert (made[1]._version, made[5]._version) > versions


GPU = {"device": "cuda", "dtype": BF16}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"device": "cpu"}, "need CUDA tensors, got cpu"),
        ({"dtype": torch.float64}, "take float32, float16 and bfloat16, got float64"),
        ({"grad": True}, "no gradient of a single step"),
        ({"state_dtype": F16}, "keep the state in float32 or bfloat16, got float16"),
        ({"conv_dtype": F16}, "keep the convolution's inputs in their type or in float32, got torch.float16"),
        ({"whole_rows": False}, "rows of the state to lie in one piece"),
        ({"d_state": 300}, "up to d_state = 256, got 300"),
        ({"width": 9}, "widths 2 to 8, got 9"),
    ],
)
def test_refusals(facts, reason):
    with pytest.raises(dispatch.BackendError, match=reason):
        dispatch.choose("update", backend="cuda", **GPU | facts)
    assert dispatch.choose("update", **GPU | facts).name == "chunked"


def test_both_modules_answer_to_the_same_widths():
    assert cuda_update.refuse_width is cuda_conv.refuse_width

"""ssd: against a handwritten recurrence, the selective scan on expanded inputs, and the loop."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode

from hybridzoo.kernels import Seq, selective_scan, ssd, ssd_state_update
from hybridzoo.kernels.ssd import chunked as chunked_ssd
from hybridzoo.kernels.ssd import chunks as ssd_blocks
from hybridzoo.kernels.ssd.inputs import SsdInputs, SsdOptions


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Sequences of test size span several blocks: two chunks of 16 tokens, or one longer one."""
    monkeypatch.setitem(ssd_blocks.BLOCK, "cpu", 2 * 2 * 4 * 16 * 16)


PER_TOKEN = ("x", "dt", "B", "C", "z")
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
UNLIMITED = (0.0, math.inf)


def inputs(b=2, l=65, h=4, p=3, n=5, g=2, dtype=torch.float64, optional=True, D_has_hdim=False):
    """Leaves that require gradients, by name."""
    acc = torch.promote_types(dtype, torch.float32)
    made = {
        "x": torch.randn(b, l, h, p, dtype=dtype),
        "dt": torch.randn(b, l, h, dtype=dtype),
        "A": -4 * torch.rand(h, dtype=acc),
        "B": torch.randn(b, l, g, n, dtype=dtype),
        "C": torch.randn(b, l, g, n, dtype=dtype),
    }
    if optional:
        made |= {
            "D": torch.randn((h, p) if D_has_hdim else (h,), dtype=acc),
            "z": torch.randn(b, l, h, p, dtype=dtype),
            "dt_bias": torch.randn(h, dtype=acc) - 1,
            "initial_state": torch.randn(b, h, p, n, dtype=acc),
        }
    return {name: x.requires_grad_() for name, x in made.items()}


def weights_for(made):
    b, _, h, p = made["x"].shape
    shape = (b, h, p, made["B"].shape[3])
    return torch.randn(made["x"].shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def results(out, state, made, weights):
    loss = (out.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(made.values()))
    return {"out": out, "state": state, **{f"grad {name}": grad for name, grad in zip(made, grads, strict=True)}}


def run(made, backend, weights, **options):
    out, state = ssd(**made, **({"dt_softplus": True} | options), backend=backend, return_final_state=True)
    return results(out, state, made, weights)


def assert_same(got, want, rtol):
    for name in want:
        scale = want[name].abs().max().item() + 1e-20
        error = (got[name].double() - want[name].double()).abs().max().item() / scale
        assert error <= rtol, f"{name}: relative error {error:.2e}"


def test_reference_is_the_recurrence():
    made = inputs(b=1, l=5, h=2, p=2, n=3, g=1)
    out, state = ssd(**made, dt_softplus=True, dt_limit=(0.2, 0.9), backend="reference", return_final_state=True)
    x, dt, A, B, C, D, z, bias, h0 = (made[name].tolist() for name in NAMES)
    for i in range(2):
        for j in range(2):
            h = h0[0][i][j]
            for t in range(5):
                step = min(max(math.log1p(math.exp(dt[0][t][i] + bias[i])), 0.2), 0.9)
                h = [math.exp(step * A[i]) * h[s] + step * B[0][t][0][s] * x[0][t][i][j] for s in range(3)]
                y = sum(C[0][t][0][s] * h[s] for s in range(3)) + D[i] * x[0][t][i][j]
                gate = z[0][t][i][j]
                assert out[0, t, i, j].item() == pytest.approx(y * gate / (1 + math.exp(-gate)), rel=1e-12)
            assert state[0, i, j].tolist() == pytest.approx(h, rel=1e-12)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("l", [1, 63, 130])
def test_equals_the_selective_scan_on_expanded_inputs(l, backend):
    made = inputs(l=l, D_has_hdim=True)
    b, _, h, p = made["x"].shape
    n = made["B"].shape[3]
    weights = weights_for(made)
    wide = {name: made[name].flatten(2) for name in ("x", "z")}
    out, state = selective_scan(
        wide["x"],
        made["dt"].repeat_interleave(p, 2),
        made["A"].repeat_interleave(p)[:, None].expand(h * p, n),
        made["B"],
        made["C"],
        made["D"].flatten(),
        wide["z"],
        dt_bias=made["dt_bias"].repeat_interleave(p),
        dt_softplus=True,
        initial_state=made["initial_state"].flatten(1, 2),
        return_final_state=True,
    )
    want = results(out.unflatten(2, (h, p)), state.view(b, h, p, n), made, weights)
    assert_same(run(made, backend, weights), want, 1e-11)


@pytest.mark.parametrize("l", [1, 2, 63, 64, 65, 127, 257])
@pytest.mark.parametrize("g", [1, 2, 4])
def test_chunked_equals_reference(l, g):
    made = inputs(l=l, g=g)
    weights = weights_for(made)
    assert_same(run(made, "chunked", weights), run(made, "reference", weights), 1e-11)


@pytest.mark.parametrize("block", [1, 10_000, 1 << 20])
@pytest.mark.parametrize("chunk_size", [1, 2, 16, 37, 64, 1000])
def test_the_sizes_of_chunks_and_blocks_change_nothing(monkeypatch, chunk_size, block):
    made = inputs(l=70)
    weights = weights_for(made)
    monkeypatch.setitem(ssd_blocks.BLOCK, "cpu", block)
    assert_same(run(made, "chunked", weights, chunk_size=chunk_size), run(made, "reference", weights), 1e-11)


def test_chunked_equals_reference_without_options():
    made = inputs(l=70, optional=False)
    made["dt"] = made["dt"].detach().abs().requires_grad_()
    weights = weights_for(made)
    assert_same(
        run(made, "chunked", weights, dt_softplus=False), run(made, "reference", weights, dt_softplus=False), 1e-11
    )


@pytest.mark.parametrize("dt_limit", [(0.1, math.inf), (0.0, 0.5), (0.3, 0.8)])
def test_step_sizes_are_limited_after_softplus(dt_limit):
    made = inputs(l=70)
    weights = weights_for(made)
    want = run(made, "reference", weights, dt_limit=dt_limit)
    assert_same(run(made, "chunked", weights, dt_limit=dt_limit), want, 1e-11)
    assert not torch.allclose(want["out"], run(made, "reference", weights)["out"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_the_loop(dtype):
    made = inputs(l=257, p=16, n=16, dtype=dtype)
    weights = weights_for(made)
    exact = run({name: x.detach().double().requires_grad_() for name, x in made.items()}, "reference", weights)
    got, plain = run(made, "chunked", weights), run(made, "reference", weights)
    for name in exact:
        assert got[name].dtype == plain[name].dtype
        ours, theirs = ((x[name].double() - exact[name]).abs().max().item() for x in (got, plain))
        # some float32 roundings of slack, for a loop that happens to be exact and for sums in another order
        slack = 4 * torch.finfo(torch.float32).eps * exact[name].abs().max().item()
        assert ours <= 2 * theirs + slack, f"{name}: {ours:.2e}, the loop {theirs:.2e}"


@pytest.mark.parametrize("rate", [0.0, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("step", [0.0, 1e-6, 20.0, 100.0])
def test_extreme_steps_and_rates_stay_finite_and_exact(step, rate):
    made = inputs(l=67, dtype=torch.float32)
    with torch.no_grad():
        made["dt"].copy_(torch.where(torch.rand(2, 67, 4) < 0.7, step, 0.5))
        made["A"].fill_(-rate)
        made["dt_bias"].zero_()
    weights = weights_for(made)
    exact = {name: x.detach().double().requires_grad_() for name, x in made.items()}
    exact = run(exact, "reference", weights, dt_softplus=False)
    got = run(made, "chunked", weights, dt_softplus=False)
    assert all(x.isfinite().all() for x in got.values())
    assert_same(got, exact, 2e-5)


def test_small_steps_after_a_large_one_keep_their_precision():
    """A float32 running sum of dt A, 10^5 here, would leave the later decays with two digits."""
    made = inputs(b=1, l=64, dtype=torch.float32)
    with torch.no_grad():
        made["dt"].fill_(1e-3)
        made["dt"][:, 3] = 1e5
        made["A"].fill_(-1.0)
        made["dt_bias"].zero_()
    weights = weights_for(made)
    exact = {name: x.detach().double().requires_grad_() for name, x in made.items()}
    exact = run(exact, "reference", weights, dt_softplus=False)
    assert_same(run(made, "chunked", weights, dt_softplus=False), exact, 1e-5)


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("pads", [0, 7])
@pytest.mark.parametrize("lengths", [[1, 40], [40, 1], [1] * 20, [16, 16, 3], [15, 2, 15, 1], [70, 5, 1, 66]], ids=str)
def test_packed_documents_equal_separate_ones(lengths, pads, chunk_size):
    total = sum(lengths)
    made = inputs(b=1, l=total + pads)
    del made["initial_state"]
    doc = torch.cat(
        [torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), torch.full((pads,), -1)]
    )
    weights = weights_for(made)
    weights[0][:, total:] = 0  # what stands at padding means nothing
    packed = run(made, "chunked", weights, seq=Seq.from_documents(doc[None]), chunk_size=chunk_size)
    assert_same(packed, run(made, "reference", weights, seq=Seq.from_documents(doc[None])), 1e-11)
    grads = {name: torch.zeros_like(x) for name, x in made.items()}
    for i, part in enumerate(torch.arange(total).split(lengths)):
        own = {name: (x[:, part] if name in PER_TOKEN else x).detach().requires_grad_() for name, x in made.items()}
        last = weights[1] if i == len(lengths) - 1 else torch.zeros_like(weights[1])
        alone = run(own, "reference", (weights[0][:, part], last))
        assert_same({"out": packed["out"][:, part]}, {"out": alone["out"]}, 1e-11)
        for name in made:
            if name in PER_TOKEN:
                grads[name][:, part] = alone[f"grad {name}"]
            else:
                grads[name] += alone[f"grad {name}"]
    assert_same(packed, {"state": alone["state"]} | {f"grad {name}": grad for name, grad in grads.items()}, 1e-11)


def test_padding_changes_nothing():
    made = inputs(b=3, l=50)
    lengths = [50, 33, 0]
    seq = Seq.from_mask(torch.arange(50) < torch.tensor(lengths)[:, None])
    out, state = ssd(**made, dt_softplus=True, dt_limit=(0.1, 2.0), chunk_size=16, seq=seq, return_final_state=True)
    torch.testing.assert_close(state[2], made["initial_state"][2], rtol=0, atol=0)
    for row, length in enumerate(lengths[:2]):
        own = {name: x[row : row + 1] if name in (*PER_TOKEN, "initial_state") else x for name, x in made.items()}
        own |= {name: own[name][:, :length] for name in PER_TOKEN}
        y, h = ssd(**own, dt_softplus=True, dt_limit=(0.1, 2.0), return_final_state=True, backend="reference")
        torch.testing.assert_close(out[row : row + 1, :length], y)
        torch.testing.assert_close(state[row : row + 1], h)


@pytest.mark.parametrize("cuts", [[1, 64], [32, 33], [20, 20, 25]])
def test_a_sequence_in_parts_equals_the_whole_with_gradients_through_the_state(cuts):
    made = inputs(l=65)
    weights = weights_for(made)
    state, outs = made["initial_state"], []
    for part in torch.arange(65).split(cuts):
        own = {name: x[:, part] if name in PER_TOKEN else x for name, x in made.items()}
        out, state = ssd(**(own | {"initial_state": state}), dt_softplus=True, chunk_size=16, return_final_state=True)
        outs.append(out)
    assert_same(results(torch.cat(outs, 1), state, made, weights), run(made, "reference", weights), 1e-11)


@pytest.mark.parametrize("D_has_hdim", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_by_step_equals_the_whole(dtype, D_has_hdim):
    made = {name: x.detach() for name, x in inputs(l=9, dtype=dtype, D_has_hdim=D_has_hdim).items()}
    state = made["initial_state"].clone()
    want, last = ssd(**made, dt_softplus=True, dt_limit=(0.1, 1.0), return_final_state=True)
    for t in range(9):
        now = {name: x[:, t] if name in PER_TOKEN else x for name, x in made.items() if name != "initial_state"}
        got = ssd_state_update(state, **now, dt_softplus=True, dt_limit=(0.1, 1.0))
        assert got.dtype == dtype
        torch.testing.assert_close(got, want[:, t], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_gradient_formulas():
    made = inputs(b=2, l=5, h=2, p=2, n=2, g=1, D_has_hdim=True)
    seq = Seq.from_documents(torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, -1]]))
    names = list(made)

    def f(*leaves):
        made = dict(zip(names, leaves, strict=True))
        return ssd(**made, dt_softplus=True, dt_limit=(0.2, 1.5), chunk_size=2, seq=seq, return_final_state=True)

    assert torch.autograd.gradcheck(f, tuple(made.values()), fast_mode=False)


def test_autocast_does_not_round_what_is_inside():
    made = inputs(l=40, dtype=torch.float32)
    weights = weights_for(made)
    want = run(made, "chunked", weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(made, "chunked", weights)
    assert_same(got, want, 0.0)


def test_inputs_need_not_be_contiguous():
    made = inputs(l=40)
    weights = weights_for(made)
    odd = {
        "x": made["x"].detach().transpose(1, 2).contiguous().transpose(1, 2),
        "dt": made["dt"].detach()[..., :1].expand(2, 40, 4),
        "C": torch.cat([made["C"].detach()] * 2, 1)[:, :40],
        "z": made["z"].detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "initial_state": made["initial_state"].detach().transpose(2, 3).contiguous().transpose(2, 3),
    }
    strange = {name: odd.get(name, x.detach()).requires_grad_() for name, x in made.items()}
    plain = {name: x.detach().contiguous().requires_grad_() for name, x in strange.items()}
    assert_same(run(strange, "chunked", weights), run(plain, "reference", weights), 1e-11)


@pytest.mark.parametrize("optional", [True, False])
def test_uninitialised_memory_is_never_read(optional):
    made = inputs(l=45, optional=optional)
    weights = weights_for(made)
    want = run(made, "chunked", weights, chunk_size=16)
    was = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = True  # every torch.empty is full of NaN
        got = run(made, "chunked", weights, chunk_size=16)
    finally:
        torch.use_deterministic_algorithms(was[0])
        deterministic.fill_uninitialized_memory = was[1]
    assert_same(got, want, 0.0)


@pytest.mark.parametrize("optional", [True, False])
def test_op_registrations(optional):
    made = inputs(b=2, l=35, h=2, p=2, n=2, g=1, optional=optional)
    seq = Seq.from_documents(torch.tensor([[0] * 5 + [1] * 25 + [-1] * 5] * 2))
    marks = (seq.resets, seq.valid) if optional else (None, None)
    opcheck(torch.ops.hybridzoo.ssd, (*(made.get(name) for name in NAMES), *marks, True, *UNLIMITED, 16))


def test_compiles_into_one_graph():
    made = inputs(l=40, dtype=torch.float32)
    names, leaves = list(made), tuple(made.values())

    def f(*leaves):
        seq = Seq.from_documents(torch.zeros(2, 40))
        out, state = ssd(**dict(zip(names, leaves, strict=True)), dt_softplus=True, seq=seq, return_final_state=True)
        return out.sin().sum() + state.sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(f(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_saved_memory_is_inputs_and_chunk_states():
    sizes = []
    made = inputs(b=1, l=1024, h=4, p=16, n=16, g=1, dtype=torch.float32, optional=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        ssd(**made, dt_softplus=True)
    assert sum(sizes) == sum(x.numel() for x in made.values()) + 1024 // 64 * 4 * 16 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.zeros(2, 64, 4)}, r"ssd: dt has shape \(2, 64, 4\), expected \(2, 65, 4\)"),
        ({"A": torch.zeros(5)}, r"A has shape \(5,\), expected \(4,\)"),
        ({"B": torch.zeros(2, 65, 3, 5), "C": torch.zeros(2, 65, 3, 5)}, "h = 4 is not a multiple of the 3 groups"),
        ({"B": torch.zeros(2, 65, 5)}, "B has 3 dimensions, expected 4"),
        ({"C": torch.zeros(2, 65, 2, 4)}, r"C has shape \(2, 65, 2, 4\), expected \(2, 65, 2, 5\)"),
        ({"D": torch.zeros(4, 4)}, r"D has shape \(4, 4\), expected \(4, 3\)"),
        ({"D": torch.zeros(3)}, r"D has shape \(3,\), expected \(4,\)"),
        (
            {"initial_state": torch.zeros(2, 4, 5, 3)},
            r"initial_state has shape \(2, 4, 5, 3\), expected \(2, 4, 3, 5\)",
        ),
        ({"dt_limit": (0.5, 0.1)}, r"dt_limit is \(0.5, 0.1\)"),
        ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
        ({"seq": Seq.from_documents(torch.zeros(1, 65))}, r"seq describes \(1, 65\) tokens, the input has \(2, 65\)"),
        (
            {"seq": Seq.from_documents(torch.zeros(2, 65), device="meta")},
            "ssd: seq is on meta, the input on cpu. Make it with device='cpu'",
        ),
    ],
)
def test_wrong_arguments_name_both_sizes(change, message):
    made = {name: x.detach() for name, x in inputs(dtype=torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        ssd(**(made | change))


def test_the_meta_device_gives_shapes():
    made = {name: x.detach().to("meta") for name, x in inputs(dtype=torch.bfloat16).items()}
    out, state = ssd(**made, return_final_state=True)
    assert (out.shape, out.dtype, state.shape, state.dtype) == (
        (2, 65, 4, 3),
        torch.bfloat16,
        (2, 4, 3, 5),
        torch.float32,
    )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_rate_of_minus_infinity_forgets_all_and_padding_forgets_nothing(backend):
    made = inputs(l=35)
    seq = Seq.from_documents(torch.tensor([[0] * 12 + [1] * 23, [0] * 30 + [-1] * 5]))
    weights = weights_for(made)
    steep = {name: x.detach().clone() for name, x in made.items()}
    steep["A"][1] = -1e4  # every step of these inputs forgets all
    want = run(
        {name: x.requires_grad_() for name, x in steep.items()}, "reference", weights, seq=seq, dt_limit=(0.1, 2.0)
    )
    endless = {name: x.detach().clone() for name, x in steep.items()}
    endless["A"][1] = -torch.inf
    got = run({name: x.requires_grad_() for name, x in endless.items()}, backend, weights, seq=seq, dt_limit=(0.1, 2.0))
    assert_same(got, want, 1e-11)


def _usual(dt):
    return dt * 0.1


def _spiked(dt):
    return torch.where(dt < 0.03, 50.0, 1e-3)


@pytest.mark.parametrize("steps", [_usual, _spiked])
def test_a_device_without_float64_loses_no_digits(steps, monkeypatch):
    made = inputs(l=300, optional=False, dtype=torch.float32)
    made["dt"] = steps(torch.rand(made["dt"].shape)).requires_grad_()
    made["A"] = (-16 * torch.rand(made["A"].shape)).requires_grad_()
    weights = weights_for(made)
    exact = {name: x.detach().double().requires_grad_() for name, x in made.items()}
    want = run(exact, "reference", weights, dt_softplus=False)
    monkeypatch.setattr(ssd_blocks.SsdWork, "wide", property(lambda i: i.acc))
    assert_same(run(made, "chunked", weights, dt_softplus=False), want, 3e-6)


def test_which_devices_have_float64():
    for device, dtype, want in (("mps", torch.float32, torch.float32), ("cpu", torch.bfloat16, torch.float64)):
        x = SimpleNamespace(device=torch.device(device), dtype=dtype)
        assert ssd_blocks.SsdWork(SsdInputs(x, *[None] * 4), SsdOptions()).wide == want


def test_without_float64_there_is_none(monkeypatch):
    class NoDoubles(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), func
            return out

    monkeypatch.setattr(ssd_blocks.SsdWork, "wide", property(lambda i: i.acc))
    made = {name: x.detach().float() for name, x in inputs(l=70).items()}
    tensors = [made[name] for name in NAMES[:8]]
    reset = torch.zeros(tensors[0].shape[:2], dtype=torch.bool)
    reset[:, 40] = True
    options = (reset, None, True, 0.0, math.inf, 16)
    with NoDoubles():
        out, last, saved = chunked_ssd.ssd_op._init_fn(*tensors, made["initial_state"], *options)
        chunked_ssd.ssd_backward_op._init_fn(out, last, saved, *tensors, *options)

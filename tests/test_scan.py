"""selective_scan: the loop against a handwritten recurrence and other people's scans, the fast one against the loop."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils import deterministic

from hybridzoo.kernels import Seq, selective_scan, selective_state_update
from hybridzoo.kernels.scan import steps as blocks


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Sequences of test size span several blocks of the least size, one chunk."""
    monkeypatch.setitem(blocks.BLOCK, "cpu", 1)


NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def inputs(b=2, l=65, d=8, n=4, g=1, dtype=torch.float64, optional=True):
    """Leaves that require gradients, by name."""
    made = {
        "u": torch.randn(b, l, d, dtype=dtype),
        "dt": torch.randn(b, l, d, dtype=dtype),
        "A": -4 * torch.rand(d, n, dtype=torch.promote_types(dtype, torch.float32)),
        "B": torch.randn(b, l, g, n, dtype=dtype),
        "C": torch.randn(b, l, g, n, dtype=dtype),
    }
    if optional:
        acc = made["A"].dtype
        made |= {
            "D": torch.randn(d, dtype=acc),
            "z": torch.randn(b, l, d, dtype=dtype),
            "dt_bias": torch.randn(d, dtype=acc) - 1,
            "initial_state": torch.randn(b, d, n, dtype=acc),
        }
    return {name: x.requires_grad_() for name, x in made.items()}


def run(made, backend, weights=None, **options):
    """Output, final state, and the gradients of a random functional of both."""
    options = {"dt_softplus": True} | options
    out, state = selective_scan(**made, backend=backend, return_final_state=True, **options)
    if weights is None:
        weights = torch.randn(out.shape, dtype=torch.float64), torch.randn(state.shape, dtype=torch.float64)
    loss = (out.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(made.values()))
    return {"out": out, "state": state, **{f"grad {name}": grad for name, grad in zip(made, grads, strict=True)}}


def weights_for(made, b=None):
    b, l, d = made["u"].shape
    return torch.randn(b, l, d, dtype=torch.float64), torch.randn(b, d, made["A"].shape[1], dtype=torch.float64)


def assert_same(got, want, rtol):
    for name in want:
        scale = want[name].abs().max().item() + 1e-20
        error = (got[name].double() - want[name].double()).abs().max().item() / scale
        assert error <= rtol, f"{name}: relative error {error:.2e}"


def test_reference_is_the_recurrence():
    made = inputs(b=1, l=5, d=4, n=3, g=2)
    out, state = selective_scan(**made, dt_softplus=True, backend="reference", return_final_state=True)
    u, dt, A, B, C, D, z, bias, h0 = (made[name].tolist() for name in NAMES)
    for i in range(4):
        h, group = h0[0][i], i // 2
        for t in range(5):
            step = math.log1p(math.exp(dt[0][t][i] + bias[i]))
            h = [math.exp(step * A[i][s]) * h[s] + step * B[0][t][group][s] * u[0][t][i] for s in range(3)]
            y = sum(C[0][t][group][s] * h[s] for s in range(3)) + D[i] * u[0][t][i]
            gate = z[0][t][i]
            assert out[0, t, i].item() == pytest.approx(y * gate / (1 + math.exp(-gate)), rel=1e-12)
        assert state[0, i].tolist() == pytest.approx(h, rel=1e-12)


@pytest.mark.parametrize("l", [1, 2, 31, 32, 33, 63, 64, 65, 127, 257])
@pytest.mark.parametrize("g", [1, 4])
def test_chunked_equals_reference(l, g):
    made = inputs(l=l, g=g)
    weights = weights_for(made)
    assert_same(run(made, "chunked", weights), run(made, "reference", weights), 1e-12)


def test_chunked_equals_reference_without_options():
    made = inputs(l=70, optional=False)
    made["dt"] = made["dt"].detach().abs().requires_grad_()
    weights = weights_for(made)
    assert_same(
        run(made, "chunked", weights, dt_softplus=False), run(made, "reference", weights, dt_softplus=False), 1e-12
    )


@pytest.mark.parametrize("sweep", [1, 3000, 1 << 22])
@pytest.mark.parametrize("block", [1, 5000, 1 << 20])
def test_the_size_of_the_buffers_changes_nothing(monkeypatch, block, sweep):
    made = inputs(b=5, l=167)
    weights = weights_for(made)
    want = run(made, "reference", weights)
    monkeypatch.setitem(blocks.BLOCK, "cpu", block)
    monkeypatch.setitem(blocks.SWEEP, "cpu", sweep)
    assert_same(run(made, "chunked", weights), want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_the_loop(dtype):
    made = inputs(l=257, d=16, n=8, dtype=dtype)
    weights = weights_for(made)
    exact = run({name: x.detach().double().requires_grad_() for name, x in made.items()}, "reference", weights)
    got, plain = run(made, "chunked", weights), run(made, "reference", weights)
    for name in exact:
        assert got[name].dtype == plain[name].dtype
        ours, theirs = ((x[name].double() - exact[name]).abs().max().item() for x in (got, plain))
        # some float32 roundings of slack, for a loop that happens to be exact and for sums in another order
        slack = 4 * torch.finfo(torch.float32).eps * exact[name].abs().max().item()
        assert ours <= 2 * theirs + slack, f"{name}: {ours:.2e}, the loop {theirs:.2e}"


def their_scan(name, made):
    """The output of another implementation, from the same leaves: dt after softplus, D and z."""
    u, dt, A, B, C, D, z, bias = (made[k] for k in NAMES[:8])
    if name == "transformers":
        mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
        across = [x.transpose(1, 2) for x in (u, dt, B[:, :, 0], C[:, :, 0], z)]
        out = mamba.mamba_selective_scan(
            across[0], across[1], A, across[2], across[3], D, z=across[4], delta_bias=bias, delta_softplus=True
        )
        return out.transpose(1, 2)
    block = pytest.importorskip("mambapy.mamba").MambaBlock
    return block.selective_scan(None, u, F.softplus(dt + bias), A, B[:, :, 0], C[:, :, 0], D) * F.silu(z)


@pytest.mark.parametrize("l", [1, 33, 64])
@pytest.mark.parametrize("peer", ["transformers", "mambapy"])
def test_equals_other_peoples_scans(peer, l):
    if peer == "mambapy" and l == 1:
        pytest.skip("mambapy's scan needs two steps")
    made = inputs(l=l, d=6, dtype=torch.float32)
    del made["initial_state"]
    weight = torch.randn(2, l, 6)
    leaves = list(made.values())
    theirs = their_scan(peer, made)
    ours = selective_scan(**made, dt_softplus=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name, a, b in zip(
        made, torch.autograd.grad(ours, leaves, weight), torch.autograd.grad(theirs, leaves, weight), strict=True
    ):
        scale = b.abs().max() + 1e-6
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("step", [0.0, 1e-6, 20.0, 100.0])
def test_extreme_steps_and_rates_stay_finite_and_exact(step, rate, dtype):
    made = inputs(l=67, dtype=dtype)
    with torch.no_grad():
        made["dt"].copy_(torch.where(torch.rand(2, 67, 8) < 0.7, step, 0.5))
        made["A"].fill_(-rate)
        made["dt_bias"].zero_()
    weights = weights_for(made)
    exact = run(
        {name: x.detach().double().requires_grad_() for name, x in made.items()},
        "reference",
        weights,
        dt_softplus=False,
    )
    got = run(made, "chunked", weights, dt_softplus=False)
    assert all(x.isfinite().all() for x in got.values())
    assert_same(got, exact, 2e-5 if dtype == torch.float32 else 1e-2)


DOCUMENTS = {
    "one-token-first": [1, 40],
    "one-token-last": [40, 1],
    "only-one-token": [1] * 34,
    "at-a-block-boundary": [32, 32, 3],
    "around-a-block-boundary": [31, 2, 31, 1],
    "long": [70, 5, 1, 66],
}


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("pads", [0, 7])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_documents_equal_separate_ones(lengths, pads, backend):
    total = sum(lengths)
    made = inputs(b=1, l=total + pads, g=2)
    del made["initial_state"]
    doc = torch.cat(
        [torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), torch.full((pads,), -1)]
    )
    weights = weights_for(made)
    weights[0][:, total:] = 0  # what stands at padding means nothing
    packed = run(made, backend, weights, seq=Seq.from_documents(doc[None]))
    grads = {name: torch.zeros_like(x) for name, x in made.items()}
    for i, part in enumerate(torch.arange(total).split(lengths)):
        own = {
            name: (x[:, part] if name in ("u", "dt", "B", "C", "z") else x).detach().requires_grad_()
            for name, x in made.items()
        }
        last = weights[1] if i == len(lengths) - 1 else torch.zeros_like(weights[1])
        alone = run(own, "reference", (weights[0][:, part], last))
        assert_same({"out": packed["out"][:, part]}, {"out": alone["out"]}, 1e-12)
        for name in made:
            if name in ("u", "dt", "B", "C", "z"):
                grads[name][:, part] = alone[f"grad {name}"]
            else:
                grads[name] += alone[f"grad {name}"]
    assert_same(packed, {"state": alone["state"]} | {f"grad {name}": grad for name, grad in grads.items()}, 1e-12)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_padding_changes_nothing(backend):
    made = inputs(b=3, l=50)
    lengths = torch.tensor([50, 33, 0])
    seq = Seq.from_mask(torch.arange(50) < lengths[:, None])
    out, state = selective_scan(**made, dt_softplus=True, seq=seq, return_final_state=True, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            torch.testing.assert_close(state[row], made["initial_state"][row], rtol=0, atol=0)
            continue
        own = {
            name: x[row : row + 1, :length]
            if name in ("u", "dt", "B", "C", "z")
            else x[row : row + 1]
            if name == "initial_state"
            else x
            for name, x in made.items()
        }
        y, h = selective_scan(**own, dt_softplus=True, return_final_state=True, backend="reference")
        torch.testing.assert_close(out[row : row + 1, :length], y)
        torch.testing.assert_close(state[row : row + 1], h)


@pytest.mark.parametrize("cuts", [[1, 64], [32, 33], [20, 20, 25]])
def test_a_sequence_in_parts_equals_the_whole_with_gradients_through_the_state(cuts):
    made = inputs(l=65)
    weights = weights_for(made)
    whole = run(made, "chunked", weights)
    state, outs = made["initial_state"], []
    for part in torch.arange(65).split(cuts):
        own = {name: x[:, part] if name in ("u", "dt", "B", "C", "z") else x for name, x in made.items()}
        out, state = selective_scan(**(own | {"initial_state": state}), dt_softplus=True, return_final_state=True)
        outs.append(out)
    out = torch.cat(outs, 1)
    grads = torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), list(made.values()))
    parts = {"out": out, "state": state, **{f"grad {name}": grad for name, grad in zip(made, grads, strict=True)}}
    assert_same(parts, whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_by_step_equals_the_scan(dtype):
    made = {name: x.detach() for name, x in inputs(l=9, g=2, dtype=dtype).items()}
    state = made["initial_state"].clone()
    want, last = selective_scan(**made, dt_softplus=True, return_final_state=True)
    for t in range(9):
        now = {
            name: x[:, t] if name in ("u", "dt", "B", "C", "z") else x
            for name, x in made.items()
            if name != "initial_state"
        }
        got = selective_state_update(state, **now, dt_softplus=True)
        assert got.dtype == dtype
        torch.testing.assert_close(got, want[:, t])
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_only_the_final_state_may_be_used():
    made = inputs(l=40, optional=False)
    leaves = [made[name] for name in ("u", "dt", "A", "B")]
    grads = [
        torch.autograd.grad(
            selective_scan(**made, dt_softplus=True, return_final_state=True, backend=k)[1].sum(), leaves
        )
        for k in ("chunked", "reference")
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_the_gradient_formulas(monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", 2)
    made = inputs(b=2, l=5, d=4, n=3, g=2)
    seq = Seq.from_documents(torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, -1]]))
    names = list(made)

    def f(*leaves):
        return selective_scan(
            **dict(zip(names, leaves, strict=True)), dt_softplus=True, seq=seq, return_final_state=True
        )

    assert torch.autograd.gradcheck(f, tuple(made.values()), fast_mode=False)


def test_autocast_does_not_round_what_is_inside():
    made = inputs(l=40, dtype=torch.float32)
    weights = weights_for(made)
    want = run(made, "chunked", weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(made, "chunked", weights)
    assert_same(got, want, 0.0)


def test_inputs_need_not_be_contiguous():
    made = inputs(l=40, g=2)
    weights = weights_for(made)
    odd = {
        "u": made["u"].detach().transpose(1, 2).contiguous().transpose(1, 2),
        "dt": torch.stack([made["dt"].detach()] * 2, -1)[..., 0],
        "A": made["A"].detach()[:1].expand(8, 4),
        "B": torch.cat([made["B"].detach()] * 2, 1)[:, :40],
        "z": made["z"].detach()[:, :1].expand(2, 40, 8),
        "initial_state": made["initial_state"].detach().transpose(1, 2).contiguous().transpose(1, 2),
    }
    strange = {name: odd.get(name, x.detach()).requires_grad_() for name, x in made.items()}
    plain = {name: x.detach().contiguous().requires_grad_() for name, x in strange.items()}
    weights = (weights[0].transpose(1, 2).contiguous().transpose(1, 2), weights[1])
    assert_same(run(strange, "chunked", weights), run(plain, "reference", weights), 1e-12)


@pytest.mark.parametrize("optional", [True, False])
def test_uninitialised_memory_is_never_read(optional):
    made = inputs(l=45, optional=optional)
    weights = weights_for(made)
    want = run(made, "chunked", weights)
    was = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = True  # every torch.empty is full of NaN
        assert torch.empty(3).isnan().all()
        got = run(made, "chunked", weights)
    finally:
        torch.use_deterministic_algorithms(was[0])
        deterministic.fill_uninitialized_memory = was[1]
    assert_same(got, want, 0.0)


@pytest.mark.parametrize("optional", [True, False])
def test_op_registrations(optional):
    made = inputs(b=2, l=35, d=4, n=2, optional=optional)
    seq = Seq.from_documents(torch.tensor([[0] * 5 + [1] * 25 + [-1] * 5] * 2))
    marks = (seq.resets, seq.valid) if optional else (None, None)
    opcheck(torch.ops.hybridzoo.selective_scan, (*(made.get(name) for name in NAMES), *marks, True))


def test_compiles_into_one_graph_and_exports_with_a_free_length():
    made = {name: x for name, x in inputs(l=40, dtype=torch.float32, optional=False).items()}
    names, leaves = list(made), tuple(made.values())

    def f(*leaves):
        x = dict(zip(names, leaves, strict=True))
        out, state = selective_scan(
            **x, dt_softplus=True, seq=Seq.from_documents(torch.zeros(2, 40)), return_final_state=True
        )
        return out.sin().sum() + state.sum() + selective_scan(**x, dt_softplus=True, paths=[(5, 8, 1, 5, 1)]).sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(f(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)

    class Scan(torch.nn.Module):
        def forward(self, u, dt, A, B, C):
            return selective_scan(u, dt, A, B, C, dt_softplus=True)

    l = torch.export.Dim("l", min=2, max=4096)
    shapes = ({1: l}, {1: l}, None, {1: l}, {1: l})
    program = torch.export.export(Scan(), leaves, dynamic_shapes=shapes).module()
    other = [x.detach() for x in inputs(l=100, dtype=torch.float32, optional=False).values()]
    torch.testing.assert_close(program(*other), Scan()(*other))


def test_saved_memory_is_linear_in_length_and_small():
    def saved(l):
        sizes = []
        made = inputs(l=l, d=32, n=16, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel() * 4) or x, lambda x: x):
            selective_scan(**made, dt_softplus=True)
        return sum(sizes)

    assert saved(1024) - saved(512) == pytest.approx(saved(512) - saved(256), rel=0.2) or saved(1024) < 2.1 * saved(512)
    # a tenth of what one (b, l, d, n) tensor would take, and three inputs of (b, l, d)
    assert saved(1024) < 2 * 1024 * 32 * 4 * (3 + 0.1 * 16 + 2)


PEAK = """
import resource, torch
from hybridzoo.kernels import selective_scan
torch.set_num_threads(1)
def peak(l):
    u, dt = torch.randn(2, 1, l, 256, requires_grad=True)
    B, C = torch.randn(2, 1, l, 1, 16, requires_grad=True)
    selective_scan(u, dt, -torch.ones(256, 16), B, C, dt_softplus=True).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
peak(256)
print(peak(1024), peak(4096), peak(8192))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in kilobytes")
def test_peak_memory_of_training_is_linear_in_length():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd="/")
    short, middle, long = map(float, done.stdout.split())
    # one (b, l, d, n) float32 tensor of the longest case is 134 MB
    assert long - short < 134
    assert long - middle < 1.8 * (middle - short) + 10


def grid_paths(h, w):
    """Rows, columns and both backwards, and what each does to an (b, h, w, c) image as explicit flips and transposes."""
    flat = lambda x: x.flatten(1, 2)  # noqa: E731
    turned = lambda x: x.transpose(1, 2).flatten(1, 2)  # noqa: E731
    paths = [(h, w, w, 1, 0), (w, h, 1, w, 0), (h, w, w, 1, 1), (w, h, 1, w, 1)]
    there = [flat, turned, lambda x: flat(x).flip(1), lambda x: turned(x).flip(1)]
    back = [
        lambda x: x,
        lambda x: x.unflatten(1, (w, h)).transpose(1, 2).flatten(1, 2),
        lambda x: x.flip(1),
        lambda x: x.flip(1).unflatten(1, (w, h)).transpose(1, 2).flatten(1, 2),
    ]
    return paths, there, back


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("own", [True, False], ids=["parameters-per-path", "shared-parameters"])
def test_paths_equal_explicit_flips_and_transposes(own, backend):
    h, w, b, d, n, k = 5, 9, 2, 4, 3, 4
    paths, there, back = grid_paths(h, w)
    lead = (k,) if own else ()
    shapes = {
        "u": (b, h * w, d),
        "dt": (*lead, b, h * w, d),
        "A": (*lead, d, n),
        "B": (*lead, b, h * w, 2, n),
        "C": (*lead, b, h * w, 2, n),
    }
    shapes |= {"D": (*lead, d), "z": (b, h * w, d), "dt_bias": (*lead, d), "initial_state": (*lead, b, d, n)}
    made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    made["A"] = -made["A"].abs()
    made = {name: x.requires_grad_() for name, x in made.items()}
    out, state = selective_scan(**made, dt_softplus=True, paths=paths, return_final_state=True, backend=backend)
    total, states = 0.0, []
    for i in range(k):
        one = {name: x[i] if own and name not in ("u", "z") else x for name, x in made.items() if name != "z"}
        walked = {
            name: there[i](x.unflatten(1, (h, w))) if name in ("u", "dt", "B", "C") else x for name, x in one.items()
        }
        y, last = selective_scan(**walked, dt_softplus=True, return_final_state=True, backend="reference")
        total, states = total + back[i](y), [*states, last]
    total, states = total * F.silu(made["z"]), torch.stack(states)
    torch.testing.assert_close(out, total)
    torch.testing.assert_close(state, states)
    weights = torch.randn_like(out), torch.randn_like(state)
    leaves = list(made.values())
    got = torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), leaves)
    want = torch.autograd.grad((total * weights[0]).sum() + (states * weights[1]).sum(), leaves)
    for name, a, b in zip(made, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_text_is_one_path():
    made = inputs(l=12)
    del made["initial_state"]
    torch.testing.assert_close(selective_scan(**made, paths=[(1, 12, 0, 1, 0)]), selective_scan(**made))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.zeros(2, 64, 8)}, r"selective_scan: dt has shape \(2, 64, 8\), expected \(2, 65, 8\)"),
        ({"A": torch.zeros(7, 4)}, r"A has shape \(7, 4\), expected \(8, 4\)"),
        ({"B": torch.zeros(2, 65, 3, 4), "C": torch.zeros(2, 65, 3, 4)}, r"d = 8 is not a multiple of the 3 groups"),
        ({"C": torch.zeros(2, 65, 1, 5)}, r"C has shape \(2, 65, 1, 5\), expected \(2, 65, 1, 4\)"),
        ({"D": torch.zeros(9)}, r"D has shape \(9,\), expected \(8,\)"),
        ({"z": torch.zeros(2, 65, 1)}, r"z has shape \(2, 65, 1\), expected \(2, 65, 8\)"),
        ({"initial_state": torch.zeros(2, 4, 8)}, r"initial_state has shape \(2, 4, 8\), expected \(2, 8, 4\)"),
        ({"u": torch.zeros(65, 8)}, r"u has 2 dimensions, expected 3"),
        ({"u": torch.zeros(2, 65, 8, dtype=torch.long)}, r"u has dtype torch.int64, expected a floating-point one"),
        ({"u": torch.zeros(2, 65, 8, device="meta")}, r"dt is on cpu, u on meta"),
        ({"seq": Seq.from_documents(torch.zeros(2, 60))}, r"seq describes \(2, 60\) tokens, the input has \(2, 65\)"),
        ({"paths": []}, "paths is empty"),
        ({"paths": [(1, 65, 0, 1)]}, r"paths\[0\] has 4 entries, expected 5"),
        ({"paths": [(5, 12, 12, 1, 0)]}, r"paths\[0\] walks 5 \* 12 = 60 tokens, the input has 65"),
        (
            {"paths": [(5, 13, 1, 13, 0)]},
            r"does not visit every token once. Rows are \(5, 13, 13, 1\), columns \(5, 13, 1, 5\)",
        ),
        (
            {"paths": [(1, 65, 0, 1, 0)], "seq": Seq.from_documents(torch.zeros(2, 65))},
            "paths and seq exclude each other",
        ),
        ({"paths": [(1, 65, 0, 1, 0)], "A": torch.zeros(3, 8, 4)}, "A is given for 3 paths, paths has 1"),
    ],
)
def test_wrong_arguments_name_both_sizes(change, message):
    made = {name: x.detach() for name, x in inputs(dtype=torch.float32).items()}
    if "paths" in change:
        del made["initial_state"]
    with pytest.raises(ValueError, match=message):
        selective_scan(**(made | change))


def test_the_meta_device_gives_shapes():
    made = {name: x.detach().to("meta") for name, x in inputs(dtype=torch.bfloat16).items()}
    out, state = selective_scan(**made, return_final_state=True)
    assert (out.shape, out.dtype, state.shape, state.dtype) == ((2, 65, 8), torch.bfloat16, (2, 8, 4), torch.float32)

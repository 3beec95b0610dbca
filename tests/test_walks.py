"""Walks in place on the CPU: equal to scans of gathered tokens, in any order, and nothing of the input's size is copied for them."""

import pytest
import torch
from torch.library import opcheck
from torch.profiler import profile

from hybridzoo.kernels import dispatch, selective_scan
from hybridzoo.kernels.scan import chunked, chunked_paths, low_rank, reference
from hybridzoo.kernels.scan import steps as blocks
from hybridzoo.kernels.scan.inputs import ScanInputs
from hybridzoo.kernels.scan.paths import over_paths, path_index, steps_of, walks

H, W = 5, 9
LISTED = torch.randperm(H * W, generator=torch.Generator().manual_seed(0))
PATHS = [(H, W, W, 1, 0), LISTED, (W, H, 1, W, 1)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Maps of test size span several blocks of the least size, one chunk."""
    monkeypatch.setitem(blocks.BLOCK, "cpu", 1)


def operands(k=3, own=True, r=2, dtype=torch.float64, l=H * W, d=6, n=4, g=2):
    """By name; what may be per path is, with ``own``."""
    lead = (k,) if own else ()
    shapes = {
        "u": (2, l, d),
        "dt": (*lead, 2, l, r),
        "A": (*lead, d, n),
        "B": (*lead, 2, l, g, n),
        "C": (*lead, 2, l, g, n),
    }
    shapes |= {
        "D": (*lead, d),
        "z": (2, l, d),
        "dt_bias": (*lead, d),
        "initial_state": (*lead, 2, d, n),
        "dt_weight": (*lead, d, r),
    }
    made = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    made["A"] = -made["A"].abs()
    return {name: x.requires_grad_() for name, x in made.items()}


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("own", [True, False], ids=["parameters-per-path", "shared-parameters"])
def test_any_order_equals_scans_of_gathered_tokens(own, backend):
    made = operands(own=own)
    out, last = selective_scan(**made, paths=PATHS, dt_softplus=True, return_final_state=True, backend=backend)
    i = ScanInputs(**made)
    product = low_rank.step_sizes(i.dt, i.dt_weight)
    whole = i._replace(dt=product, dt_weight=None)
    paths = walks("test", PATHS, H * W, None)
    want, states = over_paths(lambda x: reference.selective_scan(x, True), paths, whole)
    torch.testing.assert_close((out, last), (want, states), atol=1e-11, rtol=1e-11)
    weights = torch.randn_like(out), torch.randn_like(last)
    got, wanted = (
        torch.autograd.grad((a * weights[0]).sum() + (b * weights[1]).sum(), list(made.values()))
        for a, b in ((out, last), (want, states))
    )
    torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)


def test_the_op_is_complete():
    made = operands()
    orders = torch.stack([path_index(path, LISTED.device) for path in PATHS])
    fields = [made.get(f) for f in chunked_paths._FIELDS]
    opcheck(torch.ops.hybridzoo.selective_scan_paths, (*fields, orders, True))
    opcheck(torch.ops.hybridzoo.selective_scan_paths, (*fields[:5], None, None, None, fields[-1], orders, False))
    with pytest.raises(NotImplementedError, match=r"which has no derivative\. Use backend='reference'"):
        y = selective_scan(**made, paths=PATHS, backend="chunked")
        (g,) = torch.autograd.grad(y.sum(), made["u"], create_graph=True)
        g.sum().backward()


def test_compiled_and_on_the_meta_device():
    made = operands(dtype=torch.float32)

    def scan(*tensors):
        return selective_scan(**dict(zip(made, tensors, strict=True)), paths=PATHS, dt_softplus=True)

    torch.testing.assert_close(
        torch.compile(scan, fullgraph=True, backend="aot_eager")(*made.values()), scan(*made.values())
    )
    out, last = selective_scan(
        **{name: x.detach().to("meta") for name, x in made.items()}, paths=[PATHS[0]] * 3, return_final_state=True
    )
    assert out.shape == (2, H * W, 6) and last.shape == (3, 2, 6, 4)


def test_16_bits_are_rounded_once():
    made = {name: x.detach() for name, x in operands(dtype=torch.bfloat16).items()}
    exact = selective_scan(**{name: x.double() for name, x in made.items()}, paths=PATHS, dt_softplus=True)
    got = selective_scan(**(made | {"z": None}), paths=PATHS, dt_softplus=True)
    want = selective_scan(**{n: x.double() for n, x in made.items() if n != "z"}, paths=PATHS, dt_softplus=True)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.float().bfloat16())
    gated = selective_scan(**made, paths=PATHS, dt_softplus=True)
    torch.testing.assert_close(gated.double(), exact, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (LISTED[1:], r"paths\[0\] is an order of shape \(44,\) torch.int64, expected \(45,\) int64"),
        (LISTED.int(), r"paths\[0\] is an order of shape \(45,\) torch.int32, expected \(45,\) int64"),
        (LISTED // 2 * 2, r"paths\[0\] does not visit every one of the 45 tokens once"),
        (LISTED + 1, r"paths\[0\] does not visit every one of the 45 tokens once"),
    ],
)
def test_an_order_visits_every_token_once(order, message):
    made = {name: x.detach() for name, x in operands(own=False).items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**made, paths=[order])


def test_steps_as_numbers_and_as_a_tensor():
    for path in PATHS:
        assert steps_of(path) == path_index(path, LISTED.device).tolist()


def test_a_listed_order_goes_around_our_kernels(monkeypatch):
    seen = []

    def scan(i, dt_softplus, paths=None, **_):
        # our kernels form step sizes by themselves, also of gathered tokens
        seen.append((paths, i.dt.shape[-1]))
        return chunked.selective_scan(
            i._replace(dt=low_rank.step_sizes(i.dt, i.dt_weight), dt_weight=None), dt_softplus
        )

    monkeypatch.setitem(dispatch.TABLES["selective_scan"], "cuda", dispatch.Backend("cuda", "as on a GPU", run=scan))
    made = {name: x.detach() for name, x in operands(own=False).items()}
    got = selective_scan(**made, paths=[LISTED], dt_softplus=True)
    torch.testing.assert_close(got, selective_scan(**made, paths=[LISTED], dt_softplus=True, backend="reference"))
    assert seen == [(None, 2)]


def allocations(fn, least):
    """The sizes of what is allocated on the CPU while ``fn`` runs, of ``least`` bytes and more."""
    with profile(profile_memory=True) as prof:
        fn()
    events = prof.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() >= least]


def test_no_copy_of_the_tokens_in_either_pass(monkeypatch):
    monkeypatch.setitem(blocks.SWEEP, "cpu", 1)
    l, d, rows = 40 * 40, 64, (40, 40, 40, 1)
    whole = 2 * l * d * 4

    def count(paths):
        made = operands(k=len(paths), dtype=torch.float32, l=l, d=d, n=2, g=1) | {"z": None}
        leaves, out = [x for x in made.values() if x is not None], []

        def scan():
            out.append(selective_scan(**made, paths=paths, dt_softplus=True, backend="chunked"))

        forward, gout = allocations(scan, whole), torch.ones(2, l, d)
        return len(forward), len(allocations(lambda: torch.autograd.grad(out[0], leaves, gout), whole))

    # the output; the gradient of u: as many for four walks as for one
    assert count([(*rows, 0)]) == (1, 1)
    assert count([(*rows, 0), (40, 40, 1, 40, 0), (*rows, 1), (40, 40, 1, 40, 1)]) == (1, 1)

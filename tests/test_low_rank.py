"""Step sizes in low-rank form: against those of a product in front, in every backend, and formed by the CUDA scan (tests/emulator)."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.kernels import dispatch, selective_scan
from hybridzoo.kernels.gpu import launch_plans, nvrtc
from hybridzoo.kernels.scan import cuda as cuda_ops
from hybridzoo.kernels.scan import cuda_paths, launches, low_rank, reference
from hybridzoo.kernels.scan.inputs import ScanInputs
from hybridzoo.kernels.scan.operands import ScanOperands
from hybridzoo.kernels.scan.paths import over_paths, walks

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 1e-6, BF16: 4e-3, F16: 5e-4}
FOUR = [(5, 7, 7, 1, 0), (7, 5, 1, 7, 0), (5, 7, 7, 1, 1), (7, 5, 1, 7, 1)]


def operands(b, l, d, n, r, dtype=F32, k=None, sliced=False, gate=True):
    """u, dt, A, B, C, D, z, dt_bias, a state and dt_weight; with k, all but u and z for each path."""
    torch.manual_seed(l + d + r)
    lead = () if k is None else (k,)

    def wide(*shape):
        return torch.randn(*shape).to(dtype)

    u, z = wide(b, l, d), wide(b, l, d) if gate else None
    # as out of a projection, the low-rank form and B and C side by side; rows a whole number of 16 bytes apart
    sizes = [r, n, n, -(r + 2 * n) % 8] if sliced else [r, -r % 8]
    dt, *narrow = wide(*lead, b, l, sum(sizes)).split(sizes, -1)
    B, C = narrow[:2] if sliced else (wide(*lead, b, l, n) for _ in range(2))
    A, D, bias = -4 * torch.rand(*lead, d, n) - 0.1, torch.randn(*lead, d), torch.randn(*lead, d) - 1
    weight = (torch.randn(*lead, d, r) / r**0.5).to(dtype)
    return [u, dt, A, B.unsqueeze(-2), C.unsqueeze(-2), D, z, bias, torch.randn(*lead, b, d, n), weight]


def exact(inputs, gout, glast, paths=None, marks=(None, None)):
    """Outputs, states and gradients in float64, step sizes out of a product in front."""
    leaves = [None if x is None else x.double().requires_grad_() for x in inputs]
    u, dt, *rest, weight = leaves
    dt = low_rank.step_sizes(dt, weight)
    if paths is None:
        out, last = reference.selective_scan(ScanInputs(u, dt, *rest, *marks), True)
    else:
        out, last = over_paths(lambda i: reference.selective_scan(i, True), paths, ScanInputs(u, dt, *rest))
    loss = (out * gout.double()).sum() + (last * glast.double()).sum()
    return out, last, *torch.autograd.grad(loss, [x for x in leaves if x is not None])


def worst(got, want):
    pairs = list(zip(got, want, strict=True))
    assert all(x.shape == y.shape for x, y in pairs)
    return max(((x.double() - y).norm() / y.norm()).item() for x, y in pairs)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("shared", ["nothing", "dt", "dt_weight", "no paths"])
def test_it_is_a_product_in_front(backend, shared):
    paths = None if shared == "no paths" else FOUR
    u, dt, A, B, C, D, z, bias, state, weight = operands(2, 35, 8, 4, 3, torch.float64, None if paths is None else 4)
    dt, weight = (x[0] if name == shared else x for name, x in (("dt", dt), ("dt_weight", weight)))
    leaves = [x.requires_grad_() for x in (u, dt, A, B, C, D, z, bias, state, weight)]
    options = {"dt_bias": bias, "initial_state": state, "paths": paths, "dt_softplus": True, "backend": backend}
    every = [x if x.dim() > dims else [x] * 4 for x, dims in ((dt, 3), (weight, 2))]
    formed = (
        F.linear(dt, weight) if paths is None else torch.stack([F.linear(*each) for each in zip(*every, strict=True)])
    )
    got = selective_scan(u, dt, A, B, C, D, z, dt_weight=weight, **options)
    want = selective_scan(u, formed, A, B, C, D, z, **options)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    grads = [torch.autograd.grad(out.sin().sum(), leaves) for out in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)


# b, l, d, n, r, dtype, more options of operands; chunks, marks
CASES = {
    "plain": ((2, 65, 40, 16, 6, BF16), {}, None),
    "a slice, split": ((2, 130, 40, 16, 12, BF16), {"sliced": True}, 2),
    "the largest rank, odd channels": ((1, 37, 21, 16, 16, F16), {}, None),
    "no gate, three states": ((1, 33, 40, 3, 16, BF16), {"gate": False}, 2),
    "one state": ((1, 70, 40, 1, 6, F16), {}, 2),
    "an odd rank": ((2, 40, 40, 16, 7, BF16), {"sliced": True}, None),
    "eight states, wide blocks": ((1, 40, 136, 8, 16, BF16), {}, None),
    "five states": ((1, 34, 16, 5, 10, BF16), {}, None),
}


@needs_compiler
@pytest.mark.parametrize("marked", [False, True], ids=["whole", "documents and padding"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_cuda_scan_forms_them(case, marked, emulated):
    sizes, options, chunks = case
    inputs = operands(*sizes, **options)
    u, dt, *rest, weight = inputs
    marks = (torch.rand(u.shape[:2]) < 0.15, torch.arange(u.shape[1]) < u.shape[1] - 3) if marked else (None, None)
    call = ScanOperands.of(
        ScanInputs(u, dt, *rest, *(m if m is None else m.expand(u.shape[:2]) for m in marks), weight), True
    ).ready()
    assert call.i.dt_weight is weight and call.i.dt is dt
    out, last, saved = launches.forward(call, True, chunks=chunks)
    real = torch.ones(()) if not marked else marks[1][..., None]
    gout, glast = torch.randn(u.shape).to(u.dtype) * real.to(u.dtype), torch.randn(last.shape)
    gu, gdt, *others = launches.backward(call, gout, glast, saved, chunks=chunks)
    gdt, gweight = low_rank.gradients(gdt, dt, weight)
    got = [
        out * real,
        last,
        gu,
        gdt,
        *(g for g, x in zip(others[: len(rest)], rest, strict=True) if x is not None),
        gweight,
    ]
    out, last, *grads = exact(inputs, gout, glast, None, marks)
    assert worst(got, [out * real, last, *grads]) < TOLERANCE[u.dtype]


@needs_compiler
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_along_paths(own, emulated):
    inputs = operands(2, 35, 40, 16, 12, BF16, 4 if own else None, sliced=True)
    paths, flat = walks("test", FOUR, 35, None), [int(x) for path in FOUR for x in path]
    *first, weight = inputs
    out, last, saved = cuda_paths.forward(ScanInputs(*first, None, None, weight), True, flat, True)
    gout, glast = torch.randn_like(inputs[0]), torch.randn_like(last)
    grads = cuda_paths.backward(ScanInputs(*first, None, None, weight), True, flat, gout, glast, saved)
    assert worst([out, last, *grads[:9], grads.dt_weight], exact(inputs, gout, glast, paths)) < TOLERANCE[BF16]


@needs_compiler
def test_step_sizes_of_all_paths_are_formed_at_once(emulated, monkeypatch):
    # a rank that the scan does not form
    *first, weight = operands(2, 35, 40, 16, 24, BF16, 4)
    flat, made, form, spread = (
        [int(x) for path in FOUR for x in path],
        [],
        low_rank.step_sizes,
        low_rank.with_gradients_of_walks,
    )

    def step_sizes(dt, weight):
        made.append(form(dt, weight))
        return made[-1]

    def with_gradients(grads, *rest):
        # the gradient of step sizes is where they were
        assert grads.dt is made[-1]
        return spread(grads, *rest)

    monkeypatch.setattr(low_rank, "step_sizes", step_sizes)
    monkeypatch.setattr(low_rank, "with_gradients_of_walks", with_gradients)
    i = ScanInputs(*first, None, None, weight)
    out, last, saved = cuda_paths.forward(i, True, flat, True)
    cuda_paths.backward(i, True, flat, torch.ones_like(out), torch.ones_like(last), saved)
    assert [dt.shape for dt in made] == [(4, 2, 35, 40)] * 2


@needs_compiler
def test_the_op_and_the_public_function(emulated, monkeypatch):
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_ops, "refuse_tensors", lambda facts: None)
    monkeypatch.setattr(launch_plans, "_known", {})
    inputs = [x.requires_grad_() for x in operands(1, 20, 40, 16, 8, BF16)]
    *first, weight = inputs
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.hybridzoo.selective_scan_cuda
    torch.library.opcheck(op, (*first, None, None, True, True, None, weight), test_utils=checks)
    u, dt, A, B, C, D, z, bias, state = first
    launched, launch = [], nvrtc.launch
    monkeypatch.setattr(
        nvrtc, "launch", lambda source, name, *rest: launched.append(name) or launch(source, name, *rest)
    )

    def run(backend):
        options = {"dt_bias": bias, "dt_softplus": True, "initial_state": state, "return_final_state": True}
        out, last = selective_scan(u, dt, A, B, C, D, z, dt_weight=weight, backend=backend, **options)
        return out, last, *torch.autograd.grad(out.float().sin().sum() + last.square().sum(), inputs)

    first, again = run("cuda"), run("cuda")
    # 32 among the flags
    assert len(launched) == 6 and all(", 32, " in name for name in launched if not name.startswith("sum"))
    assert all(map(torch.equal, first, again)) and len(launch_plans._known) == 1
    assert worst(first, [x.double() for x in run("reference")]) < 2e-2
    assert worst(op(*inputs[:9], None, None, True, True, None, weight)[:2], [x.double() for x in first[:2]]) == 0


@needs_compiler
@pytest.mark.parametrize(
    "what", ["float32", "too large", "many states", "odd rows", "float32 weight", "strided weight"]
)
def test_what_the_cuda_scan_does_not_read_as_it_is(what, emulated):
    dtype, r = F32 if what == "float32" else BF16, 24 if what == "too large" else 8
    *first, weight = operands(1, 20, 40, 40 if what == "many states" else 16, r, dtype)
    if what == "odd rows":
        first[1] = F.pad(first[1], (0, 1))[..., :-1]
    if what.endswith("weight"):
        weight = weight.float() if what == "float32 weight" else weight.mT.contiguous().mT
    call = ScanOperands.of(ScanInputs(*first, None, None, weight), True).ready()
    assert (call.i.dt_weight is None) == (not what.endswith("weight"))
    assert call.i.dt_weight is None or (call.i.dt_weight.dtype == BF16 and call.i.dt_weight.is_contiguous())
    inputs = [x.requires_grad_() for x in (*first, weight)]
    out, last = cuda_ops.selective_scan(ScanInputs(*first, None, None, weight), True)
    gout, glast = torch.randn_like(out), torch.randn_like(last)
    grads = torch.autograd.grad([out, last], inputs, [gout, glast])
    assert all(g.dtype == x.dtype for g, x in zip(grads, inputs, strict=True))
    assert worst([out, last, *grads], exact(inputs, gout, glast)) < TOLERANCE[dtype]


def test_why_it_is_not_formed_is_said():
    facts = {"device": "cuda", "dtype": BF16}
    assert low_rank.refuse(facts | {"rank": 12}) is None
    assert low_rank.refuse(facts | {"rank": 128}).endswith("ranks up to 16, got 128")
    assert low_rank.refuse(facts | {"dtype": F32}).endswith("in bfloat16 and float16, got float32")
    assert dispatch.choose("dt_weight").name == "product"
    rows = {name: reason for name, _, reason in dispatch.explain("dt_weight", device="cpu")}
    assert rows["cuda"] == "the CUDA kernels need CUDA tensors, got cpu"


def test_wrong_shapes():
    u, dt, A, B, C, *_, weight = operands(1, 9, 8, 4, 3)
    with pytest.raises(
        ValueError, match=r"dt_weight has shape \(8, 2\), expected \(8, 3\) \(d, r\), dt being \(b, l, r\)"
    ):
        selective_scan(u, dt, A, B, C, dt_weight=weight[:, 1:])
    with pytest.raises(
        ValueError, match=r"dt has shape \(1, 8, 3\), expected \(1, 9, 3\) \(b, l, r\), beside a dt_weight"
    ):
        selective_scan(u, dt[:, 1:], A, B, C, dt_weight=weight)
    with pytest.raises(ValueError, match=r"dt_weight is given for 3 paths, paths has 4"):
        selective_scan(u, dt, A, B, C, dt_weight=weight.expand(3, 8, 3), paths=[(1, 9, 0, 1, 0)] * 4)


@needs_compiler
@pytest.mark.parametrize("behind", ["other numbers", "nothing"])
def test_what_follows_the_last_numbers_does_not_count(behind, emulated):
    inputs = operands(1, 40, 40, 4, 6, BF16)
    rows = torch.full((1, 40, 8), float("nan"), dtype=BF16)
    rows[..., :6] = inputs[1]
    *first, weight = inputs
    first[1] = (
        rows[..., :6] if behind == "other numbers" else rows.flatten()[:-2].clone().as_strided((1, 40, 6), (320, 8, 1))
    )
    call = ScanOperands.of(ScanInputs(*first, None, None, weight), True).ready()
    assert (call.i.dt_weight is weight) == low_rank.in_vectors(first[1]) == (behind == "other numbers")
    got, want = (cuda_ops.selective_scan(ScanInputs(*x, None, None, weight), True) for x in (first, inputs[:-1]))
    torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


@needs_compiler
@pytest.mark.parametrize("paths", [None, FOUR], ids=["straight", "four paths"])
def test_traced_whole(paths, emulated, monkeypatch):
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_ops, "refuse_tensors", lambda facts: None)
    u, dt, A, B, C, D, z, bias, _, weight = (x.requires_grad_() for x in operands(1, 35, 16, 16, 8, BF16, paths and 4))

    def scan(u, dt, weight):
        out = selective_scan(u, dt, A, B, C, D, z, dt_bias=bias, dt_weight=weight, dt_softplus=True, paths=paths)
        return out.float().sin()

    # twice: what was learned of the first call must not keep the second from being traced
    want = [scan(u, dt, weight) for _ in range(2)]
    got = torch.compile(scan, fullgraph=True, backend="eager")(u, dt, weight)
    assert torch.equal(got, want[0]) and torch.equal(*want)
    grads = [torch.autograd.grad(x.sum(), (u, dt, weight)) for x in (got, want[0])]
    assert all(map(torch.equal, *grads))

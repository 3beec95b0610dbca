"""The CUDA scan over paths, run on the CPU thread by thread (tests/emulator), against the float64 reference over gathered tokens."""

import dataclasses
import shutil
import types

import pytest
import torch

from hybridzoo.kernels import dispatch, selective_scan
from hybridzoo.kernels.gpu import nvrtc
from hybridzoo.kernels.scan import cuda as cuda_ops
from hybridzoo.kernels.scan import cuda_paths, reference, walk_launches
from hybridzoo.kernels.scan.inputs import ScanInputs
from hybridzoo.kernels.scan.params import walk
from hybridzoo.kernels.scan.paths import over_paths, path_index, walks
from hybridzoo.kernels.scan.shapes import ROOM, Cut, backward_plan

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
ROWS, COLUMNS = (5, 7, 7, 1), (7, 5, 1, 7)
FOUR = [(*ROWS, 0), (*COLUMNS, 0), (*ROWS, 1), (*COLUMNS, 1)]


def operands(l, d, n, k, dtype=torch.float32, g=1, gate=True, own=True):
    """u, dt, A, B, C, D, z, dt_bias and a state; with ``own``, all but u and z for each of k paths."""
    lead = (k,) if own else ()

    def wide(*shape):
        return torch.randn(*shape).to(dtype)

    u, dt, z = wide(2, l, d), wide(*lead, 2, l, d) - 1, wide(2, l, d) if gate else None
    B, C = wide(*lead, 2, l, g, n), wide(*lead, 2, l, g, n)
    A, D, bias, state = -4 * torch.rand(*lead, d, n) - 0.1, torch.randn(*lead, d), torch.randn(*lead, d), None
    return [u, dt, A, B, C, D, z, bias, torch.randn(*lead, 2, d, n) if gate else state]


def gathered(inputs, paths):
    return over_paths(lambda i: reference.selective_scan(i, True), paths, ScanInputs(*inputs))


def compare(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        error = ((x.double() - y).norm() / y.norm()).item()
        assert error <= tolerance, error


# (l, d, n, paths, options of operands, chunks)
CASES = {
    "four directions, split": (35, 40, 16, FOUR, {"g": 2}, 2),
    "back and forth, odd, bfloat16": (
        37,
        21,
        16,
        [(1, 37, 0, 1, 0), (1, 37, 0, 1, 1)],
        {"dtype": torch.bfloat16},
        None,
    ),
    "shared parameters": (35, 40, 16, [FOUR[3], FOUR[0]], {"g": 2, "own": False}, 2),
    "five directions, one state, bfloat16": (35, 40, 1, [*FOUR, FOUR[1]], {"dtype": torch.bfloat16}, None),
    "one state, gated, in float32": (35, 40, 1, FOUR, {}, None),
    "four states in two groups, not gated": (
        33,
        40,
        3,
        [(3, 11, 11, 1, 0), (11, 3, 1, 11, 1)],
        {"g": 2, "gate": False},
        None,
    ),
    "states formed again": (9, 12, 40, [(3, 3, 3, 1, 0), (3, 3, 1, 3, 1)], {}, None),
    "one path back, no gate": (35, 40, 16, [FOUR[2]], {"g": 2, "gate": False}, 2),
}


@needs_compiler
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_states_and_gradients(case, emulated):
    l, d, n, paths, options, chunks = case
    paths = walks("test", paths, l, None)
    inputs = operands(l, d, n, len(paths), **options)
    flat = [int(x) for path in paths for x in path]
    out, last, saved = cuda_paths.forward(ScanInputs(*inputs), True, flat, True, chunks)
    gout, glast = torch.randn_like(inputs[0]), torch.randn_like(last)
    grads = cuda_paths.backward(ScanInputs(*inputs), True, flat, gout, glast, saved, chunks)
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    want, states = gathered(exact, paths)
    loss = (want * gout.double()).sum() + (states * glast.double()).sum()
    wanted = torch.autograd.grad(loss, [x for x in exact if x is not None])
    got = [g for g, x in zip(grads[:9], inputs, strict=True) if x is not None]
    compare([out, last, *got], [want, states, *wanted], TOLERANCE[out.dtype])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_whole_beside_rows_that_are_cut(dtype, emulated):
    inputs, flat = operands(35, 40, 1, 4, dtype), [int(x) for path in FOUR for x in path]
    _, last, saved = cuda_paths.forward(ScanInputs(*inputs), True, flat, True)
    gout, glast = torch.randn_like(inputs[0]), torch.randn_like(last)
    grads = cuda_paths.backward(ScanInputs(*inputs), True, flat, gout, glast, saved, Cut(1, 3, 16, 8))
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    want, states = gathered(exact, walks("test", FOUR, 35, None))
    loss = (want * gout.double()).sum() + (states * glast.double()).sum()
    compare(grads[:9], torch.autograd.grad(loss, exact), TOLERANCE[dtype])


@needs_compiler
@pytest.mark.parametrize(("k", "launched"), [(1, 2), (4, 2), (5, 4)])
def test_a_scan_is_one_launch_for_up_to_four_paths(k, launched, emulated, monkeypatch):
    names, run = [], nvrtc.launch
    monkeypatch.setattr(
        nvrtc, "launch", lambda source, name, *rest: names.append((name, rest)) or run(source, name, *rest)
    )
    paths = ([*FOUR, FOUR[0]])[:k]
    inputs, flat = ScanInputs(*operands(35, 40, 1, k, torch.bfloat16)), [int(x) for path in paths for x in path]
    out, last, saved = cuda_paths.forward(inputs, True, flat, True)
    # of a forward, blocks of one path go along all
    assert [name.split("<")[0] for name, _ in names] == (
        ["scan_forward"] if k == 1 else ["scan_forward_in_turn"] * (launched // 2)
    )
    assert {rest[1] for _, rest in names} == {4}
    names.clear()
    cuda_paths.backward(inputs, True, flat, out, last, saved)
    assert len(names) == launched and all("_walks<" in name for name, _ in names)
    # two rows, two tiles of 32 channels
    assert [rest[1] for name, rest in names if name.startswith("scan")] == [
        4 * part for part in (min(k, 4), k - 4) if part > 0
    ]


@pytest.mark.parametrize(
    "sizes", [(128, 196, 384, 1, 1), (128, 784, 384, 16, 1), (1, 4096, 64, 16, 1), (128, 49, 768, 1, 1)]
)
def test_all_paths_together_are_cut_for_the_processors_there_are(sizes):
    b, *rest = sizes
    call = types.SimpleNamespace(sizes=sizes, i=types.SimpleNamespace(u=torch.empty(0, dtype=torch.bfloat16)))
    for k in (1, 4):
        _, grid = backward_plan((k * b, *rest), 132)
        # rows that are left whole are shared out
        want = dataclasses.replace(grid.cut, whole=grid.cut.whole // k)
        assert walk_launches._cut([call] * k, 132, ROOM, None) == want and want.whole < b
    assert walk_launches._cut([call], 132, ROOM, 5) == 5


@needs_compiler
def test_the_op_and_the_public_function(emulated, monkeypatch):
    inputs = [x.requires_grad_() for x in operands(9, 40, 16, 2, g=2)]
    u, dt, A, B, C, D, z, bias, state = inputs
    paths = [(3, 3, 1, 3, 0), (3, 3, 3, 1, 1)]
    flat = [x for path in paths for x in path]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.hybridzoo.selective_scan_cuda, (*inputs, None, None, True, True, flat), test_utils=checks
    )
    # as on a GPU
    for op in ("selective_scan", "paths"):
        able = dataclasses.replace(dispatch.TABLES[op]["cuda"], refuse=lambda facts: None)
        monkeypatch.setitem(dispatch.TABLES[op], "cuda", able)
    monkeypatch.setattr(cuda_ops, "selective_scan", spy := Spy(cuda_ops.selective_scan))
    options = {"dt_bias": bias, "dt_softplus": True, "initial_state": state, "paths": paths, "return_final_state": True}
    results = [selective_scan(u, dt, A, B, C, D, z, backend=name, **options) for name in ("cuda", "reference")]
    assert spy.calls == 1
    grads = [torch.autograd.grad(out.sin().sum() + last.square().sum(), inputs) for out, last in results]
    compare((*results[0], *grads[0]), (*results[1], *grads[1]), 5e-6)
    with pytest.raises(ValueError, match=r"D has shape \(39,\), expected \(40,\)"):
        selective_scan(u, dt, A, B, C, D[:, 1:], z, backend="cuda", **options)


class Spy:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def test_how_paths_are_walked_is_explained():
    assert dispatch.choose("paths").name == "gather"
    rows = {name: reason for name, _, reason in dispatch.explain("paths", device="cpu")}
    assert rows["cuda"] == "the CUDA kernels need CUDA tensors, got cpu"


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 9), (9, 1), (5, 7), (8, 64), (129, 200)])
def test_a_walk_divides_by_multiplying(h, w):
    for path in [(h, w, w, 1, 0), (w, h, 1, w, 0), (h, w, w, 1, 1), (w, h, 1, w, 1), (1, h * w, 0, 1, 1)]:
        k, t = walk(path, h * w), torch.arange(h * w)
        t = k.first + k.turn * t
        assert torch.equal((t * k.magic >> k.shift) * k.jump + t * k.step, path_index(path, t.device))


@pytest.mark.parametrize("inner", [1, 2, 3, 7, 1000, 2**20 - 1, 2**20 + 1, 2**31 - 1])
def test_a_walk_divides_every_step_below_two_to_the_31(inner):
    k = walk((1, inner, 0, 1, 0), inner)
    assert k.magic < 2**32
    for t in (inner - 1, inner, 2**31 - 1, (2**31 - 1) // inner * inner, (2**31 - 1) // inner * inner - 1):
        assert t * k.magic >> k.shift == t // inner

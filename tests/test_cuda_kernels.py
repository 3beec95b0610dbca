"""The CUDA sources, run on the CPU thread by thread (tests/emulator), against the float64 reference: numbers, not speed."""

import os
import shutil

import pytest
import torch

from hybridzoo.kernels import dispatch
from hybridzoo.kernels.gpu import launch_plans, nvrtc
from hybridzoo.kernels.scan import cuda as cuda_ops
from hybridzoo.kernels.scan import launches, reference
from hybridzoo.kernels.scan import op as api
from hybridzoo.kernels.scan.inputs import ScanInputs
from hybridzoo.kernels.scan.operands import ScanOperands
from hybridzoo.kernels.scan.shapes import (
    BACKWARD,
    FORWARD,
    FULL,
    PAIRS,
    ROOM,
    Cut,
    backward_shape,
    forward_plan,
    forward_shapes,
    keeps_states,
)

exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes of g++; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
pytestmark = pytest.mark.usefixtures("emulated")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def operands(b, l, d, n, g=1, dtype=torch.float32, gate=True, sliced=False):
    torch.manual_seed(l + d + n)

    def wide(width=d):
        return torch.randn(b, l, width).to(dtype)

    u, dt, z = wide(), wide() - 1, wide() if gate else None
    B, C = wide(g * n).view(b, l, g, n), wide(g * n).view(b, l, g, n)
    if sliced:
        u, B = wide(2 * d + 3)[..., 3 : 3 + d], wide(d + g * n + 1)[..., d + 1 :].view(b, l, g, n)
    A, D, bias, state = -4 * torch.rand(d, n) - 0.1, torch.randn(d), torch.randn(d), torch.randn(b, d, n)
    return u, dt, A, B, C, D, z, bias, state


def marks(b, l):
    reset = torch.rand(b, l) < 0.15
    reset[:, 0] = False
    return reset, torch.arange(l) < torch.randint(1, l + 1, (b, 1))


def errors(got, want):
    return [((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item() for x, y in zip(got, want, strict=True)]


def compare(inputs, reset, valid, shape=None, chunks=None, cut=None, backward=None):
    u = inputs[0]
    call = ScanOperands.of(ScanInputs(*inputs, reset, valid), True)
    out, last, saved = launches.forward(call, True, shape, chunks)
    exact = [None if x is None else x.double().requires_grad_() for x in inputs]
    want, state = reference.selective_scan(ScanInputs(*exact, reset, valid), True)
    real = torch.ones(()) if valid is None else valid[..., None]
    gout, glast = torch.randn(u.shape).to(u.dtype) * real.to(u.dtype), torch.randn(last.shape)
    loss = (want * gout.double()).sum() + (state * glast.double()).sum()
    grads = torch.autograd.grad(loss, [x for x in exact if x is not None])
    gradients = launches.backward(call, gout, glast, saved, backward, cut or chunks)
    got = [g for g, x in zip(gradients[:9], inputs, strict=True) if x is not None]
    if not keeps_states(inputs[2].shape[1]):
        # a backward of so many states has none to start from
        again = launches.backward(call, gout, glast, None, backward, cut or chunks)
        assert all(x is y or torch.equal(x, y) for x, y in zip(again, gradients, strict=True))
    worst = max(errors([out * real, last, *got], [want * real, state, *grads]))
    assert worst < TOLERANCE[u.dtype], worst


CASES = {
    "plain": dict(sizes=(2, 65, 40, 16)),
    "packed, padded and split": dict(sizes=(2, 130, 40, 16, 2, torch.bfloat16), marked=True, chunks=2),
    "rows cut and not cut": dict(sizes=(3, 130, 40, 16, 1, torch.bfloat16), marked=True, cut=Cut(1, 3, 64, 32)),
    "a long first piece": dict(sizes=(1, 100, 40, 16), cut=Cut(0, 2, 96, 32)),
    "slices of a projection": dict(sizes=(1, 35, 21, 16, 1, torch.float16, True, True)),
    "three states, no gate": dict(sizes=(1, 33, 40, 3, 1, torch.float32, False)),
    "forty states": dict(sizes=(1, 34, 16, 40, 1, torch.bfloat16)),
}


@needs_compiler
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_states_and_gradients(case):
    inputs = operands(*case["sizes"])
    marked = marks(*inputs[0].shape[:2]) if case.get("marked") else (None, None)
    compare(inputs, *marked, chunks=case.get("chunks"), cut=case.get("cut"))


@exhaustive
@needs_compiler
def test_operands_that_are_the_same_for_every_token_are_read_where_they_are():
    # a layer that is not selective: a group for each channel, and strides of 0
    u, dt, _, B, C, *rest = inputs = operands(2, 33, 20, 4, 20)
    B, C = (m[0, 0].expand_as(m) for m in (B, C))
    dt = dt.new_zeros(()).expand_as(dt)
    inputs = u, dt, inputs[2], B, C, *rest
    call = ScanOperands.of(ScanInputs(*inputs), True)
    assert call.i.B.stride()[:2] == call.i.C.stride()[:2] == (0, 0)
    compare(inputs, None, None)


@needs_compiler
@pytest.mark.parametrize("case", [case for case in CASES.values() if all(case["sizes"][6:7])], ids=str)
def test_outputs_are_formed_again_in_the_backward(case):
    inputs, cut = operands(*case["sizes"]), case.get("cut") or case.get("chunks")
    u = inputs[0]
    reset, valid = marks(*u.shape[:2]) if case.get("marked") else (None, None)
    call = ScanOperands.of(ScanInputs(*inputs, reset, valid), True)
    want, last, saved = launches.forward(call, True, chunks=case.get("chunks"))
    gout, out = torch.randn(u.shape).to(u.dtype), torch.full(u.shape, float("nan"), dtype=u.dtype)
    grads = launches.backward(call, gout, last, saved, chunks=cut, out=out)
    without = launches.backward(call, gout, last, saved, chunks=cut)
    assert all(torch.equal(x, y) for x, y in zip(grads[:9], without[:9], strict=True))
    # sums over states in another order
    assert errors([out], [want.double()])[0] < TOLERANCE[u.dtype]


@needs_compiler
@pytest.mark.parametrize("hurt", ["u", "dt", "B", "C", "z", "gout"])
@pytest.mark.parametrize("cut", [None, Cut(0, 3, 64, 32)], ids=["whole", "cut"])
def test_what_is_not_finite_stays_in_its_document(hurt, cut):
    inputs, where = operands(1, 130, 40, 16, 2, torch.bfloat16), slice(50, 90)
    u, dt, A, B, C, D, z, bias, state = inputs
    reset = torch.zeros(1, 130, dtype=torch.bool)
    reset[0, [where.start, 70, where.stop]] = True
    gout, glast = torch.randn(u.shape).bfloat16(), torch.randn(state.shape)

    def run(gout):
        call = ScanOperands.of(ScanInputs(u, dt, A, B, C, D, z, bias, state, reset, None), True)
        out, last, saved = launches.forward(call, True, chunks=cut and cut.chunks)
        gu, gdt, _, gB, gC, _, gz, _, ginit, *_ = launches.backward(call, gout, glast, saved, chunks=cut)
        others = [torch.cat([x[:, : where.start], x[:, where.stop :]], 1) for x in (out, gu, gdt, gB, gC, gz)]
        return [*others, last, ginit], (out, gu, gdt, gB, gC, gz)

    want, _ = run(gout)
    damaged = {"u": u, "dt": dt, "B": B, "C": C, "z": z, "gout": gout}[hurt]
    for value, at in ((float("nan"), 75), (float("inf"), 52)):
        damaged[0, at] = value
        got, inside = run(gout)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert any(not x[:, where].isfinite().all() for x in inside)


@needs_compiler
def test_a_rate_of_minus_infinity_forgets_all_and_padding_forgets_nothing():
    inputs = list(operands(2, 130, 40, 16, 2, torch.bfloat16))
    inputs[2] = inputs[2].index_fill(1, torch.tensor([3]), -torch.inf)
    compare(inputs, *marks(2, 130), chunks=2)


@needs_compiler
@exhaustive
@pytest.mark.parametrize("n", [1, 2, 4, 8, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_state_size(n, dtype):
    inputs = operands(1, 70, 24, n, 1, dtype)
    compare(inputs, *marks(1, 70), chunks=2)


@needs_compiler
@exhaustive
@pytest.mark.parametrize("shape", FORWARD[16], ids=str)
def test_every_shape_of_the_usual_state_size(shape):
    compare(operands(1, 100, 72, 16, 1, torch.bfloat16), None, None, shape=shape)


@needs_compiler
@pytest.mark.parametrize(("d", "g"), [(120, 1), (2 * 192, 2)])
def test_blocks_of_two_shapes(d, g):
    (shape,) = PAIRS[16]
    inputs = operands(2, 70, d, 16, g, torch.bfloat16)
    _, grid = forward_plan((2, 70, d, 16, g), 132, shape)
    assert 0 < grid.first < grid.tiles
    compare(inputs, *marks(2, 70), shape=shape)


def test_blocks_of_two_shapes_are_taken_where_one_leaves_gaps():
    # 1536 channels of 8 rows: a block of 64 and one of 32 for each of 128 multiprocessors
    shape, grid = forward_plan((8, 2048, 1536, 16, 1), 132)
    assert shape is PAIRS[16][0] and (grid.first, grid.tiles) == (16, 32)
    # 5120 of 4 rows: two and one for each of 128
    shape, grid = forward_plan((4, 2048, 5120, 16, 1), 132)
    assert shape is PAIRS[16][0] and (grid.first, grid.tiles) == (64, 96)
    # not where blocks of one shape fill them, where there is no room for two, or where rows are cut
    for sizes in ((8, 2048, 4096), (1, 2048, 1536)):
        assert forward_plan((*sizes, 16, 1), 132)[0] in FORWARD[16]
    assert forward_plan((8, 2048, 1536, 16, 1), 132, room=LAPTOP)[0] in FORWARD[16]
    assert forward_plan((8, 2048, 1536, 16, 1), 132, chunks=1)[0] in FORWARD[16]


@needs_compiler
@pytest.mark.parametrize("n", [1, 16, 40])
def test_what_lies_in_shared_memory_does_not_show(n):
    # the emulator fills it with something else every time
    u, dt, A, B, C, D, _, bias, state = operands(1, 40, 40, n, 1, torch.bfloat16)
    call = ScanOperands.of(ScanInputs(u, dt, A, B, C, D, None, bias, state, None, None), True)
    results = []
    for _ in range(2):
        out, last, saved = launches.forward(call, True)
        results.append((out, last, *launches.backward(call, torch.ones_like(out), torch.ones_like(last), saved)))
    assert all(x is y or torch.equal(x, y) for x, y in zip(*results, strict=True))


A100, LAPTOP = 163 << 10, 99 << 10


@pytest.mark.parametrize("n", FORWARD)
@pytest.mark.parametrize("element", [2, 4])
def test_what_fits_where_there_is_less_shared_memory(n, element):
    for space in (A100, LAPTOP):
        forward, backward = forward_shapes(n, element, space), backward_shape(n, element, space)
        assert forward and max(s.shared_bytes(element, FULL) for s in forward) <= space
        if n == 256 and (space == LAPTOP or element == 2):
            assert backward is None
            continue
        assert backward.shared_bytes(element) <= space and backward.k == BACKWARD[n].k
        shape, _ = forward_plan((4, 2048, 5120, n, 1), 108, None, None, element, space)
        assert shape in forward
    assert (
        forward_shapes(n, element, ROOM) == [*FORWARD[n], *PAIRS.get(n, ())]
        and backward_shape(n, element, ROOM) == BACKWARD[n]
    )


@needs_compiler
@pytest.mark.parametrize("n", [16, pytest.param(128, marks=exhaustive)])
def test_a_backward_of_fewer_warps(n):
    shape = backward_shape(n, 2, LAPTOP)
    assert shape.warps < BACKWARD[n].warps
    compare(operands(1, 70, 40, n, 1, torch.bfloat16), None, None, backward=shape)


def test_a_wrong_shape_is_named_as_it_was_given(monkeypatch):
    monkeypatch.setattr(api, "choose", lambda op, **facts: dispatch.TABLES[op]["cuda"])
    u, dt, A, B, C, *_ = operands(1, 5, 8, 3)
    with pytest.raises(ValueError, match=r"C has shape \(1, 5, 2\), expected \(1, 5, 3\) \(b, l, n\) like B"):
        api.selective_scan(u, dt, A, B, C[:, :, 0, :2])
    with pytest.raises(ValueError, match=r"C has shape \(1, 5, 3\), expected \(1, 5, 2, 3\) \(b, l, g, n\) like B"):
        api.selective_scan(u, dt, A, B.repeat(1, 1, 2, 1), C[:, :, 0])


def test_too_many_states_for_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_ops, "shared_memory", lambda device: 100 << 10)
    facts = {"device": "cuda", "dtype": torch.bfloat16}
    assert cuda_ops.refuse(facts | {"d_state": 128}) is None
    assert "the 99 KiB that a block has here, got d_state = 200" in cuda_ops.refuse(facts | {"d_state": 200})


@needs_compiler
@pytest.mark.parametrize("n", [16, 40])
def test_ops_are_registered_as_torch_wants_them(n):
    inputs = [None if x is None else x.requires_grad_() for x in operands(1, 9, 8, n)]
    torch.library.opcheck(torch.ops.hybridzoo.selective_scan_cuda, (*inputs, None, None, True, True))
    out, last = cuda_ops.selective_scan(ScanInputs(*inputs, None, None), True)
    want, state = reference.selective_scan(ScanInputs(*inputs, None, None), True)
    grads = [torch.autograd.grad(o.sum() + s.square().sum(), inputs) for o, s in ((out, last), (want, state))]
    for x, y in zip((out, last, *grads[0]), (want, state, *grads[1]), strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)
    # without groups, and without the nodes that an axis for them would be
    without = [x.detach().squeeze(2).requires_grad_() if i in (3, 4) else x for i, x in enumerate(inputs)]
    torch.library.opcheck(torch.ops.hybridzoo.selective_scan_cuda, (*without, None, None, True, True))
    out, last = cuda_ops.selective_scan(ScanInputs(*without, None, None), True)
    again = torch.autograd.grad(out.sum() + last.square().sum(), without)
    assert all(torch.equal(x, y.view(x.shape)) for x, y in zip(again, grads[0], strict=True))


@pytest.fixture
def on_cpu(monkeypatch):
    """CPU tensors are taken for those of a GPU, and no scan has been before."""
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_ops, "refuse_tensors", lambda facts: None)
    monkeypatch.setattr(launch_plans, "_known", {})


@needs_compiler
def test_a_scan_like_one_before_is_not_looked_at_again(on_cpu, monkeypatch):
    *first, bias, state = (None if x is None else x.requires_grad_() for x in operands(1, 35, 24, 16))

    def run(last=True, gate=True, **options):
        u, dt, A, B, C, D, z = first
        out = api.selective_scan(
            u, dt, A, B, C, D, z if gate else None, dt_bias=bias, dt_softplus=True, initial_state=state,
            return_final_state=last, **options,
        )  # fmt: skip
        out = out if last else (out,)
        return (*out, *torch.autograd.grad(sum(x.square().sum() for x in out), (u, dt, A, B, C, D, bias, state)))

    want = run()
    chosen, looked = api.choose, []
    monkeypatch.setattr(api, "choose", lambda op, **facts: looked.append(op) or chosen(op, **facts))
    got = run()
    assert not looked and all(map(torch.equal, got, want))
    # the state is not among the results, nor its gradient among what comes in
    assert torch.equal(run(last=False)[0], want[0]) and not looked
    with torch.no_grad():
        u, dt, A, B, C, D, z = first
        again = api.selective_scan(u, dt, A, B, C, D, z, dt_bias=bias, dt_softplus=True, initial_state=state)
    assert torch.equal(again, want[0]) and not looked
    # whatever differs is looked at: an operand less, a backend, an address
    run(gate=False)
    assert looked == ["selective_scan"]
    assert torch.allclose(run(backend="chunked")[0], want[0], atol=1e-5) and len(looked) == 2
    monkeypatch.setenv("HYBRIDZOO_BACKEND", "chunked")
    assert torch.allclose(run()[0], want[0], atol=1e-5) and len(looked) == 3
    monkeypatch.delenv("HYBRIDZOO_BACKEND")
    first[0] = torch.cat([torch.zeros(1), first[0].detach().flatten()])[1:].view(1, 35, 24).requires_grad_()
    assert torch.equal(run()[0], want[0]) and len(looked) == 4
    with pytest.raises(ValueError, match=r"dt has shape \(1, 34, 24\), expected \(1, 35, 24\)"):
        first[1] = first[1][:, 1:]
        run()


def test_no_more_looks_are_kept_than_fit(on_cpu, monkeypatch):
    monkeypatch.setattr(nvrtc, "launch", lambda *_: None)
    monkeypatch.setattr(launch_plans, "MOST", 3)
    for l in range(1, 9):
        u, dt, A, B, C, *_ = operands(1, l, 8, 4)
        for _ in range(2):
            api.selective_scan(u, dt, A, B, C)
        assert len(launch_plans._known) <= 3
    # what has to be converted is converted, and not remembered
    launch_plans._known.clear()
    api.selective_scan(u, dt.double(), A, B, C)
    api.selective_scan(u, dt, A.mT.contiguous().mT, B, C)
    assert not launch_plans._known


@needs_compiler
@pytest.mark.parametrize("n", [1, 16, 40])
def test_a_batch_of_no_rows(n):
    inputs = operands(2, 40, 40, n, 1, torch.bfloat16)
    u, dt, A, B, C, D, z, bias, state = (x[:0] if x.dim() > 2 or x is inputs[8] else x for x in inputs)
    call = ScanOperands.of(ScanInputs(u, dt, A, B, C, D, z, bias, state, None, None), True)
    out, last, saved = launches.forward(call, keeps_states(n))
    assert out.shape == u.shape and last.shape == state.shape
    grads = launches.backward(call, torch.empty_like(out), torch.empty_like(last), saved)
    wanted = (u, dt, A, B, C, D, z, bias, state)
    assert [g.shape for g in grads[:9]] == [x.shape for x in wanted]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads[:9])


@needs_compiler
def test_a_second_derivative_is_an_error(monkeypatch):
    monkeypatch.setattr(api, "choose", lambda op, **facts: dispatch.TABLES[op]["cuda"])
    u, dt, A, B, C, *_ = operands(1, 9, 8, 16)
    u.requires_grad_()
    (gu,) = torch.autograd.grad(api.selective_scan(u, dt, A, B, C).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative\. Use backend='reference', or HYBRIDZOO_BACKEND=reference"):
        gu.sum().backward()
    (gu,) = torch.autograd.grad(api.selective_scan(u, dt, A, B, C).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.autograd.grad((gu + u.square()).sum(), u)

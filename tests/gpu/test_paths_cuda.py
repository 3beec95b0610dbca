"""The CUDA scan over paths on a GPU: against float64, against gathered tokens, and against itself."""

import pytest
import torch

from hybridzoo.kernels import dispatch, selective_scan
from hybridzoo.kernels.scan import chunked, cuda_paths
from hybridzoo.kernels.scan import cuda as cuda_ops
from hybridzoo.kernels.scan.inputs import ScanInputs
from hybridzoo.kernels.scan.paths import over_paths, walks

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def directions(h, w, k):
    """The first k of rows, rows reversed, columns, columns reversed, and the same once more."""
    rows, columns = (h, w, w, 1), (w, h, 1, w)
    return (2 * [(*rows, 0), (*rows, 1), (*columns, 0), (*columns, 1)])[:k]


def operands(b, l, d, n, g, k, dtype, own=True, gate=True):
    lead = (k,) if own else ()

    def wide(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    def narrow(*shape):
        return torch.randn(*lead, *shape, device="cuda")

    u, dt, z = wide(b, l, d), wide(*lead, b, l, d) - 2, wide(b, l, d) if gate else None
    B, C, A = wide(*lead, b, l, g, n), wide(*lead, b, l, g, n), -8 * torch.rand(*lead, d, n, device="cuda") - 0.01
    return [u, dt, A, B, C, narrow(d), z, narrow(d), narrow(b, d, n)]


def native(inputs, paths):
    return cuda_ops.selective_scan(ScanInputs(*inputs), True, paths)


def gathered(scan):
    def run(inputs, paths):
        return over_paths(lambda i: scan(i, True), paths, ScanInputs(*inputs))

    return run


def run(scan, inputs, paths, gout, glast):
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out, last = scan(leaves, paths)
    given = [x for x in leaves if x is not None]
    grads = iter(torch.autograd.grad([out, last], given, [gout.to(out.dtype), glast.to(last.dtype)]))
    return {"out": out, "last": last, **{k: next(grads) for k, x in zip(NAMES, leaves, strict=True) if x is not None}}


# (b, h, w, d, n, g, paths, dtype, whether each path has parameters of its own, whether there is a gate)
GRID = [
    (2, 1, 1, 16, 16, 1, 2, F32, True, True),
    (2, 5, 13, 33, 16, 1, 1, BF16, True, True),
    (2, 5, 13, 33, 16, 1, 4, BF16, True, True),
    (3, 1, 257, 40, 16, 1, 2, F16, True, True),
    (2, 14, 14, 96, 16, 3, 4, BF16, False, True),
    (2, 14, 14, 96, 16, 3, 4, F32, True, False),
    (4, 56, 56, 192, 16, 1, 4, BF16, True, True),
    (2, 56, 55, 96, 1, 1, 4, BF16, True, False),
    (2, 28, 28, 100, 8, 1, 4, F16, True, True),
    (1, 200, 334, 64, 16, 1, 4, BF16, True, True),
    (1, 7, 7, 768, 64, 2, 4, F32, True, True),
    (1, 33, 31, 40, 256, 1, 2, BF16, False, True),
    (64, 14, 14, 768, 16, 1, 4, BF16, True, True),
    # walks of a forward in turn, those of a backward in one grid
    (128, 14, 14, 384, 1, 1, 4, BF16, True, False),
    (64, 7, 7, 768, 4, 2, 4, F16, True, True),
    (3, 14, 13, 100, 2, 1, 5, F32, True, True),
    (16, 56, 56, 96, 1, 1, 4, BF16, True, True),
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_outputs_states_and_gradients(case):
    b, h, w, d, n, g, k, dtype, own, gate = case
    paths = walks("test", directions(h, w, k), h * w, None)
    inputs = operands(b, h * w, d, n, g, k, dtype, own, gate)
    gout, glast = torch.randn_like(inputs[0]), torch.randn(k, b, d, n, device="cuda")
    # what is left in the allocator's memory must not show
    del_me = torch.full((1 << 24,), float("nan"), device="cuda")
    del del_me
    got = run(native, inputs, paths, gout, glast)
    again = run(native, inputs, paths, gout, glast)
    assert all(torch.equal(got[name], again[name]) for name in got)
    # float64 takes 8 bytes for each of b l d n: where that is too much, the straight kernels in float32 stand for it
    large = k * b * h * w * d * n > 1 << 28
    exact_scan = gathered(cuda_ops.selective_scan if large else chunked.selective_scan)
    widened = [None if x is None else x.to(F32 if large else torch.float64) for x in inputs]
    exact = run(exact_scan, widened, paths, gout, glast)
    same = run(gathered(cuda_ops.selective_scan if large else chunked.selective_scan), inputs, paths, gout, glast)
    floor = {F32: 1e-6, BF16: 2e-3, F16: 3e-4}[dtype]
    for name, want in exact.items():
        error, allowed = (((x[name].double() - want.double()).norm() / want.double().norm()) for x in (got, same))
        assert error <= 2 * allowed + floor, (name, error.item(), allowed.item())


def test_float32_agrees_with_gathered_tokens():
    paths = walks("test", directions(28, 29, 4), 28 * 29, None)
    inputs = operands(2, 28 * 29, 96, 16, 1, 4, F32)
    gout, glast = torch.randn_like(inputs[0]), torch.randn(4, 2, 96, 16, device="cuda")
    got, want = (run(s, inputs, paths, gout, glast) for s in (native, gathered(cuda_ops.selective_scan)))
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_split_length_gives_the_same():
    paths = [x for path in directions(33, 34, 4) for x in path]
    inputs = ScanInputs(*operands(1, 33 * 34, 64, 16, 1, 4, F32))
    whole, parts = (cuda_paths.forward(inputs, True, paths, True, chunks) for chunks in (1, 5))
    for x, y in zip(whole, parts, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    gout, glast = torch.randn_like(whole[0]), torch.randn_like(whole[1])
    grads = [cuda_paths.backward(inputs, True, paths, gout, glast, whole[2], chunks) for chunks in (1, 5)]
    for x, y in zip(*(g[:9] for g in grads), strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


def test_slices_of_one_projection_are_read_in_place():
    b, l, d, n, k = 2, 14 * 14, 64, 16, 4
    u, dt, A, B, C, D, z, bias, state = operands(b, l, d, n, 1, k, BF16)
    both, low = torch.randn(b, l, 2 * d, device="cuda").to(BF16), torch.randn(b, l, k, 2 * n, device="cuda").to(BF16)
    u, z = both.split(d, -1)
    B, C = (x.movedim(2, 0).unsqueeze(3) for x in low.split(n, -1))
    paths = walks("test", directions(14, 14, k), l, None)
    got = native([u, dt, A, B, C, D, z, bias, state], paths)
    want = native([x.contiguous() for x in (u, dt, A, B, C, D, z, bias, state)], paths)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_text_is_one_path():
    inputs = operands(2, 130, 72, 16, 1, 1, BF16, own=False)
    got, want = (cuda_ops.selective_scan(ScanInputs(*inputs), True, p) for p in ([(1, 130, 0, 1, False)], None))
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][0], want[1], atol=1e-6, rtol=1e-5)


def test_it_is_what_is_taken():
    facts = {"device": "cuda", "dtype": BF16, "d_state": 16}
    assert dispatch.choose("paths", **facts).name == "cuda"
    (name, taken, reason), _ = dispatch.explain("paths", **facts)
    assert name == "cuda" and taken and reason


def test_compiles_without_graph_breaks():
    inputs = [x.requires_grad_() for x in operands(2, 35, 64, 16, 1, 4, BF16)]
    u, dt, A, B, C, D, z, bias, state = inputs
    paths = directions(5, 7, 4)

    def loss(u):
        out, last = selective_scan(
            u, dt, A, B, C, D, z, dt_bias=bias, dt_softplus=True, initial_state=state, paths=paths,
            return_final_state=True, backend="cuda",
        )  # fmt: skip
        return out.float().square().sum() + last.sum()

    want = torch.autograd.grad(loss(u), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(u), inputs)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    flat = [x for path in paths for x in path]
    torch.library.opcheck(torch.ops.hybridzoo.selective_scan_cuda, (*inputs, None, None, True, True, flat))

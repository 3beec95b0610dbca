"""Step sizes that the CUDA scan forms itself, on a GPU: against float64, against a product in front, and against themselves."""

import pytest
import torch

from hybridzoo.kernels import Seq, dispatch, selective_scan
from hybridzoo.kernels.scan import low_rank

pytestmark = pytest.mark.gpu
BF16, F16 = torch.bfloat16, torch.float16
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "dt_weight")


def directions(h, w):
    rows, columns = (h, w, w, 1), (w, h, 1, w)
    return [(*rows, 0), (*columns, 0), (*rows, 1), (*columns, 1)]


def operands(b, l, d, n, r, dtype, lead=(), sliced=False, gate=True):
    def wide(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    u, z = wide(b, l, d), wide(b, l, d) if gate else None
    # rows a whole number of 16 bytes apart
    sizes = [r, n, n, -(r + 2 * n) % 8] if sliced else [r, -r % 8]
    dt, *narrow = wide(*lead, b, l, sum(sizes)).split(sizes, -1)
    B, C = narrow[:2] if sliced else (wide(*lead, b, l, n) for _ in range(2))
    A, D = -8 * torch.rand(*lead, d, n, device="cuda") - 0.01, torch.randn(*lead, d, device="cuda")
    bias, state = torch.randn(*lead, d, device="cuda") - 2, torch.randn(*lead, b, d, n, device="cuda")
    return [u, dt, A, B.unsqueeze(-2), C.unsqueeze(-2), D, z, bias, state, wide(*lead, d, r) / r**0.5]


def run(inputs, gout, glast, in_front=False, backend="cuda", **options):
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    u, dt, A, B, C, D, z, bias, state, weight = leaves
    if in_front:
        dt, weight = low_rank.step_sizes(dt, weight), None
    options |= {"dt_bias": bias, "dt_softplus": True, "initial_state": state, "return_final_state": True}
    out, last = selective_scan(u, dt, A, B, C, D, z, dt_weight=weight, backend=backend, **options)
    grads = torch.autograd.grad(
        [out, last], [x for x in leaves if x is not None], [gout.to(out.dtype), glast.to(last.dtype)]
    )
    return dict(
        zip(
            ["out", "last", *(k for k, x in zip(NAMES, leaves, strict=True) if x is not None)],
            (out, last, *grads),
            strict=True,
        )
    )


# (b, l or (h, w), d, n, r, dtype, documents, more options of operands)
GRID = [
    (2, 1, 16, 16, 2, BF16, False, {}),
    (2, 65, 33, 16, 6, F16, False, {}),
    (2, 257, 100, 16, 16, BF16, True, {"sliced": True}),
    (3, 2049, 192, 16, 12, BF16, False, {"sliced": True}),
    (8, 2048, 1536, 16, 16, BF16, False, {"sliced": True}),
    (8, 2048, 1536, 16, 48, BF16, False, {"sliced": True}),
    (1, 16384, 512, 16, 8, BF16, False, {}),
    (1, 4097, 64, 1, 6, F16, True, {"gate": False}),
    (2, 300, 96, 8, 16, BF16, False, {"sliced": True}),
    (1, 127, 40, 64, 24, BF16, True, {"gate": False}),
    (1, 63, 24, 256, 10, F16, False, {}),
    (2, (5, 13), 33, 16, 6, BF16, False, {}),
    (2, (56, 55), 96, 1, 6, BF16, False, {"gate": False, "sliced": True}),
    (16, (14, 14), 384, 16, 24, F16, False, {"sliced": True}),
    (4, (56, 56), 192, 16, 12, BF16, False, {}),
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_outputs_states_and_gradients(case):
    b, size, d, n, r, dtype, documents, options = case
    paths = directions(*size) if isinstance(size, tuple) else None
    l, lead = (size, ()) if paths is None else (size[0] * size[1], (4,))
    inputs = operands(b, l, d, n, r, dtype, lead, **options)
    gout, glast = torch.randn_like(inputs[0]), torch.randn(*lead, b, d, n, device="cuda")
    seq = Seq.from_documents((torch.arange(l, device="cuda") // 50).expand(b, l)) if documents else None
    # what is left in the allocator's memory must not show
    del_me = torch.full((1 << 24,), float("nan"), device="cuda")
    del del_me
    got, again = (run(inputs, gout, glast, seq=seq, paths=paths) for _ in range(2))
    assert all(torch.equal(got[name], again[name]) for name in got)
    same = run(inputs, gout, glast, in_front=True, seq=seq, paths=paths)
    # float64 takes 8 bytes for each of b l d n: where that is too much, the straight kernels in float32 stand for it
    large = b * l * d * n * max(1, len(lead) * 4) > 1 << 28
    widened = [None if x is None else x.to(torch.float32 if large else torch.float64) for x in inputs]
    exact = run(widened, gout, glast, seq=seq, paths=paths, backend="cuda" if large else "chunked")
    floor = {BF16: 2e-3, F16: 3e-4}[dtype]
    for name, want in exact.items():
        error, allowed = (((x[name].double() - want.double()).norm() / want.double().norm()) for x in (got, same))
        assert error <= 2 * allowed + floor, (name, error.item(), allowed.item())


def test_it_is_what_is_taken():
    facts = {"device": "cuda", "dtype": BF16, "d_state": 16, "rank": 12}
    assert dispatch.choose("dt_weight", **facts).name == "cuda"
    assert dispatch.choose("dt_weight", **facts | {"rank": 160}).name == "product"


def test_no_step_sizes_are_in_memory():
    b, l, d = 8, 2048, 1536
    inputs = operands(b, l, d, 16, 16, BF16, sliced=True)
    used = []
    for in_front in (False, True):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            u, dt, A, B, C, D, z, bias, _, weight = inputs
            if in_front:
                dt, weight = low_rank.step_sizes(dt, weight), None
            selective_scan(u, dt, A, B, C, D, z, dt_bias=bias, dt_weight=weight, dt_softplus=True, backend="cuda")
        used.append(torch.cuda.max_memory_allocated() - before)
        del dt
    assert used[1] - used[0] >= 0.95 * 2 * b * l * d, used


def test_compiled_whole():
    u, dt, A, B, C, D, z, bias, _, weight = (x.requires_grad_() for x in operands(2, 100, 64, 16, 8, BF16))

    def scan(u, dt, weight):
        return selective_scan(u, dt, A, B, C, D, z, dt_bias=bias, dt_weight=weight, dt_softplus=True).float().sin()

    got, want = torch.compile(scan, fullgraph=True)(u, dt, weight), scan(u, dt, weight)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x.sum(), (u, dt, weight)) for x in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("paths", [None, directions(8, 16)], ids=["row", "paths"])
def test_the_gradient_of_a_float32_weight_is_not_rounded_to_16_bits(paths):
    u, dt, A, B, C, D, z, bias, _, weight = operands(2, 128, 64, 16, 8, BF16)
    weight = weight.float().requires_grad_()
    out = selective_scan(u, dt, A, B, C, D, z, dt_bias=bias, dt_weight=weight, paths=paths, backend="cuda")
    (g,) = torch.autograd.grad(out, weight, torch.randn_like(out))
    assert g.dtype == torch.float32 and (g != g.to(BF16)).float().mean() > 0.9

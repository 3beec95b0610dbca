"""The scan where PyTorch is more than a function call: graphs, compilation, autocast, checkpointing, streams, and very large tensors."""

import copy

import pytest
import torch
import torch.utils.checkpoint

import hybridzoo as zoo
from hybridzoo.kernels import Seq, dispatch, selective_scan
from hybridzoo.layers import Mamba

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


def leaves(b, l, d, n=16, g=1, dtype=BF16):
    made = {name: torch.randn(b, l, d, device="cuda").to(dtype) for name in ("u", "dt", "z")}
    made |= {name: torch.randn(b, l, g, n, device="cuda").to(dtype) for name in ("B", "C")}
    made |= {"A": -8 * torch.rand(d, n, device="cuda") - 0.01, "D": torch.randn(d, device="cuda")}
    made["dt_bias"] = torch.randn(d, device="cuda") - 3
    return {name: made[name].requires_grad_() for name in NAMES}


def ours(made, **options):
    return selective_scan(**made, dt_softplus=True, backend="cuda", **options)


def gradients(out, made):
    generator = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
    return torch.autograd.grad(out, list(made.values()), weight)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def test_the_kernels_are_what_runs_by_default():
    for dtype in (F32, BF16, torch.float16):
        assert (
            dispatch.choose("selective_scan", device="cuda", dtype=dtype, packed=True, initial_state=True).name
            == "cuda"
        )


def test_a_graph_of_the_forward_replays_on_new_inputs():
    made = {name: x.detach() for name, x in leaves(2, 300, 96).items()}
    ours(made)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(made)
    for _ in range(2):
        for name in ("u", "dt", "B", "C", "z"):
            made[name].copy_(torch.randn_like(made[name]))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, ours(made))


@pytest.mark.parametrize("shape", [(2, 300, 96), (1, 4096, 64)], ids=str)
def test_a_graph_of_forward_and_backward_replays_on_new_inputs(shape):
    made = leaves(*shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            gradients(ours(made), made)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    weight = torch.randn(shape, device="cuda").to(BF16)
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(ours(made), list(made.values()), weight)
    with torch.no_grad():
        for name in ("u", "dt", "B", "C", "z"):
            made[name].copy_(torch.randn_like(made[name]))
    graph.replay()
    want = torch.autograd.grad(ours(made), list(made.values()), weight)
    for name, a, b in zip(made, found, want, strict=True):
        assert torch.equal(a, b), name


def test_it_runs_on_the_stream_that_is_current():
    made = leaves(2, 300, 96)
    want = gradients(ours(made), made)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 64
        got = gradients(ours({k: x * (1 + 0 * busy[0, 0].nan_to_num(0).to(x.dtype)) for k, x in made.items()}), made)
        torch.cuda.current_stream().synchronize()
    for name, a, b in zip(made, got, want, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", [(8, 512, 1536), (1, 8192, 512), (1, 2048, 1536), (16, 196, 384)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_two_runs_are_equal_bit_for_bit(shape, dtype):
    made = leaves(*shape, dtype=dtype)
    runs = []
    for _ in range(2):
        poison = torch.full((1 << 26,), float("nan"), device="cuda")
        del poison
        out = ours(made)
        runs.append((out, *gradients(out, made)))
    for name, a, b in zip(("out", *made), *runs, strict=True):
        assert torch.equal(a, b) and a.isfinite().all(), name


def test_autocast_leaves_the_op_alone():
    made = leaves(2, 65, 64, dtype=F32)
    want = ours(made)
    with torch.autocast("cuda", BF16):
        out = ours(made)
        grads = gradients(out, made)
    assert out.dtype == F32 and torch.equal(out, want)
    for a, b in zip(grads, gradients(want, made), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_operands_of_different_types_meet_in_float32():
    made = leaves(2, 65, 64)
    mixed = {name: x.detach().float().requires_grad_() if name == "dt" else x for name, x in made.items()}
    out = ours(mixed)
    wide = {name: x.detach().float() for name, x in made.items()}
    assert out.dtype == BF16 and torch.equal(out, ours(wide).to(BF16))
    assert [g.dtype for g in gradients(out, mixed)] == [x.dtype for x in mixed.values()]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_layer_compiles_into_one_graph(compiler):
    torch.compiler.reset()
    layer = Mamba(64, d_state=16).cuda()
    twin = torch.compile(copy.deepcopy(layer), fullgraph=True, backend=compiler)
    x = torch.randn(2, 50, 64, device="cuda")
    results = []
    for run in (layer, twin):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", BF16):
            y = run(leaf)
        y.float().square().mean().backward()
        results.append((y, leaf.grad, *(p.grad for p in run.parameters())))
    for a, b in zip(*results, strict=True):
        assert relative(b, a) < 2e-2
    explained = torch._dynamo.explain(layer)(x)
    assert explained.graph_break_count == 0, explained.break_reasons


def test_checkpointing_a_model_changes_nothing():
    model = zoo.build("mamba-tiny", device="cuda").train()
    ids = torch.randint(1, 256, (2, 100), device="cuda")
    grads = []
    for on in (False, True):
        model.gradient_checkpointing_enable(on)
        model.zero_grad()
        with torch.autocast("cuda", BF16):
            model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert relative(b, a) < 1e-5


@pytest.mark.parametrize("n", [1, 16, 200, 256])
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_documents_and_padding_through_the_public_op(kind, n):
    l = 150
    made = leaves(2, l, 48, n, dtype=F32)
    if kind == "packed":
        lengths = torch.tensor([1, 1, 40, 33, 65, l - 140 - 3])
        ids = torch.cat([torch.repeat_interleave(torch.arange(6), lengths), torch.full((3,), -1)])
        seq = Seq.from_documents(ids.expand(2, l).contiguous().cuda())
    else:
        seq = Seq.from_mask(torch.arange(l, device="cuda") < torch.tensor([[l], [1]], device="cuda"))
    results = []
    for backend, dtype in (("cuda", F32), ("reference", torch.float64)):
        own = {name: x.detach().to(dtype).requires_grad_() for name, x in made.items()}
        out, last = selective_scan(**own, dt_softplus=True, seq=seq, return_final_state=True, backend=backend)
        loss = (out * seq.valid[..., None]).square().sum() + last.square().sum()
        real = out * seq.valid[..., None]
        results.append(
            {"out": real, "last": last, **dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))}
        )
    for name, want in results[1].items():
        assert relative(results[0][name], want) < 2e-5, name


def test_more_than_two_to_the_31_elements():
    b, l, d = 3, 350_000, 2048
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    assert b * l * d > 2**31
    u = torch.empty(b, l, d, device="cuda", dtype=BF16).uniform_(-1, 1)
    B = torch.randn(b, l, 1, 16, device="cuda").to(BF16)
    A, bias = -torch.rand(d, 16, device="cuda"), torch.full((d,), -4.0, device="cuda")

    def run(u, B):
        # one tensor in three places, with a gradient for each: their sum would be rounded where they cancel
        u, dt, z = leaves = [u.detach().requires_grad_() for _ in range(3)]
        out = selective_scan(u, dt, A, B, B, z=z, dt_bias=bias, dt_softplus=True, backend="cuda")
        return out.detach(), torch.autograd.grad(out, leaves, out.detach())

    out, grads = run(u, B)
    want, want_grads = run(u[2:].clone(), B[2:])
    # the same row alone may be split into other chunks: sums in another order, then rounded to 8 bits
    for at in (0, 1000, l - 1):
        for name, x, y in zip(("out", "u", "dt", "z"), (out, *grads), (want, *want_grads), strict=True):
            error = (x[2, at].double() - y[0, at].double()).norm() / y[0, at].double().norm()
            assert error < 5e-3, (name, at, error.item())
    assert all(x[2, -5000:].isfinite().all() for x in (out, *grads))

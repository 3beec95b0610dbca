"""The CUDA RMSNorm, run on the CPU thread by thread (tests/emulator), against float64: numbers, not speed."""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
from hybridzoo import kernels
from hybridzoo.kernels import dispatch
from hybridzoo.kernels.norm import cuda as cuda_norm
from hybridzoo.kernels.norm.cuda import backward, branch_rms_norm, forward, plan

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
EPS = 1e-5
pytestmark = [
    pytest.mark.usefixtures("emulated"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def operands(shape, x=F32, h=F32, weight=F32, past=True):
    """Input, weight, and the gradients of the output and of what goes past it."""
    gains = None if weight is None else torch.randn(shape[-1]).to(weight)
    return torch.randn(shape).to(x), gains, torch.randn(shape).to(h), torch.randn(shape).to(x) if past else None


def addends(x):
    """What may be added to x without changing its type."""
    return [torch.randn(x.shape).to(m) for m in DTYPES if torch.promote_types(m, x.dtype) == x.dtype]


def exact(x, weight, gh, past):
    """Output and gradients in float64."""
    leaves = [m.double().requires_grad_() for m in (x, weight) if m is not None]
    h = F.rms_norm(leaves[0], x.shape[-1:], leaves[1] if weight is not None else None, EPS)
    gx, *gweight = torch.autograd.grad(h, leaves, gh.double())
    return h, gx if past is None else gx + past.double(), *gweight


def poisoned():
    # what the allocator hands out next, in the sizes of these tests
    for size in (1 << n for n in range(6, 20)):
        torch.full((size,), float("nan"))


def compare(x, weight, gh, past):
    poisoned()
    h, same = forward(x, weight, EPS, gh.dtype)
    got = h, *backward(x, weight, EPS, gh, past, True)[:2]
    assert same is x
    for add in addends(x):
        # the sum is PyTorch's, and all that comes of it has the bits that the norm of the sum has
        total = x + add
        poisoned()
        h, same = forward(x, weight, EPS, gh.dtype, add)
        assert torch.equal(same, total) and torch.equal(h, forward(total, weight, EPS, gh.dtype)[0])
        gx, gweight, _, gadd = backward(total, weight, EPS, gh, past, True, add.dtype)
        for a, b in zip((gx, gweight), backward(total, weight, EPS, gh, past, True)[:2], strict=True):
            assert (a is b is None) or torch.equal(a, b)
        assert torch.equal(gadd, gx.to(add.dtype)) and gadd.shape == x.shape
    wants = exact(x, weight, gh, past)
    assert [m.dtype for m in got if m is not None] == [m.dtype for m in (gh, x, weight) if m is not None]
    for a, b in zip(got, wants, strict=False):
        # half a unit in the last place, and what float32 adds
        largest = {F32: 0.0, BF16: 2**-8, F16: 2**-11}[a.dtype]
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= (largest + 1e-6) * b.norm() + 1e-7, (
            a.dtype,
            (a.double() - b).norm() / b.norm(),
        )


@pytest.mark.parametrize("d", [1, 3, 8, 24, 768, 1000, 5120])
def test_every_width_of_a_row(d):
    compare(*operands((7, d)))


# a GPU runs all 36; here every pair, each with a weight of another type, as every combination is a kernel that g++ takes seconds for
PAIRS = itertools.product(DTYPES, DTYPES)


@pytest.mark.parametrize("types", [(*pair, (*DTYPES, None)[i % 4]) for i, pair in enumerate(PAIRS)], ids=str)
def test_every_combination_of_types(types):
    compare(*operands((2, 5, 24), *types))
    compare(*operands((2, 19), *types, past=False))


@pytest.mark.parametrize("d", [768, 1000, 2560])
def test_half_precision_is_no_further_from_the_truth_than_twice_torchs_own(d):
    x, weight, gh, past = operands((9, d), BF16, BF16, BF16)
    got = forward(x, weight, EPS, BF16)[0], *backward(x, weight, EPS, gh, past, True)[:2]
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    own = F.rms_norm(leaves[0], (d,), leaves[1], EPS)
    gx, gweight = torch.autograd.grad(own, leaves, gh)
    for a, b, want in zip(got, (own, gx + past, gweight), exact(x, weight, gh, past), strict=True):
        error, theirs = ((m.double() - want).norm() / want.norm() for m in (a, b))
        assert error <= 2 * theirs, (error.item(), theirs.item())


@pytest.mark.parametrize(("d", "m"), [(20, 300), (768, 30), (2049, 5), (6148, 4)])
def test_blocks_go_on_to_further_rows(d, m, monkeypatch):
    # one multiprocessor: two blocks or three take all the rows, and the last turn is not full
    monkeypatch.setattr(cuda_norm, "processors", lambda device: 1)
    inputs = operands((m, d), F32, BF16)
    compare(*inputs)
    first, again = (backward(*inputs[:2], EPS, *inputs[2:], True)[:2] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_are_read_where_they_lie():
    x, weight, gh, past = operands((2, 5, 24))
    wide = torch.randn(2, 5, 60)
    for first in (8, 10):  # 16- and 8-byte borders
        x = wide[..., first : first + 24]
        rows, stride = cuda_norm._rows(x, 10, 24)
        assert rows.data_ptr() == x.data_ptr() and stride == 60
        compare(x, weight, gh, past)
    compare(x, torch.randn(48)[::2], gh, past)
    # heads cut from a projection, channels that are not neighbours, gradients of stride zero
    heads = torch.randn(2, 5, 6, 24)
    gh, past = torch.randn(()).expand(2, 5, 24), torch.randn(24).expand(2, 5, 24)
    compare(heads[:, :, 2], weight, gh, past)
    compare(torch.randn(24, 5, 2).transpose(0, 2), weight, gh, past)
    compare(torch.randn(3, 2)[:, 1:], torch.ones(1), torch.randn(3, 1), torch.randn(3, 1))


def test_a_norm_like_one_before_is_launched_as_that_was(monkeypatch):
    monkeypatch.setitem(dispatch.TABLES["rms_norm"], "cuda", dispatch.Backend("cuda", "emulated", run=branch_rms_norm))
    planned, plan_of = [], cuda_norm.plan_of
    monkeypatch.setattr(cuda_norm, "plan_of", lambda *given: planned.append(given) or plan_of(*given))
    wide, weight = torch.randn(2, 5, 60), torch.randn(25)
    for lie, gains, copied in (
        (lambda m: m[..., :24].contiguous(), weight[:24], False),
        (lambda m: m[..., 8:32], None, False),
        (lambda m: m[..., :24].contiguous(), weight[1:], True),
        (lambda m: m[..., :48:2], weight[:24], True),
    ):
        for add in (None, torch.randn(2, 5, 24)):
            kernels.branch_rms_norm(lie(wide), gains, EPS, BF16, add=add)
            other = lie(torch.randn(2, 5, 60))
            want = forward(other, gains, EPS, BF16, add)
            planned.clear()
            got = kernels.branch_rms_norm(other, gains, EPS, BF16, add=add)
            assert all(map(torch.equal, got, want)) and bool(planned) == copied


def test_a_norm_of_rows_off_16_byte_borders_is_looked_at_every_time(monkeypatch):
    # 8 bytes off them four elements are read at once, 2 bytes off one by one, and both look the same to who asks for 16
    monkeypatch.setitem(dispatch.TABLES["rms_norm"], "cuda", dispatch.Backend("cuda", "emulated", run=branch_rms_norm))
    used, plan_of = [], cuda_norm.plan_of
    monkeypatch.setattr(cuda_norm, "plan_of", lambda *given: used.append(plan_of(*given)) or used[-1])
    kernels_of = set()
    for off in (4, 1):
        for _ in range(2):
            x = torch.randn(2 * 24 + off).to(BF16)[off:].view(2, 24)
            used.clear()
            kernels.branch_rms_norm(x, None, EPS, BF16)
            kernels_of.add((off, used[-1][1].arguments))
    assert len(kernels_of) == 2 and len({arguments for _, arguments in kernels_of}) == 2


def test_large_small_and_broken_rows():
    x = torch.stack(
        [torch.full((40,), 3e15), torch.full((40,), 1e-3), torch.zeros(40), torch.full((40,), float("nan"))]
    )
    h, _ = forward(x, None, EPS, F32)
    torch.testing.assert_close(h, F.rms_norm(x, (40,), None, EPS), equal_nan=True)
    gx, *_ = backward(x, None, EPS, torch.ones_like(x), None, False)
    assert gx[:3].isfinite().all() and gx[3].isnan().all()


def test_no_rows():
    x, weight, gh, past = operands((2, 0, 24), BF16)
    assert forward(x, weight, EPS, F32)[0].shape == forward(x, weight, EPS, F32, x)[1].shape == (2, 0, 24)
    gx, gweight, _, gadd = backward(x, weight, EPS, gh, past, True, F32)
    assert gx.shape == gadd.shape == x.shape and not gweight.any()


def test_both_gradients_of_the_input_meet_in_the_norm():
    x, weight, gh, past = operands((3, 4, 24), F32, BF16)
    leaves = x.requires_grad_(), weight.requires_grad_()
    h, same = branch_rms_norm(x, weight, EPS, BF16)
    assert same.data_ptr() == x.data_ptr() and h.dtype == BF16
    assert h.grad_fn is same.grad_fn
    got = torch.autograd.grad((h, same), leaves, (gh, past), retain_graph=True)
    for a, b in zip(got, exact(x.detach(), weight.detach(), gh, past)[1:], strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    # one of the two alone
    torch.testing.assert_close(torch.autograd.grad(same, x, past, retain_graph=True)[0], past)
    (alone,) = torch.autograd.grad(h, x, gh, retain_graph=True)
    torch.testing.assert_close(alone.double(), exact(x.detach(), weight.detach(), gh, None)[1], atol=1e-5, rtol=1e-5)
    # a derivative of the backward is an error and not a zero
    (once,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative\. Use backend='reference', or HYBRIDZOO_BACKEND=reference"):
        once.sum().backward()
    # nor is there a part of it, by another way to x
    (once,) = torch.autograd.grad(h.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.autograd.grad((once + x.square()).sum(), x)


@pytest.mark.parametrize("type_added", [F32, BF16], ids=str)
def test_all_gradients_meet_where_something_is_added_first(type_added):
    x, weight, gh, past = operands((3, 4, 24), F32, BF16)
    add = torch.randn(3, 4, 24).to(type_added)
    leaves = x.requires_grad_(), weight.requires_grad_(), add.requires_grad_()
    h, total = branch_rms_norm(x, weight, EPS, BF16, add)
    assert torch.equal(total, x + add) and total.dtype == F32 and h.grad_fn is total.grad_fn
    gx, gweight, gadd = torch.autograd.grad((h, total), leaves, (gh, past), retain_graph=True)
    _, want, gains = exact(total.detach(), weight.detach(), gh, past)
    for a, b in ((gx, want), (gweight, gains)):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
    assert gadd.dtype == type_added and torch.equal(gadd, gx.to(type_added))
    # one of the two alone
    alone = torch.autograd.grad(total, (x, add), past, retain_graph=True)
    assert torch.equal(alone[0], past) and torch.equal(alone[1], past.to(type_added))
    gx, gadd = torch.autograd.grad(h, (x, add), gh)
    want = exact(total.detach(), weight.detach(), gh, None)[1]
    torch.testing.assert_close(gx.double(), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(gadd, gx.to(type_added))
    # one of the two wanted
    for wanted in (x, add):
        values = (wanted if m is wanted else m.detach() for m in (x, add))
        h, total = branch_rms_norm(next(values), weight, EPS, BF16, next(values))
        (g,) = torch.autograd.grad((h, total), wanted, (gh, past))
        want = exact(total.detach(), weight.detach(), gh, past)[1]
        torch.testing.assert_close(g.double(), want, atol=1e-5, rtol=0.01 if g.dtype == BF16 else 1e-5)


def test_a_sum_of_what_needs_no_gradient_needs_none():
    x, weight, gh, _ = operands((3, 24))
    h, total = branch_rms_norm(x, weight.requires_grad_(), EPS, F32, x)
    assert h.requires_grad and not total.requires_grad and torch.equal(total, 2 * x)
    (gweight,) = torch.autograd.grad(h, weight, gh)
    torch.testing.assert_close(gweight.double(), exact(2 * x, weight.detach(), gh, None)[2], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(branch_rms_norm(x, weight, EPS, F32, x)[1], 2 * x)


def test_what_needs_no_gradient_gets_none():
    x, weight, gh, past = operands((3, 24))
    h, same = branch_rms_norm(x, weight.requires_grad_(), EPS, F32)
    assert same is x and h.requires_grad
    (gweight,) = torch.autograd.grad(h, weight, gh)
    torch.testing.assert_close(gweight.double(), exact(x, weight.detach(), gh, None)[2], atol=1e-5, rtol=1e-5)
    h, same = branch_rms_norm(x.requires_grad_(), weight.detach(), EPS, F32)
    (gx,) = torch.autograd.grad((h, same), x, (gh, past))
    torch.testing.assert_close(gx.double(), exact(x.detach(), weight.detach(), gh, past)[1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert branch_rms_norm(x, weight, EPS, F32)[1] is x


def test_only_the_input_and_the_weight_are_kept():
    x, weight, _, _ = operands((3, 24))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda m: kept.append(m) or m, lambda m: m):
        branch_rms_norm(x.requires_grad_(), weight.requires_grad_(), EPS, BF16)
        _, total = branch_rms_norm(x, weight, EPS, BF16, x.detach().bfloat16().requires_grad_())
    assert [m.data_ptr() for m in kept] == [m.data_ptr() for m in (x, weight, total, weight)]


def test_ops_are_registered_as_torch_wants_them():
    x, weight, gh, _ = operands((2, 5, 24), F32, BF16)
    x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(torch.ops.hybridzoo.norm_cuda, (x, weight, None, EPS, BF16, False))
    torch.library.opcheck(torch.ops.hybridzoo.norm_cuda, (x, None, None, EPS, F32, False))
    h = torch.ops.hybridzoo.norm_cuda(x, weight, None, EPS, BF16, False)
    got = torch.autograd.grad(h, (x, weight), gh)
    for a, b in zip(got, exact(x.detach(), weight.detach(), gh, None)[1:], strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_compiles_without_graph_breaks():
    x, weight, gh, past = operands((2, 5, 24), F32, BF16)
    leaves = x.requires_grad_(), weight.requires_grad_()

    def both(x):
        h, same = branch_rms_norm(x, weight, EPS, BF16)
        h, same = branch_rms_norm(same, weight, EPS, BF16, h)
        return (h * gh).sum() + (same * past).sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(x), leaves) for f in (both, compiled)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_is_what_it_is_on_torchs_operations(autocast, checkpointed, monkeypatch):
    mixers = {"mamba": {"d_state": 4}, "mlp": {"d_intermediate": 24}, "moe": {"d_intermediate": 24, "num_experts": 4}}
    model = zoo.build({"vocab_size": 64, "d_model": 16, "layers": "mlp mamba moe", "mixers": mixers}).train()
    model.gradient_checkpointing_enable(checkpointed)
    ids = torch.randint(0, 64, (2, 9))

    def run():
        model.zero_grad()
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    want, launched = run(), []
    monkeypatch.setitem(dispatch.TABLES["rms_norm"], "cuda", dispatch.Backend("cuda", "emulated", run=branch_rms_norm))
    for name in ("forward", "backward"):
        real = getattr(cuda_norm, name)
        monkeypatch.setattr(cuda_norm, name, lambda *a, name=name, real=real: launched.append(name) or real(*a))
    got = run()
    # that in front of the Mamba layer is formed again, or all but the last where activations are checkpointed
    assert launched.count("backward") == 4 and launched.count("forward") == (7 if checkpointed else 5)
    for a, b in zip(got, want, strict=True):
        error = (a - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= (0.03 if autocast else 1e-5), error.item()


@pytest.mark.parametrize(
    ("d", "backward", "lanes", "vectors", "blocks"),
    [
        (1, False, 8, 1, 396),
        (64, False, 8, 2, 396),
        (768, False, 32, 6, 396),
        (768, True, 32, 6, 264),
        (1024, True, 64, 4, 264),
        (2560, True, 128, 5, 264),
        (5120, True, 256, 5, 264),
        (8192, False, 512, 4, 264),
        (8192, True, 512, 4, 132),
    ],
)
def test_how_rows_are_cut(d, backward, lanes, vectors, blocks):
    cut = plan((F32, None, BF16, F32), 1 << 15, d, (d, d, d, d), 0, EPS, 132, backward)
    assert cut.arguments.startswith(f"<float, float, bf16, float, {lanes}, {vectors}, {0 if d % 4 == 0 else 4}, ")
    added = plan((F32, BF16, BF16, F32), 1 << 15, d, (d, d, d, d), 0, EPS, 132, backward)
    assert added.arguments.startswith(f"<float, bf16, bf16, float, {lanes}, {vectors}, {8 if d % 4 == 0 else 12}, ")
    # reading and adding elements one by one takes more registers
    assert cut.blocks == blocks and added.blocks == (blocks if d % 4 == 0 else 264) and lanes * vectors * 4 >= d

"""The cross-entropy on a GPU: the kernel against float64, and the next-token loss of a model through it."""

import copy

import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
import hybridzoo.zoo.models.loss as loss_module
from hybridzoo.kernels import cross_entropy, dispatch
from hybridzoo.kernels.loss import cuda as cuda_loss
from hybridzoo.zoo.models.loss import IGNORE, next_token_loss

pytestmark = pytest.mark.gpu

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# half a unit in the last place, and what float32 makes of exponents of some tens
ROUNDING = {F32: 4e-6, BF16: 2**-8 + 4e-6, F16: 2**-11 + 4e-6}
TINY = {F32: 4e-7, BF16: 4e-7, F16: 4.4e-7}


def drawn(m, v, dtype, spread=3.0):
    targets = torch.randint(v, (m,), device="cuda")
    targets[::3] = IGNORE
    return (spread * torch.randn(m, v, device="cuda")).to(dtype), targets


def exact(logits, targets, scale=1.0):
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(x, targets, ignore_index=IGNORE, reduction="none")
    return losses.detach(), scale * torch.autograd.grad(losses.sum(), x)[0]


def check(logits, targets, scale=1.0):
    options = {"backend": "cuda", "scale": scale, "want_gradient": True}
    # what is left in the allocator's memory must not show
    del_me = torch.full((1 << 26,), float("nan"), device="cuda")
    del del_me
    (losses, gradient), again = (cross_entropy(logits, targets, **options) for _ in range(2))
    assert torch.equal(losses, again[0]) and torch.equal(gradient, again[1])
    assert losses.dtype == F32 and gradient.dtype == logits.dtype and gradient.is_contiguous()
    want, gwant = exact(logits, targets, scale)
    torch.testing.assert_close(losses.double(), want, atol=4e-6, rtol=4e-6)
    torch.testing.assert_close(gradient.double(), gwant, atol=TINY[logits.dtype], rtol=ROUNDING[logits.dtype])
    alone, nothing = cross_entropy(logits, targets, backend="cuda")
    assert nothing is None
    torch.testing.assert_close(alone, losses, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("v", [1, 2, 7, 9, 256, 520, 1000, 1003, 4096, 32000, 50280, 50281, 50288, 128256, 151937])
def test_losses_and_gradients(v, dtype):
    check(*drawn(67, v, dtype))
    check(*drawn(5, v, dtype), scale=0.25)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_many_rows(dtype):
    check(*drawn(20011, 257, dtype))
    check(*drawn(2049, 8195, dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_huge_logits_and_masked_words(dtype):
    logits, targets = drawn(40, 5003, dtype, spread=2e3)
    logits = logits.clamp(-1e4, 1e4)
    check(logits, targets)
    logits[:, 2000:] = -torch.inf
    check(logits, targets.where(targets == IGNORE, targets % 2000))
    losses, gradient = cross_entropy(logits, torch.full_like(targets, 4000), want_gradient=True, backend="cuda")
    assert losses.isposinf().all() and gradient.isfinite().all() and (gradient[:, 4000] == -1).all()


def test_nan_and_targets_that_are_no_words_show_in_their_rows_only():
    logits, targets = torch.randn(7, 50281, device="cuda"), torch.arange(7, device="cuda")
    logits[1, 50280], logits[2, 77], logits[3, 9] = torch.nan, torch.inf, torch.nan
    targets[3], targets[4], targets[5] = IGNORE, 50281, -1
    losses, gradient = cross_entropy(logits, targets, want_gradient=True, backend="cuda")
    assert losses.isnan().tolist() == [False, True, True, False, True, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, True, False, True, True, False]
    assert gradient[[0, 3, 6]].isfinite().all() and losses[3] == 0 and not gradient[3].any()


def test_logits_of_any_layout():
    whole, targets = torch.randn(60, 6001, device="cuda").bfloat16(), torch.randint(5000, (60,), device="cuda")
    for logits in (
        whole[:, 3:5004],
        whole.t().contiguous().t()[:, :5000],
        whole[::2],
        whole.flatten()[1:300001].view(60, 5000),
    ):
        check(logits, targets[: len(logits)])


def test_more_than_two_to_the_31_logits():
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    m, v = 43000, 50288
    logits, targets = torch.zeros(m, v, dtype=BF16, device="cuda"), torch.full((m,), IGNORE, device="cuda")
    assert logits.numel() > 2**31
    logits[-40:], targets[-40:] = drawn(40, v, BF16)
    losses, gradient = cross_entropy(logits, targets, want_gradient=True, backend="cuda")
    want = cross_entropy(logits[-40:].clone(), targets[-40:], want_gradient=True, backend="cuda")
    assert torch.equal(losses[-40:], want[0]) and torch.equal(gradient[-40:], want[1])
    assert not losses[:-40].any() and not any(part.any() for part in gradient[:-40].split(4096))


def test_graph_capture_and_other_streams():
    logits, targets = drawn(100, 50281, BF16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = cuda_loss.forward(logits, targets, IGNORE, True, 1.0)[1].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cuda_loss.forward(logits, targets, IGNORE, True, 1.0)[1]
        out.zero_()
        graph.replay()
    side.synchronize()
    assert torch.equal(out, want)


@pytest.mark.parametrize("want_gradient", [False, True])
def test_the_op_is_registered_as_torch_wants_it(want_gradient):
    logits, targets = drawn(9, 1003, F32)
    torch.library.opcheck(
        torch.ops.hybridzoo.cross_entropy_cuda, (logits.requires_grad_(), targets, IGNORE, want_gradient, 1.0)
    )


def plain(hidden, head, targets):
    return F.cross_entropy(head(hidden).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)


def gradients(loss, inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def errors(got, want):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("tokens", [128, 256, 4096])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("v", [8192, 5001])
def test_the_next_token_loss_errs_no_more_than_twice_as_much(monkeypatch, v, autocast, dtype, tokens):
    monkeypatch.setattr(loss_module, "_SLICE_BYTES", tokens * v * 2)
    kind = F32 if autocast else dtype
    head = torch.nn.Linear(256, v, device="cuda", dtype=kind)
    hidden = torch.randn(4, 250, 256, device="cuda", dtype=kind).requires_grad_()
    targets = torch.randint(v, (4, 250), device="cuda")
    targets[0, :7] = IGNORE
    wide, wide_head = hidden.detach().double().requires_grad_(), copy.deepcopy(head).double()
    logits = wide_head(wide).flatten(0, 1)
    want = gradients(F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE), [wide, *wide_head.parameters()])
    inputs, seen = [hidden, *head.parameters()], []
    head.register_forward_hook(lambda m, args, out: seen.append((out.dtype, len(out))))
    with torch.autocast("cuda", dtype, enabled=autocast):
        loss, again = (next_token_loss(hidden, head, targets) for _ in range(2))
        assert sum(n for _, n in seen) == 2000 and {kind for kind, _ in seen} == {dtype}
        usual = plain(hidden, head, targets)
    got, same = gradients(loss, inputs), gradients(again, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))
    for mine, theirs in zip(errors(got, want), errors(gradients(usual, inputs), want), strict=True):
        assert mine <= 2 * theirs + 1e-6


def test_memory_is_a_slice_of_logits_and_the_gradients():
    v, d, l = 50280, 768, 16384
    head = torch.nn.Linear(d, v, bias=False, device="cuda")
    hidden = torch.randn(1, l, d, device="cuda", requires_grad=True)
    targets = torch.randint(v, (1, l), device="cuda")

    def peak():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", BF16):
            loss = next_token_loss(hidden, head, targets)
        loss.backward()
        hidden.grad = head.weight.grad = None
        return torch.cuda.max_memory_allocated() - before

    peak()
    # logits and their gradient, the head's gradient and its 16-bit copy, the hidden gradient
    assert peak() <= 2 * loss_module._SLICE_BYTES + 4 * v * d + 2 * v * d + 4 * l * d + (64 << 20)


@pytest.mark.parametrize("tokens", [4096, 128])
def test_a_compiled_model_has_the_loss_and_the_gradients_of_eager(monkeypatch, tokens):
    model = zoo.build("mamba-tiny", device="cuda")
    assert dispatch.choose("cross_entropy", device="cuda").name == "cuda"
    monkeypatch.setattr(loss_module, "_SLICE_BYTES", tokens * 256 * 4)
    ids = torch.randint(256, (3, 65), device="cuda")
    parameters = list(model.parameters())
    want = gradients(model(ids, labels=ids).loss, parameters)
    torch.compiler.reset()
    got = gradients(torch.compile(model, fullgraph=True)(ids, labels=ids).loss, parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)

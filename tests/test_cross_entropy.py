"""The cross-entropy of logits against float64: PyTorch operations, and the CUDA kernel run on the CPU thread by thread (tests/emulator)."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hybridzoo.kernels import cross_entropy, dispatch
from hybridzoo.kernels.loss import cuda as cuda_loss
from hybridzoo.kernels.loss import op as loss

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
IGNORE = -100
# half a unit in the last place, and what float32 makes of exponents of some tens
ROUNDING = {F64: 1e-12, F32: 2e-6, BF16: 2**-8 + 2e-6, F16: 2**-11 + 2e-6}
BACKENDS = [
    "torch",
    pytest.param("cuda", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")),
]


@pytest.fixture(params=BACKENDS)
def run(request, emulated):
    """The op by one backend; the kernel is called past the dispatch, which would ask for a GPU."""
    if request.param == "cuda":
        return cuda_loss.cross_entropy

    def by_torch(logits, targets, ignore_index, want_gradient, scale):
        options = {"ignore_index": ignore_index, "want_gradient": want_gradient, "scale": scale}
        return cross_entropy(logits, targets, backend="torch", **options)

    return by_torch


def poisoned():
    # what the allocator hands out next, in the sizes of these tests
    for size in (1 << n for n in range(2, 20)):
        torch.full((size,), float("nan"))


def exact(logits, targets, scale=1.0):
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(x, targets, ignore_index=IGNORE, reduction="none")
    return losses.detach(), scale * torch.autograd.grad(losses.sum(), x)[0]


def compare(run, logits, targets, scale=1.0):
    poisoned()
    losses, gradient = run(logits, targets, IGNORE, True, scale)
    want, gwant = exact(logits, targets, scale)
    acc = torch.promote_types(logits.dtype, F32)
    assert losses.dtype == acc and gradient.dtype == logits.dtype and gradient.shape == logits.shape
    small = 1e-12 if acc == F64 else 2e-6
    torch.testing.assert_close(losses.double(), want, atol=small, rtol=small)
    # at a target, 1 is taken away from a probability near 1; float16 ends at 6e-8
    torch.testing.assert_close(
        gradient.double(),
        gwant,
        atol=scale * small / 10 + (4e-8 if logits.dtype == F16 else 0),
        rtol=ROUNDING[logits.dtype],
    )
    alone, nothing = run(logits, targets, IGNORE, False, 1.0)
    assert nothing is None
    torch.testing.assert_close(alone.double(), want, atol=small, rtol=small)


def drawn(m, v, dtype, spread=3.0):
    targets = torch.randint(v, (m,))
    targets[::3] = IGNORE
    return (spread * torch.randn(m, v)).to(dtype), targets


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("v", [1, 2, 7, 9, 256, 520, 1000, 1003])
def test_losses_and_gradients(run, v, dtype):
    # rows of v odd start at every offset from a border of 16 bytes
    compare(run, *drawn(19, v, dtype))
    compare(run, *drawn(2, v, dtype), scale=0.25)


@pytest.mark.parametrize(("v", "dtype"), [(50288, BF16), (50281, F32), (8200, F16)], ids=str)
def test_long_rows(run, v, dtype):
    logits, targets = drawn(3, v, dtype)
    targets[1:] = torch.tensor([v - 1, 0])
    compare(run, logits, targets)


def test_what_does_not_fit_shared_memory_is_read_again(emulated, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setattr(cuda_loss, "shared_memory", lambda device: 20 << 10)
    name, threads, shared = cuda_loss.plan(9001, BF16, True, 20 << 10)
    assert (name, threads, shared) == ("cross_entropy<bf16, 512, 1, true>", 512, 8192)
    compare(cuda_loss.cross_entropy, *drawn(4, 9001, BF16))


def test_a_row_among_many_that_are_under_way(run):
    # a batch of rows in groups: the last one is shorter
    compare(run, *drawn(1100 if run is not cuda_loss.cross_entropy else 70, 1000, F32))


class Widest(TorchDispatchMode):
    """The elements of the largest float32 tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == F32:
            self.elements = max(self.elements, out.untyped_storage().nbytes() // 4)
        return out


def test_half_precision_is_widened_a_group_of_rows_at_a_time(monkeypatch):
    monkeypatch.setitem(loss._GROUP, "cpu", 700)
    logits, targets = drawn(50, 100, BF16)
    with Widest() as widest:
        cross_entropy(logits, targets, want_gradient=True, backend="torch")
    assert widest.elements == 700


def test_float64_is_for_torch():
    logits, targets = drawn(9, 33, F64)
    losses, gradient = cross_entropy(logits, targets, want_gradient=True)
    want, gwant = exact(logits, targets)
    torch.testing.assert_close(losses, want, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(gradient, gwant, atol=1e-15, rtol=1e-13)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_huge_logits(run, dtype):
    logits, targets = drawn(12, 333, dtype, spread=2e3)
    logits = logits.clamp(-1e4, 1e4)
    logits[5] = logits[5].abs() + 5e3
    logits[6] = -logits[6].abs() - 5e3
    compare(run, logits, targets)
    compare(run, torch.full((4, 40), -1e4).to(dtype), torch.arange(4))


def test_the_largest_numbers_there_are(run):
    top = torch.finfo(F32).max
    logits = torch.full((3, 30), -top)
    logits[1, 3] = 0.0
    logits[2, :2] = top
    losses, gradient = run(logits, torch.tensor([1, 3, 0]), IGNORE, True, 1.0)
    torch.testing.assert_close(losses, torch.tensor([30.0, 1.0, 2.0]).log())
    torch.testing.assert_close(gradient[0], 1 / 30 - F.one_hot(torch.tensor(1), 30))
    assert gradient[1].abs().sum() == 0 and gradient[2, :3].tolist() == [-0.5, 0.5, 0]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("v", [60, 203])
def test_masked_words(run, v, dtype):
    logits, targets = drawn(20, v, dtype)
    logits[:, v // 2 :] = -torch.inf  # whole vectors, whole threads
    logits[:, 0] = -torch.inf
    targets = targets.clamp(max=v // 2 - 1).where(targets != 0, 1)
    compare(run, logits, targets)
    # a target that cannot come costs infinitely much, and its gradient is finite; a row without words means nothing
    losses, gradient = run(logits, torch.zeros(20, dtype=torch.int64), IGNORE, True, 1.0)
    assert losses.isposinf().all() and gradient.isfinite().all() and (gradient[:, 0] == -1).all()
    losses, gradient = run(torch.full((2, v), -torch.inf, dtype=dtype), torch.tensor([0, IGNORE]), IGNORE, True, 1.0)
    assert losses[0].isnan() and gradient[0].isnan().all() and losses[1] == 0 and not gradient[1].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("v", [9, 300])
def test_what_is_not_finite_shows_in_its_row_only(run, v, bad):
    for at in (0, v // 2, v - 1):
        logits, targets = torch.randn(5, v), torch.tensor([1, 2, 3, IGNORE, 4])
        logits[2, at], logits[3, at] = bad, bad
        losses, gradient = run(logits, targets, IGNORE, True, 1.0)
        want, gwant = exact(logits, targets)
        assert losses[2].isnan() and gradient[2].isnan().all() and want[2].isnan()
        assert losses[3] == 0 and not gradient[3].any()
        for i in (0, 1, 4):
            torch.testing.assert_close(gradient[i].double(), gwant[i], atol=2e-7, rtol=2e-6)
        assert run(logits, targets, IGNORE, False, 1.0)[0][2].isnan()


@pytest.mark.parametrize("target", [10, 1 << 40, -1, -(1 << 40)])
def test_targets_that_are_no_words(run, target):
    logits, targets = torch.randn(3, 10), torch.tensor([1, target, 2])
    if run is not cuda_loss.cross_entropy:
        for gradient in (True, False):
            with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
                run(logits, targets, IGNORE, gradient, 1.0)
        return
    losses, gradient = run(logits, targets, IGNORE, True, 1.0)
    assert losses.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


def test_a_second_derivative_is_right_or_an_error(run):
    logits, targets = torch.randn(3, 10).requires_grad_(), torch.tensor([1, 5, 2])
    (once,) = torch.autograd.grad(run(logits, targets, IGNORE, False, 1.0)[0].sum(), logits, create_graph=True)
    if run is cuda_loss.cross_entropy:
        with pytest.raises(NotImplementedError, match=r"cross_entropy: .* no derivative\. Use backend='reference'"):
            once.square().sum().backward()
        return
    want = 2 * (torch.eye(10) - logits.softmax(1)[:, None]) * logits.softmax(1)[..., None] @ once[..., None]
    torch.testing.assert_close(torch.autograd.grad(once.square().sum(), logits)[0], want[..., 0])


def test_another_target_is_ignored_when_asked(run):
    logits, targets = torch.randn(4, 10), torch.tensor([1, 3, 3, 2])
    losses, gradient = run(logits, targets, 3, True, 1.0)
    want = F.cross_entropy(logits, targets, ignore_index=3, reduction="none")
    torch.testing.assert_close(losses, want)
    assert not gradient[1:3].any() and gradient[::3].abs().sum(1).gt(0).all()


def test_logits_of_any_layout(run):
    whole, targets = torch.randn(6, 60), torch.randint(40, (6,))
    for logits in (whole[:, 3:43], whole.t().contiguous().t()[:, :40], whole.flatten()[5:245].view(6, 40), whole[::2]):
        compare(run, logits, targets[: len(logits)])


def test_no_rows(run):
    losses, gradient = run(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), IGNORE, True, 1.0)
    assert losses.shape == (0,) and gradient.shape == (0, 5)


@pytest.mark.parametrize("want_gradient", [False, True])
def test_the_op_is_registered_as_torch_wants_it(emulated, want_gradient):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    logits, targets = drawn(5, 19, F32)
    torch.library.opcheck(
        torch.ops.hybridzoo.cross_entropy_cuda, (logits.requires_grad_(), targets, IGNORE, want_gradient, 1.0)
    )


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_losses_are_differentiable(run, dtype):
    logits, targets = drawn(9, 40, dtype)
    weights = torch.randn(9)
    losses, _ = run(logits.requires_grad_(), targets, IGNORE, False, 1.0)
    got = torch.autograd.grad((losses * weights).sum(), logits)[0]
    assert got.dtype == dtype
    want = exact(logits.detach(), targets)[1] * weights[:, None]
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=2 * ROUNDING[dtype])


def test_arguments_that_do_not_fit():
    logits, targets = torch.randn(4, 10), torch.zeros(4, dtype=torch.int64)
    for wrong, message in (
        ((logits[0], targets), "logits has 1 dimensions, expected 2"),
        ((logits.long(), targets), "logits has dtype torch.int64"),
        ((logits, targets[:3]), r"targets has shape \(3,\), expected \(4,\)"),
        ((logits, targets.int()), "targets has dtype torch.int32, expected int64"),
        ((logits[:, :0], targets), "no word to choose"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_entropy(*wrong)
    with pytest.raises(dispatch.BackendError, match="the CUDA kernels need CUDA tensors, got cpu"):
        cross_entropy(logits, targets, backend="cuda")


@pytest.mark.parametrize(
    ("v", "dtype", "room", "want"),
    [
        # a row of this vocabulary twice in the 228 KiB of an H100; half of it in those of smaller GPUs
        (50288, BF16, 228 << 10, ("<bf16, 512, 13, true>", 512, 13 * 8192)),
        (50288, BF16, 164 << 10, ("<bf16, 512, 10, true>", 512, 10 * 8192)),
        (50288, BF16, 100 << 10, ("<bf16, 512, 6, true>", 512, 6 * 8192)),
        (128256, BF16, 228 << 10, ("<bf16, 512, 14, true>", 512, 14 * 8192)),
        (4096, BF16, 228 << 10, ("<bf16, 128, 4, true>", 128, 4 * 2048)),
        (256, F32, 228 << 10, ("<float, 32, 2, true>", 32, 1024)),
        (1, F16, 228 << 10, ("<fp16, 32, 1, true>", 32, 512)),
    ],
)
def test_how_a_row_is_cut(v, dtype, room, want):
    name, threads, shared = cuda_loss.plan(v, dtype, True, room)
    assert (name.removeprefix("cross_entropy"), threads, shared) == want
    blocks = room // (shared + 1024 + threads // 4)
    assert blocks >= 2
    # the name says all that shared memory depends on, which a kernel is given once
    assert shared == 16 * threads * int(name.split(", ")[2])
    assert cuda_loss.plan(v, dtype, False, room)[2] == 0

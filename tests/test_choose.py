"""The choice of a token: in PyTorch operations, and by the CUDA kernel, run on the CPU thread by thread (tests/emulator)."""

import shutil

import pytest
import torch

from hybridzoo.kernels.step import choose
from hybridzoo.kernels.step.choose import Slots, choose_token

emulates = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def slots(b, m=5, logprobs=True, ends=(7, 2), limit=3):
    long = {"dtype": torch.long}
    return Slots(
        torch.full((b, m), -1), torch.full((b, m), 9.0) if logprobs else None, torch.zeros(b, **long), torch.zeros(b, **long),
        torch.full((b,), limit), torch.zeros(b, dtype=torch.bool), torch.zeros(b, dtype=torch.bool), torch.zeros(b, **long),
        torch.tensor(ends, **long),
    )  # fmt: skip


def test_a_row_ends_at_a_token_or_its_limit_and_is_padded():
    rows = slots(3)
    choices = [[4, 7, 1], [4, 5, 2], [4, 7, 5], [4, 4, 4]]
    for step in choices:
        choose_token(torch.nn.functional.one_hot(torch.tensor(step), 9).float(), rows, 8)
    assert rows.tokens[:, :4].tolist() == [[4, 4, 4, 8], [7, 8, 8, 8], [1, 2, 8, 8]]
    assert rows.counts.tolist() == [3, 1, 2] and rows.finished.all() and not rows.broken.any()
    assert rows.column.tolist() == [4] * 3 and rows.token.tolist() == [8] * 3
    likely = torch.nn.functional.one_hot(torch.tensor(4), 9).float().log_softmax(-1)[4]
    torch.testing.assert_close(rows.logprobs[0, :4], torch.stack([likely] * 3 + [torch.tensor(0.0)]))
    assert rows.logprobs[1, 1:4].tolist() == [0, 0, 0] and rows.tokens[:, 4].tolist() == [-1] * 3


def test_what_is_no_number_is_told_of_rows_that_go_on():
    rows = slots(5, logprobs=False)
    rows.finished[4] = True
    logits = torch.zeros(5, 6)
    logits[0, 3], logits[1], logits[2, 1], logits[4, 2] = torch.nan, -torch.inf, torch.inf, torch.nan
    logits[3, :5] = -torch.inf
    choose_token(logits, rows, 0)
    assert rows.broken.tolist() == [True, True, True, False, False] and rows.token[3] == 5


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="choose_token: given"):
        choose_token(torch.zeros(2, 5), slots(2), 0, torch.zeros(3, dtype=torch.long))


@emulates
@pytest.mark.parametrize("v", [3, 257, 4100, 4101, 20_000])
@pytest.mark.parametrize("given", [False, True])
def test_the_kernel_does_what_operations_do(emulated, v, given):
    torch.manual_seed(v)
    b, ways = 4, [slots(4, logprobs=not given or v == 3, ends=(1,) if v > 3 else ()) for _ in range(2)]
    for step in range(3):
        logits = 3 * torch.randn(b, -(-v // 4) * 4 if step else v)[:, :v]
        logits[0, v // 2 :] = logits[0].max()  # equal ones: the first
        if step == 1:
            logits[1, v // 3], logits[2, -1], logits[3] = torch.nan, torch.inf, -torch.inf
        if v == 3:
            logits[0, 1] = -torch.inf
        chosen = torch.randint(0, v, (b,)) if given else None
        for run, rows in zip((choose._plain, choose._cuda), ways, strict=True):
            run(logits, rows, 2, chosen)
        for name, x, y in zip(Slots._fields, *ways, strict=True):
            sound = ~ways[0].broken
            if name in ("tokens", "token", "finished", "counts") and not given:
                x, y = x[sound], y[sound]
            if name == "logprobs" and x is not None:
                torch.testing.assert_close(x[sound], y[sound], atol=2e-6, rtol=2e-6)
            else:
                assert x is y is None or torch.equal(x, y), (name, x, y)
    assert ways[0].broken.tolist() == [False, True, True, True]

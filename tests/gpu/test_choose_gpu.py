"""The kernel that chooses tokens gives those of PyTorch's operations, at the vocabularies of real models."""

import pytest
import torch

from hybridzoo.kernels.step.choose import Slots, choose_token

pytestmark = pytest.mark.gpu


def slots(b, m=4):
    long, flags = {"dtype": torch.long, "device": "cuda"}, {"dtype": torch.bool, "device": "cuda"}
    return Slots(
        torch.zeros(b, m, **long), torch.zeros(b, m, device="cuda"), torch.zeros(b, **long), torch.zeros(b, **long),
        torch.full((b,), 100, **long), torch.zeros(b, **flags), torch.zeros(b, **flags), torch.zeros(b, **long), torch.tensor([5], **long),
    )  # fmt: skip


@pytest.mark.parametrize(("b", "v"), [(1, 50280), (3, 50277), (64, 50280), (8, 256_000), (5, 7)])
@pytest.mark.parametrize("given", [False, True])
def test_tokens_and_how_likely_they_were(b, v, given):
    torch.manual_seed(v)
    ours, theirs = slots(b), slots(b)
    for step in range(4):
        logits = 4 * torch.randn(b, v + step % 2 * (-v % 4), device="cuda")[:, :v]
        logits[0, 5] += 40 if step == 2 else 0
        if step == 3 and b > 1:
            logits[-1, v // 2] = torch.nan
        chosen = torch.randint(0, v, (b,), device="cuda") if given else None
        for rows, backend in ((ours, "cuda"), (theirs, "torch")):
            choose_token(logits, rows, 3, chosen, backend=backend)
    for name, x, y in zip(Slots._fields, ours, theirs, strict=True):
        sound = ~theirs.broken if len(x) == b else slice(None)
        if name == "logprobs":
            torch.testing.assert_close(x[sound], y[sound], atol=3e-6, rtol=3e-6)
        else:
            assert torch.equal(x, y) if name == "broken" else torch.equal(x[sound], y[sound]), name
    assert bool(theirs.broken.any()) == (b > 1)

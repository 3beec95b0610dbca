"""What image models keep for their backward, and that forming the rest again changes no bit of a gradient."""

import copy

import pytest
import torch
from test_mamba_memory import Storages

import hybridzoo as zoo
from hybridzoo.layers import recompute

OVERRIDES = ["d_model=64", "in_channels=3", "stem={type: conv, patch: 4}", "mixers.mlp.expand=4"]


def kept_and_gradients(model, autocast):
    x, labels = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10
    with Storages(*model.parameters(), x) as storages, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x, labels).loss
        kept = storages.alive()
    loss.backward()
    return kept, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("autocast", "share"), [(False, 0.75), (True, 0.75)])
def test_less_is_kept_and_no_bit_changes(autocast, share, gate, monkeypatch):
    torch.manual_seed(0)
    model = zoo.build("vmamba-micro", [*OVERRIDES, f"mixers.ss2d.gate={gate}"])
    twin = copy.deepcopy(model)
    kept, gradients = kept_and_gradients(model, autocast)
    with monkeypatch.context() as patched:
        patched.setattr(recompute, "left_alone", lambda: True)
        everything, wanted = kept_and_gradients(twin, autocast)
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
    assert kept < (share + 0.1 * gate) * everything

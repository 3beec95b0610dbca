"""A step recorded as a CUDA graph gives the bits of the step as it is called."""

import pytest
import torch

import hybridzoo as zoo

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
MODELS = {
    "mamba-tiny": [],
    "mamba2-tiny": [],
    "jamba-tiny": ["d_model=128"],
    "samba-tiny": [],
    "zamba2-tiny": [],
}


def made(name):
    torch.manual_seed(0)
    return zoo.build(name, MODELS[name], device="cuda").train()


def batches(model, count, shape=(3, 70)):
    torch.manual_seed(1)
    return [torch.randint(0, model.cfg.vocab_size, shape, device="cuda") for _ in range(count)]


def plain(model, ids, labels=None):
    with torch.autocast("cuda", BF16):
        loss = model(ids, labels=ids if labels is None else labels).loss
    loss.backward()
    return loss.detach()


def trained(model, step, ids):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in ids:
        losses.append(step(batch))
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_to_the_bit(name):
    model, twin = made(name), made(name)
    ids = batches(model, 4)
    captured = zoo.CapturedStep(model, torch.zeros_like(ids[0]), autocast=BF16)
    got, want = trained(model, captured, ids), trained(twin, lambda batch: plain(twin, batch), ids)
    assert len({x.item() for x in got[:4]}) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_are_added_to_what_is_there():
    model, twin = made("mamba-tiny"), made("mamba-tiny")
    first, second, labels = batches(model, 3)
    captured = zoo.CapturedStep(model, first, autocast=BF16)
    assert all(p.grad is None for p in model.parameters())
    captured(first)
    captured(second, labels)
    plain(twin, first)
    plain(twin, second, labels)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-7)
    # and to gradients that are not the graph's
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    captured(first)
    twin.zero_grad()
    plain(twin, first)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad + 1)


def test_float32_and_frozen_weights():
    model, twin = made("mamba-tiny"), made("mamba-tiny")
    for m in (model, twin):
        m.backbone.layers[0].requires_grad_(False)
    (ids,) = batches(model, 1)
    loss = zoo.CapturedStep(model, ids)(ids)
    want = twin(ids, labels=ids).loss
    want.backward()
    assert torch.equal(loss, want.detach())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is None if q.grad is None else torch.equal(p.grad, q.grad)


def test_what_cannot_be_is_said():
    model = made("mamba-tiny")
    first, other = batches(model, 1) + batches(model, 1, (2, 70))
    captured = zoo.CapturedStep(model, first, autocast=BF16)
    with pytest.raises(ValueError, match=r"input_ids: shape \(2, 70\), but the step was recorded with \(3, 70\)"):
        captured(other)
    with pytest.raises(ValueError, match=r"labels: shape \(2, 70\)"):
        captured(first, other)
    with pytest.raises(ValueError, match=r"experts in float32 .* Use autocast=torch.bfloat16"):
        zoo.CapturedStep(made("jamba-tiny"), first)

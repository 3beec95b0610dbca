"""A step recorded as a CUDA graph gives the bits of the step as it is called."""

import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
from hybridzoo.kernels import Seq
from hybridzoo.zoo.train.captured_step import why_not_captured

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
MODELS = {
    "mamba-tiny": [],
    "mamba2-tiny": [],
    "transformer-tiny": [],
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


MOST = 5
# documents of no more tokens than one block of the attention's backward, whose sums over blocks come in any order
LENGTHS = [[[40, 20, 10], [30, 30], [70]], [[1, 1, 1, 67], [69], [10, 50, 9]], [[70], [35, 35], [20, 20, 20, 10]]]


def packed(batch):
    """Documents of the rows; what no length covers is padding."""
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS[batch % len(LENGTHS)]]
    return torch.stack([F.pad(row, (0, 70 - len(row)), value=-1) for row in rows])


def plain_packed(model, ids, documents, num_items):
    # on the device, as a recorded step has it: by a number of the host's a GPU multiplies with its inverse
    items = torch.tensor(num_items, device="cuda")
    with torch.autocast("cuda", BF16):
        out = model(ids, labels=ids, seq=Seq.from_documents(documents.cuda(), most=MOST), num_items=items)
    out.loss.backward()
    return out


def captured_packed(model, ids):
    return zoo.CapturedStep(
        model, torch.zeros_like(ids), documents=torch.zeros_like(ids), most=MOST, num_items=True, autocast=BF16
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_are_the_same_to_the_bit(name, checkpointing):
    model, twin = made(name), made(name)
    for m in (model, twin):
        m.gradient_checkpointing_enable(checkpointing)
    captured = captured_packed(model, batches(model, 1)[0])
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    losses = []
    for step, pair in enumerate(zip(batches(model, 3), batches(model, 6)[3:], strict=True)):
        # two parts of one batch: the second adds to the first
        for part, ids in enumerate(pair):
            documents, items = packed(step + part), 400 + step
            given = documents.cuda() if part else documents
            loss = captured(ids, documents=given, num_items=torch.tensor(items, device="cuda") if part else items)
            out = plain_packed(twin, ids, documents, items)
            assert torch.equal(loss, out.loss.detach())
            losses.append(loss.item())
            if out.aux_loss is None:
                assert captured.aux_loss is None and captured.router == []
            else:
                assert torch.equal(captured.aux_loss, out.aux_loss.detach())
            for got, want in zip(captured.router, out.router, strict=True):
                assert got["layer_idx"] == want["layer_idx"]
                assert all(torch.equal(got[key], want[key]) for key in ("load", "prob", "entropy"))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is None if q.grad is None else torch.equal(p.grad, q.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(set(losses)) == 6
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_are_their_documents(name):
    model = made(name)
    (ids,) = batches(model, 1)
    documents = packed(0)
    targets = sum(n - 1 for row in LENGTHS[0] for n in row)
    loss = captured_packed(model, ids)(ids, documents=documents, num_items=targets)
    total, aux = 0.0, 0.0
    for row, lengths in enumerate(LENGTHS[0]):
        for n, part in zip(lengths, ids[row].split([*lengths, 70 - sum(lengths)]), strict=False):
            with torch.no_grad(), torch.autocast("cuda", BF16):
                out = model(part[None], labels=part[None])
            total += (out.loss - (0 if out.aux_loss is None else out.aux_loss)).item() * (n - 1)
    with torch.no_grad(), torch.autocast("cuda", BF16):
        out = model(ids, labels=ids, seq=Seq.from_documents(documents, "cuda"))
        aux = 0.0 if out.aux_loss is None else out.aux_loss.item()
    assert loss.item() == pytest.approx(total / targets + aux, rel=2e-3)


def test_packed_steps_want_what_they_were_recorded_with():
    model = made("mamba-tiny")
    (ids,) = batches(model, 1)
    captured = captured_packed(model, ids)
    for missing in ({"num_items": 5}, {"documents": packed(0)}):
        with pytest.raises(ValueError, match=r"the step was recorded with it\. Pass it, or record a second step"):
            captured(ids, **missing)
    with pytest.raises(ValueError, match="most: a row holds 70 documents, its padding counted as one, and most is 5"):
        captured(ids, documents=torch.arange(70).expand(3, 70), num_items=5)
    with pytest.raises(ValueError, match=r"documents: the step was recorded without it\. Leave it out"):
        zoo.CapturedStep(model, ids, autocast=BF16)(ids, documents=packed(0))


class Drawing(torch.nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


def test_recomputed_random_numbers_are_refused():
    model = made("mamba-tiny")
    (ids,) = batches(model, 1)
    model.backbone.layers[0].mixer.in_proj.__class__ = Drawing
    zoo.CapturedStep(model, ids, autocast=BF16)(ids)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="draws random numbers and gradient checkpointing, which would draw others"):
        zoo.CapturedStep(model, ids, autocast=BF16)
    assert all(p.grad is None for p in model.parameters())
    model.add_module("extra", torch.nn.Dropout(0.1))
    assert "there is dropout, extra for one, and gradient checkpointing" in why_not_captured(model, BF16)


def test_why_not():
    assert why_not_captured(made("mamba-tiny")) is None and why_not_captured(made("jamba-tiny"), BF16) is None
    assert "experts in float16" in why_not_captured(made("jamba-tiny"), torch.float16)
    odd = zoo.build("jamba-tiny", ["mixers.moe.d_intermediate=100"], device="cuda")
    assert "asks the host how many rows each has (grouped_mm needs rows" in why_not_captured(odd, BF16)

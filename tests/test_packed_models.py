"""Packed documents are the documents by themselves: losses and gradients of every shipped architecture, however the rows are described."""

import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
from hybridzoo.kernels import Seq

MODELS = zoo.list_models("*-tiny", task="causal_lm")
# more than a window, a chunk and a filter; a document of one token; padding, and none
ROWS = [[3, 1, 90, 40], [133, 1], [70, 64]]
LENGTH = 134


def made(name):
    torch.manual_seed(0)
    cfg = zoo.config(name)
    # a balance over the batch is no sum over documents
    moe = [f"mixers.{key}.aux_loss_coef=0" for key, mixer in cfg.mixers.items() if mixer.type == "moe"]
    return zoo.build(name, moe).train()


def documents(rows=ROWS):
    numbered = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]
    return torch.stack([F.pad(row, (0, LENGTH - len(row)), value=-1) for row in numbered])


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def separately(model, ids, rows):
    """The mean loss over all targets, document by document, and its gradients."""
    targets, total = sum(n - 1 for row in rows for n in row), 0.0
    for row, lengths in enumerate(rows):
        for part in ids[row, : sum(lengths)].split(lengths):
            loss = model(part[None], labels=part[None], num_items=targets).loss
            loss.backward()
            total += loss.item()
    return total, gradients(model)


def agree(model, loss, want, wanted):
    loss.backward()
    assert loss.item() == pytest.approx(want, abs=1e-5)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 + 1e-4 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_separate(name):
    model, doc = made(name), documents()
    ids = torch.randint(1, 256, doc.shape)
    want, wanted = separately(model, ids, ROWS)
    for most in (None, 5, 9):
        agree(model, model(ids, labels=ids, seq=Seq.from_documents(doc, most=most)).loss, want, wanted)
    agree(model, model(ids, labels=ids, seq_idx=doc).loss, want, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_one_row_by_its_offsets(name):
    model, row = made(name), ROWS[0]
    ids = torch.randint(1, 256, (1, LENGTH))
    want, wanted = separately(model, ids, [row])
    offsets = torch.tensor([0, *row]).cumsum(0)
    agree(model, model(ids, labels=ids, cu_seqlens=offsets).loss, want, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_rows_one_after_the_other_equal_the_batch(name):
    """Accumulated gradients are those of one batch."""
    model, doc = made(name), documents()
    ids = torch.randint(1, 256, doc.shape)
    want, wanted = separately(model, ids, ROWS)
    targets, total = sum(n - 1 for row in ROWS for n in row), 0.0
    for row in range(len(ROWS)):
        one = Seq.from_documents(doc[row : row + 1], most=5)
        loss = model(ids[row : row + 1], labels=ids[row : row + 1], seq=one, num_items=torch.tensor(targets)).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(want, abs=1e-5)
    found = gradients(model)
    for name_, grad in wanted.items():
        torch.testing.assert_close(found[name_], grad, rtol=1e-4, atol=1e-5 + 1e-4 * grad.abs().max().item(), msg=name_)

"""Training on rows with labels: the loss and the accuracy of a plain loop, rows made when they are asked for, and runs that go on."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
from hybridzoo.zoo.digests import digest_weights
from hybridzoo.zoo.models.loss import next_token_loss
from hybridzoo.zoo.train.batches import Whole, collated
from hybridzoo.zoo.train.examples import examples_from
from hybridzoo.zoo.train.labelled import scores_of
from hybridzoo.zoo.train.options import TrainOptions
from hybridzoo.zoo.train.run import DifferentRun, train

QUIET = {"report_to": "none", "device": "cpu"}
SETTINGS = {"steps": 6, "batch_size": 4, "save_every": 2, "lr": 1e-2, "seed": 3} | QUIET
DRAW = np.random.default_rng(0)


def config(name="transformer-tiny", *changes):
    small = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2", "layers=attention mlp"]
    return zoo.config(name, [*small, "vocab_size=20", *changes])


def pair(n=10, l=7):
    """Labels that are not the next tokens, of unequal number, none in row 2."""
    ids, labels = DRAW.integers(0, 20, (n, l)), DRAW.integers(0, 20, (n, l))
    labels[DRAW.random((n, l)) < 0.5] = -100
    labels[0, l - 1], labels[1, 0], labels[2] = 3, 4, -100
    return ids, labels


PAIR = pair()


class Lazy:
    """Rows that are made when they are asked for."""

    def __init__(self, n=24, digest="drawn by 7", l=7):
        self.n, self.digest, self.l, self.asked = n, digest, l, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.asked.append(i)
        ids = np.random.default_rng([7, i]).integers(0, 20, self.l)
        return ids, np.where(ids % 3 == 0, (ids + 1) % 20, -100)


def plain(model, ids, labels):
    """The mean loss, and the mean over rows of the share of right answers, token by token."""
    nats, shares = [], []
    with torch.no_grad():
        for row, wanted in zip(ids, labels, strict=True):
            logits, right = model.eval()(torch.from_numpy(row)[None]).logits[0], []
            for i in np.flatnonzero(wanted != -100):
                nats.append(float(F.cross_entropy(logits[i].double(), torch.tensor(wanted[i]))))
                right.append(int(logits[i].argmax()) == wanted[i])
            shares += [np.mean(right)] if right else []
    return np.mean(nats), np.mean(shares)


def test_the_first_loss_is_that_of_a_plain_loop_and_rows_without_labels_are_left_out(tmp_path):
    torch.manual_seed(3)
    model = zoo.build(config())
    expected, _ = plain(model, *PAIR)
    result = train(config(), PAIR, tmp_path, steps=1, batch_size=9, seed=3, **QUIET)
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_step_changes_the_weights_as_plain_pytorch_does(tmp_path):
    torch.manual_seed(3)
    model = zoo.build(config())
    ids, labels = (torch.from_numpy(x) for x in PAIR)
    F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    result = train(config(), PAIR, tmp_path, steps=1, batch_size=9, seed=3, **QUIET)
    assert result.history[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny"])
def test_evaluations_say_how_many_answers_are_right(tmp_path, name):
    cfg = config() if name == "transformer-tiny" else zoo.config(name, ["d_model=16", "vocab_size=20"])
    val = pair(7, 5)  # of another length, and no multiple of a batch
    result = train(cfg, PAIR, tmp_path, val=val, **SETTINGS | {"steps": 4})
    loss, accuracy = plain(zoo.load(tmp_path), *val)
    best = result.best
    assert best["eval_loss"] == pytest.approx(loss, rel=1e-5) and best["eval_accuracy"] == pytest.approx(accuracy)
    assert "eval_bits_per_byte" not in result.history[-1]


def test_the_best_model_is_the_one_with_the_most_right_answers(tmp_path):
    result = train(config(), PAIR, tmp_path, val=PAIR, **SETTINGS | {"steps": 12})
    seen = [e["eval_accuracy"] for e in result.history if "eval_accuracy" in e]
    assert result.best["eval_accuracy"] == max(seen)
    assert plain(result.model, *PAIR)[1] == pytest.approx(max(seen))


def test_training_ends_when_the_answers_are_right(tmp_path):
    ids = DRAW.integers(0, 4, (32, 6))
    labels = np.where(np.arange(6) == 5, 9, -100) + 0 * ids  # always the same answer
    options = SETTINGS | {"steps": 60, "until": 0.99, "eval_every": 5}
    result = train(config(), (ids, labels), tmp_path, val=(ids, labels), **options)
    last = int(result.history[-1]["step"])
    assert last < 60 and result.best == result.best | {"step": last} and result.best["eval_accuracy"] >= 0.99
    again = train(config(), (ids, labels), tmp_path, val=(ids, labels), **options)
    assert again.history == result.history and digest_weights(again.model) == digest_weights(result.model)


@pytest.mark.parametrize("data", [PAIR, Lazy()], ids=["tables", "made"])
def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, train_until, data):
    whole = train(config(), data, tmp_path / "whole", val=PAIR, **SETTINGS)
    train_until(3, config(), data, tmp_path / "cut", val=PAIR, **SETTINGS)
    cut = train(config(), data, tmp_path / "cut", val=PAIR, **SETTINGS)
    assert cut.resumed_from == 2 and digest_weights(cut.model) == digest_weights(whole.model)
    assert [e["loss"] for e in cut.history] == [e["loss"] for e in whole.history]


def test_rows_that_are_made_are_made_in_order_and_again_in_a_second_pass(tmp_path):
    data = Lazy(12)
    train(config(), data, tmp_path, **SETTINGS | {"steps": 5})
    first = data.asked.index(1) - 1  # before that, the first row alone was looked at
    assert data.asked[first : first + 20] == [*range(12), *range(8)]


def test_a_run_on_other_rows_is_another_run(tmp_path):
    train(config(), Lazy(), tmp_path, **SETTINGS | {"steps": 2})
    with pytest.raises(DifferentRun, match="another data"):
        train(config(), Lazy(digest="drawn by 8"), tmp_path, **SETTINGS | {"steps": 2})
    ids, labels = PAIR
    train(config(), PAIR, tmp_path / "tables", **SETTINGS | {"steps": 2})
    changed = labels.copy()
    changed[0, 6] = 5
    with pytest.raises(DifferentRun, match="another data"):
        train(config(), (ids, changed), tmp_path / "tables", **SETTINGS | {"steps": 2})


def test_an_archive_holds_rows_too(tmp_path):
    ids, labels = PAIR
    np.savez(tmp_path / "rows.npz", input_ids=ids, labels=labels)
    by_path = train(config(), tmp_path / "rows.npz", tmp_path / "a", **SETTINGS | {"steps": 2})
    by_value = train(config(), PAIR, tmp_path / "b", **SETTINGS | {"steps": 2})
    assert digest_weights(by_path.model) == digest_weights(by_value.model)


class NoDigest:
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return PAIR[0][i], PAIR[1][i]


class Uneven(Lazy):
    def __getitem__(self, i):
        ids, labels = super().__getitem__(i)
        return (ids, labels) if i < 3 else (ids[:4], labels[:4])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((PAIR[0], PAIR[1][:, 1:]), r"data: expected ids and labels of one shape.*\(10, 7\).*\(10, 6\)"),
        ((PAIR[0], PAIR[1] * 1.0), "data: expected ids and labels.*float64"),
        ((PAIR[0] + 5, PAIR[1]), r"data: token id 2\d is outside the model's vocabulary of 20"),
        ((PAIR[0], np.full((10, 7), -1)), "data: label -1 is outside"),
        ((PAIR[0], np.full((10, 7), -100)), "data: no row asks for anything"),
        (NoDigest(), "data: a NoDigest has no digest"),
        (Lazy(0), "data: there are no rows"),
        (Uneven(), r"data: row 3 has ids of shape \(4,\)"),
    ],
)
def test_what_cannot_be_trained_on_is_said(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        train(config(), data, tmp_path, **SETTINGS)


def test_archives_that_hold_something_else_are_said(tmp_path):
    np.savez(tmp_path / "x.npz", tokens=PAIR[0])
    with pytest.raises(ValueError, match=re.escape("x.npz: holds no input_ids and no labels (there is tokens)")):
        train(config(), tmp_path / "x.npz", tmp_path / "run", **SETTINGS)
    (tmp_path / "y.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"y\.npz: is no archive of NumPy arrays"):
        train(config(), tmp_path / "y.npz", tmp_path / "run", **SETTINGS)


def test_until_needs_answers(tmp_path):
    with pytest.raises(ValueError, match=r"train\(until=0.9\): there is nothing to evaluate on"):
        train(config(), PAIR, tmp_path, until=0.9, **SETTINGS)
    with pytest.raises(ValueError, match=r"train\(until=0.9\): no answers are right or wrong"):
        train(config(), PAIR[0], tmp_path, val=PAIR[0], until=0.9, **SETTINGS)
    with pytest.raises(ValueError, match="until"):
        train(config(), PAIR, tmp_path, val=PAIR, until=1.5, **SETTINGS)


def test_scores_are_those_of_all_logits():
    hidden, head = torch.randn(3, 5, 8), torch.nn.Linear(8, 11, bias=False)
    targets = torch.randint(0, 11, (3, 5)).masked_fill(torch.rand(3, 5) < 0.4, -100)
    nats, right = scores_of(hidden, head, targets)
    logits = head(hidden)
    asked = targets != -100
    torch.testing.assert_close(nats[asked], F.cross_entropy(logits[asked], targets[asked], reduction="none"))
    assert torch.equal(right.bool(), (logits.argmax(-1) == targets) & asked) and not nats[~asked].any()
    empty = scores_of(hidden, head, torch.full((3, 5), -100))
    assert not empty[0].any() and not empty[1].any()


def test_logits_of_tokens_that_nobody_asks_about_are_not_formed_on_a_cpu():
    hidden = torch.randn(2, 9, 8, dtype=torch.double, requires_grad=True)
    head = torch.nn.Linear(8, 11, bias=False, dtype=torch.double)
    targets = torch.full((2, 9), -100)
    targets[0, 3], targets[0, 8], targets[1, 0] = 4, 7, 10
    seen = []
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    loss = next_token_loss(hidden, head, targets)
    found = torch.autograd.grad(loss, [hidden, head.weight])
    plain_loss = F.cross_entropy(F.linear(hidden, head.weight).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(plain_loss, [hidden, head.weight])
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(found, expected)
    assert seen == [3]
    assert next_token_loss(hidden, head, torch.full((2, 9), -100)) == 0


def test_rows_that_are_read_at_once_are_those_that_are_read_one_by_one():
    model = zoo.build(config())
    for data in (PAIR, Lazy()):
        examples = examples_from(data, model, TrainOptions())
        whole = Whole(examples, 7)
        indices = [3, 0, 5]
        for several in (examples, whole):
            batch, alone = several.__getitems__(indices), [several[i] for i in indices]
            assert all(torch.equal(x, torch.stack([row[name] for row in alone])) for name, x in batch.items())
            assert set(batch) == set(alone[0]) and batch["labels"].dtype == torch.long
        last = collated(whole.__getitems__(list(range(len(examples) - 1, len(whole)))))
        assert (last["labels"][1:] == -100).all() and (last["labels"][0] != -100).any()

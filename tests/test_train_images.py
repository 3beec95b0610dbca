"""Training on images: the data decide on the classes, the head follows, and everything else is as with text."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
from hybridzoo.__main__ import main
from hybridzoo.zoo.images import Augment, images_from
from hybridzoo.zoo.images.builtin import builtin_set
from hybridzoo.zoo.models.image_classification import ImageClassifier
from hybridzoo.zoo.train.batches import Whole
from hybridzoo.zoo.train.evaluation import best_of, has_stalled
from hybridzoo.zoo.train.order import order_of
from hybridzoo.zoo.train.run import DifferentRun, train

MEASURED = ("seconds", "images_per_second", "memory_GiB", "mfu")
QUIET = {"report_to": "none", "device": "cpu"}
SETTINGS = QUIET | {"steps": 6, "batch_size": 4, "save_every": 3, "lr": 3e-3}


def shapes(n=24, classes=3, size=8, seed=0):
    """Images that can be told apart: a bright bar in the row or column of the class, on noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    images = rng.random((n, size, size)).astype(np.float32) * 0.5
    for image, label in zip(images, labels, strict=True):
        image[2 * label] = 1.0
    return images, labels


def config(*overrides, name="vmamba-micro"):
    return zoo.config(name, ["d_model=8", "drop_path=0.2", *overrides])


def history(result):
    return [{k: v for k, v in entry.items() if k not in MEASURED} for entry in result.history]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ what is learned


def test_digits_are_learned_and_what_is_saved_is_a_model(tmp_path, capsys):
    settings = QUIET | {"steps": 200, "batch_size": 32, "save_every": 100, "ema": 0.9, "lr": 0.01}
    result = train("vmamba-micro", "digits", tmp_path, overrides=["drop_path=0.1"], **settings)
    err = capsys.readouterr().err
    assert result.unit == "images" and result.tokens == 200 * 32 and result.best["eval_accuracy"] > 0.75
    assert "digits: 1,151 images of 10 classes" in err and "images/s" in err and "% right" in err
    assert "images: brought to 8 x 8 pixels in 1 channel; as they are" in err
    assert "200 steps of 32 images: 6,400 images, the data 5.56 times" in err
    loaded = zoo.load(tmp_path)
    assert list(loaded.cfg.labels) == [str(i) for i in range(10)] and same(loaded, result.model)
    # what was logged is what the saved model does, counted by hand
    held_out = images_from("digits", loaded.cfg, "val")
    x = torch.stack([held_out[i]["pixel_values"] for i in range(len(held_out))])
    with torch.no_grad():
        logits = loaded(x).logits
    right = (logits.argmax(1).numpy() == held_out.labels).mean()
    assert right == pytest.approx(result.best["eval_accuracy"], abs=1e-9)
    loss = F.cross_entropy(logits.double(), torch.from_numpy(held_out.labels))
    assert result.best["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    found = json.loads((tmp_path / "confusion.json").read_text())
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (held_out.labels, logits.argmax(1).numpy()), 1)
    assert found["step"] == result.best["step"] and found["labels"] == list(loaded.cfg.labels)
    assert {(i, j): n for i, j, n in found["counts"]} == {
        (i, j): counts[i, j] for i in range(10) for j in range(10) if counts[i, j]
    }
    page = (tmp_path / "report.html").read_text()
    for words in (
        "Held-out accuracy",
        "taken for",
        "nats per image",
        "the images that it has not seen",
        "images/s",
        "Images per second",
    ):
        assert words in page, words
    assert "held-out text" not in page and "tokens" not in page
    log = json.loads((tmp_path / "train.json").read_text())
    assert log["about"]["unit"] == "images" and log["about"]["images_per_step"] == 32 and log["best"] == result.best
    again = train("vmamba-micro", "digits", tmp_path, overrides=["drop_path=0.1"], **settings)
    assert again.resumed_from == 200 and again.best == result.best and again.unit == "images"
    # a new run in the same folder leaves nothing of the old one
    train("vmamba-micro", shapes(), tmp_path, resume=False, **QUIET | {"steps": 1, "batch_size": 4})
    assert not (tmp_path / "confusion.json").exists() and zoo.load(tmp_path).cfg.n_classes == 3


def test_the_best_has_the_highest_accuracy_and_of_equals_the_lowest_loss():
    seen = [(1, 0.5, 0.9), (2, 0.4, 0.8), (3, 0.6, 0.9), (4, 0.45, 0.9), (5, 0.44, 0.89)]
    log = [{"step": step, "eval_loss": loss, "eval_accuracy": right} for step, loss, right in seen]
    assert best_of(log) == log[3] and has_stalled(log, 1) and not has_stalled(log, 2)
    assert best_of([{k: v for k, v in e.items() if k != "eval_accuracy"} for e in log])["step"] == 2


def test_of_many_classes_the_first_five_are_counted_as_well(tmp_path):
    images, labels = shapes(24, 12, size=24)
    val = shapes(36, 12, size=24, seed=1)
    result = train(config("image_size=24", "stem.patch=4"), (images, labels), tmp_path, val=val, **SETTINGS)
    examples = images_from(val, result.model.cfg)
    x = torch.stack([examples[i]["pixel_values"] for i in range(36)])
    with torch.no_grad():
        order = result.model(x).logits.argsort(1, descending=True)
    right = (order == torch.from_numpy(val[1])[:, None]).double()
    assert result.best["eval_accuracy"] == pytest.approx(right[:, 0].mean().item())
    entry = next(e for e in result.history if e["step"] == result.best["step"])
    assert entry["eval_accuracy_top5"] == pytest.approx(right[:, :5].sum(1).mean().item())


# ------------------------------------------------------------------------------------------------ classes and heads


def test_a_fresh_model_has_the_classes_of_the_data(tmp_path):
    names = np.array(["cat", "dog", "owl"])[shapes()[1]]
    result = train(config("n_classes=1000"), (shapes()[0], names), tmp_path / "names", **SETTINGS)
    cfg = zoo.load(tmp_path / "names").cfg
    assert cfg.n_classes == 3 and list(cfg.labels) == ["cat", "dog", "owl"] and result.model.head.out_features == 3
    # numbers are no names, and there may be more classes than they show where that is said
    assert train(config(), shapes(), tmp_path / "numbers", **SETTINGS).model.cfg.n_classes == 3
    more = train("vmamba-micro", shapes(), tmp_path / "more", overrides=["d_model=8", "n_classes=5"], **SETTINGS)
    assert more.model.cfg.n_classes == 5 and more.model.cfg.labels is None
    for said, message in (
        (["n_classes=2"], r"data: have 3 classes, and n_classes=2 was asked for\. Leave it out"),
        (["image_size=16"], None),
    ):
        overrides = ["d_model=8", *said]
        if message is None:
            assert train("vmamba-micro", shapes(), tmp_path / "size", overrides=overrides, **SETTINGS)
        else:
            with pytest.raises(ValueError, match=message):
                train("vmamba-micro", shapes(), tmp_path / "no", overrides=overrides, **SETTINGS)
    with pytest.raises(ValueError, match=r"have 3 classes, and n_classes=4"):
        train("vmamba-micro", (shapes()[0], names), tmp_path / "no", overrides=["n_classes=4"], **SETTINGS)
    assert not (tmp_path / "no").exists()


def test_small_images_are_not_resized_unasked(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"are images of 12 x 12 pixels in 1 channel, and the config is for 8 x 8 in 1\. Say image_size=12; or image_size=8 in_channels=1",
    ):
        train("vmamba-micro", shapes(size=12), tmp_path, **SETTINGS)
    colours = np.repeat(shapes()[0][..., None], 3, axis=3), shapes()[1]
    with pytest.raises(
        ValueError, match=r"8 x 8 pixels in 3 channels, and the config is for 8 x 8 in 1\. Say in_channels=3"
    ):
        train("vmamba-micro", colours, tmp_path, **SETTINGS)
    assert not any(tmp_path.iterdir())
    result = train("vmamba-micro", colours, tmp_path / "out", overrides=["in_channels=3", "d_model=8"], **SETTINGS)
    assert result.model.cfg.in_channels == 3


def test_a_square_config_is_told_the_one_thing_to_say(tmp_path):
    images, labels = shapes(size=12)
    with pytest.raises(
        ValueError, match=r"of 9 x 12 pixels .* for 12 x 12 in 1\. Say image_size=12 in_channels=1, to have"
    ):
        train(config("image_size=12"), (images[:, :9], labels), tmp_path, **SETTINGS)


def test_a_run_does_not_lie_among_its_classes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"out: .* holds the data, and folders of the run would be taken for classes"):
        train("vmamba-micro", tmp_path, tmp_path / "cat" / "..", **SETTINGS)
    assert not (tmp_path / "checkpoints").exists()
    assert len(images_from(tmp_path, zoo.config("vmamba-micro", n_classes=2))) == 2


@pytest.mark.parametrize("labels", [[0] * 24, ["cat"] * 24], ids=["number", "name"])
def test_one_class_is_nothing_to_learn(labels, tmp_path):
    with pytest.raises(
        ValueError, match=r"data: have one class only, '(0|cat)'\. To tell images apart takes two or more"
    ):
        train("vmamba-micro", (shapes()[0], labels), tmp_path, **SETTINGS)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_other_classes_get_a_new_head_and_known_ones_keep_theirs(tmp_path, capsys):
    images, labels = shapes()
    first = train(config(), (images, np.array(["a", "b", "c"])[labels]), tmp_path / "first", **SETTINGS)
    # fewer of the same, in whatever order: the head stays, and their numbers are what they were
    fewer = train(
        tmp_path / "first",
        (images[labels > 0], np.array(["", "c", "b"])[labels[labels > 0]]),
        tmp_path / "fewer",
        **SETTINGS,
    )
    assert list(fewer.model.cfg.labels) == ["a", "b", "c"] and "new head" not in capsys.readouterr().err
    other = train(tmp_path / "first", (images, np.array(["a", "x"])[labels % 2]), tmp_path / "other", **SETTINGS)
    assert "a new head for 2 classes in place of that for 3" in capsys.readouterr().err
    assert list(zoo.load(tmp_path / "other").cfg.labels) == ["a", "x"] and other.model.head.out_features == 2
    assert zoo.load(tmp_path / "first").head.out_features == 3
    # the same call goes on, although its model has another head than the folder
    again = train(tmp_path / "first", (images, np.array(["a", "x"])[labels % 2]), tmp_path / "other", **SETTINGS)
    assert again.resumed_from == 6 and same(again.model, other.model)
    # a config of another size starts from all weights but those of the head
    based = train("vmamba-micro", (images, labels % 2), tmp_path / "based", overrides=["d_model=8", "n_classes=2", "image_size=16"],
                  base=str(tmp_path / "first"), **SETTINGS | {"steps": 1, "lr": 1e-30})  # fmt: skip
    assert "a new head for 2 classes in place of that for 3" in capsys.readouterr().err
    torch.testing.assert_close(
        dict(based.model.backbone.named_parameters()), dict(first.model.backbone.named_parameters())
    )


def test_a_published_file_is_trained_further(tmp_path, capsys):
    from hybridzoo.zoo.checkpoint import export

    model = zoo.build("vmamba-tiny-s1l8", ["d_model=8", "n_classes=7", "in_channels=1"])
    export(model, tmp_path / "published", "vmamba")
    (file,) = (tmp_path / "published").glob("*.pth")
    # photos, in memory: they are brought to the model's size
    images, labels = shapes(4, 2, size=32)
    settings = SETTINGS | {"steps": 1, "batch_size": 2, "lr": 1e-30, "augment": "none", "freeze": 1}
    result = train(file, (images, labels % 2), tmp_path / "out", **settings)
    err = capsys.readouterr().err
    assert f"{file}: starts from the weights there" in err and "the stem and 1 stage stay as they are" in err
    torch.testing.assert_close(dict(result.model.backbone.named_parameters()), dict(model.backbone.named_parameters()))


def test_a_fine_tuned_model_is_ahead_of_a_fresh_one(tmp_path):
    images, labels, names = builtin_set("digits")
    held = builtin_set("digits", "val")

    def some(of, low, high):
        chosen = (of[1] >= low) & (of[1] < high)
        return of[0][chosen], np.array(names)[of[1][chosen]]

    settings = QUIET | {"batch_size": 32, "lr": 0.01, "save_every": 1000}
    train("vmamba-micro", some((images, labels), 0, 5), tmp_path / "first", **settings, steps=120)
    last = {
        name: train(
            start, some((images, labels), 5, 10), tmp_path / name, val=some(held, 5, 10), **settings, steps=40
        ).best
        for name, start in (("fresh", "vmamba-micro"), ("tuned", tmp_path / "first"))
    }
    assert last["tuned"]["eval_accuracy"] > last["fresh"]["eval_accuracy"] + 0.1, last


def test_frozen_stages_stay_and_the_rate_falls_towards_the_stem(tmp_path, capsys):
    first = train(config(), shapes(), tmp_path / "first", **SETTINGS)
    before = {name: p.clone() for name, p in first.model.named_parameters()}
    result = train(tmp_path / "first", shapes(), tmp_path / "out", freeze=1, layer_decay=0.5, **SETTINGS)
    assert "the stem and 1 stage stay as they are" in capsys.readouterr().err
    moved = {name for name, p in result.model.named_parameters() if not torch.equal(p, before[name])}
    kept = ("backbone.embedding.", "backbone.layers.0.", "backbone.layers.1.", "backbone.downsample.0.")
    assert moved == {name for name in before if not name.startswith(kept)}
    assert all(p.requires_grad for p in result.model.parameters())
    with pytest.raises(ValueError, match=r"freeze=1\): would leave the random weights of a fresh model"):
        train(config(), shapes(), tmp_path / "no", freeze=1, **SETTINGS)
    with pytest.raises(ValueError, match="freeze: 3 of 2 stages"):
        train(tmp_path / "first", shapes(), tmp_path / "no", freeze=3, **SETTINGS)


def test_groups_by_layer_are_beits():
    model = zoo.build("vmamba-micro", ["d_model=8"])
    groups = zoo.param_groups(model, 0.05, layer_decay=0.5, lr=1.0)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    plain = {id(p): g["weight_decay"] for g in zoo.param_groups(model, 0.05) for p in g["params"]}
    # two layers: ss2d and the mlp behind it are one
    want = {"backbone.embedding": 0.125, "backbone.layers.0": 0.25, "backbone.layers.1": 0.25, "backbone.downsample.0": 0.25,
            "backbone.layers.2": 0.5, "backbone.layers.3": 0.5, "backbone.norm_f": 1.0, "head": 1.0}  # fmt: skip
    for name, p in model.named_parameters():
        assert rates[id(p)] == next(rate for prefix, rate in want.items() if name.startswith(f"{prefix}.")), name
        assert decay[id(p)] == plain[id(p)]
    assert groups[0]["lr"] == 1.0 and all(g["lr"] == g["lr_scale"] for g in groups)
    assert "lr" not in zoo.param_groups(model, 0.05, layer_decay=0.5)[0]
    with pytest.raises(ValueError, match="is no model of the zoo"):
        zoo.param_groups(torch.nn.Linear(2, 2), layer_decay=0.5)


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.9, "label_smoothing": 0.1, "layer_decay": 0.8}], ids=["plain", "more"]
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, train_until, options):
    settings = SETTINGS | {"steps": 9, "val": shapes(10, seed=2), "augment": "shift", "flip": 0.5} | options
    whole = train(config(), shapes(), tmp_path / "whole", **settings)
    train_until(5, config(), shapes(), tmp_path / "cut", **settings)
    resumed = train(config(), shapes(), tmp_path / "cut", **settings)
    assert resumed.resumed_from == 3 and history(resumed) == history(whole)
    assert same(resumed.model, whole.model) and resumed.best == whole.best
    with pytest.raises(DifferentRun, match=r"another augment \(shift there, none now\)"):
        train(config(), shapes(), tmp_path / "cut", **settings | {"augment": "none"})


def test_processes_that_read_ahead_change_no_number(tmp_path):
    # more than one pass, in each of which an image is another
    settings = SETTINGS | {"steps": 14, "augment": "shift", "flip": 0.5}
    alone = train(config(), shapes(), tmp_path / "alone", workers=0, **settings)
    ahead = train(config(), shapes(), tmp_path / "ahead", workers=2, **settings)
    assert history(alone) == history(ahead) and same(alone.model, ahead.model)


def test_an_image_is_another_in_every_pass(tmp_path, monkeypatch):
    seen = []
    forward = ImageClassifier.forward

    def look(self, pixel_values, labels=None, **kwargs):
        seen.append((pixel_values.clone(), labels.clone()))
        return forward(self, pixel_values, labels, **kwargs)

    monkeypatch.setattr(ImageClassifier, "forward", look)
    train(config(), shapes(8), tmp_path, augment="shift", **SETTINGS | {"batch_size": 8, "steps": 3})
    by_class = [x[y == 0].flatten(1).sort(0).values for x, y in seen]
    assert not torch.equal(by_class[0], by_class[1]) and not torch.equal(by_class[1], by_class[2])


def test_accumulated_parts_are_the_step(tmp_path):
    settings = SETTINGS | {"label_smoothing": 0.1}
    still = config("drop_path=0")
    whole = train(still, shapes(), tmp_path / "whole", **settings)
    parts = train(still, shapes(), tmp_path / "parts", **settings | {"batch_size": 2, "accumulate": 2})
    for a, b in zip(history(whole), history(parts), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_smoothed_labels_are_torchs(tmp_path):
    images, labels = shapes(4)
    one = SETTINGS | {"steps": 1, "augment": "none", "lr": 1e-9}
    result = train(config("drop_path=0"), (images, labels), tmp_path, label_smoothing=0.2, **one)
    x = torch.from_numpy((images - 0.5) / 0.5)[:, None].double()
    model = result.model.double()
    want = F.cross_entropy(model(x).logits, torch.from_numpy(labels), label_smoothing=0.2)
    assert result.history[0]["loss"] == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["numbers", "soft"])
def test_a_recorded_step_is_the_step(tmp_path, monkeypatch, smoothing):
    calls = []

    class Recorded:
        """Stands in for a recorded step: takes batches of one shape only."""

        aux_loss, router = None, ()

        def __init__(self, model, inputs, labels, *, num_items, autocast):
            self.model, self.shapes = model, (inputs.shape, labels.shape)
            assert num_items and model.training

        def __call__(self, inputs, labels, *, num_items):
            assert (inputs.shape, labels.shape) == self.shapes
            out = self.model(inputs, labels, num_items=num_items)
            out.loss.backward()
            calls.append(inputs.shape)
            return out.loss.detach()

    # ten images: the last batch of every pass is filled up
    settings = SETTINGS | {"label_smoothing": smoothing}
    eager = train(config("drop_path=0"), shapes(10), tmp_path / "eager", **settings)
    monkeypatch.setattr("hybridzoo.zoo.train.stepping.CapturedStep", Recorded)
    monkeypatch.setattr("hybridzoo.zoo.train.stepping.why_not_captured", lambda model, autocast: None)
    taken = train(config("drop_path=0"), shapes(10), tmp_path / "taken", **settings)
    assert calls == [(4, 1, 8, 8)] * 6
    for a, b in zip(history(eager), history(taken), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_averaged_weights_are_the_mean_of_those_of_all_steps(tmp_path, monkeypatch):
    from hybridzoo.zoo.train.loop import ZooTrainer

    steps = []
    real = ZooTrainer.training_step

    def look(self, *args, **kwargs):
        steps.append([p.detach().clone() for p in self.model.parameters()])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ZooTrainer, "training_step", look)
    plain = train(config(), shapes(), tmp_path / "plain", **SETTINGS)
    steps.append([p.detach().clone() for p in plain.model.parameters()])
    mean = train(config(), shapes(), tmp_path / "mean", ema=0.3, **SETTINGS).model
    want = [p.double() for p in steps[0]]
    for t, weights in enumerate(steps[1:7], 1):
        kept = min(0.3, (1 + t) / (10 + t))
        want = [kept * w + (1 - kept) * p.double() for w, p in zip(want, weights, strict=True)]
    for p, w in zip(mean.parameters(), want, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=1e-5, atol=1e-7)
    assert same(mean, zoo.load(tmp_path / "mean")) and not same(mean, plain.model)


timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
MIXED = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "random_erasing": 0.5}


@timm
def test_mixed_images_are_those_of_the_step_and_a_run_goes_on_with_them(tmp_path, train_until, monkeypatch):
    from hybridzoo.zoo.images.mixing import Mixing

    seen = []
    forward = ImageClassifier.forward

    def look(self, pixel_values, labels=None, **kwargs):
        seen.append((pixel_values.clone(), labels.clone(), kwargs["num_items"]))
        return forward(self, pixel_values, labels, **kwargs)

    monkeypatch.setattr(ImageClassifier, "forward", look)
    settings = SETTINGS | {"steps": 8, "seed": 5} | MIXED
    whole = train(config(), shapes(), tmp_path / "whole", **settings)
    soft = torch.stack([labels for _, labels, _ in seen])
    assert soft.shape == (8, 4, 3) and float(soft.sum(2).sub(1).abs().max()) < 1e-5
    assert any(not torch.equal(a, b) for a, b in pairwise(soft)) and all(n == 4 for _, _, n in seen)
    # by hand: what was read of step 6, mixed by what follows from seed, step, part and process
    plain = train(config(), shapes(), tmp_path / "plain", **SETTINGS | {"steps": 8, "seed": 5, "random_erasing": 0.5})
    images, labels, _ = seen[8 + 6]
    mixing = Mixing(n_classes=3, mixup=0.8, cutmix=1.0, smoothing=0.1)
    want = mixing(images.clone(), labels, 5, 6, 0, 0)
    assert torch.equal(want[0], seen[6][0]) and torch.equal(want[1], seen[6][1]) and history(plain) != history(whole)
    train_until(7, config(), shapes(), tmp_path / "cut", **settings)
    resumed = train(config(), shapes(), tmp_path / "cut", **settings)
    assert resumed.resumed_from == 6 and history(resumed) == history(whole) and same(resumed.model, whole.model)


@timm
def test_mixed_images_cost_what_torch_says(tmp_path):
    from hybridzoo.zoo.images.mixing import Mixing

    images, labels = shapes(4)
    one = SETTINGS | {"steps": 1, "augment": "none", "lr": 1e-9} | {"mixup": 0.8, "label_smoothing": 0.1}
    result = train(config("drop_path=0"), (images, labels), tmp_path, **one)
    x = torch.from_numpy((images - 0.5) / 0.5)[:, None]
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))
    x, soft = Mixing(n_classes=3, mixup=0.8, smoothing=0.1)(x[order], torch.from_numpy(labels)[order], 0, 0, 0, 0)
    model = result.model.double()
    want = -(soft.double() * model(x.double()).logits.log_softmax(1)).sum(1).mean()
    assert result.history[0]["loss"] == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is there")
def test_what_needs_timm_says_so(tmp_path):
    for option in ({"mixup": 0.8}, {"cutmix": 1.0}, {"random_erasing": 0.5}, {"rand_augment": "rand-m9"}):
        with pytest.raises(ModuleNotFoundError, match="pip install timm"):
            train(config(), shapes(), tmp_path, **SETTINGS, **option)
    assert not any(tmp_path.iterdir())


def test_options_of_the_other_kind_are_refused(tmp_path):
    for option, value in (("packing", "stream"), ("length", 64), ("carry_state", True), ("lora", 4)):
        with pytest.raises(ValueError, match=rf"train\({option}={value!r}\): is for text, and this model reads images"):
            train(config(), shapes(), tmp_path, **SETTINGS, **{option: value})
    with pytest.raises(ValueError, match="there is nothing to evaluate on"):
        train(config(), shapes(), tmp_path, eval_every=2, **SETTINGS)
    with pytest.raises(FileNotFoundError, match=r"digit: no such file"):
        train(config(), "digit", tmp_path, **SETTINGS)
    assert not any(tmp_path.iterdir())


def run_command(monkeypatch, capfd, *words):
    monkeypatch.setattr(sys, "argv", ["zoo", "train", *map(str, words), "--report-to", "none", "--device", "cpu"])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0), capfd.readouterr().err


def test_the_command_trains_on_a_built_in_set(tmp_path, monkeypatch, capfd):
    words = [
        "vmamba-micro",
        "d_model=8",
        "--data",
        "digits",
        "--out",
        tmp_path,
        "--steps",
        2,
        "--batch-size",
        8,
        "--eval-every",
        2,
    ]
    status, err = run_command(monkeypatch, capfd, *words)
    assert status == 0 and "2 steps, 16 images at" in err and "the best on val (loss" in err and "% right)" in err, err
    assert f"next: zoo predict {tmp_path} IMAGE" in err
    again = json.loads((tmp_path / "train.json").read_text())["about"]["command"]
    assert again.startswith(f"zoo train vmamba-micro d_model=8 --data digits --out {tmp_path} --steps 2 --batch-size 8")
    status, err = run_command(monkeypatch, capfd, *words, "--packing", "stream")
    assert status == 1 and "is for text, and this model reads images" in err and "Traceback" not in err
    status, err = run_command(monkeypatch, capfd, "transformer-tiny", "--data", "digits", "--out", tmp_path / "text")
    assert status == 1 and "digits: no such file or folder" in err


def test_a_folder_of_class_folders_is_trained_on_and_evaluated_by_what_is_held_out(tmp_path, monkeypatch, capfd):
    image = pytest.importorskip("PIL.Image")
    for part, seed in (("train", 0), ("val", 1)):
        for i, (pixels, label) in enumerate(zip(*shapes(12, seed=seed), strict=True)):
            folder = tmp_path / "data" / part / "abc"[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray((255 * pixels).astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "data" / "train" / "a" / "broken.png").write_bytes(b"no image")
    words = [
        "vmamba-micro",
        "d_model=8",
        "--data",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
        "--steps",
        3,
        "--batch-size",
        4,
    ]
    status, err = run_command(monkeypatch, capfd, *words)
    assert status == 1 and "broken.png: is no image that Pillow knows" in err and not (tmp_path / "out").exists()
    status, err = run_command(monkeypatch, capfd, *words, "--damaged", "skip", "--workers", 1)
    assert status == 0 and "12 images of 3 classes" in err and "1 image left out" in err and "held-out loss" in err, err
    assert list(zoo.load(tmp_path / "out").cfg.labels) == ["a", "b", "c"]


def test_processes_that_share_a_pass_read_every_image_once_as_it_is_in_it():
    cfg = zoo.config("vmamba-micro", ["n_classes=3"])
    examples = images_from(shapes(10), cfg, augment=Augment(flip=0.5))
    whole = Whole(examples, 4)
    first = list(order_of(whole, seed=3))
    assert len(whole) == 12 and sorted(first[:10]) == list(range(10)) and first[10:] == [-1, -1]
    held = [whole[i]["pixel_values"] for i in first]
    whole.set_epoch(1)
    second = list(order_of(whole, seed=3))
    assert sorted(second[:10]) == list(range(10, 20)) and second[10:] == [-1, -1]
    # an index says the pass by itself, whatever this process was told
    whole.set_epoch(0)
    later = {int(whole[i]["row"]): whole[i]["pixel_values"] for i in second[:10]}
    assert any(not torch.equal(later[i], held[first.index(i)]) for i in range(10))
    assert whole[-1]["labels"] == -100 and sorted(later) == list(range(10))
    assert list(order_of(images_from(shapes(10), cfg), seed=3)) == first[:10]


# ------------------------------------------------------------------------------------------------ killed


def started(folder):
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        with open(os.devnull, "w") as null:
            sys.stdout = sys.stderr = null
            train(config(), shapes(), folder, val=shapes(10, seed=2), eval_every=2, ema=0.5, **SETTINGS | {"steps": 12})
    except BaseException:
        os._exit(1)
    os._exit(0)


def outcome(folder):
    log = json.loads((folder / "train.json").read_text())
    assert log["finished"]
    entries = [{k: v for k, v in entry.items() if k not in MEASURED} for entry in log["history"]]
    weights = {name: p.detach().clone() for name, p in zoo.load(folder).named_parameters()}
    return entries, log["best"], weights, (folder / "confusion.json").read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_any_moment_it_ends_with_the_same_numbers(tmp_path):
    import time

    begin = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(started(tmp_path / "whole"), 0)[1]) == 0
    took, expected = time.monotonic() - begin, outcome(tmp_path / "whole")
    killed = 0
    for i in range(4):
        folder = tmp_path / f"cut{i}"
        pid = started(folder)
        time.sleep(took * (i + 1) / 5)
        os.kill(pid, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert os.waitstatus_to_exitcode(os.waitpid(started(folder), 0)[1]) == 0
        entries, best, weights, confusion = outcome(folder)
        assert (entries, best, confusion) == (expected[0], expected[1], expected[3]), i
        assert all(torch.equal(p, expected[2][name]) for name, p in weights.items()), i
    assert killed >= 2


RANK = """
    import sys, json
    import numpy as np
    import hybridzoo as zoo

    data = np.load(sys.argv[1])
    result = zoo.train(
        zoo.config("vmamba-micro", ["d_model=8"]), (data["images"], data["labels"]), sys.argv[2], val=(data["images"][:7], data["labels"][:7]),
        batch_size=2, steps=6, save_every=3, lr=3e-3, label_smoothing=0.1, augment="shift", report_to="none", device="cpu",
    )
    print(json.dumps([{k: e[k] for k in ("loss", "eval_loss", "eval_accuracy") if k in e} for e in result.history]))
"""


def test_two_processes_train_as_one(tmp_path):
    # ten images in batches of four: the last one of a pass is half empty
    images, labels = shapes(10)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "rank.py"), str(tmp_path / "data.npz"), str(tmp_path / "two")]
    ranks = [
        subprocess.Popen(
            command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [process.communicate(timeout=250) for process in ranks]
    assert not any(process.returncode for process in ranks), answers[0][1][-3000:] + answers[1][1][-3000:]
    told = [json.loads(answer[0].splitlines()[-1]) for answer in answers]
    one = train(
        config("drop_path=0"), (images, labels), tmp_path / "one", val=(images[:7], labels[:7]), label_smoothing=0.1, augment="shift",
        **SETTINGS,
    )  # fmt: skip
    want = [{k: e[k] for k in ("loss", "eval_loss", "eval_accuracy") if k in e} for e in one.history]
    assert told[0] == told[1] == [pytest.approx(entry, rel=1e-4) for entry in want]
    confusions = [json.loads((tmp_path / name / "confusion.json").read_text()) for name in ("one", "two")]
    assert confusions[0] == confusions[1]

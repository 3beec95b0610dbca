"""Scores of image models, judged by scikit-learn's; what is chosen, drawn and refused."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from command_line import invoke

import hybridzoo as zoo
from hybridzoo.eval.images import _chosen, confusion_picture, worst
from hybridzoo.zoo.images import images_from

metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model that is right about some digits: a few steps of training."""
    torch.manual_seed(0)
    model = zoo.build("vmamba-micro", ["d_model=8"], labels=list("0123456789")).train()
    examples = images_from("digits", model.cfg, "train")
    rows = [examples[i] for i in range(0, len(examples), 5)]
    x, y = (torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(12):
        model(x, y).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return zoo.save(model, tmp_path_factory.mktemp("saved") / "digits")


@pytest.fixture(scope="module")
def results(saved):
    return zoo.evaluate(saved, data="digits")


def test_the_scores_are_those_of_scikit_learn(saved, results):
    model = zoo.load(saved).eval()
    examples = images_from("digits", model.cfg, "test")
    with torch.no_grad():
        logits = model(torch.stack([examples[i]["pixel_values"] for i in range(len(examples))])).logits.double()
    truth, p = examples.labels, logits.softmax(-1).numpy()
    taken = p.argmax(1)
    assert results["n"] == len(truth) and 0.2 < results["top1"] < 1
    assert results["top1"] == pytest.approx(metrics.accuracy_score(truth, taken))
    assert results["top5"] == pytest.approx(metrics.top_k_accuracy_score(truth, p, k=5))
    assert results["loss"] == pytest.approx(metrics.log_loss(truth, p), rel=1e-5)
    assert results["confusion"] == metrics.confusion_matrix(truth, taken).tolist()
    recall = metrics.recall_score(truth, taken, average=None)
    assert [one["top1"] for one in results["classes"]] == pytest.approx(recall.tolist())
    assert [one["n"] for one in results["classes"]] == np.bincount(truth).tolist()
    right, losses = (taken == truth).astype(float), -np.log(p[np.arange(len(truth)), truth])
    for name, values in (("top1", right), ("loss", losses)):
        assert results[f"{name}_stderr"] == pytest.approx(values.std(ddof=1) / np.sqrt(len(truth)), rel=1e-5)


def test_the_command_prints_writes_and_draws(saved, results, tmp_path):
    table = invoke("eval", saved, "--data", "digits", "--out", tmp_path / "scores.json").stdout
    assert json.loads((tmp_path / "scores.json").read_text()) == results
    assert f"{results['top1']:.4f}" in table and f"{results['loss']:.4f}" in table and "359" in table
    picture = (tmp_path / "scores.svg").read_text()
    assert picture == confusion_picture(results) and ET.fromstring(picture) is not None
    assert (
        json.loads(invoke("eval", saved, "--data", "digits", "--json", "--batch-size", "7").stdout)["confusion"]
        == results["confusion"]
    )


def test_a_limit_takes_images_of_all_classes(saved):
    assert (
        _chosen(359, None) == list(range(359)) and _chosen(10, 20) == list(range(10)) and _chosen(10, 4) == [0, 2, 5, 7]
    )
    assert _chosen(359, 0.1) == [i * 359 // 36 for i in range(36)] and _chosen(3, 0.01) == [0]
    some = zoo.evaluate(saved, data="digits", limit=36)
    assert some["n"] == 36 and all(one["n"] for one in some["classes"]) and sum(map(sum, some["confusion"])) == 36


def test_a_class_without_images_has_no_score(saved):
    images, labels = np.zeros((3, 8, 8), np.uint8), np.array([1, 1, 2])
    found = zoo.evaluate(saved, data=(images, labels))
    assert [one["top1"] is None for one in found["classes"]] == [i not in (1, 2) for i in range(10)]
    assert confusion_picture(found).count("<svg") == 2
    one = zoo.evaluate(saved, data=(images[:1], labels[:1]))
    assert one["n"] == 1 and one["top1_stderr"] is None


def test_folders_are_scored_by_their_names_and_damaged_files_named(saved, tmp_path):
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for digit in "0123456789":
        for part in ("train", "test"):
            (tmp_path / part / digit).mkdir(parents=True)
            image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / part / digit / "1.png")
    assert zoo.evaluate(saved, data=tmp_path)["n"] == 10
    (tmp_path / "test" / "3" / "2.png").write_bytes(b"none")
    ran = invoke("eval", saved, "--data", tmp_path, status=1)
    assert "3/2.png: is no image" in ran.stderr and "--damaged skip" in ran.stderr
    assert json.loads(invoke("eval", saved, "--data", tmp_path, "--damaged", "skip", "--json").stdout)["n"] == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["mamba-tiny", "--data", "digits"],
            "is a model for causal_lm, and this is for images. Give tasks in place of data (--tasks",
        ),
        (
            ["vmamba-micro", "--tasks", "hybridzoo_mqar"],
            "are of text models, and this one is for images. Give data in their place (--data",
        ),
        (
            ["vmamba-micro"],
            "neither is given. Give tasks (--tasks hybridzoo_mqar) for a text model, or data (--data digits)",
        ),
        (["vmamba-micro", "--data", "digits", "--tasks", "hybridzoo_mqar"], "both are given"),
        (
            ["vmamba-micro", "--data", "digits", "--num-fewshot", "2"],
            "num_fewshot: is an option of tasks, and these are images",
        ),
        (["vmamba-micro", "--data", "digits", "--limit", "0"], "--limit: is 0"),
        (["vmamba-micro", "--data", "digits", "--out", "."], "--out: . is a folder"),
        (["vmamba-micro", "--data", "digits", "--damaged", "ignore"], "damaged='ignore': unknown. Known: stop, skip"),
        (["vmamba-micro", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["vmamba-tiny-s1l8", "--data", "digits", "--limit", "1"], "n_classes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_scored_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = invoke("eval", *arguments, status=1)
    assert message in ran.stderr and "Traceback" not in ran.stderr and ran.stdout == ""


def test_models_that_are_objects_say_what_they_are_for(saved):
    with pytest.raises(ValueError, match=r"tasks: are of text models"):
        zoo.evaluate(zoo.load(saved), ["hybridzoo_mqar"])
    model = zoo.load(saved).train()
    assert zoo.evaluate(model, data="digits", limit=1)["n"] == 1 and model.training
    with pytest.raises(ValueError, match=r"tasks: are of text models"):
        zoo.evaluate(str(saved), ["hybridzoo_mqar"])
    with pytest.raises(ValueError, match="for causal_lm"):
        zoo.evaluate(zoo.build("mamba-tiny", ["d_model=16"]), data="digits")


def test_of_many_classes_the_worst_are_shown():
    n = 60
    counts = (10 * np.eye(n, dtype=int)).tolist()
    for i in range(45):
        counts[i][59] = i + 1
    counts[50][50] = 0  # a class without images
    assert worst(counts) == list(range(25, 45)) and worst(counts[:3], 5) == [0, 1, 2]
    scores = {
        "model": "a/b",
        "data": "c",
        "n": 9,
        "top1": 0.5,
        "confusion": counts,
        "classes": [{"name": f"class {i}"} for i in range(n)],
    }
    drawn = confusion_picture(scores)
    assert "The 20 classes that were mistaken most" in drawn and "class 24" not in drawn and "class 44" in drawn


def test_the_matrix_is_drawn_as_it_is(results):
    drawn = confusion_picture(results)
    titles = re.findall(r"<title>(\d), taken for (\d): (\d+)</title>", drawn)
    found = {(int(i), int(j)): int(n) for i, j, n in titles}
    counts = results["confusion"]
    assert found == {(i, j): counts[i][j] for i in range(10) for j in range(10) if counts[i][j]}

"""What an image model takes images for: one file, folders, arrays, and what is no image."""

import json

import numpy as np
import pytest
import torch
from command_line import invoke

import hybridzoo as zoo
from hybridzoo.zoo.images.damaged import DamagedImage
from hybridzoo.zoo.images.predict import files_of

Image = pytest.importorskip("PIL.Image")
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = zoo.build("vmamba-micro", ["d_model=8"], n_classes=3, labels=NAMES)
    torch.nn.init.normal_(model.head.weight, std=1.0)
    return zoo.save(model, tmp_path_factory.mktemp("saved") / "insects")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty files in nested folders, one that is hidden, one that is no image's name."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "b").mkdir()
    for i in range(40):
        pixels = draw.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("b" if i % 2 else ".") / f"{i:02}.png")
    (folder / ".hidden.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    return folder


def test_probabilities_are_the_softmax_of_the_models_logits(saved, photos):
    found = zoo.predict(saved, photos)
    files = sorted(photos.rglob("[0-9]*.png"))
    assert [one["image"] for one in found] == [str(file) for file in files] and len(files) == 40
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])[:, None]
    with torch.no_grad():
        logits = zoo.load(saved).eval()(torch.from_numpy((pixels / 255 - 0.5) / 0.5).float()).logits.numpy()
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for one, row in zip(found, expected, strict=True):
        classes = one["classes"]
        assert [c["label"] for c in classes] == np.argsort(
            -row
        ).tolist()  # as many as there are, of five that are asked for
        assert [c["name"] for c in classes] == [NAMES[c["label"]] for c in classes]
        np.testing.assert_allclose([c["probability"] for c in classes], np.sort(row)[::-1], rtol=1e-4)


def test_arrays_and_files_are_alike(saved, photos):
    files = files_of(photos)[:3]
    arrays = [np.asarray(Image.open(file)) for file in files]
    model = zoo.load(saved).train()
    by_file, by_array = zoo.predict(saved, files, 2), zoo.predict(model, arrays, 2)
    assert [one["image"] for one in by_array] == ["image 0", "image 1", "image 2"]
    assert [one["classes"] for one in by_array] == [one["classes"] for one in by_file] and len(
        by_file[0]["classes"]
    ) == 2
    (alone,) = zoo.predict(model, arrays[1], 2)
    assert (
        alone["classes"][0]["probability"] == pytest.approx(by_file[1]["classes"][0]["probability"]) and model.training
    )


def test_the_command_prints_names_and_json(saved, photos):
    table = invoke("predict", saved, photos / "00.png", "--top", "2").stdout
    found = json.loads(invoke("predict", saved, photos / "00.png", photos / "b", "--json").stdout)
    assert len(found) == 21 and found == zoo.predict(saved, [photos / "00.png", photos / "b"])
    lines = table.splitlines()
    assert len(lines) == 3 and lines[1].split() == [
        str(photos / "00.png"), found[0]["classes"][0]["name"], f"{found[0]['classes'][0]['probability']:.2%}"
    ]  # fmt: skip


def test_a_damaged_file_is_named_and_the_others_are_not_lost(saved, photos, tmp_path):
    whole = (photos / "00.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "b.png").write_bytes(whole[:60])
    (tmp_path / "c.png").write_bytes(b"")
    ran = invoke("predict", saved, tmp_path, "--json", status=1)
    assert [one["image"] for one in json.loads(ran.stdout)] == [str(tmp_path / "a.png")]
    said = ran.stderr.splitlines()
    assert len(said) == 2 and all(line.startswith("error: ") for line in said)
    assert str(tmp_path / "b.png") in said[0] and f"{tmp_path / 'c.png'}: is empty" in said[1]
    with pytest.raises(DamagedImage, match=r"b\.png"):
        zoo.predict(saved, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["mamba-tiny", "a.png"],
            "mamba-tiny: is a model for causal_lm, and this is for images. zoo generate continues a text.",
        ),
        (["vmamba-micro", "aa.png"], "aa.png: no such file or folder. Did you mean 'a.png'?"),
        (["vmamba-micro", "empty"], "empty: holds no image (a file that ends in .jpg"),
        (["vmamba-micro", "a.png", "n_classes=3"], "n_classes=3: no such file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_predicted_is_one_line(arguments, message, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes((photos / "00.png").read_bytes())
    (tmp_path / "empty").mkdir()
    ran = invoke("predict", *arguments, status=1)
    assert message in ran.stderr and "Traceback" not in ran.stderr and ran.stdout == ""


def test_a_model_without_a_head_or_of_text_tells_nothing_apart():
    model = zoo.build("vmamba-micro", ["d_model=8"], n_classes=0)
    with pytest.raises(ValueError, match=r"has no head \(n_classes = 0\)"):
        zoo.predict(model, np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="is a model for causal_lm, and this is for images"):
        zoo.predict(zoo.build("mamba-tiny", ["d_model=16"]), np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"images: found Image, expected a file, a folder, or an array"):
        zoo.predict("vmamba-micro", pytest.importorskip("PIL.Image").new("L", (8, 8)))
    with pytest.raises(DamagedImage, match=r"image 1: holds int64"):
        zoo.predict("vmamba-micro", [np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.int64)])
    with pytest.raises(ValueError, match=r"top=0: is no number of classes\. Give 1 to 10"):
        zoo.predict("vmamba-micro", np.zeros((8, 8), np.uint8), top=0)

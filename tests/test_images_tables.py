"""Tables of images, by datasets: saved ones, parquet files, in memory; with and without types."""

import io
import pickle

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from hybridzoo.zoo.config.images import ImageSchema
from hybridzoo.zoo.errors import SourceError
from hybridzoo.zoo.images import Augment, DamagedImage, classes_of, images_from

Image = pytest.importorskip("PIL.Image")
datasets = pytest.importorskip("datasets")


def config(**keys):
    return OmegaConf.merge(
        OmegaConf.structured(ImageSchema),
        {"n_classes": 2, "image_size": 32, "crop": 1.0, "image_mean": [0.5], "image_std": [0.25]} | keys,
    )


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def values(examples):
    return torch.stack([examples[i]["pixel_values"] for i in range(len(examples))])


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def content(seed):
    file = io.BytesIO()
    Image.fromarray(noise(seed=seed)).save(file, "PNG")
    return file.getvalue()


def table(labels=(1, 0, 1, 1), names=("cat", "dog"), images="image", label="label"):
    features = datasets.Features({images: datasets.Image(), label: datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict(
        {images: [{"bytes": content(i), "path": None} for i in range(len(labels))], label: list(labels)}, features
    )


EXPECTED = [noise(seed=i) for i in range(4)]


def check(examples, classes=("cat", "dog"), labels=(1, 0, 1, 1)):
    assert (examples.classes, examples.labels.tolist()) == (list(classes), list(labels))
    arrays = images_from((np.stack(EXPECTED[: len(labels)]), list(labels)), config(n_classes=len(classes)))
    assert torch.equal(values(examples), values(arrays))


def test_in_memory():
    check(images_from(table(), config()))
    check(images_from(datasets.DatasetDict(train=table(), test=table((0, 1))), config()))
    check(images_from(datasets.DatasetDict(train=table(), test=table((0, 1))), config(), "val"), labels=(0, 1))
    assert classes_of(table()) == ["cat", "dog"]


def test_rows_that_were_shuffled_keep_their_labels():
    shuffled = table().select([3, 1, 0])
    examples = images_from(shuffled, config())
    assert examples.labels.tolist() == [1, 0, 1]
    arrays = images_from((np.stack([EXPECTED[i] for i in (3, 1, 0)]), [1, 0, 1]), config())
    assert torch.equal(values(examples), values(arrays))


def test_saved(tmp_path):
    table().save_to_disk(tmp_path / "one")
    check(images_from(tmp_path / "one", config()))
    datasets.DatasetDict(train=table(), validation=table((0, 1))).save_to_disk(tmp_path / "parts")
    check(images_from(tmp_path / "parts", config()))
    check(images_from(tmp_path / "parts", config(), "val"), labels=(0, 1))
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SourceError, match="one: cannot be read as a table"):
        images_from(tmp_path / "one", config())


@pytest.mark.parametrize("place", ["data/train-00000-of-00001.parquet", "train/0000.parquet", "all.parquet"])
def test_parquet(tmp_path, place):
    file = tmp_path / "set" / place
    file.parent.mkdir(parents=True)
    table().to_parquet(file)
    check(images_from(file, config()))
    check(images_from(tmp_path / "set", config()))
    if "train" in place:
        table((0, 1)).to_parquet(file.with_name(file.name.replace("train", "test")).with_stem(f"test-{file.stem[6:]}"))
        if "data" in place:
            check(images_from(tmp_path / "set", config(), "val"), labels=(0, 1))


def test_parquet_of_somebody_without_types(tmp_path):
    plain = datasets.Dataset.from_dict({"id": [0, 1], "img": [content(0), content(1)], "label": ["dog", "cat"]})
    plain.to_parquet(tmp_path / "x.parquet")
    check(images_from(tmp_path / "x.parquet", config()), labels=(1, 0))
    (tmp_path / "y.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"y.parquet: cannot be read as a table"):
        images_from(tmp_path / "y.parquet", config())


def test_classes_that_a_model_knows_are_found_by_name():
    examples = images_from(table(), config(n_classes=3, labels=["dog", "cat", "bird"]))
    assert examples.labels.tolist() == [0, 1, 0, 0]
    with pytest.raises(SourceError, match="of the class 'dog', which the model does not know"):
        images_from(table(), config(labels=["cat", "bird"]))


def test_columns_are_named_where_there_are_several():
    two = table().add_column("other", [{"bytes": content(9), "path": None}] * 4).cast_column("other", datasets.Image())
    check(images_from(two, config()))  # one of them is called image
    two = two.rename_column("image", "left").rename_column("other", "right")
    with pytest.raises(
        SourceError, match=r"data: has several columns of images: 'left', 'right'. Name one .*\(--column\)"
    ):
        images_from(two, config())
    check(images_from(two, config(), column="left"))
    with pytest.raises(SourceError, match="has no column 'middle'; its columns: 'left', 'label', 'right'"):
        images_from(two, config(), column="middle")
    with pytest.raises(SourceError, match="column 'label' holds no images"):
        images_from(two, config(), column="label")
    with pytest.raises(SourceError, match="has no column of labels; its columns: 'left', 'right'"):
        images_from(two.remove_columns("label"), config(), column="left")


def test_rows_that_cannot_be_used():
    rows = [
        {"bytes": content(0), "path": None},
        None,
        {"bytes": content(2)[:200], "path": None},
        {"bytes": content(3), "path": None},
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    bad = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1]}, features)
    with pytest.raises(
        DamagedImage, match=r"2 of 4 images cannot be used: data, row 1: is empty .* data, row 2: is damaged"
    ):
        images_from(bad, config())
    assert images_from(bad, config(), damaged="skip").chosen.tolist() == [0, 3]
    with pytest.raises(SourceError, match="label -1"):
        images_from(datasets.Dataset.from_dict({"image": rows[:1], "label": [-1]}, features), config())
    with pytest.raises(SourceError, match="data: is empty"):
        images_from(table(()), config())
    with pytest.raises(ValueError, match="data: found int, expected a path"):
        images_from(5, config())


def test_workers_read_tables_too(tmp_path, monkeypatch):
    from hybridzoo.zoo.images import scan

    monkeypatch.setattr(scan, "KEPT", 100)
    table().save_to_disk(tmp_path / "one")
    examples = images_from(tmp_path / "one", config(), augment=Augment())
    alone = values(examples)
    read = torch.cat([batch["pixel_values"] for batch in DataLoader(examples, batch_size=3, num_workers=2)])
    assert torch.equal(alone, read) and torch.equal(values(pickle.loads(pickle.dumps(examples))), alone)

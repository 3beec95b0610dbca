"""Pixels in evaluation against transformers' processors, those in training against Pillow, NumPy and timm, and mixed batches."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from hybridzoo.zoo.config.images import INTERPOLATIONS, ImageSchema
from hybridzoo.zoo.errors import ConfigError
from hybridzoo.zoo.images import Augment, DamagedImage, Mixing, Pixels, images_from, processor_config
from hybridzoo.zoo.images.augment import Augmented, drawing

Image = pytest.importorskip("PIL.Image")
HAS_TIMM = importlib.util.find_spec("timm") is not None
timm = pytest.mark.skipif(not HAS_TIMM, reason="timm is not installed (pip install --no-deps timm will do)")


def config(**keys):
    return OmegaConf.merge(OmegaConf.structured(ImageSchema), {"n_classes": 2} | keys)


def photo(h=300, w=451, c=3):
    """Waves, edges and noise; from a camera where scikit-image is installed."""
    if c == 3 and importlib.util.find_spec("skimage") and (h, w) == (512, 512):
        from skimage import data

        return data.astronaut()
    y, x = np.mgrid[:h, :w]
    waves = (
        127 + 90 * np.sin(x / 7 + np.arange(c)[:, None, None]) * np.cos(y / 11) + 60 * ((x // 40 + y // 30) % 2 - 0.5)
    )
    noise = np.random.default_rng(0).normal(0, 12, (c, h, w))
    return np.clip(waves + noise, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def processor(cfg, folder):
    from transformers import AutoImageProcessor

    (folder / "preprocessor_config.json").write_text(json.dumps(processor_config(cfg)))
    # by Pillow, as we do; torchvision's filters round otherwise
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("h", "w"), [(300, 451), (451, 300), (512, 512), (256, 256), (100, 90), (225, 999)])
def test_pixels_are_those_of_the_processor_beside_the_weights(tmp_path, h, w, interpolation):
    cfg, image = config(interpolation=interpolation), photo(h, w)
    theirs = processor(cfg, tmp_path)(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    ours = Pixels.of(cfg).evaluated(image)
    assert ours.shape == theirs.shape == (3, 224, 224) and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-6


@pytest.mark.parametrize(
    "keys",
    [
        {"image_size": 384, "crop": 1.0}, {"image_size": 225, "crop": 0.9}, {"image_size": 65, "crop": 0.875},
        {"image_size": 28, "in_channels": 1}, {"image_size": 8, "in_channels": 1, "image_mean": [0.3], "image_std": [0.4]},
        {"image_size": 64, "in_channels": 1},
    ],
    ids=str,
)  # fmt: skip
def test_so_they_are_for_other_sizes_and_for_grey(tmp_path, keys):
    cfg = config(**keys)
    for h, w in ((70, 93), (28, 28), (8, 8), (400, 385)):
        image = photo(h, w, cfg.in_channels)
        given = Image.fromarray(image.squeeze(2) if cfg.in_channels == 1 else image)
        theirs = processor(cfg, tmp_path)(given, return_tensors="np")["pixel_values"][0]
        assert np.abs(Pixels.of(cfg).evaluated(image) - theirs).max() < 1e-6


def test_so_they_are_for_files(tmp_path):
    for i, name in enumerate(("a", "b")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(photo(200 + 20 * i, 230)).save(tmp_path / "data" / name / "x.jpg", quality=90)
    examples = images_from(tmp_path / "data", config())
    judge = processor(config(), tmp_path)
    for i in range(2):
        theirs = judge(Image.open(examples.name(i)), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(examples[i]["pixel_values"], theirs, atol=1e-6, rtol=0)


def test_the_processor_saves_itself_as_it_was_made(tmp_path):
    made = processor(config(), tmp_path)
    (tmp_path / "again").mkdir()
    made.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert {key: saved[key] for key in processor_config(config())} == processor_config(config())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_floats_are_resized_as_torch_does_it(interpolation):
    image = (photo(300, 451) / 255).astype(np.float32)
    made = Pixels.of(config(image_mean=[0.0], image_std=[1.0], interpolation=interpolation)).evaluated(image)
    whole = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    theirs = torch.nn.functional.interpolate(whole, (256, 384), mode=interpolation, antialias=True).clamp(0, 1)
    assert np.abs(made - theirs[0, :, 16:240, 80:304].numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("keys", "mean", "std", "shorter"),
    [
        ({}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256),
        ({"in_channels": 1}, (0.449,), (0.226,), 256),
        ({"in_channels": 5, "image_mean": [0.5], "image_std": [0.25]}, (0.5,) * 5, (0.25,) * 5, 256),
        ({"image_size": 28}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 28),
        ({"image_size": 64}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 73),
        ({"image_size": 384, "crop": 1.0}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 384),
    ],
    ids=str,
)
def test_what_a_config_says(keys, mean, std, shorter):
    pixels = Pixels.of(config(**keys))
    assert pixels.mean == pytest.approx(mean) and pixels.std == pytest.approx(std) and pixels.shorter == shorter


def test_means_of_some_channels_are_refused():
    with pytest.raises(ConfigError, match="image_mean: holds 2 numbers for 3 channels"):
        Pixels.of(config(image_mean=[0.5, 0.5]))


def plain(size, **keys):
    return Pixels.of(config(image_size=size, image_mean=[0.0], image_std=[1.0], **keys))


def drawn(augment, pixels, image, n=200):
    how = Augmented(augment.resolved(pixels.size, digits=False), pixels, seed=1)
    return [how(image, number, 0).numpy() for number in range(n)]


def test_a_resized_crop_is_a_part_of_the_picture():
    # every pixel says where it is: red from the left, green from the top
    h, w = 200, 300
    y, x = np.mgrid[:h, :w] + 0.5
    image = np.stack([x / w, y / h, 0 * x], 2).astype(np.float32)
    pixels = plain(64)
    areas, ratios = [], []
    for made in drawn(Augment(flip=0), pixels, image):
        assert made.shape == (3, 64, 64)
        part_w = (made[0, 32, 62] - made[0, 32, 1]) * w * 64 / 61
        part_h = (made[1, 62, 32] - made[1, 1, 32]) * h * 64 / 61
        # straight, whole and in order
        assert np.ptp(made[0], axis=0).max() < 1e-3 and np.ptp(made[1], axis=1).max() < 1e-3
        assert 0 <= made.min() and made.max() <= 1
        areas.append(part_w * part_h / (h * w))
        ratios.append(part_w / part_h)
    assert 0.07 < min(areas) < 0.15 and 0.75 < max(areas) < 1.02 and 0.35 < np.mean(areas) < 0.6
    assert 0.73 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.36 and abs(np.mean(np.log(ratios))) < 0.05


def test_an_extreme_picture_is_cut_in_the_middle():
    image = np.zeros((4, 1000, 3), np.uint8)
    image[:, 497:502] = 255
    assert all((made == 1).all() for made in drawn(Augment(crop="resized"), plain(32), image, 20))


def test_half_are_mirrored_and_digits_are_not():
    image = np.zeros((32, 32, 1), np.uint8)
    image[:, :16] = 255
    pixels = plain(32, in_channels=1)
    mirrored = [bool(made[0, 0, 31]) for made in drawn(Augment(crop="none"), pixels, image, 400)]
    assert 160 < sum(mirrored) < 240
    assert not any(made[0, 0, 31] for made in drawn(Augment(crop="none", flip=0.0), pixels, image))
    for size, digits, crop, flip in (
        (8, True, "none", 0.0),
        (28, True, "shift", 0.0),
        (32, False, "shift", 0.5),
        (64, False, "resized", 0.5),
    ):
        assert Augment().resolved(size, digits) == Augment(crop=crop, flip=flip)
    examples = images_from("digits", config(n_classes=10, in_channels=1, image_size=8), augment=Augment())
    assert examples.rows.augmented.augment == Augment(crop="none", flip=0.0)


def test_shifts_are_an_eighth_to_any_side():
    image = np.zeros((32, 32, 1), np.uint8)
    image[16, 16] = 255
    seen = {
        tuple(np.argwhere(made[0])[0])
        for made in drawn(Augment(crop="shift", flip=0), plain(32, in_channels=1), image, 1500)
    }
    assert seen == {(y, x) for y in range(12, 21) for x in range(12, 21)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"crop": "random"}, "crop='random': unknown"), ({"flip": 2}, "flip=2: is no share"), ({"erasing": -0.1}, "erasing=-0.1: is no share")],
)  # fmt: skip
def test_changes_that_there_are_not(keys, message):
    with pytest.raises(ValueError, match=message):
        Augment(**keys)


@pytest.mark.skipif(HAS_TIMM, reason="timm is installed")
@pytest.mark.parametrize("keys", [{"rand_augment": "rand-m9"}, {"erasing": 0.25}], ids=str)
def test_what_needs_timm_says_so(keys):
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        Augmented(Augment(crop="none", **keys), plain(32), 0)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        Mixing(n_classes=3, mixup=0.8)


def test_smoothed_labels():
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([2, 0, 3])
    kept = x.clone()
    mixed, soft = Mixing(n_classes=5, smoothing=0.1)(x, labels, 0, 1)
    assert torch.equal(mixed, kept) and torch.equal(soft.argmax(1), labels)
    torch.testing.assert_close(soft.sum(1), torch.ones(3))
    logits = torch.randn(3, 5)
    ours, theirs = (
        torch.nn.functional.cross_entropy(logits, *a) for a in ((soft,), (labels, None, None, -100, None, "mean", 0.1))
    )
    torch.testing.assert_close(ours, theirs)
    for keys in ({"smoothing": 1.0}, {"mixup": -1.0}):
        with pytest.raises(ValueError, match="numbers from 0 are needed"):
            Mixing(n_classes=5, **keys)


@timm
@pytest.mark.parametrize(
    "keys", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}], ids=str
)
def test_mixed_batches_are_timms(keys):
    from hybridzoo.zoo.images.timm_parts import timm_part

    x, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    mixing = Mixing(n_classes=5, **keys)
    seen = set()
    for step in range(6):
        mixed, soft = mixing(x.clone(), labels, 7, step)
        with drawing(7, step):
            judge = timm_part("mixup").Mixup(
                keys.get("mixup", 0.0),
                keys.get("cutmix", 0.0),
                label_smoothing=keys.get("smoothing", 0.0),
                num_classes=5,
            )
            expected = judge(x.clone(), labels)
        torch.testing.assert_close((mixed, soft), expected)
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        again, _ = mixing(x.clone(), labels, 7, step)
        assert torch.equal(mixed, again)
        seen.add(mixed.numpy().tobytes())
    assert len(seen) == 6


@timm
def test_odd_batches_and_rows_that_only_fill_up():
    x, labels = torch.randn(7, 3, 16, 16), torch.arange(7) % 5
    mixing = Mixing(n_classes=5, mixup=0.8)
    mixed, soft = mixing(x.clone(), labels, 0)
    assert torch.equal(mixed[6], x[6]) and soft[6].tolist() == [0, 1, 0, 0, 0] and not torch.equal(mixed[:6], x[:6])
    labels[5:] = -100
    mixed, soft = mixing(x.clone(), labels, 0, padded=True)
    assert torch.equal(mixed[4:], x[4:]) and not torch.equal(mixed[:4], x[:4])
    assert soft.sum(1).tolist() == pytest.approx([1, 1, 1, 1, 1, 0, 0])


@timm
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("keys", [{"rand_augment": "rand-m9-mstd0.5-inc1"}, {"erasing": 1.0}], ids=str)
def test_changes_by_timm_follow_from_the_key(keys, channels):
    pixels, image = plain(64, in_channels=channels), photo(80, 90, channels)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    one, other = (drawn(Augment(**keys), pixels, image, 12) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    plain_ones = drawn(Augment(), pixels, image, 12)
    changed = [not np.array_equal(a, b) for a, b in zip(one, plain_ones, strict=True)]
    assert sum(changed) > (11 if "erasing" in keys else 4)


@timm
def test_a_rand_augment_that_timm_does_not_know():
    with pytest.raises(ValueError, match="rand_augment='augment-m9': is none that timm knows"):
        Augmented(Augment(crop="none", rand_augment="augment-m9"), plain(32), 0)
    with pytest.raises(ValueError, match="takes 5 channels"):
        Augmented(Augment(crop="none", rand_augment="rand-m9"), plain(32, in_channels=5), 0)


def test_a_picture_of_the_size_of_the_model_is_taken_as_it_is():
    image = photo(8, 8, 1)
    pixels = plain(8, in_channels=1)
    assert pixels.fitted(image) is not None and np.array_equal(pixels.fitted(image), image)
    with pytest.raises(DamagedImage, match="is 1 x 3000000 pixels"):
        Pixels.of(config()).fitted(np.zeros((1, 3000000, 3), np.uint8))

"""The adapter of image models: Auto classes, image processor, pipeline, Trainer, other heads; each against the core model or plain torch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo

transformers = pytest.importorskip("transformers")
from hybridzoo.zoo.hf import HybridZooConfig, HybridZooForImageClassification  # noqa: E402
from hybridzoo.zoo.images.pixels import Pixels  # noqa: E402

Auto = transformers.AutoModelForImageClassification
NAMES = ["cat", "dog", "newt"]
CFG = {
    "task": "image_classification", "d_model": 16, "stages": [{"layers": "ss2d mlp"}, {"layers": "ss2d moe"}],
    "mixers": {
        "ss2d": {}, "mlp": {"expand": 2, "gated": False, "bias": True},
        "moe": {"d_intermediate": 8, "num_experts": 2, "top_k": 1},
    },
    "n_classes": 3, "labels": NAMES, "image_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def core():
    torch.manual_seed(0)
    model = zoo.build(CFG).eval()
    model.head.weight.data.mul_(20)
    return model


@pytest.fixture(scope="module")
def folder(core, tmp_path_factory):
    return zoo.save(core, tmp_path_factory.mktemp("saved") / "m")


def pixels(b=2, c=3, size=32):
    return torch.randn(b, c, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_wrapping_shares_the_weights_and_the_keys(core):
    adapter = HybridZooForImageClassification.wrap(core).eval()
    assert set(adapter.state_dict()) == set(core.state_dict()) and adapter.head.weight is core.head.weight
    x, expected = pixels(), core(pixels(), output_hidden_states=True)
    out = adapter(x, output_hidden_states=True)
    assert torch.equal(out.logits, expected.logits) and out.loss is None
    assert len(out.hidden_states) == 5 and all(map(torch.equal, out.hidden_states, expected.hidden_states))
    assert torch.equal(adapter(pixel_values=x, return_dict=False)[0], expected.logits)
    assert adapter.config.hidden_size == 32 and adapter.config.num_hidden_layers == 4
    assert (adapter.config.image_size, adapter.config.num_channels) == (32, 3)


def test_the_loss_is_torchs(core):
    adapter = HybridZooForImageClassification.wrap(core).eval()
    labels = torch.tensor([2, 0])
    out = adapter(pixels(), labels)
    assert torch.allclose(out.loss - adapter.reported[0], F.cross_entropy(out.logits, labels), atol=1e-6)
    soft = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    expected = F.cross_entropy(out.logits, soft)
    assert torch.allclose(adapter(pixels(), soft).loss - adapter.reported[0], expected, atol=1e-6)
    # as the Trainer counts what is not -100: labels, or all of their probabilities
    for given, items in ((labels, 8), (soft, 24)):
        whole = adapter(pixels(), given).loss
        part = adapter(pixels(), given, num_items_in_batch=torch.tensor(items)).loss
        assert torch.allclose(part, whole / 4, atol=1e-6)


REFUSED = {
    "pixel_values: are missing": {"pixel_values": None},
    "output_attentions": {"output_attentions": True},
    "is not an argument of HybridZooForImageClassification": {"bool_masked_pos": torch.ones(1)},
    "expected shape": {"pixel_values": torch.zeros(2, 1, 32, 32)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_cannot_do_is_refused(message, core):
    adapter = HybridZooForImageClassification.wrap(core)
    with pytest.raises(ValueError, match=message):
        adapter(**{"pixel_values": pixels(), **REFUSED[message]})


def test_another_loss_is_refused(core):
    adapter = HybridZooForImageClassification.wrap(core)
    adapter.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="problem_type: is 'multi_label_classification'"):
        adapter(pixels(), torch.ones(2, 3))
    with pytest.raises(ValueError, match="cannot be around a model whose task is 'causal_lm'"):
        HybridZooForImageClassification.wrap(zoo.build("mamba-tiny"))


@torch.no_grad()
def test_auto_classes_read_what_either_has_saved(core, folder, tmp_path):
    HybridZooForImageClassification.wrap(core).save_pretrained(tmp_path)
    expected = core(pixels()).logits
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path))
    for place in (folder, tmp_path):
        got = Auto.from_pretrained(place)
        assert isinstance(got, HybridZooForImageClassification) and torch.equal(got(pixels()).logits, expected)
        assert got.config.id2label == dict(enumerate(NAMES)) and got.config.label2id["newt"] == 2
        assert got.config.num_labels == 3 and got.num_parameters() == core.num_params()
        assert torch.equal(zoo.load(place)(pixels()).logits, expected)
        again = transformers.AutoConfig.from_pretrained(place)
        assert isinstance(again, HybridZooConfig) and again.zoo["labels"] == NAMES
    for name in ("config.yaml", "modeling_hybridzoo.py", "preprocessor_config.json"):
        assert (folder / name).read_text() == (tmp_path / name).read_text()


def test_nothing_needs_to_be_imported_first(folder):
    code = (
        "from transformers import AutoImageProcessor, AutoModelForImageClassification as A\nimport sys\n"
        "assert 'hybridzoo' not in sys.modules\n"
        f"m = A.from_pretrained({str(folder)!r}, trust_remote_code=True)\nprint(type(m).__name__)\n"
        f"print(type(AutoImageProcessor.from_pretrained({str(folder)!r})).__name__)\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")
    assert done.stdout.split() == ["HybridZooForImageClassification", "BitImageProcessorPil"], done.stderr


def test_another_head_as_transformers_asks_for_it(core, folder, tmp_path):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Auto.from_pretrained(folder, num_labels=5)
    names = {"id2label": dict(enumerate("abcde")), "label2id": {name: i for i, name in enumerate("abcde")}}
    for how, labels in (({"num_labels": 5}, None), (names, list("abcde"))):
        got = Auto.from_pretrained(folder, ignore_mismatched_sizes=True, **how)
        assert got.core.cfg.n_classes == 5 and got.core.cfg.labels == labels and got.config.num_labels == 5
        assert got(pixels()).logits.shape == (2, 5)
        assert 0 < got.head.weight.std() < 0.05 and not got.head.bias.any()
        for name, p in core.named_parameters():
            assert name.startswith("head.") or torch.equal(p, got.get_parameter(name))
        got.save_pretrained(tmp_path)
        assert zoo.load(tmp_path).cfg.labels == labels and zoo.load(tmp_path).cfg.n_classes == 5
    renamed = Auto.from_pretrained(folder, id2label={0: "x", 1: "y", 2: "z"})
    assert renamed.core.cfg.labels == ["x", "y", "z"] and torch.equal(renamed.head.weight, core.head.weight)
    with pytest.raises(ValueError, match="id2label: expected a name of its own for every class from 0 to 1"):
        Auto.from_pretrained(folder, id2label={0: "x", 2: "z"}, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="image_size: 64"):
        Auto.from_pretrained(folder, image_size=64)


def test_a_model_without_a_head(tmp_path):
    zoo.save(zoo.build(CFG, ["n_classes=0", "labels=null"]), tmp_path)
    got = Auto.from_pretrained(tmp_path)
    assert got.config.num_labels == 0 and got(pixels()).logits.shape == (2, 32)


def photo(channels):
    image = pytest.importorskip("PIL.Image")
    y, x = np.mgrid[:70, :90]
    colours = np.stack([x * 2, y * 3, (x * y) % 256], -1).astype(np.uint8)
    return image.fromarray(colours if channels == 3 else colours[..., 2])


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_the_processor_beside_a_model_and_its_pipeline(channels, tmp_path):
    torch.manual_seed(0)
    model = zoo.build(CFG, {"in_channels": channels, "image_size": 64}).eval()
    model.head.weight.data.mul_(20)
    zoo.save(model, tmp_path)
    processor, picture = transformers.AutoImageProcessor.from_pretrained(tmp_path), photo(channels)
    got = processor(picture, return_tensors="pt")["pixel_values"]
    array = np.asarray(picture).reshape(70, 90, channels)
    assert np.abs(got[0].numpy() - Pixels.of(model.cfg).evaluated(array)).max() < 1e-5
    pipe = transformers.pipeline("image-classification", model=str(tmp_path))
    # pipelines make pictures colourful
    answers = pipe(picture.convert("RGB"))
    expected = model(got).logits.softmax(-1)[0]
    assert {a["label"]: round(a["score"], 4) for a in answers} == {
        name: round(p, 4) for name, p in zip(NAMES, expected.tolist(), strict=True)
    }
    processor.save_pretrained(tmp_path)
    assert type(transformers.AutoImageProcessor.from_pretrained(tmp_path)) is type(processor)


def test_a_deep_grey_picture_is_the_same_in_8_bits(tmp_path):
    image = pytest.importorskip("PIL.Image")
    zoo.save(zoo.build(CFG, {"in_channels": 1, "image_size": 64}), tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    grey = np.asarray(photo(1))
    deep, shallow = (processor(image.fromarray(a), return_tensors="pt") for a in (grey.astype(np.uint16) * 257, grey))
    assert torch.equal(deep["pixel_values"], shallow["pixel_values"])
    given = processor(torch.from_numpy(grey)[None], return_tensors="pt", input_data_format="channels_first")
    assert torch.equal(given["pixel_values"], shallow["pixel_values"])


def test_another_tasks_auto_class_is_refused(folder):
    message = (
        r"HybridZooForCausalLM: cannot be around .* task is 'image_classification'. Use HybridZooForImageClassification"
    )
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_the_trainer_trains_evaluates_saves_and_loads(folder, tmp_path):
    torch.manual_seed(0)
    x, y = pixels(24, 3, 16), torch.arange(24) % 3
    x += y[:, None, None, None] * 2.0 - 2
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(x, y, strict=True)]
    model = Auto.from_pretrained(folder, num_labels=3)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_steps=20, logging_steps=10, gradient_checkpointing=True, label_smoothing_factor=0.1, disable_tqdm=True,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.7 * before
    back, predicted = zoo.load(tmp_path / "checkpoint-20"), trainer.predict(rows).predictions
    with torch.no_grad():
        torch.testing.assert_close(back(x).logits, torch.tensor(predicted), atol=1e-5, rtol=1e-5)

"""Training on images on a GPU: the recorded step is the step, to the bit, and a run goes on as if it had not stopped."""

import numpy as np
import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.train.captured_step import why_not_captured

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
OVERRIDES = ["d_model=32", "drop_path=0.3", "n_classes=4"]
MEASURED = ("seconds", "images_per_second", "memory_GiB", "mfu")


@pytest.fixture(autouse=True)
def _one_way(monkeypatch):
    # cuDNN's other convolutions add up in any order, eager or not
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def made():
    torch.manual_seed(0)
    return zoo.build("vmamba-micro", OVERRIDES, device="cuda").train()


def batches(count, soft):
    torch.manual_seed(1)
    for _ in range(count):
        x = torch.randn(16, 1, 8, 8, device="cuda")
        y = torch.rand(16, 4, device="cuda").softmax(1) if soft else torch.randint(0, 4, (16,), device="cuda")
        yield x, y


def trained(model, step, soft):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    torch.manual_seed(2)
    for x, y in list(batches(5, soft)):
        losses.append(step(x, y))
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("soft", [False, True], ids=["numbers", "mixed"])
def test_a_recorded_step_is_the_step_to_the_bit(soft):
    model, twin = made(), made()
    x, y = next(batches(1, soft))
    assert why_not_captured(model, BF16) is None
    before = torch.cuda.get_rng_state()
    captured = zoo.CapturedStep(model, torch.zeros_like(x), torch.zeros_like(y), num_items=True, autocast=BF16)
    # what recording draws, the steps that follow do not miss
    assert torch.equal(before, torch.cuda.get_rng_state())
    items = torch.tensor(16, device="cuda")

    def plain(x, y):
        with torch.autocast("cuda", BF16):
            loss = twin(x, y, num_items=items).loss
        loss.backward()
        return loss.detach()

    got = trained(model, lambda x, y: captured(x, y, num_items=items), soft)
    want = trained(twin, plain, soft)
    # stochastic depth draws other rows in every step
    assert len({loss.item() for loss in got[:5]}) == 5
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_a_recorded_step_is_not_given_is_said():
    x, y = next(batches(1, False))
    with pytest.raises(ValueError, match="labels: are missing, and pixel_values are none"):
        zoo.CapturedStep(made(), x)
    captured = zoo.CapturedStep(made(), x, y, autocast=BF16)
    with pytest.raises(
        ValueError, match=r"pixel_values: shape \(8, 1, 8, 8\), but the step was recorded with \(16, 1, 8, 8\)"
    ):
        captured(x[:8], y[:8])
    model = made()
    model.gradient_checkpointing_enable()
    with pytest.raises(
        ValueError, match=r"there is stochastic depth, backbone\.layers\.2 for one, and gradient checkpointing"
    ):
        zoo.CapturedStep(model, x, y, autocast=BF16)


def data():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    images = rng.random((40, 8, 8)).astype(np.float32) * 0.5
    for image, label in zip(images, labels, strict=True):
        image[2 * label] = 1.0
    return images, labels


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "ema": 0.5}], ids=["plain", "more"])
def test_a_recorded_training_is_the_eager_one(tmp_path, capsys, train_until, options):
    # 40 images in batches of 16: the last one of a pass is short, and filled up
    settings = {
        "steps": 9,
        "batch_size": 16,
        "save_every": 3,
        "report_to": "none",
        "overrides": OVERRIDES,
        "device": "cuda",
    } | options
    results = {how: zoo.train("vmamba-micro", data(), tmp_path / how, capture=how, **settings) for how in ("on", "off")}
    err = capsys.readouterr().err
    assert "step: captured" in err and "step: eager, because capture is off" in err
    logs = [[{k: v for k, v in e.items() if k not in MEASURED} for e in r.history] for r in results.values()]
    # a batch that is filled up draws for all of its rows
    assert logs[0][:2] == logs[1][:2]
    train_until(4, "vmamba-micro", data(), tmp_path / "cut", capture="on", **settings)
    resumed = zoo.train("vmamba-micro", data(), tmp_path / "cut", capture="on", **settings)
    assert resumed.resumed_from == 3
    assert [{k: v for k, v in e.items() if k not in MEASURED} for e in resumed.history] == logs[0]
    for p, q in zip(resumed.model.parameters(), results["on"].model.parameters(), strict=True):
        assert torch.equal(p, q)

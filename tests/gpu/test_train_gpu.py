"""Training on a device: what is not finite is noticed without waiting for every step, and the weights stay those before it."""

import json

import numpy as np
import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.digests import digest_weights
from hybridzoo.zoo.train.loop import ZooTrainer
from hybridzoo.zoo.train.run import Diverged, OutOfMemory, train

pytestmark = pytest.mark.gpu
ROWS = np.random.default_rng(0).integers(1, 200, (40, 64))
SETTINGS = {"batch_size": 2, "lr": 1e-3, "report_to": "none"}


def seldom(monkeypatch, **steps):
    """Log, and save, as often as is said here."""

    class Seldom(ZooTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for name, value in steps.items():
                setattr(self.args, name, value)

    monkeypatch.setattr("hybridzoo.zoo.train.run.ZooTrainer", Seldom)


def spoiled_at_6(model, out, monkeypatch, **options):
    """The error of a training whose sixth step meets a weight that is too large, and the weights after every step."""
    seldom(monkeypatch, logging_steps=4, save_steps=4)
    seen = []

    def on_step(step, loss):
        if step == 5:
            with torch.no_grad():
                model.get_parameter("backbone.layers.1.mixer.fc1.weight").fill_(3e38)
        seen.append(digest_weights(model))

    with pytest.raises(Diverged) as e:
        train(model, ROWS, out, steps=12, on_step=on_step, **SETTINGS, **options)
    return e.value, [*seen, digest_weights(model)]


def test_a_run_stops_at_the_first_step_that_is_not_finite(tmp_path, monkeypatch):
    error, seen = spoiled_at_6(zoo.build("jamba-tiny"), tmp_path, monkeypatch)
    assert error.step == 6 and "backbone.layers.1.mixer" in error.where
    assert len(seen) == 9 and len(set(seen[4:])) == 1


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"document {i}: {'abcdefgh'[i % 8] * (5 + 13 * i % 90)}"}) for i in range(400)]
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize("packed", [False, True], ids=["table", "packed"])
@pytest.mark.parametrize(
    "options", [{}, {"capture": "off"}, {"optimizer": "muon"}, {"accumulate": 2}, {"clip": 0}], ids=str
)
def test_steps_wait_for_the_device_only_where_something_is_logged(tmp_path, monkeypatch, text, options, packed):
    seldom(monkeypatch, logging_steps=100)
    done, data = [], {"data": text, "length": 64} if packed else {"data": ROWS}

    def on_step(step, loss):
        # all that is done once has been done; reading, forward, backward, optimiser and rate of five whole steps
        torch.cuda.set_sync_debug_mode("error" if 20 <= step < 25 else "default")
        done.append(step)

    try:
        train(
            "mamba-tiny", out=tmp_path / "out", steps=30, save_every=30, on_step=on_step, **data, **SETTINGS | options
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(done) == 30


def losses(result):
    return [entry["loss"] for entry in result.history]


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny", "transformer-tiny", "jamba-tiny"])
@pytest.mark.parametrize("packed", [False, True], ids=["table", "packed"])
def test_by_default_steps_are_recorded_in_half_precision_and_are_the_same(tmp_path, capsys, text, name, packed):
    if torch.cuda.get_device_capability() < (9, 0) and name == "jamba-tiny":
        pytest.skip("experts are recorded on compute capability 9.0")
    data = {"data": text, "length": 64} if packed else {"data": ROWS}
    taken = train(name, out=tmp_path / "a", steps=12, **data, **SETTINGS)
    assert "step: captured" in capsys.readouterr().err
    eager = train(name, out=tmp_path / "b", steps=12, capture="off", **data, **SETTINGS)
    assert "step: eager, because capture is off" in capsys.readouterr().err
    assert losses(taken) == losses(eager) and len(set(losses(taken))) == 12
    full = train(name, out=tmp_path / "c", steps=12, precision="float32", capture="off", **data, **SETTINGS)
    assert losses(full) != losses(eager) and losses(full) == pytest.approx(losses(eager), rel=3e-2)


def test_a_recorded_step_in_parts_and_with_short_batches_is_the_step(tmp_path):
    rows, settings = ROWS[:7], SETTINGS | {"precision": "float32", "steps": 8}
    whole = train("mamba-tiny", rows, tmp_path / "a", **settings | {"batch_size": 4, "capture": "off"})
    taken = train("mamba-tiny", rows, tmp_path / "b", **settings | {"batch_size": 4, "capture": "on"})
    parts = train("mamba-tiny", rows, tmp_path / "c", **settings | {"accumulate": 2, "capture": "on"})
    assert losses(taken) == pytest.approx(losses(whole), rel=1e-5) and losses(parts) == pytest.approx(
        losses(whole), rel=1e-5
    )


def test_experts_are_balanced_over_the_parts_of_a_recorded_step(tmp_path):
    change, settings = ["mixers.moe.aux_loss_coef=0.5"], SETTINGS | {"steps": 6}
    whole = train(
        "jamba-tiny", ROWS, tmp_path / "a", overrides=change, **settings | {"batch_size": 4, "capture": "off"}
    )
    taken = train("jamba-tiny", ROWS, tmp_path / "b", overrides=change, **settings | {"accumulate": 2})
    eager = train(
        "jamba-tiny", ROWS, tmp_path / "c", overrides=change, **settings | {"accumulate": 2, "capture": "off"}
    )
    assert losses(taken) == losses(eager) and losses(taken) == pytest.approx(losses(whole), rel=5e-3)


def test_a_recorded_run_resumes_as_if_it_had_not_stopped(tmp_path, train_until):
    settings = SETTINGS | {"steps": 12, "save_every": 4, "val": ROWS[:5], "optimizer": "muon"}
    whole = train("mamba-tiny", ROWS, tmp_path / "whole", **settings)
    train_until(7, "mamba-tiny", ROWS, tmp_path / "cut", **settings)
    resumed = train("mamba-tiny", ROWS, tmp_path / "cut", **settings)
    assert resumed.resumed_from == 4 and losses(resumed) == losses(whole)
    assert resumed.best == whole.best and digest_weights(resumed.model) == digest_weights(whole.model)


def test_muon_takes_no_step_that_is_not_finite(tmp_path, monkeypatch):
    error, seen = spoiled_at_6(zoo.build("transformer-tiny"), tmp_path, monkeypatch, optimizer="muon")
    assert error.step == 6 and len(set(seen[4:])) == 1


def test_a_device_that_is_full_is_one_error(tmp_path):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
    try:
        with pytest.raises(
            OutOfMemory,
            match=r"cuda:0: out of memory \(.* GiB held\), with batch_size=64 rows .*Use batch_size=32 with",
        ) as e:
            train("mamba-tiny", np.ones((64, 8192), np.int64), tmp_path, steps=2, **SETTINGS | {"batch_size": 64})
        assert "There is no checkpoint yet." in str(e.value)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

"""Training on a device: what is not finite is noticed without waiting for every step, and the weights stay those before it."""

import numpy as np
import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.train.digests import digest_weights
from hybridzoo.zoo.train.loop import ZooTrainer
from hybridzoo.zoo.train.run import Diverged, train

pytestmark = pytest.mark.gpu
ROWS = np.random.default_rng(0).integers(1, 200, (40, 64))
SETTINGS = {"batch_size": 2, "lr": 1e-3, "report_to": "none"}


def test_a_run_stops_at_the_first_step_that_is_not_finite(tmp_path, monkeypatch):
    class Seldom(ZooTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.args.logging_steps, self.args.save_steps = 4, 4

    monkeypatch.setattr("hybridzoo.zoo.train.run.ZooTrainer", Seldom)
    model, seen = zoo.build("jamba-tiny"), []

    def on_step(step, loss):
        if step == 5:
            with torch.no_grad():
                model.get_parameter("backbone.layers.1.mixer.fc1.weight").fill_(3e38)
        seen.append(digest_weights(model))

    with pytest.raises(Diverged) as e:
        train(model, ROWS, tmp_path, steps=12, on_step=on_step, **SETTINGS)
    assert e.value.step == 6 and "backbone.layers.1.mixer" in e.value.where
    assert len(seen) == 8 and len(set(seen[4:])) == 1 == len({digest_weights(model), seen[4]})


def test_steps_wait_for_the_device_only_where_something_is_logged(tmp_path, monkeypatch):
    class Seldom(ZooTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.args.logging_steps = 100

        def _clip_grad_norm(self, model):
            if self.state.global_step == 20:  # all that is done once has been done
                torch.cuda.set_sync_debug_mode("error")
            return super()._clip_grad_norm(model)

    monkeypatch.setattr("hybridzoo.zoo.train.run.ZooTrainer", Seldom)
    done = []

    def on_step(step, loss):
        torch.cuda.set_sync_debug_mode("default")
        done.append(step)

    try:
        train("mamba-tiny", ROWS, tmp_path, steps=30, save_every=30, on_step=on_step, **SETTINGS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(done) == 30

"""A loss that rises for good stops a training: where, at what, and with the checkpoint of before."""

import json

import numpy as np
import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.digests import digest_weights
from hybridzoo.zoo.train.loop import ZooTrainer
from hybridzoo.zoo.train.run import Diverged, train
from hybridzoo.zoo.train.watch import Told, Watch

SMALL = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2", "layers=attention mlp"]
SETTINGS = {"steps": 30, "batch_size": 2, "save_every": 2, "lr": 1e-2, "seed": 3, "report_to": "none", "device": "cpu"}
ROWS = np.random.default_rng(0).integers(1, 200, (9, 12))


def watched(losses, spike=2.0, watch=None):
    """What a watch tells after some losses."""
    watch = watch or Watch(torch.device("cpu"), spike)
    for loss in losses:
        watch.read(torch.tensor([0]), torch.tensor(loss))
        watch.differentiated(torch.tensor(1.0))
    return watch, Told(**{name: float(x) for name, x in watch.tell(False).items()})


def expected(losses):
    """The running mean, by a plain loop."""
    means = []
    for loss in losses:
        means.append(loss if not means else 0.9 * means[-1] + 0.1 * loss)
    return means


def test_the_mean_its_lowest_and_the_first_step_that_is_too_high():
    losses = [5.0, 4.0, 3.0, 3.5, 6.0, 12.0, 12.0, 12.0, 12.0]
    means = expected(losses)
    first = next(i for i, mean in enumerate(means) if mean > min(means[: i + 1]) + 2)
    assert 5 < first < 8
    for n in range(1, len(losses) + 1):
        watch, told = watched(losses[:n])
        low = min(means[:n])
        # behind a step that was not taken, nothing moves
        assert told.mean == pytest.approx(means[min(n - 1, first)]) and told.lowest == pytest.approx(low)
        assert told.lowest_at == 1 + means.index(low)
        assert told.bad == (n > first) and told.good == min(n, first)
        rising = means[n - 1] > low + 0.5
        assert watch.risen_since([told]) == (int(told.lowest_at) if rising else None)


def test_one_bad_batch_is_no_spike_and_none_is_minded_where_nobody_wants():
    assert not watched([3.0] * 10 + [15.0] + [3.0] * 10)[1].bad
    assert not watched([3.0, 1e6, 1e6], spike=0)[1].bad
    assert watched([3.0, float("nan")], spike=0)[1].bad


def test_a_watch_goes_on_where_an_earlier_one_was():
    losses = [5.0, 4.1, 3.3, 3.5, 3.9, 4.2]
    _, whole = watched(losses)
    first, told = watched(losses[:3])
    start = json.loads(json.dumps(first.kept(told)))
    second = Watch(torch.device("cpu"), 2.0, tuple(start), step=3)
    assert watched(losses[3:], watch=second)[1].__dict__ | {"good": 0} == whole.__dict__ | {"good": 0}
    assert first.kept(told)[1:] and Watch(torch.device("cpu")).kept(told) == [told.total]


def broken(model, step):
    """Spoil the model after a step: finite, and wrong."""

    def on_step(done, loss):
        if done == step:
            with torch.no_grad():
                model.get_parameter("backbone.norm_f.weight").mul_(60)

    return on_step


@pytest.mark.parametrize("asks_at_once", [True, False], ids=["at once", "on a device"])
def test_a_run_stops_where_its_loss_has_risen(tmp_path, monkeypatch, asks_at_once):
    class Seldom(ZooTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.asks_at_once = asks_at_once
            if not asks_at_once:
                self.args.logging_steps, self.args.save_steps = 5, 5

    monkeypatch.setattr("hybridzoo.zoo.train.run.ZooTrainer", Seldom)
    model = zoo.build(config := zoo.config("transformer-tiny", SMALL))
    spoil, seen = broken(model, 10), []

    def on_step(done, loss):
        spoil(done, loss)
        seen.append(digest_weights(model))

    with pytest.raises(
        Diverged, match=r"its mean over some ten steps [\d.]+, more than 2 above the [\d.]+ of step \d+; rows"
    ) as e:
        train(model, ROWS, tmp_path, on_step=on_step, **SETTINGS | {"lr": 1e-4})
    error = e.value
    assert 10 < error.step <= 18 and len(error.rows) == 2 and "\n" not in str(error)
    assert error.where.startswith("the gradient of ") and ", of norm " in error.where
    name = error.where.removeprefix("the gradient of ").split(",")[0]
    assert "Try a lower lr (it is 0.0001) or a longer warm-up" in str(error) and "--spike 0" in str(error)
    # the step was not taken, and neither was one behind it
    assert len(set(seen[error.step - 1 :])) <= 1 and digest_weights(model) == seen[error.step - 2]
    # what is named has the largest gradient, by another way
    ids = torch.from_numpy(ROWS[list(error.rows)])
    model.train()(ids, labels=ids).loss.backward()
    norms = {n: float(p.grad.norm()) for n, p in model.named_parameters()}
    assert max(norms, key=norms.get) == name and f"of norm {norms[name]:.3g} of" in error.where
    assert not (tmp_path / "model.safetensors").exists() and config.d_model == 16


def test_the_checkpoint_of_before_a_rise_is_kept_while_it_rises(tmp_path):
    model = zoo.build(zoo.config("transformer-tiny", SMALL))
    settings = SETTINGS | {"lr": 1e-4, "spike": 4.0, "save_every": 1}
    with pytest.raises(Diverged) as e:
        train(model, ROWS, tmp_path, on_step=broken(model, 10), **settings)
    step = e.value.step
    assert step >= 14
    kept = sorted(int(f.name.split("-")[1]) for f in (tmp_path / "checkpoints").iterdir())
    assert kept[-2:] == [step - 2, step - 1] and kept[0] <= 10 and len(kept) == 3
    assert f"Checkpoint {kept[0]} in" in str(e.value)
    # and it can be started from
    assert (
        train(
            tmp_path / "checkpoints" / f"checkpoint-{kept[0]}", ROWS, tmp_path / "b", **SETTINGS | {"steps": 2}
        ).tokens
        == 48
    )


def test_a_rise_that_nobody_minds_is_trained_through(tmp_path):
    model = zoo.build(zoo.config("transformer-tiny", SMALL))
    result = train(model, ROWS, tmp_path, on_step=broken(model, 10), **SETTINGS | {"lr": 1e-4, "spike": 0})
    assert result.history[-1]["step"] == 30 and max(entry["loss"] for entry in result.history) > 8


def test_a_run_that_stopped_for_a_rise_stops_at_the_same_step_when_it_is_resumed(tmp_path):
    # a rate so high that the loss rises by itself
    settings = SETTINGS | {"lr": 3.0, "warmup": 12, "weight_decay": 0.0, "save_every": 3}
    found = []
    for _ in range(2):
        with pytest.raises(Diverged) as e:
            train(zoo.config("transformer-tiny", SMALL), ROWS, tmp_path, **settings)
        found.append((e.value.step, e.value.rows, e.value.where, str(e.value).split(";")[0]))
    assert found[0] == found[1] and found[0][0] > 3

"""Trackers: named, checked before anything is built, one run of theirs for a run of ours, ended however ours ends."""

import json
import os
import signal
import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from transformers import TrainerCallback

import hybridzoo as zoo
from hybridzoo.zoo.terminal import _message
from hybridzoo.zoo.train.options import TrainOptions, tracker_names
from hybridzoo.zoo.train.run import Interrupted, train

SETTINGS = {"steps": 6, "batch_size": 2, "save_every": 2, "lr": 1e-2, "seed": 3, "device": "cpu"}
ROWS = np.random.default_rng(0).integers(1, 200, (9, 12))


def config():
    small = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2", "layers=attention mlp"]
    return zoo.config("transformer-tiny", small)


def stopping_after(step, how):
    def on_step(done, loss):
        if done == step:
            how()

    return on_step


def fail():
    raise RuntimeError("the power is gone")


def module(name, **content):
    found = types.ModuleType(name)
    found.__spec__ = ModuleSpec(name, None, origin="here")
    vars(found).update(content)
    return found


class Callback(TrainerCallback):
    """Stands for one of transformers', which log to the run that is there."""

    logged: list

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, sorted(logs)))


@pytest.fixture
def wandb(monkeypatch):
    """A wandb whose runs are kept in ``begun``, with the exit status that they ended with."""
    fake = module(
        "wandb", run=None, begun=[], errors=module("wandb.errors", UsageError=type("UsageError", (Exception,), {}))
    )

    def init(**options):
        fake.run = types.SimpleNamespace(id=options["id"] or f"run{len(fake.begun)}", options=options, ended=None)
        fake.run.finish = lambda exit_code: (setattr(fake.begun[-1], "ended", exit_code), setattr(fake, "run", None))
        fake.begun.append(fake.run)
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.logged = []
    monkeypatch.setattr(
        "transformers.integrations.WandbCallback", type("WandbCallback", (Callback,), {"logged": fake.logged})
    )
    return fake


def test_names_are_checked_before_anything_is_built(monkeypatch):
    assert tracker_names("wandb, mlflow,wandb") == ["wandb", "mlflow"] and tracker_names("none") == []
    with pytest.raises(
        ValueError, match=r"report_to='wandb,mlflw': is not known. Did you mean 'mlflow'\? Known: tensorboard, wandb"
    ):
        TrainOptions(report_to="wandb,mlflw")
    with pytest.raises(ValueError, match="names none and others"):
        TrainOptions(report_to="none,tensorboard")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install mlflow, or leave it out of report_to='mlflow'") as e:
        TrainOptions(report_to="mlflow")
    assert _message(e.value) == "this command needs mlflow. Install it with: pip install mlflow"
    # what is logged into a folder `wandb` makes it no package
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        TrainOptions(report_to="wandb")


def test_a_resumed_run_goes_on_in_the_same_run_of_a_tracker(tmp_path, wandb):
    out = tmp_path / "mine"
    with pytest.raises(RuntimeError, match="power"):
        train(config(), ROWS, out, on_step=stopping_after(3, fail), report_to="wandb", **SETTINGS)
    assert json.loads((out / "trackers.json").read_text()) == {"wandb": "run0"}
    train(config(), ROWS, out, report_to="wandb", **SETTINGS)
    first, second = wandb.begun
    assert (first.id, first.ended, second.id, second.ended) == ("run0", 1, "run0", 0)
    assert first.options == {"project": "hybridzoo", "name": "mine", "dir": str(out), "id": None, "resume": None}
    assert second.options["resume"] == "allow" and wandb.run is None
    steps = [step for step, keys in wandb.logged if "loss" in keys]
    assert steps == [1, 2, 3, 4, 5, 6] and "tokens_per_second" in dict(wandb.logged[:2])[2]
    # another run in the same folder is another one there
    train(config(), ROWS, out, report_to="wandb", resume=False, **SETTINGS)
    assert wandb.begun[2].id == "run2" and json.loads((out / "trackers.json").read_text()) == {"wandb": "run2"}


def test_a_run_of_the_callers_is_used_and_not_ended(tmp_path, wandb):
    wandb.run = object()
    train(config(), ROWS, tmp_path, report_to="wandb", **SETTINGS)
    assert not wandb.begun and wandb.run is not None and wandb.logged and not (tmp_path / "trackers.json").exists()


def test_ctrl_c_ends_the_run_of_a_tracker_too(tmp_path, wandb):
    stop = stopping_after(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        train(config(), ROWS, tmp_path, on_step=stop, report_to="wandb", **SETTINGS)
    assert [run.ended for run in wandb.begun] == [1]


def test_who_is_not_known_to_wandb_is_told_what_to_do(tmp_path, wandb, monkeypatch):
    def init(**options):
        raise wandb.errors.UsageError("api_key not configured (no-tty).")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match=r"report_to='wandb': api_key not configured \(no-tty\). Run `wandb login`"):
        train(config(), ROWS, tmp_path, report_to="wandb", **SETTINGS)


def test_wandb_itself_keeps_everything_here_when_told(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "mine"
    with pytest.raises(RuntimeError, match="power"):
        train(config(), ROWS, out, on_step=stopping_after(3, fail), report_to="wandb", **SETTINGS)
    assert wandb.run is None
    train(config(), ROWS, out, report_to="wandb", **SETTINGS)
    known = json.loads((out / "trackers.json").read_text())["wandb"]
    folders = sorted(folder.name for folder in (out / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.endswith(known) for folder in folders)


def test_mlflow_itself_has_one_run_with_every_step(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    out = tmp_path / "mine"
    with pytest.raises(RuntimeError, match="power"):
        train(config(), ROWS, out, on_step=stopping_after(3, fail), report_to="mlflow,tensorboard", **SETTINGS)
    known = json.loads((out / "trackers.json").read_text())["mlflow"]
    assert mlflow.get_run(known).info.status == "FAILED"
    # another interval of saving is another parameter, which MLflow would refuse
    result = train(config(), ROWS, out, report_to="mlflow,tensorboard", **SETTINGS | {"save_every": 3})
    run = mlflow.get_run(known)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mine") and run.data.params["save_steps"] == "2"
    logged = mlflow.MlflowClient().get_metric_history(known, "loss")
    assert [(m.step, m.value) for m in logged] == [(int(e["step"]), e["loss"]) for e in result.history]
    assert mlflow.active_run() is None and len(mlflow.search_runs()) == 1

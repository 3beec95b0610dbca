"""What a run leaves in its folder: kept apart, resumed as if never stopped, and never worse than it was."""

import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import CheckpointError
from hybridzoo.zoo.digests import digest_file, digest_weights
from hybridzoo.zoo.train.loop import ZooTrainer
from hybridzoo.zoo.train.manifest import manifest_of
from hybridzoo.zoo.train.options import TrainOptions, default_out, holds_weights
from hybridzoo.zoo.train.run import DifferentRun, Diverged, Interrupted, train

SMALL = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2", "layers=attention mlp"]
MEASURED = {"seconds", "tokens_per_second", "mfu", "memory_GiB"}  # no two runs are equally fast
SETTINGS = {"steps": 6, "batch_size": 2, "save_every": 2, "lr": 1e-2, "seed": 3, "report_to": "none", "device": "cpu"}
ROWS = np.random.default_rng(0).integers(1, 200, (9, 12))


def config():
    return zoo.config("transformer-tiny", SMALL)


def facts(result):
    return [{k: v for k, v in entry.items() if k not in MEASURED} for entry in result.history], digest_weights(
        result.model
    )


class Stop(Exception):
    pass


def stopping_after(step):
    def on_step(done, loss):
        if done == step:
            raise Stop

    return on_step


def begun(out, step, **changes):
    """A run that stopped after a step."""
    with pytest.raises(Stop):
        train(config(), ROWS, out, on_step=stopping_after(step), **SETTINGS | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return facts(train(config(), ROWS, tmp_path_factory.mktemp("whole"), **SETTINGS))


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run of which the checkpoints of steps 2 and 4 are there."""
    out = tmp_path_factory.mktemp("begun")
    begun(out, 5)
    return out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_killed_at_any_operation_ends_as_if_it_had_not_been(tmp_path):
    # all operations are tried by hand: python tests/killed.py
    spec = importlib.util.spec_from_file_location("killed", Path(__file__).parent / "killed.py")
    killed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(killed)
    assert killed.run(tmp_path / "whole", tmp_path / "whole.json") == 0
    operations = json.loads((tmp_path / "whole.json").read_text())["operations"]
    published = [i for i, name in enumerate(operations, 1) if name.startswith("os.rename checkpoint-")]
    last = published[-1]
    points = {
        "half of a checkpoint's weights": operations.index("half of model.safetensors", published[0]) + 1,
        "while an old checkpoint is deleted": last + 4,
        "after the last checkpoint": (last + len(operations)) // 2,
        "before the log says so": len(operations) - 2,
    }
    for where, point in points.items():
        out, report = tmp_path / f"cut{point}", tmp_path / f"cut{point}.json"
        assert killed.run(out, last=point) == 9, where
        assert killed.run(out, report) == 0, where
        assert killed.outcome(report) == killed.outcome(tmp_path / "whole.json"), where
        assert not killed.leftovers(out), where


def test_a_logged_loss_counts_the_steps_before_a_stop(tmp_path, monkeypatch):
    class Seldom(ZooTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.args.logging_steps = 5

    monkeypatch.setattr("hybridzoo.zoo.train.run.ZooTrainer", Seldom)
    expected = facts(train(config(), ROWS, tmp_path / "whole", **SETTINGS))
    begun(tmp_path / "cut", 4)
    resumed = train(config(), ROWS, tmp_path / "cut", **SETTINGS)
    # step 6 is the last one, and logged for that
    assert resumed.resumed_from == 2 and [entry["step"] for entry in resumed.history] == [5, 6]
    assert facts(resumed) == expected


@pytest.mark.parametrize("every", [1, 2])
def test_what_a_device_does_meanwhile_changes_nothing_of_what_is_logged(tmp_path, monkeypatch, every):
    class Device(ZooTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.asks_at_once, self.args.logging_steps = False, every

    class Host(ZooTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.args.logging_steps = every

    def on_step(done, loss):
        if done in known:
            known[done].append(loss)
        if done == stop:
            raise Stop

    mixed = zoo.config("jamba-tiny", ["layers=mamba moe attention moe"])
    # steps that are not saved are logged while the next one is under way, and known to who asks after it
    settings, known, stop = (
        SETTINGS | {"steps": 9, "save_every": 4, "batch_size": 1, "accumulate": 2},
        {3: [], 8: []},
        0,
    )
    monkeypatch.setattr("hybridzoo.zoo.train.run.ZooTrainer", Host)
    host = train(mixed, ROWS, tmp_path / "host", on_step=on_step, **settings)
    monkeypatch.setattr("hybridzoo.zoo.train.run.ZooTrainer", Device)
    device = train(mixed, ROWS, tmp_path / "device", on_step=on_step, **settings)
    assert facts(device) == facts(host) and list(facts(device)[0][0])[:4] == [
        "loss",
        "grad_norm",
        "learning_rate",
        "aux_loss",
    ]
    assert [entry["step"] for entry in device.history] == [*range(every, 10, every), *([9] if every == 2 else [])]
    assert all(before == later for before, later in known.values())
    stop = 7
    with pytest.raises(Stop):
        train(mixed, ROWS, tmp_path / "cut", on_step=on_step, **settings)
    resumed = train(mixed, ROWS, tmp_path / "cut", **settings)
    assert resumed.resumed_from == 4 and facts(resumed) == facts(host)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_and_ctrl_c_again_does_not_wait_for_it(tmp_path, whole, times):
    def on_step(step, loss):
        if step == 5:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"step {(5, 4)[times - 1]} of 6 is saved in") as e:
        train(config(), ROWS, tmp_path, on_step=on_step, **SETTINGS)
    assert signal.getsignal(signal.SIGINT) is before and e.value.folder == tmp_path
    resumed = train(config(), ROWS, tmp_path, **SETTINGS)
    assert resumed.resumed_from == e.value.step and facts(resumed) == whole


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


def turned(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x80  # a sign, in the last number of a safetensors file
    file.write_bytes(content)


def renamed(file):
    save_file({f"x.{name}": value for name, value in load_file(file).items()}, file)


DAMAGE = {
    "cut weights": ("model.safetensors", cut, "bytes, and"),
    "another sign": ("model.safetensors", turned, "digest differs"),
    "other names": ("model.safetensors", renamed, "were written|digest differs"),
    "no optimiser": ("optimizer.pt", Path.unlink, "is missing"),
    "no state": ("trainer_state.json", lambda f: f.write_text("{"), "were written"),
    "no manifest": ("zoo.json", Path.unlink, "has no zoo.json"),
    "no JSON": ("zoo.json", lambda f: f.write_text("[]"), "is not as it was written"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_kept_and_passed_over(tmp_path, unfinished, whole, damage, capsys):
    name, spoil, message = DAMAGE[damage]
    out = tmp_path / "run"
    shutil.copytree(unfinished, out)
    spoil(out / "checkpoints" / "checkpoint-4" / name)
    resumed = train(config(), ROWS, out, **SETTINGS)
    said = capsys.readouterr().err
    assert resumed.resumed_from == 2 and facts(resumed) == whole
    assert "checkpoint-4" in said and "going on from checkpoint-2" in said
    assert any(re.search(message, line) for line in said.splitlines())
    assert len(list((out / "checkpoints").glob("damaged-checkpoint-4-*"))) == 1


class Runs:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def repacked(file):
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def edited(**changes):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# what somebody else's run may hold, with digests that fit
FOREIGN = {
    "code": ("optimizer.pt", lambda f: torch.save({"a": Runs(os.mkdir, ("ran",))}, f), "wants to run code"),
    "code of random states": ("rng_state.pth", lambda f: torch.save(Runs(os.mkdir, ("ran",)), f), "wants to run code"),
    "plain pickle": ("scheduler.pt", lambda f: f.write_bytes(pickle.dumps(Runs(os.mkdir, ("ran",)))), "wants to run code"),
    "memory": ("scheduler.pt", lambda f: torch.save({"a": Runs(bytearray, (10**11,))}, f), "wants to run code"),
    "compressed": ("optimizer.pt", repacked, "is compressed"),
    "one number for many": ("optimizer.pt", lambda f: torch.save([torch.zeros(1).expand(10**9)], f), "more numbers than the file"),
    "another step": ("trainer_state.json", edited(global_step=10**9), "is not as transformers writes it"),
    "no history": ("trainer_state.json", edited(log_history="none"), "is not as transformers writes it"),
    "no state": ("trainer_state.json", lambda f: f.write_text("[" * 100_000), "is not as transformers writes it"),
    "another settings": ("zoo.json", edited(settings=[]), "is not as it was written"),
    "for ever": ("zoo.json", edited(seconds=1e300), "is not as it was written"),
    "outside": ("zoo.json", edited(files={"../../train.json": [1, "a"]}), "is not in the folder"),
    "nested": ("zoo.json", edited(more=json.loads("[" * 500 + "]" * 500)), "is nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN)
def test_a_run_of_somebody_else_runs_nothing_and_takes_no_memory(tmp_path, unfinished, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    name, spoil, message = FOREIGN[content]
    checkpoint = shutil.copytree(unfinished / "checkpoints" / "checkpoint-4", tmp_path / "checkpoint-4")
    spoil(checkpoint / name)
    if name != "zoo.json":
        files = json.loads((checkpoint / "zoo.json").read_text())["files"]
        files[name] = [(checkpoint / name).stat().st_size, digest_file(checkpoint / name)]
        edited(files=files)(checkpoint / "zoo.json")
    with pytest.raises(CheckpointError, match=message):
        manifest_of(checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("history", [[], "none", [{"loss": "low"}], [[]], [{"step": 1}]])
def test_a_log_that_is_not_whole_is_not_taken_for_a_finished_run(tmp_path, unfinished, history):
    out = shutil.copytree(unfinished, tmp_path / "run")
    edited(finished=True, history=history)(out / "train.json")
    with pytest.raises(DifferentRun, match=r"train\.json: is not whole"):
        train(config(), ROWS, out, **SETTINGS)


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_alone(tmp_path, unfinished):
    shutil.copytree(unfinished, tmp_path / "run")
    for step in (2, 4):
        (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"optimizer.pt: is missing; .*No checkpoint is whole. .*turn resume off"):
        train(config(), ROWS, tmp_path / "run", **SETTINGS)
    assert set(before) <= set(tmp_path.rglob("*"))
    assert train(config(), ROWS, tmp_path / "run", resume=False, **SETTINGS).resumed_from == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"format": 3, "seconds": NaN}', "NaN is no JSON"),
        ('{"settings": {}, "finished": true}', "is of format 1"),
        ('{"format": 2}', "is of format 2"),
        ('{"format": 3, "settings": []}', "is not whole"),
        ("[]", "is of format none"),
    ],
)
def test_a_log_that_is_not_ours_is_refused_and_left_alone(tmp_path, unfinished, content, message):
    shutil.copytree(unfinished, tmp_path / "run")
    (tmp_path / "run" / "train.json").write_text(content)
    with pytest.raises(DifferentRun, match=message) as e:
        train(config(), ROWS, tmp_path / "run", **SETTINGS)
    assert str(tmp_path / "run" / "train.json") in str(e.value)
    assert (tmp_path / "run" / "train.json").read_text() == content
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "zoo.json").exists()


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    refused = []

    def on_step(step, loss):
        if step == 3:
            with pytest.raises(DifferentRun) as e:
                train(config(), ROWS, tmp_path, **SETTINGS)
            refused.append(str(e.value))

    result = train(config(), ROWS, tmp_path, on_step=on_step, **SETTINGS)
    assert f"{tmp_path}: process {os.getpid()} on {socket.gethostname()} is training in this folder" in refused[0]
    assert len(result.history) == 6


def test_a_folder_that_something_else_saved_into_is_not_written_over(tmp_path):
    theirs = zoo.build(config())
    zoo.save(theirs, tmp_path)
    with pytest.raises(DifferentRun, match=r"holds a model that no training of ours has left there .*say overwrite"):
        train(config(), ROWS, tmp_path, **SETTINGS)
    with pytest.raises(DifferentRun, match="holds a model"):
        train(config(), ROWS, tmp_path, resume=False, **SETTINGS)
    assert digest_weights(zoo.load(tmp_path)) == digest_weights(theirs)
    result = train(config(), ROWS, tmp_path, overwrite=True, **SETTINGS)
    assert digest_weights(zoo.load(tmp_path)) == digest_weights(result.model) != digest_weights(theirs)
    # the same call again goes on, and here there is nothing left to do
    assert train(config(), ROWS, tmp_path, overwrite=True, **SETTINGS).resumed_from == 6
    assert train(config(), ROWS, tmp_path, overwrite=True, **SETTINGS | {"lr": 1e-3}).resumed_from == 0


def test_a_folder_with_an_adapter_is_refused_before_training_and_not_after(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter of PEFT"):
        train(config(), ROWS, tmp_path, overwrite=True, **SETTINGS)


def test_a_folder_of_weights_is_trained_further(tmp_path, capsys):
    first = train(config(), ROWS, tmp_path / "a", **SETTINGS)
    more = train(tmp_path / "a", ROWS, tmp_path / "b", **SETTINGS)
    assert f"{tmp_path / 'a'}: starts from the weights there" in capsys.readouterr().err
    given = train(zoo.load(tmp_path / "a").train(), ROWS, tmp_path / "c", **SETTINGS)
    assert facts(more) == facts(given) and more.history[0]["loss"] < first.history[0]["loss"]
    assert train(str(tmp_path / "a"), ROWS, tmp_path / "b", **SETTINGS).resumed_from == 6
    with pytest.raises(DifferentRun, match="is the folder that the weights come from"):
        train(tmp_path / "a", ROWS, tmp_path / "a", overwrite=True, **SETTINGS)
    with pytest.raises(ValueError, match="overrides: 'd_model=8' would change the config"):
        train(tmp_path / "a", ROWS, tmp_path / "d", overrides=["d_model=8"], **SETTINGS)
    begun(tmp_path / "begun", 3)
    with pytest.raises(ValueError, match="holds a training that has not ended"):
        train(tmp_path / "begun", ROWS, tmp_path / "d", **SETTINGS)
    # weights of half precision would swallow small updates
    zoo.save(zoo.load(tmp_path / "a", dtype=torch.bfloat16), tmp_path / "half")
    assert train(tmp_path / "half", ROWS, tmp_path / "e", **SETTINGS).model.lm_head.weight.dtype == torch.float32
    # other weights in the same folder are another run
    zoo.save(first.model, tmp_path / "half")
    with pytest.raises(DifferentRun, match="another start"):
        train(tmp_path / "half", ROWS, tmp_path / "e", **SETTINGS)


def test_what_a_model_argument_means(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.save(zoo.build(config()), "runs/mine")
    Path("my.yaml").write_text("base: mamba-tiny\n")
    assert [m for m in ("mamba-tiny", "my.yaml", "runs/mine", "state-spaces/mamba-130m", "runs", "configs/my.yaml") if holds_weights(m)] == [
        "runs/mine", "state-spaces/mamba-130m",
    ]  # fmt: skip
    (tmp_path / "runs" / "mamba-tiny").mkdir(parents=True, exist_ok=True)
    assert default_out("mamba-tiny") == Path("runs/mamba-tiny")  # of an earlier call, which the same call continues
    assert default_out("runs/mine") == Path("runs/mine-finetuned") == default_out("runs/mine/")
    assert default_out("mamba2-1.3b") == Path("runs/mamba2-1.3b") and default_out("configs/my.yaml") == Path("runs/my")
    assert default_out("state-spaces/mamba-130m") == Path("runs/mamba-130m")


def test_rows_with_nothing_to_predict_change_nothing(tmp_path, whole, capsys):
    empty = ~ROWS[:4]
    empty[:, 0] = ROWS[:4, 0]  # what a row begins with is no target
    result = train(config(), np.concatenate([ROWS, empty]), tmp_path / "a", **SETTINGS)
    assert facts(result) == whole and "4 rows hold nothing to predict" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no row holds anything to predict"):
        train(config(), empty, tmp_path / "b", **SETTINGS)


def poisoned(model, name, step, value):
    def on_step(done, loss):
        if done == step:
            with torch.no_grad():
                model.get_parameter(name).fill_(value)

    return on_step


def assert_kept(out, error, step):
    """The last checkpoint is whole, and nothing that is not finite is anywhere."""
    saved = sorted((out / "checkpoints").glob("checkpoint-*"))[-1]
    assert saved.name == f"checkpoint-{step}" and f"Checkpoint {step} in" in str(error)
    assert all(bool(value.isfinite().all()) for value in load_file(saved / "model.safetensors").values())
    assert not (out / "model.safetensors").exists()
    log = json.loads((out / "train.json").read_text(), parse_constant=lambda token: pytest.fail(token))
    assert log["finished"] is False


@pytest.mark.parametrize("asks_at_once", [True, False], ids=["at once", "on a device"])
def test_a_run_stops_at_the_first_step_that_is_not_finite(tmp_path, monkeypatch, asks_at_once):
    class Seldom(ZooTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.args.logging_steps, self.args.save_steps, self.asks_at_once = 4, 4, asks_at_once

    model, seen = zoo.build(config()), []
    monkeypatch.setattr("hybridzoo.zoo.train.run.ZooTrainer", Seldom)
    # finite, but not what comes of it
    poison = poisoned(model, "backbone.layers.1.mixer.fc1.weight", 5, 3e38)

    def on_step(done, loss):
        poison(done, loss)
        seen.append(digest_weights(model))

    with pytest.raises(Diverged, match=r"training diverged at step 6 of 12: the loss is (nan|inf)") as e:
        train(model, ROWS, tmp_path, on_step=on_step, **SETTINGS | {"steps": 12})
    assert e.value.step == 6 and len(e.value.rows) == 2 and set(e.value.rows) < set(range(9))
    assert e.value.where == "the output of backbone.layers.1.mixer.fc1"
    assert "Try a lower lr (it is 0.01)" in str(e.value) and "\n" not in str(e.value)
    # steps that were taken before anybody asked have changed nothing
    assert len(seen) == (5 if asks_at_once else 8) and len(set(seen[4:])) == 1 and digest_weights(model) == seen[4]
    assert_kept(tmp_path, e.value, 4)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = zoo.build(config())
    name = "backbone.norm_f.weight"
    with pytest.raises(
        Diverged, match=f"step 4 of 6: the weights are no longer finite after it.*the weight {name}"
    ) as e:
        train(model, ROWS, tmp_path, on_step=poisoned(model, name, 4, float("inf")), **SETTINGS)
    assert_kept(tmp_path, e.value, 2)
    with pytest.raises(Diverged, match=f"step 1 of 6: .*the weight {name}. There is no checkpoint yet"):
        train(model, ROWS, tmp_path / "b", **SETTINGS)


def test_a_rate_that_is_too_high_is_an_error(tmp_path):
    with pytest.raises(Diverged, match="finite"):
        train(config(), ROWS, tmp_path, **SETTINGS | {"lr": 1e38, "warmup": 0})
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("writer", ["torch.save", "transformers.modeling_utils.safe_save_file"])
def test_a_full_disk_is_one_error_and_the_same_call_goes_on(tmp_path, monkeypatch, whole, writer):
    def full(*args, **kwargs):
        kind = SafetensorError if "safe" in writer else RuntimeError
        raise kind("Error while serializing: I/O error: No space left on device (os error 28)")

    def on_step(step, loss):
        if step == 3:
            monkeypatch.setattr(writer, full)

    with pytest.raises(OSError, match=r"checkpoint of step 4 cannot be written \(.*No space left on device"):
        train(config(), ROWS, tmp_path, on_step=on_step, **SETTINGS)
    monkeypatch.undo()
    resumed = train(config(), ROWS, tmp_path, **SETTINGS)
    assert (
        resumed.resumed_from == 2 and facts(resumed) == whole and not (tmp_path / "checkpoints" / ".staging").exists()
    )


def test_a_model_that_could_not_be_saved_is_not_trained(tmp_path):
    model = zoo.build(config())
    model.backbone.layers[1].mixer.fc1.bias = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(
        ValueError, match=r"differ from what the config describes, such as 'backbone.layers.1.mixer.fc1.bias'"
    ):
        train(model, ROWS, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_what_is_said_without_a_terminal(tmp_path, capsys):
    train(config(), ROWS, tmp_path, **SETTINGS)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    parameters = zoo.build(config()).num_params()
    assert out == "" and lines[:3] == [
        f"{parameters:,} parameters in float32, on cpu",
        "9 rows of 12 tokens (108)",
        f"6 steps of 2 rows: 144 tokens, the data 1.33 times; into {tmp_path}",
    ]
    assert [line.split(":")[0] for line in lines[3:5]] == ["precision", "optimizer"]
    assert [line.split("  ")[0] for line in lines[5:]] == [f"step {i} of 6" for i in range(1, 7)]
    assert "loss" in lines[5] and "tokens/s" in lines[6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"report_to": "tensorbord"}, "Did you mean 'tensorboard'"),
        ({"lr": 0}, "number above 0"),
        ({"lr": float("nan")}, "finite"),
        ({"warmup": -1}, "at least 0"),
        ({"length": 1}, "at least 2"),
        ({"save_every": 0}, "at least 1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_numbers_that_cannot_work_are_refused_before_a_model_is_built(tmp_path, monkeypatch, change, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**change)
    monkeypatch.setattr("hybridzoo.zoo.train.start.build", lambda *a: pytest.fail("was built"))
    with pytest.raises(ValueError, match=message):
        train("mamba-tiny", ROWS, tmp_path / "out", **SETTINGS | change)

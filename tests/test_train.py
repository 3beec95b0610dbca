"""Training: every tiny config learns, and a run survives interruption, damage and changed settings."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import hybridzoo as zoo
from hybridzoo.__main__ import main
from hybridzoo.zoo.tokenizer import ByteTokenizer
from hybridzoo.zoo.train.data import Rows, pack, topics
from hybridzoo.zoo.train.loop import ZooTrainer
from hybridzoo.zoo.train.options import TrainOptions
from hybridzoo.zoo.train.run import DifferentRun, TrainResult, train
from hybridzoo.zoo.train.run_folder import RunFolder
from hybridzoo.zoo.train.session import Session, Workload

QUIET = {"report_to": "none", "device": "cpu"}


@pytest.fixture(scope="module")
def rows():
    return pack(map(ByteTokenizer().encode, topics()["train"][:8]), 48)


@pytest.fixture
def small():
    return zoo.config("transformer-tiny", ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2"])


@pytest.mark.parametrize("name", zoo.list_models("*-tiny", task="causal_lm"))
def test_every_tiny_model_learns(name, rows, tmp_path):
    result = train(name, rows, tmp_path, steps=10, batch_size=4, lr=5e-3, save_every=10, **QUIET)
    losses = [entry["loss"] for entry in result.history]
    assert len(losses) == 10 and np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert result.tokens == 10 * 4 * 48 and result.tokens_per_second > 0


def test_a_finished_run_is_a_folder_that_loads_and_is_not_trained_again(small, rows, tmp_path):
    first = train(small, rows, tmp_path, steps=4, batch_size=2, report_to="tensorboard", device="cpu")
    ids = torch.from_numpy(rows[:1])
    torch.testing.assert_close(zoo.load(tmp_path)(ids).logits, first.model(ids).logits)
    assert list((tmp_path / "tensorboard").glob("events*"))
    again = train(small, rows, tmp_path, steps=4, batch_size=2, report_to="tensorboard", device="cpu")
    assert again.resumed_from == 4 and again.history == first.history and again.seconds == first.seconds
    torch.testing.assert_close(again.model(ids).logits, first.model(ids).logits)


class InterruptedRows(Rows):
    """Sends Ctrl-C to the process when row number ``at`` of the session is read."""

    at = 0
    reads = 0

    def __getitem__(self, index):
        type(self).reads += 1
        if self.reads == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def settings(steps=12):
    return {"steps": steps, "batch_size": 2, "lr": 1e-3, "save_every": 3, "seed": 5} | QUIET


def losses_of(result: TrainResult) -> dict[int, float]:
    return {int(entry["step"]): entry["loss"] for entry in result.history}


def test_an_interrupted_run_continues_as_if_nothing_had_happened(small, rows, tmp_path, monkeypatch):
    whole = train(small, rows, tmp_path / "whole", **settings())
    InterruptedRows.at, InterruptedRows.reads = 9, 0
    monkeypatch.setattr("hybridzoo.zoo.train.examples.Rows", InterruptedRows)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(small, rows, tmp_path / "cut", **settings() | {"save_every": 100})
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    monkeypatch.undo()
    resumed = train(small, rows, tmp_path / "cut", **settings())
    assert 0 < resumed.resumed_from < 12
    assert losses_of(resumed) == pytest.approx(losses_of(whole))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert resumed.seconds >= resumed.history[-1]["seconds"] > resumed.history[0]["seconds"]


def test_a_checkpoint_that_was_cut_short_is_passed_over(small, rows, tmp_path):
    whole = train(small, rows, tmp_path, **settings())
    log = json.loads((tmp_path / "train.json").read_text())
    # as a crash during the last save leaves it
    (tmp_path / "train.json").write_text(json.dumps(log | {"finished": False}))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "checkpoints" / "checkpoint-12" / "trainer_state.json").write_text('{"epoch": 0.')
    resumed = train(small, rows, tmp_path, **settings())
    assert resumed.resumed_from == 9 and losses_of(resumed) == pytest.approx(losses_of(whole))


def test_other_settings_do_not_mix_with_a_run_that_is_there(small, rows, tmp_path):
    train(small, rows, tmp_path, **settings(2))
    with pytest.raises(DifferentRun, match=r"another lr \(0.001 there, 0.002 now\)"):
        train(small, rows, tmp_path, **settings(2) | {"lr": 2e-3})
    wider = zoo.config("transformer-tiny", ["d_model=32", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2"])
    with pytest.raises(DifferentRun, match=r"another config.d_model \(16 there, 32 now\)"):
        train(wider, rows, tmp_path, **settings(2))
    with pytest.raises(DifferentRun, match="another data"):
        train(small, rows[1:], tmp_path, **settings(2))
    again = train(small, rows, tmp_path, resume=False, **settings(2) | {"lr": 2e-3})
    assert again.resumed_from == 0


def test_a_given_model_is_trained_further(small, rows, tmp_path):
    first = train(small, rows, tmp_path / "a", **settings(6)).model
    start = first.get_parameter("backbone.embedding.weight").clone()
    more = train(first, rows, tmp_path / "b", **settings(6))
    assert more.model is first and more.history[0]["loss"] < 6
    assert not torch.equal(start, first.get_parameter("backbone.embedding.weight"))


def test_weights_that_are_no_numbers_are_not_trained_further(rows, tmp_path):
    model = zoo.build("mamba-tiny", tie_embeddings=False)
    with torch.no_grad():
        model.backbone.embedding.weight[255, 0] = float("inf")  # a token that no row holds: no loss would show it
    zoo.save(model, tmp_path / "broken")
    with pytest.raises(
        ValueError, match=r"broken: 1 of the 24,576 values of backbone\.embedding\.weight are NaN or infinite"
    ):
        train(tmp_path / "broken", np.where(rows == 255, 0, rows), tmp_path / "out", steps=1, **QUIET)
    assert not (tmp_path / "out").exists()


def test_the_optimiser_decays_what_param_groups_says(rows, tmp_path):
    from transformers import TrainingArguments

    from hybridzoo.zoo.hf import HybridZooForCausalLM

    model = zoo.build("jamba-tiny")
    args = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.5, use_cpu=True, report_to="none")
    parts = {
        "options": TrainOptions(), "run": RunFolder(tmp_path), "session": Session([], Workload(1), None, None), "checkpoint": None,
    }  # fmt: skip
    groups = ZooTrainer(HybridZooForCausalLM.wrap(model), args, **parts).create_optimizer().param_groups
    expected = zoo.param_groups(model, 0.5)
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    for got, want in zip(groups, expected, strict=True):
        assert {id(p) for p in got["params"]} == {id(p) for p in want["params"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"data": "nowhere.txt"}, "no such file"),
        ({"data": np.full((2, 4), 256)}, "token id 256 is outside the model's vocabulary of 256"),
        ({"data": np.full((2, 4), ~300)}, "token id 300 is outside"),
        ({"seed": -1}, r"train\(seed=-1\): must be at least 0, and below 2\*\*32"),
        ({"seed": 2**32}, r"train\(seed=4294967296\): must be at least 0"),
        ({"steps": 2.5}, r"train\(steps=2.5\): must be an integer"),
        ({"batch_size": "8"}, r"train\(batch_size='8'\): must be an integer"),
        ({"lr": "1e-3"}, r"train\(lr='1e-3'\): must be a number above 0"),
        ({"eval_every": 3}, r"train\(eval_every=3\): there is nothing to evaluate on. Give val"),
        ({"patience": 2}, r"train\(patience=2\): there is nothing"),
        (
            {"mixup": 0.5},
            r"train\(mixup=0.5\): is for images, and this model reads text \(task: causal_lm\). Leave it out",
        ),
    ],
    ids=[
        "steps",
        "missing",
        "vocabulary",
        "masked",
        "seed",
        "large seed",
        "part of a step",
        "text",
        "text for lr",
        "evaluations",
        "patience",
        "images",
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(small, rows, tmp_path, change, message):
    arguments = {"data": rows, "steps": 1} | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(small, out=tmp_path / "out", **arguments, **QUIET)
    assert not (tmp_path / "out").exists()


def test_a_run_s_folder_that_is_a_file_is_named(small, rows, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "deep" / "run"):
        with pytest.raises(
            NotADirectoryError, match=f"^{tmp_path}/taken: is a file, and out='{out}' has to be a folder"
        ):
            train(small, rows, out, steps=1, **QUIET)
    assert (tmp_path / "taken").read_text() == "mine"


def test_numbers_of_numpy_are_numbers(small, rows, tmp_path):
    counts = {"steps": np.int64(1), "batch_size": np.int32(2), "seed": np.uint8(3), "save_every": np.int64(1)}
    train(small, rows, tmp_path / "out", **counts, lr=np.float32(1e-3), **QUIET)
    again = train(
        small, rows, tmp_path / "out", steps=1, batch_size=2, seed=3, save_every=1, lr=float(np.float32(1e-3)), **QUIET
    )
    assert again.resumed_from == 1


def test_ctrl_c_in_a_terminal_leaves_a_run_that_the_same_command_finishes(tmp_path, monkeypatch, capfd):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"line {i} of a text" for i in range(400)))
    command = [
        os.path.join(os.path.dirname(sys.executable), "zoo"), "train", "transformer-tiny", "d_model=16", "mixers.attention.nheads=2",
        "--data", str(text), "--out", str(tmp_path / "my run"), "--steps", "60", "--batch-size", "2", "--length", "32",
        "--save-every", "5", "--report-to", "none", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    checkpoint = tmp_path / "my run" / "checkpoints" / "checkpoint-5"
    stop = threading.Event()

    def interrupt():
        while not stop.wait(0.002):
            if (checkpoint / "trainer_state.json").exists():
                process.send_signal(signal.SIGINT)
                return

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    _, errors = process.communicate(timeout=120)
    stop.set()
    watcher.join()
    assert process.returncode == 130, errors
    assert (
        "stopping after this step" in errors and errors.rstrip().endswith("interrupted") and "Traceback" not in errors
    )
    # what was saved, where, and what to type
    assert re.search(rf"step \d+ of 60 is saved in {re.escape(str(tmp_path / 'my run'))}", errors)
    assert f"to go on: {shlex.join(['zoo', *command[1:]])}" in errors
    # in this process, which has imported everything already
    monkeypatch.setattr(sys, "argv", ["zoo", *command[1:]])
    capfd.readouterr()
    with pytest.raises(SystemExit) as done:
        main()
    out, errors = capfd.readouterr()
    assert not done.value.code and "resuming at step" in errors, errors
    assert out == "" and "\r" not in errors and "60 steps" in errors

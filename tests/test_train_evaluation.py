"""Evaluation during a training: exact, without a trace in the training, and the best model is what is left."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import hybridzoo as zoo
from hybridzoo.zoo.digests import digest_weights
from hybridzoo.zoo.train.evaluation import best_of, has_stalled
from hybridzoo.zoo.train.run import DifferentRun, Diverged, train

SMALL = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2", "layers=attention mlp"]
SETTINGS = {"steps": 6, "batch_size": 2, "save_every": 2, "lr": 1e-2, "seed": 3, "report_to": "none", "device": "cpu"}
DRAW = np.random.default_rng(0)
ROWS = DRAW.integers(1, 200, (9, 12))
# rows of unequal numbers of targets, one with none; not a multiple of a batch
VAL = DRAW.integers(1, 200, (5, 12))
VAL[:, :8] = np.where(np.arange(8) < [[2], [7], [5], [8], [3]], ~VAL[:, :8], VAL[:, :8])
VAL[3, 1:] = ~VAL[3, 1:]


def config(name="transformer-tiny", *changes):
    return zoo.config(name, [*(SMALL if name == "transformer-tiny" else []), *changes])


def nats_per_target(model, table):
    """By a plain loop: row for row, token for token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in table:
            ids = torch.from_numpy(np.where(row < 0, ~row, row))
            logits = model.eval()(ids[None]).logits[0].double()
            for i in range(len(row) - 1):
                if row[i + 1] >= 0:
                    total += float(F.cross_entropy(logits[i], ids[i + 1]))
                    count += 1
    return total / count


@pytest.mark.parametrize("name", ["transformer-tiny", "jamba-tiny"])  # one has an auxiliary loss, which does not count
def test_the_loss_is_the_mean_over_all_targets(tmp_path, name):
    result = train(config(name), ROWS, tmp_path, val=VAL, **SETTINGS | {"steps": 2})
    last = result.history[-1]
    expected = nats_per_target(zoo.load(tmp_path), VAL)
    assert last["step"] == 2 and last["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert last["eval_bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-6)
    assert set(last) - {"aux_loss"} - {k for k in last if k.startswith("expert_load/")} == {
        "step", "loss", "grad_norm", "learning_rate", "seconds", "tokens_per_second", "eval_loss", "eval_bits_per_byte",
    }  # fmt: skip


MEASURED = ("seconds", "tokens_per_second", "memory_GiB", "mfu")


def without(history, *names):
    return [{k: v for k, v in entry.items() if not k.startswith(names)} for entry in history]


def test_evaluating_changes_nothing_of_a_training(tmp_path):
    # three times through the rows: the order of the next pass is drawn after evaluations
    settings = SETTINGS | {"steps": 15, "save_every": 5}
    plain = train(config(), ROWS, tmp_path / "plain", **settings)
    often = train(config(), ROWS, tmp_path / "often", val=VAL, eval_every=2, **settings)
    assert without(often.history, "eval_", *MEASURED) == without(plain.history, *MEASURED)
    assert [entry["step"] for entry in often.history if "eval_loss" in entry] == [2, 4, 6, 8, 10, 12, 14, 15]
    if often.best["step"] == 15:
        assert digest_weights(often.model) == digest_weights(plain.model)
    newest = [
        load_file(tmp_path / kind / "checkpoints" / "checkpoint-15" / "model.safetensors")
        for kind in ("plain", "often")
    ]
    assert all(torch.equal(newest[0][name], newest[1][name]) for name in newest[0])


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_run_with_evaluations_resumes_as_if_it_had_not_stopped(tmp_path, step, train_until):
    settings = SETTINGS | {"val": VAL, "eval_every": 1}
    whole = train(config(), ROWS, tmp_path / "whole", **settings)
    train_until(step, config(), ROWS, tmp_path / "cut", **settings)
    resumed = train(config(), ROWS, tmp_path / "cut", **settings)
    assert 0 < resumed.resumed_from < step
    assert without(resumed.history, *MEASURED) == without(whole.history, *MEASURED) and resumed.best == whole.best
    assert digest_weights(resumed.model) == digest_weights(whole.model)


def overfitting(out, **changes):
    """A run whose loss on other rows is at its best early: a high rate, and rows that say nothing of each other."""
    settings = SETTINGS | {"steps": 16, "save_every": 8, "lr": 3e-2, "val": VAL, "eval_every": 2} | changes
    return train(config(), ROWS, out, **settings)


def test_the_best_checkpoint_is_kept_and_is_the_model_that_is_left(tmp_path):
    result = overfitting(tmp_path)
    losses = {entry["step"]: entry["eval_loss"] for entry in result.history if "eval_loss" in entry}
    step = min(losses, key=losses.get)
    assert step < 12 and result.best == {"step": step, "eval_loss": losses[step]}
    assert nats_per_target(result.model, VAL) == pytest.approx(losses[step], rel=1e-6)
    assert digest_weights(zoo.load(tmp_path)) == digest_weights(result.model)
    kept = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert kept == {f"checkpoint-{step}", "checkpoint-8", "checkpoint-16"}
    assert json.loads((tmp_path / "train.json").read_text())["best"] == result.best
    again = overfitting(tmp_path)
    assert again.best == result.best and again.resumed_from == 16 and again.history == result.history


def test_patience_ends_a_run_that_gets_no_better(tmp_path):
    full = overfitting(tmp_path / "full")
    result = overfitting(tmp_path / "early", patience=2)
    assert result.best == full.best and result.history[-1]["step"] == result.best["step"] + 4 < 16
    assert without(result.history, *MEASURED) == without(full.history, *MEASURED)[: len(result.history)]
    assert result.tokens == result.history[-1]["step"] * 2 * 12
    assert digest_weights(result.model) == digest_weights(full.model)
    assert json.loads((tmp_path / "early" / "train.json").read_text())["finished"] is True
    # killed after its last step, before the model was in its place
    log = json.loads((tmp_path / "early" / "train.json").read_text())
    (tmp_path / "early" / "train.json").write_text(json.dumps(log | {"finished": False, "history": []}))
    (tmp_path / "early" / "model.safetensors").unlink()
    again = overfitting(tmp_path / "early", patience=2)
    assert without(again.history, *MEASURED) == without(result.history, *MEASURED) and again.best == result.best
    assert digest_weights(zoo.load(tmp_path / "early")) == digest_weights(result.model)


def test_the_best_of_a_history():
    def history(*losses):
        return [{"step": i, "loss": 1.0, "eval_loss": x} for i, x in enumerate(losses, 1)]

    assert best_of([{"step": 1, "loss": 1.0}]) is None and not has_stalled([], 1)
    assert best_of(history(3, 2, 2.5, 2)) == {"step": 2, "eval_loss": 2}
    assert has_stalled(history(3, 2, 2.5, 2), 2) and not has_stalled(history(3, 2, 2.5, 2), 3)
    assert not has_stalled(history(3, 2, 2.5, 2), None) and not has_stalled(history(3, 2, 1), 1)


def test_another_evaluation_is_another_run(tmp_path):
    train(config(), ROWS, tmp_path, val=VAL, **SETTINGS | {"steps": 2})
    with pytest.raises(DifferentRun, match="another val"):
        train(config(), ROWS, tmp_path, **SETTINGS | {"steps": 2})


def test_an_evaluation_that_is_no_number_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("hybridzoo.zoo.train.text_feed.loss_per_target", lambda trainer: float("nan"))
    with pytest.raises(Diverged, match=r"step 2 of 6: the loss of the evaluation after it is nan"):
        train(config(), ROWS, tmp_path, val=VAL, **SETTINGS)


def test_what_cannot_be_evaluated_on_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: no such file"):
        train(config(), ROWS, tmp_path, val="nowhere.txt", **SETTINGS)
    with pytest.raises(ValueError, match="val: token id 256 is outside"):
        train(config(), ROWS, tmp_path, val=np.full((2, 4), 256), **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_the_best_adapters_are_those_that_are_left(tmp_path):
    zoo.save(zoo.build(config()), tmp_path / "base")
    settings = SETTINGS | {
        "steps": 16,
        "save_every": 8,
        "lr": 0.3,
        "val": VAL,
        "eval_every": 2,
        "optimizer": "muon",
        "accumulate": 2,
    }
    result = train(tmp_path / "base", ROWS, tmp_path / "out", lora=4, **settings | {"batch_size": 1})
    losses = {entry["step"]: entry["eval_loss"] for entry in result.history if "eval_loss" in entry}
    assert result.best["step"] == min(losses, key=losses.get) < 16
    assert nats_per_target(zoo.load(tmp_path / "out"), VAL) == pytest.approx(result.best["eval_loss"], rel=1e-5)


def test_what_a_person_is_told_of_it(tmp_path, monkeypatch, capsys):
    from hybridzoo.__main__ import main

    for name, table in (("rows", ROWS), ("val", VAL)):
        np.save(tmp_path / f"{name}.npy", table)
    command = [
        "zoo", "train", "transformer-tiny", *SMALL, "--data", str(tmp_path / "rows.npy"), "--val", str(tmp_path / "val.npy"), "--out",
        str(tmp_path / "out"), "--steps", "16", "--batch-size", "2", "--lr", "0.03", "--seed", "3", "--save-every", "8", "--eval-every", "2",
        "--patience", "2", "--report-to", "none", "--device", "cpu",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    said = []
    for _ in range(2):  # trained, and found finished
        with pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code
        said.append(capsys.readouterr().err)
    log = json.loads((tmp_path / "out" / "train.json").read_text())
    best, last = log["best"], int(log["history"][-1]["step"])
    assert f"step {last} of 16  held-out loss" in said[0] and last == best["step"] + 4
    for text in said:
        assert f"stopped early, after step {last}: 2 evaluations were not better than the best" in text
        assert (
            f"the model is in {tmp_path / 'out'}, as of step {best['step']}, the best on val (loss {best['eval_loss']:.3f})"
            in text
        )
    assert "holds this run, finished" in said[1]

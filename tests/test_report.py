"""The page of a run: its numbers are those that were logged, it is there from the first checkpoint on, and it stops nothing."""

import json
import math
import os
import re
import signal

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hybridzoo as zoo
from hybridzoo.__main__ import app
from hybridzoo.zoo.report.training import duration, headline, losses, training_page, training_picture
from hybridzoo.zoo.train import flops, header
from hybridzoo.zoo.train.report import Report, write_report
from hybridzoo.zoo.train.run import Interrupted, TrainCall, train
from hybridzoo.zoo.train.run_folder import DifferentRun
from hybridzoo.zoo.train.session import Session, Workload

SETTINGS = {"steps": 6, "batch_size": 2, "save_every": 2, "lr": 1e-2, "seed": 3, "report_to": "none", "device": "cpu"}
ROWS = np.random.default_rng(0).integers(1, 200, (9, 12))


def config():
    small = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2", "layers=attention mlp"]
    return zoo.config("transformer-tiny", small)


def entry(step, **more):
    return {"step": step, "loss": 5.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0, "seconds": 2.0 * step} | more


def log_of(history, **about):
    about = {
        "name": "my <model>",
        "folder": "runs/x",
        "steps": 40,
        "tokens_per_step": 1000,
        "command": "zoo train a&b",
    } | about
    return {"about": {"facts": {"layers": "mamba mlp"}, **about}, "history": history, "finished": False, "seconds": 0.0}


def test_the_page_says_what_was_logged():
    history = [entry(i, tokens_per_second=1e5, mfu=0.415, memory_GiB=float(i)) for i in range(1, 31)]
    history += [{"step": 10, "eval_loss": 1.25}, {"step": 20, "eval_loss": 1.125}, {"step": 30, "eval_loss": 1.5}]
    log = log_of(history, resumed=[12, 20])
    page = training_page(log)
    assert headline(log) == "my <model>: 1.125 nats per token of text it has not seen, at step 20 of 40"
    assert "my &lt;model&gt;" in page and "my <model>" not in page and "zoo train a&amp;b" in page
    for said in (
        "30,000 tokens read in 1 min 0 s, and not at its end yet. Resumed at step 12 and 20.", "100,000", "41.5 % of the device (MFU)",
        "30.0 GiB", f"perplexity {math.exp(1.125):.4g}", "held out", "Gradient norm", "mamba mlp",
    ):  # fmt: skip
        assert said in page, said
    # nothing is asked of any network, and everything stands in this one file
    assert not re.search(r"(src|href)=", page) and "{{" not in page
    (mark,) = re.findall(r'<circle cx="([\d.]+)%"', losses(log).body)
    assert float(mark) == pytest.approx(100 * 20 / 30, abs=0.01)


def test_the_page_of_a_run_at_its_very_beginning():
    assert "nothing logged yet" in training_page(log_of([]))
    page = training_page(log_of([entry(1)], steps=1))
    assert "a loss of 5.000 after all 1 steps" in page and "not at its end" not in page and "nan" not in page
    # what is no number is left out
    page = training_page(log_of([entry(1, grad_norm="nan"), entry(2, grad_norm=float("inf")), entry(3, grad_norm=2.0)]))
    assert "Gradient norm" in page and "inf" not in page.split("</style>")[1]
    assert "loss of 2.500 after 2 steps of 40" in headline(log_of([entry(1), entry(2)]))


def test_loads_of_many_experts_become_their_mean_and_their_worst():
    few = [entry(i, **{f"expert_load/{b}": 1.0 + b for b in (1, 3)}, aux_loss=0.1) for i in (1, 2)]
    page = training_page(log_of(few))
    assert "block 1" in page and "block 3" in page and "Balance of the experts" in page
    many = [entry(i, **{f"expert_load/{b}": 1.0 + b for b in range(20)}) for i in (1, 2)]
    page = training_page(log_of(many))
    assert "worst" in page and "mean" in page and "block 3" not in page


def test_times_are_said_as_on_a_clock():
    assert [duration(s) for s in (3.21, 59.4, 60, 3599, 7500)] == [
        "3.2 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "2 h 5 min",
    ]


def test_the_picture_of_a_run_is_a_file_of_its_own():
    drawn = training_picture(log_of([entry(i) for i in range(1, 31)]))
    assert drawn.startswith("<svg") and "learning rate" in drawn and "a loss of 0.167 after 30 steps of 40" in drawn


def test_a_run_has_a_page_from_its_first_checkpoint_on(tmp_path, monkeypatch):
    seen = []
    data = tmp_path / "rows.npy"
    np.save(data, ROWS)

    def on_step(step, loss):
        page = tmp_path / "out" / "report.html"
        seen.append(page.read_text() if page.exists() else None)
        if step == 3 and len(seen) == 3:
            raise RuntimeError("the power is gone")

    with pytest.raises(RuntimeError, match="power"):
        train(config(), data, tmp_path / "out", on_step=on_step, **SETTINGS)
    assert seen[:2] == [None, None] and "after 2 steps of 6" in seen[2]
    # again, from the checkpoint, without the run
    (tmp_path / "out" / "report.html").unlink()
    done = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert "after 2 steps of 6" in (tmp_path / "out" / "report.html").read_text()
    train(config(), data, tmp_path / "out", **SETTINGS)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "after all 6 steps" in page and "Resumed at step 2" in page and "rows.npy: 9 rows of 12 tokens (108)" in page
    log = json.loads((tmp_path / "out" / "train.json").read_text())
    assert log["about"]["resumed"] == [2] and log["about"]["tokens_per_step"] == 24 and log["finished"]
    again = write_report(tmp_path / "out").read_text()
    # seconds are counted a little further when the model has been saved
    assert re.sub(r"[\d.]+ s\b", "", again) == re.sub(r"[\d.]+ s\b", "", page)
    with pytest.raises(DifferentRun, match=r"holds no train\.json"):
        write_report(tmp_path)


def test_interrupted_runs_have_their_page_too(tmp_path):
    def on_step(step, loss):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(config(), ROWS, tmp_path, on_step=on_step, **SETTINGS)
    assert re.search(r"after [34] steps of 6", (tmp_path / "report.html").read_text())


def test_a_page_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("hybridzoo.zoo.train.report.write_page", full)
    result = train(config(), ROWS, tmp_path, **SETTINGS)
    assert len(result.history) == 6 and capsys.readouterr().err.count("report.html: cannot be written (No space") == 1
    assert not (tmp_path / "report.html").exists() and Report(tmp_path, {}).failed is False


def test_the_command_of_a_call_is_what_made_it(tmp_path):
    call = TrainCall("mamba-tiny", "a text.txt", "runs/x", overrides=["d_model=32"], steps=5, lr=0.01, overwrite=True)
    assert header.command_of(call, call.model, call.data) == (
        "zoo train mamba-tiny d_model=32 --data 'a text.txt' --out runs/x --steps 5 --lr 0.01"
    )
    assert header.command_of(TrainCall("mamba-tiny", ROWS, "runs/x"), "mamba-tiny", ROWS) is None
    facts = header.facts_of(zoo.build("mamba-tiny"), "mamba-tiny: a fresh model", {"data": "rows"}, torch.device("cpu"))
    assert facts["data"] == "rows" and "torch" in facts["versions"] and facts["layers"].startswith("mamba")


def test_what_is_said_of_the_methods_is_what_was_asked_for(tmp_path, capsys):
    asked = {
        "schedule": "wsd",
        "decay": 0.5,
        "final_lr": 0.1,
        "warmup": 2,
        "optimizer": "muon",
        "clip": 0.0,
        "patience": 9,
    }
    train(config(), ROWS, tmp_path, val=ROWS[:4], checkpointing=True, **SETTINGS | asked)
    said = capsys.readouterr().err.splitlines()
    assert said[3:6] == [
        "precision: float32, blocks computed again",
        "optimizer: muon, lr 0.01 after 2 steps of warm-up, falling in the last 50% to 0.001; weight decay 0.1, no gradient clipped",
        "evaluation: every 2 steps, on 4 rows of 12 tokens; ends after 9 without a better one",
    ]
    page = (tmp_path / "report.html").read_text()
    assert (
        "Held-out loss" in page
        and "falling in the last 50% to 0.001" in page
        and "step 2 of 6  held-out loss" in "\n".join(said)
    )


# ------------------------------------------------------------------------------------------------ speed


class Clock:
    """Time that passes when it is told."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("hybridzoo.zoo.train.session.time.monotonic", lambda: self.now)


class State:
    is_world_process_zero, max_steps = True, 100

    def __init__(self, step):
        self.global_step, self.log_history = step, [{}]


class Control:
    should_log = should_save = should_training_stop = False


def test_speed_is_of_the_last_seconds_without_the_first_step_saving_and_evaluating(monkeypatch):
    clock = Clock(monkeypatch)
    session = Session([], Workload(100, flops=10.0, peak=4000.0), None, None)

    def steps(first, last, seconds):
        for step in range(first, last + 1):
            clock.now += seconds
            session.on_step_end(None, State(step), Control())
        return session.measures(last)

    assert steps(1, 1, 300.0) == {}  # compiling
    assert steps(2, 5, 1.0) == {"tokens_per_second": 100.0, "mfu": 0.25}
    clock.now += 60
    session.on_save(None, State(5), Control())
    clock.now += 60
    session.on_evaluate(None, State(5), Control())
    assert steps(6, 8, 1.0)["tokens_per_second"] == 100.0
    # ten seconds later, the slow ones are all that counts
    assert steps(9, 13, 2.0)["tokens_per_second"] == 50.0
    # nothing new was done: the last that is known
    assert session.measures(13)["tokens_per_second"] == 50.0
    assert "mfu" not in Session([], Workload(100, flops=10.0), None, None).measures(1)


def test_peaks_are_found_by_the_name_of_a_gpu(monkeypatch):
    peaks = {
        "NVIDIA H200": 989.4e12, "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165.2e12, "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "AMD Radeon": None,
    }  # fmt: skip
    assert {name: flops.peak_flops(name, half=True) for name in peaks} == pytest.approx(peaks)
    assert flops.peak_flops("NVIDIA H200", half=False) == pytest.approx(66.9e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert flops.peak_flops("NVIDIA H200", half=False) == pytest.approx(494.7e12)


def test_attention_costs_what_the_documents_are_long():
    class Packed:
        documents, length = 3, 8

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return {"documents": torch.tensor([[0, 0, 0, 0, 1, 1, 2, -1], [0] * 8][i])}

    # by hand: 16 + 4 + 1 + 64 over 7 + 8 tokens
    assert flops.context_length(Packed()) == pytest.approx(85 / 15)
    model = zoo.build("transformer-tiny", device="meta")
    assert flops.flops_per_token(model, 5.7) == 3 * model.flops(6) < 3 * model.flops(8)
    assert flops.flops_per_token(model, 5.7, frozen=True) == 2 * model.flops(6)

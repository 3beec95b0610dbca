"""Kill workers with signal 9 at random moments: no cell is done twice, none is lost, and each goes on from where it was."""

import fcntl
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from ablation import a_point, a_study, note, postgres, result_of, said  # noqa: F401
from command_line import invoke

from hybridzoo.eval.ablate import Study, queue, worker

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

RATES = (1e-1, 1e-2, 1e-3)
STEPS = 4


def alone(cell, folder, *, device=None, on_step=None):
    """A training that finds out whether another is at work in its folder, and keeps every step."""
    steps = folder / "steps.txt"
    with (folder / "alone").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        first = int(steps.read_text()) if steps.exists() else 0
        note(folder, f"from{first}")
        for step in range(first + 1, STEPS + 1):
            time.sleep(0.03)
            note(folder, "step")
            temporary = folder / "steps.new"
            temporary.write_text(str(step))
            temporary.replace(steps)
            on_step(step, 1.0)
    return result_of(0.5 - cell.rate)


def forked(job):
    """A process that works on a study; forked, so that nothing is imported again."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        worker.work(job)
        status = 0
    finally:
        os._exit(status)


def steps_of(job):
    file = Path(job.folder) / "said.txt"
    return file.read_text().count("step") if file.exists() else 0


def worked_to_the_end(job, workers, kills, seed):
    """Let workers work, kill one now and then and put another in its place; return how many were killed."""
    moments, running, killed = random.Random(seed), [forked(job) for _ in range(workers)], 0
    statuses = []
    while running:
        # by steps and not by the clock: a busy machine is slow to start them
        begun = steps_of(job)
        end = time.monotonic() + moments.choice(
            (moments.uniform(0.02, 3), 20)
        )  # at any moment, or in the middle of a cell
        while steps_of(job) <= begun + moments.randrange(3) and time.monotonic() < end:
            time.sleep(0.01)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                statuses.append(os.waitstatus_to_exitcode(status))
        if running and killed < kills:
            victim = running.pop(moments.randrange(len(running)))
            os.kill(victim, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]) == -signal.SIGKILL
            running.append(forked(job))
    assert set(statuses) == {0}, statuses
    return killed


def check(study, folder, killed):
    cells = {study.store.key(result.cell) for result in study.results()}
    assert len(cells) == 2 * (len(RATES) + 2) and study.summary().status == 0
    trials = study._queue()._storage.get_all_trials(study._queue()._study_id)
    done = Counter(t.user_attrs["key"] for t in trials if t.state.name == "COMPLETE")
    # a process may be killed between its result and its word to the queue, after which nobody trains the cell again
    assert set(done) <= cells and set(done.values()) == {1} and len(cells) - len(done) <= killed
    assert not any("error" in t.user_attrs for t in trials)
    assert {t.state.name for t in trials} <= {"COMPLETE", "FAIL", "PRUNED", "WAITING"}
    # each goes on from its last checkpoint: what a kill costs is the step that it falls in
    steps = Counter(said(folder, "step"))
    assert set(steps) == cells and 0 <= sum(steps.values()) - STEPS * len(cells) <= killed
    assert all(json.loads((folder / "cells" / key / "result.json").read_text()) for key in cells)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_three_workers_do_every_cell_once(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(worker, "_POLL", 0.05)
    monkeypatch.setattr(queue, "DEATHS", 100)
    study = a_study(tmp_path, [a_point("a", RATES), a_point("b", RATES)])
    study.function = f"{__name__}:alone"
    killed = worked_to_the_end(study._job(), 3, kills=14, seed=seed)
    assert killed >= 7
    check(study, tmp_path, killed)
    resumed = [line for line in (tmp_path / "said.txt").read_text().split() if line in ("from1", "from2", "from3")]
    assert resumed


def test_killed_at_random_on_a_real_server(tmp_path, monkeypatch, postgres):  # noqa: F811
    monkeypatch.setattr(worker, "_POLL", 0.05)
    monkeypatch.setattr(queue, "DEATHS", 100)
    study = a_study(tmp_path, [a_point("a", RATES), a_point("b", RATES)], storage=postgres)
    study.function = f"{__name__}:alone"
    killed = worked_to_the_end(study._job(), 2, kills=6, seed=0)
    assert killed >= 3
    check(study, tmp_path, killed)


SMALL = """
question: Does it go on?
base:
  d_model: 16
  layers: {n_layer: 2, allocate: {attention: 0.5}, fill: mamba, then: mlp}
  mixers: {mamba: {d_state: 4}, attention: {nheads: 2}, mlp: {d_intermediate: 16}}
axes:
  attention: {key: layers.allocate.attention, values: [0.5]}
task: {name: mqar, vocab: 32, settings: [[16, 2, 200]], test: [[16, 2]], valid_examples: 20, test_examples: 40}
train: {steps: 20, batch_size: 8, save_every: 4}
rates: {default: [1.0e-2]}
seeds: [3]
"""
MEASURED = ("seconds", "tokens_per_second", "memory_GiB", "mfu")


def outcome(result):
    """What a training is judged by, without what no two runs have in common."""
    history = [{k: v for k, v in entry.items() if k not in MEASURED} for entry in result.result["history"]]
    return history, result.result["valid"], result.result["test"], result.result["best_step"]


def test_a_real_training_that_is_killed_ends_with_the_numbers_of_one_that_is_not(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    said_last = json.loads(
        invoke("ablate", "run", file, "--folder", tmp_path / "whole", "--device", "cpu", "--json").stdout
    )
    assert (said_last["done"], said_last["cells"], said_last["failed"]) == (1, 1, [])
    (whole,) = Study(file, folder=tmp_path / "whole").results()
    cut = Study(file, folder=tmp_path / "cut")
    pid = forked(cut._job(device="cpu"))
    end = time.monotonic() + 100
    while not list((tmp_path / "cut").glob("cells/*/run/checkpoints/checkpoint-8")):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL and cut.results() == []
    assert cut.run(device="cpu", quiet=True).done == 1
    (resumed,) = cut.results()
    assert outcome(resumed) == outcome(whole) and resumed.path.parent.name == whole.path.parent.name
    log = (resumed.path.parent / "log.txt").read_text()
    assert "resuming at step" in log and log.count("attempt 1") == 2
    assert not (resumed.path.parent / "run" / "checkpoints").exists()

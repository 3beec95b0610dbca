"""A training shared by two processes is the training of one: batches, evaluations, and what is left."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import hybridzoo as zoo
from hybridzoo.zoo.train.batches import Whole
from hybridzoo.zoo.train.examples import examples_from
from hybridzoo.zoo.train.options import TrainOptions
from hybridzoo.zoo.train.order import order_of
from hybridzoo.zoo.train.run import train

DRAW = np.random.default_rng(0)
# the last batch of every pass is short, and rows have unequal numbers of targets
ROWS = DRAW.integers(1, 200, (10, 12))
ROWS[:, :6] = np.where(np.arange(6) < DRAW.integers(1, 6, (10, 1)), ~ROWS[:, :6], ROWS[:, :6])
VAL = DRAW.integers(1, 200, (5, 12))
VAL[1, :9], VAL[3, 1:] = ~VAL[1, :9], ~VAL[3, 1:]
SETTINGS = {
    "val": VAL,
    "steps": 8,
    "eval_every": 2,
    "save_every": 4,
    "lr": 1e-2,
    "seed": 3,
    "report_to": "none",
    "device": "cpu",
}
MODEL = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2"]

SCRIPT = """
    import json, os, sys
    import torch
    sys.path.insert(0, os.path.dirname(sys.argv[1]))
    from test_train_processes import MODEL, ROWS, SETTINGS, curve, train
    torch.set_num_threads(1)
    result = train("transformer-tiny", ROWS, sys.argv[2], overrides=MODEL, batch_size=2, **SETTINGS)
    if os.environ["RANK"] == "0":
        json.dump([curve(result), result.tokens], open(sys.argv[3], "w"))
    torch.distributed.destroy_process_group()
"""


def curve(result):
    return [[entry["loss"], entry["grad_norm"], entry.get("eval_loss", 0)] for entry in result.history]


def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "script.py"), __file__,
            str(tmp_path / "two"), str(tmp_path / "two.json"),
        ],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses, tokens = json.loads((tmp_path / "two.json").read_text())
    one = train("transformer-tiny", ROWS, tmp_path / "one", overrides=MODEL, batch_size=4, **SETTINGS)
    assert losses == [pytest.approx(entry, rel=1e-5) for entry in curve(one)] and tokens == one.tokens
    assert json.loads((tmp_path / "two" / "train.json").read_text())["best"] == pytest.approx(one.best, rel=1e-5)
    for p, q in zip(zoo.load(tmp_path / "two").parameters(), one.model.parameters(), strict=True):
        assert np.allclose(p.detach(), q.detach(), atol=1e-5)


def test_rows_behind_the_last_make_batches_whole_and_hold_nothing_to_predict():
    examples = examples_from(ROWS, zoo.build("transformer-tiny", MODEL), TrainOptions(report_to="none"))
    whole = Whole(examples, 4)
    numbers = list(order_of(whole, seed=3))
    assert len(whole) == 12 and numbers[10:] == [10, 11] and numbers[:10] == list(order_of(examples, seed=3))
    assert sorted(numbers[:10]) == list(range(10))
    assert all(bool((whole[i]["labels"] == -100).all()) for i in (10, 11))
    assert all(bool((whole[i]["labels"] == examples[i]["labels"]).all()) for i in range(10))
    whole.set_epoch(1)
    assert examples.epoch == 1 and list(order_of(whole, seed=3))[:10] != numbers[:10]
    assert len(Whole(examples, 5)) == 10

"""Kill ``zoo train`` with signal 9 at moments spread over its life: the same command then ends as if it had not been killed."""

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.__main__ import main
from hybridzoo.zoo.digests import digest_weights
from hybridzoo.zoo.train import loop, run  # noqa: F401  # imported here once, and not by every process

MOMENTS = 10
MEASURED = ("seconds", "tokens_per_second", "memory_GiB", "mfu")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def write_documents(folder: Path) -> None:
    folder.mkdir()
    for name, first, last in (("train", 0, 120), ("val", 120, 140)):
        lines = [
            json.dumps({"text": f"document {i} of many: {'abcdefghij'[i % 10] * (i * 7 % 50)}"})
            for i in range(first, last)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def started(folder: Path) -> int:
    """A process that trains, as the command line has it; forked, so that nothing is imported again."""
    command = [
        "zoo", "train", "transformer-tiny", "d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2",
        "--data", str(folder / "train.jsonl"), "--val", str(folder / "val.jsonl"), "--out", str(folder / "out"), "--steps", "12",
        "--batch-size", "2", "--accumulate", "2", "--length", "64", "--save-every", "3", "--eval-every", "2", "--lr", "0.01",
        "--report-to", "none", "--device", "cpu",
    ]  # fmt: skip
    pid = os.fork()
    if pid:
        return pid
    status = 1
    gc.freeze()  # what the parent has made is not looked through, which would copy it
    try:
        for number in (1, 2):
            os.dup2(os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr, sys.argv = os.fdopen(1, "w"), os.fdopen(2, "w"), command
        # where the machine keeps what it has read must not be shared with runs before
        os.environ["XDG_CACHE_HOME"] = os.environ["HYBRIDZOO_CACHE"] = str(folder / "cache")
        torch.set_num_threads(1)
        main()
    except SystemExit as e:
        status = int(e.code or 0)
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> tuple:
    log = json.loads((folder / "out" / "train.json").read_text())
    assert log["finished"]
    history = [{k: v for k, v in entry.items() if k not in MEASURED} for entry in log["history"]]
    checkpoints = sorted(f.name for f in (folder / "out" / "checkpoints").iterdir())
    return history, log["best"], digest_weights(zoo.load(folder / "out")), checkpoints


def test_killed_at_any_moment_it_ends_with_the_same_losses(tmp_path):
    times, outcomes = [], []
    for name in ("whole", "again"):
        write_documents(tmp_path / name)
        begin = time.monotonic()
        assert ended(started(tmp_path / name)) == 0, (tmp_path / name / "said.txt").read_text()
        times.append(time.monotonic() - begin)
        outcomes.append(outcome(tmp_path / name))
    took, expected = min(times), outcomes[0]
    assert outcomes[1] == expected
    assert len(expected[0]) == 12 and sum("eval_loss" in entry for entry in expected[0]) == 6
    killed, resumed = 0, set()
    for i in range(MOMENTS):
        folder = tmp_path / f"cut{i}"
        write_documents(folder)
        pid = started(folder)
        time.sleep(took * (i + 0.5) / MOMENTS)
        os.kill(pid, signal.SIGKILL)
        killed += ended(pid) == -signal.SIGKILL
        assert ended(started(folder)) == 0, (folder / "said.txt").read_text()
        assert outcome(folder) == expected, (
            f"killed after {i + 0.5} of {MOMENTS} parts: {(folder / 'said.txt').read_text()}"
        )
        resumed |= {line for line in (folder / "said.txt").read_text().splitlines() if line.startswith("resuming at")}
        hidden = {f.name for f in (folder / "out").rglob(".*")} - {".train.lock", ".train.holder"}
        assert not hidden, hidden
    # it was at work when it was killed, and had come to different steps
    assert killed >= MOMENTS // 2 and len(resumed) >= 2, (killed, resumed)

"""Small cells, points and results for tests of studies, and cheap stand-ins for the training of a cell."""

import dataclasses
import math
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest

from hybridzoo.eval.ablate import Study
from hybridzoo.eval.ablate.cells import Cell, Point

__all__ = ["Spec", "a_cell", "a_point", "a_study", "note", "postgres", "result_of", "said"]


def a_point(name="attention=0.5", rates=(1e-3,), **more):
    more = {"task": {"name": "mqar", "length": 64}, "train": {"steps": 10}} | more
    return Point(name, {"attention": 0.5}, {"d_model": 16, "called": name}, tuple(rates), **more)


def a_cell(rate=1e-3, seed=0, point=None):
    point = point or a_point()
    return Cell("study", point, rate, seed, point.task, point.train, {})


def result_of(valid, test=None, metric="accuracy", **more):
    scores = {"valid": {metric: valid, "n": 8}, "test": {metric: valid if test is None else test, "n": 8}}
    return {"metric": metric, **scores, "seconds": 0.1, "steps": 10, **more}


@dataclasses.dataclass(frozen=True)
class Spec:
    """As much of a study's file as running it needs."""

    name: str = "tiny"
    scale: str = "smoke"
    measure: dict = dataclasses.field(default_factory=dict)
    seeds: tuple = (0, 1, 2)


def a_study(folder, points, function="quick", storage=None, **spec):
    """A Study of these points, whose cells one of the functions below trains."""
    study = Study.__new__(Study)
    study.spec, study.points, study.folder, study.storage = Spec(**spec), list(points), folder, storage
    study.function = f"ablation:{function}"
    return study


def note(folder, what):
    """Say in a file that many processes append to who does what with a cell."""
    with (folder.parent.parent / "said.txt").open("a") as f:
        f.write(f"{what} {folder.name} {os.getpid()}\n")


def said(folder, what):
    """The keys of cells that :func:`note` was told of, in order."""
    lines = [line.split() for line in (folder / "said.txt").read_text().splitlines()]
    return [key for word, key, _ in lines if word == what]


def quick(cell, folder, *, device=None, on_step=None):
    """A training that takes no time: the rate 1e-2 is best on validation, 1e-1 on test."""
    note(folder, "began")
    print("trained", flush=True)
    on_step(1, 0.5)
    best = -abs(math.log10(cell.rate) + 2)
    note(folder, "ended")
    return result_of(1 + best / 10, test=0.5 + cell.rate + cell.seed / 100, best=best)


def stepping(cell, folder, *, device=None, on_step=None, seconds=1.2, steps=12):
    """A training that takes a while, keeps its steps in a file and goes on from there."""
    file, first = folder / "steps.txt", 0
    if file.exists():
        first = int(file.read_text() or 0)
    note(folder, f"from{first}")
    for step in range(first + 1, steps + 1):
        time.sleep(seconds / steps)
        file.write_text(str(step))
        on_step(step, 1.0 / step)
    note(folder, "ended")
    return result_of(0.5 - cell.rate)


def failing(cell, folder, *, device=None, on_step=None):
    """A training that runs out of memory at the rate 1e-1, at 1e-3 the first time only."""
    note(folder, "began")
    first = said(folder.parent.parent, "began").count(folder.name) == 1
    if cell.rate == 1e-1 or (cell.rate == 1e-3 and first):
        raise MemoryError("CUDA out of memory.\nTried to allocate 9 GiB")
    return result_of(0.9 - cell.rate)


def diverging(cell, folder, *, device=None, on_step=None):
    """A training that diverges at rates of 1e-2 and more, at 1e-3 the first time only."""
    from hybridzoo.zoo.train import Diverged

    note(folder, "began")
    first = said(folder.parent.parent, "began").count(folder.name) == 1
    if cell.rate >= 1e-2 or (cell.rate == 1e-3 and first):
        raise Diverged("training diverged at step 7 of 10: the loss is nan", 7)
    return result_of(0.9 - cell.rate)


def deadly_once(cell, folder, *, device=None, on_step=None):
    """A training that at the rate 1e-1 kills its process the first time, as the system does where memory runs out."""
    note(folder, "began")
    if cell.rate == 1e-1 and said(folder.parent.parent, "began").count(folder.name) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    note(folder, "ended")
    return result_of(0.9 - cell.rate)


def deadly(cell, folder, *, device=None, on_step=None):
    """A training that at the rate 1e-1 kills its process every time."""
    note(folder, "began")
    if cell.rate == 1e-1:
        os.kill(os.getpid(), signal.SIGKILL)
    return result_of(0.9 - cell.rate)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The URL of a database of a server that is started for this, which has to be another user's than root."""
    if not all(map(shutil.which, ("initdb", "pg_ctl", "postgres"))):
        pytest.skip("needs a PostgreSQL server: initdb, pg_ctl and postgres are not all there")
    pytest.importorskip("psycopg")
    folder = tempfile.mkdtemp(prefix="pg-", dir="/tmp")
    before = []
    if os.geteuid() == 0:
        if not shutil.which("runuser"):
            pytest.skip("PostgreSQL does not run as root, and there is no runuser")
        before = ["runuser", "-u", "nobody", "--"]
        shutil.chown(folder, "nobody")
    data, port = f"{folder}/data", free_port()
    environment = os.environ | {"LC_ALL": "C"}
    made = subprocess.run(
        [*before, "initdb", "-E", "UTF8", "-D", data, "-A", "trust", "-U", "me", "--no-sync"],
        cwd=folder, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if made.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"initdb: {made.stderr.strip()}")
    control = [*before, "pg_ctl", "-D", data, "-w", "-t", "60"]
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    started = subprocess.run([*control, "-l", f"{folder}/log", "-o", options, "start"], cwd=folder, env=environment)
    assert started.returncode == 0, open(f"{folder}/log").read()
    yield f"postgresql://me@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], cwd=folder, check=True, env=environment)
    shutil.rmtree(folder)

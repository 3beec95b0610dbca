"""Running studies: phases, failures, stopping and going on, what is said meanwhile, and jobs of a cluster."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
from ablation import a_point, a_study, result_of, said
from rich.console import Console

import hybridzoo as zoo
from hybridzoo.eval.ablate import Study, progress, queue, run, worker
from hybridzoo.eval.ablate.job import Job
from hybridzoo.eval.ablate.statistics import choose
from hybridzoo.eval.ablate.store import Store

RATES = (1e-1, 1e-2, 1e-3)
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Workers in processes of their own find the trainings of these tests."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(worker, "_POLL", 0.05)


def points(n=2, rates=RATES):
    return [a_point(f"attention={i / 4:g}", rates) for i in range(n)]


def of(results):
    return sorted((r.cell.point.name, r.cell.rate, r.cell.seed) for r in results)


def test_rates_are_compared_with_the_first_seed_and_the_best_on_validation_gets_the_others(tmp_path):
    study = a_study(tmp_path, points())
    summary = study.run(quiet=True)
    expected = [(p.name, rate, 0) for p in study.points for rate in RATES]
    expected += [(p.name, 1e-2, seed) for p in study.points for seed in (1, 2)]
    assert of(study.results()) == sorted(expected)
    assert (summary.cells, summary.done, summary.left, summary.failed, summary.status) == (10, 10, 0, [], 0)
    # all of the first phase before any of the second, and each once
    began = said(tmp_path, "began")
    keys = {study.store.key(r.cell): r.cell.seed for r in study.results()}
    assert [keys[key] for key in began[:6]] == [0] * 6 and len(set(began)) == len(began) == 10


def test_a_second_run_trains_nothing_and_a_further_seed_only_itself(tmp_path):
    assert a_study(tmp_path, points()).run(quiet=True).done == 10
    assert a_study(tmp_path, points()).run(quiet=True).done == 10 and len(said(tmp_path, "began")) == 10
    wider = a_study(tmp_path, points(3), seeds=(0, 1, 2, 3))
    assert wider.run(quiet=True, only="attention=0.25").done == 6 and len(said(tmp_path, "began")) == 11
    assert wider.summary().cells == 6 + 6 + 6 and wider.summary().left == 7


def test_results_of_another_version_of_the_study_are_counted_and_left_out(tmp_path):
    a_study(tmp_path, points(1)).run(quiet=True)
    changed = a_study(tmp_path, [a_point("attention=0", RATES, task={"name": "mqar", "length": 128})])
    assert changed.results() == [] and changed.summary().stale == 5
    assert changed.run(quiet=True).stale == 5 and len(changed.results()) == 5
    assert "left out: 5 results of other code or of an earlier version" in str(changed.summary())


def test_a_config_may_hold_what_json_has_no_number_for(tmp_path):
    """As Mamba-2's limits of step sizes, 0 and infinity."""
    point = dataclasses.replace(points(1)[0], config={"mixers": {"mamba2": {"dt_limit": [0.0, math.inf]}}})
    study = a_study(tmp_path, [point])
    assert study.run(quiet=True).done == 5
    assert len(a_study(tmp_path, [point]).results()) == 5
    kept = json.loads(study.results()[0].path.read_text(), parse_constant=pytest.fail)
    assert kept["cell"]["point"]["config"] == {"mixers": {"mamba2": {"dt_limit": [0.0, "inf"]}}}


def test_a_point_with_a_problem_is_reported_and_not_trained(tmp_path):
    study = a_study(tmp_path, [*points(1), a_point("attention=1", problem="1.2 % too wide")])
    summary = study.run(quiet=True)
    assert summary.done == summary.cells == 5 and summary.unmatched == {"attention=1": "1.2 % too wide"}
    assert "1 point cannot be built or matched: attention=1" in str(summary)
    assert json.loads(json.dumps(summary.plain()))["left"] == 0


def test_failed_cells_are_tried_twice_kept_with_their_log_and_the_rest_goes_on(tmp_path):
    study = a_study(tmp_path, points(1), "failing")
    summary = study.run(quiet=True)
    (failure,) = study.failures()
    assert (failure.cell.rate, failure.attempts, failure.error) == (1e-1, 2, "MemoryError: CUDA out of memory.")
    log = failure.log.read_text()
    assert (
        log.count("Traceback (most recent call last)") == 2 and "Tried to allocate 9 GiB" in log and "attempt 2" in log
    )
    # 1e-3 failed once and came through; it is best, and the other seeds are of it
    assert of(study.results()) == [("attention=0", 1e-3, s) for s in range(3)] + [("attention=0", 1e-2, 0)]
    assert summary.status == 1 and "given up: attention=0, rate 0.1, seed 0: MemoryError" in str(summary)
    began = len(said(tmp_path, "began"))
    assert study.run(quiet=True).status == 1 and len(said(tmp_path, "began")) == began
    study.function = "ablation:quick"
    assert study.run(quiet=True, again=True).status == 0 and study.failures() == []


def test_a_rate_that_diverges_twice_is_a_result_that_loses(tmp_path, capsys):
    study = a_study(tmp_path, points(1), "diverging")
    summary = study.run()
    assert (summary.status, summary.failed, summary.diverged, summary.left) == (0, [], 2, 0)
    assert "diverged, which counts as the worst of rates: 2 trainings" in str(summary)
    assert "rate 0.01, seed 0: diverged, at step 7 the last time" in capsys.readouterr().err
    assert {r.cell.rate: r.result["stopped"] for r in study.results() if "stopped" in r.result} == {
        1e-1: "diverged",
        1e-2: "diverged",
    }
    (chosen,) = choose(study.results())
    assert (chosen.rate, chosen.n, chosen.diverged) == (1e-3, 3, 0)
    assert chosen.tried == {1e-3: pytest.approx(0.899), 1e-2: None, 1e-1: None}
    began = len(said(tmp_path, "began"))
    assert began == 2 * 5 and study.run(quiet=True).status == 0 and len(said(tmp_path, "began")) == began
    assert study.frame()["test"].isna().sum() == 2


def test_where_every_rate_diverges_no_seed_is_added_and_it_is_said(tmp_path):
    study = a_study(tmp_path, points(1, (1e-2, 1e-1)), "diverging")
    summary = study.run(quiet=True)
    assert (summary.cells, summary.done, summary.left, summary.status) == (2, 2, 0, 1)
    assert summary.unscored == ("attention=0",) and "every rate diverged: attention=0. Give lower rates." in str(
        summary
    )
    assert choose(study.results()) == []


def test_where_every_rate_fails_the_point_is_over(tmp_path):
    summary = a_study(tmp_path, points(1, (1e-1,)), "failing").run(quiet=True)
    assert (summary.cells, summary.done, len(summary.failed), summary.left) == (1, 0, 1, 0)


def test_what_is_asked_wrongly_is_said_before_anything_is_made(tmp_path):
    study = a_study(tmp_path / "study", points())
    with pytest.raises(ValueError, match=r"only='mamba': no point.*'attention=0', 'attention=0.25'"):
        study.run(only="mamba")
    with pytest.raises(ValueError, match="minutes=-1: must be more than 0"):
        study.run(minutes=-1)
    with pytest.raises(ValueError, match="workers=0: must be at least 1"):
        study.run(workers=0)
    assert not (tmp_path / "study").exists() and study.failures() == [] and study.results() == []


def test_its_time_over_a_study_stops_within_a_cell_and_goes_on_from_there(tmp_path):
    study = a_study(tmp_path, points(1, (1e-2,)), "stepping", seeds=(0,))
    summary = study.run(quiet=True, minutes=0.4 / 60)
    assert (summary.left, summary.failed, summary.status, summary.interrupted) == (1, [], 0, False)
    assert "The same command goes on" in str(summary) and study.failures() == []
    assert study.run(quiet=True).done == 1
    begun, resumed, ended = [line.split()[0] for line in (tmp_path / "said.txt").read_text().splitlines()]
    assert (begun, ended) == ("from0", "ended") and 1 <= int(resumed.removeprefix("from")) < 12


def test_ctrl_c_gives_the_cell_back(tmp_path):
    study = a_study(tmp_path, points(1), "stepping")
    timer = threading.Timer(0.9, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    summary = study.run(quiet=True)
    timer.join()
    assert summary.interrupted and summary.status == 130 and summary.left > 0
    assert study.run(quiet=True).status == 0
    words = [line.split()[0] for line in (tmp_path / "said.txt").read_text().splitlines()]
    assert words.count("ended") == 5


def test_a_worker_in_a_thread_stops_too(tmp_path):
    study = a_study(tmp_path, points(1, (1e-2,)), "stepping", seeds=(0,))
    summaries = []
    thread = threading.Thread(target=lambda: summaries.append(study.run(quiet=True, minutes=0.4 / 60)))
    thread.start()
    thread.join()
    assert summaries[0].left == 1 and not summaries[0].interrupted and study.run(quiet=True).done == 1


# several processes


class Forked:
    """A worker process as :mod:`subprocess` has it, but forked, so that nothing is imported again."""

    def __init__(self, job, place, workers, logs):
        read, write = os.pipe()
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                # the other workers' pipes are not this one's to hold open
                os.closerange(write, write + 1)
                for stream in STARTED:
                    os.close(stream.stdin.fileno())
                os.dup2(read, 0)
                log = os.open(logs / f"{place}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1), os.dup2(log, 2)
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
                signal.signal(signal.SIGINT, signal.default_int_handler)
                worker.main()
                status = 0
            except SystemExit as e:
                status = e.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(read)
        self.stdin = open(write, "w")
        self.stdin.write(json.dumps(job.plain()) + "\n")
        self.stdin.flush()
        STARTED.append(self)

    def poll(self, flag=os.WNOHANG):
        if self.status is None:
            pid, status = os.waitpid(self.pid, flag)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, timeout=None):
        end = time.monotonic() + (timeout or 100)
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        assert self.status is not None

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


STARTED = []
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


@pytest.fixture
def forked(monkeypatch):
    """Workers are forked."""
    STARTED.clear()
    monkeypatch.setattr(run, "_start", Forked)


def said_by(folder):
    return [line.split() for line in (folder / "said.txt").read_text().splitlines()]


def ended_once(folder, count):
    ended = said(folder, "ended")
    return len(set(ended)) == len(ended) == count


def alive(folder):
    """The processes that have said something and have not ended."""
    pids = {int(pid) for _, _, pid in said_by(folder)}
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids - {os.getpid()}}
    return [pid for pid, stat in states.items() if stat.exists() and stat.read_text().split(") ")[1][0] != "Z"]


def wait_until(holds):
    end = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def driver(folder, workers=2):
    """A process that runs a study; its status is the study's."""
    pid = os.fork()
    if pid:
        return pid
    STARTED.clear()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(folder / "driver.txt", "w", buffering=1) as log, contextlib.redirect_stderr(log):
            os._exit(a_study(folder, points(1), "stepping").run(workers=workers, quiet=True).status)
    finally:
        traceback.print_exc()
        os._exit(99)


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@needs_fork
def test_workers_divide_the_cells_and_one_that_dies_is_replaced(tmp_path, forked):
    study = a_study(tmp_path, points(1), "deadly_once")
    summary = study.run(workers=2, quiet=True)
    assert summary.done == 5 and summary.status == 0 and ended_once(tmp_path, 5)
    assert len(STARTED) == 3 and sorted(process.status for process in STARTED) == [-9, 0, 0]
    assert len({pid for word, _, pid in said_by(tmp_path) if word == "ended"}) >= 2
    assert [entry.deaths for entry in study._queue().entries().values() if entry.done] == [0] * 5
    assert not (tmp_path / "workers").exists()


@needs_fork
def test_a_cell_that_kills_every_worker_is_given_up_and_the_rest_goes_on(tmp_path, forked, monkeypatch):
    monkeypatch.setattr(queue, "DEATHS", 3)
    study = a_study(tmp_path, points(1), "deadly")
    summary = study.run(workers=2, quiet=True)
    assert summary.done == 4 and summary.status == 1
    assert [(f.cell.rate, f.error[:21]) for f in summary.failed] == [(1e-1, "its process died 3 ti")]
    assert said(tmp_path, "began").count(study.store.key(summary.failed[0].cell)) == 3


@needs_fork
def test_workers_that_cannot_begin_say_why(tmp_path, forked):
    study = a_study(tmp_path, points(1))
    study.function = "nowhere:nothing"
    with pytest.raises(ValueError, match=r"a worker has ended with status 1 and said: ModuleNotFoundError.*nowhere"):
        study.run(workers=2, quiet=True)
    assert study.summary().failed == [] and study.summary().left == 5
    assert [process.poll() for process in STARTED] == [1, 1]


@needs_fork
def test_ctrl_c_stops_all_workers_and_the_same_call_goes_on(tmp_path, forked):
    pid = driver(tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("cells/*/steps.txt"))) == 2)
    os.kill(pid, signal.SIGINT)
    assert status_of(pid) == 130 and alive(tmp_path) == [] and not (tmp_path / "workers").exists()
    assert "stopping after the running steps; Ctrl-C again" in (tmp_path / "driver.txt").read_text()
    assert {entry.state for entry in a_study(tmp_path, points(1))._queue().entries().values()} <= {"none", "waiting"}
    assert a_study(tmp_path, points(1), "stepping").run(quiet=True).done == 5 and ended_once(tmp_path, 5)
    assert len([word for word, _, _ in said_by(tmp_path) if word.startswith("from") and word != "from0"]) == 2


@needs_fork
def test_workers_do_not_outlive_a_killed_parent(tmp_path, forked):
    pid = driver(tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("cells/*/steps.txt"))) == 2)
    os.kill(pid, signal.SIGKILL)
    assert status_of(pid) == -9
    wait_until(lambda: not alive(tmp_path))
    assert a_study(tmp_path, points(1), "stepping").run(quiet=True).done == 5 and ended_once(tmp_path, 5)


@pytest.mark.slow
def test_workers_are_processes_of_their_own(tmp_path):
    study = a_study(tmp_path, points(1, (1e-2,)), "stepping", seeds=(0,))
    job = study._job()
    run._work_beside(job, 1, study._queue())
    assert study.summary().done == 1 and str(os.getpid()) not in {pid for _, _, pid in said_by(tmp_path)}
    assert not (tmp_path / "workers").exists()


# what is said meanwhile


def test_without_a_terminal_there_is_a_line_for_every_cell(tmp_path, capsys):
    a_study(tmp_path, points(1), "failing").run()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tiny: 0 of 5 cells are done"
    done = [
        line for line in lines if re.match(r"\d/5  attention=0, rate 0\.0\d+, seed \d: accuracy 0\.\d+ in 0 s", line)
    ]
    assert len(done) == 4 and sum(line.startswith("given up  attention=0, rate 0.1") for line in lines) == 1


def test_what_a_training_prints_goes_to_its_log(tmp_path, capsys):
    study = a_study(tmp_path, points(1, (1e-2,)), seeds=(0,))
    study.run()
    out, err = capsys.readouterr()
    assert out == "" and "trained" not in err
    assert "trained\n" in (study.results()[0].path.parent / "log.txt").read_text()


def test_the_table_shows_each_point_and_what_is_left(tmp_path):
    study = a_study(tmp_path, [*points(3), a_point("attention=1", problem="no")])
    study.run(quiet=True, only="attention=0")
    job, waiting = study._job(), study._queue()
    waiting.add(job.missing(study.store, ()))
    taken = waiting.take(job.missing(study.store, ()))
    waiting.beat(taken, 5, 2.0)
    now = progress.snapshot(job, study.store, waiting)
    console = Console(file=io.StringIO(), width=120)
    console.print(progress.table(now, "tiny"))
    text = console.file.getvalue()
    assert re.search(r"attention=0 +│ done +│ +5/5 │ +0\.01 │ 0\.5200 \(3\) │", text)
    assert (
        re.search(r"attention=0\.25 +│ running +│ +0/\d │ +│ +│ +2\.0 │", text)
        and "waiting" in text
        and "cannot be" in text
    )
    assert re.search(r"5 of 15 cells, 0:00:0\d left", text)
    console.print(progress.table(now, "tiny", height=2))
    assert "... and 3 more" in console.file.getvalue()


def test_the_live_table_is_drawn_in_a_terminal(tmp_path, monkeypatch):
    drawn = io.StringIO()
    drawn.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_EVERY", 0.05)
    a_study(tmp_path, points(1)).run()
    assert "best rate" in drawn.getvalue() and "5 of 5 cells, 0:00:00 left" in drawn.getvalue()


# parts


def test_only_cells_of_the_first_seed_are_measured(tmp_path):
    study = a_study(tmp_path, points(1), measure={"contexts": [1024]})
    study.run(quiet=True)
    assert {(r.cell.seed, *r.cell.measure) for r in study.results()} == {(0, "contexts"), (1,), (2,)}


def test_a_job_goes_through_json(tmp_path):
    job = a_study(tmp_path, points(), storage="sqlite:///x.db")._job(minutes=3)
    assert Job.from_plain(json.loads(json.dumps(job.plain()))) == job


def test_a_cell_that_was_finished_meanwhile_is_not_trained(tmp_path):
    study = a_study(tmp_path, points(1))
    waiting, missing = study._queue(), study._job().missing(study.store, ())
    waiting.add(missing)
    taken = waiting.take(missing)
    study.store.put(missing[taken.key], result_of(0.5))
    worker._attempt(study.store, waiting, taken, missing[taken.key], lambda cell, place: pytest.fail("trained"))
    assert waiting.entries()[taken.key].state == "none" and waiting.take([taken.key]) is None


def test_a_worker_of_other_sources_refuses(tmp_path):
    job = dataclasses.replace(a_study(tmp_path, points())._job(), code="another")
    with pytest.raises(ValueError, match="sources or foreign mixers of this process are not those"):
        worker.work(job)
    assert not (tmp_path / "journal.log").exists()


def test_mixers_of_ones_own_are_known_to_workers_and_part_of_what_has_them(tmp_path):
    from hybridzoo.zoo import registry

    file = tmp_path / "my_ablated_mixer.py"
    file.write_text(
        "import hybridzoo as zoo\nfrom hybridzoo.layers.mamba import Mamba\n\n"
        "@zoo.register_mixer('ablated_mine')\nclass Mine(Mamba):\n    pass\n"
    )
    study = {
        "question": "Which?",
        "base": "mamba-tiny",
        "axes": {"mixer": {"key": "mixers.mamba.type", "values": ["mamba", "ablated_mine"]}},
        "task": {"name": "mqar"},
        "train": {"steps": 2},
        "rates": {"default": [1e-3]},
    }

    def job():
        return Study(study, folder=tmp_path)._job()

    def keys():
        return [made.cell(point, 1e-3, 0).key("code") for point in made.points]

    made = Study(study | {"axes": {"mixer": {"key": "mixers.mamba.type", "values": ["mamba"]}}}, folder=tmp_path)._job()
    (alone,) = keys()
    try:
        zoo.import_mixers(file)
        made = job()
        before = keys()
        assert not made.points[1].problem and before[0] == alone and str(file.resolve()) in made.imports
        file.write_text(file.read_text() + "\n# changed\n")
        with pytest.raises(ValueError, match="sources or foreign mixers of this process"):
            worker.check_code(made)
        made = job()
        assert keys()[0] == alone and keys()[1] != before[1]
    finally:
        registry._entries.pop("ablated_mine", None)


def test_the_public_face_is_found_and_waits_for_nothing_that_it_does_not_need():
    code = "import sys, hybridzoo; hybridzoo.eval.ablate; print(*sorted({'optuna', 'pandas', 'torch', 'rich'} & {*sys.modules}))"
    shown = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "\n" and zoo.eval.ablate.Study.__module__ == "hybridzoo.eval.ablate.study"


# SLURM


def test_jobs_of_a_cluster_do_the_work(tmp_path):
    pytest.importorskip("submitit")
    study = a_study(tmp_path, points(1), "stepping")
    (job,) = study.submit(1, minutes=10, settings={"cluster": "local"})
    assert job.result() == len(study.results()) == 5
    assert len(set(said(tmp_path, "ended"))) == len(said(tmp_path, "ended")) == 5


def test_a_job_that_is_preempted_is_submitted_again(tmp_path):
    pytest.importorskip("submitit")
    from hybridzoo.eval.ablate.cluster import ClusterWorker

    again = ClusterWorker().checkpoint({"study": "x"}, 7)
    assert (again.args, again.kwargs) == (({"study": "x"}, 7), {})


def test_a_cluster_is_asked_for_what_it_can_do(tmp_path):
    study = a_study(tmp_path, points(1))
    with pytest.raises(ValueError, match="more than 3 minutes"):
        study.submit(1, minutes=2)
    with pytest.raises(ValueError, match=r"minutes=None: jobs need .* a time limit"):
        study.submit()
    with pytest.raises(ValueError, match=r"submitit: Unknown argument 'nonsense'"):
        study.submit(1, minutes=10, settings={"cluster": "debug", "nonsense": "1"})
    with pytest.raises(ValueError, match='submitit: Parameter "gpus_per_node" expected'):
        study.submit(1, minutes=10, settings={"cluster": "debug", "gpus_per_node": "many"})
    assert Store(tmp_path).results([]) == []

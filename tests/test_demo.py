"""The demo: a fair budget, drills that are the tasks, nothing leaked, and a run that goes on where it was."""

import dataclasses
import html.parser
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from hybridzoo.eval.demo import run as demo
from hybridzoo.eval.demo.drills import induction_drills, mqar_drills, selective_copying_drills
from hybridzoo.eval.demo.page import headline, write_page
from hybridzoo.eval.demo.side_by_side import WorkerError, run_side_by_side
from hybridzoo.eval.tasks import render
from hybridzoo.eval.tasks.generators import evaluation_rng
from hybridzoo.zoo.models.stats import stats
from hybridzoo.zoo.train.data import topics


def text_of(ids):
    return "".join(chr(i if i >= 0 else ~i) for i in ids)


def answers(ids):
    return [i for i, token in enumerate(ids) if token >= 0]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_the_models_have_one_budget():
    params = [stats(name, 64).params for name in demo.LEARNING_RATES]
    assert max(params) / min(params) <= 1.02


def test_mqar_drills_ask_for_what_their_pairs_say(rng):
    for ids in mqar_drills(rng, 20, 31, pairs=4, vocab=18):
        text = text_of(ids)
        pairs = dict(re.findall("..", text[:8]))
        assert len(text) == 30 and len(pairs) == 4
        assert answers(ids) == list(range(9, 30, 2)) and all(text[i] == pairs[text[i - 1]] for i in answers(ids))


def test_induction_drills_repeat_what_followed_the_marker(rng):
    for ids in induction_drills(rng, 20, 63):
        text = text_of(ids)
        after = [text[i + 1] for i in range(62) if text[i] == ">"]
        assert len(set(after)) == 1 and len(answers(ids)) == len(after) - 1 and len(text) == 63


def test_selective_copying_drills_are_the_tasks_documents():
    sizes = {"length": 12, "tokens": 4, "vocab": 10}
    drills = selective_copying_drills(np.random.default_rng(3), 5, **sizes)
    documents = render.selective_copying_documents(np.random.default_rng(3), 5, **sizes)
    assert [text_of(d) for d in drills] == [d.text for d in documents]
    assert all(answers(d) == [17, 18, 19, 20] for d in drills)


def test_drills_are_written_in_the_symbols_of_the_tasks(rng):
    tasks = {"mqar": render.mqar_documents, "induction": render.induction_documents}
    for (make, drills), task in zip(
        [(tasks["mqar"], mqar_drills), (tasks["induction"], induction_drills)], demo.TASKS, strict=False
    ):
        sizes = {k: v for k, v in task.sizes.items() if k != "docs"}
        ours = set("".join(text_of(d) for d in drills(rng, 200, **sizes | {"length": 63})))
        theirs = set("".join(d.text for d in make(rng, 400, **sizes)))
        assert ours == theirs


def test_no_evaluated_exercise_and_no_held_out_text_is_trained_on():
    text = topics()
    rows = demo.training_rows(text["train"])
    assert rows.shape == (demo.STEPS * demo.BATCH, demo.LENGTH)
    stream = "\n".join(text_of(row) for row in rows)
    makers = (render.mqar_documents, render.induction_documents, render.selective_copying_documents)
    for make, task in zip(makers, demo.TASKS, strict=True):
        sizes = {k: v for k, v in task.sizes.items() if k != "docs"}
        for document in make(evaluation_rng(0), task.sizes["docs"], **sizes):
            assert document.text[: document.questions[0].end] not in stream
    held_out = {
        t[i : i + 60] for t in text["validation"] for i in range(0, len(t) - 60, 60) if t[i : i + 60].strip(" -+|\n*")
    }
    trained = {text_of(row) for row in rows}
    assert held_out and not any(chunk in row for row in trained for chunk in held_out)


def test_byte_frequencies_need_what_their_entropy_says():
    assert demo.unigram_bits_per_byte({"train": ["ab" * 50_000], "validation": ["abba"]}) == pytest.approx(1, abs=0.01)


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts, self.urls, self.classes = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.classes += [v for k, v in attrs if k == "class" and tag == "div"]
        self.urls += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]
        if tag not in ("meta", "path", "use", "rect", "line", "br", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_stands_alone_and_is_well_formed(tmp_path):
    model = {
        "pattern": "mamba * 2", "params": 10, "active_params": 10, "tokens_per_second": 5.0, "tokens_per_step": 8,
        "history": [{"step": i, "loss": 3.0 / i} for i in range(1, 9)], "bits_per_byte": 2.5, "accuracy": {"t": 0.5},
        "sample": "a <b> & {{title}}", "command": "zoo eval 'a b' --tasks t",
    }  # fmt: skip
    results = {
        "models": [model | {"name": "one"}, model | {"name": "two"}],
        "tasks": [{"name": "t", "title": "Task", "about": "What?", "chance": 0.25}],
        "text": {"unigram_bits_per_byte": 4.8}, "prompt": "The ", "facts": {"seed": "0"},
    }  # fmt: skip
    file = write_page(results, tmp_path / "deep" / "report.html")
    page = Page()
    page.feed(file.read_text())
    # one chart of losses, one of the text, one for the task
    assert page.open == [] and sum("chart" in c for c in page.classes) == 3 and page.urls == ["report.json"]
    assert json.loads((file.parent / page.urls[0]).read_text()) == results
    assert any("zoo eval 'a b' --tasks t" in text for text in page.texts)
    assert "a <b> & {{title}}" in page.texts and "img" not in page.tags and "script" not in page.tags
    again = write_page(results, tmp_path / "report.html")
    assert again.read_text() == file.read_text()


def test_the_headline_says_who_is_best_and_knows_ties():
    def said(**scores):
        models = [{"name": f"{n}-tiny", "bits_per_byte": b, "accuracy": {"t": a}} for n, (b, a) in scores.items()]
        return headline({"models": models})

    assert said(mamba=(2.371, 0.9), jamba=(2.4, 0.974), other=(2.5, 0.966)) == (
        "Mamba reads unseen text best, at 2.37 bits per byte; Jamba and Other recall best, with 97 % right"
    )
    assert (
        said(mamba=(2.3, 0.9), jamba=(2.4, 0.8))
        == "Mamba leads in both: 2.30 bits per byte of unseen text, 90 % of recall right"
    )


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 3)
    monkeypatch.setattr(demo, "LEARNING_RATES", {"transformer-tiny": 3e-3})
    monkeypatch.setattr(demo, "TASKS", tuple(dataclasses.replace(t, sizes=t.sizes | {"docs": 2}) for t in demo.TASKS))
    # in this process: one that is started anew would not know the small sizes
    monkeypatch.setattr(demo, "run_side_by_side", lambda jobs, out, console: [exec(code) for code in jobs.values()])


def test_the_second_run_uses_what_the_first_has_left(small_demo, tmp_path, capsys):
    first = demo.run(tmp_path)
    said = capsys.readouterr().out
    assert "trained, " in said and "evaluated, " in said and "bits/byte" in said and "without a model" in said
    assert first["models"][0]["bits_per_byte"] < 10 and len(first["models"][0]["sample"]) == 200
    assert first["tasks"][0]["chance"] == 0.25 and (tmp_path / "report.html").exists()
    again = demo.run(tmp_path)
    said = capsys.readouterr().out
    assert "was trained before" in said and "was evaluated before" in said
    assert again["models"] == first["models"]


def test_the_printed_command_gives_the_printed_numbers(small_demo, tmp_path, capsys, monkeypatch):
    from typer.testing import CliRunner

    from hybridzoo.__main__ import app

    (model,) = demo.run(tmp_path / "with a blank")["models"]
    command = model["command"]
    assert command in capsys.readouterr().out and "--add-bos-token" in command
    assert command in html.unescape((tmp_path / "with a blank" / "report.html").read_text())
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--json"])
    assert result.exit_code == 0, result.output
    found = {(row["task"], row["metric"]): row["value"] for row in json.loads(result.stdout)}
    assert found["hybridzoo_bpb", "bits_per_byte"] == model["bits_per_byte"]
    assert {task: found[task, "acc"] for task in model["accuracy"]} == model["accuracy"]


def test_the_demos_sizes_are_the_tasks_own():
    # so that the command needs no sizes, and that a score of `zoo eval` is one of what the demo has trained for
    assert demo._resized() == {} and "--metadata" not in demo.command("runs/demo/mamba-tiny")
    assert demo.TASKS[0].sizes == {"docs": 64, "length": 16, "pairs": 4, "vocab": 18}


def test_other_settings_start_again_and_say_so(small_demo, tmp_path, capsys, monkeypatch):
    demo.run(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(demo, "LEARNING_RATES", {"transformer-tiny": 1e-3})
    demo.run(tmp_path)
    said = capsys.readouterr().out
    assert "starts again" in said and "another lr (0.003 there, 0.001 now)" in said and "evaluated, " in said


def test_jobs_report_and_a_failing_one_names_its_log(tmp_path):
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    tell = "from hybridzoo.eval.demo.side_by_side import message\n"
    run_side_by_side({"good": tell + "message(done=1, total=2, note='x'); message(say='hello')"}, tmp_path, console)
    assert "good: hello" in console.export_text()
    with pytest.raises(WorkerError, match="bad: ended with status 1") as e:
        run_side_by_side({"bad": "raise SystemError('oh')"}, tmp_path, console)
    assert "log.txt" in str(e.value) and "oh" in (tmp_path / "bad" / "log.txt").read_text()


def test_ctrl_c_reaches_every_job_once(tmp_path):
    job = (
        "import signal, time, pathlib\n"
        "file = pathlib.Path({0!r})\n"
        "def save(*_):\n    file.open('a').write('saved ')\n    raise SystemExit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "file.write_text('started ')\n"
        "time.sleep(60)\n"
    )
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    jobs = {f.stem: job.format(str(f)) for f in files}
    code = (
        "import json, pathlib, os, sys\n"
        "os.sched_getaffinity = lambda pid: {0, 1}\n"
        "from rich.console import Console\n"
        "from hybridzoo.eval.demo.side_by_side import run_side_by_side\n"
        f"run_side_by_side(json.loads({json.dumps(jobs)!r}), pathlib.Path({str(tmp_path)!r}), Console())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not all(f.exists() and f.read_text() for f in files):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors and process.returncode != 0
    assert [f.read_text() for f in files] == ["started saved "] * 2

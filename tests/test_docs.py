"""README and docs are true: their snippets run, links lead somewhere, commands exist, tables name what ships, figures are committed ones."""

import csv
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hybridzoo as zoo
from hybridzoo.eval.ablate import Study
from hybridzoo.eval.bench.readme import END, PAGES, START, section
from hybridzoo.zoo import registry

ROOT = Path(zoo.__file__).resolve().parent
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = TEXTS["README.md"]


def blocks(language):
    """Every fenced block of a language, with the page it is on."""
    return [
        pytest.param(code, id=f"{page}:{text[: text.index(code)].count(chr(10)) + 1}")
        for page, text in TEXTS.items()
        for code in re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    ]


def files_of(page, folder):
    """Write the YAML files of a page that say their name into a folder, as its reader does; return them."""
    found = re.findall(r"^```yaml\n(# ([\w-]+\.yaml)\b.*?)^```", TEXTS[page], re.M | re.S)
    for code, name in found:
        (folder / name).write_text(code, encoding="utf-8")
    return [folder / name for _, name in found]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_snippets_run(code, tmp_path, monkeypatch, request):
    files_of(request.node.callspec.id.split(":")[0], tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    exec(compile(code, "snippet", "exec"), {})


@pytest.mark.parametrize("code", blocks("yaml"))
def test_the_configs_shown_work(code, tmp_path):
    (tmp_path / "my.yaml").write_text(code)
    if re.search("^axes:", code, re.M):
        assert not any(point.problem for point in Study(tmp_path / "my.yaml").points)
        return
    assert zoo.build(tmp_path / "my.yaml", device="meta").num_params() > 0


def run_from_top_to_bottom(page, first, folder):
    """In one folder, as a reader has it, with fewer steps: what Python writes at first, and then all that a shell runs; the rest is above."""
    found = re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.M | re.S)
    if first:
        exec(next(code for code in found if first in code), {})
    tools = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    for code in re.findall(r"^```bash\n(.*?)^```", TEXTS[page], re.M | re.S):
        code = re.sub(r"--steps \d+", "--steps 4", code).replace("--batch-size 16", "--batch-size 2")
        ran = subprocess.run(["bash", "-ec", code], cwd=folder, env=os.environ | tools, capture_output=True, text=True)
        assert ran.returncode == 0, f"{code}\n{ran.stderr}"


@pytest.mark.slow
def test_the_tutorial_of_training_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_from_top_to_bottom("docs/train.md", "topics()", tmp_path)
    runs = {path.parent.name: path.read_text() for path in (tmp_path / "runs").glob("*/report.html")}
    assert {"hybrid", "killed", "carried", "muon", "further", "tuned"} <= set(runs)
    assert (tmp_path / "runs/tuned/adapter/adapter_config.json").exists() and "LoRA of rank 8" in runs["tuned"]
    assert "nats per token of text it has not seen" in runs["hybrid"] and "Expert load" in runs["hybrid"]


@pytest.mark.slow
def test_the_page_of_ablations_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (file,) = files_of("docs/ablate.md", tmp_path)
    file.write_text(re.sub(r"steps: \d+", "steps: 2", file.read_text()))
    run_from_top_to_bottom("docs/ablate.md", None, tmp_path)
    page = (tmp_path / "runs/ablate/tiny-short/report.html").read_text()
    assert "The best point is attention=" in page and "zoo ablate run tiny.yaml --scale short" in page
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXTS["docs/ablate.md"], re.M | re.S)
    names = {}
    exec(code, names)
    table = names["table"]
    assert len(table) == 7 and table[table.chosen].groupby("point").seed.nunique().to_dict() == dict.fromkeys(
        ("attention=0", "attention=0.5", "attention=1"), 2
    )
    assert "7 trainings" in capsys.readouterr().out


def test_the_table_of_studies_and_of_their_keys_is_right():
    from hybridzoo.eval.ablate import schema
    from hybridzoo.eval.ablate.tasks import TASKS

    page = TEXTS["docs/ablate.md"]
    questions = {study["name"]: study["question"] for study in schema.described()}
    assert dict(re.findall(r"^\| `([\w-]+)` \| (.*\?) \|$", page, re.M)) == questions
    keys = page.split("| key | what it says |")[1].split("\n\n")[0]
    assert set(schema._KEYS) | set(TASKS) <= set(re.findall(r"`([\w-]+)`", keys))


@pytest.mark.slow
def test_the_tutorial_of_images_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_from_top_to_bottom("docs/vision.md", "builtin_set", tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["n"] == 359 and (tmp_path / "scores.svg").exists()
    page = (tmp_path / "explain.html").read_text()
    assert "Untrained" in page and "Trained" in page and "columns ↑" in page


def test_the_table_of_image_models_is_right():
    table = TEXTS["docs/vision.md"].split("## Which model is which")[1].split("##")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]*) \|[^|]*\| ([\d, ]+) \| (\d+) \| ([\d,]+) \|", table, re.M)
    assert len(rows) == 12
    for name, _, blocks, width, parameters in rows:
        model = zoo.build(name, device="meta")
        assert (f"{model.num_params():,}", str(model.widths[0])) == (parameters, width)
        mixing = [spec.stage for spec in model.specs if spec.token in ("ss2d", "mamba")]
        assert blocks == ", ".join(str(mixing.count(stage)) for stage in sorted(set(mixing)))


def test_the_picture_of_what_a_model_sees_is_its_committed_result():
    from hybridzoo.zoo.report.explained import explained_picture

    result = json.loads((ROOT / "eval/results/fields.json").read_text(encoding="utf-8"))
    drawn = explained_picture(result["explained"])
    assert (ROOT / "docs/fields.svg").read_text(encoding="utf-8") == drawn, "run: zoo bench readme"
    assert f"\n{result['about']['command']}\n" in TEXTS["docs/vision.md"]


def test_the_picture_of_the_tutorial_is_its_committed_result():
    from hybridzoo.zoo.report.training import training_picture

    result = json.loads((ROOT / "eval/results/tutorial.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs/train.svg").read_text(encoding="utf-8") == training_picture(result), "run: zoo bench readme"
    assert f"\n{result['about']['command']}\n" in TEXTS["docs/train.md"]


@pytest.mark.slow
def test_the_notebook_runs_and_is_committed_without_output(tmp_path):
    cells = json.loads((ROOT / "docs/four-jobs.ipynb").read_text(encoding="utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in codes)
    (tmp_path / "cells.py").write_text("\n\n".join("".join(cell["source"]) for cell in codes), encoding="utf-8")
    ran = subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_readme_is_short():
    assert len(README.split()) <= 1500
    assert "](docs/demo.svg)" in "\n".join(README.splitlines()[:10])


def test_the_picture_is_the_committed_result():
    from hybridzoo.eval.demo.overview import overview

    result = json.loads((ROOT / "eval/results/demo.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs/demo.svg").read_text(encoding="utf-8") == overview(result), "run: zoo bench readme"


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, target


def test_the_table_of_models_names_what_ships():
    table = TEXTS["docs/configs.md"].split("## Shipped models")[1]
    named, shipped = set(re.findall(r"`([\w.-]+)`", table)), set(zoo.list_models())
    assert shipped <= named and {name for name in named if "-" in name} <= shipped


def test_the_table_of_mixers_names_what_ships_and_what_it_can():
    table = TEXTS["docs/mixers.md"].split("## The mixers that come with it")[1].split("##")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|.*\| ([a-z, ]+) \|$", table, re.M)
    shipped = {name: registry._entries[name].cls for name in registry._OURS}
    assert {name: (kind, set(can.split(", "))) for name, kind, can in rows} == {
        name: (cls.__name__, set(cls.capabilities)) for name, cls in shipped.items()
    }


def test_every_command_shown_exists_with_its_options():
    import typer

    from hybridzoo.__main__ import app

    commands = typer.main.get_command(app).commands
    assert {line.split()[1] for line in re.findall(r"`(zoo [^`]+)`", README)} >= set(commands) - {"demo"}
    everywhere = "\n".join(TEXTS.values())
    shown = re.findall(r"`(zoo (?!layers )[^`\n]+)`", everywhere) + re.findall(r"^(zoo [^#\n]+)", everywhere, re.M)
    for line in shown:
        name, *words = shlex.split(re.sub(r"^zoo --import \S+", "zoo", line))[1:]
        assert name in commands, line
        known = commands
        while hasattr(known[name], "commands") and words:
            known, (name, *words) = known[name].commands, words
            assert name in known, line
        if name != "lm-eval" and "NAME" not in words:
            # --import is the program's own, and the one of those that may stand behind the command (test_plugins holds it to that)
            options = {option for p in known[name].params for option in p.opts} | {"--import"}
            assert not {w for w in words if w.startswith("--")} - options, line


def test_the_make_targets_shown_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([\w-]+)", "\n".join(TEXTS.values()), re.M)) <= targets


def test_the_annotated_tree_names_what_is_there():
    tree = README.split("## Where things are")[1].split("```")[1]
    for line in tree.strip().splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert (citation["title"], citation["version"], citation["license"]) == ("hybridzoo", zoo.__version__, "Apache-2.0")


@pytest.mark.parametrize("page", PAGES)
def test_the_figures_are_the_committed_ones(page):
    assert TEXTS[page].split(START)[1].split(END)[0].strip() == section(ROOT, page), "run: zoo bench readme"


def test_the_performance_page_has_every_result():
    assert "| 1, 2048, 512, 16 | forward | transformers |" in TEXTS["docs/performance.md"]
    assert not any("missed" in text for text in TEXTS.values())


def test_the_table_of_checkpoints_covers_every_case():
    from hybridzoo.eval.parity.configs import CONFIGS, PUBLISHED
    from hybridzoo.zoo.checkpoint.families import FAMILIES

    rows = json.loads((ROOT / "eval/results/parity.json").read_text())["cases"]
    assert [row["name"] for row in rows] == list(CONFIGS), "run: zoo bench parity --out eval/results/parity.json"
    assert {row["family"] for row in rows} == set(PUBLISHED) == set(FAMILIES) - {"mamba_ssm"}
    for row in rows:
        assert row["logit_error"] < 1e-4 and row["decoding_error"] < 1e-4 and row["gradient_error"] < 1e-3, row
        assert row["export_is_bitwise"] and row["transformers_reads_it"], row


def test_known_results_are_those_of_the_trainings():
    page, front = TEXTS["docs/ablate.md"], README

    def points(name):
        result = json.loads((ROOT / "eval/results/ablate" / f"{name}.json").read_text(encoding="utf-8"))
        return {p["point"]: [round(100 * p[key], 1) for key in ("mean", "sd")] for p in result["points"]}

    recall = points("recall-ratio")
    shares = [f"{recall[f'attention={share}'][0]}" for share in ("0", "0.25", "1")]
    assert f"attention in 0, 1, 4 of 4 mixers recalls {', '.join(shares)} %" in front
    mamba, hybrid, attention = (recall[f"attention={share}"] for share in ("0", "0.25", "1"))
    said = f"{hybrid[0]} ± {hybrid[1]} % beside {mamba[0]} ± {mamba[1]:.0f} %, attention alone {attention[0]} ± {attention[1]} %"
    assert said in page
    copying = points("selective-copy-smoke")
    selective, invariant = copying["scan=selective gate=true"], copying["scan=invariant gate=true"]
    assert f"{selective[0]} ± {selective[1]} % beside {invariant[0]} ± {invariant[1]} %" in page
    assert f"selective scan {selective[0]:.0f} %, time-invariant {invariant[0]:.0f} %" in front
    learned = points("in-context")
    for task, names in {
        "parity": ("mambaformer", "attention", "mamba"),
        "retrieval": ("mambaformer", "mamba", "attention"),
    }.items():
        means = [learned[f"model={name} problem={task}"] for name in names]
        first, second, third = (f"{mean} ± {sd:.0f}" if sd > 10 else f"{mean} ± {sd}" for mean, sd in means)
        assert re.search(rf"{first} % beside \w+'s {second} % \([^)]*\), \w+ {third} %", page)
    assert "MambaFormer 100 and 100 %, attention 61 and 61 %, Mamba 100 and 3 %" in front
    assert [round(learned[f"model={m} problem={t}"][0]) for m in names for t in ("parity", "retrieval")] == [
        100,
        100,
        100,
        3,
        61,
        61,
    ]
    with (ROOT / "eval/results/ablate/recall-ratio-cells.csv").open(encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["chosen"] == "True"]

    def mean(point, column):
        return round(100 * statistics.mean(float(row[column]) for row in rows if row["point"] == point), 1)

    assert len(rows) == 15 and f"| {mean('attention=1', 'test pairs=4')} % |" in page
    most = [mean(f"attention={share}", "test pairs=64") for share in ("0.25", "0")]
    assert f"{most[0]} % beside {most[1]} %" in page

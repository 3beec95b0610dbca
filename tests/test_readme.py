"""The README is true: its snippets run, its commands exist, its tables name what ships, its figures are the committed ones."""

import json
import re
import shlex
from pathlib import Path

import pytest

import hybridzoo as zoo
from hybridzoo.zoo import registry

ROOT = Path(zoo.__file__).resolve().parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:40])
def test_python_snippets_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    exec(compile(code, "README.md", "exec"), {})


def test_the_config_in_the_readme_works(tmp_path):
    (code,) = blocks("yaml")
    (tmp_path / "my.yaml").write_text(code)
    assert zoo.build(tmp_path / "my.yaml", device="meta").num_params() > 0


def test_the_table_of_models_names_what_ships():
    table = TEXT.split("## Models")[1].split("## ")[0].split("A config of your own")[0]
    assert sorted(set(re.findall(r"`([\w.]+(?:-[\w.]+)+)`", table))) == zoo.list_models()


def test_every_command_shown_exists_with_its_options():
    import typer

    from hybridzoo.__main__ import app

    commands = typer.main.get_command(app).commands
    shown = re.findall(r"`(zoo [^`]+)`", TEXT)
    assert {line.split()[1] for line in shown} >= set(commands) - {"demo"}
    for line in shown:
        name, *words = shlex.split(line)[1:]
        if name != "lm-eval" and "NAME" not in words:
            # --import is the program's own, and the one of those that may stand behind the command (test_plugins holds it to that)
            known = {option for p in commands[name].params for option in p.opts} | {"--import"}
            assert not {w for w in words if w.startswith("--")} - known, line


def test_the_make_targets_shown_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([\w-]+)", "\n".join(blocks("bash")), re.M)) <= targets


def test_the_annotated_tree_names_what_is_there():
    tree = TEXT.split("## Where things are")[1].split("```")[1]
    for line in tree.strip().splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_the_table_of_checkpoints_is_the_committed_run_and_covers_every_case():
    from hybridzoo.eval.bench.readme import END, PARITY
    from hybridzoo.eval.parity.configs import CONFIGS, PUBLISHED
    from hybridzoo.eval.parity.run import section
    from hybridzoo.zoo.checkpoint.families import FAMILIES

    shown = TEXT.split(PARITY)[1].split(END)[0].strip()
    assert shown == section(ROOT / "eval/results"), "run: zoo bench readme"
    rows = json.loads((ROOT / "eval/results/parity.json").read_text())["cases"]
    assert [row["name"] for row in rows] == list(CONFIGS), "run: zoo bench parity --out eval/results/parity.json"
    assert {row["family"] for row in rows} == set(PUBLISHED) == set(FAMILIES) - {"mamba_ssm"}
    for row in rows:
        assert row["logit_error"] < 1e-4 and row["decoding_error"] < 1e-4 and row["gradient_error"] < 1e-3, row
        assert row["export_is_bitwise"] and row["transformers_reads_it"], row


def test_the_figures_are_the_committed_ones():
    from hybridzoo.eval.bench.readme import END, START, performance

    shown = TEXT.split(START)[1].split(END)[0].strip()
    assert shown == performance(ROOT / "eval/results"), "run: zoo bench readme"
    assert "| 1, 2048, 512, 16 | forward | transformers |" in shown

"""The benchmark of ``zoo train`` itself: real text, real tokens, time from step to step; each side as a user would run it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import hybridzoo as zoo
from hybridzoo.eval import result_file
from hybridzoo.eval.bench import readme, text, tutorial
from hybridzoo.eval.bench import run as bench
from hybridzoo.eval.bench import show as bench_show
from hybridzoo.eval.bench import trainer as bench_trainer


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """Short texts, and few steps."""
    monkeypatch.setattr(bench_trainer, "WARM", 2)
    monkeypatch.setattr(bench_trainer, "TIMED", 3)
    monkeypatch.setattr(bench_trainer.dispatch, "installed", dict(bench_trainer.dispatch.installed))
    found = ["word " * n for n in range(2, 18)]
    return found, str(text.write_lines(found, tmp_path / "python.jsonl"))


def test_python_documents_itself_with_real_lengths(monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(Path(json.__file__).parent))
    found = text.documentation()
    lengths = [len(document) for document in found]
    assert min(lengths) > 0 and max(lengths) > 10 * np.median(lengths)
    assert sum("JSON" in document for document in found) >= 3 and any(
        'The "with" statement' in document for document in found
    )
    rows = text.padded(["ab", "c" * 9], 5)
    assert [row["input_ids"] for row in rows] == [[0, 97, 98, 0, 0], [0, 99, 99, 99, 99], [99] * 5]
    assert rows[0]["labels"] == [0, 97, 98, -100, -100] and rows[0]["attention_mask"] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("variant", ["packed", "padded", "eager", "plain", "mamba_ssm"])
def test_a_training_is_measured_from_step_to_step(documents, monkeypatch, variant):
    texts, data = documents
    # ours stands for the library's, which has logits and no loss
    monkeypatch.setattr(bench_trainer, "_library", lambda cfg: bench_trainer._Labelled(zoo.build(cfg)))
    shape = {"b": 2, "l": 96}
    spec = {"side": variant, "model": "jamba-tiny", "data": data, "shape": shape, "device": "cpu"}
    found = bench_trainer.side(spec)
    lengths = [len(document) + 1 for document in texts]
    assert found["params"] == zoo.build("jamba-tiny").num_params() and 0 < found["outside_share"] < 1
    # the last batch of an epoch may be a row short
    read = found["tokens_s"] * found["seconds"] / found["real_share"] / 96
    assert round(read) in (5, 6) and read == pytest.approx(round(read))
    if variant in ("packed", "eager"):
        assert found["real_share"] > 0.9
    else:
        assert min(lengths) / 96 <= found["real_share"] <= np.mean(sorted(lengths)[-6:]) / 96
    assert found["context"] <= 96 and found["first_loss"] == pytest.approx(np.log(256), abs=0.2)


def test_parts_of_trainings_are_tried_with_fewer_rows_where_memory_ends(monkeypatch, tmp_path):
    asked = []

    def run(spec, folder):
        asked.append((spec["model"], spec["side"], spec["shape"]["b"]))
        if spec["side"] == "mamba_ssm":
            raise RuntimeError("no mamba_ssm")
        if spec["model"] == "mamba2-130m" and spec["shape"]["b"] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
        fast = {"packed": 200.0, "padded": 120.0, "plain": 100.0}[spec["side"]]
        return {
            "tokens_s": fast, "step_ms": 50.0, "seconds": 3.0, "outside_share": 0.01 if spec["side"] == "packed" else 0.2, "real_share": 0.7,
            "peak_GiB": 3.0, "first_loss": 5.0, "last_loss": 4.0, "context": 900.0, "params": 5, "flops_per_token": 10**12,
        }  # fmt: skip

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA H200")
    monkeypatch.setattr(bench_trainer, "_run", run)
    monkeypatch.setattr(bench_trainer, "documentation", lambda: ["a document"])
    parts = ["mamba-130m", "mamba-130m:plain", "mamba-130m:mamba_ssm", "mamba2-130m"]
    rows, failed = bench_trainer.measure(parts, lambda text: None)
    assert failed == ["no mamba_ssm"] and [b for model, _, b in asked if model == "mamba2-130m"] == [8, 4, 2]
    assert [row["shape"]["b"] for row in rows] == [8, 8, 2] and [row["outside_met"] for row in rows] == [
        True,
        False,
        True,
    ]
    assert rows[0]["mfu"] == pytest.approx(200 / 989.4, abs=1e-3)
    console = Console(width=200, record=True)
    result = {
        "what": "trainer", "command": "zoo bench trainer", "date": "2026", "commit": "abc", "device": "GPU", "versions": {"torch": "2"},
        "ceilings": {}, "cases": rows,
    }  # fmt: skip
    bench_show.show(result, console)
    shown = console.export_text()
    assert "0.50x" in shown and "20.2%" in shown
    said, table = readme._trainer(tmp_path / "train.json", result)
    assert (
        "| mamba-130m | zoo train, rows packed with whole documents | 200 | 50.0 | 20.2 % | 3.0 | 1.0 % | 70 % | 8 |"
        in table
    )
    assert "train.json" in said
    result_file.write(result, tmp_path / "train.json")
    assert "2.00 times a plain loop of transformers' Trainer" in readme.headline(tmp_path)


def test_trainings_have_their_peers_as_parts(monkeypatch):
    with pytest.raises(ValueError, match="its peers are parts"):
        bench.run_bench("trainer", ["mamba_ssm"])
    with pytest.raises(ValueError, match=r"unknown part 'x' of trainer. Known: mamba-130m, mamba-130m:padded"):
        bench.run_bench("trainer", parts=["x"])
    with pytest.raises(ValueError, match="bench trainer: needs a CUDA device"):
        bench.run_bench("trainer", parts=["mamba-130m"])
    for name, (base, overrides) in bench_trainer.MODELS.items():
        params = zoo.build(base, [*overrides, "tokenizer=byte"], device="meta").num_params()
        assert 110e6 < params < 140e6, name


def test_the_run_of_the_tutorial_is_kept_as_data_without_the_machines_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tutorial, "topics", lambda: {"train": ["some words " * 99], "validation": ["other words " * 9]})
    result = tutorial.tutorial(Path("kept.json"), steps=2, batch_size=1)
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept == json.loads(json.dumps(result)) and kept["about"]["command"] == tutorial.COMMAND
    assert [int(entry["step"]) for entry in kept["history"]] == [1, 2] and "eval_loss" in kept["history"][-1]
    assert "/" not in json.dumps(kept["about"]).replace("runs/hybrid", "")

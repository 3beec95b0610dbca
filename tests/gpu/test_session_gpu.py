"""Speed and memory of trainings on a GPU, as they are logged and as the benchmark sees them."""

import pytest
import torch

from hybridzoo.eval.bench import text, trainer
from hybridzoo.zoo.train.flops import peak_flops
from hybridzoo.zoo.train.run import train

pytestmark = pytest.mark.gpu


@pytest.fixture
def data(tmp_path):
    return text.write_lines(sorted(text.documentation(), key=len)[:200], tmp_path / "python.jsonl")


def test_speed_and_memory_are_logged_and_shown(data, tmp_path, capsys):
    result = train("mamba-tiny", data, tmp_path / "run", steps=30, batch_size=4, length=256, report_to="none")
    known = peak_flops(torch.cuda.get_device_name(), half=True)
    # the first step compiles and records, and is not counted
    first, last = result.history[0], result.history[-1]
    assert "tokens_per_second" not in first and last["tokens_per_second"] > 1000
    assert 0 < last["memory_GiB"] <= torch.cuda.get_device_properties(0).total_memory / 2**30
    assert (0 < last["mfu"] < 1) if known else "mfu" not in last
    said, page = capsys.readouterr().err, (tmp_path / "run" / "report.html").read_text()
    assert ("% MFU" in said) if known else "MFU: left out" in said
    assert "step: " in said and "of the GPU, at most" in page and "bfloat16 autocast" in page


@pytest.mark.parametrize("variant", ["packed", "padded", "eager", "plain"])
def test_the_benchmark_sees_what_a_device_does(data, monkeypatch, variant):
    monkeypatch.setattr(trainer, "WARM", 3)
    monkeypatch.setattr(trainer, "TIMED", 6)
    monkeypatch.setattr(trainer.dispatch, "installed", dict(trainer.dispatch.installed))
    spec = {"side": variant, "model": "jamba-tiny", "data": str(data), "shape": {"b": 2, "l": 256}, "device": "cuda"}
    found = trainer.side(spec)
    assert found["tokens_s"] > 0 and 0 <= found["outside_share"] < 1 and found["peak_GiB"] > 0
    assert found["first_loss"] == pytest.approx(5.55, abs=0.3)
    assert (found["real_share"] > 0.95) == (variant in ("packed", "eager"))

"""``zoo bench generate``: what a row says, beside a peer and without, and what does not fit."""

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import hybridzoo as zoo
from hybridzoo.eval.bench import generate, run, show


@pytest.fixture
def tiny(monkeypatch):
    case = generate.Case("tiny", ("mamba-tiny", "transformer-tiny"), ((1, 40), (2, 9)), 16, "cpu", {"mamba-tiny": 1.5})
    monkeypatch.setattr(generate, "CASES", [case])
    return case


def test_rows_say_how_fast_a_model_reads_and_writes(tiny, tmp_path):
    result = run.bench("generate", [], ["tiny"])
    rows = {(row["name"], row["shape"]["b"]): row for row in result["cases"]}
    assert len(rows) == 4 and "failed" not in result
    for (name, b), row in rows.items():
        model = zoo.build(name)
        assert (
            row["params"] == model.num_params() and row["how"].startswith("one operation") and row["peak_GiB"] is None
        )
        assert row["write_tokens_s"] == pytest.approx(1000 * b / row["write_ms"])
        assert row["read_tokens_s"] == pytest.approx(1000 * b * row["shape"]["l"] / row["read_ms"])
    # a recurrent state stays as it is, keys and values grow
    assert rows["mamba-tiny", 1]["state_MiB"] * 2 == rows["mamba-tiny", 2]["state_MiB"]
    assert rows["transformer-tiny", 1]["state_MiB"] > rows["mamba-tiny", 1]["state_MiB"]
    console = Console(width=200, record=True)
    show.show(result, console)
    assert "transformer-tiny" in console.export_text()


def test_a_peer_writes_the_same_number_of_tokens(tiny, monkeypatch):
    asked = []

    class Peer:
        def generate(self, ids, max_length, cg, top_k):
            asked.append(max_length - ids.shape[1])

    row = generate._row(tiny, "mamba-tiny", zoo.build("mamba-tiny").eval(), Peer(), 1e-3, (1, 12))
    assert asked == [17, 1, 17, 1, 17, 1, 17]
    assert row["ratio"] == row["write_tokens_s"] / row["peer_write_tokens_s"] and row["goal_ratio"] == 1.5
    assert row["read_ratio"] == row["peer_read_ms"] / row["read_ms"] and row["peer"] == "mamba_ssm"
    console = Console(width=200, record=True)
    show.show({"what": "generate", "device": "x", "commit": "y", "ceilings": {}, "cases": [row]}, console)
    assert "1.5x" in console.export_text()


def test_guesses_gain_where_text_repeats(monkeypatch):
    case = generate.Case("again", ("samba-tiny",), ((2, 64),), 90, "cpu", {"samba-tiny": 1.6}, repeats=True)
    monkeypatch.setattr(generate, "CASES", [case])
    (row,), failed = generate.measure(["again"], lambda text: None)
    assert not failed and row["how"].endswith("checked by 13 forwards") and row["goal_ratio"] == 1.6
    assert row["ratio"] == row["write_tokens_s"] / row["peer_write_tokens_s"] > 1
    console = Console(width=200, record=True)
    show.show({"what": "generate", "device": "x", "commit": "y", "ceilings": {}, "cases": [row]}, console)
    assert "no guesses" in console.export_text()


def test_a_model_that_mamba_ssm_has_not_stands_alone(monkeypatch):
    monkeypatch.setattr(generate, "find_spec", lambda name: SimpleNamespace())
    assert generate._peer(zoo.build("transformer-tiny", device="meta")) == (None, None)
    assert generate._peer(zoo.build("jamba-tiny", device="meta")) == (None, None)


def test_what_does_not_fit_is_named_and_the_rest_goes_on(tiny, monkeypatch):
    def full(case, name, model, peer, error, shape):
        if shape == (1, 40):
            raise torch.cuda.OutOfMemoryError("tried to allocate 2 GiB\nmore")
        return {"name": name, "shape": shape}

    monkeypatch.setattr(generate, "_row", full)
    rows, failed = generate.measure(["tiny"], lambda text: None)
    assert [row["name"] for row in rows] == ["mamba-tiny", "transformer-tiny"]
    assert failed[0] == "mamba-tiny, 1 x 40: tried to allocate 2 GiB" and len(failed) == 2


def test_parts_are_of_a_kind_of_device():
    assert generate.parts_of("cpu") == ["tiny", "tiny:repeats"] and "2.8b:batch" in generate.parts_of("cuda")
    for case in generate.CASES:
        sizes = [zoo.build(name, device="meta").num_params() for name in case.models]
        assert case.device == "cpu" or max(sizes) < 1.2 * min(sizes), (case.part, sizes)

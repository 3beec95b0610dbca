"""``zoo bench generate``: what a row says, beside a peer and without, and what does not fit."""

import json
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

import hybridzoo as zoo
from hybridzoo.eval.bench import generate, readme, run, show, written


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


def test_a_peer_that_cannot_be_had_is_named_and_ours_is_measured(tiny, monkeypatch):
    monkeypatch.setattr(generate, "_peer", lambda model: (_ for _ in ()).throw(RuntimeError("other sizes")))
    rows, failed = generate.measure(["tiny"], lambda text: None)
    assert len(rows) == 4 and failed == [f"{name}, mamba-ssm: other sizes" for name in tiny.models]


def test_guesses_gain_where_text_repeats(monkeypatch):
    case = generate.Case("again", ("samba-tiny",), ((2, 64),), 90, "cpu", {"samba-tiny": 1.6}, repeats=True)
    monkeypatch.setattr(generate, "CASES", [case])
    (row,), failed = generate.measure(["again"], lambda text: None)
    assert not failed and row["how"].endswith("checked by 13 forwards") and row["goal_ratio"] == 1.6
    assert row["ratio"] == row["write_tokens_s"] / row["peer_write_tokens_s"] > 1
    console = Console(width=200, record=True)
    result = {"what": "generate", "device": "x", "commit": "y", "ceilings": {}, "cases": [row]}
    show.show(result, console)
    assert "no guesses" in console.export_text()
    lines = written.pieces(result, "", "", "")[-1].splitlines()
    assert lines[0].startswith("| model | rows x context | write, tokens/s | without guesses |") and len(lines) == 3
    assert f"| {row['ratio']:.2f}x | {row['ratio'] / 0.016:.0f} % of 1.6x |" in lines[2]


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


def measured(name, b, l, speed, peer=None, **more):
    row = {
        "name": name,
        "part": "2.8b",
        "shape": {"b": b, "l": l, "new": 128},
        "params": 2.8e9,
        "state_dtype": "float32",
        "state_MiB": 90.0,
    }
    row |= {
        "read_tokens_s": 9e4,
        "write_tokens_s": speed,
        "write_ms": 1000 * b / speed,
        "peak_GiB": 1.5,
        "how": "",
        "blocks": "",
    } | more
    beside = (
        {"peer": "mamba_ssm", "peer_write_tokens_s": peer, "ratio": speed / peer, "goal_ratio": 2, "read_ratio": 1.1}
        if peer
        else {}
    )
    return row | beside


def test_the_pages_say_how_fast_models_write(tmp_path):
    cases = [measured("mamba-2.8b", 1, l, 600.0, 300.0) for l in (1024, 131072)]
    cases += [measured("transformer-2.8b", 1, l, speed) for l, speed in ((1024, 500.0), (131072, 80.0))]
    cases += [measured("mamba2-2.7b", 64, 512, 9000.0, 6000.0, state_dtype="bfloat16", part="2.8b:half")]
    result = {
        "what": "generate", "command": "zoo bench generate --part 2.8b", "date": "2026", "commit": "c", "device": "NVIDIA H200",
        "versions": {"torch": "2", "mamba_ssm": "1"}, "ceilings": {}, "cases": cases,
    }  # fmt: skip
    path = tmp_path / "generate-h200.json"
    path.write_text(json.dumps(result))
    text = readme.performance(tmp_path)
    assert "2 of 3 goals of writing are reached" in text and "](eval/results/generate-h200.svg)" in text
    assert (
        "| mamba2-2.7b | 2,800 M | 64 x 512 | bfloat16 | 90 | 90,000 | 9,000 | 7.11 | 6,000 | 1.50x | 75 % of 2x | 1.10x | 1.5 |"
        in text
    )
    assert "| transformer-2.8b | 2,800 M | 1 x 131,072 | float32 | 90 | 90,000 | 80 | 12.50 |  |  |  |  | 1.5 |" in text
    said = readme.headline(tmp_path)
    assert "mamba-2.8b writes 600 tokens a second, 2.00 times mamba-ssm's (one row on the same NVIDIA H200" in said
    assert said.splitlines()[-3:] == [
        "| --- | --- | --- |",
        "| 1,024 | 600/s, 90 MiB | 500/s, 90 MiB |",
        "| 131,072 | 600/s, 90 MiB | 80/s, 90 MiB |",
    ]
    ElementTree.fromstring(written.drawn(result))
    assert "mamba, mamba-ssm" in written.drawn(result)
    alone = result | {"cases": [measured("mamba-2.8b", 1, 1024, 600.0)]}
    assert written.drawn(alone) is None and written.sentence(alone, "") is None and written.claims(alone) is None


def test_a_file_that_no_result_can_join_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "bench", lambda *given: pytest.fail("measured"))
    file = tmp_path / "result.json"
    for content, words in (("{", "is not JSON"), ("[]", "holds a list, and no result")):
        file.write_text(content)
        with pytest.raises(ValueError, match=words):
            run.run_bench("generate", out=file, parts=["tiny"])
    with pytest.raises(ValueError, match="is a folder"):
        run.run_bench("generate", out=tmp_path, parts=["tiny"])

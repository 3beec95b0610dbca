"""``zoo bench step`` on the CPU: kernels run thread by thread (tests/emulator), a clock and recordings that are calls."""

import json
import os
import shutil
import types

import pytest
import torch

from hybridzoo.eval.bench import run, step, timing
from hybridzoo.kernels import dispatch
from hybridzoo.kernels.attend import cuda as cuda_attend
from hybridzoo.kernels.dispatch import ENV
from hybridzoo.kernels.few import cuda as cuda_few
from hybridzoo.kernels.few import op as few_op
from hybridzoo.kernels.few import plain
from hybridzoo.kernels.gpu import nvrtc
from hybridzoo.kernels.step import choose, chunked
from hybridzoo.kernels.step import cuda as cuda_update

BF16, F32 = torch.bfloat16, torch.float32
KERNELS = {
    "step_linear": cuda_few.step_linear,
    "choose_token": choose._cuda,
    "step_attention": cuda_attend.step_attention,
    "update": cuda_update.update,
}
SMALL = [
    *(step.Case("linear", "linear", op, "torch", {"b": 2}, step._each(step._linear, 2, 40, 24, op)) for op in ("product", "product, addition", "norm, product")),
    step.Case("choose", "choose", "choice", "torch", {"b": 3}, lambda count: step._choices(count, 3, 52), F32),
    step.Case("attention", "attention", "attention", "sdpa", {"b": 2}, step._each(step._attention, 2, 24, 4, 2, 16)),
    *(step.Case("update", "mamba", "update", "chunked", {"b": b}, step._each(step._selective, dtype, b, 32, 4, 8), dtype) for b, dtype in ((2, F32), (9, BF16))),
    step.Case("update", "mamba2", "update", "chunked", {"b": 2}, step._each(step._ssd, BF16, 2, 2, 16, 32), BF16),
]  # fmt: skip
PARTS = ["linear", "choose", "attention", "update"]


class Clock:
    """Calls everything twice and says that a recording of ours took 2 ms, a peer's 5."""

    def compare(self, *calls):
        for call in (*calls, *calls):
            call()
        return [[2.0, 2.0, 2.5], [5.0, 5.0, 5.5]]


@pytest.fixture
def small(monkeypatch, emulated):
    for op, kernel in KERNELS.items():
        monkeypatch.setitem(dispatch.TABLES[op], "cuda", dispatch.Backend("cuda", "emulated", run=kernel))
    monkeypatch.setattr(step, "CASES", SMALL)
    monkeypatch.setattr(step, "DEVICE", "cpu")
    monkeypatch.setattr(step, "MOST", 3)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(timing, "captured", lambda call: call)
    monkeypatch.setattr(timing, "EventTimer", Clock)
    monkeypatch.setattr(timing, "ceilings", lambda device: {"copy_TBs": 4.0})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_every_kind_of_launch_is_checked_and_timed(small, tmp_path, capsys):
    path = tmp_path / "step.json"
    result = run.run_bench("step", out=path, parts=PARTS)
    assert json.loads(path.read_text())["cases"] == result["cases"] and set(result["versions"]) == {"python", "torch"}
    assert [run["command"] for run in result["runs"]] == [f"zoo bench step --part {part}" for part in PARTS]
    rows = {(row["name"], row["op"], row["dtype"]): row for row in result["cases"]}
    assert len(result["cases"]) == len(SMALL)
    for row in result["cases"]:
        assert row["calls"] == 3 and row["ours_ms"] == pytest.approx(2 / 3, rel=1e-3)
        assert row["ratio"] == 2.5 and row["met"]
        assert 0 <= row["error"] <= row["error_limit"]
    # by hand: a weight, a row of x and of the output each in 16 bits; and a state of 16 bits, read and written
    product = rows["linear", "product", "bfloat16"]
    assert product["moved_MB"] == pytest.approx(2 * (24 * 40 + 2 * 40 + 2 * 24) / 1e6, rel=1e-3)
    assert product["floor_ms"] == pytest.approx(product["moved_MB"] / 4e3, rel=1e-3)
    assert rows["mamba2", "update", "bfloat16"]["moved_MB"] * 1e6 == pytest.approx(
        2 * 2 * 2 * 2 * 16 * 32 + 2 * (2 * 2 * 2 * 16 + 2 * 2 + 2 * 2 * 32) + 4 * 3 * 2, rel=1e-3
    )
    assert "sdpa" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(small, monkeypatch):
    wrong = dispatch.Backend("cuda", "wrong", run=lambda i: 1.02 * plain.step_linear(i))
    monkeypatch.setitem(dispatch.TABLES["step_linear"], "cuda", wrong)
    rows, failed = step.measure(["linear"], Clock(), {"copy_TBs": 4.0}, lambda text: None)
    assert rows == [] and len(failed) == 3
    assert failed[0].startswith("linear, product: AssertionError: is not close to torch: relative error 2.0")


def test_a_choice_that_differs_is_found(small, monkeypatch):
    other = dispatch.Backend("cuda", "wrong", run=lambda logits, *rest: choose._plain(-logits, *rest))
    monkeypatch.setitem(dispatch.TABLES["choose_token"], "cuda", other)
    rows, failed = step.measure(["choose"], Clock(), {"copy_TBs": 4.0}, lambda text: None)
    assert rows == [] and failed[0].startswith("choose, choice: AssertionError: is not close to torch")


def test_steps_of_a_model_are_those_of_our_kernels(small, monkeypatch, capsys):
    for op, same in (("step_linear", plain.step_linear), ("update", chunked.update)):
        monkeypatch.setitem(dispatch.TABLES[op], "cuda", dispatch.Backend("cuda", "PyTorch", run=same))
    # in front of a block is the question whether the kernels pay, whose answers are kept
    monkeypatch.setattr(cuda_few, "refuse", lambda facts: None)
    monkeypatch.setattr(few_op, "_fits", few_op._fits.__wrapped__)
    make = step._each(step._model, "mamba-tiny", 2)
    cases = [step.Case("model", "mamba-tiny", "step", peer, {"b": 2}, make) for peer in (step.APART, "torch")]
    monkeypatch.setattr(step, "CASES", cases)
    rows = run.run_bench("step", parts=["model"])["cases"]
    assert [row["peer"] for row in rows] == [step.APART, "torch"] and [row["error"] for row in rows] == [0, 0]
    assert all(row["how"] == "2 of 2 blocks in a few launches each" for row in rows)
    assert "2 of 2 blocks" in capsys.readouterr().out


def test_launches_are_apart_for_the_peer_alone(monkeypatch):
    monkeypatch.setenv(ENV, "reference")
    seen = []
    state = types.SimpleNamespace(map=lambda keep: keep(torch.zeros(2)))
    model = types.SimpleNamespace(
        cfg=types.SimpleNamespace(vocab_size=5), eval=lambda: model, init_state=lambda b: state, parameters=lambda: [],
        backbone=types.SimpleNamespace(steps_taken=lambda state: os.environ[ENV]),
        step=lambda ids, state: seen.append((nvrtc.OVERLAP, os.environ[ENV])),
    )  # fmt: skip
    monkeypatch.setattr(step, "build", lambda name, device, dtype: model)
    piece = step._model("a model", 2)
    for how in ("cuda", step.APART, "torch"):
        piece.call(how)
    assert (
        seen == [(True, "cuda"), (False, "cuda"), (True, "torch")] and piece.how == "cuda" and len(piece.changes) == 1
    )
    assert nvrtc.OVERLAP and os.environ[ENV] == "reference"


def test_the_cases_are_those_of_published_models():
    names = [(case.name, case.op, case.dtype, case.peer) for case in step.CASES]
    assert len(set(names)) == len(names) and step.PARTS == ["linear", "choose", "attention", "update", "model"]
    assert sum(case.part == "linear" for case in step.CASES) == 6 * 3 * 3
    # on the meta device: what is called and moved at full size
    with torch.device("meta"):
        moved = {}
        for case in step.CASES:
            if case.part != "model":
                (piece,) = case.make(1)
                moved[case.name, case.dtype] = sum(x.nbytes for x in piece.reads)
    assert moved["attention-b64-l16384", BF16] == pytest.approx(2 * 2 * 64 * 16384 * 8 * 128, rel=1e-3)
    assert moved["linear-2560x50280-b1", BF16] == pytest.approx(2 * 2560 * 50280, rel=1e-3)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for parts in (None, ["linear"]):
        with pytest.raises(ValueError, match="bench step: needs a CUDA device"):
            run.run_bench("step", parts=parts)
    with pytest.raises(ValueError, match=r"unknown peer 'mamba_ssm' of step. Known: none, its peers are given"):
        run.run_bench("step", ["mamba_ssm"])

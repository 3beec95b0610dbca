"""The benchmarks run, say what they measured, check before they time, and refuse what they do not know."""

import dataclasses
import json
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from hybridzoo.eval import result_file
from hybridzoo.eval.bench import data as bench_data
from hybridzoo.eval.bench import ops as bench_ops
from hybridzoo.eval.bench import peers, readme, timing, workloads
from hybridzoo.eval.bench import run as bench
from hybridzoo.eval.bench import show as bench_show
from hybridzoo.eval.bench import train as bench_train
from hybridzoo.kernels import selective_scan
from hybridzoo.kernels.gpu import nvrtc

ROW = {
    "name", "op", "shape", "dtype", "ours_ms", "ours_iqr_ms", "peer", "peer_ms", "ratio", "goal_ratio", "met", "floor_ms",
    "floor", "share_of_floor", "ours_GBs",
}  # fmt: skip
CEILINGS = {"copy_TBs": 3.0, "sfu_Gexps": 3700.0}


class Clock:
    """A timer that calls everything and says that ours took 2 ms and theirs 5."""

    def compare(self, *calls):
        for call in calls:
            call()
        return [[2.0, 2.0, 2.5], [5.0, 5.0, 5.5]]

    def host(self, call):
        return 0.5


@pytest.fixture
def small(monkeypatch):
    scan = workloads.Workload("small", "scan", {"b": 1, "l": 64, "d": 8, "n": 4}, goals={("mambapy", "forward"): 2.0})
    monkeypatch.setitem(workloads.WORKLOADS, "scan", [scan])
    monkeypatch.setitem(
        workloads.WORKLOADS, "ssd", [workloads.Workload("small", "ssd", {"b": 1, "l": 70, "h": 2, "p": 4, "n": 4})]
    )
    monkeypatch.setattr(bench_ops, "LENGTHS", (256,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "ceilings", lambda device: CEILINGS)


def test_a_result_has_the_schema_and_is_written_whole(small, tmp_path, capsys):
    pytest.importorskip("mambapy")
    path = tmp_path / "results" / "scan.json"
    result = bench.run_bench("scan", ["mambapy"], path)
    assert json.loads(path.read_text()) == result
    assert [p.name for p in path.parent.iterdir()] == ["scan.json"]
    assert {"what", "command", "date", "commit", "device", "versions", "ceilings", "cases"} == set(result)
    assert result["command"] == "zoo bench scan --vs mambapy"
    timed = [case for case in result["cases"] if "peer" in case]
    assert [(case["op"], case["goal_ratio"]) for case in timed] == [("forward", 2.0), ("forward+backward", None)]
    for case in timed:
        assert set(case) >= ROW and case["ratio"] == pytest.approx(case["peer_ms"] / case["ours_ms"], rel=1e-3)
    assert "mambapy" in capsys.readouterr().out


def test_what_is_measured_on_the_host():
    found = timing._host_ceilings()
    assert found["copy_TBs"] > 0 and found["exp_Gs"] > 0
    times = timing.HostTimer(repeats=3, slow_seconds=-1).compare(lambda: None, lambda: None)
    assert [len(t) for t in times] == [3, 1]
    assert timing.iqr([1.0]) == 0 and timing.iqr([1.0, 2.0, 3.0, 4.0]) == 2.5


def test_events_time_every_call_in_turns(monkeypatch):
    now, log = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return other.at - self.at

    def call(name, ms):
        log.append(name)
        now[0] += ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = object.__new__(timing.EventTimer)
    timer.budget_ms, timer.least, timer.most, timer.flush = 100.0, 3, 20, torch.empty(8)
    times = timer.compare(lambda: call("a", 4.0), lambda: call("b", 10.0))
    assert times == [[4.0] * 10, [10.0] * 10] and log[-6:] == ["a", "b"] * 3
    assert timer.compare(lambda: call("a", 100.0)) == [[100.0] * 3]
    assert timer.host(lambda: None) >= 0


def test_outputs_are_compared_before_anything_is_timed(small, monkeypatch):
    right = peers.PEERS["ssd"]["transformers"]
    pytest.importorskip("transformers")
    assert bench.bench("ssd", ["transformers"], timer=Clock())["cases"]

    def wrong(inputs):
        timed = right(inputs)
        return peers.Timed(timed.leaves, lambda: timed.call() + 1)

    monkeypatch.setitem(peers.PEERS["ssd"], "transformers", wrong)
    result = bench.bench("ssd", ["transformers"], timer=Clock())
    assert not result["cases"] and "small, transformers: AssertionError: output is not close" in result["failed"][0]
    with pytest.raises(ValueError, match="bench: failed, and left out:\nsmall, transformers"):
        bench.run_bench("ssd", ["transformers"])


def test_unknown_names_are_refused(small):
    with pytest.raises(ValueError, match=r"bench: unknown benchmark 'sprint'. Known: scan, ssd, attention, train"):
        bench.run_bench("sprint")
    with pytest.raises(ValueError, match=r"bench: unknown peer 'jax' of scan. Known: transformers, mambapy, mamba_ssm"):
        bench.run_bench("scan", ["jax"])
    with pytest.raises(ValueError, match=r"bench: unknown part 'tail' of scan. Known: table, all"):
        bench.run_bench("scan", ["mambapy"], parts=["tail"])
    with pytest.raises(ValueError, match="bench train: needs a CUDA device"):
        bench.run_bench("train", parts=["mamba-130m"])


def test_attention_is_beside_its_other_backends(small, monkeypatch):
    shape = {"b": 2, "l": 40, "h": 4, "kv": 2, "p": 8}
    cases = [
        workloads.Workload("plain", "attention", shape),
        workloads.Workload("packed", "attention", shape | {"doc": 16}, part="packed"),
        workloads.Workload("window", "attention", shape | {"w": 5}, part="window"),
    ]
    monkeypatch.setitem(workloads.WORKLOADS, "attention", cases)
    result = bench.bench("attention", peers.default_peers("attention"), ["table", "packed", "window"], timer=Clock())
    assert [(row["name"], row["op"], row["peer"], row["backend"]) for row in result["cases"]] == [
        (case.name, op, "math", "sdpa") for case in cases for op in ("forward", "forward+backward")
    ]
    _, text = readme._attention(Path("a.json"), result)
    assert text.count("\n") == 1 + len(result["cases"]) and "| forward | sdpa | 2.000 | math | 5.000 | 2.50x |" in text
    # what has no such call, and what is taken anyway, is no row and no failure
    assert bench.bench("attention", ["sdpa", "varlen"], ["packed"], timer=Clock())["cases"] == []
    assert {c.part for c in workloads._ATTENTION} == {"table", "packed", "window"}
    assert len({c.name for c in workloads._ATTENTION}) == len(workloads._ATTENTION)


def test_a_missing_peer_says_so(small, monkeypatch):
    def missing(inputs):
        raise ImportError("No module named 'mambapy'")

    monkeypatch.setitem(peers.PEERS["scan"], "mambapy", missing)
    with pytest.raises(
        ValueError, match=r"the peer 'mambapy' needs a library that is not here \(No module named 'mambapy'\)"
    ):
        bench.run_bench("scan", ["mambapy"])


# ------------------------------------------------------------------------------------------------ what a GPU runs


def first(inputs, op):
    """A stand-in for a library that has channels first: ours, on tensors in that layout."""
    theirs = peers._first(inputs, *(name for name in inputs if name != "state"))
    mine = peers.ours(op, {k: x.movedim(-1, 1) if k in peers._PER_TOKEN else x for k, x in theirs.items()})
    return peers.Timed(theirs, lambda: mine.call().movedim(1, -1), True), mine


@pytest.mark.parametrize(
    ("op", "shape"),
    [("scan", {"b": 2, "l": 9, "d": 6, "n": 3, "g": 2}), ("conv", {"b": 2, "l": 9, "d": 6, "k": 3})],
)
def test_layouts_with_channels_first_are_compared_in_ours(op, shape):
    case = workloads.Workload("x", op, shape)
    inputs = case.inputs()
    theirs, inner = first(inputs, op)
    theirs.leaves = inner.leaves  # what has a gradient; its layout is ours already, so it is turned round
    theirs.in_our_layout = lambda name, x: x.movedim(-1, 1) if name == "out" else x
    errors = bench_ops.agreement(peers.ours(op, inputs), theirs, gradients=True)
    assert len(errors) == 1 + len(inputs) and max(errors.values()) < 1e-5


def test_walks_are_compared_with_four_copies(monkeypatch):
    def channels_first(u, dt, A, B, C, D, z, bias, softplus):
        assert z is None
        u, dt, B, C = (x.movedim(-1, 1) for x in (u, dt, B, C))
        out = selective_scan(u, dt, A, B, C, D, dt_bias=bias, dt_softplus=softplus, backend="reference")
        return out.movedim(1, -1)

    library = types.SimpleNamespace(selective_scan_fn=channels_first)
    monkeypatch.setattr(peers, "import_module", lambda name: library)
    case = workloads.Workload("x", "paths", {"b": 2, "l": 9, "d": 4, "n": 3, "k": 4, "r": 2})
    inputs = case.inputs()
    errors = bench_ops.agreement(peers.ours("paths", inputs), peers.PEERS["paths"]["mamba_ssm"](inputs), gradients=True)
    assert len(errors) == 1 + len(inputs) and max(errors.values()) < 1e-5
    # by hand: u and the output, and four times what the projection leaves
    assert workloads.counts(case, "forward") == (18 * 4 * (2 * 4 + 4 * 8), 18 * 4 * 4 * 3)


def test_ssd_is_compared_with_simple_gla(monkeypatch):
    def chunk_simple_gla(q, k, v, g, scale):
        state, out = torch.zeros(*v.shape[:1], *v.shape[2:], k.shape[-1]), []
        for t in range(v.shape[1]):
            state = state * g[:, t].exp()[..., None, None] + v[:, t, :, :, None] * k[:, t, :, None]
            out.append(scale * (state @ q[:, t, :, :, None]).squeeze(-1))
        return torch.stack(out, 1), None

    library = types.SimpleNamespace(chunk_simple_gla=chunk_simple_gla)
    monkeypatch.setattr(peers, "import_module", lambda name: library)
    inputs = workloads.Workload("x", "ssd", {"b": 2, "l": 9, "h": 4, "p": 3, "n": 5}).inputs()
    errors = bench_ops.agreement(peers.ours("ssd", inputs), peers.PEERS["ssd"]["fla-core"](inputs), gradients=True)
    assert len(errors) == 1 + len(inputs) and max(errors.values()) < 1e-5
    for there, want in ((None, ["mamba_ssm"]), (library, ["mamba_ssm", "fla-core"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(peers, "find_spec", lambda name, there=there: there)
        assert peers.default_peers("ssd") == want and peers.default_peers("scan") == ["mamba_ssm"]


def test_ssd_has_its_cases_goals_and_page(tmp_path):
    cases = [c for c in workloads.WORKLOADS["ssd"] if c.device == "cuda"]
    assert [tuple(c.shape[k] for k in "blhpn") + tuple(c.goals.values()) for c in cases] == [
        (8, 2048, 64, 64, 128, 3, 2.5), (4, 2048, 80, 64, 128, 3, 2.5), (8, 2048, 24, 64, 128, 4, 4),
        (1, 16384, 64, 64, 128, 2.5, 2.5), (1, 2048, 24, 64, 128, 5, 4),
    ]  # fmt: skip
    assert all(
        (c.part, c.dtype, set(c.goals)) == ("table", torch.bfloat16, {("mamba_ssm", p) for p in c.passes})
        for c in cases
    )
    named = [c.name for works in workloads.WORKLOADS.values() for c in works if c.device == "cuda"]
    assert len(named) == len(set(named))
    rows = [bench_ops._row(cases[0], what, "mamba_ssm", [[2.0] * 3, [5.0] * 3], CEILINGS) for what in cases[0].passes]
    rows.append(rows[0] | {"peer": "fla-core", "goal_ratio": None})
    _, text = readme._gpu_ssd(tmp_path / "ssd.json", result_of(rows, what="ssd"))
    assert "| Mamba-2 1.3B, training | forward | mamba-ssm | 2.50x | 83 % of 3x | 2.000 | 5.000 |" in text
    assert "| fla-core | 2.50x |  | 2.000 |" in text and "8 x 2048 x 64 x 64 x 128" in text


def test_a_wrong_gradient_is_found():
    inputs = workloads.Workload("x", "conv", {"b": 2, "l": 9, "d": 6, "k": 3}).inputs()
    mine, theirs = (peers.ours("conv", inputs) for _ in range(2))
    call = theirs.call
    theirs.call = lambda: call() + theirs.leaves["bias"] - theirs.leaves["bias"].detach()
    errors = bench_ops.agreement(mine, theirs, gradients=True)
    assert errors["output"] < 1e-6 < 0.1 < errors["gradient of bias"] and errors["gradient of x"] < 1e-6


def test_nan_is_not_close():
    assert not bench_ops.distance(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2)) <= 1.0
    assert bench_ops.distance(torch.ones(3, 5), torch.ones(3, 5)) == 0


def test_saved_bytes_count_what_the_leaves_do_not_hold():
    inputs = workloads.Workload("x", "conv", {"b": 2, "l": 9, "d": 6, "k": 3}).inputs()
    mine = peers.ours("conv", inputs)
    before = mine.saved_bytes()
    mine.call = lambda: (mine.leaves["x"] * 2).square()
    assert mine.saved_bytes() == 2 * 9 * 6 * 4 and before >= 0


def test_every_case_of_the_issue_is_there_with_its_goals():
    table = [c for c in workloads.WORKLOADS["scan"] if c.device == "cuda" and c.part == "table"]
    assert [tuple(c.shape[k] for k in "bld") + tuple(c.goals.values()) for c in table] == [
        (8, 2048, 4096, 3, 3), (4, 2048, 5120, 3, 3), (8, 2048, 1536, 3, 3), (1, 16384, 4096, 3, 3), (1, 2048, 1536, 2, 2.5),
        (64, 3136, 768, 6, 5), (64, 196, 3072, 6, 4),
    ]  # fmt: skip
    parts = {c.part for c in workloads.WORKLOADS["scan"] if c.device == "cuda"}
    assert parts == {"table", "paths", "length", "state", "dtype", "decode", "conv"}
    # by hand: the floors that the issue gives for its first shape
    assert workloads.floor_ms(table[0], "forward", CEILINGS) == (pytest.approx(0.290, abs=1e-3), "exponentials")
    assert workloads.counts(table[0], "forward")[0] / 3e9 == pytest.approx(0.180, abs=1e-3)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_that_measures_exponentials_compiles(arch):
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    symbol, code, _ = nvrtc.compile_source("probe.cu", "probe_exponentials", arch)
    assert symbol == b"probe_exponentials" and code.startswith(b"\x7fELF")


@pytest.fixture
def gpu_rows(monkeypatch):
    """Rows as a GPU makes them, from small cases on the CPU and peers that are ours."""
    mine = {op: (lambda inputs, op=op: peers.ours(op, inputs)) for op in ("scan", "conv", "decode")}
    monkeypatch.setattr(peers, "PEERS", {op: {"mamba_ssm": make} for op, make in mine.items()})
    monkeypatch.setattr(bench_ops, "PEERS", peers.PEERS)
    monkeypatch.setattr(timing, "captured", lambda call: call)
    goals = {("mamba_ssm", "forward"): 3.0, ("mamba_ssm", "forward+backward"): 2.0}
    small = [
        workloads.Workload("train", "scan", {"b": 1, "l": 9, "d": 4, "n": 2}, goals=goals),
        workloads.Workload("length-1k", "scan", {"b": 1, "l": 8, "d": 4, "n": 2}, part="length"),
        workloads.Workload("length-4k", "scan", {"b": 1, "l": 16, "d": 4, "n": 2}, part="length"),
        workloads.Workload("conv-w4", "conv", {"b": 1, "l": 9, "d": 4, "k": 4}, part="conv"),
        workloads.Workload("decode-b1", "decode", {"b": 1, "d": 4, "n": 2}, part="decode"),
    ]

    def rows(*parts):
        found = []
        for case in small:
            if case.part in parts:
                case = dataclasses.replace(case)
                found += bench_ops.compare(case, "mamba_ssm", Clock(), CEILINGS)
        bench_ops._judge_lengths(found)
        return found

    return rows


def result_of(rows, **more):
    return {
        "what": "scan", "command": "zoo bench scan", "date": "2026", "commit": "abc", "device": "GPU", "versions": {},
        "ceilings": CEILINGS, "cases": rows,
    } | more  # fmt: skip


def test_rows_say_whether_goals_are_met(gpu_rows):
    rows = gpu_rows("table", "length", "conv", "decode")
    by = {(row["name"], row["op"]): row for row in rows}
    assert by["train", "forward"]["met"] is False and by["train", "forward+backward"]["met"] is True
    assert by["train", "forward"]["ratio"] == 2.5
    assert {"conv forward", "decode step", "decode step in a CUDA graph"} <= {op for _, op in by}
    longest = by["length-4k", "forward"]
    assert longest["cost_to_longest"] == 1 and longest["linear"] and not by["length-1k", "forward"]["linear"]


def test_parts_end_in_one_file(gpu_rows, tmp_path):
    path = tmp_path / "scan.json"
    result_file.write(result_of(gpu_rows("table")), path)
    after = result_of(gpu_rows("length", "table"), command="again")
    both = result_file.merged(result_file.same_run(path, after), after)
    assert len(both["cases"]) == 6 and [run["command"] for run in both["runs"]] == ["zoo bench scan", "again"]
    third = result_file.merged(both, result_of(gpu_rows("conv"), command="third"))
    assert len(third["cases"]) == 8 and [run["command"] for run in third["runs"]][1:] == ["again", "third"]
    assert result_file.same_run(path, result_of([], device="other")) is None
    assert result_file.same_run(path, result_of([], versions={"torch": "3"})) is not None
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        result_file.same_run(path, after)


def test_cases_of_an_earlier_commit_say_so(gpu_rows, tmp_path):
    path = tmp_path / "scan.json"
    result_file.write(result_of(gpu_rows("table", "conv"), versions={"torch": "2"}), path)
    after = result_of(gpu_rows("table"), commit="def", versions={"torch": "2"})
    both = result_file.merged(result_file.same_run(path, after), after)
    assert both["commit"] == "def" and [run["commit"] for run in both["runs"]] == ["abc", "def"]
    assert {(row["part"], row.get("commit")) for row in both["cases"]} == {("table", None), ("conv", "abc")}
    third = result_file.merged(both, after | {"commit": "ghi"})
    assert [row.get("commit") for row in third["cases"] if row["part"] == "conv"] == ["abc", "abc"]
    assert result_file.same_run(path, after | {"versions": {"torch": "3"}}) is None
    # a run beside nobody says nothing about the peer's version, nor does one before it
    alone, beside = ({"versions": {"torch": "2", "peer": text}} for text in ("not installed", "1"))
    for one, other in ((alone, beside), (beside, alone)):
        result_file.write(after | one, path)
        assert (
            result_file.merged(result_file.same_run(path, after | other), after | other)["versions"]
            == beside["versions"]
        )


def test_results_are_shown_and_drawn(gpu_rows, tmp_path, monkeypatch):
    console = Console(width=200, record=True)
    bench_show.show(result_of(gpu_rows("table", "decode")), console)
    text = console.export_text()
    assert "2.50x" in text and "decode-b1" in text and "sfu_Gexps" in text
    drawn = bench_show.plot(result_of(gpu_rows("table")), tmp_path / "scan.svg").read_text()
    assert {"forward", "forward and backward", "hybridzoo", "mamba-ssm", "2.5x"} <= set(
        ElementTree.fromstring(drawn).itertext()
    )
    assert bench_show.plot(result_of(gpu_rows("table")), tmp_path / "again.svg").read_text() == drawn
    with pytest.raises(ValueError, match="no rows with a peer"):
        bench_show.plot(result_of([]), tmp_path / "none.svg")
    with pytest.raises(ValueError, match="writes SVG"):
        bench_show.plot(result_of(gpu_rows("table")), tmp_path / "scan.png")


def test_the_pages_show_what_was_measured_and_how_far_off_it_is(gpu_rows, tmp_path):
    folder = tmp_path / "eval" / "results"
    result_file.write(
        result_of(gpu_rows("table", "length", "conv"), versions={"torch": "2", "mamba_ssm": "1"}),
        folder / "scan-h100.json",
    )
    committed = Path(readme.__file__).parents[1] / "results"
    (folder / "parity.json").write_bytes((committed / "parity.json").read_bytes())
    pages = [tmp_path / name for name in readme.PAGES]
    for page in pages:
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"# Title\n{readme.START}\nold\n{readme.END}\nrest\n")
    assert readme.refresh(pages[0]) == [*pages, folder / "scan-h100.svg"]
    text = (tmp_path / "docs/performance.md").read_text()
    assert text.startswith("# Title\n") and text.endswith("\nrest\n") and "old" not in text
    assert "| 2.50x | 83 % of 3x |" in text and "1 of 2 goals are reached" in text and "mamba-ssm 1" in text
    assert "(../eval/results/scan-h100.svg)" in text and "| convolution of width 4 |" in text
    assert "(eval/results/scan-h100.json)" in pages[0].read_text()
    before = [page.read_text() for page in pages]
    readme.refresh(pages[0])
    assert [page.read_text() for page in pages] == before
    pages[1].write_text("nothing")
    with pytest.raises(ValueError, match="has no section between"):
        readme.refresh(pages[0])


# ------------------------------------------------------------------------------------------------ training


@pytest.fixture
def sides(monkeypatch, tmp_path):
    """A peer that is a tiny Mamba of ours, and the same model on our side."""

    def peer(spec, device):
        torch.manual_seed(0)
        model = bench_train.build(spec["model"], device=device)
        bench_train.keep_weights(model, spec["weights"])
        return lambda ids: bench_train.cross_entropy(model(ids).logits, ids), model

    monkeypatch.setitem(bench_train._MAKERS, "fake", peer)
    monkeypatch.setattr(bench_train, "TIMED", 3)
    monkeypatch.setattr(bench_train, "COMPARED", 4)
    monkeypatch.setattr(bench_train.dispatch, "installed", dict(bench_train.dispatch.installed))
    weights = str(tmp_path / "w.safetensors")

    def run(side, variant="default", model="mamba-tiny"):
        spec = {"side": side, "model": model, "weights": weights, "variant": variant}
        return bench_train.side(spec, "cpu", {"b": 2, "l": 16})

    return run


def test_both_sides_train_from_the_same_weights(sides, tmp_path):
    theirs = sides("fake")
    mine = {variant: sides("ours", variant) for variant in ("default", "logits")}
    for found in mine.values():
        row = bench_train._row("mamba-tiny", "default", found | {"peak_GiB": 1.0}, "fake", theirs | {"peak_GiB": 2.0})
        assert row["agree"] and row["error"] < 1e-3 and row["memory_ratio"] == 0.5 and row["memory_met"]
        assert row["ours_losses"][0] > row["ours_losses"][-1]
    assert len(theirs["times_ms"]) == 3
    console = Console(width=200, record=True)
    bench_show.show(result_of([row], what="train", ceilings={}), console)
    assert "mamba-tiny" in console.export_text()
    (text,) = readme._train(tmp_path / "train.json", result_of([row], what="train", ceilings={}))[1:]
    assert "| mamba-tiny | a plain loop: forward, loss.backward(), step |" in text and "| 0.50x | 0.7x |" in text


def test_mamba2_trains_beside_its_peer_too(sides):
    theirs, mine = (sides(side, model="mamba2-tiny") for side in ("fake", "ours"))
    assert mine["backends"] == {"ssd": "chunked", "causal_conv1d": "chunked"} and theirs["backends"] == {}
    row = bench_train._row("mamba2-130m", "default", mine | {"peak_GiB": 1.0}, "fake", theirs | {"peak_GiB": 2.0})
    assert row["agree"] and row["goal_ratio"] == 2.5 and row["goal_memory_ratio"] == 0.7


def test_losses_that_drift_apart_are_not_agreement(sides):
    found = sides("fake") | {"peak_GiB": 1.0}
    off = found | {"losses": [x * 1.01 for x in found["losses"]]}
    assert not bench_train._row("m", "default", off, "fake", found)["agree"]


def test_parts_of_training_are_run_in_turn_and_survive_a_failure(monkeypatch):
    ran = []

    def run(spec, folder):
        ran.append((spec["side"], spec["model"], spec["variant"]))
        if spec["variant"] == "compile":
            raise RuntimeError("no compiler")
        return {"losses": [2.0], "times_ms": [1.0, 2.0, 3.0], "peak_GiB": 1.0, "params": 5, "backends": {}}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_train, "_run", run)
    rows, failed = bench_train.measure(["mamba_ssm"], list(bench_train.PARTS), lambda text: None)
    assert ran[0] == ("mamba_ssm", "mamba-130m", None) and ran.count(("mamba_ssm", "mamba-370m", None)) == 1
    assert [row["variant"] for row in rows] == [
        *("default", "graph", "one-thread", "logits", "mamba_ssm-scan"),
        *(("default", "graph", "one-thread") * 3),
    ]
    goals = {row["name"]: row["goal_ratio"] for row in rows if row["variant"] == "default"}
    assert goals == {"mamba-130m": 2.0, "mamba-370m": 2.0, "mamba2-130m": 2.5, "mamba2-370m": 2.0}
    assert failed == ["no compiler", "no compiler"] and [row["goal_ratio"] for row in rows[:4]] == [2.0, 2.0, 2.0, None]
    assert bench_train.measure(["mamba_ssm"], ["mamba-130m"], lambda text: None, profile=True) == ([], [])


def test_a_side_that_fails_is_quoted(tmp_path):
    spec = {"side": "ours", "model": "no-such-model", "weights": "none", "variant": "default"}
    with pytest.raises(RuntimeError, match=r"(?s)ours of no-such-model ended with status 1:.*no-such-model"):
        bench_train._run(spec, str(tmp_path))


def test_the_way_from_lines_to_rows_is_measured_in_a_process_of_its_own(tmp_path):
    result = bench_data.bench_data(["0.003"], tmp_path / "data.json")
    (row,) = result["cases"]
    assert json.loads((tmp_path / "data.json").read_text()) == result and row["name"] == "byte 0.003 GB"
    assert row["bytes"] >= 3e6 and 0.8 * row["bytes"] < row["tokens"] < row["bytes"] and row["padding"] < 0.01
    assert row["prepared_peak_MB"] >= row["before_MB"] > 50 and bench_data.table(result).row_count == 1
    with pytest.raises(ValueError, match="unknown part 'words:1'"):
        bench_data.bench_data(["0.003", "words:1"])

"""The published structure is the same function as our model, and the benchmark of image models says what it measured, and what not."""

import json
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import hybridzoo as zoo
from hybridzoo.eval.bench import readme, vision, vision_bytes, vision_peers
from hybridzoo.eval.bench import run as bench
from hybridzoo.eval.bench import show as bench_show
from hybridzoo.kernels import dispatch

SMALL = {
    "vmamba-micro": [],
    "vmamba-tiny-s1l8": ["d_model=16", "drop_path=0", "n_classes=7"],
    # channels last, gates, 16 states, merged patches
    "vanilla-vmamba-tiny": ["d_model=16", "drop_path=0", "n_classes=7", "stages.2.layers=ss2d * 2"],
}


def pair(name):
    torch.manual_seed(0)
    model = zoo.build(name, SMALL[name])
    return model, vision_peers.published(model, vision_peers.plain_parts())


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("size", [(32, 32), (35, 50)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_the_published_structure_is_the_same_function(name, size):
    model, net = pair(name)
    images, labels = torch.randn(2, model.cfg.in_channels, *size), torch.tensor([3, 1])
    out = model(images, labels=labels)
    out.loss.backward()
    logits = net(images)
    F.cross_entropy(logits, labels).backward()
    assert off(out.logits, logits) < 1e-5
    theirs = dict(net.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(theirs)
    assert max(off(p.grad, theirs[name].grad) for name, p in model.named_parameters()) < 1e-5


def test_copies_are_the_four_orders_and_the_sum_is_their_transpose():
    x = torch.arange(15.0).view(1, 1, 3, 5)
    columns = [0, 5, 10, 1, 6, 11, 2, 7, 12, 3, 8, 13, 4, 9, 14]
    rows = vision_peers.spread(x)[0, :, 0].long().tolist()
    assert rows == [[*range(15)], columns, [*range(14, -1, -1)], columns[::-1]]
    # <spread(x), y> = <x, merge(y)>
    x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 4, 3, 20)
    torch.testing.assert_close((vision_peers.spread(x) * y).sum(), (x * vision_peers.merge(y, 4, 5)).sum())


def test_the_scan_that_stands_in_for_the_library_is_the_definition():
    u, dt, B, C = torch.randn(2, 6, 9), torch.randn(2, 6, 9), torch.randn(2, 2, 3, 9), torch.randn(2, 2, 3, 9)
    A, D, bias = -torch.rand(6, 3), torch.randn(6), torch.randn(6)
    y = vision_peers.plain_scan(u, dt, A, B, C, D, None, bias, True)
    last = (u, dt), (B, C)
    (u, dt), (B, C) = ((m.mT for m in last[0]), (m.permute(0, 3, 1, 2) for m in last[1]))
    want = zoo.kernels.selective_scan(u, dt, A, B, C, D, dt_bias=bias, dt_softplus=True, backend="reference")
    torch.testing.assert_close(y, want.mT)
    with pytest.raises(ValueError, match="has no gate"):
        vision_peers.plain_scan(u, dt, A, B, C, D, u, bias, True)


def test_what_is_no_vmamba_has_no_published_structure():
    for change in ("mixers.ss2d.directions=2", "mixers.ss2d.d_conv=0"):
        with pytest.raises(ValueError, match="is no VMamba"):
            vision_peers.published(zoo.build("vmamba-micro", [change]), vision_peers.plain_parts())
    with pytest.raises(ValueError, match="downsample = conv2 is of neither version"):
        vision_peers.published(zoo.build("vmamba-micro", ["downsample=conv2"]), vision_peers.plain_parts())


def test_bytes_are_those_of_the_analysis():
    # VMamba-T, 128 images of 224 x 224: 16.26 GB as published, 1.46 GB at the least (by hand, stage by stage: MB per block)
    row = vision_bytes.scan_bytes("vmamba-tiny-s1l8", 128, 224, 224)
    assert (row["published_GB"], row["least_GB"]) == (pytest.approx(16.26, abs=0.01), pytest.approx(1.46, abs=0.01))
    per_block = [
        (s["blocks"], round(s["published_MB"] / s["blocks"]), round(s["least_MB"] / s["blocks"])) for s in row["stages"]
    ]
    assert per_block == [(2, 3108, 283), (2, 1548, 138), (8, 772, 68), (2, 386, 34)]
    assert row["least_GB"] < row["ours_GB"] < row["published_GB"] and row["counted"]
    assert row["met"] == (row["to_least"] <= 1.5)


class Clock:
    """A timer that calls everything and says that ours took 2 ms, and every other side 5."""

    def compare(self, *calls):
        for call in calls:
            call()
        return [[2.0, 2.0, 2.5], *([5.0, 5.0, 5.5] for _ in calls[1:])]


@pytest.fixture
def tiny(monkeypatch):
    passes = ("forward", "training", "training step")
    case = vision.Case("micro", "vmamba-micro", ("published",), passes, (2, 9, 7), (1.3, 3.0), "cpu")
    monkeypatch.setattr(vision, "CASES", [case])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return case


def test_rows_say_what_was_measured(tiny):
    installed = dict(dispatch.installed)
    rows, failed = vision.measure(["micro"], lambda text: None, {}, timer=Clock())
    assert not failed and dispatch.installed == installed
    assert [(row["op"], row["goal_ratio"], row["met"]) for row in rows] == [
        ("forward, 2 x 9 x 7", 1.3, True), ("training, 2 x 9 x 7", 3.0, False), ("training step, 2 x 9 x 7", 3.0, False),
    ]  # fmt: skip
    for row in rows:
        assert row["ratio"] == 2.5 and row["ours_images_s"] == 1000 and row["peer_images_s"] == 400
        assert row["error"] < 1e-5 and row["copies"] == "torch"


def test_other_logits_are_not_timed(tiny, monkeypatch):
    right = vision_peers.published

    def wrong(model, parts):
        net = right(model, parts)
        net.head.bias.data += 1
        return net

    monkeypatch.setattr(vision, "published", wrong)
    rows, failed = vision.measure(["micro"], lambda text: None, {}, timer=Clock())
    assert not rows and failed[0].startswith("micro: AssertionError: published: logits differ by")


def test_a_batch_that_does_not_fit_is_halved_and_said(tiny, monkeypatch):
    real = vision._sides

    def sides(case, b):
        if b > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(case, b)

    monkeypatch.setattr(vision, "_sides", sides)
    rows, failed = vision.measure(["micro"], lambda text: None, {}, timer=Clock())
    assert not failed and {row["shape"]["b"] for row in rows} == {1} and rows[0]["oom"] == [2]
    # what was asked for stays the row's name
    assert rows[0]["op"] == "forward, 2 x 9 x 7" and rows[0]["ours_images_s"] == 500

    def never(case, b):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vision, "_sides", never)
    assert vision.measure(["micro"], lambda text: None, {}, timer=Clock())[1] == [
        "micro: OutOfMemoryError: CUDA out of memory"
    ]


def test_parts_are_for_a_device_and_peers_are_parts(tiny):
    with pytest.raises(ValueError, match=r"bench vision: walks: nothing to measure on a cpu\. Its parts: micro, bytes"):
        vision.measure(["walks"], lambda text: None, {})
    with pytest.raises(ValueError, match="bench vision: its peers are parts, so --vs timm says nothing"):
        bench.run_bench("vision", ["timm"])
    with pytest.raises(
        ValueError, match=r"unknown part 'tiny' of vision\. Known: vmamba-tiny-s1l8, vmamba-tiny-s1l8:forward"
    ):
        bench.run_bench("vision", parts=["tiny"])


def test_every_figure_of_the_issue_has_its_goal():
    cases = {case.part: case for case in vision.CASES}
    first, old = cases["vmamba-tiny-s1l8"], cases["vanilla-vmamba-tiny"]
    assert first.goals == (1.3, 1.8) and old.goals[1] == 3.0 and first.size == (128, 224, 224)
    assert {case.size for case in vision.CASES if case.part == "vmamba-tiny-s1l8:large"} == {
        (1, 800, 1333),
        (2, 800, 1333),
    }
    assert set(vision.PASSES) == {what for case in vision.CASES for what in case.passes}
    assert (vision.GOAL_MEMORY, vision_bytes.GOAL) == (0.6, 1.5)


def test_every_part_is_kept_when_it_ends_and_is_shown_and_drawn(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vision.timing, "HostTimer", lambda repeats: Clock())
    monkeypatch.setattr(bench_vision := bench.bench_vision, "PARTS", ["micro", "bytes"])
    monkeypatch.setitem(bench._TRAINED, "vision", bench_vision.PARTS)
    path = tmp_path / "vision.json"
    result = bench.run_bench("vision", out=path)
    kept = json.loads(path.read_text())
    assert kept["cases"] == result["cases"] and len(kept["cases"]) == 5
    assert [run["command"] for run in kept["runs"]] == [
        "zoo bench vision --part micro",
        "zoo bench vision --part bytes",
    ]
    shown = capsys.readouterr().out
    assert "1,000" in shown and "2.50x" in shown and "counted from shapes" in shown
    # as a GPU's rows are, with memory
    memory = {"ours_GiB": 1.0, "peer_GiB": 2.0, "memory_ratio": 0.5}
    for row in result["cases"][:3]:
        row |= memory | {"shape": {"b": 128, "h": 224, "w": 224}}
        row |= {"goal_memory_ratio": 0.6, "memory_met": True} if row["pass"] != "forward" else {}
    console = Console(width=200, record=True)
    bench_show.show(result, console)
    assert "0.50x" in console.export_text()
    drawn = set(ElementTree.fromstring(bench_show.plot(result, tmp_path / "v.svg").read_text()).itertext())
    assert {
        "vmamba-micro, training, images per second",
        "vmamba-micro, training, peak GiB",
        "published",
        "1,000",
    } <= drawn
    text = "\n".join(readme._vision(tmp_path / "vision-h200.json", result))
    assert "1 of 3 goals of speed are reached" in text and "| 2.50x | 83 % of 3x | 1.00 | 2.00 | 0.50x |" in text
    assert "times the least possible 1.46 GB" in text and "(eval/results/vision-h200.svg)" in text

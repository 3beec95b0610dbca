"""The report of a study, opened in a browser: it says what the data say, fits a phone, follows the theme, and sorts."""

import csv
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_up_study import RATES, failure, grid, point, result, spec, study

pytest.importorskip("matplotlib")

from hybridzoo.eval.ablate.curves import excess, slices
from hybridzoo.eval.ablate.report import sentences, write_report
from hybridzoo.eval.ablate.series import series_of
from hybridzoo.eval.ablate.statistics import choose, comparisons

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole study with a failure and a point that is not matched: the folder of its report, and what it was made from."""
    folder = tmp_path_factory.mktemp("study")
    points, results = study(folder)
    page = write_report(spec(), points, results, [failure(points[3])], folder / "report")
    assert page == folder / "report" / "report.html"
    return page, points, results


def test_two_mixers_and_nothing_between_them_have_a_report(tmp_path):
    """Both are pure ends, which other lines would share, and there is no other line."""
    points = [point("mixer=mamba", 0.0, mixer="mamba"), point("mixer=attention", 1.0, mixer="attention")]
    scores = {"mixer=mamba": 0.9, "mixer=attention": 0.4}
    results = [result(p, 1e-2, seed, scores[p.name] + seed / 100, folder=tmp_path) for p in points for seed in range(3)]
    write_report(spec(), points, results, [], tmp_path)
    (comparison,) = comparisons(choose(results))
    lines = series_of(comparison, points, [])
    assert [(line.name, len(line.points), line.shared) for line in lines] == [
        ("mixer=mamba", 1, ()),
        ("mixer=attention", 1, ()),
    ]
    assert (tmp_path / "score-state.svg").is_file()


def asked(page, questions, dark=False):
    """The answers of a browser to expressions about a page whose scripts have run, in the order in which they are asked."""
    script = f"document.body.dataset.answers = JSON.stringify({{{', '.join(f'{name}: {what}' for name, what in questions.items())}}});"
    copy = page.with_name(f"copy-{dark}.htm")
    copy.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--window-size=1100,2000"]
    theme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    try:
        done = subprocess.run(
            [BROWSER, *options, *theme, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=200
        )
    finally:
        copy.unlink()
    assert done.returncode == 0, done.stderr
    return json.loads(unescape(re.search(r'data-answers="([^"]*)"', done.stdout)[1]))


ROWS = "[...document.querySelector('.sorts tbody').rows].map(row => row.cells[0].textContent)"
HEAD = "[...document.querySelectorAll('.sorts th button')].find(b => b.textContent === '{}')"
LOOKS = "[getComputedStyle(document.body).backgroundColor, ...[...document.querySelectorAll('svg.plot text')].map(t => getComputedStyle(t).fill)]"
# in a frame as wide as a phone, which has the same styles: a browser's window has a least width
NARROW = """(() => {{
    const page = document.documentElement.cloneNode(true);
    page.querySelectorAll('script').forEach(script => script.remove());
    const frame = document.createElement('iframe');
    [frame.width, frame.height] = [{}, 30000];
    frame.style.border = 0;
    document.body.append(frame);
    const inside = frame.contentDocument;
    inside.write('<!doctype html>' + page.outerHTML);
    inside.close();
    const size = t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.clientWidth / t.ownerSVGElement.viewBox.baseVal.width;
    const found = [inside.documentElement.scrollWidth, Math.min(...[...inside.querySelectorAll('svg.plot text')].map(size))];
    frame.remove();
    return found;
}})()"""


def presses(head, times):
    return f"(() => {{ const head = {HEAD.format(head)}; {'head.click(); ' * times} return {ROWS}; }})()"


@pytest.fixture(scope="module")
def browser(made):
    """What one visit to the page finds out; starting a browser takes seconds."""
    return asked(made[0], {
        "sentences": "[...document.querySelectorAll('.found p')].map(p => p.textContent)",
        "after_the_question": "document.querySelector('h1').nextElementSibling.className",
        "as_written": ROWS,
        "by_test": presses("test", 1),
        "by_test_again": presses("test", 1),
        "by_state": presses("state", 1),
        "by_name": presses("point", 1),
        "told": "[...document.querySelectorAll('.sorts th')].map(head => head.getAttribute('aria-sort')).filter(Boolean)",
        "keyboard": "[...document.querySelectorAll('.sorts th button')].every(b => b.tabIndex === 0 && b.type === 'button')",
        "phone": NARROW.format(390),
        "small": NARROW.format(320),
        "looks": LOOKS,
    })  # fmt: skip


@in_a_browser
def test_a_browser_reads_its_three_sentences(made, browser):
    _, points, results = made
    assert browser["sentences"] == sentences(points, results) and len(browser["sentences"]) == 3
    best = "The best point is attention=0.5 place=even (attention is 50 % of its mixers and 25 % of all its blocks), with 98.0 % accuracy"
    assert browser["sentences"][0].startswith(best)
    # they are the first thing after the question
    assert browser["after_the_question"] == "found"


@in_a_browser
def test_tables_sort_by_a_press_of_their_heads(made, browser):
    _, points, results = made
    names = [c.point.name for c in sorted(choose(results), key=lambda c: -c.mean)]
    assert browser["as_written"] == [p.name for p in points[:-1]]
    assert browser["by_test"] == names and browser["by_test_again"] == names[::-1]
    # sizes by what they are, not by how they are written: 568 KiB are less than 1 MiB
    states = {p.name: p.costs.state_bytes for p in points[:-1]}
    assert [states[name] for name in browser["by_state"]] == sorted(states.values(), reverse=True)
    assert browser["by_name"] == sorted(names) and browser["told"] == ["ascending"] and browser["keyboard"]


@in_a_browser
def test_it_fits_a_phone_and_can_be_read_there(browser):
    for name, width in (("phone", 390), ("small", 320)):
        needed, least = browser[name]
        assert needed <= width and least >= (8 if width == 390 else 6.5), name


@in_a_browser
def test_pictures_follow_the_theme(made, browser):
    def light(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    day, night = browser["looks"], asked(made[0], {"looks": LOOKS}, dark=True)["looks"]
    assert len(day) == len(night) > 100
    assert light(day[0]) > 230 and all(light(colour) < 130 for colour in day[1:])
    assert light(night[0]) < 40 and all(light(colour) > 130 for colour in night[1:])


def test_the_page_needs_nothing_else_and_hides_nothing(made):
    page = made[0]
    text = page.read_text(encoding="utf-8")
    assert (
        not re.search(r'(src|href)="(?!#)', text)
        and "url(http" not in text
        and "{{" not in text
        and "nan" not in text.split("</style>")[2]
    )
    for said in (
        "OutOfMemoryError: tried to allocate 2.0 GiB (2 attempts)", "parameters: 118,200 and 122,900 are the nearest", "cells/0123456789abcdef/log.txt",
        "attention=0 place=even (0.01, highest)", "zoo ablate run recall-ratio --scale short", "torch 2.13.0", "0123abcd", "arXiv:2507.06457",
        "standard deviation of a seed", "params within 1 %, by mixers.mlp.d_intermediate",
    ):  # fmt: skip
        assert said in text, said
    # no place of the machine it was made on
    assert str(page.parent.parent) not in text and "/store/" not in text


def test_pictures_are_files_with_text_as_text(made):
    page, _, results = made
    files = sorted(path.stem for path in page.parent.glob("*.svg"))
    assert files == ["heat-map", "losses", "points", "rates", "score-attention", "score-state", "slices-length", "slices-pairs", "speed-decode",
                     "speed-peak", "speed-prefill", "speed-state"]  # fmt: skip
    drawn = {name: ElementTree.parse(page.parent / f"{name}.svg").getroot() for name in files}
    for name, root in drawn.items():
        text = ElementTree.tostring(root, encoding="unicode")
        assert root.attrib["aria-label"] and "<metadata" not in text and "font-family: " not in text, name
        # colours are the theme's: those of the style sheet, which the file brings along, and no other
        styles = " ".join(element.attrib.get("style", "") for element in root.iter())
        assert "var(--" in styles and not re.search(r"#[0-9a-f]{6}", styles) and "--ink:" in text, name
        ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert len(ids) == len(set(ids)), name
    main = drawn["score-attention"]
    words = {text.text for text in main.iter(f"{SVG}text")}
    assert {
        "accuracy on test, %",
        "attention, % of the mixers",
        "attention, % of all blocks",
        "place=first",
        "pure ends",
    } <= words
    tips = [title.text for title in main.iter(f"{SVG}title")]
    for c in choose(results):
        (tip,) = [tip for tip in tips if tip.startswith(f"{c.point.name}: ")]
        assert f"{100 * c.mean:.1f} % (3 seeds: " in tip and f"learning rate {c.rate:g}" in tip


def test_points_stand_where_their_means_are(made):
    page, _, results = made
    root = ElementTree.parse(page.parent / "score-attention.svg").getroot()
    at = {}
    for group in root.iter(f"{SVG}g"):
        title, mark = group.find(f"{SVG}title"), group.find(f".//{SVG}use")
        if title is not None and mark is not None and "learning rate" in title.text:
            at[title.text.split(":")[0]] = float(mark.attrib["x"]), float(mark.attrib["y"])
    chosen = {c.point.name: c for c in choose(results)}
    assert set(at) == set(chosen)
    first, last = at["attention=0 place=even"], at["attention=1 place=even"]
    for name, c in chosen.items():
        share = (at[name][0] - first[0]) / (last[0] - first[0])
        assert share == pytest.approx(c.point.axes["attention"], abs=1e-3)
        ends = chosen["attention=0 place=even"].mean, chosen["attention=1 place=even"].mean
        assert (at[name][1] - first[1]) / (last[1] - first[1]) == pytest.approx(
            (c.mean - ends[0]) / (ends[1] - ends[0]), abs=1e-3
        )


def test_tables_beside_it_hold_all_of_it(made):
    page, points, results = made
    with (page.parent / "cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == len(results) and all(re.fullmatch("[0-9a-f]{16}", row["cell"]) for row in cells)
    with (page.parent / "points.csv").open() as file:
        rows = {row["point"]: row for row in csv.DictReader(file)}
    (comparison,) = comparisons(choose(results))
    assert len(rows) == len(points)
    for c in comparison.chosen:
        row = rows[c.point.name]
        assert (float(row["mean"]), float(row["sd"]), float(row["low"])) == pytest.approx((c.mean, c.sd, c.interval[0]))
        assert row["within_noise"] == str(c in comparison.basin) and row["attention_of_blocks"] == str(
            c.point.costs.attention_of_blocks
        )
    data = json.loads((page.parent / "report.json").read_text())
    assert (
        data["sentences"] == sentences(points, results) and data["comparisons"][0]["best"] == "attention=0.5 place=even"
    )
    assert data["comparisons"][0]["noise_floor"] == pytest.approx(comparison.noise) and len(data["points"]) == 12
    assert data["failures"][0]["error"].startswith("OutOfMemoryError") and data["file"]["axes"]["attention"][
        "values"
    ] == [0.0, 0.125, 0.25, 0.5, 1.0]


def test_again_is_the_same_and_old_pictures_go(made):
    page, points, results = made
    before = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    (page.parent / "of-an-earlier-report.svg").write_text("<svg/>")
    write_report(spec(), points, results, [failure(points[3])], page.parent)
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == before


def test_the_commands_that_make_it_again_name_what_it_was_made_of(tmp_path):
    mine = spec(source="my studies/mine.yaml", report={"literature": []})
    text = write_report(mine, grid(), [], [], tmp_path, Path("kept")).read_text()
    assert "zoo ablate run &#x27;my studies/mine.yaml&#x27; --scale short --folder kept\nzoo ablate report" in text
    assert "zoo ablate" not in write_report(spec(source=""), grid(), [], [], tmp_path).read_text()


def test_a_report_is_whole_or_not_at_all(made, tmp_path, monkeypatch):
    _, points, results = made
    with pytest.raises(ValueError, match="literature: there is no 'mamba3'"):
        write_report(spec(report={"literature": ["mamba3"]}), points, results, [], tmp_path / "new")
    with pytest.raises(ValueError, match="is not a folder"):
        write_report(spec(), points, results, [], tmp_path / "report.html")
    gone = dataclasses.replace(results[0].cell, rate=RATES[0])
    lost = result(gone.point, gone.rate, gone.seed, 0.5)
    with pytest.raises(ValueError, match=r"result.json: cannot be read .* Run the study again"):
        write_report(spec(), points, [lost], [], tmp_path / "new")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(
            ModuleNotFoundError,
            match=r"draws the pictures of a report. Install it with: pip install 'hybridzoo\[ablate\]'",
        ):
            write_report(spec(), points, results, [], tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_has_hardly_begun_has_a_report(tmp_path):
    points = grid()
    page = write_report(spec(), points, [], [], tmp_path / "none")
    text = page.read_text()
    assert (
        "Nothing can be said yet: none of the 11 points has a result." in text
        and "svg" not in text.split("</style>")[2]
    )
    # costs are known before
    assert "568.0 KiB" in text and "none trained yet" in text and (page.parent / "cells.csv").read_text() == "\n"
    text = write_report(
        spec(), points, [result(points[0], 1e-3, 0, 0.4, folder=tmp_path)], [], tmp_path / "one"
    ).read_text()
    assert (
        "that is a single seed" in text
        and "10 of 11 points have no result yet" in text
        and "There is no noise floor" in text
    )
    assert "Fewer than 3 seeds: attention=0 place=even." in text and "attention=0 place=even (0.003, 0.01)" in text


def test_what_users_write_is_text_and_no_markup(tmp_path):
    evil = point("a=<script>alert(1)</script>", a="<b>&", b="x")
    broken = failure(evil, error="ValueError: <img src=x>")
    study_of = spec(question="Is 1 < 2 & 3?", about="<i>", report={"literature": []})
    page = write_report(study_of, [evil], [result(evil, 1e-3, 0, 0.4, folder=tmp_path)], [broken], tmp_path / "report")
    text = page.read_text()
    assert "<script>alert" not in text and "<img" not in text and "<i>" not in text and "Is 1 &lt; 2 &amp; 3?" in text
    ElementTree.parse(page.parent / "points.svg")


def test_tasks_of_one_study_stand_beside_each_other(tmp_path):
    results = [
        result(point(f"kind={kind} mixer={mixer}", float(mixer == "attention"), kind=kind, mixer=mixer), 3e-3, seed, value + 0.01 * seed,
               task={"name": "mad", "kind": kind, "length": 128}, folder=tmp_path)
        for kind, values in (("recall", (0.9, 0.5)), ("compression", (0.4, 0.6)))
        for mixer, value in zip(("attention", "mamba"), values, strict=True)
        for seed in range(3)
    ]  # fmt: skip
    points = list({r.cell.point.name: r.cell.point for r in results}.values())
    page = write_report(
        spec(name="mad-lite", report={"x": None, "literature": ["mad"]}), points, results, [], tmp_path / "report"
    )
    text = page.read_text()
    found = sentences(points, results)
    assert (
        "recall, mixer=attention with 91.0 % accuracy" in found[0]
        and "compression, mixer=mamba with 61.0 % accuracy" in found[0]
    )
    names = {path.stem for path in page.parent.glob("*.svg")}
    assert {"overview", "points-recall", "points-compression", "score-state-recall"} <= names
    assert "DeltaNet" in text and text.count('class="sorts"') == 2
    words = {e.text for e in ElementTree.parse(page.parent / "overview.svg").getroot().iter(f"{SVG}text")}
    assert {"91.0", "51.0", "41.0", "61.0", "attention", "mamba", "mixer"} <= words


def test_published_curves_lie_over_ours_where_the_protocol_is_theirs(tmp_path):
    def induction(length):
        found = result(
            point("mixer=mamba", mixer="mamba"),
            3e-3,
            0,
            0.9,
            task={"name": "induction", "length": length, "vocab": 16},
            folder=tmp_path,
        )
        found.result["test"]["slices"] = {f"length={n}": {"accuracy": 1.0} for n in (64, 256, 1024, 4096)}
        return found

    named = spec(report={"x": None, "literature": ["induction-heads"]})
    page = write_report(named, [induction(256).cell.point], [induction(256)], [], tmp_path / "same")
    picture = (page.parent / "slices-length.svg").read_text()
    assert (
        "MHA-RoPE, 137K: Gu and Dao 2023, Mamba, table 11 (arXiv:2312.00752)" in picture
        and "Its curves are not drawn" not in page.read_text()
    )
    page = write_report(named, [induction(64).cell.point], [induction(64)], [], tmp_path / "other")
    assert "MHA-RoPE" not in (page.parent / "slices-length.svg").read_text()
    assert "Its curves are not drawn: its length is 256, here 64." in page.read_text()
    # of losses in other units, the shape
    points, results = study(tmp_path, metric="bits_per_byte", seeds=(0,), task={"name": "text", "length": 512})
    page = write_report(
        spec(report={"x": None, "literature": ["jamba", "mamba2-attention-layers"]}),
        points,
        results,
        [],
        tmp_path / "text",
    )
    picture = (page.parent / "published.svg").read_text()
    assert "loss over its own lowest, %" in picture and "Jamba 1.3B" in picture
    # bits of a byte, nats of a token and perplexities of one model lie as far over their lowest
    nats = [(0.0, 2.4), (0.5, 2.0), (1.0, 2.1)]
    for metric, unit in (("bits_per_byte", lambda v: v / 4 / math.log(2)), ("nats", float), ("perplexity", math.exp)):
        xs, ys = excess([(x, unit(v)) for x, v in nats], metric)
        assert xs == [0, 50, 100] and ys == pytest.approx([20, 0, 5])


@pytest.mark.parametrize(
    ("task", "marked"),
    [
        ({"name": "mqar", "settings": [[32, 4, 100], [64, 8, 100]]}, True),
        ({"name": "mqar", "settings": [{"length": 64}]}, True),
        ({"name": "mqar", "length": 64}, True),
        ({"name": "mqar"}, False),
    ],
)
def test_the_length_of_training_is_marked(task, marked):
    found = result(point("a"), 3e-3, 0, 0.9, task=task)
    found.result["test"]["slices"] = {f"length={n}": {"accuracy": 1.0} for n in (32, 64, 128, 256)}
    (picture,) = slices(comparisons(choose([found]))[0])
    assert (picture.title == "Beyond the length of training") is marked and (">training<" in picture.svg) is marked

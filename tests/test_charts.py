"""Charts: every label within its picture, none upon another, marks where their values belong."""

import itertools
import re
from xml.etree import ElementTree

import pytest

from hybridzoo.zoo.report import charts
from hybridzoo.zoo.report.blocks import card, filled, page, table


def elements(chart):
    return list(ElementTree.fromstring(f"<svg>{chart.body}</svg>").iter())


def texts(chart, kind):
    return [e for e in elements(chart) if e.tag == "text" and e.get("class") == kind]


def test_names_at_the_ends_of_curves_do_not_collide():
    ends = {"a": 1.0, "b": 1.0, "c": 1.01, "d": 5.0, "e": 0.99}
    lines = [(name, [(0.0, 2.0), (1.0, end)]) for name, end in ends.items()]
    chart = charts.line_chart("losses", lines, "steps", "loss")
    at = {e.text: float(e.get("y")) for e in texts(chart, "strong")}
    heights = sorted(at.values())
    assert set(at) == set(ends) and all(b - a >= 18 for a, b in itertools.pairwise(heights))
    assert heights[0] > 0 and heights[-1] < chart.height and at["d"] == heights[0]
    # what was already apart is where its curve ends
    (far,) = (e for e in elements(chart) if e.tag == "path" and "M2,30.0 L12,30.0" in e.get("d"))
    assert charts.colour(3) in far.get("style")


def test_a_curve_may_be_smoothed_and_cut_and_flat():
    points = [(float(i), 9.0 if i == 0 else 1.0 + i % 2) for i in range(50)]
    smooth = charts.line_chart("l", [("a", points)], "x", "y", (0.5, 2.5), smoothing=0.7)
    kinds = [e.get("class") for e in elements(smooth) if e.tag == "polyline"]
    assert kinds == ["line faint", "line"]
    flat = charts.line_chart("l", [("a", [(0.0, 2.0), (4.0, 2.0)])], "x", "y")
    assert "nan" not in flat.body and [e.text for e in texts(flat, "soft")][-2:] == ["4", "x"]


def test_bars_are_as_long_as_their_values():
    rows = [charts.Bar("one", 25.0, "25 %", 0), charts.Bar("the <other>", 0.0, "0 %", 1)]
    chart = charts.bars("accuracy", rows, 100, ("guessing", 50.0))
    assert [e.get("width") for e in elements(chart) if e.tag == "rect"] == ["25.00%", "0.00%"]
    (line,) = (e for e in elements(chart) if e.tag == "line")
    assert line.get("x1") == line.get("x2") == "50.00%" and "the <other>" in [e.text for e in texts(chart, "")]
    assert chart.left > 11 * 7


def test_dots_stand_on_one_logarithmic_scale():
    rows = [
        charts.Dots("a", "1 × 2", ((1.0, 0), (10.0, 1)), "10x", limit=0.1),
        charts.Dots("b", "", ((0.1, 0), (1.0, 2)), "10x"),
    ]
    chart = charts.dots("times", rows, "ms")
    at = {(e.get("cy"), e.get("style")): float(e.get("cx")[:-1]) for e in elements(chart) if e.tag == "circle"}
    one, ten, tenth, again = (
        at[y, f"fill:{charts.colour(c)}"] for y, c in (("28", 0), ("28", 1), ("70", 0), ("70", 2))
    )
    assert one == again and ten - one == pytest.approx(one - tenth, abs=0.02)
    (limit,) = (e for e in elements(chart) if e.get("class") == "limit")
    assert float(limit.get("x1")[:-1]) == tenth
    assert [e.text for e in texts(chart, "soft")] == ["0.1", "0.3", "1", "3", "ms"]


def test_a_picture_is_a_file_of_its_own_that_holds_all_panels():
    chart = charts.bars("accuracy", [charts.Bar("one", 25.0, "25 %", 0)], 100)
    root = ElementTree.fromstring(
        charts.picture("A title & more " * 6, [("first", chart), ("second", chart)], [("one", 0), ("floor", None)])
    )
    said = [text.strip() for text in root.itertext()]
    assert {"first", "second", "floor", "25 %"} <= set(said) and "prefers-color-scheme: dark" in "".join(said)
    inner = [e for e in root.iter() if e.tag.endswith("svg")][1:]
    ends = [float(e.get("y")) + float(e.get("height")) for e in inner]
    assert ends[0] < float(inner[1].get("y")) and ends[1] < float(root.get("height"))
    assert "href" not in ElementTree.tostring(root).decode().replace("xmlns", "")


def test_pages_escape_and_keep_the_first_column():
    shown = table(["", "a<b"], [["row & more", "1", "2"]], best={(0, 2)})
    assert "a&lt;b" in shown and '<th scope="row">row &amp; more</th><td>1</td><td class="best">2</td>' in shown
    whole = page("t<", card("x", "<p>{{body}}</p>", 7))
    assert "<title>t&lt;</title>" in whole and "{{body}}" in whole and "var(--c1)" in whole
    assert re.search(r"th:first-child \{[^}]*sticky", whole)
    assert filled("{{a}} {{b}}", {"a": "{{b}}", "b": "2"}) == "{{b}} 2"

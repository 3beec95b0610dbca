"""Statistics of studies against plain definitions: what is chosen on validation, what seeds say on test, and what may not be said."""

import itertools
import math
import statistics

import numpy as np
import pytest
from made_up_study import RATES, grid, point, result, study

from hybridzoo.eval.ablate.frame import cell_rows, csv_text, frame, point_rows
from hybridzoo.eval.ablate.literature import as_loss, literature, mismatch
from hybridzoo.eval.ablate.sentences import ends, three_sentences
from hybridzoo.eval.ablate.series import few, fraction, ratio_axes, series_of
from hybridzoo.eval.ablate.statistics import best_rate, choose, comparisons, difference, higher_is_better
from hybridzoo.eval.ablate.tables import doubts
from hybridzoo.eval.ablate.words import gap, listed, shown, shown_interval, times

scipy_stats = pytest.importorskip("scipy.stats")
NAN = math.nan


def one(point, tests, rate=3e-3, **more):
    return [result(point, rate, seed, test, **more) for seed, test in enumerate(tests)]


def compared(*points_with_tests, **more):
    results = [r for name, tests in points_with_tests for r in one(point(name), tests, **more)]
    (comparison,) = comparisons(choose(results))
    return comparison


def test_the_rate_is_chosen_on_validation_and_reported_on_test():
    p = point("a")
    results = [
        result(p, rate, 0, test, valid)
        for rate, test, valid in zip(RATES, (0.9, 0.5, 0.7), (0.6, 0.8, 0.7), strict=True)
    ]
    (c,) = choose(results)
    assert c.rate == 3e-3 and c.mean == 0.5 and c.tests == (0.5,) and c.edge is None and not c.missing_rates
    assert c.tried == dict(zip(RATES, (0.6, 0.8, 0.7), strict=True))
    # of losses, the lowest
    for metric in ("bits_per_byte", "loss", "mse"):
        (c,) = choose(
            [
                result(p, r.cell.rate, 0, r.result["test"]["accuracy"], r.result["valid"]["accuracy"], metric=metric)
                for r in results
            ]
        )
        assert c.rate == 1e-3 and c.mean == 0.9
    with pytest.raises(ValueError, match=r"metric 'bleu': its direction is not known\. Known are: accuracy"):
        choose([result(p, 1e-3, 0, 0.5, metric="bleu")])
    with pytest.raises(ValueError, match="there are none to choose a rate from"):
        best_rate([])


def test_further_seeds_of_the_best_rate_do_not_unseat_it():
    p = point("a")
    first = [result(p, rate, 0, valid) for rate, valid in zip(RATES, (0.79, 0.8, 0.7), strict=True)]
    # the first seed was lucky: the mean of three is below what the next rate has with one
    (c,) = choose([*first, result(p, 3e-3, 1, 0.5), result(p, 3e-3, 2, 0.5)])
    assert c.rate == best_rate(first) == 3e-3 and c.seeds == (0, 1, 2) and c.mean == pytest.approx(0.6)
    # where rates share no seed, each is judged by what it has
    assert best_rate([result(p, 1e-3, 0, 0.7), result(p, 3e-3, 1, 0.6)]) == 1e-3


def test_equals_are_decided_by_seeds_then_loss_then_a_place_inside_the_grid():
    p = point("a")
    same = [result(p, rate, 0, 1.0) for rate in RATES]
    assert best_rate(same) == 3e-3 and choose(same)[0].edge is None
    for r, loss in zip(same, (0.1, 0.3, 0.2), strict=True):
        r.result["valid"]["loss"] = loss
    assert best_rate(same) == 1e-3
    # an end that an inner rate equals is no sign that the grid is too short
    assert choose(same)[0].edge is None
    same.append(result(p, 1e-2, 1, 1.0))
    assert best_rate(same) == 1e-2


@pytest.mark.parametrize(
    ("valids", "edge"), [((0.9, 0.5, 0.4), "lowest"), ((0.4, 0.5, 0.9), "highest"), ((0.4, 0.9, 0.5), None)]
)
def test_the_edge_of_the_grid_is_told(valids, edge):
    p = point("a")
    results = [result(p, rate, 0, v) for rate, v in zip(RATES, valids, strict=True)]
    assert choose(results)[0].edge == edge
    # by the whole grid, of which some rates have no result yet
    part = choose(results[:2])[0]
    assert part.missing_rates == (1e-2,) and part.edge == ("lowest" if valids[0] > valids[1] else None)
    assert choose([result(point("b", rates=(1e-3,)), 1e-3, 0, 0.5)])[0].edge is None


def test_diverged_trainings_are_never_chosen_and_never_averaged():
    p = point("a")
    results = [result(p, 1e-3, 0, 0.5), result(p, 3e-3, 0, NAN), result(p, 1e-2, 0, math.inf)]
    (c,) = choose(results)
    assert c.rate == 1e-3 and c.tried == {1e-3: 0.5, 3e-3: None, 1e-2: None}
    (c,) = choose([*one(p, (0.5, 0.7)), result(p, 3e-3, 2, NAN, valid=0.9)])
    assert c.n == 2 and c.diverged == 1 and c.mean == pytest.approx(0.6) and c.seeds == (0, 1)
    assert choose(one(p, (NAN, NAN))) == [] and choose([]) == [] and comparisons([]) == []
    damaged = result(p, 1e-3, 0, 0.5)
    damaged.result["test"] = {"loss": 1.0}
    with pytest.raises(ValueError, match=r"result.json: its 'test' score has no 'accuracy', but loss"):
        choose([damaged])
    damaged.result["test"] = {"accuracy": "nan"}
    assert choose([damaged]) == []


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_means_spreads_and_intervals_are_the_plain_definitions(n):
    values = np.random.default_rng(n).uniform(0, 1, n)
    (c,) = choose(one(point("a"), values.tolist()))
    assert c.n == n and c.mean == pytest.approx(np.mean(values)) and c.sd == pytest.approx(np.std(values, ddof=1))
    judge = scipy_stats.t.interval(0.95, n - 1, loc=np.mean(values), scale=scipy_stats.sem(values))
    assert c.interval == pytest.approx(judge)


def test_a_single_seed_has_no_interval_and_equal_seeds_have_none_to_speak_of():
    (c,) = choose(one(point("a"), [0.7]))
    assert (c.n, c.mean, c.sd, c.interval) == (1, 0.7, None, None)
    (same,) = choose(one(point("b"), [0.7, 0.7, 0.7]))
    assert same.sd == pytest.approx(0, abs=1e-12) and same.interval == pytest.approx((0.7, 0.7))
    assert difference(c, same) is None and difference(same, c) is None
    assert difference(same, same).interval == pytest.approx((0, 0))


def test_differences_are_welchs():
    rng = np.random.default_rng(0)
    for n, m in ((2, 2), (3, 3), (3, 7), (12, 4)):
        x, y = rng.normal(0.6, 0.02, n), rng.normal(0.5, 0.11, m)
        comparison = compared(("x", x.tolist()), ("y", y.tolist()))
        found = difference(*comparison.chosen)
        judge = scipy_stats.ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
        assert found.mean == pytest.approx(x.mean() - y.mean()) and found.interval == pytest.approx(
            (judge.low, judge.high)
        )


def test_the_noise_floor_is_pooled_over_points_with_two_seeds_or_more():
    groups = [[0.1, 0.2], [0.5, 0.52, 0.57, 0.6], [0.9]]
    comparison = compared(*zip("abc", groups, strict=True))
    squares = sum((v - statistics.fmean(g)) ** 2 for g in groups for v in g)
    assert comparison.noise == pytest.approx(math.sqrt(squares / (1 + 3 + 0)))
    assert compared(("a", [0.1]), ("b", [0.2])).noise is None
    assert compared(("a", [0.1, 0.1]), ("b", [0.2])).noise == 0


def test_the_basin_is_within_noise_of_the_best():
    # a standard deviation of 0.01 each, three seeds: and Student's t of 8 degrees of freedom 2.306, so 0.01883 is noise
    around = lambda mean: [mean - 0.01, mean, mean + 0.01]  # noqa: E731
    comparison = compared(
        ("best", around(0.9)), ("near", around(0.8813)), ("far", around(0.8811)), ("above", around(0.7))
    )
    assert comparison.noise == pytest.approx(0.01) and comparison.best.point.name == "best"
    assert [c.point.name for c in comparison.basin] == ["best", "near"]
    assert comparison.within(comparison.best, comparison.best) == pytest.approx(
        scipy_stats.t.ppf(0.975, 8) * 0.01 * math.sqrt(2 / 3)
    )
    # of losses the lowest is best
    losses = compared(("a", around(1.2)), ("b", around(1.1)), metric="bits_per_byte")
    assert losses.best.point.name == "b" and [c.point.name for c in losses.basin] == ["b"]
    assert not higher_is_better("bits_per_byte") and higher_is_better("accuracy")
    # without noise, equals are in; with one seed each, nobody can tell
    assert len(compared(("a", [1.0, 1.0]), ("b", [1.0, 1.0]), ("c", [0.9, 0.9])).basin) == 2
    assert compared(("a", [0.9]), ("b", [0.8])).basin is None


def test_of_equals_the_one_with_the_smallest_state_is_best():
    results = [r for share in (1.0, 0.25, 0.5) for r in one(point(f"s={share}", share), [1.0, 1.0])]
    (comparison,) = comparisons(choose(results))
    assert comparison.best.point.name == "s=0.25"


def test_tasks_are_never_pooled():
    p, q = point("kind=recall"), point("kind=copy")
    tasks = [{"name": "mad", "kind": "recall", "length": 64}, {"name": "mad", "kind": "copy", "length": 64}]
    results = one(p, [0.5, 0.6], task=tasks[0]) + one(q, [0.1, 0.3], task=tasks[1])
    found = comparisons(choose(results))
    assert [c.name for c in found] == ["recall", "copy"] and [len(c.chosen) for c in found] == [1, 1]
    assert found[0].noise == pytest.approx(np.std([0.5, 0.6], ddof=1)) != pytest.approx(found[1].noise)
    # one point of two tasks is two
    assert len(choose(one(p, [0.5], task=tasks[0]) + one(p, [0.9], task=tasks[1]))) == 2
    assert [
        c.name
        for c in comparisons(
            choose(one(p, [0.5], task={"name": "a", "l": 1}) + one(q, [0.5], task={"name": "a", "l": 2}))
        )
    ] == ["l=1", "l=2"]
    assert [c.name for c in comparisons(choose(one(p, [0.5])))] == [""]
    # another metric neither
    assert len(comparisons(choose(one(p, [0.5]) + one(q, [0.5], metric="loss")))) == 2


def test_speed_is_found_wherever_it_was_measured():
    p = point("a")
    rows = [{"context": 1024, "decode_tokens_s": 90.0, "peak_bytes": None}]
    (c,) = choose([result(p, 1e-3, 0, 0.1, speed=rows), result(p, 3e-3, 0, 0.9, speed=[])])
    assert c.rate == 3e-3 and c.measured("decode_tokens_s") == {1024: 90.0} and c.measured("peak_bytes") == {}


def test_series_share_the_pure_ends_that_a_grid_has_once():
    points, results = study()
    (comparison,) = comparisons(choose(results))
    assert ratio_axes(points) == ["attention"]
    lines = series_of(comparison, points, ["attention"])
    assert [line.name for line in lines] == ["place=even", "place=first", "place=last"]
    for line in lines:
        assert sorted(fraction(c) for c in line.points) == [0, 0.125, 0.25, 0.5, 1]
        assert sorted(fraction(c) for c in line.shared) == [0, 1]
    # a grid with an end for each line shares none
    more = [*points, point("attention=1 place=first", 1.0, attention=1.0, place="first")]
    assert all(fraction(c) != 1 for line in series_of(comparison, more, ["attention"]) for c in line.shared)
    kept = few(comparison, 4)
    assert len(kept) == 4 and comparison.best in kept and {*ends(comparison).values()} <= {*kept}
    assert few(comparison, 50) == list(comparison.chosen)


def test_three_sentences_say_what_the_data_say():
    points, results = study()
    (comparison,) = comparisons(choose(results))
    best, basin, cost = three_sentences([comparison], points)
    top = comparison.best
    assert top.point.name == "attention=0.5 place=even"
    assert (
        "attention is 50 % of its mixers and 25 % of all its blocks" in best
        and f"{100 * top.mean:.1f} % accuracy on test" in best
    )
    low, high = (f"{100 * min(v, 1):.1f} %" for v in top.interval)
    assert f"95 % interval {low} to {high} over 3 seeds" in best and "no result yet" not in best
    assert f"{len(comparison.basin)} of 11 points" in basin and f"{100 * comparison.noise:.1f} points per seed" in basin
    whole = points[-2].costs.state_bytes
    assert (
        f"{100 * top.point.costs.state_bytes / whole:.2g} % of that with attention alone" in cost
        and "300 tokens/s after 16,384" in cost
    )
    assert all((s.endswith(".") and s[0].isupper()) or s[0].isdigit() for s in (best, basin, cost))


def test_sentences_do_not_pretend():
    points = grid()
    nothing = three_sentences([], points)
    assert len(nothing) == 3 and "none of the 11 points has a result" in nothing[0]
    single = three_sentences(comparisons(choose(one(points[0], [0.4]) + one(points[1], [0.8]))), points)
    assert (
        "that is a single seed" in single[0]
        and "9 of 11 points have no result yet" in single[0]
        and "interval" not in single[0]
    )
    assert "no noise floor" in single[1] and "its speed was not measured" in single[2]
    alone = three_sentences(comparisons(choose(one(points[0], [0.4, 0.5]))), points[:1])
    assert "nothing to compare" in alone[1] and "no result yet" not in alone[0]
    far = three_sentences(comparisons(choose(one(points[0], [0.4, 0.41]) + one(points[1], [0.8, 0.81]))), points[:2])
    assert (
        "no other point is within noise of it: the next, attention=0 place=even, is 40.0 points lower (95 % interval"
        in far[1].lower()
    )
    flat = three_sentences(comparisons(choose([r for p in points[:3] for r in one(p, [0.8, 0.9])])), points[:3])
    assert "all 3 points are within noise of the best" in flat[1].lower()
    even = [p for p in points if p.axes["place"] == "even" and not p.problem]
    spans = three_sentences(
        comparisons(
            choose([r for p, v in zip(even, (0.1, 0.8, 0.81, 0.8, 0.5), strict=True) for r in one(p, [v, v + 0.02])])
        ),
        points,
    )
    assert "the basin is flat from 12.5 % to 50 % attention of the mixers: 3 of 5 points" in spans[1].lower()
    two = three_sentences(
        comparisons(choose(one(points[0], [0.4], task={"name": "a"}) + one(points[1], [0.8], task={"name": "b"}))),
        points,
    )
    assert two[0].startswith(
        "The best points on test are, by task: a, attention=0 place=even with 40.0 % accuracy (of a single seed); b, "
    )
    assert two[1].endswith("by task: a, unknown, of single seeds; b, unknown, of single seeds.")


def test_numbers_are_read_as_written():
    assert (
        shown("accuracy", 0.9914) == "99.1 %"
        and shown("bits_per_byte", 1.23456) == "1.235"
        and shown("mse", 0.00123) == "0.00123"
    )
    assert shown_interval("accuracy", (0.9, 1.1)) == ("90.0 %", "100.0 %") and shown_interval("loss", (-0.1, 0.5)) == (
        "0.000",
        "0.500",
    )
    assert (
        gap("accuracy", 0.012) == "1.2 points"
        and listed(list("abc")) == "a, b and c"
        and listed(list("abc"), 1) == "a and 2 more"
    )
    assert times(1, 4) == "25 % of" and times(8, 4) == "2 times"


def test_frames_are_flat_and_hold_every_result():
    points, results = study()
    table = frame(results, points)
    assert len(table) == len(results) == 55 and set(table["point"]) == {p.name for p in points if not p.problem}
    row = table[(table["point"] == "attention=0.25 place=last") & (table["rate"] == 3e-3) & (table["seed"] == 1)].iloc[
        0
    ]
    assert row["attention"] == 0.25 and row["place"] == "last" and row["attention_of_blocks"] == 0.125 and row["chosen"]
    assert row["state_bytes"] == points[6].costs.state_bytes and row["test pairs=64"] < row["test pairs=4"] <= 1
    # what pandas computes from it is what the report says
    chosen = {c.point.name: c for c in choose(results)}
    means = table[table["chosen"]].groupby("point")["test"].agg(["mean", "std", "count"])
    for name, c in chosen.items():
        assert (c.mean, c.sd, c.n) == pytest.approx(tuple(means.loc[name]))
    assert list(table["point"].unique()) == [p.name for p in points if not p.problem]
    text = csv_text(cell_rows(results, points))
    assert text.count("\n") == 56 and text.startswith("point,attention,place,params,")
    rows = point_rows(points, comparisons(choose(results)))
    assert len(rows) == 12 and rows[-1]["problem"].startswith("parameters: 118,200") and "mean" not in rows[-1]
    # an axis may be called as one of the columns is
    clash = point("rate=1", rate=1)
    assert (
        frame(one(clash, [0.5]), [clash]).loc[0, "axis rate"] == 1
        and frame(one(clash, [0.5]), [clash]).loc[0, "rate"] == 3e-3
    )
    assert len(frame([], points)) == 0 and csv_text([]) == "\n"


def test_published_curves_are_where_they_belong():
    names = ["mamba2-attention-layers", "hybrid-architectures", "jamba", "linear-attention-hybrids", "mqar", "selective-copying", "induction-heads",
             "mad", "copying", "mambaformer"]  # fmt: skip
    entries = {name: literature(name) for name in names}
    for entry in entries.values():
        assert "20" in entry.source and entry.protocol and entry.says.endswith(".")
        assert (entry.x in ("attention", "length")) == bool(entry.curves)
        assert all(len(row) == len(entry.head) for row in entry.rows)
        for curve in entry.curves:
            xs = [x for x, _ in curve.points]
            assert xs == sorted(set(xs)) and all(0 <= y <= 1 for _, y in curve.points if curve.metric == "accuracy")
    mamba2 = entries["mamba2-attention-layers"].curves[0]
    assert min(mamba2.points, key=lambda at: at[1]) == (0.125, 8.26) and len(mamba2.points) == 13
    assert as_loss("perplexity", math.e) == 1 and as_loss("accuracy", 0.5) is None
    induction = entries["induction-heads"]
    assert mismatch(induction, {"name": "induction", "length": 256, "vocab": 16, "more": 1}) is None
    assert mismatch(induction, {"name": "induction", "length": 64, "vocab": 16}) == "its length is 256, here 64"
    assert mismatch(entries["mad"], {}) == "it has no curves"
    with pytest.raises(ValueError, match=r"literature: there is no 'mamba3'\. Known are: mamba2-attention-layers, "):
        literature("mamba3")


def test_all_orders_of_results_give_the_same():
    _, results = study()
    few_results = results[:5]
    found = {
        tuple((c.point.name, c.rate, c.tests) for c in choose(order))
        for order in itertools.islice(itertools.permutations(few_results), 60)
    }
    assert len(found) == 1


def test_comparisons_are_called_what_their_axis_calls_them():
    tasks = {"prefix": {"name": "copying", "prefix": True}, "suffix": {"name": "copying", "prefix": False}}
    results = [
        result(point(f"key={key} mixer={m}", key=key, mixer=m), 3e-3, 0, 0.5, task=task)
        for key, task in tasks.items()
        for m in "ab"
    ]
    found = comparisons(choose(results))
    assert [c.name for c in found] == ["prefix", "suffix"]
    assert [found[0].label(c) for c in found[0].chosen] == ["mixer=a", "mixer=b"]
    assert [c.name for c in comparisons(choose(one(point("a"), [0.5]) + one(point("b"), [0.5], metric="loss")))] == [
        "mqar accuracy",
        "mqar loss",
    ]


def test_results_of_two_kinds_of_device_are_told():
    p = point("a")
    for devices, told in ((("cpu", "cuda"), True), (("cuda", "cuda"), False), ((None, "cuda"), False)):
        results = [result(p, 3e-3, seed, 0.5, device=device) for seed, device in enumerate(devices)]
        said = doubts(comparisons(choose(results)), [p])
        assert any("more than one kind of device" in doubt and "cpu and cuda" in doubt for doubt in said) is told

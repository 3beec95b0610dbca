"""Studies: their files, read strictly; scales; the grid; plans; the commands; and those that come with the package."""

import copy
import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import yaml
from test_ablate_match import STUDY, Lines
from typer.testing import CliRunner

import hybridzoo as zoo
from hybridzoo.__main__ import app
from hybridzoo.eval.ablate import Study
from hybridzoo.eval.ablate.plan import plan_of, spent
from hybridzoo.eval.ablate.points import points_of
from hybridzoo.eval.ablate.schema import list_studies, load_study, written
from hybridzoo.zoo.errors import ConfigError
from hybridzoo.zoo.tables import in_bytes


@pytest.fixture
def lines(monkeypatch):
    from hybridzoo.eval.ablate import tasks

    monkeypatch.setattr(tasks, "task_of", Lines, raising=False)


def changed(**changes):
    return copy.deepcopy(STUDY) | changes


AXIS = STUDY["axes"]["attention"]
WRONG = [
    (changed(qestion="x"), "qestion: unknown key. Did you mean 'question'?"),
    (changed(question="a\nb"), "question: found 'a\\nb', expected what the study answers, in one line."),
    (changed(name="../x"), "name: '../x' is no name of a folder."),
    (changed(base=3), "base: found 3, expected a config's name or path, or a config itself."),
    (changed(base="mamba-tini"), "base: 'mamba-tini' is no shipped config and no file"),
    (changed(base={"base": "mamba-tiny", "d_model": "${oc.env:HOME}"}), "base.d_model: holds '${', an interpolation"),
    (changed(axes={}), "axes: there are none."),
    (changed(axes={"a b": AXIS}), "axes.a b: is no name of an axis."),
    (changed(axes={"a": {"keyy": "d_model", "values": [1]}}), "axes.a.keyy: unknown key. Did you mean 'key'?"),
    (changed(axes={"a": {"key": "d_model"}}), "axes.a.values: found None, expected 1 to 256 of them"),
    (changed(axes={"a": {"values": [64]}}), "axes.a.key: is None, and values are a list. Name what a list of values sets."),
    (changed(axes={"a": {"key": "d_model", "values": {"x": {}}}}), "axes.a.key: is 'd_model', and values are a dict."),
    (changed(axes={"a": {"key": "d_model", "values": [64, 64.0]}}), "axes.a.values: 64 stands there twice."),
    (changed(axes={"a": {"key": "layers", "values": ["mamba mlp"]}}), "axes.a.values: found 'mamba mlp', expected a number, or a label"),
    (changed(axes={"a": {"values": {"x": {"task": "y"}}}}), "axes.a.values.x.task: found 'y', expected a mapping."),
    (changed(axes={"a": AXIS, "b": AXIS}), "axes.b: sets layers.allocate.attention, which axes.a sets too."),
    (changed(only=[{"atention": 0}]), "only.0.atention: is no axis. Did you mean 'attention'?"),
    (changed(exclude=[{"attention": [0, 0.3]}]), "exclude.0.attention: 0.3 is not on this axis. On it: 0, 0.25, 1."),
    (changed(exclude={"attention": 0}), "exclude: found {'attention': 0}, expected a list"),
    (changed(match={"parms": 1, "by": "d_model"}), "match.parms: unknown key. Did you mean 'params'?"),
    (changed(match={"params": 1, "flops": 2, "by": "d_model"}), "match: names params, flops, expected one of params, flops, state_bytes."),
    (changed(match={"params": -1, "by": "d_model"}), "match.params: found -1, expected a number above 0, or a point"),
    (changed(match={"params": {"attention": 2}, "by": "d_model"}), "match.params.attention: 2 is not on this axis."),
    (changed(match={"params": 1000}), "match.by: found None, expected the key of an integer"),
    (changed(match={"params": 1000, "by": "layers.allocate.attention"}), "match.by: layers.allocate.attention is what axes.attention sets."),
    (changed(match={"params": 1000, "by": "task.length"}), "match.by: task.length is no key of a config."),
    (changed(match={"params": 1000, "by": "d_model", "within": 1}), "match.within: found 1, expected a share between 0 and 1"),
    (changed(match={"params": 1000, "by": "d_model", "at": 0}), "match.at: found 0, expected a number of tokens."),
    (changed(task={"length": 3}), "task.name: found None, expected a task"),
    (changed(train={"stepps": 3}), "train.stepps: unknown key. Did you mean 'steps'?"),
    (changed(train={"steps": 0}), "train: train(steps=0): must be at least 1."),
    (changed(train={"steps": 3, "lr": 1e-3}), "train.lr: is no option of a study's training. rates decides it"),
    (changed(train={}), "train.steps: is missing. Give it, or a budget of tokens or flops."),
    (changed(budget={"tokens": 1e6}), "budget: tokens, train.steps say the same. Leave one."),
    (changed(train={}, budget={"tokens": "many"}), "budget.tokens: found 'many', expected a number"),
    (changed(rates={"attention": [1e-3]}), "rates.default: is missing."),
    (changed(rates={"default": [3e-3, 1e-3]}), "rates.default: found [0.003, 0.001], expected rates above 0, ascending"),
    (changed(rates={"default": [0]}), "rates.default: found [0], expected rates above 0"),
    (changed(seeds=[0, 0]), "seeds: found [0, 0], expected 1 to 100 different ones"),
    (changed(measure={"contexts": [64, 32]}), "measure.contexts: found [64, 32], expected tokens, ascending"),
    (changed(measure={"context": [64]}), "measure.context: unknown key. Did you mean 'contexts'?"),
    (changed(report={"x": "atention"}), "report.x: 'atention' is no axis and no cost. Did you mean 'attention'?"),
    (changed(report={"literature": ["mqarr"]}), "report.literature: there is no 'mqarr'. Did you mean 'mqar'?"),
    (changed(report={"literature": "zoology"}), "report.literature: found 'zoology', expected names"),
    (changed(scales={"smoke": {}}), "scales: there is no 'short'. Known: smoke."),
    (changed(scales={"short": {"trian": {}}}), "scales.short.trian: unknown key. Did you mean 'train'?"),
    (changed(scales={"short": {"name": "x"}}), "scales.short.name: unknown key."),
    (changed(scales={"short": 3}), "scales.short: found 3, expected a mapping"),
]  # fmt: skip


@pytest.mark.parametrize(("study", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_cannot_work_is_one_error_with_its_key(study, message):
    with pytest.raises(ConfigError) as e:
        load_study(study)
    assert message in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500


def test_a_file_is_read_as_a_mapping_is_and_its_base_is_beside_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: mamba-tiny\nd_model: 48\n")
    (tmp_path / "wide.yaml").write_text(
        yaml.safe_dump(
            changed(base="mine", axes={"d_state": {"key": "mixers.mamba.d_state", "values": [4]}}, match=None)
        )
    )
    spec = load_study(tmp_path / "wide.yaml")
    assert (spec.name, spec.scale, spec.base["d_model"], spec.base["layers"]) == ("wide", "short", 48, "mamba * 2")
    assert "base" not in spec.base and spec.seeds == (0, 1, 2) and spec.measure == {"contexts": []}
    with pytest.raises(ConfigError, match=r"study: there is no file '.*/none.yaml'"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("question: [1\n")
    with pytest.raises(ConfigError, match=r"bad.yaml, line 2"):
        load_study(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match=r"unknown study 'recal-ratio'. Did you mean 'recall-ratio'"):
        load_study("recal-ratio")


def test_a_scale_is_put_on_top_and_replaces_axes_tasks_and_matches_as_a_whole():
    small = {
        "base": {"d_model": 16}, "task": {"length": 8}, "train": {"steps": 2}, "rates": {"default": [1e-2]}, "seeds": [7],
        "axes": {"attention": {"values": {"one": {"layers": "mamba"}}}, "extra": None}, "match": None,
    }  # fmt: skip
    other = {
        "task": {"name": "other"},
        "match": {"flops": 1000, "by": "d_model"},
        "train": {"steps": None},
        "budget": {"tokens": 100},
    }
    study = changed(
        axes=STUDY["axes"] | {"extra": {"key": "norm.eps", "values": [1e-5]}}, scales={"smoke": small, "short": {}, "paper": other}
    )  # fmt: skip
    spec = load_study(study, "smoke")
    assert (spec.base["d_model"], spec.base["mixers"]) == (16, STUDY["base"]["mixers"])
    assert (spec.task, spec.train) == ({"name": "lines", "length": 8}, {"steps": 2, "batch_size": 4})
    assert (spec.rates, spec.seeds) == ({"default": [1e-2], "attention": [3e-4]}, (7,))
    assert {name: axis.values for name, axis in spec.axes.items()} == {"attention": {"one": {"layers": "mamba"}}}
    assert list(load_study(study, "short").axes) == ["attention", "extra"]
    paper = load_study(study, "paper")
    assert (paper.task, paper.match.cost) == ({"name": "other"}, "flops")
    assert (paper.train, paper.budget) == ({"batch_size": 4}, {"tokens": 100})


def test_what_show_prints_is_the_same_study():
    spec = load_study(changed(base="jamba-tiny", match=None))
    again = load_study(yaml.safe_load(written(spec)))
    assert again.name == "my-study" and again.base == spec.base and again.base["d_model"] == 64
    assert (again.axes, again.rates, again.task, again.train) == (spec.axes, spec.rates, spec.task, spec.train)


AXES = {
    "size": {
        "values": {"small": {"d_model": 16, "task.length": 8}, "large": {"d_model": 32, "train": {"batch_size": 2}}}
    },
    "decay": {"key": "train.weight_decay", "values": [0, 0.1]},
    "gate": {"key": "mixers.mlp.gated", "values": [True, False]},
}


@pytest.mark.usefixtures("lines")
def test_axes_set_keys_of_config_task_and_training_and_combinations_are_left_out():
    exclude = [{"size": "small", "decay": 0.1}, {"gate": False, "decay": [0.1]}]
    spec = load_study(changed(axes=AXES, match=None, exclude=exclude))
    points = points_of(spec)
    assert [p.name for p in points] == [
        "size=small decay=0 gate=true", "size=small decay=0 gate=false", "size=large decay=0 gate=true",
        "size=large decay=0 gate=false", "size=large decay=0.1 gate=true",
    ]  # fmt: skip
    assert [p.config["d_model"] for p in points] == [16, 16, 32, 32, 32]
    assert [p.config["mixers"]["mlp"]["gated"] for p in points] == [True, False, True, False, True]
    assert [p.task["length"] for p in points] == [8, 8, 48, 48, 48]
    assert [p.train for p in points][3:] == [{"steps": 10, "batch_size": 2, "weight_decay": d} for d in (0, 0.1)]
    assert points[0].axes == {"size": "small", "decay": 0, "gate": True}
    only = load_study(changed(axes=AXES, match=None, only=[{"size": "small", "decay": 0, "gate": True}]))
    assert points_of(only) == points[:1]
    with pytest.raises(ValueError, match="only and exclude leave no point"):
        points_of(load_study(changed(axes=AXES, match=None, only=[{"decay": 0}], exclude=[{"decay": 0}])))
    with pytest.raises(ValueError, match=r"axes: give 15,625 points, more than 2,000\."):
        points_of(
            load_study(
                changed(axes={n: {"key": f"mixers.{n}.x", "values": list(range(25))} for n in "abc"}, match=None)
            )
        )


@pytest.mark.usefixtures("lines")
def test_a_cell_holds_all_that_decides_about_it():
    study = Study(changed(measure={"contexts": [64, 128]}))
    spec, point, job = study.spec, study.points[1], study._job()
    cell = job.cell(point, 1e-3, 2)
    assert (cell.study, cell.rate, cell.seed, cell.task, cell.train) == (
        "study",
        1e-3,
        2,
        STUDY["task"],
        STUDY["train"],
    )
    # a model is as fast with any seed
    assert (job.cell(point, 1e-3, 0).measure, cell.measure) == ({"contexts": [64, 128]}, {})
    assert point.costs.context == 128 and cell.from_plain(json.loads(json.dumps(cell.plain()))) == cell
    cell.task["name"] = "other"
    assert spec.task["name"] == "lines"


@pytest.mark.usefixtures("lines")
def test_a_model_that_a_grid_holds_twice_is_trained_once():
    place = {"key": "layers.place", "values": ["first", "last"]}
    points = points_of(load_study(changed(axes={"attention": AXIS, "place": place}, match=None)))
    twice = {p.name: p.problem for p in points if p.problem}
    assert set(twice) == {"attention=0 place=last", "attention=1 place=last"} and len(points) == 6
    assert twice["attention=0 place=last"].startswith("is trained as 'attention=0 place=first'")


@pytest.mark.usefixtures("lines")
def test_a_budget_becomes_steps():
    points = points_of(load_study(changed(train={"batch_size": 4, "accumulate": 2}, budget={"tokens": 1e6})))
    assert {p.train["steps"] for p in points} == {round(1e6 / (8 * 48))}
    equal = load_study(changed(train={"batch_size": 4}, budget={"flops": 1e11}, match=None))
    for point in points_of(equal):
        assert point.train["steps"] * 4 * 48 * point.costs.flops == pytest.approx(1e11, rel=0.01)


@pytest.mark.usefixtures("lines")
def test_a_name_of_points_or_an_architecture_chooses_the_rates():
    rates = {"attention=0.25": [1e-1], "attention+*": [1e-2], "mamba": [1e-4, 1e-3], "default": [1]}
    points = points_of(load_study(changed(rates=rates)))
    assert [p.rates for p in points] == [(1e-4, 1e-3), (1e-1,), (1.0,)]


class Done:
    """A stand-in for a result."""

    def __init__(self, cell, **result):
        self.cell, self.result = cell, result


@pytest.mark.usefixtures("lines")
def test_a_plan_adds_up_what_its_cells_cost():
    axes = {"attention": AXIS, "heads": {"key": "mixers.attention.nheads", "values": [4, 5]}}
    spec = load_study(changed(axes=axes, measure={"contexts": [100]}))
    points = points_of(spec)
    plan = plan_of(spec, points)
    # two rates and two more seeds without or with attention, one rate of attention alone; five heads do not divide
    assert plan.cells == 4 + 4 + 4 + 3 and len(plan.unmatched) == 2 == sum(
        "nheads" in p.problem for p in plan.unmatched
    )
    assert plan.flops == sum(row.cells * 10 * 4 * 48 * row.point.costs.flops for row in plan.rows if row.point.costs)
    assert [row.tokens for row in plan.rows] == [1920, 1920, 1920, 0, 1920, 0]
    row = next(row for row in plan.rows if row.point.name == "attention=0.25 heads=4")
    for length, state in row.state_bytes.items():
        blocks = zoo.build(row.point.config, device="meta").backbone.blocks
        assert state == sum(block.mixer.state_bytes(length) for block in blocks)
    assert list(row.state_bytes) == [100, 4096, 32_768, 262_144]
    assert "assumed" in plan.how and plan.seconds > 0
    found = json.loads(json.dumps(plan.plain()))
    assert (found["cells"], found["flops"], found["unmatched"], len(found["points"])) == (plan.cells, plan.flops, 2, 6)
    # what one point took is what it takes, and its speed is that of the others
    result = Done(SimpleNamespace(point=points[0]), seconds=5.0, steps=10, tokens=1920)
    timed = plan_of(spec, points, [result])
    assert timed.rows[0].seconds == 5.0 and "from 1 training," in timed.how
    flops = [p.costs.flops if p.costs else 0 for p in points]
    assert timed.rows[2].seconds == pytest.approx(5.0 * flops[2] / flops[0])
    assert [spent(s) for s in (0.4, 89, 600, 9000)] == ["0 s", "89 s", "10 min", "2.5 h"]


def zoo_(*words):
    return CliRunner().invoke(app, ["ablate", *words])


def test_the_plan_of_a_study_of_tasks_of_several_lengths_says_what_each_leaves_behind():
    plan = plan_of(load_study("in-context", "smoke"))
    lengths = {row.point.costs.context for row in plan.rows}
    table = plan.table()
    heads = [column.header for column in table.columns]
    assert len(lengths) == 2 and "state at its length" in heads and table.row_count == len(plan.rows)
    cells = list(table.columns[heads.index("state at its length")].cells)
    want = [in_bytes(row.state_bytes[row.point.costs.context]) for row in plan.rows]
    assert cells == want and len(set(want)) > 2


@pytest.mark.usefixtures("lines")
def test_the_commands_list_show_and_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    listed = zoo_("list")
    assert listed.exit_code == 0 and all(f"{name} " in listed.stdout for name in list_studies())
    assert [s["name"] for s in json.loads(zoo_("list", "--json").stdout)] == list_studies()
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(changed(axes={"heads": {"key": "mixers.attention.nheads", "values": [4, 5]}}, match=None))
    )
    shown = zoo_("show", "mine.yaml")
    assert yaml.safe_load(shown.stdout)["name"] == "my-mine"
    planned = zoo_("plan", "mine.yaml")
    assert (
        planned.exit_code == 0 and re.search(r"heads=4 +[\d.]+ k ", planned.stdout) and "heads=5" not in planned.stdout
    )
    assert "left out: heads=5: mixers.attention.nheads" in planned.stderr
    assert "4 trainings of 2 points" in planned.stdout
    assert json.loads(zoo_("plan", "mine.yaml", "--json").stdout)["cells"] == 4
    (tmp_path / "none.yaml").write_text(
        yaml.safe_dump(changed(axes={"heads": {"key": "mixers.attention.nheads", "values": [5]}}, match=None))
    )
    assert zoo_("plan", "none.yaml").exit_code == 1
    # one reason is told once
    (tmp_path / "slip.yaml").write_text(yaml.safe_dump(changed(task={"name": "mqar", "pair": 2})))
    slipped = zoo_("plan", "slip.yaml")
    assert slipped.stderr.startswith("left out: all 3 points: task.{'pair'}: no such key") and not slipped.stdout
    assert zoo_("plan", "nothing").exit_code == 1 and zoo_("plan").exit_code == 2
    assert not list(tmp_path.rglob("runs"))


def test_every_command_has_an_example():
    for command in ("list", "show", "plan", "run", "report"):
        helped = zoo_(command, "--help")
        assert helped.exit_code == 0 and f"Example: zoo ablate {command}" in helped.stdout
    assert zoo_("run", "recall-ratio", "--workers", "0").exit_code == 2


def test_studies_are_no_models():
    assert not {*list_studies()} & {*zoo.list_models()}


def _shipped():
    from hybridzoo.eval.ablate import schema

    return [
        (name, scale)
        for name in list_studies()
        for scale in schema.read_config(schema.STUDIES / f"{name}.yaml")["scales"]
    ]


def test_ten_studies_come_in_three_scales():
    assert list_studies() == [
        "copy", "in-context", "induction", "mad-lite", "mixer-map", "placement", "recall-ratio", "selective-copy", "state-frontier",
        "text-ratio",
    ]  # fmt: skip
    assert [*_shipped()] == [(name, scale) for name in list_studies() for scale in ("smoke", "short", "paper")]


@pytest.mark.parametrize(("name", "scale"), _shipped(), ids=[f"{n}-{s}" for n, s in _shipped()])
def test_every_point_of_a_shipped_study_is_built_and_costs_what_the_others_do(name, scale):
    spec = load_study(name, scale)
    if scale == "paper":  # some have forty points; here the ends of every axis
        ends = {axis: [*found.values][:1] + [*found.values][-1:] for axis, found in spec.axes.items()}
        spec = dataclasses.replace(spec, only=[ends])
    points = points_of(spec)
    assert not [(p.name, p.problem) for p in points if p.problem]
    assert len({p.name for p in points}) == len(points) >= 2
    assert all(p.config["d_model"] and p.train["steps"] >= 100 and p.task["name"] for p in points)
    if spec.match is None:
        return
    # those that the reference speaks for have the values of the other axes in common
    groups = {}
    for point in points:
        others = tuple(v for axis, v in point.axes.items() if axis not in spec.match.target)
        groups.setdefault(others, []).append(getattr(point.costs, spec.match.cost))
    for found in groups.values():
        assert max(found) - min(found) <= 0.02 * min(found)
    # and as built anew, from the config that is trained
    last = points[-1]
    model = zoo.build(last.config, device="meta")
    if spec.match.cost == "params":
        assert sum(p.numel() for p in model.parameters()) == last.costs.params
    elif spec.match.cost == "state_bytes":
        assert (
            sum(block.mixer.state_bytes(last.costs.context) for block in model.backbone.blocks)
            == last.costs.state_bytes
        )
    else:
        assert last.costs.flops % 3 == 0


def test_the_literature_that_studies_name_is_there():
    literature = pytest.importorskip("hybridzoo.eval.ablate.literature")
    for name, scale in _shipped():
        for entry in load_study(name, scale).report["literature"]:
            assert literature.literature(entry)


def test_a_report_of_nothing_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = zoo_("report", "recall-ratio", "--scale", "smoke")
    said = "nothing of recall-ratio, smoke, is trained yet. Run zoo ablate run first."
    assert ran.exit_code == 1 and said in ran.stderr.replace("\n", " ")
    assert not list(tmp_path.rglob("report.html"))

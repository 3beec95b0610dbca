"""The tasks of studies: rows that can be solved from what is told in them, scores that equal a plain loop, and cells."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

import hybridzoo as zoo
from hybridzoo.eval.ablate import measure
from hybridzoo.eval.ablate.cells import Cell, Point
from hybridzoo.eval.ablate.measure import speed_at, train_cell
from hybridzoo.eval.ablate.statistics import higher_is_better
from hybridzoo.eval.ablate.tasks import TASKS, task_of
from hybridzoo.eval.ablate.tasks.base import Table, padded
from hybridzoo.eval.ablate.tasks.scoring import row_scores, summed
from hybridzoo.eval.tasks import generators

SMALL = {"valid_examples": 20, "test_examples": 30}


def rows_of(spec, part="test"):
    return [(p.rows.inputs.tolist(), p.rows.labels.tolist(), p.about) for p in task_of(spec).parts(part)]


def asked_of(labels):
    return {i: label for i, label in enumerate(labels) if label != -100}


# tables that are drawn at once


@pytest.mark.parametrize(
    ("length", "pairs", "vocab", "passes"), [(64, 4, 8192, 1), (64, 16, 80, 1), (40, 6, 41, 2), (8, 2, 9, 1)]
)
def test_a_table_of_mqar_is_zoologys(length, pairs, vocab, passes):
    inputs, labels = generators.mqar_table(
        generators.training_rng(0), 50, length, pairs, vocab, passes=passes, random_non_queries=False
    )
    context = 2 * pairs * passes
    for row, label in zip(inputs.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert row[:context] == row[: 2 * pairs] * passes
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= k < vocab // 2 for k in keys) and all(vocab // 2 <= v < vocab for v in values)
        asked = asked_of(label)
        assert all(i >= context and (i - context) % 2 == 0 for i in asked)
        assert sorted(row[i] for i in asked) == sorted(keys)
        assert all(value == dict(zip(keys, values, strict=True))[row[i]] for i, value in asked.items())
        assert all(row[i] == 0 for i in range(context, length) if i not in asked)


def test_a_table_of_mqar_is_distributed_as_single_rows_are():
    # where each key is asked for, and which keys there are: the two ways, and for one pair the law itself
    n, slots = 6000, 8
    law = np.arange(1, slots + 1) ** (0.01 - 1.0)
    law /= law.sum()
    _, labels = generators.mqar_table(generators.training_rng(1), n, 2 + 2 * slots, 1, 80)
    share = np.bincount(((labels != -100).argmax(1) - 2) // 2, minlength=slots) / n
    assert (np.abs(share - law) < 4.5 * np.sqrt(law * (1 - law) / n)).all()
    places = []
    for draw in (generators.mqar, generators.mqar_table):
        inputs, labels = draw(generators.training_rng(2), n, 24, 3, 30, random_non_queries=False)
        assert (np.abs(np.bincount(inputs[:, 0], minlength=15)[1:15] / n - 1 / 14) < 4.5 * np.sqrt(1 / 14 / n)).all()
        second = [
            np.flatnonzero((row == row[2]) & (label != -100))[0] for row, label in zip(inputs, labels, strict=True)
        ]
        places.append(np.bincount(second, minlength=24) / n)
    assert (np.abs(places[0] - places[1]) < 4.5 * np.sqrt(2 * places[0].clip(1e-3) / n)).all()


def test_a_table_of_mqar_fills_what_is_left_at_random():
    filled, labels = generators.mqar_table(generators.training_rng(3), 300, 64, 4, 80)
    rest = filled[:, 8:][labels[:, 8:] == -100]
    share = np.bincount(rest, minlength=80) / rest.size
    assert (np.abs(share - 1 / 80) < 4.5 * np.sqrt(1 / 80 / rest.size)).all()


def test_a_table_of_keyed_strings_has_keys_that_occur_once_anywhere():
    strings, lengths, at = generators.keyed_table(generators.training_rng(0), 2000, 30, 10, ngram=2, answer=4, vocab=6)
    assert set(lengths) == set(range(10, 31)) and strings.max() == 5
    for string, l, i in zip(strings.tolist(), lengths, at, strict=True):
        grams = [tuple(string[j : j + 2]) for j in range(l - 1)]
        assert grams.count(grams[i]) == 1 and i + 6 <= l
    # of strings of one length, every place is as likely as by single rows
    shares = []
    for places in (
        generators.keyed_table(generators.training_rng(1), 4000, 9, None, 2, 2, 6)[2],
        np.array([i for _, i in generators.keyed_strings(generators.training_rng(1), 4000, 9, None, 2, 2, 6)]),
    ):
        shares.append(np.bincount(places, minlength=6) / len(places))
    assert (np.abs(shares[0] - shares[1]) < 4.5 * np.sqrt(2 * shares[1] / 4000)).all()
    with pytest.raises(ValueError, match=r"hardly any string of 30 symbols has a unique key\. Lengthen the key\."):
        generators.keyed_table(generators.training_rng(0), 5, 30, ngram=1, answer=1, vocab=1)


# rows


def solved(name, row, i):
    """The answer at a token, found from what stands up to it."""
    before = row[: i + 1]
    if name == "mqar":
        return before[before.index(row[i]) + 1]
    if name == "induction":
        return before[before.index(16) + 1]
    if name == "selective_copying":
        data = [t for t in before if t not in (0, 15)]
        return data[before.count(15) - 1]
    bar, stop = 27, 28
    parts = before[1:]
    if name == "copying whole":
        cut = parts.index(bar)
        return [*parts[:cut], stop][len(parts) - cut - 1]
    if name == "copying prefix":
        key, rest = parts[: parts.index(bar)], parts[parts.index(bar) + 1 :]
        body, done = rest[: rest.index(bar)], rest[rest.index(bar) + 1 :]
    else:
        body, tail = parts[: parts.index(bar)], parts[parts.index(bar) + 1 :]
        key, done = tail[:2], tail[2:]
    at = next(j for j in range(len(body)) if body[j : j + len(key)] == key)
    return body[at + len(key) + len(done)]


ROWS = {
    "mqar": {"name": "mqar", "length": 32, "pairs": 6, "vocab": 70, "random_non_queries": False},
    "induction": {"name": "induction", "length": 20, "test_lengths": [10, 40]},
    "selective_copying": {"name": "selective_copying", "length": 20, "tokens": 5},
    "copying prefix": {"name": "copying", "length": 20, "min_length": 10},
    "copying suffix": {"name": "copying", "length": 20, "prefix": False, "test_lengths": [20, 31]},
    "copying whole": {"name": "copying", "length": 12, "min_length": 3, "whole": True},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_answer_can_be_read_off_what_stands_before_it(name):
    seen = set()
    task = task_of({**ROWS[name], **SMALL})
    data = task.training(3, 4, 10)
    trained = [data[i] for i in range(40)] if not isinstance(data, tuple) else list(zip(*data, strict=True))
    assert {len(ids) for ids, _ in trained} == {task.tokens_per_example}
    drawn = [(part, i, l) for part in ("valid", "test") for i, l, _ in rows_of({**ROWS[name], **SMALL}, part)]
    drawn.append(("training", *([x.tolist() for x in column] for column in zip(*trained, strict=True))))
    for _, inputs, labels in drawn:
        for row, label in zip(inputs, labels, strict=True):
            asked = asked_of(label)
            assert asked and max(row) < task.config()["vocab_size"] > max(asked.values())
            for i, answer in asked.items():
                assert solved(name, row, i) == answer
                seen.add(answer)
    assert len(seen) > 10  # no answer is always right


@pytest.mark.parametrize("kind", ["in_context_recall", "noisy_recall"])
def test_recall_of_mad_asks_for_values_that_were_told(kind):
    noise = 16 if kind == "noisy_recall" else 0
    task = task_of({"name": "mad", "kind": kind, "length": 40, **SMALL})
    for row, label in zip(*(x.tolist() for x in task.draw(generators.training_rng(0), 200, False)), strict=True):
        told = {}
        for i in range(0, len(row), 2):
            key = row[i]
            assert (label[i] != -100) == (key in told and key < 8)
            if key in told:
                assert label[i] == told[key]
            if i + 1 < len(row):
                assert label[i + 1] == -100
                if key < 8:
                    assert 8 <= row[i + 1] < 16 and told.setdefault(key, row[i + 1]) == row[i + 1]
                else:
                    assert noise and min(key, row[i + 1]) >= 16
        assert label[-1] != -100  # the last key always asks
    ids, labels = task.draw(generators.training_rng(0), 200, True)
    assert (labels[:, :-1] == ids[:, 1:]).all()  # every next token
    share = (ids[:, ::2] >= 16).mean()
    assert share == pytest.approx(0.2 * 19 / 20 if noise else 0, abs=0.03)


@pytest.mark.parametrize("training", [False, True])
def test_fuzzy_recall_of_mad_asks_for_values_that_were_told(training):
    task = task_of({"name": "mad", "kind": "fuzzy_recall", "length": 40})
    ids, labels = task.draw(generators.training_rng(0), 300, training)
    sizes = set()
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        body = [t for t in [*row, label[-1]] if t != 15]  # the last label is the token behind the row
        assert len(body) + row.count(15) == 41 and row[: row.count(15)] == [15] * row.count(15)
        # keys are of [0, 7), values of [7, 15)
        pairs, key, value = [], [], []
        for t in body:
            if t < 7 and value:
                pairs.append((tuple(key), tuple(value)))
                key, value = [], []
            (key if t < 7 else value).append(t)
        pairs.append((tuple(key), tuple(value)))
        told, wanted = {}, []
        for key, value in pairs:
            assert 1 <= len(set(key)) == len(key) <= 3 and 1 <= len(set(value)) == len(value) <= 3
            sizes.add(len(key))
            wanted += [-100] * len(key) + (list(value) if key in told else [-100] * len(value))
            assert told.setdefault(key, value) == value
        assert pairs[-1] in pairs[:-1]  # what is asked in the end was told
        wanted = body if training else wanted
        # a row that is not filled up has lost nothing but the label in front of its first token
        assert label == ([-100] * row.count(15) + wanted)[1:]
    assert sizes == ({1, 2, 3} if training else {3})


def test_memorisation_and_selective_copying_of_mad():
    task = task_of({"name": "mad", "kind": "memorization"})
    ids, labels = (np.concatenate(x) for x in zip(task.training(0, 1, 1), task.training(1, 1, 1), strict=True))
    known = {}
    for key, mark, value in zip(ids[:, ::2].ravel(), ids[:, 1::2].ravel(), labels[:, 1::2].ravel(), strict=True):
        assert known.setdefault(int(key), int(value)) == value and mark == 255 and key < 127 <= value < 255
    assert (labels[:, ::2] == -100).all() and len(set(known.values())) == len(known) == 127
    task = task_of({"name": "mad", "kind": "selective_copying", "length": 40, "tokens": 6})
    ids, labels = task.draw(generators.training_rng(0), 600, True)
    assert (ids[:, 33] == 15).all() and (ids[:, 34:] == 14).all() and (labels[:, :34] == -100).all()
    for row, label in zip(ids[:, :33].tolist(), labels[:, 34:].tolist(), strict=True):
        assert [t for t in row if t != 14] == label and len(label) == 6
    # blanks stand behind the last data token, too
    share = (ids[:, :33] != 14).mean(0)
    assert (np.abs(share - 6 / 33) < 4.5 * np.sqrt(6 / 33 / 600)).all()


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "mqar"}, {"name": "induction"}, {"name": "selective_copying"}, {"name": "copying"},
        {"name": "mad", "kind": "in_context_recall"},
    ],
    ids=lambda spec: spec["name"],
)  # fmt: skip
def test_rows_follow_from_seeds_and_no_stream_holds_those_of_another(spec):
    task = task_of({**spec, **SMALL})

    def trained(seed):
        data = task_of({**spec, **SMALL}).training(seed, 3, 20)
        return {
            tuple(row.tolist()) for row, _ in (zip(*data, strict=True) if isinstance(data, tuple) else data_of(data))
        }

    def data_of(data):
        return (data[i] for i in range(len(data)))

    assert trained(0) == trained(0)
    streams = [
        trained(0),
        trained(1),
        *({tuple(r) for i, _, _ in rows_of({**spec, **SMALL}, p) for r in i} for p in ("valid", "test")),
    ]
    assert all(len(a & b) == 0 for k, a in enumerate(streams) for b in streams[:k])
    assert all(
        np.array_equal(a, b)
        for a, b in zip(task.validation(), padded(p.rows for p in task.parts("valid")), strict=True)
    )


def test_rows_that_are_drawn_when_asked_for_are_the_same_in_any_order():
    task = task_of({"name": "induction", "length": 1000})
    data, again = task.training(5, 100, 8), task.training(5, 100, 8)
    assert len(data) == 800 and data.rows == 8
    forward = [data[i] for i in range(0, 800, 37)]
    backward = [again[i] for i in reversed(range(0, 800, 37))][::-1]
    assert all(np.array_equal(a, b) for x, y in zip(forward, backward, strict=True) for a, b in zip(x, y, strict=True))
    assert data.digest == again.digest != task.training(6, 100, 8).digest


def test_a_mixture_has_its_settings_in_proportion_and_its_test_has_its_own():
    task = task_of({
        "name": "mqar", "vocab": 200, "settings": [{"length": 16, "pairs": 2, "examples": 3000}, [32, 8]], "examples": 1000,
        "test": [[64, 4], {"length": 64, "pairs": 16, "examples": 7}], **SMALL,
    })  # fmt: skip
    inputs, labels = task.training(0, 10, 40)
    assert inputs.shape == labels.shape == (400, 32) and task.tokens_per_example == 32
    counts = (labels != -100).sum(1)
    assert (counts == 2).sum() == 300 and (counts == 8).sum() == 100 and (labels[counts == 2, 16:] == -100).all()
    assert [(len(i), about) for i, _, about in rows_of({**dict(name="mqar", vocab=200), "test": [[64, 4], {"length": 64, "pairs": 16, "examples": 7}], **SMALL})] == [
        (30, {"length": 64, "pairs": 4}), (7, {"length": 64, "pairs": 16}),
    ]  # fmt: skip
    assert task.chance == pytest.approx((1 / 4 + 1 / 16) / 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "mqr"}, r"task.name: 'mqr' is not known. Did you mean 'mqar'\?"),
        ({"name": "mqar", "lenght": 3}, r"task.lenght: mqar has no such size. Did you mean 'length'\?"),
        (
            {"name": "mqar", "length": 16, "pairs": 5},
            r"task.mqar\(length=16, pairs=5\): pairs and queries take 20 tokens",
        ),
        ({"name": "mqar", "pairs": 0}, r"task.mqar\(pairs=0\): must be at least 1"),
        ({"name": "mqar", "settings": [[64]]}, r"task.settings: \[64\] is no setting"),
        ({"name": "mqar", "test": [{"length": 64, "pair": 1}]}, "task.test: .* is no setting"),
        ({"name": "induction", "test_lengths": [64, 2]}, r"task.test_lengths: \[64, 2\]"),
        ({"name": "selective_copying", "vocab": 2}, r"task.selective_copying\(vocab=2\): must be at least 3"),
        ({"name": "copying", "length": 5}, r"task.keyed_strings\(min_length=5, length=5\)"),
        ({"name": "mad", "kind": "recall"}, "task.kind='recall': is not known"),
        ({"name": "mad", "kind": "noisy_recall", "vocab": 16}, "task.mad.*vocab=16.*leaves 0 tokens"),
        ({"name": "mad", "length": 127}, "task.mad.*length=127"),
        ({"name": "text", "length": 1}, r"task.text\(length=1\): must be at least 2"),
    ],
)
def test_a_wrong_key_and_an_impossible_size_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        task_of(spec)


# scores


def model_of(task, layers="attention mamba", **changes):
    mixers = {
        "attention": {"type": "attention", "nheads": 2},
        "mamba": {"type": "mamba"},
        "mlp": {"type": "mlp", "d_intermediate": 32},
    }
    config = {"task": "causal_lm", "d_model": 16, "layers": layers, "mixers": {k: mixers[k] for k in layers.split()}}
    return OmegaConf.to_container(zoo.config({**config, **task.config(), **changes}))


def test_scores_equal_a_plain_loop_and_slices_add_up():
    task = task_of({"name": "mqar", "vocab": 20, "settings": [[16, 2], [18, 4]], "examples": 10, **SMALL})
    model = zoo.build(model_of(task))
    found = task.score(model, "valid")
    shares, nats, slices = [], [], {}
    for inputs, labels, about in rows_of(
        {"name": "mqar", "vocab": 20, "settings": [[16, 2], [18, 4]], "examples": 10, **SMALL}, "valid"
    ):
        for row, label in zip(inputs, labels, strict=True):
            with torch.no_grad():
                logits, asked = model(torch.tensor([row])).logits[0].double(), asked_of(label)
            right = [int(logits[i].argmax()) == answer for i, answer in asked.items()]
            nats += [float(F.cross_entropy(logits[i], torch.tensor(answer))) for i, answer in asked.items()]
            shares.append(np.mean(right))
            for key, value in about.items():
                slices.setdefault(f"{key}={value}", []).append(np.mean(right))
    assert found["n"] == 40 and found["accuracy"] == pytest.approx(np.mean(shares))
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["exact"] == pytest.approx(np.mean([share == 1 for share in shares]))
    assert {k: v["accuracy"] for k, v in found["slices"].items()} == pytest.approx(
        {k: np.mean(v) for k, v in slices.items()}
    )


def test_long_rows_are_read_in_pieces_with_the_same_scores():
    task = task_of({"name": "mqar", "length": 64, "pairs": 8, "vocab": 70, **SMALL})
    model = zoo.build(model_of(task))
    (part,) = task.parts("valid")
    whole = row_scores(model, *part.rows, {"cpu": 1 << 20})
    pieces = row_scores(model, *part.rows, {"cpu": 20})
    np.testing.assert_allclose(pieces, whole, rtol=1e-5)
    assert whole[:, 2].tolist() == [8] * 20


def test_what_fills_up_a_row_changes_nothing():
    task = task_of({"name": "mqar", "length": 16, "pairs": 2, "vocab": 20, **SMALL})
    (part,) = task.parts("valid")
    model = zoo.build(model_of(task))
    longer = padded([part.rows, Table(*(np.zeros((1, 40), np.int32) + x for x in (1, -100)))])
    alone, filled = row_scores(model, *part.rows, {}), row_scores(model, *longer, {})
    np.testing.assert_allclose(filled[:-1], alone, rtol=1e-5)
    assert summed([alone]) == pytest.approx(summed([filled[:-1]]), rel=1e-5)


def test_accuracy_is_the_exact_match_of_lm_eval_on_the_same_documents(tmp_path):
    from hybridzoo.eval.tasks import render

    task = task_of({"name": "induction", "length": 24, "vocab": 6, "test_lengths": [24], "test_examples": 200})
    (part,) = task.parts("test")
    # lm-eval's documents are these rows, letter for letter
    documents = render.induction_documents(generators.evaluation_rng(0), 200, 24, 6)
    letters = np.array([ord(c) for c in [*render.symbols(7)[1:], ">"]])
    inputs, labels = letters[part.rows.inputs], np.where(part.rows.labels < 0, -100, letters[part.rows.labels.clip(0)])
    assert [bytes(row.astype(np.uint8).tolist()).decode() for row in inputs] == [
        d.examples()[0].prompt for d in documents
    ]
    # a model that has learned to answer with a letter
    drawn, answers = generators.induction(generators.training_rng(0), 400, 24, 6)
    wanted = np.full(drawn.shape, -100)
    wanted[:, -1] = letters[answers]
    config = zoo.config("transformer-tiny", ["d_model=32", "layers=attention mlp"])
    zoo.train(
        config, (letters[drawn], wanted), tmp_path, steps=25, batch_size=32, lr=1e-2, report_to="none", device="cpu"
    )
    ours = summed([row_scores(zoo.load(tmp_path), inputs, labels, {})])
    sizes = {"docs": 200, "length": 24, "vocab": 6}
    theirs = zoo.evaluate(tmp_path, tasks=["hybridzoo_induction"], metadata=sizes, device="cpu")
    count = round(theirs["results"]["hybridzoo_induction"]["exact_match,none"] * 200)
    assert 0 < count < 200 and round(ours["accuracy"] * 200) == count


# cells


def cell_of(task, layers="attention mlp", measure=None, rate=1e-2, **train):
    config = model_of(task_of(task), layers)
    return Cell("study", Point("point", {}, config, (rate,)), rate, 1, task, train, measure or {})


def test_a_cell_is_trained_scored_and_measured(tmp_path):
    task = {"name": "mqar", "length": 16, "pairs": 2, "vocab": 20, **SMALL}
    cell = cell_of(task, "attention mamba", {"contexts": [8, 32]}, steps=12, batch_size=8, eval_every=6)
    seen = []
    result = train_cell(cell, tmp_path, device="cpu", on_step=lambda step, loss: seen.append(step))
    assert seen == list(range(1, 13)) and result["steps"] == 12 and result["tokens"] == 12 * 8 * 16
    assert result["metric"] == "accuracy" and result["stopped"] is None and result["peak_bytes"] is None
    model = zoo.load(tmp_path / "run")
    for part in ("valid", "test"):
        assert result[part] == task_of(task).score(model, part)
    best = next(e for e in result["history"] if e["step"] == result["best_step"])
    assert best["eval_accuracy"] == pytest.approx(result["valid"]["accuracy"])
    assert [s["context"] for s in result["speed"]] == [8, 32]
    assert all(s["prefill_tokens_s"] > 0 and s["decode_tokens_s"] > 0 for s in result["speed"])
    for s in result["speed"]:
        assert s["state_bytes"] == sum(b.mixer.state_bytes(s["context"]) for b in model.backbone.blocks)
    again = train_cell(cell, tmp_path, device="cpu")
    assert {k: v for k, v in again.items() if k != "speed"} == {k: v for k, v in result.items() if k != "speed"}


@pytest.mark.parametrize(
    "task",
    [{"name": "mqar", "length": 16, "pairs": 2, "vocab": 20}, {"name": "selective_copying", "length": 12, "tokens": 2}],
)
def test_a_cell_that_was_cut_off_ends_as_one_that_was_not(tmp_path, task):
    class Cut(Exception):
        pass

    def cut(step, loss):
        if step == 7:
            raise Cut

    cell = cell_of({**task, **SMALL}, steps=12, batch_size=8, save_every=3)
    whole = train_cell(cell, tmp_path / "whole", device="cpu")
    with pytest.raises(Cut):
        train_cell(cell, tmp_path / "cut", device="cpu", on_step=cut)
    seen = []
    rest = train_cell(cell, tmp_path / "cut", device="cpu", on_step=lambda step, loss: seen.append(step))
    assert seen[0] == 7 and rest["valid"] == whole["valid"] and rest["test"] == whole["test"]
    assert [e["loss"] for e in rest["history"]] == [e["loss"] for e in whole["history"]]


def test_a_cell_that_is_solved_stops(tmp_path):
    task = {"name": "mad", "kind": "memorization", "vocab": 9, "length": 8, "examples": 64, **SMALL}
    result = train_cell(
        cell_of(task, "mamba", steps=200, batch_size=16, eval_every=10, until=0.99), tmp_path, device="cpu"
    )
    assert result["stopped"] == "solved" and result["steps"] < 200 and result["test"]["accuracy"] > 0.99
    stalled = cell_of(task, "mamba", rate=1e-9, steps=20, batch_size=16, eval_every=1, until=0.99, patience=1)
    assert train_cell(stalled, tmp_path / "stalled", device="cpu")["stopped"] == "stalled"


def test_a_long_context_is_passed_no_more_than_it_takes(monkeypatch):
    """A pass that takes longer than what is spent on all of them is timed once, beside the one that decoding goes on from."""
    task = task_of({"name": "mqar", "length": 16, "pairs": 2, "vocab": 20})
    model, lengths = zoo.build(model_of(task)), []
    forward = model.forward

    def counted(ids, **kwargs):
        lengths.append(ids.shape[1])
        return forward(ids, **kwargs)

    model.forward = counted  # which steps call as well, as they do where there are hooks
    assert speed_at(model, 8)["decode_tokens_s"] > 0 and lengths == 4 * [8] + 32 * [1]
    lengths.clear()
    monkeypatch.setattr(measure, "_ENOUGH", 1e-9)
    assert speed_at(model, 8)["state_bytes"] > 0 and lengths == [8, 8, 1]


def test_text_is_scored_in_bits_per_byte(tmp_path):
    task = {"name": "text", "length": 64}
    cell = cell_of(task, steps=3, batch_size=4)
    result = train_cell(cell, tmp_path, device="cpu")
    assert result["metric"] == "bits_per_byte" and not task_of(task).higher_is_better
    last = result["history"][-1]
    assert last["eval_bits_per_byte"] == pytest.approx(result["valid"]["bits_per_byte"], rel=1e-5)
    bytes_ = {part: rows_of(task, part)[0] for part in ("valid", "test")}
    assert result["test"]["n"] == len(bytes_["test"][0])
    assert not {tuple(r) for r in bytes_["valid"][0]} & {tuple(r) for r in bytes_["test"][0]}


def test_text_of_a_path_holds_documents_out(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "{chr(97 + i) * 40}"}}\n' for i in range(20)))
    task = {"name": "text", "data": str(tmp_path / "t.jsonl"), "length": 41}
    train = {int(x) for x in task_of(task).training(0, 1, 1).ravel()} - {0}
    parts = [{x for row in rows_of(task, p)[0][0] for x in row} - {0} for p in ("valid", "test")]
    assert len(train) == 16 and parts == [{97, 107}, {98, 108}] and not train & (parts[0] | parts[1])
    (tmp_path / "few.txt").write_text("one document")
    with pytest.raises(ValueError, match=r"text\(data=.*few.txt'\): holds 1 documents"):
        task_of(task | {"data": str(tmp_path / "few.txt")}).training(0, 1, 1)


def test_a_context_that_does_not_fit_is_said():
    task = task_of({"name": "mqar", "length": 16, "pairs": 2, "vocab": 20})
    model = zoo.build(model_of(task))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    model.forward = full
    assert speed_at(model, 64) == {
        "context": 64, "prefill_tokens_s": None, "decode_tokens_s": None, "peak_bytes": None, "state_bytes": None,
        "problem": "CUDA out of memory. Tried to allocate 9 GiB",
    }  # fmt: skip


def test_statistics_know_which_way_every_task_is_better():
    for kind in TASKS.values():
        assert higher_is_better(kind.metric) is kind.higher_is_better, kind.name


def test_the_table_of_tasks_names_each():
    assert {"mqar", "induction", "selective_copying", "copying", "mad", "text"} <= set(TASKS)
    for name in ("mqar", "induction", "selective_copying", "copying", "mad", "text"):
        task = task_of({"name": name})
        assert task.name == name and task.metric in ("accuracy", "bits_per_byte") and task.tokens_per_example > 0

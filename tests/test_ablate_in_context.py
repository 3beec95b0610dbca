"""Functions learned in context: rows against their definitions, scores of predictors that are known, and what a training takes of a task."""

import itertools

import numpy as np
import pytest
import torch

import hybridzoo as zoo
from hybridzoo.eval.ablate.tasks.in_context import (
    LinearRegression,
    Parity,
    Retrieval,
    least_squares,
    linear_rows,
    parity_rows,
    retrieval_rows,
)

TASKS = [
    Parity(d=4, k=2, shots=20, test_examples=40, valid_examples=24),
    LinearRegression(d=3, shots=9, test_examples=40, valid_examples=24),
    Retrieval(d=5, pairs=6, queries=4, test_examples=40, valid_examples=24),
]


def rng():
    return np.random.default_rng(3)


class Predictor(torch.nn.Module):
    """What a task asks of a model, around a function from inputs ``(b, l, d)`` to predictions."""

    def __init__(self, predict):
        super().__init__()
        self.predict, self.weight = predict, torch.nn.Parameter(torch.zeros(1))

    def some_weight(self):
        return self.weight

    def forward(self, inputs):
        found = np.stack([self.predict(row) for row in inputs.numpy().astype(np.float64)])
        return type("Output", (), {"logits": torch.from_numpy(found)})


def shots_of(row):
    return row[::2], row[1::2, 0]


def parity_by_search(row):
    """Predict by the sets of k = 2 coordinates that explain all examples before: the mean of what they say."""
    x, y = shots_of(row)
    said = np.zeros((len(row), 1))
    for t in range(len(y)):
        votes = [x[t, a] * x[t, b] for a, b in itertools.combinations(range(x.shape[1]), 2)
                 if all(x[s, a] * x[s, b] == y[s] for s in range(t))]  # fmt: skip
        said[2 * t] = np.mean(votes)
    return said


def test_parity_rows_are_products_of_the_same_hidden_coordinates():
    inputs, labels = parity_rows(rng(), 50, d=5, k=3, shots=30)
    assert inputs.shape == (50, 60, 5) and labels.shape == (50, 60, 1) and inputs.dtype == labels.dtype == np.float32
    hidden = set()
    for row, targets in zip(inputs, labels, strict=True):
        x, y = shots_of(row)
        assert set(np.unique(x)) == {-1.0, 1.0} and not row[1::2, 1:].any()
        assert np.isnan(targets[1::2]).all() and np.array_equal(targets[::2, 0], y)
        fits = [c for c in itertools.combinations(range(5), 3) if np.array_equal(x[:, c].prod(1), y)]
        assert len(fits) == 1
        hidden.add(fits[0])
    assert len(hidden) == 10  # of 10 sets, all occur
    assert abs(inputs[:, ::2].mean()) < 0.03 and abs(np.nanmean(labels)) < 0.06


def test_linear_rows_are_linear_functions_of_their_own():
    inputs, labels = linear_rows(rng(), 200, d=3, shots=8)
    for row, targets in zip(inputs.astype(np.float64), labels, strict=True):
        x, y = shots_of(row)
        w = np.linalg.lstsq(x, y, rcond=None)[0]
        assert np.abs(x @ w - y).max() < 1e-5 and np.array_equal(targets[::2, 0], row[1::2, 0].astype(np.float32))
    assert inputs[:, ::2].std() == pytest.approx(1, abs=0.03) and np.nanvar(labels) == pytest.approx(3, rel=0.15)


def test_retrieval_rows_ask_for_values_by_their_keys():
    inputs, labels = retrieval_rows(rng(), 30, d=4, pairs=6, queries=5)
    assert inputs.shape == labels.shape == (30, 17, 4) and np.isnan(labels[:, :12]).all()
    places = np.zeros(6)
    for row, targets in zip(inputs, labels, strict=True):
        found = [int(np.flatnonzero((row[:12:2] == query).all(1))[0]) for query in row[12:]]
        assert len(set(found)) == 5
        assert np.array_equal(targets[12:], row[1:12:2][found])
        places[found] += 1
    assert places.min() > 12  # of 25 on average


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_training_rows_are_new_and_the_same_for_the_same_seed(task):
    data, again, other = (task.training(seed, 3000, 4) for seed in (1, 1, 2))
    assert len(data) == 12_000 and data.digest == again.digest != other.digest
    assert data.digest != task.training(1, 3000, 8).digest
    picked = (0, 1, data.rows - 1, data.rows, 11_999)
    rows = [data[i] for i in picked]
    for (x, y), (x2, y2) in zip(rows, [again[i] for i in picked[::-1]][::-1], strict=True):
        assert np.array_equal(x, x2) and np.array_equal(y, y2, equal_nan=True)
    seen = {x.tobytes() for x, _ in rows} | {x.tobytes() for x in task.validation().inputs} | {other[0][0].tobytes()}
    assert len(seen) == len(picked) + 24 + 1
    assert data[0][0].shape == (task.tokens_per_example, task.config()["inputs"])


def test_scores_of_who_knows_the_answer_and_of_who_guesses():
    parity, linear, retrieval = TASKS
    found = parity.score(Predictor(parity_by_search), "test")
    assert found["accuracy"] > 0.99 and found["n"] == 40 and parity.chance == 0.5
    assert list(found["slices"]) == ["shots=0", "shots=1", "shots=2", "shots=4", "shots=8", "shots=16"]
    assert found["slices"]["shots=0"]["accuracy"] < 0.9 < found["slices"]["shots=8"]["accuracy"]

    def repeat(row):
        x, y = shots_of(row)
        same = [[s for s in range(t) if np.array_equal(x[s], x[t])] for t in range(len(y))]
        said = np.zeros((len(row), 1))
        said[::2, 0] = [y[at[0]] if at else 0 for at in same]  # 0 is wrong, where a guess were right half the time
        return said

    by_memory = parity.score(Predictor(repeat), "test")
    for one in (by_memory, *by_memory["slices"].values()):
        assert one["lookup"] == pytest.approx(0.5 + one["accuracy"] / 2)
    assert by_memory["lookup"] > 0.8  # of the 16 values of x, most have been seen
    guess = parity.score(Predictor(lambda row: np.ones((len(row), 1))), "test")
    assert 0.4 < guess["accuracy"] < 0.6 and guess["loss"] == pytest.approx(4 * (1 - guess["accuracy"]))
    assert parity.score(Predictor(lambda row: np.zeros((len(row), 1))), "valid")["accuracy"] == 0

    def fit(row):
        x, y = shots_of(row)
        said = np.zeros((len(row), 1))
        for t in range(1, len(y)):
            said[2 * t] = x[t] @ np.linalg.lstsq(x[:t], y[:t], rcond=None)[0]
        return said

    found = linear.score(Predictor(fit), "test")
    assert found["error"] == pytest.approx(found["least_squares"], abs=1e-9) and found["error"] < 1e-6
    for one in found["slices"].values():
        assert one["error"] == pytest.approx(one["least_squares"], abs=1e-6)
    assert linear.score(Predictor(lambda row: np.zeros((len(row), 1))), "test")["error"] == pytest.approx(1, abs=0.4)

    def recall(row):
        keys, values = row[:12:2], row[1:12:2]
        nearest = np.square(row[:, None] - keys).sum(2).argmin(1)
        return values[nearest] + 0.01

    found = retrieval.score(Predictor(recall), "test")
    assert found["accuracy"] == 1 and found["loss"] == pytest.approx(1e-4, rel=1e-3)
    assert list(found["slices"]) == ["back=1", "back=2", "back=4"]
    last = retrieval.score(Predictor(lambda row: np.tile(row[11], (len(row), 1))), "test")
    assert last["slices"]["back=1"]["accuracy"] == 1 and last["slices"]["back=2"]["accuracy"] == 0
    assert last["accuracy"] == pytest.approx(retrieval.chance, abs=0.1)


def test_least_squares_is_numpys():
    x, y = rng().standard_normal((7, 6, 3)), rng().standard_normal((7, 6))
    said = least_squares(x, y)
    for row in range(7):
        assert said[row, 0] == 0
        for t in range(1, 6):
            w = np.linalg.lstsq(x[row, :t], y[row, :t], rcond=None)[0]
            assert said[row, t] == pytest.approx(x[row, t] @ w, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parity(d=2, k=3), r"parity\(k=3\): counts more coordinates than the d=2"),
        (lambda: Parity(shots=1), r"parity\(shots=1\)"),
        (lambda: Parity(scored=0.0), r"parity\(scored=0"),
        (lambda: Retrieval(pairs=3, queries=4), r"retrieval\(queries=4\): asks for more keys than the pairs=3"),
        (lambda: Parity().score(None, "train"), "there is no such part. Name one of test, valid"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_a_model_is_trained_on_a_task_and_scored(task, tmp_path):
    config = {"d_model": 16, "layers": "mamba", "mixers": {"mamba": {"d_state": 4}}} | task.config()
    options = {"steps": 3, "batch_size": 4, "report_to": "none", "device": "cpu", "workers": 0}
    data, drawn = task.training(0, 3, 4), []
    data.draw = lambda rng, n: drawn.append(n) or task.draw(rng, n)
    result = zoo.train(config, data, tmp_path, val=task.validation(), **options)
    assert drawn == [4, 4, 4]  # each batch once, since rows are read in order
    valid, test = (task.score(result.model, part) for part in ("valid", "test"))
    assert task.metric in test and test["n"] == 40 and all(task.metric in one for one in test["slices"].values())
    assert result.best["eval_loss"] == pytest.approx(valid["loss"], rel=1e-4)

"""Optimisers and the course of the rate, against torch's own and against formulas."""

import math

import numpy as np
import pytest
import torch
from torch.optim import AdamW, Muon

import hybridzoo as zoo
from hybridzoo.zoo.digests import digest_weights
from hybridzoo.zoo.train.optimisers import MuonAdamW, hidden_matrices
from hybridzoo.zoo.train.run import DifferentRun, train

SMALL = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2", "layers=attention mlp"]
SETTINGS = {"steps": 8, "batch_size": 4, "save_every": 4, "lr": 1e-2, "seed": 3, "report_to": "none", "device": "cpu"}
ROWS = np.random.default_rng(0).integers(1, 200, (10, 12))


def config():
    return zoo.config("transformer-tiny", SMALL)


def losses(result):
    return [entry["loss"] for entry in result.history]


@pytest.mark.parametrize("name", ["mamba-tiny", "jamba-tiny", "mamba2-tiny"])
def test_muon_is_for_the_matrices_inside_blocks_that_decay(name):
    model = zoo.build(name)
    hidden = hidden_matrices(model)
    decayed, _ = zoo.param_groups(model)
    chosen = {n for n, p in model.named_parameters() if id(p) in hidden and any(p is q for q in decayed["params"])}
    assert chosen and all(n.startswith("backbone.layers.") and model.get_parameter(n).dim() == 2 for n in chosen)
    assert not any(n.endswith(("A_log", "norm.weight", "conv1d.weight", "experts.w1", "bias")) for n in chosen)
    assert any(n.endswith(("in_proj.weight", "x_proj.weight", "fc1.weight")) for n in chosen)


def grouped(model, split):
    decayed, rest = zoo.param_groups(model, 0.1)
    hidden = hidden_matrices(model)
    muon = {"params": [p for p in decayed["params"] if id(p) in hidden], "weight_decay": 0.1}
    others = {"params": [p for p in decayed["params"] if id(p) not in hidden], "weight_decay": 0.1}
    if split:
        return Muon([muon], lr=1e-2, adjust_lr_fn="match_rms_adamw"), AdamW(
            [others, rest], lr=1e-2, betas=(0.9, 0.95), fused=True
        )
    return (MuonAdamW([muon], [others, rest], 1e-2, (0.9, 0.95), 1e-8),)


def steps(model, optimisers, n, start=0):
    for i in range(start, start + n):
        ids = torch.from_numpy(ROWS[i : i + 2])
        for optimiser in optimisers:
            optimiser.zero_grad()
            for group in optimiser.param_groups:
                group["lr"] = 1e-2 / (i + 1)
        model(ids, labels=ids).loss.backward()
        for optimiser in optimisers:
            optimiser.step()


def test_two_optimisers_as_one_step_as_the_two():
    models = []
    for split in (True, False):
        torch.manual_seed(0)
        models.append(zoo.build("jamba-tiny"))
        steps(models[-1], grouped(models[-1], split), 3)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), name


def test_what_was_saved_of_them_goes_on(tmp_path):
    torch.manual_seed(0)
    model = zoo.build(config())
    (optimiser,) = grouped(model, split=False)
    steps(model, [optimiser], 2)
    torch.save(optimiser.state_dict(), tmp_path / "optimizer.pt")
    again = zoo.build(config())
    again.load_state_dict(model.state_dict())
    (other,) = grouped(again, split=False)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert len(other.state) == len(optimiser.state) == len(list(model.parameters()))
    for which, one in ((model, optimiser), (again, other)):
        steps(which, [one], 2, start=2)
    assert digest_weights(again) == digest_weights(model)


@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_a_step_that_must_not_be_taken_changes_no_weight(value, monkeypatch):
    # AdamW's kernel on the CPU reads the sign as the GPU's does
    model = zoo.build(config())
    (optimiser,) = grouped(model, split=False)
    steps(model, [optimiser], 1)
    before = digest_weights(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    optimiser.found_inf = torch.ones(())
    optimiser.step()
    assert digest_weights(model) == before
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimiser.found_inf = torch.zeros(())
    optimiser.state.clear()
    optimiser.step()
    assert digest_weights(model) != before


def test_muon_trains_decays_and_resumes_exactly(tmp_path, train_until):
    settings = SETTINGS | {"optimizer": "muon"}
    whole = train(config(), ROWS, tmp_path / "whole", **settings)
    adamw = train(config(), ROWS, tmp_path / "adamw", **SETTINGS)
    assert losses(whole)[0] == losses(adamw)[0] and losses(whole)[-1] < losses(whole)[0] - 0.02
    assert losses(whole) != losses(adamw)
    train_until(6, config(), ROWS, tmp_path / "cut", **settings)
    with pytest.raises(DifferentRun, match=r"another optimizer \(muon there, adamw now\)"):
        train(config(), ROWS, tmp_path / "cut", **SETTINGS)
    resumed = train(config(), ROWS, tmp_path / "cut", **settings)
    assert resumed.resumed_from == 4 and losses(resumed) == losses(whole)
    assert digest_weights(resumed.model) == digest_weights(whole.model)


def test_momenta_are_what_is_asked_for(tmp_path):
    usual = train(config(), ROWS, tmp_path / "usual", **SETTINGS)
    same = train(config(), ROWS, tmp_path / "same", beta1=0.9, beta2=0.999, **SETTINGS)
    other = train(config(), ROWS, tmp_path / "other", beta1=0.8, beta2=0.95, **SETTINGS)
    assert losses(same) == losses(usual) != losses(other)
    state = torch.load(tmp_path / "other" / "checkpoints" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert {group["betas"] for group in state["param_groups"]} == {(0.8, 0.95)}


def course(**options):
    """The factor of the rate at the steps 0 to 19 of 20, by formula: warm-up of 4 steps, and what comes then."""

    def factor(i):
        schedule, final = options.get("schedule", "cosine"), options.get("final_lr", 0.0)
        if schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * (i - 4) / 16))
            return i / 4 if i < 4 else left * (1 - final) + final
        if schedule == "constant":
            return min(1.0, i / 4)
        decay = round(options.get("decay", 0.2) * 20)
        if i < 4:
            return i / 4 * (1 - final) + final
        return 1.0 if i < 20 - decay else (1 - math.sqrt((i - 20 + decay) / decay)) * (1 - final) + final

    return [factor(i) for i in range(20)]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"final_lr": 0.1}, {"schedule": "constant"}, {"schedule": "wsd"}, {"schedule": "wsd", "decay": 0.5, "final_lr": 0.25},
        {"schedule": "wsd", "decay": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_the_rate_takes_its_course(tmp_path, options):
    result = train(config(), ROWS, tmp_path, warmup=4, **SETTINGS | {"steps": 20, "save_every": 10} | options)
    rates = [entry["learning_rate"] for entry in result.history]
    # logged is the rate that a step took
    assert rates == pytest.approx([1e-2 * factor for factor in course(**options)], rel=1e-6, abs=1e-12)


def test_a_course_is_taken_up_where_it_was_left(tmp_path, train_until):
    settings = SETTINGS | {"schedule": "wsd", "decay": 0.5}
    whole = train(config(), ROWS, tmp_path / "whole", **settings)
    train_until(7, config(), ROWS, tmp_path / "cut", **settings)
    resumed = train(config(), ROWS, tmp_path / "cut", **settings)
    assert [e["learning_rate"] for e in resumed.history] == [e["learning_rate"] for e in whole.history]
    assert losses(resumed) == losses(whole)

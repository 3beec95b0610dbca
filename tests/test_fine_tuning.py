"""Training from other weights: as the base of a fresh model, and through adapters of low rank."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hybridzoo as zoo
from hybridzoo.__main__ import app
from hybridzoo.zoo.digests import digest_weights
from hybridzoo.zoo.errors import CheckpointError
from hybridzoo.zoo.hf import HybridZooForCausalLM
from hybridzoo.zoo.models.hooks import has_hooks
from hybridzoo.zoo.train.run import train

ROWS = np.random.default_rng(0).integers(1, 200, (24, 20))
SETTINGS = {"steps": 4, "batch_size": 4, "lr": 3e-3, "report_to": "none", "device": "cpu", "save_every": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(1)
    return zoo.save(zoo.build("jamba-tiny"), tmp_path_factory.mktemp("models") / "base")


def fit(model, out, **options):
    return train(model, ROWS, out, **(SETTINGS | options))


def test_a_fresh_model_starts_from_a_base(base, tmp_path, capsys):
    from_base = fit("jamba-tiny", tmp_path / "a", base=base, overrides=["max_length=4096"])
    further = fit(base, tmp_path / "b")
    assert from_base.history[0]["loss"] == further.history[0]["loss"]
    assert digest_weights(from_base.model) == digest_weights(further.model)
    assert from_base.model.cfg.max_length == 4096 and further.model.cfg.max_length == 1024
    said = capsys.readouterr().err
    assert f"jamba-tiny: a fresh model that starts from the weights of {base}" in " ".join(said.split())
    assert "its config differs from theirs in max_length (1024 there, 4096 now)" in said
    # the weights are one of its settings
    torch.manual_seed(2)
    other = zoo.save(zoo.build("jamba-tiny"), tmp_path / "other")
    with pytest.raises(ValueError, match="holds a run with another start"):
        fit("jamba-tiny", tmp_path / "a", base=other, overrides=["max_length=4096"])


def test_what_does_not_fit_a_base_is_named_with_both_shapes(base, tmp_path):
    with pytest.raises(ValueError) as e:
        fit("jamba-tiny", tmp_path / "a", base=base, overrides=["mixers.mlp.d_intermediate=64", "tie_embeddings=false"])
    message = str(e.value)
    assert "backbone.layers.1.mixer.fc1.weight is (" in message and "there, and the config makes it (" in message
    assert "lm_head.weight" in message or "more." in message
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match=r"no part of the config"):
        fit("jamba-tiny", tmp_path / "a", base=base, overrides=['layers="mamba mlp"'])


def test_bases_that_are_none(base, tmp_path):
    with pytest.raises(ValueError, match=rf"base='{base}x'.*Did you mean '{base}'"):
        fit("jamba-tiny", tmp_path / "a", base=f"{base}x")
    with pytest.raises(ValueError, match="has weights of its own"):
        fit(base, tmp_path / "a", base=base)
    with pytest.raises(ValueError, match="expected a folder or a hub id, got CausalLM"):
        fit("jamba-tiny", tmp_path / "a", base=zoo.load(base))
    with pytest.raises(ValueError, match="which training would replace"):
        fit("jamba-tiny", base, base=base)


def test_adapters_are_trained_merged_and_known_to_peft(base, tmp_path, capsys):
    ids = torch.randint(1, 200, (2, 12))
    result = fit(base, tmp_path / "out", lora=2, steps=12, lr=2e-2)
    said = " ".join(capsys.readouterr().err.split())
    assert "LoRA of rank 2, alpha 4, on dt_proj, fc1, fc2, in_proj, out_proj" in said
    assert "experts are no linear layers and have none" in said
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    old, new = (dict(m.named_parameters()) for m in (zoo.load(base), zoo.load(tmp_path / "out")))
    changed = {name.rpartition(".")[0].rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"dt_proj", "fc1", "fc2", "in_proj", "out_proj", "x_proj", "router"} and old.keys() == new.keys()
    assert torch.equal(
        old["lm_head.weight"] if "lm_head.weight" in old else old["backbone.embedding.weight"],
        new["backbone.embedding.weight"],
    )
    with torch.no_grad():
        want = result.model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, want)
        assert torch.equal(zoo.load(tmp_path / "out")(ids).logits, want)
        fresh = AutoModelForCausalLM.from_pretrained(base)
        before = fresh(ids).logits
        again = PeftModel.from_pretrained(fresh, tmp_path / "out" / "adapter").eval()
        torch.testing.assert_close(again(ids).logits, want, atol=1e-5, rtol=1e-5)
        assert (before - want).abs().max() > 1e-3
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter").eval()  # which names its base
        torch.testing.assert_close(again(ids).logits, want, atol=1e-5, rtol=1e-5)
    # a finished run is read from its folder
    assert fit(base, tmp_path / "out", lora=2, steps=12, lr=2e-2).resumed_from == 12


def test_adapters_learn_what_pefts_own_loop_teaches_them(base, tmp_path):
    """A loop over PEFT and AdamW, written out."""
    rows = ROWS[:4]
    result = train(base, rows, tmp_path / "out", lora=2, lora_alpha=3, **(SETTINGS | {"warmup": 0}))
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules="all-linear")
    model = get_peft_model(HybridZooForCausalLM.wrap(zoo.load(base, dtype=torch.float32)), config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.1)
    ids, losses = torch.from_numpy(rows), []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + np.cos(np.pi * step / 4))
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert [e["loss"] for e in result.history] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_run_of_adapters_goes_on_to_the_bit(base, tmp_path, stop):
    whole = fit(base, tmp_path / "whole", lora=2)

    def on_step(step, loss):
        if step == stop:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(base, tmp_path / "cut", lora=2, on_step=on_step)
    kept = sorted((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"))
    for folder in kept:  # of the adapters alone
        assert (folder / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size / 2
        assert not list(folder.glob("model*.safetensors"))
    resumed = fit(base, tmp_path / "cut", lora=2)
    assert resumed.resumed_from == (stop - 1) // 2 * 2
    assert [e["loss"] for e in resumed.history] == [e["loss"] for e in whole.history]
    assert digest_weights(resumed.model) == digest_weights(whole.model)
    files = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert files[0] == files[1]


def test_the_best_adapters_are_those_that_are_merged(base, tmp_path):
    result = fit(base, tmp_path / "out", lora=2, val=ROWS[:6], eval_every=1, lr=0.2, steps=5, warmup=0)
    best = int(result.best["step"])
    assert best < 5, result.history
    files = [
        tmp_path / "out" / name / "adapter_model.safetensors" for name in (f"checkpoints/checkpoint-{best}", "adapter")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    ids = torch.from_numpy(ROWS[:6])
    with torch.no_grad():
        merged = zoo.load(tmp_path / "out")(ids, labels=ids)
    assert (merged.loss - merged.aux_loss).item() == pytest.approx(result.best["eval_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_of_adapters_killed_at_any_operation_ends_as_if_it_had_not_been(tmp_path):
    spec = importlib.util.spec_from_file_location("killed", Path(__file__).parent / "killed.py")
    killed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(killed)
    torch.manual_seed(1)
    base = zoo.save(zoo.build(killed.MODEL), tmp_path / "base")
    tuned = {"model": base, "lora": 2}
    assert killed.run(tmp_path / "whole", tmp_path / "whole.json", **tuned) == 0
    operations, want = (
        json.loads((tmp_path / "whole.json").read_text())["operations"],
        killed.outcome(tmp_path / "whole.json"),
    )
    files = {f.name: f.read_bytes() for f in (tmp_path / "whole" / "adapter").iterdir()}
    # in the middle of a checkpoint, and all the way from the last one to the end
    chosen = [n for n, what in enumerate(operations, 1) if "adapter" in what]
    assert len(chosen) >= 4
    for n in (*chosen[:2], *range(chosen[-1] - 2, chosen[-1] + 3)):
        out, report = tmp_path / f"cut{n}", tmp_path / f"cut{n}.json"
        assert killed.run(out, last=n, **tuned) == 9
        assert killed.run(out, report, **tuned) == 0, operations[n - 1]
        assert killed.outcome(report) == want and not killed.leftovers(out), operations[n - 1]
        assert {f.name: f.read_bytes() for f in (out / "adapter").iterdir()} == files


@pytest.mark.parametrize("targets", [[], ["--lora-targets", "in_proj,out_proj"]])
def test_the_command_line_tunes(base, tmp_path, monkeypatch, targets):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.txt").write_text("All work and no play makes Jack a dull boy. " * 40)
    flags = ["--steps", 2, "--batch-size", 2, "--report-to", "none", "--device", "cpu", "--length", 16]
    call = ["train", base, "--lora", 8, *targets, "--data", "more.txt", "--out", "runs/more", *flags]
    result = CliRunner().invoke(app, [str(word) for word in call], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "LoRA of rank 8, alpha 16, on " in result.stderr
    assert (tmp_path / "runs/more/adapter/adapter_config.json").exists() and zoo.load("runs/more")
    call = ["train", "jamba-tiny", "--base", base, "--data", "more.txt", "--out", "runs/base", *flags]
    result = CliRunner().invoke(app, [str(word) for word in call], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "a fresh model that starts from the weights of" in result.stderr


def test_damaged_or_other_adapters_are_refused(base, tmp_path):
    def on_step(step, loss):
        if step == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(base, tmp_path / "out", lora=2, on_step=on_step)
    with pytest.raises(ValueError, match=r"another lora \(2 there, 4 now\)"):
        fit(base, tmp_path / "out", lora=4)
    with pytest.raises(ValueError, match=r"another lora \(2 there, None now\)"):
        fit(base, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "damaged")
    manifest = tmp_path / "damaged/checkpoints/checkpoint-2/zoo.json"
    file = manifest.with_name("adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: has \d+ bytes, and \d+ were written"):
        fit(base, tmp_path / "damaged", lora=2)
    assert json.loads(manifest.read_text())["step"] == 2


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("jamba-tiny", {"lora": 2}, r"train\(lora=2\): adapters on a fresh model"),
        ("base", {"lora": 2, "lora_targets": "in_porj"}, r"no linear layer and no matrix 'in_porj'\. Did you mean 'in_proj'\?.*out_proj"),
        ("base", {"lora": 2, "lora_targets": "conv1d"}, r"no linear layer and no matrix 'conv1d'"),
        ("base", {"lora": 2, "lora_targets": "in_proj,lm_head"}, r"lm_head shares its weight \(tie_embeddings\)"),
        ("base", {"lora_targets": "in_proj"}, r"train\(lora_targets='in_proj'\): there are no adapters"),
        ("base", {"lora_alpha": 3}, r"train\(lora_alpha=3\): there are no adapters"),
        ("base", {"lora": 0}, r"train\(lora=0\): must be at least 1"),
        ("base", {"lora": 1, "lora_alpha": 0}, r"train\(lora_alpha=0\): must be a number above 0"),
        ("base", {"shard": True}, r"train\(shard=True\): needs processes to shard over"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be(base, tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        fit(base if model == "base" else model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_experts_have_adapters_where_they_are_named(base, tmp_path, capsys):
    fit(base, tmp_path / "out", lora=2, lora_targets="experts.w1, experts.w2,router")
    assert "experts are" not in capsys.readouterr().err
    old, new = (dict(m.named_parameters()) for m in (zoo.load(base), zoo.load(tmp_path / "out")))
    changed = {name.split("mixer.")[-1] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"experts.w1", "experts.w2", "router.weight"}


def test_adapters_of_blocks_that_share_their_weights_merge(tmp_path):
    base = zoo.save(zoo.build("zamba2-tiny"), tmp_path / "base")
    fit(base, tmp_path / "out", lora=2)
    ids = torch.randint(1, 200, (2, 12))
    with torch.no_grad():
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out" / "adapter")
        want = zoo.load(tmp_path / "out")(ids).logits
        torch.testing.assert_close(again.eval()(ids).logits, want, atol=1e-5, rtol=1e-5)


def test_adapters_have_no_hooks_which_a_recorded_step_would_not_run(base):
    core = zoo.load(base)
    model = get_peft_model(
        HybridZooForCausalLM.wrap(core), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    assert not [name for module in (model, core) for name, m in module.named_modules() if has_hooks(m)]

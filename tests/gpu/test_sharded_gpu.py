"""FSDP2 on a GPU, in a world of one: losses and gradients are those of the model that is not sharded, with the head's slices several."""

import copy
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.distributed as dist

import hybridzoo as zoo
import hybridzoo.zoo.models.loss as loss_module

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model, how, **options):
    """In the groups that people form: the blocks, and the rest with the root, or the head by itself, or as accelerate does."""
    from torch.distributed.fsdp import fully_shard

    for block in dict.fromkeys(model.backbone.layers):
        fully_shard(block, **options)
    if how == "head":
        fully_shard(model.lm_head, **options)
    if how == "tail":
        tied = [model.backbone.embedding] if model.cfg.tie_embeddings else []
        fully_shard([model.backbone.norm_f, *tied, model.lm_head], reshard_after_forward=False, **options)
    return fully_shard(model, **options)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(("name", "how"), [("jamba-tiny", "root"), ("jamba-tiny", "tail"), ("untied", "head"), ("untied", "tail"), ("mamba2attn-tiny", "tail")])  # fmt: skip
def test_a_sharded_model_has_the_loss_and_the_gradients(process_group, monkeypatch, name, how, autocast):
    monkeypatch.setattr(loss_module, "_SLICE_BYTES", 128 * 256 * 4)
    overrides = ["tie_embeddings=false"] if name == "untied" else []
    model = zoo.build("jamba-tiny" if name == "untied" else name, overrides, device="cuda").train()
    twin = shard(copy.deepcopy(model), how)
    ids = torch.randint(1, 256, (8, 70), device="cuda")
    for _ in range(2):
        losses = []
        for each in (model, twin):
            each.zero_grad()
            with torch.autocast("cuda", BF16, enabled=autocast):
                losses.append(each(ids, labels=ids, num_items=500).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            worst = (q.grad.full_tensor() - p.grad).norm() / (p.grad.norm() + 1e-6)
            assert worst < (2e-2 if autocast else 1e-4), f"{name}: {worst}"


def test_trainer_shards_and_trains(tmp_path):
    """accelerate's own groups; before, the recomputed slices of the loss found the head's weight sharded."""
    launch(
        tmp_path,
        """
            import sys, torch
            from transformers import Trainer, TrainingArguments
            import hybridzoo as zoo
            import hybridzoo.zoo.models.loss as loss_module
            from hybridzoo.zoo.hf import HybridZooForCausalLM
            loss_module._SLICE_BYTES = 64 * 256 * 2
            ids = torch.randint(1, 256, (32, 64), generator=torch.Generator().manual_seed(0))
            rows = [{"input_ids": row, "labels": row} for row in ids]
            losses = []
            for options in ({}, {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Block"]}}):
                torch.manual_seed(0)
                model = HybridZooForCausalLM.wrap(zoo.build("jamba-tiny"))
                args = TrainingArguments(
                    sys.argv[1], max_steps=4, per_device_train_batch_size=8, logging_steps=1, report_to="none", save_strategy="no",
                    disable_tqdm=True, seed=1, **options,
                )
                trainer = Trainer(model, args, train_dataset=rows)
                trainer.train()
                losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
                from accelerate.state import AcceleratorState
                AcceleratorState._reset_state()
            print(losses)
            assert all(abs(a - b) < 1e-3 for a, b in zip(*losses)), losses
        """,
    )


def test_zoo_train_shards_resumes_and_stops(tmp_path):
    launch(
        tmp_path,
        """
            import os, sys
            import numpy as np, torch
            import hybridzoo as zoo
            import hybridzoo.zoo.models.loss as loss_module
            from hybridzoo.zoo.digests import digest_weights
            from hybridzoo.zoo.train.run import Diverged, train
            loss_module._SLICE_BYTES = 128 * 256 * 2
            out, rows = sys.argv[1], np.random.default_rng(0).integers(1, 200, (40, 64))
            settings = {"steps": 6, "batch_size": 8, "lr": 1e-3, "report_to": "none", "save_every": 2}
            history = lambda result: [entry["loss"] for entry in result.history]
            for precision, tolerance in (("float32", 1e-5), ("bfloat16", 2e-3)):
                results = [
                    train("jamba-tiny", rows, f"{out}/{precision}-{shard}", shard=shard, precision=precision, capture="off", **settings)
                    for shard in (False, True)
                ]
                plain, sharded = map(history, results)
                assert np.allclose(plain, sharded, rtol=tolerance), (plain, sharded)
                assert digest_weights(zoo.load(f"{out}/{precision}-True")) == digest_weights(results[1].model)

            def stop(step, loss):
                if step == 5:
                    raise RuntimeError("stopped")

            try:
                train("jamba-tiny", rows, f"{out}/cut", shard=True, on_step=stop, precision="bfloat16", **settings)
            except RuntimeError:
                pass
            resumed = train("jamba-tiny", rows, f"{out}/cut", shard=True, precision="bfloat16", **settings)
            assert resumed.resumed_from == 4 and np.allclose(history(resumed), sharded, rtol=1e-3), (history(resumed), sharded)

            # a step that is not finite changes no weight
            model, seen = zoo.build("jamba-tiny"), []

            def poison(step, loss):
                weight = model.get_parameter("backbone.layers.1.mixer.fc1.weight")
                if step == 2:
                    with torch.no_grad():
                        weight.to_local().fill_(3e38)
                seen.append(weight.to_local().clone())

            try:
                train(model, rows, f"{out}/bad", shard=True, on_step=poison, **(settings | {"save_every": 6}))
                raise AssertionError("did not diverge")
            except Diverged as e:
                assert e.step == 3, e
            assert torch.equal(seen[-1], seen[1])

            base = f"{out}/bfloat16-True"
            tuned = [history(train(base, rows, f"{out}/lora-{shard}", lora=4, shard=shard, **settings)) for shard in (False, True)]
            assert np.allclose(*tuned, rtol=2e-3), tuned
            torch.distributed.destroy_process_group()
        """,
    )


def test_adapters_are_trained_in_a_recorded_step(tmp_path):
    rows = np.random.default_rng(0).integers(1, 200, (40, 64))
    base = zoo.save(zoo.build("mamba2attn-tiny"), tmp_path / "base")
    settings = {"steps": 6, "batch_size": 8, "lr": 1e-3, "report_to": "none", "lora": 4}
    losses = {}
    for capture in ("on", "off"):
        result = zoo.train(base, rows, tmp_path / capture, capture=capture, **settings)
        losses[capture] = [entry["loss"] for entry in result.history]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)


def launch(folder, script):
    """Run a script in the one process of torchrun."""
    file = folder / "script.py"
    file.write_text(textwrap.dedent(script))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(file), str(folder / "out")],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"}, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[run.stderr.find("Traceback") :][:4000]

"""transformers' own Trainer on the adapter, one process and two: what the user's script gets, without zoo.train around it."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hybridzoo as zoo
from hybridzoo.zoo.hf import HybridZooForCausalLM

# Mamba, attention, MLP and experts; their loss depends on who shares a batch, so it is off where batches are cut differently
MODEL, BALANCED = "jamba-tiny", ["mixers.moe.aux_loss_coef=0"]
CHECKPOINTING = next(
    n for n in ("activation_checkpointing", "gradient_checkpointing") if n in TrainingArguments.__dataclass_fields__
)


class Texts(Dataset):
    """Rows of one length, of which unequal parts are to be predicted."""

    def __init__(self, n=16, l=24):
        draw = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 256, (n, l), generator=draw)
        self.labels = self.ids.masked_fill(torch.arange(l) < torch.randint(0, l - 4, (n, 1), generator=draw), -100)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def fit(out, overrides=(), resume=None, **options):
    torch.manual_seed(0)
    model = HybridZooForCausalLM.wrap(zoo.build(MODEL, list(overrides)))
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2, "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    args = TrainingArguments(str(out), **(settings | options))
    trainer = Trainer(model, args, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, msg=lambda m, name=name: f"{name}: {m}", **(tolerance or {"atol": 0, "rtol": 0})
        )


def test_resuming_and_checkpointing_change_no_bit(tmp_path):
    steps = {"max_steps": 16, "save_steps": 8}  # four times through the texts, which is enough to learn of them
    whole, losses = fit(tmp_path, **steps)
    assert losses[-1] < losses[0]
    resumed, after = fit(tmp_path, resume=str(tmp_path / "checkpoint-8"), **steps)
    assert after == losses
    same(resumed, whole)
    recomputed, after = fit(tmp_path / "b", **{CHECKPOINTING: True}, **steps)
    assert after == losses
    same(recomputed, whole)
    for folder in (tmp_path / "checkpoint-16", tmp_path / "b" / "checkpoint-16"):
        same(AutoModelForCausalLM.from_pretrained(folder), whole)
        same(HybridZooForCausalLM.wrap(zoo.load(folder)), whole)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    # plain gradient descent: Adam would blow up what differs in the last bit
    whole, losses = fit(tmp_path / "a", BALANCED, optim="sgd", max_grad_norm=0)
    parts, after = fit(
        tmp_path / "b", BALANCED, optim="sgd", max_grad_norm=0,
        per_device_train_batch_size=1, gradient_accumulation_steps=4,
    )  # fmt: skip
    assert after == pytest.approx(losses, rel=1e-5)
    same(parts, whole, atol=1e-6, rtol=1e-5)


def test_the_auxiliary_loss_counts_once_in_an_accumulated_batch():
    model = HybridZooForCausalLM.wrap(zoo.build(MODEL, ["mixers.moe.aux_loss_coef=1"])).train()
    rows = [Texts()[i] for i in range(3)]
    targets = [int((row["labels"][1:] != -100).sum()) for row in rows]
    assert len(set(targets)) == 3
    parts = [{k: v[None] for k, v in row.items()} for row in rows]
    accumulated = sum(model(**part, num_items_in_batch=sum(targets)).loss for part in parts)
    alone = [model(**part).loss for part in parts]
    mean = sum(n * loss for n, loss in zip(targets, alone, strict=True)) / sum(targets)
    torch.testing.assert_close(accumulated, mean)


def test_label_smoothing_predicts_the_next_token(tmp_path):
    model = HybridZooForCausalLM.wrap(zoo.build("mamba-tiny"))
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none")
    row = {k: v[None] for k, v in Texts()[0].items()}
    expected = torch.nn.functional.cross_entropy(
        model(row["input_ids"]).logits[0, :-1], row["labels"][0, 1:], label_smoothing=0.1
    )
    torch.testing.assert_close(Trainer(model, args).compute_loss(model, dict(row)), expected)


def test_evaluation_returns_losses_and_no_states(tmp_path):
    model = HybridZooForCausalLM.wrap(zoo.build("mamba-tiny"))
    args = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=3, use_cpu=True, report_to="none", disable_tqdm=True
    )
    out = Trainer(model, args, eval_dataset=Texts(5)).predict(Texts(5))
    assert out.predictions.shape == (5, 24, 256) and out.metrics["test_loss"] > 0


SHARDED = """
    import os, sys, torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    from transformers.distributed import DistributedConfig
    import hybridzoo as zoo
    from hybridzoo.zoo.hf import HybridZooForCausalLM
    sys.path.insert(0, os.path.dirname(sys.argv[1]))
    from test_trainer import BALANCED, CHECKPOINTING, MODEL, Texts
    out = sys.argv[2]


    def fit(folder, resume=None, **options):
        torch.manual_seed(0)
        AcceleratorState._reset_state()
        model = HybridZooForCausalLM.wrap(zoo.build(MODEL, BALANCED))
        args = TrainingArguments(
            folder, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, logging_steps=1, seed=1,
            use_cpu=True, ddp_backend="gloo", report_to="none", disable_tqdm=True, fsdp=True, fsdp_config={"version": 2}, **options,
        )
        args.device  # starts the process group
        # accelerate shards on accelerators only, and takes DDP on a CPU without a word; the rest of it does not care
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        trainer = Trainer(model, args, train_dataset=Texts())
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(folder + "/final")
        blocks = trainer.model.backbone.layers
        assert all(type(block).__name__ == "FSDPBlock" for block in blocks)
        assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in blocks.parameters() if p.shape[0] > 1)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {n: p.full_tensor() for n, p in trainer.model.named_parameters()}, losses


    def same(a, b):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=0, rtol=0, msg=lambda m: f"{name}: {m}")


    whole, losses = fit(out + "/a")
    resumed, after = fit(out + "/a", out + "/a/checkpoint-2")
    assert after == losses
    same(resumed, whole)
    recomputed, after = fit(out + "/b", **{CHECKPOINTING: True})
    assert after == losses
    same(recomputed, whole)
    same(dict(AutoModelForCausalLM.from_pretrained(out + "/a/final").named_parameters()), whole)
    if "fsdp_plan" in DistributedConfig.__dataclass_fields__:  # newer ones also shard a model as they load it, without accelerate
        sharded = AutoModelForCausalLM.from_pretrained(out + "/a/final", distributed_config=DistributedConfig(fsdp_size=2))
        assert type(sharded.backbone.layers[0]).__name__ == "FSDPBlock"
        same({n: p.full_tensor() for n, p in sharded.named_parameters()}, whole)
    if dist.get_rank() == 0:
        torch.save(losses, out + "/losses.pt")
    dist.destroy_process_group()
"""


def test_two_processes_shard_the_model_and_train_as_one(tmp_path):
    """FSDP2 through torchrun and accelerate: resume and recomputation to the bit, and the losses of one process."""
    (tmp_path / "script.py").write_text(textwrap.dedent(SHARDED))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "script.py"), __file__, str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    model, losses = fit(tmp_path / "one", BALANCED)
    assert torch.load(tmp_path / "losses.pt") == pytest.approx(losses, rel=1e-4)
    saved = zoo.load(tmp_path / "a" / "final")
    same(HybridZooForCausalLM.wrap(saved), model, atol=1e-3, rtol=1e-2)

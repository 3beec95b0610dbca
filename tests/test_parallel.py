"""Wrappers that average gradients or shard weights (DDP, FSDP2): two processes train as one, whatever the model shares."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from filelock import FileLock
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

import hybridzoo as zoo
from hybridzoo.zoo.errors import CheckpointError
from hybridzoo.zoo.hf import HybridZooForCausalLM
from hybridzoo.zoo.train.batches import Whole
from hybridzoo.zoo.train.examples import examples_from
from hybridzoo.zoo.train.options import TrainOptions
from hybridzoo.zoo.train.order import order_of
from hybridzoo.zoo.train.weights import load_weights

RANK = """
    import os, sys
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    import hybridzoo as zoo

    NAME, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))


    def build(seed=0):
        torch.manual_seed(seed)
        return zoo.build(NAME).train()


    def fit(model, rows):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(rows, labels=rows).loss.backward()
            optimizer.step()
        return model


    def same(got, want):
        got = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in got.named_parameters()}
        assert list(got) == [name for name, _ in want.named_parameters()]
        for name, p in want.named_parameters():
            torch.testing.assert_close(got[name], p, atol=1e-6, rtol=1e-5, msg=lambda m: f"{name}: {m}")


    def shard(model, order=1):
        for block in list(dict.fromkeys(model.backbone.layers))[::order]:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)


    ids = torch.randint(1, 256, (2, 10), generator=torch.Generator().manual_seed(0))
    mine = ids[rank : rank + 1]
    want = fit(build(), ids)
    for options in ({"static_graph": True}, {"find_unused_parameters": True}):
        model = build()
        fit(DistributedDataParallel(model, **options), mine)
        same(model, want)
    for order, checkpointing in ((1, False), (-1, True)):
        model = shard(build(), order)
        model.gradient_checkpointing_enable(checkpointing)
        same(fit(model, mine), want)
    assert torch.equal(model.eval().generate(ids, 3), want.eval().generate(ids, 3))
    dcp.save(get_model_state_dict(model), checkpoint_id=folder + "/dcp")
    other = shard(build(seed=1))
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder + "/dcp")
    set_model_state_dict(other, state)
    same(other, want)
    try:
        zoo.save(other, folder + "/refused")
        raise AssertionError("saved")
    except ValueError as e:
        assert "sharded" in str(e), e
    state = get_model_state_dict(other, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # as the error says
    if rank == 0:
        whole = zoo.build(other.cfg)
        whole.load_state_dict(state)
        same(zoo.load(zoo.save(whole, folder + "/whole")), want)
    dist.destroy_process_group()
"""


def test_two_processes_train_as_one_also_where_blocks_share_weights(tmp_path):
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py"), "zamba2-tiny", str(tmp_path)],
            env=env | {"RANK": str(rank)}, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=200)[1] for process in ranks]
    assert not any(process.returncode for process in ranks), "\n".join(errors)[-3000:]


TRAIN = """
    import json, os, signal, sys
    from pathlib import Path
    import numpy as np
    import torch
    import torch.distributed as dist
    import hybridzoo as zoo
    from hybridzoo.zoo.digests import digest_weights
    from hybridzoo.zoo.train.run import Diverged, Interrupted, train
    sys.path.insert(0, os.path.dirname(sys.argv[1]))
    from test_parallel import EXPERTS, MODELS, ROWS, TEXT, UNEVEN, curve, settings, uneven

    out = Path(sys.argv[2])
    first, told = os.environ["RANK"] == "0", {}


    def history(result):
        return [e["loss"] for e in result.history]


    def stopped(folder, at, error=RuntimeError, how=None, **options):
        def on_step(step, loss):
            if step == at:
                how() if how else exec("raise RuntimeError('stopped')")

        try:
            train("jamba-tiny", ROWS, folder, overrides=EXPERTS, on_step=on_step, **settings(2), **options)
        except error as e:
            return e
        raise AssertionError(f"{folder}: was not stopped")


    for name, overrides in MODELS.items():
        for shard in (False, True):
            result = train(name, ROWS, out / f"{name}-{shard}", overrides=overrides, shard=shard, **settings(2))
            told[f"{name}-{shard}"] = history(result)
    told["packed"] = history(train("jamba-tiny", TEXT, out / "packed", length=32, shard=True, **settings(2)))

    result = train("transformer-tiny", UNEVEN, out / "uneven", batch_size=2, **uneven())
    told["uneven"], told["uneven-tokens"] = curve(result), result.tokens

    # stopped in the middle, by an error and by Ctrl-C in one of them, they go on to the bit
    interrupt = lambda: first and os.kill(os.getpid(), signal.SIGINT)
    for way, at, error, how, last in (("error", 3, RuntimeError, None, 2), ("ctrl-c", 2, Interrupted, interrupt, 3)):
        stopped(out / way, at, error, how, shard=True)
        resumed = train("jamba-tiny", ROWS, out / way, overrides=EXPERTS, shard=True, **settings(2))
        assert history(resumed) == told["jamba-tiny-True"] and resumed.resumed_from == last, (way, resumed.history, told)
        assert not first or digest_weights(resumed.model) == digest_weights(zoo.load(out / "jamba-tiny-True"))

    # what one of them finds is an error of all
    for shard, when in ((False, 1), (False, 2), (True, 1), (True, 2)):
        def poison(step, loss):
            part = poisoned.get_parameter("backbone.layers.0.mixer.in_proj.weight")
            if step == when and not first:
                with torch.no_grad():
                    (part.to_local() if shard else part).fill_(float("nan"))

        poisoned = zoo.build("jamba-tiny")
        try:
            train(poisoned, ROWS, out / f"bad-{shard}-{when}", shard=shard, on_step=poison, **settings(2))
            raise AssertionError("did not diverge")
        except Diverged as e:
            told[f"bad-{shard}-{when}"] = str(e)

    # adapters of low rank, whose frozen weights are sharded with them
    base = out / "jamba-tiny-True"
    for shard in (False, True):
        told[f"lora-{shard}"] = history(train(base, ROWS, out / f"lora-{shard}", lora=2, shard=shard, **settings(2)))
    if first:
        (out / "told.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
"""
ROWS = np.random.default_rng(0).integers(1, 200, (24, 20))
TEXT = Path(__file__)
# pure and mixed; experts, whose balance is that of the whole batch, and blocks that share weights
EXPERTS = ["mixers.moe.aux_loss_coef=0.5"]
MODELS = {"mamba-tiny": [], "mamba2attn-tiny": [], "jamba-tiny": EXPERTS, "zamba2-tiny": []}


# the last batch of every pass is short, and rows have unequal numbers of targets
DRAW = np.random.default_rng(0)
UNEVEN = DRAW.integers(1, 200, (10, 12))
UNEVEN[:, :6] = np.where(np.arange(6) < DRAW.integers(1, 6, (10, 1)), ~UNEVEN[:, :6], UNEVEN[:, :6])
VAL = DRAW.integers(1, 200, (5, 12))
VAL[1, :9], VAL[3, 1:] = ~VAL[1, :9], ~VAL[3, 1:]
SMALL = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2"]


def uneven():
    return {
        "overrides": SMALL, "val": VAL, "steps": 8, "eval_every": 2, "save_every": 4, "lr": 1e-2, "seed": 3, "report_to": "none",
        "device": "cpu",
    }  # fmt: skip


def curve(result):
    return [[entry["loss"], entry["grad_norm"], entry.get("eval_loss", 0)] for entry in result.history]


def settings(processes):
    return {
        "steps": 4, "batch_size": 4 // processes, "lr": 3e-3, "report_to": "none", "device": "cpu", "save_every": 2,
    }  # fmt: skip


def _told(stderr):
    return stderr[stderr.find("Traceback") :][:4000]  # torchrun's own comes last


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Two processes' trainings, the same for all workers of a test run: their folder, and the losses of each."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = base / "together"
    with FileLock(base / "together.lock"):
        if not (out / "told.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            (out / "script.py").write_text(textwrap.dedent(TRAIN))
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            run = subprocess.run(
                [*torchrun, str(out / "script.py"), __file__, str(out)],
                capture_output=True, text=True, cwd=out, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=550,
            )  # fmt: skip
            assert run.returncode == 0, _told(run.stderr)
    return out, json.loads((out / "told.json").read_text())


def alone(model, out, data=ROWS, **options):
    return [e["loss"] for e in zoo.train(model, data, out, **(settings(1) | options)).history]


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_as_one(together, tmp_path, name):
    out, losses = together
    want = alone(name, tmp_path / "one", overrides=MODELS[name])
    for shard in (False, True):
        assert losses[f"{name}-{shard}"] == pytest.approx(want, rel=1e-5)
        # each loss is known before its step; what the last step makes is in the folder
        for (n, p), q in zip(
            zoo.load(out / f"{name}-{shard}").named_parameters(), zoo.load(tmp_path / "one").parameters(), strict=True
        ):
            torch.testing.assert_close(p, q, atol=2e-4, rtol=1e-3, msg=lambda m, n=n: f"{n}: {m}")


def test_two_processes_share_uneven_batches_and_evaluations_as_one(together, tmp_path):
    out, told = together
    one = zoo.train("transformer-tiny", UNEVEN, tmp_path / "one", batch_size=4, **uneven())
    assert told["uneven"] == [pytest.approx(entry, rel=1e-5) for entry in curve(one)]
    assert told["uneven-tokens"] == one.tokens
    assert json.loads((out / "uneven" / "train.json").read_text())["best"] == pytest.approx(one.best, rel=1e-5)
    for p, q in zip(zoo.load(out / "uneven").parameters(), one.model.parameters(), strict=True):
        assert np.allclose(p.detach(), q.detach(), atol=1e-5)


def test_rows_behind_the_last_make_batches_whole_and_hold_nothing_to_predict():
    examples = examples_from(UNEVEN, zoo.build("transformer-tiny", SMALL), TrainOptions(report_to="none"))
    whole = Whole(examples, 4)
    numbers = list(order_of(whole, seed=3))
    assert len(whole) == 12 and numbers[10:] == [10, 11] and numbers[:10] == list(order_of(examples, seed=3))
    assert sorted(numbers[:10]) == list(range(10))
    assert all(bool((whole[i]["labels"] == -100).all()) for i in (10, 11))
    assert all(bool((whole[i]["labels"] == examples[i]["labels"]).all()) for i in range(10))
    whole.set_epoch(1)
    assert examples.epoch == 1 and list(order_of(whole, seed=3))[:10] != numbers[:10]
    assert len(Whole(examples, 5)) == 10


def test_two_processes_read_packed_rows_as_one(together, tmp_path):
    assert together[1]["packed"] == pytest.approx(alone("jamba-tiny", tmp_path / "one", TEXT, length=32), rel=1e-5)


def test_two_processes_train_adapters_as_one(together, tmp_path):
    out, losses = together
    want = alone(out / "jamba-tiny-True", tmp_path / "one", lora=2)
    assert losses["lora-False"] == pytest.approx(want, rel=1e-5)
    assert losses["lora-True"] == pytest.approx(want, rel=1e-5)
    files = sorted(f.name for f in (out / "lora-True" / "adapter").iterdir())
    assert "adapter_model.safetensors" in files and zoo.load(out / "lora-True")


@pytest.mark.parametrize("shard", [False, True])
def test_divergence_in_one_process_is_told_by_both(together, shard):
    _, told = together
    assert "training diverged at step 2 of 4: the loss is" in told[f"bad-{shard}-1"]
    at_saving = "training diverged at step 2 of 4: the weights are no longer finite after it"
    assert (
        at_saving in told[f"bad-{shard}-2"]
        and "the weight backbone.layers.0.mixer.in_proj.weight" in told[f"bad-{shard}-2"]
    )


def test_a_sharded_checkpoint_is_read_in_one_process(together, tmp_path):
    out, _ = together
    folder = out / "jamba-tiny-True" / "checkpoints" / "checkpoint-4"
    assert sorted(f.name for f in (folder / "sharded").iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    model = HybridZooForCausalLM.wrap(zoo.build("jamba-tiny"))
    load_weights(model, folder)
    for p, q in zip(model.core.parameters(), zoo.load(out / "jamba-tiny-True").parameters(), strict=True):
        assert torch.equal(p, q)
    # with torch alone
    state = {"backbone.norm_f.weight": torch.empty(64)}
    dcp.load(state, checkpoint_id=folder / "sharded", no_dist=True)
    assert torch.equal(state["backbone.norm_f.weight"], model.core.backbone.norm_f.weight)
    with pytest.raises(CheckpointError, match="holds another training's tensors"):
        load_weights(HybridZooForCausalLM.wrap(zoo.build("mamba-tiny")), folder)


class Bad:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_hostile_description_of_shards_is_not_run(together, tmp_path):
    out, _ = together
    model = HybridZooForCausalLM.wrap(zoo.build("jamba-tiny"))
    shutil.copytree(out / "jamba-tiny-True" / "checkpoints" / "checkpoint-4", tmp_path / "c")
    file = tmp_path / "c" / "sharded" / ".metadata"
    whole = file.read_bytes()
    for content, message in (
        (pickle.dumps(Bad()), "it asks for posix.system"),
        (whole[:100], "cannot be read"),
        (pickle.dumps(Metadata({"backbone.norm_f.weight": BytesStorageMetadata()})), "is no tensor|it asks for"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_weights(model, tmp_path / "c")


def test_a_part_that_is_shared_is_moved_and_sharded_once():
    model = zoo.build("zamba2-tiny", ["tie_embeddings=false"])
    first, twin = model.backbone.layers[2], model.backbone.layers[6]
    assert twin is not first and twin.mixer is not first.mixer and twin.mixer.in_proj is first.mixer.in_proj
    assert twin.mixer.adapter is not first.mixer.adapter
    assert set(twin.state_dict()) == set(first.state_dict())
    assert [name for name, _ in twin.named_children()] == ["mixer"]
    assert [name for name, _ in twin.mixer.named_children()] == ["adapter"]
    calls = []
    model.apply(calls.append)
    assert calls.count(first.mixer.in_proj) == calls.count(twin.mixer.adapter) == 1


@torch.no_grad()
def test_what_is_put_in_the_place_of_a_shared_part_counts_wherever_it_is_used():
    model, ids = zoo.build("zamba2-tiny").eval(), torch.randint(1, 256, (2, 7))
    first, twin = model.backbone.layers[2], model.backbone.layers[6]
    want = zoo.build("zamba2-tiny").eval()
    want.load_state_dict(model.state_dict())
    want.backbone.layers[2].mixer.out_proj.weight.mul_(2)
    first.mixer.out_proj = torch.nn.Sequential(first.mixer.out_proj, Twice())
    assert torch.equal(model(ids).logits, want(ids).logits)
    assert torch.equal(model.generate(ids, 4), want.generate(ids, 4))
    twin.mixer.out_proj = torch.nn.Sequential(twin.mixer.out_proj)  # somebody's own choice is left alone
    assert torch.equal(model(ids).logits, want(ids).logits) and len(twin.mixer.out_proj) == 1


class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@torch.no_grad()
@pytest.mark.parametrize("name", ["zamba2-tiny", "samba-tiny"])
def test_a_sharded_model_generates_and_steps(name, mesh):
    from torch.distributed.fsdp import fully_shard

    ids = torch.randint(1, 256, (2, 6))
    model = zoo.build(name).eval()
    want, step = model.generate(ids, 5), model.step(ids[:, 0], model.init_state(2))
    for block in dict.fromkeys(model.backbone.layers):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert torch.equal(model.generate(ids, 5), want)
    torch.testing.assert_close(model.step(ids[:, 0], model.init_state(2)), step)

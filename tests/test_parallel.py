"""Wrappers that average gradients or shard weights (DDP, FSDP2): two processes train as one, whatever the model shares."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist

import hybridzoo as zoo

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

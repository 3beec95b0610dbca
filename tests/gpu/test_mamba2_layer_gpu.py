"""A Mamba-2 layer as one node of autograd on a GPU: when it is taken, its numbers, what it keeps, and under what surrounds a training step."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from layer_runs import error, four_rows, run
from torch import nn
from torch.utils.checkpoint import checkpoint

import hybridzoo as zoo
from hybridzoo.kernels import dispatch
from hybridzoo.kernels import mamba2_layer as cuda_mamba2
from hybridzoo.kernels.conv import op as conv_op
from hybridzoo.kernels.norm import gated
from hybridzoo.kernels.ssd import op as ssd_op
from hybridzoo.layers import Mamba2, RMSNorm
from hybridzoo.zoo.models.block import Stream
from hybridzoo.zoo.train.captured_step import CapturedStep

pytestmark = pytest.mark.gpu

BF16, F16, D, B = torch.bfloat16, torch.float16, 768, 4


@contextlib.contextmanager
def by_parts():
    """A call for each part of a layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mamba2, "_as_one", lambda self, x: None)
        yield


@pytest.fixture
def nodes(monkeypatch):
    """One entry for every layer that ran as one node."""
    found, forward = [], cuda_mamba2._Layer.forward
    monkeypatch.setattr(cuda_mamba2._Layer, "forward", lambda *args: found.append(1) or forward(*args))
    return found


CASES = {
    "autocast": {"autocast": BF16},
    "float16 autocast": {"autocast": F16},
    "float32": {},
    "bfloat16": {"dtype": BF16},
    "biases": {"bias": True, "autocast": BF16},
    "groups": {"ngroups": 4, "autocast": BF16},
    "the norm first": {"norm_before_gate": True, "autocast": BF16},
    "no norm": {"rmsnorm": False, "autocast": BF16},
    "a skip per channel, limits": {"D_has_hdim": True, "dt_limit": (0.01, 0.05), "dtype": BF16},
    "packed": {"seq": "packed", "autocast": BF16},
    "packed, no norm": {"seq": "packed", "rmsnorm": False, "dtype": BF16},
    "padded": {"seq": "padded", "dtype": BF16},
    "odd channels": {"d_model": 333, "expand": 1, "headdim": 37, "d_state": 50, "autocast": BF16, "l": 257},
    "16 states": {"d_state": 16, "headdim": 32, "autocast": BF16},
    "256 states": {"d_state": 256, "autocast": BF16},
    "multipliers around": {"in_multiplier": 0.5, "out_multiplier": 2.0, "autocast": BF16},
    "one token": {"l": 1, "autocast": BF16},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_numbers(case, nodes):
    options = dict(case)
    l, kind, autocast = options.pop("l", 513), options.pop("seq", None), options.pop("autocast", None)
    layer = Mamba2(**{"d_model": 256, **options}, device="cuda")
    for name, p in layer.named_parameters():
        if p.dim() == 1 and name not in layer.fp32_parameters:
            nn.init.uniform_(p, 0.5, 1.5)
    x, seq = torch.randn(B, l, layer.in_proj.in_features, device="cuda", dtype=options.get("dtype")), four_rows(kind, l)
    y, grads = run(layer, x, seq, autocast)
    # what is in the allocator's memory must not show
    torch.full((1 << 28,), float("nan"), device="cuda")
    _, again = run(layer, x, seq, autocast)
    assert len(nodes) == 2 and all(torch.equal(grads[name], again[name]) for name in grads)
    with by_parts():
        parts_y, parts = run(layer, x, seq, autocast)
    valid = slice(None) if seq is None else seq.valid
    assert len(nodes) == 2 and torch.equal(y[valid], parts_y[valid])
    with pytest.MonkeyPatch.context() as patch:
        for module, plain in ((ssd_op, "chunked"), (conv_op, "chunked"), (gated, "torch")):
            patch.setattr(module, "choose", lambda op, plain=plain, **facts: dispatch.TABLES[op][plain])
        patch.setattr(Mamba2, "_as_one", lambda self, x: None)
        _, want = run(copy.deepcopy(layer).double(), x.double(), seq)
    for name, g in grads.items():
        assert (g.dtype, g.shape) == (parts[name].dtype, parts[name].shape), name
        assert error(g, want[name]) <= 1.1 * error(parts[name], want[name]) + 1e-6, name


def test_gradients_of_float32_weights_are_not_rounded_to_bfloat16():
    layer, x = Mamba2(256, device="cuda"), torch.randn(B, 513, 256, device="cuda")
    _, grads = run(layer, x, autocast=BF16)
    for name in ("in_proj.weight", "out_proj.weight"):
        assert not torch.equal(grads[name], grads[name].bfloat16().float())


def autocast_loss(layer, x):
    with torch.autocast("cuda", BF16):
        return layer(x).float().square().mean()


def test_when_it_is_taken(nodes, monkeypatch):
    layer, x = Mamba2(D, device="cuda"), torch.randn(B, 64, D, device="cuda")

    def taken(run=autocast_loss):
        nodes.clear()
        run(layer, x)
        return len(nodes)

    assert taken() == 1
    with torch.no_grad():
        assert taken() == 0
    assert taken(lambda layer, x: layer(x, return_state=True)) == 0
    assert taken(lambda layer, x: layer(x, layer.init_state(B))) == 0
    assert taken(lambda layer, x: checkpoint(autocast_loss, layer, x, use_reentrant=False)) == 1
    assert taken(lambda layer, x: layer(x[:0])) == 0
    handle = layer.norm.register_forward_hook(lambda *_: None)
    assert taken() == 0
    handle.remove()
    monkeypatch.setenv(dispatch.ENV, "chunked")
    assert taken() == 0
    monkeypatch.delenv(dispatch.ENV)
    layer.requires_grad_(False)
    assert taken() == 0
    x.requires_grad_()
    assert taken() == 1


def test_errors_are_those_of_the_parts():
    layer = Mamba2(D, device="cuda")
    for x in (torch.randn(B, 9, D + 1, device="cuda"), torch.randn(B, 9, D, device="cuda", dtype=BF16)):
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|same dtype"):
            layer(x)
    layer.D.data = layer.D.data.cpu()
    with pytest.raises(ValueError, match="D is on cpu"):
        layer(torch.randn(B, 9, D, device="cuda"))


def test_a_compiled_layer_is_traced_through_its_parts(nodes):
    layer, x = Mamba2(256, device="cuda"), torch.randn(B, 64, 256, device="cuda")
    want = autocast_loss(layer, x)
    got = torch.compile(autocast_loss, fullgraph=True)(layer, x)
    got.backward()
    assert nodes == [1] and torch.allclose(got, want, rtol=1e-2)


class Branch(nn.Module):
    """A norm, a layer, and the residual stream past both."""

    def __init__(self, d):
        super().__init__()
        self.norm, self.mixer = RMSNorm(d, device="cuda"), Mamba2(d, device="cuda")

    def forward(self, x, seq=None):
        h, past = self.norm(x, BF16, branch=True)
        return past + self.mixer(h, seq=seq)


def bytes_now(when="current"):
    torch.cuda.synchronize()
    # what was asked for: blocks of the allocator may be larger
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def kept_and_peak(branch, l):
    x = torch.randn(B, l, D, device="cuda", requires_grad=True)
    before = bytes_now()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", BF16):
        y = branch(x)
    held = bytes_now() - before - y.untyped_storage().nbytes()
    y.sum().backward()
    del y
    highest = bytes_now("peak") - before
    x.grad = None
    branch.zero_grad()
    return held, highest, bytes_now() - before


def test_bytes_kept_per_token():
    branch = Branch(D)
    layer = branch.mixer
    found = []
    for way in (contextlib.nullcontext, by_parts):
        with way():
            # what the first products of a thread take and keep is not ours to count
            *_, less, more = (kept_and_peak(branch, l) for l in (1024, 1024, 1024, 2048))
        assert less[2] == more[2] == 0
        found += [(b - a) / (B * 1024) for a, b in zip(less[:2], more[:2], strict=True)]
    held, highest, held_by_parts, highest_by_parts = found
    # the projection alone; parts keep the outputs of convolution, scan and norm, and states at least
    assert held == pytest.approx(2 * layer.in_proj.out_features, abs=1)
    assert held_by_parts >= held + 2 * (layer.d_xBC + 2 * layer.d_ssm)
    # gradients of all slices have room from the start, in one node; parts make it as they go
    assert highest <= highest_by_parts + 2 * layer.in_proj.out_features


def test_nothing_of_a_backward_that_is_done_stays_until_the_graph_goes():
    branches = nn.Sequential(*(Branch(D) for _ in range(4)))
    for _ in range(2):
        before = bytes_now()
        with torch.autocast("cuda", BF16):
            loss = branches(torch.randn(B, 1024, D, device="cuda")).sum()
        loss.backward()
        branches.zero_grad()
        held = bytes_now() - before
        del loss
    # a residual stream would be 4 bytes for each of these, a norm 2
    assert held < B * 1024 * D


def test_a_model_takes_it_and_steps_in_a_graph_alike(nodes):
    model = zoo.build("mamba2-tiny", device="cuda").train()
    layers = [m for m in model.modules() if type(m) is Mamba2]
    ids = torch.randint(0, model.cfg.vocab_size, (2, 70), device="cuda")
    with torch.autocast("cuda", BF16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    loss = loss.detach()  # a recording must not find nodes of another stream
    assert len(nodes) == len(layers) > 0
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    step = CapturedStep(model, ids, autocast=BF16)
    assert torch.equal(step(ids), loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant):
    torch.manual_seed(0)
    branch = zoo.build("mamba2-tiny", device="cuda").train().backbone.layers[0]
    x = torch.randn(2, 70, branch.norm.d, device="cuda", requires_grad=True)

    def run(x):
        with torch.autocast("cuda", BF16):
            return branch(Stream(x, 2 * x), None, None, False)[0].sum()

    results = []
    for way in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        y = way(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in branch.parameters())])
        x.grad = None
        branch.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_sharded_model(nodes, tmp_path):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = zoo.build("mamba2-tiny", device="cuda").train()
    twin, ids = copy.deepcopy(model), torch.randint(0, model.cfg.vocab_size, (2, 70), device="cuda")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mixed = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
        for block in twin.backbone.layers:
            fully_shard(block, mp_policy=mixed)
        fully_shard(twin, mp_policy=mixed)
        loss = twin(ids, labels=ids).loss
        loss.backward()
        assert len(nodes) == len(twin.backbone.layers)
        exact = model(ids, labels=ids).loss
        exact.backward()
        assert torch.allclose(loss, exact, rtol=1e-2)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            # all parameters in bfloat16, rates and offsets of step sizes too: 0.033 with PyTorch's operations on a CPU
            assert error(q.grad.full_tensor(), p.grad.double()) < 0.08, name
    finally:
        dist.destroy_process_group()

"""Steps of whole blocks in a few launches equal those part by part: on the CPU, by PyTorch operations that are asked for."""

import copy
import shutil

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.kernels import dispatch
from hybridzoo.kernels.attend import cuda as attend
from hybridzoo.kernels.few import cuda as few
from hybridzoo.kernels.few import op
from hybridzoo.kernels.step import cuda as update
from hybridzoo.layers import attend_token, fused
from hybridzoo.layers.mamba import Mamba
from hybridzoo.zoo.models import block as blocks

CFG = {
    "task": "causal_lm",
    "vocab_size": 50,
    "d_model": 32,
    "tie_embeddings": False,
    "norm": {"type": "rmsnorm", "eps": 1e-6},
}
MIXERS = {
    "mamba": {"type": "mamba"},
    "mamba, biases": {"type": "mamba", "bias": True, "conv_bias": False, "d_state": 4, "d_conv": 3, "dt_rank": 5},
    "mamba, jamba's norms": {"type": "mamba", "bcdt_norm": True},
    "mamba, falcon's norms": {"type": "mamba", "bcdt_norm": True, "bcdt_norm_affine": False},
    "mamba2": {"type": "mamba2", "headdim": 8, "d_state": 16},
    "mamba2, groups": {"type": "mamba2", "headdim": 8, "d_state": 16, "ngroups": 2, "norm_before_gate": True, "bias": True},
    "mamba2, no norm": {"type": "mamba2", "headdim": 8, "d_state": 16, "rmsnorm": False, "D_has_hdim": True},
    "mamba2, an mlp": {"type": "mamba2", "headdim": 8, "d_state": 16, "d_ssm": 32, "dt_limit": [0.01, 0.1], "out_multiplier": 0.5},
    "mamba2, an mlp, no norm": {"type": "mamba2", "headdim": 8, "d_ssm": 32, "rmsnorm": False},
    "mlp": {"type": "mlp", "d_intermediate": 24, "gate_multiplier": 0.7, "out_multiplier": 1.5},
    "mlp, plain": {"type": "mlp", "d_intermediate": 24, "gated": False, "activation": "relu2", "bias": True},
    "attention": {"type": "attention", "nheads": 4, "nheads_kv": 2},
    "attention, more": {
        "type": "attention", "nheads": 4, "d_conv": 3, "qk_norm": True, "window": 5, "qkv_bias": True, "out_bias": True, "key_multiplier": 0.8,
    },
}  # fmt: skip


@pytest.fixture
def forced(monkeypatch):
    """Products by PyTorch operations; counts the blocks that take a step as a whole."""
    taken = []
    monkeypatch.setenv("HYBRIDZOO_BACKEND", "torch")
    monkeypatch.setattr(blocks, "fused_step", lambda m, *a: taken.append(type(m).__name__) or fused.fused_step(m, *a))
    return taken


def both_ways(model, monkeypatch, ids=None):
    """Logits and states after some tokens: part by part, then in few launches."""
    ids = torch.randint(0, 50, (3, 7)) if ids is None else ids
    found = []
    for backend in (None, "torch"):
        monkeypatch.setenv("HYBRIDZOO_BACKEND", backend) if backend else monkeypatch.delenv("HYBRIDZOO_BACKEND")
        found.append(stepped(model, ids))
    return found


def stepped(model, ids):
    state = model.init_state(len(ids), 20)
    logits = torch.stack([model.step(column, state) for column in ids.unbind(1)], 1)
    return [logits, *leaves(state)]


def leaves(state):
    found = []
    state.map(lambda t: found.append(t) or t)
    return found


def close(found, tolerance):
    for x, y in zip(*found, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.list_models("*-tiny", task="causal_lm"))
def test_a_model_steps_as_it_does_part_by_part(name, forced, monkeypatch):
    torch.manual_seed(0)
    model = zoo.build(name, dtype=torch.float64).eval()
    close(both_ways(model, monkeypatch), 1e-10)
    # so that nobody is left out unseen
    apart = [why for block, s in zip(model.backbone.blocks, model.init_state(3, 9).layers, strict=True)
             if (why := block.why_apart(torch.zeros(3, model.cfg.d_model, dtype=torch.float64), s)) is not None]  # fmt: skip
    assert len(apart) + len(forced) / 7 >= len(model.backbone.blocks)
    allowed = ("MoE", "no such step", "reads or writes more", "scales", "adapter", "different types")
    assert all(any(word in why for word in allowed) for why in apart), apart


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("name", MIXERS)
def test_every_option_of_a_mixer(name, norm, forced, monkeypatch):
    torch.manual_seed(0)
    cfg = CFG | {
        "layers": "m * 2",
        "mixers": {"m": MIXERS[name]},
        "residual_multiplier": 0.6,
        "norm": {"type": norm, "eps": 1e-4},
    }
    model = zoo.build(cfg, dtype=torch.float64).eval()
    for p in model.parameters():
        p.add_(0.2 * torch.rand_like(p))
    close(both_ways(model, monkeypatch), 1e-9)
    assert len(forced) == 14
    close(both_ways(model.float(), monkeypatch), 2e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "mamba, jamba's norms"])
def test_more_rows_than_step_sizes_are_formed_for_in_the_kernel(name, forced, monkeypatch):
    torch.manual_seed(0)
    model = zoo.build(CFG | {"layers": "m", "mixers": {"m": MIXERS[name]}}, dtype=torch.float64).eval()
    ids = torch.randint(0, 50, (9, 4))
    found = both_ways(model, monkeypatch, ids)
    close(found, 1e-10)
    fewer = both_ways(model, monkeypatch, ids[:3])
    close([[x[:3] for x in found[1]], fewer[1]], 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("wide", [False, True])
def test_half_precision_loses_nothing_by_it(wide, forced, monkeypatch):
    torch.manual_seed(0)
    names = ("mamba", "mamba2", "mlp", "attention", "mamba, jamba's norms")
    cfg = CFG | {
        "layers": "a b c d e",
        "mixers": dict(zip("abcde", map(MIXERS.get, names), strict=True)),
        "residual_in_fp32": wide,
    }
    model = zoo.build(cfg, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 50, (3, 9))
    step_by_step, together = both_ways(model, monkeypatch, ids)
    exact = both_ways(copy.deepcopy(model).double(), monkeypatch, ids)[0]
    assert len(forced) == 2 * 5 * 9
    for x, y, z in zip(step_by_step, together, exact, strict=True):
        assert x.dtype == y.dtype
        if x.is_floating_point():
            assert (y - z).norm() <= 1.3 * (x - z).norm() + 1e-3 * z.norm()


@torch.no_grad()
def test_what_is_put_around_a_part_is_called(forced, monkeypatch):
    torch.manual_seed(0)
    cfg = CFG | {
        "layers": "m n o p",
        "mixers": {x: MIXERS[y] for x, y in zip("mnop", ("mamba", "mamba2", "mlp", "attention"), strict=True)},
    }
    model = zoo.build(cfg, dtype=torch.float64).eval()
    blocks, x = model.backbone.blocks, torch.zeros(2, 32, dtype=torch.float64)
    state = model.init_state(2, 9)

    def why(at=0, x=x, state=state):
        return blocks[at].why_apart(x, state.layers[at])

    assert [why(at) for at in range(4)] == [None] * 4 and model.backbone.why_head_apart(x, model.lm_head) is None

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for at, name in ((0, "dt_proj"), (0, "x_proj"), (1, "in_proj"), (2, "fc2"), (3, "out_proj")):
        part = getattr(blocks[at].mixer, name)
        handle = part.register_forward_hook(lambda *_: None)
        assert "has hooks" in why(at)
        handle.remove()
        part.forward = part.forward
        assert "a forward of its own" in why(at)
        del part.forward
        other = Doubled(part.in_features, part.out_features, part.bias is not None, dtype=torch.float64)
        setattr(blocks[at].mixer, name, other)
        assert "is of type Doubled" in why(at)
        setattr(blocks[at].mixer, name, part)
        assert why(at) is None
    blocks[1].mixer.norm.register_forward_hook(lambda *_: None)
    assert why(1) == "norm has hooks, or a forward of its own"
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert why() == "there are hooks on all modules"
    handle.remove()
    blocks[2].mixer.step = lambda x, state: x
    assert why(2) == "MLP has no such step"
    blocks[3].norm = torch.nn.Identity()
    assert why(3) == "the norm is none of ours, or has hooks"
    with torch.autocast("cpu", torch.bfloat16):
        assert why() == "autocast chooses the types"
    with torch.enable_grad():
        assert why() == "gradients are asked for"
        blocks[0].requires_grad_(False)
        assert why() is None
    assert "different types" in why(x=x.half()) and "keeps the convolution's" in why(
        state=model.init_state(2, 9, dtype=torch.float32)
    )
    blocks[0].mixer.out_proj.float()
    assert "different types" in why()
    monkeypatch.delenv("HYBRIDZOO_BACKEND")
    assert "got cpu" in why(1)


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_blocks_by_the_kernels_themselves(emulated, forced, monkeypatch):
    """The kernels read what blocks hand them where it lies: slices of other products, states, and a stream of another type."""
    torch.manual_seed(0)
    names = ("mamba", "mamba2", "mlp", "attention")
    cfg = CFG | {
        "layers": "a b c d",
        "mixers": dict(zip("abcd", map(MIXERS.get, names), strict=True)),
        "residual_in_fp32": True,
    }
    model = zoo.build(cfg, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 50, (2, 2))
    exact = both_ways(copy.deepcopy(model).double(), monkeypatch, ids)[0]
    _, plain = both_ways(model, monkeypatch, ids)
    asked = []

    def emulated_as(op, run, misfit=lambda i: None):
        ours = dispatch.Backend("cuda", "emulated", run=lambda i, *a: asked.append((op, misfit(i))) or run(i, *a))
        monkeypatch.setitem(dispatch.TABLES, op, {"cuda": ours})

    emulated_as("step_linear", few.step_linear, few.misfit)
    emulated_as("step_attention", attend.step_attention, attend.misfit)
    emulated_as("update", update.update)
    monkeypatch.setattr(op, "_fits", lambda *call: None)
    for module in (few, attend):
        monkeypatch.setattr(module, "refuse", lambda facts: None)
    for module in (few, update):
        monkeypatch.setattr(module, "processors", lambda device: 2)  # fewer threads to emulate
    attend_token._pays.cache_clear()
    found = stepped(model, ids)
    attend_token._pays.cache_clear()
    # but for x_proj, which a GPU alone hands on
    assert asked.count(("step_linear", None)) == 2 * (2 + 2 + 2 + 2 + 1)
    assert asked.count(("update", None)) == 2 * 2 and asked.count(("step_attention", None)) == 2
    for x, y, z in zip(plain, found, exact, strict=True):
        assert x.dtype == y.dtype
        if x.is_floating_point():
            assert (y.double() - z).norm() <= 1.3 * (x.double() - z).norm() + 1e-3 * z.double().norm()


@torch.no_grad()
def test_attention_between_the_projections_gives_way_where_it_must(forced, monkeypatch):
    attention, calls = zoo.layers.Attention(32, 4, qk_norm=True, dtype=torch.float64), []
    asked = attend_token.step_attention
    monkeypatch.setattr(attend_token, "step_attention", lambda *a, **k: calls.append(1) or asked(*a, **k))
    x = torch.randn(2, 32, dtype=torch.float64)

    def taken():
        before = len(calls)
        attention.step(x, attention.init_state(2, 4))
        return len(calls) > before

    assert taken()
    attention.requires_grad_(True)
    with torch.enable_grad():
        assert not taken()
    handle = attention.k_norm.register_forward_hook(lambda *_: None)
    assert not taken()
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken()
    monkeypatch.setenv("HYBRIDZOO_BACKEND", "math")
    assert not taken()
    monkeypatch.delenv("HYBRIDZOO_BACKEND")
    assert not taken()


class Mine(Mamba):
    def step(self, x, state):
        return x


@torch.no_grad()
def test_a_derived_mixer_takes_its_own_step(forced):
    model = zoo.build(CFG | {"layers": "m", "mixers": {"m": MIXERS["mamba"]}}).eval()
    block = model.backbone.blocks[0]
    block.mixer.__class__ = Mine
    assert block.why_apart(torch.zeros(2, 32), model.init_state(2).layers[0]) == "Mine has no such step"
    model.step(torch.tensor([1, 2]), model.init_state(2))
    assert not forced

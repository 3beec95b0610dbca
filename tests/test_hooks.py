"""Hooks on modules: they run for every token, whichever way it is read, and see the same shapes."""

import pytest
import torch
from torch import nn

import hybridzoo as zoo
from hybridzoo.layers.base import Mixer
from hybridzoo.zoo.models.block import Stream
from hybridzoo.zoo.models.causal_lm import CausalLMOutput

CFG = {
    "vocab_size": 60, "d_model": 32, "layers": "mamba attention@a mamba2 + mlp attention@a moe", "tie_embeddings": False,
    "mixers": {
        "mamba": {"type": "mamba", "d_state": 4, "bcdt_norm": True}, "mamba2": {"type": "mamba2", "d_state": 8, "headdim": 8},
        "attention": {"type": "attention", "nheads": 4, "adapter_rank": 2, "d_conv": 3}, "mlp": {"type": "mlp", "d_intermediate": 32},
        "moe": {"type": "moe", "d_intermediate": 16, "num_experts": 4},
    },
    "norm": {"type": "rmsnorm", "eps": 1e-6},
}  # fmt: skip
PLACES = [
    "", "backbone", "backbone.embedding", "backbone.norm_f", "lm_head", "backbone.layers.0", "backbone.layers.0.norm",
    "backbone.layers.0.mixer", "backbone.layers.0.mixer.conv1d", "backbone.layers.0.mixer.out_proj", "backbone.layers.0.mixer.dt_norm",
    "backbone.layers.1.mixer.conv1d", "backbone.layers.2", "backbone.layers.2.mixer.branches.0", "backbone.layers.2.mixer.branches.0.norm",
    "backbone.layers.3", "backbone.layers.3.mixer.adapter", "backbone.layers.3.mixer.in_proj", "backbone.layers.4.mixer.router",
]  # fmt: skip
N = 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = zoo.build(CFG, dtype=torch.float64).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(3)
    return model


def pushed(x):
    return x + torch.linspace(-30, 30, x.shape[-1], dtype=x.dtype).roll(7)


class Steer:
    """A forward hook that changes every token, and notes the shapes that it saw."""

    def __init__(self):
        self.shapes = []

    def __call__(self, module, inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(output, CausalLMOutput):
            self.shapes.append(output.logits.shape)
            output._logits = pushed(output.logits)
            return None
        x = first.sum() if isinstance(first, Stream) else first
        self.shapes.append(x.shape)
        new = Stream(pushed(x)) if isinstance(first, Stream) else pushed(x)
        return (new, *output[1:]) if isinstance(output, tuple) else new


def reread(model, ids):
    """Greedy tokens and logits, every one from a forward over the whole text."""
    logits = []
    for _ in range(N):
        logits.append(model(ids).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return ids, torch.stack(logits, 1)


def stepped(model, ids):
    """The same by ``step``, from the first token on."""
    state, logits = model.init_state(ids.shape[0]), []
    for t in range(ids.shape[1] - 1):
        logits.append(model.step(ids[:, t], state))
    return torch.stack(logits[-N:], 1)


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES, ids=lambda p: p or "model")
def test_a_hook_acts_on_every_token(model, place):
    ids = torch.randint(0, 60, (2, 7))
    plain, steer = reread(model, ids)[1], Steer()
    handle = model.get_submodule(place).register_forward_hook(steer)
    want, logits = reread(model, ids)
    assert (logits - plain).abs().max() > 1e-3
    steer.shapes.clear()
    assert torch.equal(model.generate(ids, N), want)
    # a prompt and N - 1 tokens, and nothing but rows of tokens
    tokens = {shape[1] if len(shape) > 2 else shape[0] // 2 for shape in steer.shapes}
    assert len(steer.shapes) % N == 0 and tokens <= {7, 1}
    torch.testing.assert_close(stepped(model, want), logits, atol=1e-8, rtol=1e-8)
    handle.remove()
    torch.testing.assert_close(stepped(model, ids), model(ids).logits[:, -1 - N : -1], atol=1e-8, rtol=1e-8)


KINDS = {
    "pre": lambda m, f: m.register_forward_pre_hook(lambda m, args: f()),
    "pre-first-kwargs": lambda m, f: m.register_forward_pre_hook(
        lambda m, args, kwargs: f(), with_kwargs=True, prepend=True
    ),
    "always": lambda m, f: m.register_forward_hook(lambda *_: f(), always_call=True),
    "kwargs": lambda m, f: m.register_forward_hook(lambda *_: f(), with_kwargs=True),
    "global": lambda m, f: nn.modules.module.register_module_forward_hook(lambda at, *_: f() if at is m else None),
    "global-pre": lambda m, f: nn.modules.module.register_module_forward_pre_hook(
        lambda at, _: f() if at is m else None
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("place", ["backbone.layers.2", "backbone.layers.2.mixer"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_hook_runs_for_every_token_until_it_is_removed(model, kind, place, monkeypatch):
    ids, calls, steps = torch.randint(0, 60, (1, 3)), [], []
    step = Mixer.step
    monkeypatch.setattr(Mixer, "step", lambda self, *a: steps.append(1) or step(self, *a))
    out = model(ids)
    assert model.step(ids[:, 0], out.state).shape == (1, 60) and steps  # as without hooks
    handle = KINDS[kind](model.get_submodule(place), lambda: calls.append(1))
    steps.clear()
    for _ in range(3):
        model.step(ids[:, 0], out.state)
    assert len(calls) == 3 and not steps
    model.generate(ids, 4)
    assert len(calls) == 7
    handle.remove()
    model.generate(ids, 3)
    assert len(calls) == 7 and steps


def test_gradients_of_hooked_modules_pass_through_steps(model):
    seen = []
    for block in model.backbone.layers:
        block.mixer.register_full_backward_hook(lambda *_: seen.append(1))
    state = model.init_state(1)
    model.step(torch.tensor([3]), state).sum().backward()
    assert len(seen) == 5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["full", "pre", "global"])
def test_backward_hooks_of_blocks_see_the_gradients_of_the_stream(model, kind, checkpointing):
    ids, parameters, passed = torch.randint(0, 60, (2, 6)), list(model.parameters()), []

    def hold(block, args, output):
        passed.append(output[0].sum())
        return Stream(passed[-1]), *output[1:]

    handles = [block.register_forward_hook(hold) for block in model.backbone.layers]
    loss = model(ids, labels=ids).loss
    want = torch.autograd.grad(loss, passed, retain_graph=True)
    weights = torch.autograd.grad(loss, parameters, allow_unused=True)
    for handle in handles:
        handle.remove()
    seen, blocks = {}, list(model.backbone.layers)

    def note(module, *gradients):
        if module in blocks:
            seen[blocks.index(module)] = gradients[-1][0]

    if kind == "global":
        handles = [nn.modules.module.register_module_full_backward_hook(note)]
    else:
        name = {"full": "register_full_backward_hook", "pre": "register_full_backward_pre_hook"}[kind]
        handles = [getattr(block, name)(note) for block in blocks]
    model.train().gradient_checkpointing_enable(checkpointing)
    loss = model(ids, labels=ids).loss
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    for handle in handles:
        handle.remove()
    assert sorted(seen) == [0, 1, 2, 3, 4]
    torch.testing.assert_close([seen[i] for i in range(5)], list(want))
    torch.testing.assert_close([x for x in got if x is not None], [x for x in weights if x is not None])


def test_norms_with_hooks_read_and_give_one_tensor(model):
    seen, ids = {}, torch.randint(0, 60, (1, 4))
    want = model(ids, output_hidden_states=True)
    for name, module in model.named_modules():
        if name.endswith(("layers.2.norm", "norm_f")):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
    got = model(ids)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(seen["backbone.layers.2.norm"][0], want.hidden_states[2])
    assert torch.equal(seen["backbone.norm_f"][1], want.hidden)


class Doubled(nn.Module):
    """What somebody puts in a block's place; it cannot step."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        stream, *rest = self.inner(*args, **kwargs)
        return Stream(2 * stream.sum()), *rest


class Halved(Doubled):
    def forward(self, x, *args, **kwargs):
        return self.inner(x / 2, *args, **kwargs)


@torch.no_grad()
def test_what_stands_in_the_place_of_a_part_is_called(model):
    layers, ids = model.backbone.layers, torch.randint(0, 60, (2, 4))
    plain = reread(model, ids)[1]
    layers[0] = Doubled(layers[0])
    layers[2].mixer = Halved(layers[2].mixer)
    layers[4].norm = nn.RMSNorm(32, eps=1e-6, dtype=torch.float64)
    inner = layers[1].forward
    layers[1].forward = lambda *args, **kwargs: inner(*args, **kwargs)  # as accelerate does
    want, logits = reread(model, ids)
    assert (logits - plain).abs().max() > 1e-3
    assert torch.equal(model.generate(ids, N), want)


def test_a_recorded_step_says_that_it_runs_no_hooks(model):
    ids = torch.zeros(1, 4, dtype=torch.long)
    for place in ("", "backbone.layers.0.mixer.in_proj"):
        handle = model.get_submodule(place).register_forward_hook(lambda *_: None)
        with pytest.raises(
            ValueError, match=f"there are hooks, on {place or 'the model'} for one, and a replayed graph runs none"
        ):
            zoo.CapturedStep(model, ids)
        handle.remove()
    model.lm_head.weight.register_hook(lambda g: g)
    with pytest.raises(ValueError, match=r"there are hooks, on lm_head.weight for one"):
        zoo.CapturedStep(model, ids)

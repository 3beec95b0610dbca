"""A projection inside a layer is a module that does its own arithmetic: whatever computes the same may stand in its place."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import HRAConfig, IA3Config, LoraConfig, get_peft_model
from torch import nn

import hybridzoo as zoo
from hybridzoo.layers import MLP, Attention, Mamba, Mamba2, one_node
from hybridzoo.layers import mamba as mamba_module
from hybridzoo.layers.mamba import StepProjection
from hybridzoo.zoo.hf import HybridZooForCausalLM

LAYERS = {
    "mamba": lambda: Mamba(16, bcdt_norm=True, bias=True),
    "mamba2": lambda: Mamba2(16, d_state=8, headdim=8, d_ssm=16, bias=True),
    "attention": lambda: Attention(16, nheads=2, d_conv=3, qkv_bias=True, adapter_rank=2),
    "mlp": lambda: MLP(16, 24, adapter_rank=2),
}


class Opaque(nn.Module):
    """A linear layer as a quantiser leaves it: what the numbers are is known to its forward alone."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = [linear.weight.detach().clone(), None if linear.bias is None else linear.bias.detach().clone()]
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return nn.functional.linear(x, *self.packed)


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    layer = LAYERS[request.param]()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # as training moves them
    return layer


def by_steps(layer, x):
    state = layer.init_state(x.shape[0], x.shape[1])
    return torch.stack([layer.step(t, state) for t in x.unbind(1)], 1)


@pytest.mark.parametrize("stand_in", [Opaque, lambda old: nn.Linear(old.in_features, old.out_features)])
@torch.no_grad()
def test_every_linear_layer_can_be_replaced(layer, stand_in):
    x = torch.randn(2, 7, 16)
    want, stepped, flops = layer(x), by_steps(layer, x), layer.flops(7)
    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        old = layer.get_submodule(name)
        new = stand_in(old)
        if isinstance(new, nn.Linear):
            new.weight, new.bias = old.weight, old.bias
        layer.set_submodule(name, new)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(by_steps(layer, x), stepped)
    assert len(names) >= 2 and (layer.flops(7) == flops or layer.adapter is not None)


def test_a_step_projection_is_a_linear_layer():
    layer, low = Mamba(16), torch.randn(3, 1)
    steps = layer.dt_proj
    torch.testing.assert_close(steps(low), nn.functional.linear(low, steps.weight, steps.bias))
    half = copy.deepcopy(layer).bfloat16().dt_proj
    want = nn.functional.linear(low.bfloat16(), half.weight).float() + half.bias
    assert half.bias.dtype == torch.float32 and torch.equal(half(low.bfloat16()), want)


def test_called_or_not_makes_no_difference():
    layer, x = Mamba(16), torch.randn(2, 9, 16, requires_grad=True)
    inputs = (x, *layer.parameters())
    want, plain = layer(x), by_steps(layer, x)
    wants = torch.autograd.grad(want.square().sum(), inputs)
    calls = []
    layer.dt_proj.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    got, stepped = layer(x), by_steps(layer, x)
    assert len(calls) == 1 + 9
    for one, other in zip(
        (got, stepped, *torch.autograd.grad(got.square().sum(), inputs)), (want, plain, *wants), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_plain_linear_layer_in_its_place_may_be_cast():
    layer, x = Mamba(16), torch.randn(2, 9, 16)
    old, want = layer.dt_proj, layer(x)
    layer.dt_proj = nn.Linear(old.in_features, old.out_features)
    layer.dt_proj.load_state_dict(old.state_dict())
    got = layer.bfloat16()(x.bfloat16())
    assert layer.dt_proj.bias.dtype == torch.bfloat16 and layer.A_log.dtype == torch.float32
    torch.testing.assert_close(got.float(), want, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", ["x_proj", "dt_proj"])
def test_a_bias_more_or_less_is_counted(name, monkeypatch):
    # where a GPU would take the layer as one node, which knows no such bias
    monkeypatch.setattr(one_node, "ours", lambda *_, **__: True)
    monkeypatch.setattr(mamba_module, "mamba_layer", None)
    layer, x = Mamba(16), torch.randn(1, 5, 16)
    old = layer.get_submodule(name)
    if name == "x_proj":
        layer.x_proj = nn.Linear(old.in_features, old.out_features)
    else:
        old.bias = None
    assert "bias" in layer._why_called() and layer(x).shape == x.shape


@torch.no_grad()
def test_offloaded_weights(layer):
    x = torch.randn(2, 7, 16)
    want = layer(x)
    cpu_offload(layer, execution_device="cpu")
    assert all(p.is_meta for p in layer.parameters())
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("kind", [Mamba, Mamba2, Attention])
@torch.no_grad()
def test_a_convolution_with_a_hook_steps_through_it(kind):
    torch.manual_seed(0)
    options = {Mamba: {}, Mamba2: {"headdim": 8, "d_state": 8}, Attention: {"nheads": 2, "d_conv": 3}}[kind]
    layer, x, calls = kind(16, **options), torch.randn(2, 5, 16), []
    want = by_steps(layer, x)
    layer.conv1d.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[1]))
    torch.testing.assert_close(by_steps(layer, x), want)
    assert calls == [1] * 5
    cpu_offload(layer.conv1d, execution_device="cpu")
    torch.testing.assert_close(by_steps(layer, x), want)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("adapter", ["dora", "ia3", "hra", "lora"])
def test_adapters_of_the_steps_merge(adapter):
    torch.manual_seed(0)
    common = {"task_type": "CAUSAL_LM", "target_modules": ["dt_proj"]}
    config = {
        "lora": lambda: LoraConfig(r=4, **common),
        "dora": lambda: LoraConfig(r=4, use_dora=True, **common),
        "ia3": lambda: IA3Config(feedforward_modules=[], **common),
        "hra": lambda: HRAConfig(r=4, **common),
    }[adapter]()
    ids = torch.arange(1, 33).view(2, 16)
    model = get_peft_model(HybridZooForCausalLM.wrap(zoo.build("mamba-tiny")), config)
    before = model(input_ids=ids).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = model.eval()(input_ids=ids).logits
    merged = model.merge_and_unload()
    assert (want - before).abs().max() > 3e-4
    torch.testing.assert_close(merged(input_ids=ids).logits, want, atol=1e-4, rtol=1e-5)
    assert type(merged.core.backbone.layers[0].mixer.dt_proj) is StepProjection

"""Layers whose weights are no matrices of floating-point numbers, in the places of ours."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import quantize_dynamic

import hybridzoo as zoo
from hybridzoo.zoo.hf import HybridZooForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.ao announces its successor


class Int8Linear(nn.Module):
    """As bitsandbytes and others do: a parameter of integers, and scales beside it; gradients pass to the input."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def replaced(model):
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Int8Linear(module))
    return model


def dynamic(model):
    return quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def embedding_too(model):
    model = dynamic(model)
    embedding = model.backbone.embedding
    small = torch.ao.nn.quantized.Embedding(*embedding.weight.shape)
    scale = embedding.weight.detach().abs().amax(1) / 127
    zeros, axis = torch.zeros_like(scale), 0
    small.set_weight(torch.quantize_per_channel(embedding.weight.detach(), scale, zeros + 128, axis, torch.quint8))
    model.backbone.embedding = small
    return model


@pytest.mark.parametrize("quantised", [dynamic, replaced, embedding_too], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["transformer-tiny", "jamba-tiny", "mamba2attn-tiny", "zamba2-tiny"])
def test_a_quantised_model_scores_and_writes_close_to_the_whole_one(name, quantised):
    torch.manual_seed(0)
    model, ids = zoo.build(name).eval(), torch.randint(1, 256, (2, 12))
    small, want = quantised(model), model(ids, labels=ids)
    got = small(ids, labels=ids)
    assert (got.logits - want.logits).norm() < 0.15 * want.logits.norm()
    assert abs(got.loss - want.loss) < 0.01 * want.loss
    with torch.no_grad():
        assert torch.equal(small(ids, labels=ids).loss, got.loss)
        state = small.init_state(2)
        steps = torch.stack([small.step(ids[:, t].contiguous(), state) for t in range(12)], 1)
        assert (steps - want.logits).norm() < 0.15 * want.logits.norm()
        wrapped, options = (
            HybridZooForCausalLM.wrap(small),
            {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None},
        )
        text = wrapped.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert text.shape == small.generate(ids, 3).shape == (2, 15) and wrapped(ids, labels=ids).loss == got.loss
    assert small.flops(8) == model.flops(8)
    if quantised is replaced:  # gradients pass, as for adapters on top
        got.loss.backward()
        assert model.backbone.norm_f.weight.shape == small.backbone.norm_f.weight.grad.shape
        assert small.backbone.layers[0].norm.weight.grad.abs().max() > 0

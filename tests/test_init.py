"""Untrained models start near the loss of a uniform guess, so that first losses, and what is learned by a step, can be compared."""

import math

import pytest
import torch

import hybridzoo as zoo

TINY = zoo.list_models("*-tiny", "causal_lm")
# a block or two of each kind at the full width stand for all: they are drawn so that their sum hardly depends on their number
WIDE = {
    "mamba-130m": "mamba",
    "mamba-370m": "mamba",
    "mamba-790m": "mamba",
    "mamba-1.4b": "mamba",
    "mamba-2.8b": "mamba",
    "mamba-2.8b-slimpj": "mamba",
    "mamba2-130m": "mamba2",
    "mamba2-370m": "mamba2",
    "mamba2-780m": "mamba2",
    "mamba2-1.3b": "mamba2",
    "mamba2-2.7b": "mamba2",
    "mamba2attn-2.7b": "mamba2 attention",
    "mambaformer-130m": "mamba attention",
    "samba-421m": "mamba mlp attention mlp",
    "transformer-130m": "attention mlp",
    "transformer-370m": "attention mlp",
    "transformer-790m": "attention mlp",
    "transformer-1.4b": "attention mlp",
    "transformer-2.8b": "(attention mlp) * 2",
    "zamba2-1.2b": "mamba2 attention@a mlp@m joined",
}
# too wide to build here: the logits' variance, d_model * initializer_range ** 2, says what they start at
WIDEST = {"jamba-mini", "nvidia-hybrid-8b", "zamba2-2.7b", "zamba2-7b"}


@torch.no_grad()
def start(model):
    """The loss of guessing random next tokens, and the logits' mean variance, and their mean where the token just read stands."""
    model.eval()
    v = model.cfg.vocab_size
    ids = torch.randint(v, (2, 48), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits[..., :v].float()
    own = logits.gather(-1, ids[..., None]).mean().item()
    targets = torch.randint(v, ids.shape, generator=torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    return loss, logits.var(-1).mean().item(), own


def test_every_shipped_model_is_here():
    assert sorted([*TINY, *WIDE, *WIDEST]) == zoo.list_models(task="causal_lm")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("seed", [0, 1])
def test_tiny_models_start_at_a_uniform_guess(name, seed):
    torch.manual_seed(seed)
    loss, _, _ = start(zoo.build(name))
    assert abs(loss - math.log(256)) < 0.1


@pytest.mark.parametrize("name", WIDE)
def test_wide_models_start_near_a_uniform_guess(name):
    cfg = zoo.config(name)
    torch.manual_seed(0)
    model = zoo.build(name, [f"layers={WIDE[name]}", "vocab_size=256", "pad_vocab_size_multiple=1"])
    _, variance, own = start(model)
    # a Gaussian's log-sum-exp over the whole vocabulary, in which the token just read has a logit of its own
    loss = math.log(cfg.vocab_size + math.exp(own)) + variance / 2
    assert loss - math.log(cfg.vocab_size) < 1


@pytest.mark.parametrize("name", sorted(WIDEST))
def test_the_widest_models_start_near_a_uniform_guess(name):
    cfg = zoo.config(name)
    assert cfg.d_model * cfg.initializer_range**2 / 2 < 1

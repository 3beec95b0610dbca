"""Tasks other than language: one that a test registers is built, counted, saved and loaded by what the zoo has for all."""

import dataclasses
import json

import pytest
import torch
from omegaconf import MISSING
from torch import nn

import hybridzoo as zoo
from hybridzoo.zoo.config import ConfigSchema
from hybridzoo.zoo.models.model import Model
from hybridzoo.zoo.models.stats import stats
from hybridzoo.zoo.models.tasks import register_task, task_of
from hybridzoo.zoo.registry import ConfigError


@dataclasses.dataclass
class Schema(ConfigSchema):
    """A language model's keys, and one more."""

    needs = {}  # noqa: RUF012
    n_classes: int = MISSING


@register_task("test_toy")
class Classifier(Model):
    """Classifies rows of vectors: a linear layer in front, the mean of all positions behind."""

    schema = Schema
    head_name = "classifier"

    def make_embedding(self, device, dtype):
        return nn.Linear(3, self.cfg.d_model, device=device, dtype=dtype)

    def make_head(self, device, dtype):
        return nn.Linear(self.cfg.d_model, self.cfg.n_classes, device=device, dtype=dtype)

    def head_flops(self, seq_len):
        return super().head_flops(seq_len) // seq_len

    def forward(self, x):
        return self.head(self.backbone(self.backbone.embed(x))[0].mean(1))


CONFIG = {
    "task": "test_toy", "vocab_size": 2, "d_model": 16, "n_classes": 5, "layers": "mamba mlp",
    "mixers": {"mamba": {"d_state": 4}, "mlp": {"d_intermediate": 24}},
}  # fmt: skip


def test_a_task_is_built_counted_saved_and_loaded_without_a_change_to_the_zoo(tmp_path):
    model = zoo.build(CONFIG, n_classes=7)
    assert (
        type(model) is Classifier is task_of(model.cfg)
        and model.task == "test_toy"
        and zoo.config(CONFIG).n_classes == 5
    )
    x = torch.randn(2, 6, 3)
    y = model(x)
    y.sum().backward()
    assert y.shape == (2, 7) and all(p.grad is not None for p in model.parameters())
    counted = stats(model, 8)
    assert counted.params == model.num_params() and counted.rows[-1].token == "classifier"
    assert counted.flops == model.flops(8) and stats(CONFIG, 8).params < counted.params
    decayed, rest = zoo.param_groups(model)
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))
    again = zoo.load(zoo.save(model, tmp_path))
    assert type(again) is Classifier and again.cfg == model.cfg and torch.equal(again(x), y)
    assert again.cfg.tie_embeddings  # a key that means nothing here stays as it is
    assert "architectures" not in json.loads((tmp_path / "config.json").read_text())
    state = model.init_state(2)
    assert len(state.layers) == 2 and next(iter(model.state_dict())) == "backbone.embedding.weight"


def test_a_task_has_keys_of_its_own_and_a_name_of_its_own():
    with pytest.raises(
        ConfigError,
        match=r"n_classes: is missing\. Every config sets d_model, vocab_size, layers, mixers and n_classes",
    ):
        zoo.config({key: value for key, value in CONFIG.items() if key != "n_classes"})
    with pytest.raises(ConfigError, match="n_classes: unknown key"):
        zoo.config(CONFIG | {"task": "causal_lm"})
    with pytest.raises(ConfigError, match=r"task: unknown value 'test_toyy'\. Did you mean 'test_toy'"):
        zoo.config(CONFIG | {"task": "test_toyy"} | {"n_classes": None})
    with pytest.raises(ValueError, match=r"register_task\('causal_lm'\): the name is taken by .*CausalLM"):
        register_task("causal_lm")(Classifier)


def test_what_is_about_language_says_so_of_other_tasks():
    hf = pytest.importorskip("hybridzoo.zoo.hf")
    with pytest.raises(ValueError, match="HybridZooForCausalLM: cannot be around a model whose task is 'test_toy'"):
        hf.HybridZooForCausalLM.wrap(zoo.build(CONFIG))

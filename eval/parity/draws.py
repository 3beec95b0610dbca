"""The draws of :mod:`.fuzz`: fields of transformers' configs with values for each, and options of ours around a config."""

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...zoo.layout import expand
from .configs import CONFIGS, VOCAB, config_of
from .run import their_model

__all__ = ["ABSENT", "Base", "Options", "edits"]

_ROPES: list[Any] = [
    {}, {"rope_type": "default", "rope_theta": 300.0}, {"rope_theta": 50}, {"rope_theta": None}, {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2.5}, {"rope_type": "default", "type": "linear", "factor": 3.0}, {"type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 100.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
    *({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part} for part in (0.0, 0.25, 0.3, 0.5, 0.75, 1, 1.5, None)),
    {"full_attention": {"rope_type": "default", "rope_theta": 50.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    {"hybrid": {"rope_type": "default", "rope_theta": 50.0}}, {"rope_type": "default", "factor": 4.0, "mrope_section": [2, 2]},
]  # fmt: skip
_WORDS = ["full_attention", "sliding_attention", "linear_attention", "mamba", "attention", "hybrid", "moe", "mlp"]
_PLAIN: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 4, 6, 0.0, 0.5, 2.5, -0.5, "auto", "x", [], [0], [1.5, 0.5], {}]
# what no class declares, and most read or replace something by
_BESIDE = (
    "rope_theta rope_scaling rope_parameters partial_rotary_factor head_dim layer_types layers_block_type num_experts num_local_experts "
    "n_routed_experts sliding_window attention_bias mlp_bias original_max_position_embeddings time_step_limit hybrid_override_pattern "
    "intermediate_size num_hidden_layers mamba_d_ssm attention_multiplier no_rope_layers norm_topk_prob mamba_dt_min mamba_n_groups"
).split()
# without effect on what is computed, or about files; what a class would do with them is not asked
_LEFT = frozenset(
    "architectures auto_map transformers_version model_type dtype torch_dtype per_layer_config quantization_config".split()
)
ABSENT = object()


class Base:
    """An entry of :data:`CONFIGS` as a file in an empty folder, to be edited field by field."""

    def __init__(self, name: str, folder: Path):
        self.config = config_of(name)
        self.family, self.folder = str(self.config.model_type), folder
        their_model(copy.deepcopy(self.config)).save_pretrained(folder)
        architecture = {"architectures": [f"{CONFIGS[name][0]}ForCausalLM"]}
        self.data = json.loads(self.config.to_json_string(use_diff=False)) | architecture


def edits(base: Base) -> Iterator[tuple[str, Any]]:
    """Every field with every value that is tried."""
    layers = int(base.config.num_hidden_layers)
    for name in dict.fromkeys([*base.data, *_BESIDE]):
        if name in _LEFT or name.startswith("_"):
            continue
        value = base.data.get(name)
        pool = _PLAIN if "rope" not in name else [*_ROPES, *_PLAIN]
        if isinstance(value, list) or "layer" in name or "block_type" in name or "pattern" in name:
            pool = [*pool, *([word] * layers for word in (*_WORDS, 0, 1)), [0, 2], [5], "M*M-", "M" * layers]
            if isinstance(value, list) and value:
                words = [v for v in value if isinstance(v, str)]
                pool += [value[::-1], value[1:], [*value, value[0]], [value[0]] * len(value), words]
        if isinstance(value, list) and all(isinstance(v, float) for v in value):
            pool = [*pool, [0.01, 0.05], [0.0, 0.02], [0.03, {"__float__": "Infinity"}], [v * 1.5 for v in value]]
        if isinstance(value, str):
            pool = [*pool, "silu", "gelu", "relu2", "relu", "rope", "nope", "swish"]
        if type(value) in (int, float):
            pool = [*pool, value + 1, value * 2, max(value // 2, 1), float(value)]
        small = not isinstance(value, int) or getattr(type(base.config), name, 10**6) in (None, True, False, *range(17))
        for new in [*pool, *([ABSENT] if name in base.data and small else [])]:
            if (new is ABSENT) != (name in base.data) or new is ABSENT or repr(new) != repr(value):
                yield name, new


# values for our options, by their names; what is not here is varied by its type
_OURS: dict[str, list[Any]] = {
    "d_model": [12, 24, 36, 48], "nheads": [1, 2, 3, 4, 6], "nheads_kv": [None, 1, 2, 3], "headdim": [None, 4, 6, 8, 10, 12],
    "rope": [None, 100.0, 1e4, 5e5], "rotary_dim": [None, 2, 4, 6, 8], "rope_scaling": [None, [8.0, 1.0, 4.0, 16.0], [2.5, 1.0, 4.0, 1.0]],
    "window": [None, 1, 5, 8], "softmax_scale": [None, 0.1, 0.5], "d_conv": [0, 1, 2, 3, 4], "adapter_rank": [0, 2, 5],
    "d_intermediate": [16, 20, 32, 40], "activation": ["silu", "gelu", "relu2", "relu"], "num_experts": [2, 3, 4, 6], "top_k": [1, 2, 3],
    "router": ["softmax_topk", "topk_softmax", "sigmoid"], "num_groups": [1, 2, 3], "top_groups": [1, 2], "routed_scale": [1.0, 0.5, 2.5],
    "d_latent": [None, 8, 16], "num_shared_experts": [0, 1], "d_state": [1, 3, 5, 8], "expand": [1, 2, 3], "dt_rank": [None, 1, 3, 7],
    "d_inner": [None, 24, 36, 48, 60], "d_ssm": [None, 24, 36, 48], "ngroups": [1, 2, 3], "chunk_size": [4, 16, 64],
    "dt_limit": [[0.0, math.inf], [0.001, math.inf], [0.02, 0.1], [0.05, math.inf], [0.0, 0.05]],
    "multipliers": [[1.0] * 5, [0.5, 1.5, 0.8, 1.2, 0.7]], "in_multiplier": [1.0, 0.5, 1.5], "key_multiplier": [1.0, 0.6],
    "out_multiplier": [1.0, 0.7], "gate_multiplier": [1.0, 0.4], "embedding_multiplier": [1.0, 3.0], "residual_multiplier": [1.0, 0.3],
    "logits_multiplier": [1.0, 1 / 3, 0.0625], "eps": [1e-6, 1e-5, 1e-2], "norm_eps": [1e-6, 1e-5, 1e-2],
    "bcdt_norm_eps": [1e-6, 1e-5, 1e-2], "vocab_size": [VOCAB, 64], "type": ["rmsnorm", "layernorm"],
    "pad_vocab_size_multiple": [1, 16], "max_length": [64, 512], "tie_embeddings": [True, False], "residual_in_fp32": [True, False],
}  # fmt: skip
_NOT_OURS = frozenset(
    "task tokenizer initializer_range override mixers layers base aux_loss_coef z_loss_coef backend dt_min dt_max dt_init_floor dt_scale "
    "A_init_range reads writes".split()
)


class Options:
    """Configs drawn around one of ours: one to three options changed, sometimes other layers too.

    What has been refused is drawn less often, so that most of what is drawn can be written.
    """

    def __init__(self, cfg: dict[str, Any], draw: random.Random):
        self.cfg, self.draw = cfg, draw
        # an option of a type of mixer: the same in all mixers of the type
        places = [("", key) for key in cfg if key not in _NOT_OURS] + [("norm", "eps"), ("norm", "type")]
        options = ((spec["type"], key) for spec in cfg["mixers"].values() for key in spec if key != "type")
        places += [(kind, key) for kind, key in options if key not in _NOT_OURS]
        self.odds = {place: 1.0 if place[0] else 0.4 for place in places if _pool(cfg, place)}

    def __next__(self) -> tuple[dict[str, Any], list[str]]:
        cfg, names = copy.deepcopy(self.cfg), []
        for place in self.draw.choices(list(self.odds), list(self.odds.values()), k=self.draw.choice([1, 1, 2, 3])):
            value = self.draw.choice(_pool(cfg, place))
            for spec in _specs(cfg, place[0]):
                if place[1] in spec:
                    spec[place[1]] = value
            names.append("norm" if place[0] == "norm" else place[1])
        if self.draw.random() < 0.3 and "@" not in str(cfg["layers"]):
            blocks = expand(cfg["layers"])
            size = 2 if len(blocks) % 2 == 0 and len(blocks) > 2 else 1
            pairs = [blocks[i : i + size] for i in range(0, len(blocks), size)]
            drawn = self.draw.choices(pairs, k=self.draw.choice([1, 2, 3, 4]))
            cfg["layers"] = [token for pair in drawn for token in pair]
            names.append("layers")
        return cfg, names

    def refused(self, names: list[str]) -> None:
        """Draw these less often, if they were all that was changed."""
        for place in self.odds:
            if len(names) == 1 and names[0] in place:
                self.odds[place] *= 0.3


def _specs(cfg: dict[str, Any], of: str) -> list[dict[str, Any]]:
    if of in ("", "norm"):
        return [cfg["norm"] if of else cfg]
    return [spec for spec in cfg["mixers"].values() if spec["type"] == of]


def _pool(cfg: dict[str, Any], place: tuple[str, str]) -> list[Any]:
    value = next((spec[place[1]] for spec in _specs(cfg, place[0]) if place[1] in spec), None)
    return _OURS.get(place[1], [not value] if isinstance(value, bool) else [])

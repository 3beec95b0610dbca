"""Configs that nobody wrote down: options and fields drawn at random, computed by transformers and by us, and compared.

Two directions. *Edits*: a config of transformers with one field changed, loaded by us, must give transformers' logits, or be refused by
a :class:`CheckpointError` that names the field. *Exports*: a config of ours with some options changed, written by us, must give our
logits in transformers, or be refused by an error that names options. ``zoo bench parity --part fuzz`` runs both for
every family and writes how often each outcome came up; anything but the good ones fails.
"""

import copy
import dataclasses
import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..zoo.build import build
from ..zoo.checkpoint import CheckpointError, export, load
from ..zoo.layout import expand
from ..zoo.registry import ConfigError
from .bench import header, write
from .parity import ratio, redraw
from .parity_cases import CASES, VOCAB

__all__ = [
    "Outcome",
    "edit_outcomes",
    "edits",
    "export_outcomes",
    "fuzz",
    "quiet",
    "theirs",
    "tokens",
    "try_edit",
    "try_export",
]

GOOD = ("equal", "refused", "not judged")
_LIMIT = 1e-4
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
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one try.

    Attributes:
        family: The ``model_type``.
        change: What was changed.
        kind: ``equal``, ``refused`` (the error names what was changed), ``not judged`` (transformers itself cannot),
            ``unnamed`` (refused, but the error does not say why), ``silent`` (other logits) or ``crash`` (any other exception).
        detail: The error, or how far the logits are apart.
    """

    family: str
    change: str
    kind: str
    detail: str = ""


def tokens(vocab: int) -> Tensor:
    """Two rows of 21 tokens: longer than the windows and chunks that are drawn."""
    return torch.randint(0, vocab, (2, 21), generator=torch.Generator().manual_seed(7))


def theirs(config: Any) -> Any:
    """Transformers' model of a config, with weights that make every path matter."""
    from transformers import AutoModelForCausalLM

    return redraw(AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32))


class Base:
    """A config of transformers in a file, to be edited field by field.

    Args:
        name: A key of :data:`CASES`.
        folder: An empty folder.
    """

    def __init__(self, name: str, folder: Path):
        import transformers

        kind, options = CASES[name]
        self.config = getattr(transformers, f"{kind}Config")(**({"vocab_size": VOCAB, "pad_token_id": 0} | options))
        self.family, self.folder = str(self.config.model_type), folder
        self.model = theirs(copy.deepcopy(self.config))
        self.model.save_pretrained(folder)
        self.data = json.loads(self.config.to_json_string(use_diff=False)) | {"architectures": [f"{kind}ForCausalLM"]}


def edits(base: Base) -> Iterator[tuple[str, Any]]:
    """Every field with every value that is tried."""
    layers = int(base.config.num_hidden_layers)
    for name in dict.fromkeys([*base.data, *_BESIDE]):
        if name in _LEFT or name.startswith("_"):
            continue
        value = base.data.get(name)
        pool = _PLAIN if "rope" not in name else [*_ROPES, *_PLAIN]
        if isinstance(value, list) or "layer" in name or "block_type" in name or "pattern" in name:
            pool = [
                *pool,
                *([word] * layers for word in _WORDS),
                [0] * layers,
                [1] * layers,
                [0, 2],
                [5],
                "M*M-",
                "M" * layers,
            ]
            if isinstance(value, list) and value:
                pool += [
                    value[::-1],
                    value[1:],
                    [*value, value[0]],
                    [value[0]] * len(value),
                    [v for v in value if isinstance(v, str)],
                ]
        if isinstance(value, list) and all(isinstance(v, float) for v in value):
            pool = [*pool, [0.01, 0.05], [0.0, 0.02], [0.03, {"__float__": "Infinity"}], [v * 1.5 for v in value]]
        if isinstance(value, str):
            pool = [*pool, "silu", "gelu", "relu2", "relu", "rope", "nope", "swish"]
        if type(value) in (int, float):
            pool = [*pool, value + 1, value * 2, max(value // 2, 1), float(value)]
        small = not isinstance(value, int) or getattr(type(base.config), name, 10**6) in (None, True, False, *range(17))
        for new in [*pool, *([_ABSENT] if name in base.data and small else [])]:
            if (new is _ABSENT) != (name in base.data) or new is _ABSENT or repr(new) != repr(value):
                yield name, new


def try_edit(base: Base, name: str, value: Any, folder: Path) -> Outcome:
    """Change one field: what does transformers compute, and what do we?

    Args:
        base: The config.
        name: The field.
        value: Its new value.
        folder: A new folder.
    """
    change = f"{name} = {'(absent)' if value is _ABSENT else json.dumps(value)}"
    data = {key: v for key, v in base.data.items() if key != name} | ({} if value is _ABSENT else {name: value})
    folder.mkdir()
    expected = None
    try:
        expected = _written_by_transformers(data, folder)
    except Exception as e:
        # any: the classes check little, and fail anywhere
        detail = f"{type(e).__name__}: {e}".splitlines()[0]
        for file in base.folder.glob("*.safetensors"):
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file)
        (folder / "config.json").write_text(json.dumps(data))
    try:
        with torch.no_grad():
            ours = load(folder)
            got = ours(tokens(expected[0])).logits if expected else None
    except CheckpointError as e:
        named = name in str(e).replace(str(folder), "")
        kind = "not judged" if expected is None else "refused" if named else "unnamed"
        return Outcome(base.family, change, kind, str(e).replace(str(folder), ""))
    except Exception as e:
        return Outcome(base.family, change, "crash", f"{type(e).__name__}: {e}".splitlines()[0])
    if expected is None or got is None:
        return Outcome(base.family, change, "not judged", detail)
    return _compared(base.family, change, got, expected[1])


def _written_by_transformers(data: dict[str, Any], folder: Path) -> tuple[int, Tensor] | None:
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(data))
    config = AutoConfig.from_pretrained(folder)
    model = theirs(config)
    vocab = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        logits = model(tokens(vocab), use_cache=False).logits
    if not logits.isfinite().all():
        raise ValueError("logits that are not finite")
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(data))
    return vocab, logits


def _compared(family: str, change: str, got: Tensor, expected: Tensor) -> Outcome:
    if got.shape != expected.shape:
        return Outcome(family, change, "silent", f"shape {tuple(got.shape)}, transformers' {tuple(expected.shape)}")
    apart = ratio(got, expected)
    return Outcome(family, change, "equal" if apart < _LIMIT else "silent", f"{apart:.1e}")


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

    Args:
        cfg: The config, plain data.
        draw: Where numbers come from.
    """

    def __init__(self, cfg: dict[str, Any], draw: random.Random):
        self.cfg, self.draw = cfg, draw
        # an option of a type of mixer: the same in all mixers of the type
        places = [("", key) for key in cfg if key not in _NOT_OURS] + [("norm", "eps"), ("norm", "type")]
        places += [
            (spec["type"], key) for spec in cfg["mixers"].values() for key in spec if key not in (*_NOT_OURS, "type")
        ]
        self.odds = {place: 1.0 if place[0] else 0.4 for place in places if _pool(cfg, place)}

    def __next__(self) -> tuple[dict[str, Any], list[str]]:
        cfg, names = copy.deepcopy(self.cfg), []
        for place in self.draw.choices(list(self.odds), list(self.odds.values()), k=self.draw.choice([1, 1, 2, 3])):
            value = self.draw.choice(_pool(cfg, place))
            for spec in _specs(cfg, place[0]):
                if place[1] in spec:
                    spec[place[1]] = value
            names.append("norm" if place[0] == "norm" else place[1])
        layers = cfg["layers"]
        if self.draw.random() < 0.3 and "@" not in str(layers):
            blocks = expand(layers)
            size = 2 if len(blocks) % 2 == 0 and len(blocks) > 2 else 1
            pairs = [blocks[i : i + size] for i in range(0, len(blocks), size)]
            cfg["layers"] = [
                token for pair in self.draw.choices(pairs, k=self.draw.choice([1, 2, 3, 4])) for token in pair
            ]
            names.append("layers")
        return cfg, names

    def refused(self, names: list[str]) -> None:
        """Draw these less often, if they were all that was changed."""
        for place in self.odds:
            if len(names) == 1 and names[0] in place:
                self.odds[place] *= 0.3


def _specs(cfg: dict[str, Any], of: str) -> list[dict[str, Any]]:
    return (
        [cfg]
        if not of
        else [cfg["norm"]]
        if of == "norm"
        else [spec for spec in cfg["mixers"].values() if spec["type"] == of]
    )


def _pool(cfg: dict[str, Any], place: tuple[str, str]) -> list[Any]:
    value = next((spec[place[1]] for spec in _specs(cfg, place[0]) if place[1] in spec), None)
    return _OURS.get(place[1], [not value] if isinstance(value, bool) else [])


def try_export(family: str, cfg: dict[str, Any], names: list[str], folder: Path) -> Outcome | None:
    """Write a model of ours for transformers: what does it compute? None if the config is no model.

    Args:
        family: Whose config ``cfg`` was before it was changed.
        cfg: A config of ours.
        names: The options that were changed.
        folder: A new folder.
    """
    from transformers import AutoModelForCausalLM

    try:
        ours = redraw(build(cfg))
    except ConfigError:
        return None
    change = ", ".join(f"{name} = {_found(cfg, name)}" for name in names)
    try:
        ours.family = family
        kind = export(ours, folder)
    except CheckpointError as e:
        # what does not fit need not be what was changed: a head's size follows from their number
        named = "The closest differs in" in str(e) or "layers" in names or any(f" {name}" in str(e) for name in names)
        return Outcome(family, change, "refused" if named else "unnamed", str(e).replace(str(folder), ""))
    except Exception as e:
        return Outcome(family, change, "crash", f"{type(e).__name__}: {e}".splitlines()[0])
    ids = tokens(min(ours.cfg.vocab_size, VOCAB))
    try:
        judge, info = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True
        )
        with torch.no_grad():
            expected, got = judge.eval()(ids, use_cache=False).logits, ours(ids).logits
    except Exception as e:
        return Outcome(kind, change, "crash", f"transformers cannot read it: {type(e).__name__}: {e}".splitlines()[0])
    if info["missing_keys"] or info["unexpected_keys"]:
        return Outcome(kind, change, "silent", f"missing {info['missing_keys']}, left over {info['unexpected_keys']}")
    return _compared(kind, change, got, expected)


def _found(cfg: Any, name: str) -> Any:
    if name in cfg:
        return str(cfg[name])
    return [spec[name] for spec in (*cfg["mixers"].values(), cfg["norm"]) if name in spec]


def edit_outcomes(name: str, count: int | None, seed: int = 0) -> Iterator[Outcome]:
    """Edits of one of :data:`CASES`, in a random order: ``count`` of them, or all."""
    with tempfile.TemporaryDirectory() as place:
        base = Base(name, Path(place, "base"))
        todo = list(edits(base))
        random.Random(f"{seed} {name}").shuffle(todo)
        for i, (field, value) in enumerate(todo[:count]):
            with tempfile.TemporaryDirectory() as folder:
                yield try_edit(base, field, value, Path(folder, str(i)))


def export_outcomes(name: str, count: int, seed: int = 0) -> Iterator[Outcome]:
    """Exports of changed options of one of :data:`CASES`, until ``count`` were written; what was refused comes along."""
    with tempfile.TemporaryDirectory() as place:
        base = Base(name, Path(place, "base"))
        plain: Any = OmegaConf.to_container(load(base.folder).cfg)
        options, written = Options(plain, random.Random(f"{seed} {name}")), 0
        for _ in range(40 * count):
            cfg, names = next(options)
            with tempfile.TemporaryDirectory() as folder:
                outcome = try_export(base.family, cfg, names, Path(folder, "out"))
            if outcome is None or outcome.kind in ("refused", "unnamed"):
                options.refused(names)
            if outcome is not None:
                written += outcome.kind not in ("refused", "unnamed")
                yield outcome
            if written == count:
                break


def fuzz(
    out: Path | None = None, edits_each: int | None = None, exports_each: int = 40, seed: int = 0
) -> dict[str, Any]:
    """Try edits and exports of every case.

    Args:
        out: A JSON file to write, whole or not at all.
        edits_each: Edits of each case; all of them by default.
        exports_each: Configs written from each case.
        seed: Of what is drawn.

    Returns:
        The result in the schema of DESIGN section 9: of each family and direction how often each outcome came up, and what went wrong.

    Raises:
        ValueError: Something went wrong, after the result has been written.
    """
    quiet()
    counts: dict[tuple[str, str], Counter[str]] = {}
    bad: list[dict[str, str]] = []
    console = Console(stderr=True)
    for name in track(CASES, "fuzz", console=console, transient=True, disable=not console.is_terminal):
        for direction, outcomes in (
            ("edit", edit_outcomes(name, edits_each, seed)), ("export", export_outcomes(name, exports_each, seed)),
        ):  # fmt: skip
            for outcome in outcomes:
                counts.setdefault((outcome.family, direction), Counter())[outcome.kind] += 1
                if outcome.kind not in GOOD:
                    bad.append({"direction": direction, "case": name, **dataclasses.asdict(outcome)})
    rows = [
        {
            "name": f"{family}-{direction}",
            "family": family,
            "op": direction,
            "peer": "transformers",
            "dtype": "float32",
            **dict(count),
        }
        for (family, direction), count in sorted(counts.items())
    ]
    result = header("parity_fuzz", "zoo bench parity --part fuzz", "cpu", ["transformers"]) | {
        "seed": seed,
        "cases": rows,
        "failed": bad,
    }
    if out is not None:
        write(result, out)
    if bad:
        first = bad[0]
        raise ValueError(f"parity: {len(bad)} of the tries went wrong; the first is {first}. The result lists all.")
    return result


def quiet() -> None:
    """Silence what transformers says about configs that are wrong on purpose."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.get_logger("transformers").setLevel(60)

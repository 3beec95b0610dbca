"""Configs edited field by field and options drawn at random: transformers and we compute the same, or the error names the reason."""

import json
import math

import pytest
import torch
from omegaconf import OmegaConf

import hybridzoo as zoo
from hybridzoo.eval.parity import fuzz as parity_fuzz
from hybridzoo.eval.parity.configs import CONFIGS
from hybridzoo.eval.parity.draws import Base
from hybridzoo.eval.parity.fuzz import GOOD, edit_outcomes, export_outcomes, tokens, try_edit, try_export
from hybridzoo.eval.parity.run import ratio, redraw
from hybridzoo.zoo.checkpoint import CheckpointError, export

transformers = pytest.importorskip("transformers")
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
}  # fmt: skip


def turning(part, theta=1e4):
    return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": part}


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    parity_fuzz.quiet()


@pytest.fixture(scope="module")
def base(tmp_path_factory, judged):
    made = {}

    def get(name):
        judged(CONFIGS[name][0])
        if name not in made:
            made[name] = Base(name, tmp_path_factory.mktemp("base"))
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "field", "value", "kind"),
    [
        # what a head turns: in rope_parameters, beside them, where the class asks and where it does not
        ("bamba-biases-tied-limits", "rope_parameters", turning(0.25), "equal"),
        ("bamba-biases-tied-limits", "rope_parameters", turning(1.0, 300.0), "equal"),
        ("bamba-biases-tied-limits", "partial_rotary_factor", 1.0, "equal"),
        ("bamba-biases-tied-limits", "rope_parameters", {"rope_theta": 50}, "equal"),
        ("bamba-biases-tied-limits", "rope_parameters", turning(0.2), "refused"),
        ("granite-dense-rope-tied", "rope_parameters", turning(0.5), "refused"),
        ("falcon_h1", "partial_rotary_factor", 0.5, "refused"),
        # one object replaces the other, and the newer spelling the older
        ("llama", "rope_scaling", LINEAR, "equal"),
        ("llama", "rope_scaling", {"type": "linear", "factor": 2.5}, "equal"),
        ("llama", "rope_scaling", {"rope_type": "default", "type": "linear", "factor": 2.5}, "equal"),
        ("llama", "rope_scaling", LLAMA3, "equal"),
        ("llama-biases-tied", "rope_scaling", {"rope_type": "default"}, "equal"),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, "refused"),
        ("llama", "rope_scaling", {"type": "dynamic", "factor": 4.0}, "refused"),
        ("llama-stretched", "rope_scaling", {}, "equal"),
        ("mixtral", "rope_parameters", LLAMA3, "equal"),
        ("zamba2", "rope_parameters", LINEAR, "equal"),
        ("falcon_h1", "rope_parameters", LLAMA3 | {"rope_theta": 50.0}, "equal"),
        # limits of step sizes
        ("nemotron_h", "time_step_min", 0.05, "equal"),
        ("nemotron_h", "time_step_limit", [0.02, 0.1], "refused"),
        ("zamba2", "time_step_min", 0.05, "equal"),
        ("mamba2", "time_step_limit", [0.02, 0.1], "equal"),
        ("mamba2", "time_step_min", 0.05, "equal"),
        ("falcon_h1", "time_step_limit", [0.02, {"__float__": "Infinity"}], "equal"),
        # a null is not the default
        ("bamba", "num_key_value_heads", None, "equal"),
        ("falcon_h1", "mamba_conv_bias", None, "refused"),
        ("falcon_h1", "mamba_d_head", "auto", "equal"),
        # a factor that is not positive
        ("granite", "attention_multiplier", -1, "refused"),
        # names of two generations that disagree, lists of another length, and what cannot be read
        ("granite", "layers_block_type", ["mamba", "mamba", "attention"], "refused"),
        ("llama", "num_hidden_layers", -1, "refused"),
        ("mamba", "time_step_max", 0.0001, "refused"),
        ("mamba2", "time_step_floor", -0.5, "refused"),
    ],
)  # fmt: skip
def test_a_changed_field(base, tmp_path, name, field, value, kind):
    outcome = try_edit(base(name), field, value, tmp_path / "edited")
    assert outcome.kind == kind, outcome


@pytest.mark.parametrize(
    ("name", "options", "family"),
    [
        ("bamba", {"attention.rotary_dim": 2, "attention.headdim": 10}, "bamba"),
        ("bamba", {"layers": "(attention mlp) * 2", "attention.qkv_bias": True, "attention.out_bias": True}, "bamba"),
        ("granite", {"layers": "(attention moe+mlp) * 2"}, "granitemoehybrid"),
        ("granite-dense-rope-tied", {"layers": "(attention mlp) * 2", "attention.headdim": 6}, "granitemoehybrid"),
        ("falcon_h1", {"mamba2.d_ssm": 18, "mamba2.d_inner": 18, "mamba2.headdim": 6, "mamba2.ngroups": 1}, "falcon_h1"),
        ("falcon_h1", {"mamba2.dt_limit": [0.02, 0.1]}, "falcon_h1"),
        ("nemotron_h", {"mamba2.dt_limit": [0.0, math.inf]}, "nemotron_h"),
        ("nemotron_h", {"mamba2.dt_limit": [0.05, math.inf]}, "nemotron_h"),
        ("nemotron_h", {"mamba2.dt_limit": [0.02, 0.1]}, "dt_limit"),
        ("zamba2-one-block-biases-limits", {"mlp.adapter_rank": 0}, "adapter_rank"),
        ("llama", {"attention.nheads": 5, "attention.nheads_kv": 1, "attention.headdim": 8}, "mistral"),
        ("llama", {"attention.softmax_scale": 0.1, "logits_multiplier": 1 / 3}, "granite"),
        ("llama", {"attention.rope_scaling": [4.0, 1.0, 4.0, 1.0]}, "llama"),
        ("llama", {"attention.rotary_dim": 4}, "phi3"),
        ("llama", {"attention.key_multiplier": 0.5}, "key_multiplier"),
    ],
)  # fmt: skip
def test_changed_options(base, tmp_path, name, options, family):
    cfg = OmegaConf.to_container(zoo.load(base(name).folder).cfg)
    for path, value in options.items():
        mixer, _, option = path.rpartition(".")
        (cfg["mixers"][mixer] if mixer else cfg)[option] = value
    outcome = try_export(base(name).family, cfg, [path.rpartition(".")[2] for path in options], tmp_path / "out")
    if any(path.endswith(f".{family}") for path in options):
        assert outcome.kind == "refused" and family in outcome.detail, outcome
    else:
        assert (outcome.family, outcome.kind) == (family, "equal"), outcome


@pytest.mark.parametrize("name", ["bamba", "granite", "llama-stretched", "nemotron_h", "smollm3"])
def test_a_few_fields_drawn_at_random(name, judged):
    judged(CONFIGS[name][0])
    wrong = [outcome for outcome in edit_outcomes(name, 8, seed=3) if outcome.kind not in GOOD]
    assert not wrong


@pytest.mark.parametrize("name", ["mixtral", "mamba2", "qwen3"])
def test_a_few_options_drawn_at_random(name, judged):
    judged(CONFIGS[name][0])
    outcomes = list(export_outcomes(name, 3, seed=3))
    assert [outcome for outcome in outcomes if outcome.kind == "equal"]
    assert not [outcome for outcome in outcomes if outcome.kind not in GOOD]


def test_the_shipped_zamba2_is_what_transformers_computes(tmp_path, judged):
    judged("Zamba2")
    ours = redraw(zoo.build("zamba2-tiny"))
    export(ours, tmp_path / "out")
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = tokens(256)
    with torch.no_grad():
        assert ratio(ours(ids).logits, judge(ids, use_cache=False).logits) < 1e-5


@pytest.mark.parametrize(
    ("field", "value"), [("time_step_max", 0.0001), ("time_step_rank", -1), ("state_size", 0), ("hidden_size", 0)]
)
def test_a_refusal_speaks_of_the_file(base, tmp_path, field, value):
    data = base("mamba").data | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "model.safetensors").symlink_to(base("mamba").folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"\b{field}\b") as e:
        zoo.load(tmp_path)
    assert "mixers." not in str(e.value) and "dt_max" not in str(e.value)


def test_a_refusal_speaks_of_what_is_inside_a_field(tmp_path):
    model = zoo.build("mamba2-tiny")
    export(model, tmp_path / "out", to="mamba_ssm")
    file = tmp_path / "out/config.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"ssm_cfg": data["ssm_cfg"] | {"dt_min": 0.2, "dt_max": 0.1}}))
    with pytest.raises(CheckpointError, match=r"that works: ssm_cfg\.dt_m(in|ax): ") as e:
        zoo.load(tmp_path / "out")
    assert "mixers" not in str(e.value)


def test_mamba_ssm_gets_plain_numbers(tmp_path):
    model = zoo.build("mamba2-tiny", ["mixers.mamba2.dt_limit=[0.01,.inf]"])
    export(model, tmp_path / "out", to="mamba_ssm")
    # as mamba-ssm reads it: json.load, and no more
    assert json.loads((tmp_path / "out/config.json").read_text())["ssm_cfg"]["dt_limit"] == [0.01, math.inf]
    assert zoo.load(tmp_path / "out").cfg.mixers.mamba2.dt_limit == (0.01, math.inf)


def test_positions_per_type_of_layer_are_refused_by_name(base, tmp_path):
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 50.0}}
    data = base("qwen3").data | {"rope_parameters": nested}
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "model.safetensors").symlink_to(base("qwen3").folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"rope_parameters.full_attention is an object"):
        zoo.load(tmp_path)


def test_bamba_takes_no_part_that_turns_from_beside_its_rope_parameters(base, tmp_path):
    data = {name: value for name, value in base("bamba").data.items() if name != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps(data | {"partial_rotary_factor": 0.25}))
    (tmp_path / "model.safetensors").symlink_to(base("bamba").folder / "model.safetensors")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters["partial_rotary_factor"]
    assert theirs == 0.5 and zoo.load(tmp_path).cfg.mixers.attention.rotary_dim == 4


def test_the_fuzz_finds_what_is_wrong(monkeypatch, base, tmp_path):
    from hybridzoo.zoo.checkpoint import rotary

    with monkeypatch.context() as patch:
        patch.setattr(rotary, "_positive", lambda fields, where, value, key: 500.0 if "theta" in key else 1.0)
        assert try_edit(base("llama"), "rms_norm_eps", 1e-3, tmp_path / "a").kind == "silent"
    with monkeypatch.context() as patch:
        patch.setattr(parity_fuzz, "load", lambda folder: [][0])
        assert try_edit(base("llama"), "rms_norm_eps", 1e-3, tmp_path / "b").kind == "crash"

    def refuse(folder):
        raise CheckpointError("no")

    monkeypatch.setattr(parity_fuzz, "load", refuse)
    assert try_edit(base("llama"), "rms_norm_eps", 1e-3, tmp_path / "c").kind == "unnamed"

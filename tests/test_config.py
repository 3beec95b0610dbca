"""Configs: inheritance, overrides, exceptions by block, round trips, and that every bad one is a single, helpful error."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

import hybridzoo as zoo
from hybridzoo.zoo.config.resolve import block_specs, find_config, list_models, load_config, validate
from hybridzoo.zoo.registry import ConfigError, nearest


def small(**changes):
    """A config with one of each: a plain mixer, one with many options, and one that keeps no state."""
    cfg = {
        "vocab_size": 16,
        "d_model": 32,
        "layers": "mamba mlp attention mlp",
        "mixers": {"mamba": {"d_state": 4}, "attention": {"type": "attention", "nheads": 4}, "mlp": {"type": "mlp"}},
    }
    return {**cfg, **changes}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# --- what a good config gives ------------------------------------------------------------------------------------------


def test_defaults_are_filled_in_down_to_the_mixers_options():
    cfg = validate(small())
    assert isinstance(cfg, DictConfig)
    assert cfg.task == "causal_lm" and cfg.norm == {"type": "rmsnorm", "eps": 1e-5} and cfg.tie_embeddings is True
    assert cfg.mixers.mamba.type == "mamba"  # an entry without a type is of the type it is named after
    assert (cfg.mixers.mamba.d_state, cfg.mixers.mamba.d_conv, cfg.mixers.mamba.expand) == (4, 4, 2)
    assert "base" not in cfg


@pytest.mark.parametrize("name", list_models())
def test_a_shipped_config_survives_saving_and_reading(name, tmp_path):
    cfg = load_config(name)
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg
    assert load_config(tmp_path) == cfg  # the folder that holds it
    assert validate(cfg) == cfg
    assert validate(OmegaConf.to_container(cfg)) == cfg
    assert cfg.task != "causal_lm" or cfg.max_length < math.inf


def test_a_window_that_nobody_states_is_none():
    cfg = load_config({"vocab_size": 9, "d_model": 8, "layers": "mamba", "mixers": {"mamba": {}}})
    assert cfg.max_length is None and validate(cfg) == cfg


def test_names_are_listed_sorted_and_by_wildcard():
    names = zoo.list_models()
    assert names == sorted(names) and len(names) == len(set(names)) > 20
    assert zoo.list_models("jamba*") == ["jamba-mini", "jamba-tiny"]
    assert zoo.list_models("nothing*") == []
    assert all(find_config(name).is_file() for name in names)


def test_overrides_come_last_and_in_order():
    cfg = zoo.config("jamba-tiny", ["d_model=64", "mixers.mamba.d_state=8", "norm.eps=1e-3", "d_model=128"])
    assert (cfg.d_model, cfg.mixers.mamba.d_state, cfg.norm.eps) == (128, 8, 1e-3)
    assert cfg.mixers.mamba.bcdt_norm is True
    cfg = zoo.config("mamba-tiny", ["layers=[mamba, (mamba) * 2]"])
    assert cfg.layers == "mamba * 3"
    cfg = zoo.config(small(override=[{"at": 0, "set": {"d_state": 8}}]), ["override.0.set.d_state=2"])
    assert block_specs(cfg)[0].parts[0][1]["d_state"] == 2


CHANGES = [
    (["d_model=64", "mixers.mamba.d_state=8"], {}),
    ({"d_model": 64, "mixers.mamba.d_state": 8}, {}),
    ({"d_model": 64, "mixers": {"mamba": {"d_state": 8}}}, {}),
    (None, {"d_model": 64, "mixers": {"mamba": {"d_state": 8}}}),
    (["d_model=32"], {"d_model": 64, "mixers": {"mamba": {"d_state": 8}}}),
    ({"d_model": np.int64(64)}, {"mixers": {"mamba": {"d_state": np.int64(8)}}}),
]


@pytest.mark.parametrize(("overrides", "changes"), CHANGES)
def test_changes_may_be_texts_mappings_or_keywords(overrides, changes):
    cfg = zoo.config("jamba-tiny", overrides, **changes)
    assert cfg == zoo.config("jamba-tiny", ["d_model=64", "mixers.mamba.d_state=8"])
    model = zoo.build("jamba-tiny", overrides, device="meta", dtype=torch.bfloat16, **changes)
    assert model.cfg == cfg and model.lm_head.weight.is_meta and model.lm_head.weight.dtype == torch.bfloat16


def test_changes_do_what_overrides_do():
    assert (
        zoo.config("jamba-tiny", mixers={"attention": {"type": "mamba2", "headdim": 32}}).mixers.attention.type
        == "mamba2"
    )
    assert zoo.config("mamba-tiny", layers=["mamba", "mamba"]).layers == "mamba * 2"
    assert zoo.config("nvidia-hybrid-tiny", layers={"n_layer": 24}).layers != zoo.config("nvidia-hybrid-tiny").layers
    cfg = zoo.config(
        small(override=[{"at": [0], "set": {"d_state": 8}}]), {"override.0.set": {"expand": 1}, "override[0].at.0": -4}
    )
    assert block_specs(cfg)[0].parts[0][1]["d_state"] == 8 and block_specs(cfg)[0].parts[0][1]["expand"] == 1
    source = small()
    zoo.config(source, {"mixers.mamba.d_state": 8})
    assert source == small()


SLIPS = {
    "d_modle": "'d_model'", "device_": "'device'", "dtpye": "'dtype'", "override_": "'override'", "tie_embedings": "'tie_embeddings'",
}  # fmt: skip


@pytest.mark.parametrize(("key", "meant"), SLIPS.items())
def test_a_keyword_that_is_misspelt_gets_the_nearest(key, meant):
    with pytest.raises(
        ConfigError, match=f"^{key}: is neither an argument of zoo.build nor a key of configs. Did you mean {meant}"
    ):
        zoo.build("jamba-tiny", **{key: 3})
    with pytest.raises(ConfigError, match=r"d_modle: unknown key. Did you mean 'd_model'"):
        zoo.config("jamba-tiny", d_modle=3)
    with pytest.raises(ConfigError, match="base: cannot be overridden"):
        zoo.config("jamba-tiny", base="mamba-tiny")


NEAREST = [
    ("d_modle", "d_model"), ("typ", "type"), ("mamab", "mamba"), ("n_layers", "n_layer"), ("aa", "a"), ("casual_lm", "causal_lm"),
    ("mamba-tiby", "mamba-tiny"), ("hybridzoo_mqra", "hybridzoo_mqar"), ("mixtrall", "mixtral"), ("self_attn.q_proj.weigth", "self_attn.q_proj.weight"),
    # other things, and no slips
    ("mistral", None), ("ministral", None), ("mamba3", None), ("mamba", None), ("bamba", None), ("jamba2", None), ("qwen2_moe", None), ("rmsnormal", None),
    ("groupnorm", None), ("gdn", None), ("hidden_size", None), ("", None), ("x" * 100_000, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "meant"), NEAREST, ids=[n[0][:20] for n in NEAREST])
def test_a_hint_is_for_slips_of_the_keyboard(name, meant):
    known = ["d_model", "type", "n_layer", "a", "causal_lm", "mamba-tiny", "hybridzoo_mqar", "mixtral", "self_attn.q_proj.weight", "qwen3_moe", "rmsnorm",
             "jamba", "mamba2", "layernorm"] + ["mamba"] * (name == "mamab")  # fmt: skip
    assert nearest(name, known) == (f" Did you mean {meant!r}?" if meant else "")


def test_a_mixer_of_another_type_starts_from_its_own_defaults(tmp_path):
    cfg = zoo.config("jamba-tiny", ["mixers.attention.type=mamba2", "mixers.attention.headdim=32"])
    assert cfg.mixers.attention.type == "mamba2" and "nheads" not in cfg.mixers.attention
    path = write(tmp_path / "x.yaml", "base: jamba-tiny\nmixers: {attention: {type: mamba2, headdim: 32}}")
    assert zoo.config(path) == cfg


def test_a_ratio_is_swept_by_one_override():
    counts = [
        zoo.config("nvidia-hybrid-tiny", [f"layers.allocate.attention={r}"]).layers.split().count("attention")
        for r in (0, 1 / 12, 0.25)
    ]
    assert counts[0] == 0 and counts == sorted(counts)


def test_a_hydra_node_is_accepted_with_its_references():
    whole = OmegaConf.create({"width": 32, "model": small(d_model="${width}"), "trainer": {"lr": 0.1}})
    assert validate(whole.model) == validate(small())


def test_base_inherits_along_a_chain(tmp_path):
    write(tmp_path / "a.yaml", "base: mamba-tiny\nd_model: 64\nmixers: {mlp: {type: mlp}}\nlayers: (mamba mlp) * 2")
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub" / "b.yaml", "base: ../a.yaml\nmixers: {mamba: {d_state: 8}}\ntie_embeddings: false")
    cfg = load_config(path)
    assert (cfg.d_model, cfg.layers, cfg.tie_embeddings, cfg.max_length) == (64, "(mamba mlp) * 2", False, 1024)
    assert cfg.mixers.mamba.d_state == 8 and set(cfg.mixers) == {"mamba", "mlp"}
    assert load_config({"base": str(path)}) == cfg
    write(tmp_path / "mamba-tiny.yaml", "base: mamba-tiny\nd_model: 32")
    assert load_config(tmp_path / "mamba-tiny.yaml").d_model == 32  # a shipped name is never the file itself


def test_unused_mixers_are_allowed_so_that_a_pattern_can_be_overridden():
    cfg = zoo.config("jamba-tiny", ["layers=mamba * 4", "d_model=50", "mixers.mamba.bcdt_norm=false"])
    assert cfg.layers == "mamba * 4" and "attention" in cfg.mixers  # whose 4 heads do not divide 50


# --- exceptions by block -----------------------------------------------------------------------------------------------


def test_override_changes_the_blocks_it_names():
    cfg = validate(
        small(layers="mamba * 4", override=[{"at": [0, -1], "set": {"d_state": 8}}, {"at": 3, "set": {"expand": 1}}])
    )
    parts = [spec.parts[0][1] for spec in block_specs(cfg)]
    assert [p["d_state"] for p in parts] == [8, 4, 4, 8] and [p["expand"] for p in parts] == [2, 2, 2, 1]
    assert block_specs(validate(OmegaConf.to_container(cfg))) == block_specs(cfg)


def test_override_reaches_the_branches_that_have_the_option():
    cfg = validate(small(layers="mamba + attention", override=[{"at": 0, "set": {"d_state": 8, "nheads": 2}}]))
    (spec,) = block_specs(cfg)
    mamba, attention = (part for _, part, _ in spec.parts)
    assert mamba["d_state"] == 8 and attention["nheads"] == 2 and "nheads" not in mamba


def test_blocks_describe_names_labels_and_keys():
    specs = block_specs(validate(small(layers="attention@a (mamba + mlp)@b attention@a mlp")))
    assert [(s.index, s.label, [name for name, _, _ in s.parts]) for s in specs] == [
        (0, "a", ["attention"]),
        (1, "b", ["mamba", "mlp"]),
        (2, "a", ["attention"]),
        (3, None, ["mlp"]),
    ]
    assert specs[1].token == "(mamba+mlp)@b" and specs[3].parts[0][2] == "mixers.mlp"


# --- what a bad config says --------------------------------------------------------------------------------------------

BAD = {
    "misspelt key": ({"d_modle": 3}, "d_modle: unknown key. Did you mean 'd_model'? Keys: "),
    "misspelt nested key": ({"norm": {"typ": "rmsnorm"}}, "norm.typ: unknown key. Did you mean 'type'?"),
    "misspelt option": (
        {"mixers": {"mamba": {"d_sate": 4}}, "layers": "mamba"},
        "mixers.mamba.d_sate (mamba): unknown option. Did you mean 'd_state'? Options: d_state",
    ),
    "misspelt mixer": ({"layers": "mamab"}, "layers: unknown mixer 'mamab' in block 0. Did you mean 'mamba'? Under mixers: mamba"),
    "mixer without entry": ({"layers": "mamba moe"}, "layers: unknown mixer 'moe' in block 1. Add mixers.moe: {type: moe}."),
    "misspelt type": ({"mixers": {"m": {"type": "mambaa"}}, "layers": "m"}, "mixers.m.type: unknown mixer 'mambaa'. Did you mean 'mamba'?"),
    "no type": ({"mixers": {"ssm": {"d_state": 4}}, "layers": "ssm"}, "mixers.ssm: has no type, and no mixer is called 'ssm'. Add type: one of attention"),
    "nearest type": ({"mixers": {"mamab": {}}, "layers": "mamab"}, "no mixer is called 'mamab'. Did you mean 'mamba'?"),
    "empty entry": ({"mixers": {"mamba": None}}, "mixers.mamba: found None, expected options. Write {type: mamba}"),
    "bad name": ({"mixers": {"a-b": {"type": "mlp"}}}, "mixers.a-b: is not a name that a pattern can hold."),
    "model's option": ({"mixers": {"mamba": {"d_model": 3}}}, "mixers.mamba.d_model (mamba): is decided by the model"),
    "wrong type": ({"d_model": "big"}, "d_model: Value 'big' of type 'str' could not be converted to Integer"),
    "fraction": ({"d_model": 3.5}, "d_model: Value '3.5' of type 'float' could not be converted to Integer"),
    "wrong option type": (
        {"mixers": {"mamba": {"d_state": "many"}}, "layers": "mamba"},
        "mixers.mamba.d_state (mamba): Value 'many' of type 'str' could not be converted to Integer",
    ),
    "list for a number": ({"mixers": {"mamba": {"d_state": [1]}}, "layers": "mamba"}, "mixers.mamba.d_state (mamba): "),
    "mapping for a list": ({"mixers": {"mamba2": {"dt_limit": {"a": 1}}}, "layers": "mamba2"}, "mixers.mamba2"),
    "bad flag": ({"tie_embeddings": "maybe"}, "tie_embeddings: Value 'maybe' is not a valid bool"),
    "no window": ({"max_length": 0}, "max_length: is 0, outside"),
    "endless window": ({"max_length": math.inf}, "max_length: "),
    "zero": ({"vocab_size": 0}, "vocab_size: is 0, outside 1 to"),
    "negative": ({"d_model": -8}, "d_model: is -8, outside 1 to"),
    "huge": ({"d_model": 10**30}, "d_model: is 1000000000000000000000000000000, outside 1 to"),
    "nan": ({"initializer_range": math.nan}, "initializer_range: is nan, outside 0 to"),
    "huge option": ({"mixers": {"mlp": {"d_intermediate": 2**60}}, "layers": "mlp"}, "mixers.mlp (mlp): cannot be built with d_model = 32: "),
    "missing": ({"d_model": "???"}, "d_model: is missing. Every config sets d_model, vocab_size, layers and mixers"),
    "no layers": ({"layers": None}, "layers: is missing"),
    "empty pattern": ({"layers": " "}, "layers: the pattern is empty. Name at least one mixer."),
    "empty list": ({"layers": []}, "layers: the list is empty"),
    "unparsable": ({"layers": "(mamba"}, "layers: column 7: found the end, expected ')' for the '(' at column 1."),
    "bad ratio": ({"layers": {"n_layer": 4, "fill": "mamba", "allocate": {"mlp": 2}}}, "layers.allocate.mlp: found int '2', expected a ratio"),
    "mixers as a list": ({"mixers": ["mamba"]}, "mixers: found ['mamba'], expected a mapping, such as {mamba: {d_state: 16}}."),
    "norm as a name": ({"norm": "rmsnorm"}, "norm: found 'rmsnorm', expected a mapping, such as {type: rmsnorm"),
    "unknown norm": ({"norm": {"type": "batchnorm"}}, "norm.type: unknown value 'batchnorm'."),
    "negative eps": ({"norm": {"eps": -1.0}}, "norm.eps: is -1.0, outside 0 to 1."),
    "unknown task": ({"task": "casual_lm"}, "task: unknown value 'casual_lm'. Did you mean 'causal_lm'?"),
    "headdim": (
        {"mixers": {"mamba2": {"headdim": 50}}, "layers": "mamba2"},
        "mixers.mamba2.headdim (mamba2): ",
    ),
    "heads": ({"mixers": {"attention": {"nheads": 5}}, "layers": "attention"}, "mixers.attention.nheads (attention): "),
    "required option": ({"mixers": {"moe": {}}, "layers": "moe"}, "mixers.moe.d_intermediate (moe): Missing mandatory value"),
    "interpolation": ({"d_model": "${width}"}, "d_model: holds '${', an interpolation"),
    "base of another kind": ({"base": ["a"]}, "base: found ['a'], expected one shipped name"),
    "unknown base": ({"base": "mamba-tinny"}, "Did you mean 'mamba-tiny'? Give a name from `zoo list` or a path relative to the file."),
    "label on two mixers": (
        {"layers": "mamba@a attention@a"},
        "layers: label 'a' joins blocks 0 (mamba@a) and 1 (attention@a), whose mixers or options differ. Use two labels",
    ),
    "label with an exception": (
        {"layers": "mamba@a mamba@a", "override": [{"at": 0, "set": {"d_state": 8}}]},
        "layers: label 'a' joins blocks 0 (mamba@a) and 1 (mamba@a), whose mixers or options differ.",
    ),
    "override as a mapping": ({"override": {"at": 0}}, "override: found {'at': 0}, expected a list, such as [{at: 0"),
    "override without set": ({"override": [{"at": 0}]}, "override.0: found {'at': 0}, expected {at: block index"),
    "override out of range": ({"override": [{"at": [0, 4], "set": {"d_state": 8}}]}, "override.0.at: block 4 is out of range, there are 4 blocks. Use -4 to 3."),
    "override at a name": ({"override": [{"at": "mamba", "set": {"d_state": 8}}]}, "override.0.at: found 'mamba', expected a block index"),
    "override of nothing": ({"override": [{"at": 0, "set": {}}]}, "override.0.set: found {}, expected options"),
    "override of another's option": ({"override": [{"at": 1, "set": {"d_state": 8}}]}, "override.0.set.d_state: is no option of block 1 (mlp)."),
    "override of the type": ({"override": [{"at": 0, "set": {"type": "mamba2"}}]}, "override.0.set.type: is no option of block 0 (mamba)."),
    "override misspelt": ({"override": [{"at": 0, "set": {"d_stat": 8}}]}, "override.0.set.d_stat: is no option of block 0 (mamba). Did you mean 'd_state'?"),
    "override of a wrong type": ({"override": [{"at": 0, "set": {"d_state": "x"}}]}, "override.0.set.d_state (mamba): Value 'x'"),
    "override that does not fit": ({"override": [{"at": 2, "set": {"nheads": 5}}]}, "override.0.set.nheads (attention): "),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_config_is_one_error_with_the_key_and_the_remedy(changes, message):
    with pytest.raises(ConfigError) as e:
        validate(small(**changes))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


OVERRIDES = {
    "unknown key": (["d_modle=3"], "d_modle: unknown key. Did you mean 'd_model'?"),
    "unknown option": (["mixers.mamba.d_sate=3"], "mixers.mamba.d_sate (mamba): unknown option. Did you mean 'd_state'?"),
    "unknown entry": (["mixers.mamab.d_state=3"], "mixers.mamab: has no type, and no mixer is called 'mamab'. Did you mean 'mamba'?"),
    "no value": (["d_model"], "overrides: found 'd_model', expected key=value, such as 'd_model=256'."),
    "no key": (["=3"], "overrides: found '=3', expected key=value"),
    "hydra's plus": (["+d_model=3"], "+d_model: unknown key. Did you mean 'd_model'?"),
    "bad yaml": (["d_model=[1"], "d_model: cannot be set by 'd_model=[1': while parsing a flow sequence"),
    "alias": (["layers=*2"], "layers: cannot be set by 'layers=*2'"),
    "below a number": (["d_model.x=3"], "d_model"),
    "index into nothing": (["override.0.at=3"], "override: found"),
    "base": (["base=mamba-130m"], "base: cannot be overridden"),
    "one text": ("d_model=3", "overrides: found 'd_model=3', expected a list of texts"),
    "empty value": (["layers="], "layers: is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), OVERRIDES.values(), ids=OVERRIDES.keys())
def test_a_bad_override_is_an_error_that_names_it(overrides, message):
    with pytest.raises(ConfigError) as e:
        zoo.config("mamba-tiny", overrides)
    assert message in str(e.value)


def test_an_unknown_model_suggests_the_nearest_and_lists_the_families():
    with pytest.raises(ConfigError) as e:
        zoo.config("mamba-tinny")
    assert str(e.value).startswith(
        "model: unknown model 'mamba-tinny'. Did you mean 'mamba-tiny'? Families: hybrid-vision, jamba, mamba"
    )
    with pytest.raises(ConfigError, match="unknown model"):
        zoo.config("x" * 5000)
    for source in ("./none.yaml", "some/folder", "none.yml", "a\0/b"):
        with pytest.raises(ConfigError, match="there is no file"):
            zoo.config(source)
    for source in (3, None, [1], object()):
        with pytest.raises(ConfigError, match="config: found"):
            zoo.config(source)


FILES = {
    "syntax": ("d_model: 3\nlayers: [a, b\nvocab_size: 4\n", r"bad\.yaml, line 3, column \d+: .* Correct it there\."),
    "tab": ("d_model:\t3\n\tlayers: a\n", r"bad\.yaml, line \d, column \d+: "),
    "duplicate": ("d_model: 3\nd_model: 4\n", r"bad\.yaml, line 2, column 1: found duplicate key d_model"),
    "list": ("- a\n- b\n", r"bad\.yaml: holds no mapping\. Write 'key: value' lines\."),
    "text": ("mamba", r"bad\.yaml: holds no mapping"),
    "empty": ("# nothing\n", r"bad\.yaml: holds nothing"),
    "bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)),
        r"bad\.yaml: stands for more than 100000 values",
    ),
    "knot": ("a: &a [*a]\n", r"bad\.yaml: (stands for more than|is nested too deeply)"),
    "deep": ("layers: " + "[" * 1500, r"bad\.yaml"),
    "python": ("layers: !!python/object/apply:os.system ['true']\n", r"bad\.yaml"),
    "big": ("# " + "x" * 1_000_001, r"bad\.yaml: has 1000003 bytes, more than 1000000"),
    "interpolation": ("d_model: ${\n", r"bad\.yaml: d_model: holds '\$\{', an interpolation"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES.keys())
def test_a_file_that_is_no_config_says_where_and_why(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "bad.yaml", text))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00d_model: 3")
    with pytest.raises(ConfigError, match=r"bad\.yaml: cannot be read"):
        load_config(tmp_path / "bad.yaml")


def test_a_circle_of_bases_is_printed(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml")
    write(tmp_path / "b.yaml", "base: ./c")
    write(tmp_path / "c.yaml", "base: a.yaml")
    with pytest.raises(ConfigError, match=r"base: a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml comes back to itself"):
        load_config(tmp_path / "a.yaml")
    write(tmp_path / "self.yaml", "base: self.yaml")
    with pytest.raises(ConfigError, match=r"base: self\.yaml -> self\.yaml comes back to itself"):
        load_config(tmp_path / "self.yaml")


def test_an_error_comes_before_anything_is_allocated():
    # 16 Ti parameters, were the embedding made first
    big = small(vocab_size=2**24, d_model=2**20, mixers={"mamba2": {"headdim": 50}}, layers="mamba2")
    with pytest.raises(ConfigError, match=r"mixers\.mamba2\.headdim"):
        zoo.build(big)


def test_a_third_partys_failure_is_a_config_error_too():
    @zoo.register_mixer("test_config_broken")
    class Broken(zoo.Mixer):
        def __init__(self, d_model: int, size: int = 1):
            super().__init__()
            self.table = torch.zeros(size // 0)

    with pytest.raises(ConfigError, match=r"mixers\.x \(test_config_broken\): cannot be built .*division.*by zero"):
        validate(small(mixers={"x": {"type": "test_config_broken"}}, layers="x"))


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 100)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["mamba", "mlp * 2", "${d_model}", "???"])
)
junk = st.recursive(
    scalars,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), x, max_size=3),
    max_leaves=5,
)
KEYS = ["d_model", "vocab_size", "layers", "mixers", "norm", "override", "base", "mixers.mamba", "mixers.mamba.d_state", "mixers.mamba.type", "norm.eps",
        "mixers.mamba.dt_rank", "mixers.attention.nheads", "override.0", "other", "task", "pad_vocab_size_multiple", "max_length"]  # fmt: skip


def put(node, path, value):
    key, *rest = path
    if isinstance(node, list):
        if not (key.isdigit() and node):
            return
        key = int(key)
    elif not isinstance(node, dict):
        return
    if rest:
        put(node[key] if isinstance(node, list) else node.setdefault(key, {}), rest, value)
    else:
        node[key] = value


@given(st.lists(st.tuples(st.sampled_from(KEYS), junk), min_size=1, max_size=2))
@settings(max_examples=100, deadline=None)
def test_no_config_gives_anything_but_a_model_or_a_config_error(changes):
    cfg = copy.deepcopy(small(override=[{"at": 0, "set": {"d_state": 2}}]))
    for dotted, value in changes:
        put(cfg, dotted.split("."), value)
    try:
        checked = validate(cfg)
    except ConfigError:
        return
    assert validate(OmegaConf.create(OmegaConf.to_yaml(checked))) == checked


def test_a_build_reads_and_checks_its_config_once(monkeypatch):
    import hybridzoo.zoo.config.resolve as resolve_module
    from hybridzoo.zoo import registry
    from hybridzoo.zoo.config import check, specs, stages
    from hybridzoo.zoo.models.stats import stats

    calls = []
    for name, homes in {
        "typed": [resolve_module],
        "specs_of": [resolve_module],
        "expand": [stages],
        "check_mixer_options": [registry, check, specs],
    }.items():
        real = getattr(homes[0], name)
        for home in homes:
            monkeypatch.setattr(home, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    model = zoo.build("zamba2-7b", device="meta")
    stats(model)
    assert sorted(calls) == ["check_mixer_options"] * 4 + ["expand", "specs_of", "typed"]
    assert model.specs == block_specs(model.cfg)


def test_shared_blocks_on_the_meta_device_do_not_import_the_compiler():
    code = "import sys, hybridzoo as zoo; zoo.build('zamba2-7b', device='meta'); print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

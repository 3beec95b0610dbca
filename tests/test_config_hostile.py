"""Configs that somebody else wrote: nothing in them is evaluated, small ones cost little, and they stay in their folder."""

import json
import math
import re
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import hybridzoo as zoo
from hybridzoo.zoo.config import files as config_file
from hybridzoo.zoo.config.plain import plain
from hybridzoo.zoo.config.resolve import ConfigSchema, block_specs, validate
from hybridzoo.zoo.config.yaml_text import parse_yaml
from hybridzoo.zoo.registry import ConfigError, get_mixer, list_mixers

HEAD = "vocab_size: 16\nd_model: 32\n"
PLAIN = HEAD + "layers: mamba\nmixers: {mamba: {}}\n"


def small(**changes):
    return {"vocab_size": 16, "d_model": 32, "layers": "mamba", "mixers": {"mamba": {}}, **changes}


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def ran(monkeypatch):
    """What the resolvers of the process were asked for: many projects register Python's ``eval``."""
    calls = []
    OmegaConf.register_resolver("spy", lambda *args: calls.append(args) or "byte", replace=True)
    monkeypatch.setenv("SOME_TOKEN", "a-secret")
    yield calls
    OmegaConf.clear_resolver("spy")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return zoo.save(zoo.build("mamba-tiny", d_model=16), tmp_path_factory.mktemp("saved"))


def copied(saved, folder, name, change):
    """A saved folder in which one file is another, and the file that would win over it is missing."""
    folder.mkdir()
    for file in saved.iterdir():
        if not (name == "config.json" and file.name == "config.yaml"):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).write_text(change((saved / name).read_text()))
    return folder


# --- nothing is evaluated -----------------------------------------------------------------------------------------------

TEXTS = ["${spy:1}", "${oc.env:SOME_TOKEN}", "evil/${spy:1}", "\\${spy:1}", "\\\\${spy:1}", "${d_model}", "${", "a${b"]
PLACES = {
    "top": (lambda t: small(tokenizer=t), "tokenizer"),
    "number": (lambda t: small(d_model=t), "d_model"),
    "layers": (lambda t: small(layers=t), "layers"),
    "list": (lambda t: small(layers=["mamba", t]), "layers.1"),
    "share": (lambda t: small(layers={"n_layer": 2, "fill": "mamba", "allocate": {"mamba": t}}), "layers.allocate.mamba"),
    "option": (lambda t: small(mixers={"mamba": {"d_state": t}}), "mixers.mamba.d_state"),
    "type": (lambda t: small(mixers={"mamba": {"type": t}}), "mixers.mamba.type"),
    "norm": (lambda t: small(norm={"eps": t}), "norm.eps"),
    "exception": (lambda t: small(override=[{"at": 0, "set": {"d_state": t}}]), "override.0.set.d_state"),
    "unused": (lambda t: small(mixers={"mamba": {}, "mlp": {"activation": t}}), "mixers.mlp.activation"),
    "unknown key": (lambda t: small(other=[{"a": t}]), "other.0.a"),
    "base": (lambda t: {"base": t}, "base"),
    "key": (lambda t: small(**{t: 1}), "$"),
    "inner key": (lambda t: small(mixers={"mamba": {t: 1}}), "mixers.mamba."),
    "imports": (lambda t: small(imports={"a": t}), "imports.a"),
}  # fmt: skip


CASES = (
    [(where, "${spy:1}") for where in PLACES] + [("top", text) for text in TEXTS] + [("key", text) for text in TEXTS]
)


@pytest.mark.parametrize(("where", "text"), CASES)
def test_an_interpolation_is_refused_by_name_wherever_it_stands(where, text, ran, tmp_path):
    make, key = PLACES[where]
    data = make(text)
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps(data))  # which is YAML
    key = text if key == "$" else key
    for source, named in ((data, key), (file, f"{file}: {key}")):
        for read in (zoo.config, zoo.build):
            with pytest.raises(ConfigError, match=re.escape(named)) as e:
                read(source)
            assert "an interpolation" in str(e.value) and "a-secret" not in str(e.value)
    with pytest.raises(ConfigError, match=re.escape(key)):
        validate(data, saved=True)
    assert ran == []


@pytest.mark.parametrize("text", TEXTS)
def test_an_interpolation_in_an_override_is_refused(text, ran):
    for overrides in (
        [f"tokenizer={text}"],
        [f"layers=[mamba, '{text}']"],
        {"tokenizer": text},
        {"norm": {"type": text}},
    ):
        with pytest.raises(ConfigError, match=r"(tokenizer|layers|norm\.type): holds '\$\{'"):
            zoo.config("mamba-tiny", overrides)
    for overrides in ([f"{text}=1"], {text: 1}, {f"norm.{text}": 1}, {"mixers": {text: {}}}):
        with pytest.raises(ConfigError, match=r"an interpolation|no dotted key"):
            zoo.config("mamba-tiny", overrides)
    with pytest.raises(ConfigError, match=r"tokenizer: holds '\$\{'"):
        zoo.build("mamba-tiny", tokenizer=text, device="meta")
    assert ran == []


def test_an_interpolation_in_a_base_names_the_file(ran, tmp_path):
    write(tmp_path / "base.yaml", PLAIN + "tokenizer: ${spy:1}\n")
    child = write(tmp_path / "child.yaml", "base: base\ntokenizer: byte\n")
    with pytest.raises(ConfigError, match=r"base\.yaml: tokenizer: holds"):
        zoo.config(child)
    assert ran == []


@pytest.mark.parametrize("text", ["evil/${oc.env:SOME_TOKEN}", "${spy:1}"])
def test_a_saved_folder_is_not_evaluated(saved, tmp_path, ran, text):
    ours = copied(saved, tmp_path / "a", "config.yaml", lambda s: s.replace("tokenizer: byte", f"tokenizer: {text}"))
    theirs = copied(
        saved, tmp_path / "b", "config.json", lambda s: s.replace('"tokenizer": "byte"', f'"tokenizer": "{text}"')
    )
    for folder in (ours, theirs):
        with pytest.raises(ConfigError, match="tokenizer: holds"):
            zoo.load(folder)
    with pytest.raises(ConfigError, match="tokenizer: holds"):
        zoo.config(ours)
    from transformers import AutoConfig

    with pytest.raises(ConfigError, match="tokenizer: holds"):
        AutoConfig.from_pretrained(theirs)
    assert ran == []


def test_a_callers_own_node_is_resolved_by_its_rules_once(ran):
    whole = OmegaConf.create({"name": "${spy:7}", "model": small(tokenizer="${name}"), "width": 64})
    cfg = zoo.config(whole.model)
    assert cfg.tokenizer == "byte" and ran == [(7,)]
    node = OmegaConf.create({"w": 8, "m": {"mamba": {"d_state": "${w}"}}}).m
    assert zoo.config(small(mixers=node)).mixers.mamba.d_state == 8  # a node inside plain data
    assert zoo.config("mamba-tiny", {"mixers": node}).mixers.mamba.d_state == 8
    assert zoo.config(OmegaConf.structured(ConfigSchema(**small()))).d_model == 32
    assert zoo.config(ConfigSchema(**small())).d_model == 32
    for text in ("\\${oc.env:SOME_TOKEN}", "${spy2:1}"):
        OmegaConf.register_resolver("spy2", lambda _: "${oc.env:SOME_TOKEN}", replace=True)
        with pytest.raises(ConfigError, match="tokenizer: holds"):
            zoo.config(OmegaConf.create(small(tokenizer=text)))
    with pytest.raises(ConfigError, match=r"mixers\.mamba\.d_state: .*'nothing' not found"):
        zoo.config(OmegaConf.create(small(mixers={"mamba": {"d_state": "${nothing}"}})))


def test_what_is_no_plain_data_is_refused_by_its_key():
    for value in ({1}, object(), b"x", lambda: 1, 1j):
        with pytest.raises(ConfigError, match=r"mixers\.mamba\.d_state: is a "):
            zoo.config(small(mixers={"mamba": {"d_state": value}}))
    with pytest.raises(ConfigError, match=r"mixers: key 1 \(int\) is no text"):
        zoo.config(small(mixers={1: {}}))
    with pytest.raises(ConfigError, match="tokenizer: holds half a character"):
        zoo.config(small(tokenizer="x\udcff"))
    knot = small()
    knot["mixers"]["mamba"]["d_state"] = knot
    with pytest.raises(ConfigError, match="more than 32 levels of nesting"):
        zoo.config(knot)
    shared = {"d_state": 4}
    cfg = zoo.config(small(mixers={"a": {"type": "mamba", **shared}, "mamba": shared}), ["mixers.mamba.d_state=8"])
    assert (cfg.mixers.a.d_state, cfg.mixers.mamba.d_state, shared["d_state"]) == (4, 8, 4)


# --- YAML ---------------------------------------------------------------------------------------------------------------


def test_yaml_means_what_it_meant():
    text = "a: 1e-3\nb: 0x10\nc: 010\nd: .inf\ne: [yes, 1_000, -3, +2, 0b11]\nf: 2020-01-01\ng: '3'\nh: ~\ni: 1.5E+3\nj: 12:30\nk: .5\n"
    assert parse_yaml(text) == {
        "a": 1e-3, "b": 16, "c": 8, "d": math.inf, "e": [True, 1000, -3, 2, 3], "f": "2020-01-01", "g": "3", "h": None, "i": 1500.0,
        "j": "12:30", "k": 0.5,
    }  # fmt: skip
    assert parse_yaml("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\nc: [*x, *x]\n") == {
        "a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}, "c": [{"p": 1, "q": 2}] * 2,
    }  # fmt: skip
    assert parse_yaml("") is None and parse_yaml("x") == "x"


@given(
    st.text("0123456789eE+-._:xob~ nul", max_size=6)
    | st.text(max_size=5)
    | st.floats(allow_nan=False)
    | st.integers(-(2**63), 2**63)
)
@example("1e-3")
@example("6_e9")
@example("12:30")
@settings(max_examples=200, deadline=None)
def test_what_is_written_into_a_folder_is_read_back(value):
    assume(not isinstance(value, str) or value.isprintable())
    read = parse_yaml(OmegaConf.to_yaml({"t": value}))["t"]
    assert read == value and type(read) is type(value)


def test_an_alias_is_a_copy(tmp_path):
    file = write(tmp_path / "x.yaml", HEAD + "layers: a b\nmixers: {a: &a {type: mamba, d_state: 4}, b: *a}\n")
    cfg = zoo.config(file, ["mixers.a.d_state=8"])
    assert (cfg.mixers.a.d_state, cfg.mixers.b.d_state) == (8, 4)


YAML = {
    "inner duplicate": (PLAIN + "norm: {eps: 1.0e-5,\n  eps: 1.0e-3}\n", "line 6, column 3: found duplicate key eps"),
    "duplicate of another style": (PLAIN + "'d_model': 64\n", "line 5, column 1: found duplicate key d_model"),
    "tag": (PLAIN + "tokenizer: !!binary aGk=\n", "line 5, column 12: found the tag"),
    "local tag": (PLAIN + "tokenizer: !env TOKEN\n", "line 5, column 12: found the tag '!env'"),
    "documents": (PLAIN + "---\n" + PLAIN, "line 5, column 1: found a second document"),
    "no such alias": (PLAIN + "tokenizer: *x\n", "line 5, column 12: found undefined alias"),
    "a list for a key": (PLAIN + "? [a, b]\n: 1\n", "unhashable|no text"),
    "merged knot": (PLAIN + "x: &x {<<: *x}\n", "stands for more than 100000 values"),
    "deep": (PLAIN + "x: " + "[" * 40 + "]" * 40, "line 5, column 35: found more than 32 levels of nesting"),
}


@pytest.mark.parametrize(("text", "message"), YAML.values(), ids=YAML.keys())
def test_yaml_that_is_no_plain_data_is_refused_at_its_place(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        zoo.config(write(tmp_path / "x.yaml", text))


# --- small files cost little --------------------------------------------------------------------------------------------

_m = "mixers: {mamba: {}, mlp: {}, attention: {nheads: 4}}\n"
LARGE = {
    "half a million values": (HEAD + "layers: [" + "a," * 490_000 + "a]\n", "more than 100000 values"),
    "keys": (PLAIN + "".join(f"k{i}: 1\n" for i in range(9000)), "k0: unknown key"),
    "options": (HEAD + "layers: mamba\nmixers: {mamba: {" + ",".join(f"k{i}: 1" for i in range(9000)) + "}}\n", "k0"),
    "mixers": (PLAIN.replace("}}\n", ",".join(["}", *(f" m{i}: {{type: mlp}}" for i in range(5000))]) + "}\n"), "mixers: has 5001 entries, more than 256"),
    "base 60": (HEAD + "layers: mamba\nmixers: {mamba: {d_state: 1" + ":2" * 200_000 + "}}\n", "mixers.mamba.d_state: has 400001 characters"),
    "hex digits": (HEAD + "layers: mamba\nmixers: {mamba: {d_state: 0x1" + "f" * 4000 + "}}\n", r"mixers\.mamba\.d_state \(mamba\): Value '0x1"),
    "binary digits": (PLAIN + "max_length: 0b" + "1" * 900_000, "max_length: has 900002 characters"),
    "digits": (PLAIN + "max_length: " + "7" * 3000, "max_length: is 777.*outside 1 to"),
    "tokenizer": (PLAIN + "tokenizer: " + "x" * 900_000, "tokenizer: has 900000 characters, more than 4096"),
    "key": (PLAIN + "? " + "x" * 900_000 + "\n: 1\n", "has 900000 characters, more than 256"),
    "name of a mixer": (PLAIN + "norm: {}\n" + "x" * 200 + ": 1\n", "unknown key"),
    "name in mixers": (HEAD + "layers: mamba\nmixers: {mamba: {}, " + "x" * 200 + ": {type: mlp}}\n", "128 at most"),
    "exceptions": (HEAD + "layers: mamba\noverride: [" + ",".join(["{at: 0, set: {bias: true}}"] * 257) + "]\n" + _m, "override: has 257 entries, more than 256"),
    "different exceptions": (HEAD + "layers: mamba * 300\noverride: [" + ",".join(f"{{at: {i}, set: {{d_state: {i + 1}}}}}" for i in range(256)) + "]\n" + _m, "makes 257 different mixers, more than 256"),
    "indices": (HEAD + "layers: mamba\noverride: [{at: [" + "0," * 12_000 + "0], set: {d_state: 3}}]\n" + _m, r"override\.0\.at: has 12001 indices"),
    "indices in all": (HEAD + "layers: mamba\noverride: [" + ",".join(["{at: [" + "0," * 99 + "0], set: {d_state: 3}}"] * 101) + "]\n" + _m, "names more than 10000 blocks in all"),
    "kinds": (HEAD + "layers: {n_layer: 9999, fill: mamba, allocate: {" + ",".join(f"m{i}: 0" for i in range(100)) + "}}\n" + _m, "has 100 kinds, more than 64"),
    "places": (HEAD + "layers: {n_layer: 10000, fill: mamba, allocate: {mlp: 1.0}, place: [" + ",".join(map(str, [*range(9999), 0])) + "]}\n" + _m, "block 0 is given away twice"),
    "entries": (HEAD + "layers: attention\nmixers: {attention: {nheads: 4, rope_scaling: [" + "1.0," * 2000 + "1.0]}}\n", "has 2001 entries, more than 1000"),
    "imports": (PLAIN + "imports: {" + ",".join(f"k{i}: a" for i in range(300)) + "}\n", "imports: has 300 entries"),
    "base": ("base: " + "../" * 1300 + "x\n", "base: "),
    "texts that refer to each other": (PLAIN + "t0: x\n" + "".join(f't{i + 1}: "' + f"${{t{i}}}" * 10 + '"\n' for i in range(20)), "t1: holds"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), LARGE.values(), ids=LARGE.keys())
def test_a_large_or_repeated_entry_is_refused_at_once(text, message, tmp_path):
    assert len(text) < 1_000_000
    file = write(tmp_path / "x.yaml", text)
    started = time.process_time()
    with pytest.raises(ConfigError, match=message) as e:
        zoo.config(file)
    assert time.process_time() - started < 2 and len(str(e.value)) < 1400


def test_many_overrides_take_linear_time():
    started = time.process_time()
    cfg = zoo.config("mamba-tiny", [f"mixers.mamba.d_state={i % 7 + 1}" for i in range(3001)])
    assert cfg.mixers.mamba.d_state == 3000 % 7 + 1 and time.process_time() - started < 2
    for override in ("a" + ".a" * 400_000 + "=1", "x" * 900_000 + "=1", "x" * 900_000, "layers=" + "[" * 400_000, "d_model=1" + ":2" * 400_000,
                     "d_model=0x" + "f" * 4001, "layers=0x" + "f" * 4001, "d_model=" + "1" * 5000, "tokenizer=" + "x" * 900_000):  # fmt: skip
        started = time.process_time()
        with pytest.raises(ConfigError) as e:
            zoo.config("mamba-tiny", [override])
        assert time.process_time() - started < 2 and len(str(e.value)) < 1400


def test_a_wide_and_deep_config_is_checked_at_once():
    started = time.process_time()
    wide = " + ".join(["mamba", "mlp"] * 8)
    cfg = zoo.config(
        small(
            layers=f"({wide}) * 2000",
            mixers={"mamba": {}, "mlp": {}},
            override=[{"at": list(range(1000)), "set": {"bias": True}}],
        )
    )
    assert time.process_time() - started < 2 and len(block_specs(cfg)) == 2000  # fmt: skip


def test_a_folder_of_few_tensors_is_not_built_as_thousands_of_blocks(saved, tmp_path):
    folder = copied(
        saved, tmp_path / "a", "config.yaml", lambda s: re.sub("(?m)^layers: .*$", "layers: mamba * 10000", s)
    )
    (folder / "config.json").unlink()  # which would say otherwise, and count
    started = time.process_time()
    with pytest.raises(ValueError, match=r"describes 10000 blocks, and [0-9]+ tensors are stored"):
        zoo.load(folder)
    assert time.process_time() - started < 2


# --- numbers ------------------------------------------------------------------------------------------------------------

NO_FLOAT = [math.nan, math.inf, -math.inf, "nan", "inf", "1e999", 10**400, "9" * 400, True, [1.0], {}]
NO_INT = [*NO_FLOAT, 1.5, 4.0, "8.0", 2**100]
REQUIRED = {"moe": {"d_intermediate": 8}, "attention": {"nheads": 4}, "mamba2": {"headdim": 16}}
OPTIONS = [
    (mixer, name)
    for mixer in ("attention", "mamba", "mamba2", "mlp", "moe")
    for name in get_mixer(mixer, "").schema.__dataclass_fields__
]


def kind_of(hint):
    return next((k for k in ("bool", "int", "float", "str") if k in str(hint)), "")


@pytest.mark.parametrize(("mixer", "option"), OPTIONS, ids=lambda v: v)
def test_a_number_that_is_none_is_refused_by_every_option(mixer, option, tmp_path):
    hint = get_mixer(mixer, "").schema.__dataclass_fields__[option].type
    many = str(hint).count("float") if "tuple" in str(hint) else 0
    values = {"bool": [2, -1, math.nan, "7", 1.5], "int": NO_INT, "float": NO_FLOAT, "str": [3, True, math.nan, "x"]}[
        kind_of(hint)
    ]
    for value in [[v] * many for v in (math.nan, True, "nan")] if many else values:
        options = {**REQUIRED.get(mixer, {}), option: value}
        with pytest.raises(ConfigError, match=rf"mixers\.{mixer}\.{option}"):
            zoo.config(small(layers=mixer, mixers={mixer: options}))
        with pytest.raises(ConfigError, match=option):
            zoo.config(
                small(
                    layers=mixer, mixers={mixer: REQUIRED.get(mixer, {})}, override=[{"at": 0, "set": {option: value}}]
                )
            )


def test_a_number_that_is_none_is_refused_by_every_key(tmp_path):
    for name, field in ConfigSchema.__dataclass_fields__.items():
        kind = kind_of(field.type)
        if name in ("base", "layers", "mixers", "override", "norm", "imports"):
            continue
        for value in {
            "bool": [2, math.nan, "7"],
            "int": NO_INT,
            "float": NO_FLOAT,
            "str": [3, True, math.nan, 10**400],
        }[kind]:
            with pytest.raises(ConfigError, match=name):
                zoo.config(small(**{name: value}))
    for text, key in (
        ("norm: {eps: .nan}", "norm.eps"),
        ("max_length: 1.5", "max_length"),
        ("initializer_range: .inf", "initializer_range"),
        ("d_model: true", "d_model|duplicate"),
    ):
        with pytest.raises(ConfigError, match=key):
            zoo.config(write(tmp_path / "x.yaml", PLAIN + text))  # fmt: skip
    for override in (
        "norm.eps=.nan",
        "residual_multiplier=1" + "0" * 400,
        "mixers.mamba.d_state=.inf",
        "vocab_size=true",
        "override=[{at: 0, set: {dt_max: .nan}}]",
    ):
        with pytest.raises(ConfigError, match=re.escape(override.partition("=")[0])):
            zoo.config("mamba-tiny", [override])  # fmt: skip


def test_what_is_infinite_by_default_may_be_infinite():
    cfg = zoo.config(small(layers="mamba2", mixers={"mamba2": {"headdim": 16, "dt_limit": [0.5, math.inf]}}))
    assert tuple(cfg.mixers.mamba2.dt_limit) == (0.5, math.inf)
    with pytest.raises(ConfigError, match="dt_limit"):
        zoo.config(small(layers="mamba2", mixers={"mamba2": {"headdim": 16, "dt_limit": [-math.inf, math.inf]}}))


# --- a config stays in its folder ---------------------------------------------------------------------------------------


def test_the_config_of_a_folder_inherits_from_inside_it(tmp_path):
    secret = write(tmp_path / "outside.yaml", PLAIN)
    inside = write(tmp_path / "model" / "parts.yaml", PLAIN)
    config = tmp_path / "model" / "config.yaml"
    for base in ("parts", "parts.yaml", "./parts.yaml", "mamba-tiny"):
        write(config, f"base: {base}\n")
        assert zoo.config(tmp_path / "model").d_model == zoo.config(config).d_model in (32, 96)
    (tmp_path / "model" / "link.yaml").symlink_to(secret)
    (tmp_path / "model" / "up").symlink_to(tmp_path)
    for base in ("../outside", "../outside.yaml", "link", "up/outside", "sub/../../outside"):
        write(config, f"base: {base}\n")
        with pytest.raises(
            ConfigError, match=r"base: .* leads out of the folder, and a config\.yaml may have been downloaded"
        ):
            zoo.config(tmp_path / "model")
    # nor through another file of the folder
    write(inside, "base: ../outside\n")
    write(config, "base: parts\n")
    with pytest.raises(ConfigError, match="leads out of the folder"):
        zoo.config(config)
    for base in (str(secret), str(secret.with_suffix(""))):
        write(config, f"base: {base}\n")
        with pytest.raises(ConfigError, match="is an absolute path"):
            zoo.config(config)
        with pytest.raises(ConfigError, match="is an absolute path"):
            zoo.config(write(tmp_path / "mine.yaml", f"base: {base}\n"))
    # one's own file may say what it likes, but for files of another kind
    assert zoo.config(write(tmp_path / "sub" / "mine.yaml", "base: ../outside\n")).d_model == 32
    write(tmp_path / "notes.txt", PLAIN)
    with pytest.raises(ConfigError, match="no shipped config and no file"):
        zoo.config(write(tmp_path / "mine.yaml", "base: notes.txt\n"))


def test_config_json_inherits_from_shipped_configs_alone(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "outside.yaml", PLAIN)
    for base in ("outside.yaml", "./outside", str(tmp_path / "outside.yaml"), "../outside", "config.json"):
        with pytest.raises(ConfigError, match=r"base: .* is no shipped name"):
            validate({"base": base}, saved=True)
    assert validate({"base": "mamba-tiny"}, saved=True) == zoo.config("mamba-tiny")

    def change(text):
        content = json.loads(text)
        return json.dumps(content | {"zoo": content["zoo"] | {"base": "outside"}})

    with pytest.raises(ConfigError, match="base: 'outside' in a saved config is no shipped name"):
        zoo.load(copied(saved, tmp_path / "a", "config.json", change))


@pytest.mark.parametrize("zoo_part", ["mamba-tiny", "outside.yaml", "{here}/outside.yaml", ["mamba-tiny"], 5, None])
def test_the_zoo_part_of_config_json_names_no_other_config(saved, tmp_path, monkeypatch, zoo_part):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "outside.yaml", PLAIN)
    part = zoo_part.format(here=tmp_path) if isinstance(zoo_part, str) else zoo_part
    folder = copied(saved, tmp_path / "a", "config.json", lambda s: json.dumps(json.loads(s) | {"zoo": part}))
    with pytest.raises(ConfigError, match=r"zoo: found .*, expected a mapping"):
        zoo.load(folder)


def test_a_downloaded_config_stays_in_its_folder_when_one_s_own_inherits_from_it(tmp_path):
    write(tmp_path / "outside.yaml", PLAIN)
    (tmp_path / "downloaded" / "sub").mkdir(parents=True)
    write(tmp_path / "downloaded" / "config.yaml", "base: sub/inner.yaml\n")
    inner = write(tmp_path / "downloaded" / "sub" / "inner.yaml", "base: ../../outside.yaml\n")
    mine = write(tmp_path / "mine.yaml", "base: downloaded/config.yaml\n")
    with pytest.raises(ConfigError, match="leads out of the folder"):
        zoo.config(mine)
    write(inner, PLAIN)
    assert zoo.config(mine).d_model == 32


def test_a_long_chain_of_bases_is_refused(tmp_path):
    for i in range(40):
        write(tmp_path / f"c{i}.yaml", f"base: c{i + 1}\n")
    write(tmp_path / "c40.yaml", PLAIN)
    assert zoo.config(tmp_path / "c30.yaml").d_model == 32
    with pytest.raises(ConfigError, match="base: more than 16 configs inherit from one another"):
        zoo.config(tmp_path / "c0.yaml")


def test_a_file_that_grows_is_read_to_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(config_file, "_MAX_BYTES", len(PLAIN) - 1)
    with pytest.raises(ConfigError, match=r"x\.yaml: has \d+ bytes, more than"):
        zoo.config(write(tmp_path / "x.yaml", PLAIN))


def test_plain_copies_what_it_is_given():
    given = {"a": [1, (2.5, None)], "b": {"c": True}}
    assert plain(given) == {"a": [1, [2.5, None]], "b": {"c": True}}
    assert plain(given)["b"] is not given["b"] and list(plain({"z": 1, "a": 2})) == ["z", "a"]
    assert list_mixers()

"""The pattern language: golden layouts, the errors' words, round trips, and that no input breaks it."""

import itertools
import random
import time
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hybridzoo.zoo.layout import (
    compress,
    expand,
    from_attn_layer_idx,
    from_jamba,
    from_layer_types,
    from_megatron,
    split_token,
)
from hybridzoo.zoo.registry import ConfigError

# NVIDIA's published 8B hybrid, as its checkpoint spells it
NVIDIA_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"

FORMS = [
    ("mamba mlp", ["mamba", "mlp"]),
    ("mamba * 3", ["mamba"] * 3),
    ("mamba*3", ["mamba"] * 3),
    ("(mamba mlp) * 2 attention", ["mamba", "mlp"] * 2 + ["attention"]),
    ("((a b) * 2 c) * 2", ["a", "b", "a", "b", "c"] * 2),
    ("a * 2 * 3", ["a"] * 6),
    ("mamba2 + attention", ["mamba2+attention"]),
    ("a+b+c", ["a+b+c"]),
    ("x (a + b) * 2 y", ["x", "a+b", "a+b", "y"]),
    ("x a + b y", ["x", "a+b", "y"]),
    ("attention@a mlp attention@a", ["attention@a", "mlp", "attention@a"]),
    ("attention@1 * 2", ["attention@1"] * 2),
    ("(mamba2 + attention)@x", ["(mamba2+attention)@x"]),
    ("(attention) @ x", ["attention@x"]),
    ("  mamba\n  mlp\n", ["mamba", "mlp"]),
    (["mamba", "attention@a", "a+b", "(a+b)@x"], ["mamba", "attention@a", "a+b", "(a+b)@x"]),
    (["mamba * 2", "(a b) * 2"], ["mamba", "mamba", "a", "b", "a", "b"]),
]


@pytest.mark.parametrize(("spec", "tokens"), FORMS, ids=[str(f[0]) for f in FORMS])
def test_every_form_expands_to_its_list(spec, tokens):
    assert expand(spec) == tokens
    assert expand(tokens) == tokens
    assert expand(compress(tokens)) == tokens


BAD = [
    ("", "layers: the pattern is empty. Name at least one mixer."),
    ("  \n ", "layers: the pattern is empty"),
    ([], "layers: the list is empty"),
    ("a )", "layers: column 3: found ')', expected a mixer name or the end: no '(' is open."),
    ("(a b", "layers: column 5: found the end, expected ')' for the '(' at column 1."),
    ("a ()", "layers: column 4: found ')', expected a mixer name or '('."),
    ("a $ b", "layers: column 3: found '$', expected a mixer name or '('."),
    ("a, b", "layers: column 2: found ',', expected a mixer name or '('."),
    ("a\n b $", "layers: line 2, column 4: found '$'"),
    ("2a", "layers: column 1: found '2a', expected a mixer name or '('."),
    ("mambä", "layers: column 5: found 'ä'"),
    ("* 2", "layers: column 1: found '*', expected a mixer name or '('."),
    ("a *", "layers: column 4: found the end, expected how often to repeat, 1 or more, after '*'."),
    ("a * b", "layers: column 5: found 'b', expected how often to repeat"),
    ("a * 0", "layers: column 5: found '0', expected how often to repeat, 1 or more"),
    ("a * -1", "layers: column 5: found '-', expected how often to repeat"),
    ("a +", "layers: column 4: found the end, expected a mixer name after '+'."),
    ("+ a", "layers: column 1: found '+', expected a mixer name or '('."),
    ("a + (b c)", "layers: column 5: found '(', expected a mixer name after '+'"),
    ("(a b) + c", "layers: column 7: found '+', expected no '+' after ')'"),
    ("a + b * 2", "layers: column 7: found '*', expected parentheses before it, '(a + b)'"),
    ("a * 2 + b", "layers: column 7: found '+', expected a mixer name"),
    ("a + b@x", "layers: column 6: found '@', expected parentheses before it, '(a + b)'"),
    ("a@x + b", "layers: column 5: found '+', expected no '+' after a label"),
    ("a@", "layers: column 3: found the end, expected a label after '@'"),
    ("a@+", "layers: column 3: found '+', expected a label after '@'"),
    ("(a b)@x", "layers: column 6: found '@', expected no label here"),
    ("(a@y)@x", "layers: column 6: found '@', expected no label here"),
    ("a * 10001", "layers: column 5: stands for 10001 blocks, more than 10000."),
    ("(a * 10000) * 10000", "layers: column 15: stands for 100000000 blocks"),
    ("a * " + "9" * 5000, "more than 10000"),
    ("(" * 33 + "a" + ")" * 33, "layers: column 33: found '(', expected at most 32 nested parentheses."),
    ("(" * 100_000, "nested parentheses"),
    ("a " * 600_000, "layers: has 1200000 characters"),
    ("a b" + "c" * 200, "layers: column 3: found 'b" + "c" * 39 + "', expected a name of at most 128 characters, and this one has 201."),
    ("a@" + "c" * 129, "expected a label of at most 128 characters, and this one has 129."),
    ("(a@" + "c" * 400_000 + " b) * 5000", "expected a label of at most 128 characters"),
    ("a + " * 17 + "a", "layers: column 65: found 'a', expected at most 16 mixers side by side."),
    ({"n_layer": 4, "allocate": {f"a{i}": 0 for i in range(65)}, "fill": "m"}, "layers.allocate: has 65 kinds, more than 64."),
    (["a"] * 10_001, "layers: stands for more than 10000 blocks"),
    (["a", "b )"], "layers[1]: column 3: found ')'"),
    (["a", ["b"]], "layers[1]: found list \"['b']\", expected a pattern"),
    ([1], "layers[0]: found int '1', expected a pattern"),
    (None, "layers: found nothing, expected a pattern"),
    (7, "layers: found int '7', expected a pattern"),
    (b"mamba", "layers: found bytes"),
    ({"n_layer": 4}, "layers.allocate: found nothing, expected mixers and ratios"),
    ({"n_layers": 4}, "layers.n_layers: unknown key. Did you mean 'n_layer'?"),
    ({"n_layer": 4, "allocate": {"a": 0.5}}, "layers.fill: found nothing, expected the name of one mixer"),
    ({"n_layer": 4, "allocate": {"a": 0.5}, "fill": "m m"}, "layers.fill: found str 'm m', expected the name of one mixer"),
    ({"n_layer": 0, "allocate": {}, "fill": "m"}, "layers.n_layer: found int '0', expected a whole number from 1 to 10000."),
    ({"n_layer": True, "allocate": {}, "fill": "m"}, "layers.n_layer: found bool 'True'"),
    ({"n_layer": 4, "allocate": {"a": 1.5}, "fill": "m"}, "layers.allocate.a: found float '1.5', expected a ratio from 0 to 1."),
    ({"n_layer": 4, "allocate": {"a": float("nan")}, "fill": "m"}, "layers.allocate.a: found float 'nan'"),
    ({"n_layer": 4, "allocate": {"a": 0.75, "b": 0.5}, "fill": "m"}, "layers.allocate.b: 0.5 of 4 blocks is 2, and 1 are left."),
    ({"n_layer": 4, "allocate": {"a": 0.5}, "fill": "m", "place": "midle"}, "layers.place: found str 'midle', expected even, first, last, middle"),
    ({"n_layer": 4, "allocate": {"a": 0.5}, "fill": "m", "place": [1]}, "layers.place: names 1 blocks, and the ratio gives 2."),
    ({"n_layer": 4, "allocate": {"a": 0.5}, "fill": "m", "place": [1, 4]}, "layers.place: block 4 is out of range. There are 4 blocks: use -4 to 3."),
    ({"n_layer": 4, "allocate": {"a": 0.5}, "fill": "m", "place": [1, -3]}, "layers.place: block 1 is given away twice."),
    ({"n_layer": 4, "allocate": {"a": 0.25, "b": 0.25}, "fill": "m", "place": [1]}, "layers.place: one list cannot place 2 kinds. Write {a: [...]}."),
    ({"n_layer": 4, "allocate": {"a": 0.5}, "fill": "m", "place": {"aa": "first"}}, "layers.place.aa: is not allocated. Did you mean 'a'?"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), BAD, ids=[str(b[0])[:30] for b in BAD])
def test_what_is_no_layout_is_one_error_that_says_where(spec, message):
    with pytest.raises(ConfigError) as e:
        expand(spec)
    assert message in str(e.value)
    assert len(str(e.value)) < 300 and "\n" not in str(e.value)


def test_ratios_reproduce_the_published_56_block_hybrid():
    tokens = expand({"n_layer": 56, "allocate": {"attention": 0.08, "mlp": 0.5}, "fill": "mamba2", "place": "even"})
    assert tokens == from_megatron(NVIDIA_8B)
    golden = "M+M+M++M+M*+M+M+M+M++M*+M+M+M+M+M*++M+M+M+M+M*+M++M+M+M+"
    assert tokens == from_megatron(golden, names={"+": "mlp"})


@pytest.mark.parametrize(
    ("n", "at"), [(24, [5, 12, 18]), (48, [6, 13, 20, 27, 34, 41]), (32, [6, 12, 19, 25])], ids=["24", "48", "32"]
)
def test_an_eighth_of_attention_stands_where_megatron_puts_it(n, at):
    tokens = expand({"n_layer": n, "allocate": {"attention": 0.125}, "fill": "mamba"})
    assert [i for i, token in enumerate(tokens) if token == "attention"] == at


@pytest.mark.parametrize("n", [1, 2, 7, 24, 56, 100])
def test_even_placement_allocates_exactly_what_was_asked_and_evenly(n):
    for a in range(n + 1):
        for b in {0, 1, (n - a) // 2, n - a} if a < n else {0}:
            tokens = expand({"n_layer": n, "allocate": {"a": a / n, "b": b / n}, "fill": "m"})
            assert (tokens.count("a"), tokens.count("b")) == (a, b)
        at = [-1] + [i for i, token in enumerate(tokens) if token == "a"] + [n]
        gaps = [y - x - 1 for x, y in itertools.pairwise(at)]
        assert max(gaps) - min(gaps) <= 1


PLACES = [
    ("first", "a a m m m m"),
    ("last", "m m m m a a"),
    ("middle", "m m a a m m"),
    ([1, -1], "m a m m m a"),
    ({"a": "last"}, "m m m m a a"),
]


@pytest.mark.parametrize(("place", "pattern"), PLACES, ids=[str(p[0]) for p in PLACES])
def test_place_decides_where(place, pattern):
    assert expand({"n_layer": 6, "allocate": {"a": 1 / 3}, "fill": "m", "place": place}) == pattern.split()


def test_then_follows_every_block_and_is_not_counted():
    spec = {"n_layer": 4, "allocate": {"a": 0.25}, "fill": "m", "place": "last", "then": "mlp"}
    assert expand(spec) == "m mlp m mlp m mlp a mlp".split()
    assert expand(spec | {"then": None}) == "m m m a".split()
    with pytest.raises(ConfigError, match=r"layers.then: found str 'mlp mlp', expected the name of one mixer"):
        expand(spec | {"then": "mlp mlp"})
    with pytest.raises(ConfigError, match=r"layers.n_layer: 5001, each followed by mlp, are more than 10000\."):
        expand(spec | {"n_layer": 5001})


def test_later_kinds_are_placed_among_what_is_left():
    spec = {"n_layer": 6, "allocate": {"a": 1 / 3, "b": 1 / 3}, "fill": "m"}
    assert expand({**spec, "place": "first"}) == "a a b b m m".split()
    assert expand({**spec, "place": {"a": "middle", "b": [0, 5]}}) == "b m a a m b".split()
    assert expand({**spec, "place": {"a": "last"}}) == "m b m b a a".split()  # b: even


def test_allocated_kinds_may_be_labelled_or_parallel():
    spec = {"n_layer": 4, "allocate": {"attention@z": 0.25}, "fill": "mamba2 + attention", "place": [2]}
    assert expand(spec) == ["mamba2+attention", "mamba2+attention", "attention@z", "mamba2+attention"]


def test_omegaconf_containers_are_read_like_plain_ones():
    cfg = OmegaConf.create(
        {"a": ["m * 2", "n"], "b": {"n_layer": 2, "allocate": {"x": 0.5}, "fill": "m", "place": [0]}}
    )
    assert expand(cfg.a) == ["m", "m", "n"]
    assert expand(cfg.b) == ["x", "m"]


def test_compress_finds_the_period():
    block = "mamba mlp mamba moe mamba mlp mamba moe attention mlp mamba moe mamba mlp mamba moe"
    assert compress(expand(f"({block}) * 4")).endswith(") * 4")
    assert compress(["mamba"] * 48) == "mamba * 48"
    assert compress(["a+b"] * 3) == "(a+b) * 3"
    assert compress(["a", "b"]) == "a b"
    assert compress(expand("mamba2 * 9 attention (mamba2 * 8 attention) * 4")) == "mamba2 (mamba2 * 8 attention) * 5"


def test_split_token_gives_names_and_label():
    assert split_token("mamba") == (["mamba"], None)
    assert split_token("mamba@a") == (["mamba"], "a")
    assert split_token("a+b") == (["a", "b"], None)
    assert split_token("(a+b)@x") == (["a", "b"], "x")


names = st.sampled_from(["m", "mamba", "mamba2", "_x", "A1", "attention", "x" * 70])
labels = st.sampled_from(["a", "1", "0x", "_"])
tokens_ = st.one_of(
    names,
    st.builds(lambda n, x: f"{n}@{x}", names, labels),
    st.lists(names, min_size=2, max_size=3).map("+".join),
    st.builds(lambda n, x: f"({'+'.join(n)})@{x}", st.lists(names, min_size=2, max_size=3), labels),
)


@given(st.lists(tokens_, min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_tokens_survive_printing_and_reading(tokens):
    assert expand(tokens) == tokens
    assert expand(compress(tokens)) == tokens
    assert compress(expand(compress(tokens))) == compress(tokens)


@given(st.lists(st.sampled_from(["a", "b", "a+b"]), min_size=1, max_size=5), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_repetitive_tokens_survive_printing_and_reading(unit, inner, outer):
    tokens = (unit * inner + ["c"]) * outer
    text = compress(tokens)
    assert expand(text) == tokens
    assert len(text) <= len(" ".join(tokens))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (" " * 900_000 + "a", 1), ("a" + " " * 900_000 + "b", 2), ("a" + " " * 900_000, 1), ("a" + " \n\t" * 300_000 + "@x", 1), ("(a * 10000)" + " * 1" * 240_000, 10_000),
        ("(a * 2 b) * 3" + " * 01" * 150_000, 9), ("(a) " * 10_000, 10_000),
    ],
)  # fmt: skip
def test_a_pattern_is_read_in_the_time_of_its_length(text, tokens):
    started = time.process_time()
    assert len(expand(text)) == tokens
    assert time.process_time() - started < 2


def test_a_pattern_of_long_names_is_printed_in_little_memory():
    # 64 tokens of two kilobytes, repeated: the texts of all units that are tried would be gigabytes
    wide = ["+".join(f"{i:03}".replace("0", "o") + "n" * 124 for _ in range(1)) for i in range(64)]
    tokens = [f"({'+'.join(['m' * 120] * 16)})@{name}" for name in wide] * 20
    tracemalloc.start()
    text = compress(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text == f"({' '.join(tokens[:64])}) * 20" and peak < 50e6


def test_absurdly_long_layouts_are_printed_in_bounded_time():
    rng = random.Random(0)
    for tokens in (["a"] * 10_000, [rng.choice("ab") for _ in range(10_000)], ["a", "b", "c"] * 3_333):
        assert expand(compress(tokens)) == tokens


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
)
ratios = st.fixed_dictionaries(
    {"n_layer": st.integers(-2, 200) | junk},
    optional={
        "allocate": st.dictionaries(names | st.text(max_size=4), st.floats(-0.1, 1.1) | junk, max_size=3) | junk,
        "fill": names | junk,
        "place": st.sampled_from(["even", "first", "last", "middle"]) | st.lists(st.integers(-9, 9), max_size=4) | junk,
    },
)


@given(st.text(alphabet="ab1 ()*+@\n,é\x00", max_size=60) | st.text() | st.lists(st.text(max_size=9)) | ratios | junk)
@example("(" * 5000)
@example("a" + "*9" * 5000)
@example("\udcff")
@settings(max_examples=400, deadline=None)
def test_no_input_gives_anything_but_a_layout_or_a_config_error(spec):
    try:
        tokens = expand(spec)
    except ConfigError as e:
        assert str(e).startswith("layers")
    else:
        assert tokens and all(isinstance(token, str) for token in tokens)
        assert expand(compress(tokens)) == tokens


def test_from_attn_layer_idx_counts_layers():
    tokens = from_attn_layer_idx(64, [9, 18, 27, 36, 45, 56])
    assert compress(tokens) == "mamba2 (mamba2 * 8 attention) * 5 mamba2 * 10 attention mamba2 * 7"
    assert from_attn_layer_idx(2, [1], ssm="mamba", mlp="mlp") == ["mamba", "mlp", "attention", "mlp"]
    with pytest.raises(ConfigError, match=r"attn_layer_idx: layer 2 is out of range. There are 2 layers: use 0 to 1."):
        from_attn_layer_idx(2, [2])
    with pytest.raises(ConfigError, match="n_layer: 0 layers"):
        from_attn_layer_idx(0, [])


def test_from_megatron_counts_sublayers():
    assert from_megatron("M-M|*-E") == ["mamba2", "mlp", "mamba2", "attention", "mlp", "moe"]
    assert from_megatron("MG", names={"M": "mamba", "G": "gdn"}) == ["mamba", "gdn"]
    assert len(from_megatron(NVIDIA_8B)) == 56
    for pattern, message in (
        ("MxM", "column 2: character 'x' has no name"),
        ("MG", r"column 2: character 'G' \(Gated DeltaNet\) has no name. Pass names=\{'G': 'a mixer'\}"),
        ("MEM*E/*E/*E", "column 6: '/' begins the multi-token-prediction layers.*Leave out '/\\*E/\\*E'"),
        ("|", "0 layers"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_megatron(pattern)


def test_from_jamba_counts_layers_of_two_blocks():
    tokens = from_jamba(8)
    assert tokens == "mamba mlp mamba moe mamba mlp mamba moe attention mlp mamba moe mamba mlp mamba moe".split()
    assert from_jamba(2, 2, 1, num_experts=1) == ["mamba", "mlp", "attention", "mlp"]
    with pytest.raises(ConfigError, match="attn_layer_offset: is 8, with attn_layer_period = 8"):
        from_jamba(8, 8, 8)


def test_from_layer_types_reads_old_and_new_names():
    assert from_layer_types(["mamba", "attention"]) == from_layer_types(["linear_attention", "full_attention"])
    assert from_layer_types(["mamba", "mlp", "full_attention", "moe"]) == ["mamba2", "mlp", "attention", "moe"]
    assert from_layer_types(["mamba", "sliding_attention"], "dense") == ["mamba2", "mlp", "sliding_attention", "mlp"]
    both = from_layer_types(["mamba", "attention"], ["dense", "sparse"], names={"mamba": "mamba"})
    assert both == ["mamba", "mlp", "attention", "moe"]
    with pytest.raises(ConfigError, match=r"layer_types\[1\]: unknown layer type 'atention'. Did you mean 'attention'"):
        from_layer_types(["mamba", "atention"])
    with pytest.raises(ConfigError, match="mlp_layer_types: has 1 entries, layer_types has 2"):
        from_layer_types(["mamba", "mamba"], ["dense"])

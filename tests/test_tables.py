"""``zoo list`` and ``zoo show``: whole at 80 columns and in a pipe, repeated rows folded, sizes that are the models'."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import hybridzoo as zoo
from hybridzoo.__main__ import app
from hybridzoo.zoo.config.shipped import find_models
from hybridzoo.zoo.models.stats import Row, stats
from hybridzoo.zoo.tables import fold, in_gigabytes, in_units


def run(*words, columns=80, status=0):
    result = CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": columns and str(columns)})
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def rows_of(text, start=0):
    return [Row(start + i, token, 1, 1, 1, 1) for i, token in enumerate(text)]


@pytest.mark.parametrize(
    ("pattern", "folded"),
    [
        ("a", "a"),
        ("aaa", "a*3"),
        ("abab", "ab*2"),
        ("abababc", "ab*3 c"),
        ("aabaabaab", "aab*3"),
        ("xabcabcabcx", "x abc*3 x"),
        ("aaaabbbb", "a*4 b*4"),
        ("abc", "a b c"),
        ("", ""),
    ],
)
def test_repeated_rows_and_groups_are_folded(pattern, folded):
    rows = rows_of(pattern)
    found = fold(rows)
    assert [row for group, times in found for row in (group * times)] or not rows
    said = ["".join(row.token for row in group) + (f"*{times}" if times > 1 else "") for group, times in found]
    assert " ".join(said) == folded
    assert sum(len(group) * times for group, times in found) == len(rows)


def test_rows_that_differ_in_a_number_are_not_folded():
    a, b = rows_of("aa")
    assert len(fold([a, Row(1, "a", 2, 1, 1, 1)])) == 2 and len(fold([a, b])) == 1
    assert all(len(group) == 1 for group, _ in fold(rows_of("abab"), longest=1))


def test_an_alternating_pattern_of_64_rows_is_readable():
    text = run("show", "transformer-tiny", "layers=(attention mlp) * 32", "d_model=16", "mixers.attention.headdim=4")
    lines = text.splitlines()
    assert len(lines) < 16 and any(re.match(r"0-63 +\( 2 blocks \) × 32", line) for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("         ")][:2] == ["attention", "mlp"]


@pytest.mark.parametrize("name", ["mamba-130m", "jamba-mini", "nvidia-hybrid-8b", "zamba2-7b"])
def test_show_is_whole_at_80_columns(name):
    text = run("show", name)
    assert max(map(len, text.splitlines())) <= 80
    table = text.split("weights:")[0]
    tokens = set(re.findall(r"[\w@]+", zoo.config(name).layers)) - {str(n) for n in range(200)}
    assert all(re.search(rf"^[\d -]* {re.escape(t)}( × \d+)? ", table, re.M) for t in tokens), table


def test_show_says_dtype_gigabytes_and_which_flops(tmp_path):
    text = run("show", "mamba-130m")
    # 129,135,360 parameters of 4 bytes
    assert "weights: float32, 0.517 GB" in text and "forward FLOPs" in text and "2.7 MiB at any length" in text
    flops = stats("mamba-130m").flops
    assert f"FLOPs per token at 2,048 tokens: {in_units(flops)} forward, {in_units(3 * flops)} training" in text
    half = json.loads(run("show", "mamba-130m", "--dtype", "bfloat16", "--json"))
    model = zoo.build("mamba-130m", device="meta", dtype=torch.bfloat16)
    assert half["dtype"] == "bfloat16"
    assert half["weight_bytes"] == sum(p.numel() * p.element_size() for p in model.parameters()) > 2 * half["params"]
    zoo.save(zoo.build("mamba-tiny", ["d_model=16"], dtype=torch.float16), tmp_path / "half")
    assert "weights: float16, " in run("show", tmp_path / "half")


def test_a_model_that_is_called_like_markup_keeps_its_name(tmp_path):
    path = tmp_path / "[bold]x.yaml"
    path.write_text("base: mamba-tiny\n")
    assert str(path) in run("show", path, columns=400)


def test_list_finds_what_contains_a_word():
    assert [m["name"] for m in find_models("attn")] == ["mamba2attn-2.7b", "mamba2attn-tiny"]
    assert [m["name"] for m in find_models("JAMBA")] == ["jamba-mini", "jamba-tiny"]
    assert [m["name"] for m in find_models("mamba-tiny*")] == ["mamba-tiny"]
    assert "Near to it: mamba-tiny" in run("list", "mamba-tinny", status=1)
    assert "Near to it: jamba" in run("list", "jambo", status=1)


def test_list_has_columns_and_is_whole():
    lines = run("list").splitlines()
    assert re.split("  +", lines[0].strip()) == ["model", "parameters", "active", "state at 1k", "pattern"]
    assert max(map(len, lines)) <= 80
    whole = run("list", columns=None)
    assert "what it is" in whole and len(whole.splitlines()) == len(zoo.list_models()) + 1
    assert re.search(r"^jamba-mini +51\.6 B +12\.1 B +48\.7 MiB +\(\(mamba mlp", whole, re.M)


def test_numbers_are_short():
    assert [in_units(n) for n in (0, 7, 999, 1000, 123_456, 1.5e9, 99.96e9)] == [
        "",
        "7",
        "999",
        "1.00 k",
        "123 k",
        "1.50 G",
        "100 G",
    ]
    assert (in_units(2.5e9, "B"), in_gigabytes(516_541_440), in_gigabytes(3.2e10)) == ("2.50 B", "0.517 GB", "32.00 GB")


def test_version_and_short_help():
    assert run("--version") == f"hybridzoo {zoo.__version__}\n"
    for command in ([], ["list"], ["show"], ["train"], ["eval"], ["bench"]):
        assert "Usage:" in run(*command, "-h")


def test_show_reads_every_kind_of_saved_folder(tmp_path):
    pytest.importorskip("transformers")
    zoo.save(zoo.build("mamba-tiny", ["d_model=16"]), tmp_path / "ours")
    params = json.loads(run("show", tmp_path / "ours", "--json"))["params"]
    for target in ("hf", "mamba_ssm"):
        run("convert", tmp_path / "ours", tmp_path / target, "--to", target)
        assert json.loads(run("show", tmp_path / target, "--json"))["params"] == params
    (tmp_path / "empty").mkdir()
    assert "holds neither config.yaml nor config.json" in run("show", tmp_path / "empty", status=1)

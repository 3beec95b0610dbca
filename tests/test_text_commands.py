"""What ``zoo generate`` reads and writes, as people have and take it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from command_line import invoke

import hybridzoo as zoo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return zoo.save(zoo.build("mamba-tiny", ["d_model=16"]), tmp_path_factory.mktemp("saved"))


def prompts_of(folder, file, **more):
    arguments = ("generate", folder, "--device", "cpu", "--max-new-tokens", 2, "--json", "--prompts", file)
    return [json.loads(line)["prompt"] for line in invoke(*arguments, **more).stdout.strip("\n").split("\n")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_prompts_are_cut_at_line_ends_alone(folder, tmp_path, end, mark):
    # others that str.splitlines cuts at stand inside of texts
    prompts = ["a\x0bb\x0cc\x1cd", "\x85e\u2028f\u2029", " gö"]
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes((mark + end.join([prompts[0], "", " ", *prompts[1:]])).encode())
    lines.write_bytes((mark + end.join(json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts)).encode())
    assert prompts_of(folder, plain) == prompts_of(folder, lines) == prompts
    assert prompts_of(folder, "-", input=plain.read_bytes()) == prompts


def test_prompts_that_are_no_text_are_named_before_anything_is_written(folder, tmp_path):
    arguments = ("generate", folder, "--device", "cpu", "--max-new-tokens", 2, "--batch-size", 1)
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes(b"ab\nc\xffd\n")
    lines.write_text('{"prompt": "ab"}\n{"prompt": "c\\ud800d"}\n')
    for options, words in (
        (("--prompts", plain), f"{plain}: is not UTF-8 text (byte 4 is 0xff). Convert it.\n"),
        (("--prompts", lines), f"{lines}, line 2: the prompt holds '\\ud800', half of a surrogate pair"),
    ):
        refused = invoke(*arguments, *options, status=1)
        assert words in refused.stderr and refused.stdout == ""
    for options in ((), ("--prompts", "-")):
        refused = invoke(*arguments, *options, input=plain.read_bytes(), status=1)
        assert "standard input: is not UTF-8 text" in refused.stderr and refused.stdout == ""


def test_a_standard_input_that_is_closed_is_an_error_of_one_line(folder):
    closed = "import sys; sys.stdin = None; from hybridzoo.__main__ import main; main()"
    asked = [sys.executable, "-c", closed, "generate", str(folder), "--device", "cpu", "--prompts", "-"]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: standard input: is closed") and done.stderr.count("\n") == 1

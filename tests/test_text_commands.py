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


@pytest.fixture
def spaced(tmp_path):
    """A folder of a model whose tokenizer is of Llama's kind: it takes the space from the beginning of what it decodes."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "▁the", "▁quick", "▁fox", *"▁abcdefghijklmnopqrstuvwxyz"]
    inside = Tokenizer(models.Unigram([(piece, -1.0 if len(piece) > 1 else -9.0) for piece in pieces], unk_id=0))
    inside.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inside.decoder = decoders.Metaspace(prepend_scheme="first")
    torch.manual_seed(0)
    folder = zoo.save(zoo.build("mamba-tiny", ["d_model=16", f"vocab_size={len(pieces)}"]), tmp_path / "spaced")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inside, **special).save_pretrained(folder)
    return folder, pieces


def test_a_word_behind_a_prompt_keeps_its_space(spaced):
    folder, pieces = spaced

    def told(prompt, piece, *options):
        only = json.dumps({i: -1e9 for i in range(len(pieces)) if i != pieces.index(piece)})
        asked = ("generate", folder, "--device", "cpu", "--max-new-tokens", 2, "--logit-bias", only, "--prompt", prompt)
        return invoke(*asked, *options).stdout

    assert told("the quick", "▁fox") == "the quick fox fox\n"
    assert told("the qui", "c") == "the quicc\n"  # a word goes on
    assert told("the ", "q") == "the qq\n"
    assert told("", "▁fox") == "fox fox\n"  # a text begins
    found = json.loads(told("the quick", "▁fox", "--json", "--stop", " fox"))
    assert (found["text"], found["tokens"], found["ended"]) == (" fox", 1, "stop")
    two = json.loads(told("the quick", "▁fox", "--json", "--n", 2))
    assert [one["text"] for one in two] == [" fox fox"] * 2


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


def program(before, *arguments, stdout=subprocess.PIPE, unbuffered=""):
    """The command line in a process of its own, after a line of Python."""
    code = f"import sys; {before}; from hybridzoo.__main__ import main; main()"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered}
    asked = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(asked, text=True, stdout=stdout, stderr=subprocess.PIPE, env=env)


@pytest.mark.parametrize(
    ("stream", "options", "words"),
    [
        ("stdin", ("--prompts", "-"), "standard input: is closed"),
        ("stdout", ("--prompt", "ab"), "standard output: is closed"),
        ("stdout", ("--prompt", "ab", "--json"), "standard output: is closed"),
    ],
)
def test_a_stream_that_is_closed_is_an_error_of_one_line(folder, stream, options, words):
    asked = program(f"sys.{stream} = None", "generate", folder, "--device", "cpu", "--max-new-tokens", 2, *options)
    told, said = asked.communicate()
    assert (asked.returncode, told) == (1, "")
    assert said.startswith(f"error: {words}") and said.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("as_json", [True, False])
def test_who_has_read_enough_hears_no_more(folder, tmp_path, as_json, unbuffered):
    prompts = tmp_path / "p.txt"
    prompts.write_text("ab\n" * 100)
    options = ("--max-new-tokens", 2, "--batch-size", 1, "--prompts", prompts, *(("--json",) if as_json else ()))
    asked = program("pass", "generate", folder, "--device", "cpu", *options, unbuffered=unbuffered)
    assert "ab" in asked.stdout.readline()
    asked.stdout.close()
    assert (asked.wait(), asked.stderr.read()) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full is Linux's")
def test_a_full_disk_is_an_error_of_one_line(folder):
    for options in ((), ("--json",)):
        with open("/dev/full", "w") as full:
            asked = ("generate", folder, "--device", "cpu", "--max-new-tokens", 2, "--prompt", "ab", *options)
            there = program("pass", *asked, stdout=full)
            said = there.communicate()[1]
        assert there.returncode == 1 and "No space left on device" in said and said.count("\n") == 1


def test_a_seed_may_be_larger_than_those_of_torch(folder):
    asked = ("generate", folder, "--device", "cpu", "--max-new-tokens", 4, "--prompt", "ab", "--seed")
    assert invoke(*asked, 10**26).stdout.startswith("ab")

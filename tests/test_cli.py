"""The command line: what it prints, what it refuses, and with which status."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from command_line import invoke
from typer.testing import CliRunner

import hybridzoo as zoo
from hybridzoo.__main__ import app
from hybridzoo.zoo.models.causal_lm import CausalLM
from hybridzoo.zoo.tokenizer import ByteTokenizer

COMMANDS = [
    "list",
    "show",
    "train",
    "generate",
    "convert",
    "predict",
    "explain",
    "eval",
    "lm-eval",
    "bench",
    "doctor",
    "demo",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return zoo.save(zoo.build("mamba-tiny", ["d_model=16"]), tmp_path_factory.mktemp("saved"))


def test_help_lists_every_command():
    text = invoke("--help").stdout
    assert all(f" {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "lm-eval"])
def test_every_command_explains_itself_with_an_example(command):
    assert f"Example: zoo {command}" in invoke(command, "--help").stdout


def test_no_arguments_is_a_question_about_usage():
    assert "Usage" in CliRunner().invoke(app, []).output


def test_list_filters_by_wildcard():
    assert [m["name"] for m in json.loads(invoke("list", "jamba*", "--json").stdout)] == zoo.list_models("jamba*")
    assert "jamba-mini" in invoke("list").stdout


def test_show_prints_every_layer_and_the_sums():
    text = invoke("show", "jamba-tiny").stdout
    report = json.loads(invoke("show", "jamba-tiny", "--json").stdout)
    model = zoo.build("jamba-tiny", device="meta")
    assert report["params"] == sum(p.numel() for p in model.parameters()) and f"{report['params']:,}" in text
    assert [r["token"] for r in report["rows"] if r["index"] is not None] == report["layers"].split()
    assert all(token in text for token in report["layers"].split())
    assert report["state_bytes_by_length"]["4096"] > report["state_bytes_by_length"]["2048"] > 0
    assert report["active_params"] < report["params"]


def test_show_joins_equal_neighbours_and_takes_overrides():
    text = invoke("show", "mamba-130m", "layers=mamba * 5", "d_model=64").stdout
    assert "0-4" in text and "mamba × 5" in text
    report = json.loads(invoke("show", "mamba-130m", "layers=mamba * 5", "d_model=64", "--json").stdout)
    assert len(report["rows"]) == 5 + 3


def test_generate_continues_the_prompt_and_is_reproducible(folder):
    arguments = ("generate", folder, "--prompt", "ab", "--max-new-tokens", 8, "--device", "cpu")
    first = invoke(*arguments)
    assert first.stdout.startswith("ab") and first.stderr == ""
    assert invoke(*arguments).stdout == first.stdout
    assert json.loads(invoke(*arguments, "--json").stdout)["prompt"] == "ab"
    assert invoke(*arguments, "--seed", 1).stdout != first.stdout


def test_generate_takes_types_of_weights_and_states(folder, monkeypatch):
    seen = []
    plain = CausalLM.stream
    monkeypatch.setattr(
        CausalLM, "stream", lambda self, *a, **k: seen.append((self.some_weight().dtype, k)) or plain(self, *a, **k)
    )
    arguments = ("generate", folder, "--prompt", "ab", "--max-new-tokens", 2, "--device", "cpu")
    invoke(*arguments)
    invoke(*arguments, "--dtype", "bfloat16", "--state-dtype", "bfloat16")
    assert [(dtype, k["state_dtype"]) for dtype, k in seen] == [(torch.float32, None), (torch.bfloat16, torch.bfloat16)]


def test_generate_continues_files_of_prompts(folder, tmp_path):
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("ab\n\na longer one\n")
    lines.write_text('{"prompt": "ab"}\n{"prompt": "a longer one"}\n')
    arguments = ("generate", folder, "--max-new-tokens", 6, "--device", "cpu", "--n", 2, "--json", "--prompts")
    found = [json.loads(line) for line in invoke(*arguments, plain).stdout.splitlines()]
    assert [one["prompt"] for one in found] == ["ab", "ab", "a longer one", "a longer one"]
    assert invoke(*arguments, lines, "--batch-size", 1).stdout == invoke(*arguments, plain).stdout
    alone = json.loads(
        invoke("generate", folder, "--prompt", "ab", "--max-new-tokens", 6, "--device", "cpu", "--json").stdout
    )
    assert alone == found[0] and len(alone["logprobs"]) == alone["tokens"] and alone["ended"] in ("length", "eos")
    piped = invoke("generate", folder, "--max-new-tokens", 6, "--device", "cpu", input="ab")
    assert piped.stdout == f"ab{alone['text']}\n"
    asked = ("generate", folder, "--prompt", "ab", "--device", "cpu")
    greedy = invoke(*asked, "--temperature", 0).stdout
    # with somebody who guesses, greedy is what is meant
    assert invoke(*asked, "--assistant", "lookup").stdout == invoke(*asked, "--assistant", folder).stdout == greedy
    refused = invoke(*asked, "--assistant", "lookup", "--temperature", 0.5, status=1)
    assert refused.stdout == "" and "temperature=0.5" in refused.stderr
    stopped = invoke("generate", folder, "--prompt", "ab", "--stop", alone["text"][2], "--json", "--device", "cpu")
    assert json.loads(stopped.stdout)["ended"] == "stop"


def test_ctrl_c_leaves_what_was_written(folder, monkeypatch):
    from hybridzoo.zoo.models import decoder

    arguments = ("generate", folder, "--prompt", "ab", "--max-new-tokens", 12, "--device", "cpu", "--seed", 1)
    whole, advance, looks = invoke(*arguments).stdout, decoder.Decoder.advance, []

    def interrupted(*given, **options):
        looks.append(1)
        if len(looks) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(*given, **options)

    monkeypatch.setattr(decoder.Decoder, "advance", interrupted)
    result = invoke(*arguments, status=130)
    assert result.stderr == "interrupted\n"
    assert "ab" < result.stdout < whole and whole.startswith(result.stdout)
    looks.clear()
    lines = "".join(f"{'xy'[i % 2]}\n" for i in range(4))
    batch = ("--json", "--prompts", "-", "--batch-size", 1, "--max-new-tokens", 4)
    done = invoke(*arguments[:2], "--device", "cpu", *batch, input=lines, status=130).stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in done] == ["x"]  # each line is whole


def test_generate_says_what_is_wrong_with_prompts(folder, tmp_path):
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "ab"}\n{"text": "x"}\n')
    assert "line 2: no object with a 'prompt'" in invoke("generate", folder, "--prompts", lines, status=1).stderr
    lines.write_text("\n")
    assert "holds no prompts" in invoke("generate", folder, "--prompts", lines, status=1).stderr
    missing = invoke("generate", folder, "--prompts", tmp_path / "p.json", status=1).stderr
    assert "no such file" in missing and "p.jsonl" in missing
    assert "give one of them" in invoke("generate", folder, "--prompts", lines, "--prompt", "x", status=1).stderr


def test_generate_says_that_a_config_is_untrained():
    result = invoke("generate", "mamba-tiny", "--max-new-tokens", 1, "--device", "cpu")
    assert "untrained" in result.stderr and "untrained" not in result.stdout


def test_convert_goes_there_and_back_and_says_what_matched(folder, tmp_path):
    text = invoke("convert", folder, tmp_path / "hf").stdout
    assert "hybridzoo -> mamba: all 22 tensors matched" in text and "model.safetensors" in text
    report = json.loads(invoke("convert", tmp_path / "hf", tmp_path / "ssm", "--to", "mamba_ssm", "--json").stdout)
    assert (report["source"], report["target"], report["tensors"]) == ("mamba", "mamba_ssm", 22)
    assert "pytorch_model.bin" in report["files"] and "tokenizer.json" in report["files"]
    invoke("convert", tmp_path / "ssm", tmp_path / "back", "--to", "hybridzoo")
    back, first = zoo.load(tmp_path / "back").state_dict(), zoo.load(folder).state_dict()
    assert back.keys() == first.keys() and all(torch.equal(back[name], first[name]) for name in back)


@pytest.mark.parametrize("at", ["writing.save_file", "native.tokenizer_files"])
def test_convert_leaves_nothing_half_written(folder, tmp_path, monkeypatch, at):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(f"hybridzoo.zoo.checkpoint.{at}", interrupted)
    assert invoke("convert", folder, tmp_path / "new", status=130).stderr == "interrupted\n"
    assert not list(tmp_path.iterdir())


def test_eval_scores_local_tasks(folder):
    sizes = json.dumps({"docs": 2, "length": 16, "pairs": 4, "vocab": 18})
    arguments = ("eval", folder, "--tasks", "hybridzoo_mqar", "--metadata", sizes, "--device", "cpu", "--batch-size", 8)
    rows = json.loads(invoke(*arguments, "--json").stdout)
    row = next(r for r in rows if r["metric"] == "acc")
    assert row["task"] == "hybridzoo_mqar" and row["chance"] == 0.25 and row["n"] == 8 and 0 <= row["value"] <= 1
    out = folder / "results" / "scores.json"
    assert "hybridzoo_mqar" in invoke(*arguments, "--out", out).stdout
    assert "hybridzoo_mqar" in json.loads(out.read_text())["results"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_weights_that_are_no_numbers_are_named(tmp_path, command, value):
    model = zoo.build("mamba-tiny", ["d_model=16"])
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[3, 5:7] = value
    zoo.save(model, tmp_path / "diverged")
    more = ("--tasks", "hybridzoo_mqar") if command == "eval" else ()
    said = invoke(command, tmp_path / "diverged", *more, "--device", "cpu", status=1)
    assert (
        said.stdout == ""
        and said.stderr.count("\n") == 1
        and f"error: {tmp_path / 'diverged'}: 2 of the 1,024 values of" in said.stderr
    )
    assert "backbone.layers.1.mixer.in_proj.weight are NaN or infinite" in said.stderr


def test_doctor_names_a_backend_for_every_op():
    report = json.loads(invoke("doctor", "--json").stdout)
    assert set(report["ops"]) >= {"selective_scan", "ssd", "causal_conv1d", "attention", "moe"}
    for backends in report["ops"].values():
        assert sum(b["chosen"] for b in backends) == 1 and all(b["reason"] for b in backends)
    assert report["packages"]["torch"] == torch.__version__
    text = invoke("doctor").stdout
    assert "→" in text and "not installed" in text and torch.__version__ in text


def test_bench_passes_its_arguments_on(monkeypatch, tmp_path):
    import hybridzoo.eval.bench.run as bench

    def fake(what, vs, out, parts, profile):
        print("a table")
        return {"what": what, "vs": vs, "out": str(out), "parts": parts, "profile": profile}

    monkeypatch.setattr(bench, "run_bench", fake)
    path = tmp_path / "x.json"
    result = invoke("bench", "scan", "--vs", "a", "--vs", "b", "--part", "conv", "--out", path, "--json")
    want = {"what": "scan", "vs": ["a", "b"], "out": str(path), "parts": ["conv"], "profile": False}
    assert json.loads(result.stdout) == want


def test_bench_plot_draws_what_a_file_holds(tmp_path):
    assert "name the JSON file" in invoke("bench", "plot", status=1).stderr
    row = {"name": "x", "op": "forward", "peer": "p", "ours_ms": 1.0, "peer_ms": 2.0, "ratio": 2.0}
    path = tmp_path / "scan.json"
    path.write_text(json.dumps({"what": "scan", "device": "GPU", "cases": [row]}))
    invoke("bench", "plot", path)
    assert "2.0x" in (tmp_path / "scan.svg").read_text()


def test_lm_eval_passes_every_flag_on(monkeypatch):
    import hybridzoo.eval.run as run

    seen = []
    monkeypatch.setattr(run, "lm_eval_main", seen.extend)
    flags = ["--model", "hybridzoo", "--tasks", "a,b", "--limit", "3", "-h", "--help"]
    invoke("lm-eval", *flags)
    assert seen == flags


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nonsense"], 2, "No such command"),
        (["show"], 2, "Missing argument"),
        (["show", "jamba-tiny", "--colour"], 2, "No such option"),
        (["train", "mamba-tiny"], 2, "--data"),
        (["list", "zzz*"], 1, "no model matches 'zzz*'"),
        (["show", "jamba-tinny"], 1, "Did you mean 'jamba-tiny'?"),
        (["show", "jamba-tiny", "d_modle=3"], 1, "Did you mean 'd_model'?"),
        (["show", "jamba-tiny", "mixers.attention.nheads=7"], 1, "mixers.attention"),
        (["generate", "runs/none/such"], 1, "runs/none/such"),
        (["train", "mamba-tiny", "--data", "no/where.txt"], 1, "no/where.txt: no such file"),
        (["eval", "mamba-tiny", "--tasks", "hybridzoo_mqra"], 1, "Did you mean 'hybridzoo_mqar'?"),
        (["eval", "mamba-tiny", "--tasks", "x", "--metadata", "{"], 1, "--metadata: is not JSON"),
        (["convert", "no/such", "out"], 1, "no/such: no such folder"),
        (["convert", "no/such", "."], 1, ".: exists already"),
        (["convert", "a", "b", "--to", "gguf"], 2, "'gguf' is not one of"),
        (
            ["bench", "nothing"],
            1,
            "unknown benchmark 'nothing'. Known: scan, ssd, attention, train, trainer, vision, generate, step, data, fields, parity, plot, readme",
        ),
        (["train", "mamba-tiny", "--data", "a file", "--out", "a file/run"], 1, "a file: is a file"),
        (["train", "mamba-tiny", "--data", "a file", "--device", "tpu"], 1, "device='tpu'"),
        (["train", "mamba-tiny", "--data", "a file", "--seed", "-1"], 1, "seed=-1"),
        (["list", "--import"], 2, "'--import' requires an argument"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_work_is_one_line_and_a_status(arguments, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    result = invoke(*arguments, status=status)
    assert message in result.stderr and result.stdout == "" and "Traceback" not in result.stderr
    if status == 1:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_debug_shows_where_an_error_comes_from():
    assert "Traceback" in invoke("--debug", "show", "nosuch", status=1).stderr


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(pattern):
        raise KeyError("ours")

    monkeypatch.setattr("hybridzoo.zoo.config.shipped.list_models", broken)
    assert isinstance(CliRunner().invoke(app, ["list"]).exception, KeyError)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [m for m in sys.modules if m.startswith("hybridzoo.eval")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'hybridzoo[eval]'" in invoke("eval", "mamba-tiny", "--tasks", "x", status=1).stderr


def test_ctrl_c_is_one_line_and_130(monkeypatch):
    def interrupted(pattern):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("hybridzoo.zoo.config.shipped.list_models", interrupted)
    result = invoke("list", status=130)
    assert result.stderr == "interrupted\n"


def test_a_warning_is_one_line(monkeypatch, capsys):
    import warnings

    import hybridzoo.__main__ as command_line

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back when the test ends
    monkeypatch.setattr(command_line, "app", lambda: warnings.warn("something is off", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        command_line.main()
        assert capsys.readouterr().err == "warning: something is off\n"


def test_output_that_is_piped_has_no_colours_and_stays_whole():
    zoo_command = os.path.join(os.path.dirname(sys.executable), "zoo")
    done = subprocess.run([zoo_command, "show", "mamba-tiny"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "\x1b" not in done.stdout and done.stderr == ""
    assert "mamba × 2" in done.stdout


def test_brackets_and_escapes_in_names_are_text(folder, tmp_path):
    odd = tmp_path / "a[/b]\x1b]0;title\x07"
    invoke("convert", folder, odd, "--to", "hybridzoo")
    out = invoke("show", odd).stdout
    assert "a[/b]\\x1b]0;title\\x07" in out and "\x1b" not in out


def test_a_terminal_gets_no_commands_from_a_model(folder, monkeypatch):
    said = "a\x1b]0;title\x07\x9bb\tc\nd é"
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: said)
    assert said in invoke("generate", folder, "--max-new-tokens", "1").stdout
    out = invoke("generate", folder, "--max-new-tokens", "1", "--json").stdout
    assert json.loads(out)["text"] == said and not set(out) & set("\x1b\x07\x9b")
    monkeypatch.setattr("hybridzoo.zoo.terminal._is_terminal", lambda: True)
    assert "a\\x1b]0;title\\x07\\x9bb\tc\nd é\n" in invoke("generate", folder, "--max-new-tokens", "1").stdout


def test_generate_takes_a_hub_id_and_says_at_once_that_the_hub_has_none(monkeypatch):
    monkeypatch.setattr("hybridzoo.zoo.checkpoint.files.unreachable", lambda: "there is no network")
    error = invoke("generate", "nobody/has-this", status=1).stderr
    assert "nobody/has-this: no such folder, and the hub does not give it (there is no network)" in error


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", "{"])
def test_plot_says_which_file_holds_no_results(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert "a.json" in invoke("bench", "plot", tmp_path / "a.json", status=1).stderr

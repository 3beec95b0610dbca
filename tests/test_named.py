"""What is mistyped on a command line is found before torch, transformers and lm-eval are imported, with the nearest name."""

import json
import subprocess
import sys

import pytest

from hybridzoo.eval.tasks import check_metadata, check_tasks, names, sizes
from hybridzoo.zoo.named import check_model

MISTYPED = {
    ("generate", "jamba-tinny"): "Did you mean 'jamba-tiny'?",
    ("generate", "runs/mnie"): "Did you mean 'runs/mine'?",
    ("generate", "my.yml"): "Did you mean 'my.yaml'?",
    ("generate", ""): "the name is empty",
    ("show", "runs/mine/config.yml"): "Did you mean 'runs/mine/config.yaml'?",
    ("show", "nothing/like/it"): "there is no file or folder 'nothing/like/it'",
    ("eval", "jamba-tinny", "--tasks", "hybridzoo_mqar"): "Did you mean 'jamba-tiny'?",
    ("eval", "jamba-tiny", "--tasks", "hybridzoo_mqra"): "Did you mean 'hybridzoo_mqar'?",
    ("eval", "jamba-tiny", "--tasks", "mqar"): "Did you mean 'hybridzoo_mqar'?",
    ("eval", "jamba-tiny", "--tasks", "hybridzoo_mqar,lambada_openia"): "Did you mean 'lambada_openai'?",
    ("eval", "jamba-tiny", "--tasks", "hybridzoo_mqar", "--metadata", "{"): "--metadata: is not JSON",
    ("eval", "jamba-tiny", "--tasks", "hybridzoo_mqar", "--metadata", '{"doc": 3}'): "Did you mean 'docs'?",
    ("eval", "jamba-tiny", "--tasks", "hybridzoo_mqar", "--batch-size", "many"): "--batch-size: is 'many'",
    ("eval", "jamba-tiny", "--tasks", "hybridzoo_mqar", "--limit", "0"): "--limit: is 0",
    ("eval", "jamba-tiny", "--tasks", "hybridzoo_mqar", "--out", "runs"): "--out: runs is a folder. Name a JSON file.",
    ("demo", "--out", "my.yaml"): "--out: my.yaml is a file. Name a folder.",
    ("lm-eval", "--model", "hybridzoo", "--model_args", "pretrained=jamba-tinny,dtype=auto", "--tasks", "arc_easy"): "'jamba-tiny'?",
    ("lm-eval", "--model", "hf", "--tasks=arc_esy"): "Did you mean 'arc_easy'?",
}  # fmt: skip


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    (tmp_path / "my.yaml").touch()
    (tmp_path / "owner" / "model-130m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_slip_is_found_before_the_heavy_imports(workspace):
    code = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from hybridzoo.__main__ import app\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    result = CliRunner().invoke(app, command)\n"
        "    heavy = sorted({'torch', 'transformers', 'lm_eval', 'datasets', 'omegaconf'} & set(sys.modules))\n"
        "    print(json.dumps([command, result.exit_code, result.stderr, heavy]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(MISTYPED))], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(MISTYPED)
    for command, status, error, heavy in said:
        assert status == 1 and error.startswith("error: ") and error.count("\n") == 1, (command, error)
        assert MISTYPED[tuple(command)] in error and heavy == [], (command, error, heavy)


def test_what_is_no_slip_passes(workspace):
    for name in ("jamba-tiny", "runs/mine", "my.yaml", "state-spaces/mamba-130m", "owner/model-370m", str(workspace)):
        check_model(name)
    for name, hub in (("owner/modle-130m", True), ("state-spaces/mamba-130m", False)):
        with pytest.raises(ValueError, match="there is no file or folder"):
            check_model(name, hub=hub)


def test_tasks_of_lm_eval_are_known_however_they_are_written_down():
    pytest.importorskip("lm_eval")
    # a file, a group, a tag, a quoted key, a name with brackets, one inside a file without an ending, wildcards
    check_tasks(
        ["lambada_openai", "mmlu", "ai2_arc", "AraDiCE_ArabicMMLU_high_humanities_history_egy", "mmlu_*", "hybridzoo_*"]
    )
    check_tasks(
        ["egymmlu_arabic_language_(grammar)", "acp_bench", "hellaswag_multilingual", "hybridzoo_recall", *names()]
    )
    for slip in ("copy", "mmlu_", "hybridzoo_recal"):
        with pytest.raises(ValueError, match=f"unknown task '{slip}'"):
            check_tasks([slip])


@pytest.mark.parametrize(
    ("tasks", "metadata", "message"),
    [
        (["hybridzoo_mqar"], {"pair": 3}, r"metadata\.pair: no task looks at it\. Did you mean 'pairs'\?"),
        (
            ["hybridzoo_mqar"],
            {"hybridzoo_mqar": {"pair": 3}},
            r"metadata\.hybridzoo_mqar\.pair: .*Did you mean 'pairs'",
        ),
        (
            ["hybridzoo_mqar"],
            {"hybridzoo_mqra": {"pairs": 3}},
            r"metadata\.hybridzoo_mqra: .*Did you mean 'hybridzoo_mqar'",
        ),
        (["arc_easy"], {"hybridzoo_mqra": {}}, "Did you mean 'hybridzoo_mqar'"),
        (["hybridzoo_mqar"], {"pairs": "3"}, r"metadata\.pairs: is '3', expected a whole number, such as 4\."),
        (["hybridzoo_mqar"], {"pairs": True}, "is True, expected a whole number"),
        (["hybridzoo_mqar"], {"hybridzoo_mqar": 3}, "expected an object of sizes"),
        (["hybridzoo_bpb"], {"hybridzoo_bpb": {"docs": 1}}, "the task has no sizes"),
        (["hybridzoo_mqar"], [1], "metadata: is a list"),
    ],
)
def test_sizes_that_no_task_looks_at_are_refused(tasks, metadata, message):
    with pytest.raises(ValueError, match=message):
        check_metadata(tasks, metadata)


def test_sizes_that_are_known_or_may_be_anothers_pass():
    assert sizes("hybridzoo_mqar")["pairs"] == 4 and sizes("hybridzoo_bpb") == {}
    check_metadata(
        ["hybridzoo_mqar", "hybridzoo_bpb"],
        {"docs": 3, "power": 1, "hybridzoo_induction": {"vocab": 4}, "tokenizer": "x"},
    )
    check_metadata(["hybridzoo_*"], {"length": 64})
    check_metadata(["niah_single_1"], {"max_seq_lengths": [4096]})

"""A device that is not there is one line that says what is, wherever one is named; nothing falls back without a word."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hybridzoo as zoo
from hybridzoo.__main__ import app
from hybridzoo.zoo.device import pick_device

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:7", "tpu", "gpu", "mps", "xpu", "cuda:x", "", 3])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=rf"device='{name}': .*There is: cpu\. Name one") as e:
        pick_device(name)
    assert "\n" not in str(e.value)


def test_what_is_there_is_given_back():
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    assert pick_device("meta", meta=True).type == "meta"
    with pytest.raises(ValueError, match="'meta': holds no values"):
        pick_device("meta")


@no_gpu
def test_the_default_is_what_is_there():
    assert pick_device() == torch.device("cpu")


def test_a_number_beyond_the_gpus_is_refused(two_gpus):
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"'cuda:7': there are only 2 of its kind\. There is: cpu, cuda:0, cuda:1\."):
        pick_device("cuda:7")


def test_training_cannot_take_one_gpu_by_its_number(two_gpus):
    assert pick_device("cuda", numbered=False) == torch.device("cuda")
    with pytest.raises(ValueError, match="Say cuda, and choose them by CUDA_VISIBLE_DEVICES=1"):
        pick_device("cuda:1", numbered=False)


@no_gpu
def test_functions_refuse_before_they_begin(tmp_path):
    with pytest.raises(ValueError, match="device='cuda'"):
        zoo.build("mamba-tiny", device="cuda")
    with pytest.raises(ValueError, match="device='tpu'"):
        zoo.load(tmp_path / "nothing-is-here", device="tpu")
    assert zoo.build("mamba-tiny", device="meta").lm_head.weight.is_meta

    train = pytest.importorskip("hybridzoo.zoo.train.run").train
    with pytest.raises(ValueError, match="device='cuda'"):
        train("mamba-tiny", np.zeros((4, 8), dtype=np.int64), tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()


@no_gpu
def test_the_adapter_of_lm_eval_refuses_too():
    pytest.importorskip("lm_eval")
    from hybridzoo.eval.evaluate import evaluate
    from hybridzoo.eval.pretrained import usable_device
    from hybridzoo.eval.run import lm_eval_main

    for name in ("cuda", "cuda:7", "tpu"):
        with pytest.raises(ValueError, match=f"device='{name}'"):
            usable_device(name, named=True)
    with pytest.warns(
        UserWarning, match="torch sees no GPU"
    ):  # what lm-eval's command line says where the user said nothing
        assert usable_device("cuda:0", named=True) == "cpu"
    assert usable_device(None, named=True) == "cpu" and usable_device(None, named=False) is None
    with pytest.raises(ValueError, match="device='cuda:0'"):
        evaluate("mamba-tiny", ["hybridzoo_mqar"], device="cuda:0")
    for argv in (["--device", "cuda:0"], ["--device=cuda:0"]):
        with pytest.raises(ValueError, match="device='cuda:0'"):
            lm_eval_main(["--model", "hybridzoo", *argv])


@no_gpu
@pytest.mark.parametrize("command", [["generate", "mamba-tiny"], ["doctor"]], ids=lambda c: c[0])
@pytest.mark.parametrize("name", ["cuda", "tpu"])
def test_commands_end_with_one_line(command, name):
    result = CliRunner().invoke(app, [*command, "--device", name])
    assert result.exit_code == 1 and result.exception.__class__ is SystemExit
    assert result.stderr.startswith(f"error: device='{name}': ") and result.stderr.count("\n") == 1

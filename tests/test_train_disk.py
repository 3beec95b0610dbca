"""A run's disk that is full, or takes nothing: one line that says so, and nothing is lost."""

import errno
import os
import re

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import CheckpointError, export
from hybridzoo.zoo.checkpoint.publish import new_folder, publishing
from hybridzoo.zoo.train.disk import naming_disk
from hybridzoo.zoo.train.report import write_report
from hybridzoo.zoo.train.run import DifferentRun, train
from hybridzoo.zoo.train.run_folder import RunFolder

SMALL = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2", "layers=attention mlp"]
SETTINGS = {"steps": 2, "batch_size": 2, "save_every": 1, "report_to": "none", "device": "cpu"}
ROWS = np.random.default_rng(0).integers(1, 200, (9, 12))
FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def config():
    return zoo.config("transformer-tiny", SMALL)


def test_a_model_that_finds_no_room_is_one_error_and_the_same_call_finishes(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError(FULL)

    monkeypatch.setattr("hybridzoo.zoo.checkpoint.native.save_file", full)
    with pytest.raises(OSError, match=r"cannot be written to \(.*No space left.*Make room"):
        train(config(), ROWS, tmp_path, **SETTINGS)
    monkeypatch.undo()
    assert train(config(), ROWS, tmp_path, **SETTINGS).resumed_from == 2 and (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_that_finds_no_room_leaves_the_room_there_was(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match=r"checkpoint of step 1 cannot be written \(.*No space left"):
        train(config(), ROWS, tmp_path, **SETTINGS)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_room_is_made_before_anything_is_written(tmp_path, monkeypatch):
    train(config(), ROWS, tmp_path, **SETTINGS)
    left = tmp_path / "checkpoints" / ".staging"
    left.mkdir()

    def write(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if left.exists() else Swept

    class Swept(Exception):
        pass

    monkeypatch.setattr("hybridzoo.zoo.train.run_folder.write_whole", write)
    with pytest.raises(Swept):
        train(config(), ROWS, tmp_path, **SETTINGS | {"resume": False})


@pytest.mark.parametrize(
    ("number", "file", "message"),
    [
        (errno.ENOSPC, None, r"run: there is no room left \(No space left on device\)\. Make some, and the same call goes on"),
        (errno.EROFS, "run/.train.lock", r"run: cannot be written to \(Read-only file system\)\. Name another folder \(--out\)"),
        (errno.EACCES, "", r"run: cannot be written to \(Permission denied\)"),
        (errno.EACCES, "data.txt", r"Permission denied: .*data\.txt'$"),
        (errno.EIO, None, "Input/output error"),
    ],
)  # fmt: skip
def test_a_disk_is_named(tmp_path, number, file, message):
    said = () if file is None else (os.strerror(number), str(tmp_path / file))
    with pytest.raises(OSError, match=message), naming_disk(tmp_path / "run"):
        raise OSError(number, *(said or (os.strerror(number),)))


@pytest.mark.parametrize("place", [publishing, new_folder])
def test_what_libraries_say_of_a_full_disk_names_the_folder(tmp_path, place):
    zip_writer = "[enforce fail at inline_container.cc:672] . unexpected pos 533632 vs 533520"
    for error in (SafetensorError(FULL), RuntimeError(zip_writer)):
        with (
            pytest.raises(OSError, match=rf"^{re.escape(str(tmp_path))}.*: cannot be written to \(") as e,
            place(tmp_path / "model"),
        ):
            raise error
        assert ".saving" not in str(e.value)
    with pytest.raises(RuntimeError, match=r"^something else$"), place(tmp_path / "model"):
        raise RuntimeError("something else")


def test_a_copy_that_finds_no_room_does_not_name_its_scratch_folder(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError(FULL)

    monkeypatch.setattr("hybridzoo.zoo.checkpoint.native.save_file", full)
    with pytest.raises(OSError, match="cannot be written to") as e:
        export(zoo.build(config()), tmp_path / "copy", to="hybridzoo")
    assert ".saving" not in str(e.value)


def test_the_page_of_no_run_says_which_folder_is_one(tmp_path):
    (tmp_path / "file").write_text("")
    for name, found in {"none": "no such folder", "file": "no such folder", ".": r"holds no train\.json"}.items():
        with pytest.raises(DifferentRun, match=rf"{found}.* Name the folder of a run"):
            write_report(tmp_path / name)


@pytest.mark.parametrize("damage", ["{", "{}", "[]", '{"log_history": 5}', None])
def test_the_page_of_a_run_is_as_far_as_its_newest_checkpoint_that_can_be_read(tmp_path, damage):
    def on_step(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(), ROWS, tmp_path, on_step=on_step, **SETTINGS | {"steps": 3})
    run, state = RunFolder(tmp_path), tmp_path / "checkpoints" / "checkpoint-1" / "trainer_state.json"
    assert len(run.log()["history"]) == 1 and write_report(tmp_path).exists()
    newer = tmp_path / "checkpoints" / "checkpoint-2"
    newer.mkdir(exist_ok=True)
    (newer / "trainer_state.json").unlink(missing_ok=True)
    for file in () if damage is None else (newer / "trainer_state.json",):
        file.write_text(damage)
    assert len(run.log()["history"]) == 1
    state.unlink()
    assert run.log()["history"] == [] and write_report(tmp_path).exists()


def test_what_cannot_be_shown_of_another_run_is_said(tmp_path):
    train(config(), ROWS, tmp_path, **SETTINGS, val=ROWS[:3])
    with pytest.raises(DifferentRun, match=r"with another val, or without\. Use"):
        train(config(), ROWS, tmp_path, **SETTINGS)
    with pytest.raises(DifferentRun, match="another data, or the same in rows of another length"):
        train(config(), ROWS[:, :8], tmp_path, **SETTINGS, val=ROWS[:3, :8])


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter of PEFT and no model"):
        zoo.load(tmp_path)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="something else than the CPU trains")
def test_the_cpu_needs_no_naming(tmp_path):
    unnamed = {k: v for k, v in SETTINGS.items() if k != "device"}
    result = train(config(), ROWS, tmp_path, **unnamed, precision="bfloat16")
    assert len(result.history) == 2 and next(result.model.parameters()).device.type == "cpu"


def test_the_folder_of_a_run_is_no_data_of_it(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.md").write_text("a text that is long enough " * 9)
    settings = SETTINGS | {"length": 12}
    first = train(config(), texts, texts / "run", **settings)
    (texts / "run" / "adapter").mkdir()
    (texts / "run" / "adapter" / "README.md").write_text("as PEFT leaves one")
    assert train(config(), texts, texts / "run", **settings).history == first.history  # not refused as another data's
    assert train(config(), texts, tmp_path / "other", **settings).history[-1]["loss"] == first.history[-1]["loss"]


def test_a_link_to_nowhere_is_no_folder_for_a_run(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match=r"is a link to .*nowhere, where nothing is"):
        train(config(), ROWS, tmp_path / "link", **SETTINGS)

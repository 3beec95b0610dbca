"""A step of a training in its variants: in parts, recorded, in half precision, recomputed, clipped or not; and what is logged of it."""

import math

import numpy as np
import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.digests import digest_weights
from hybridzoo.zoo.train.run import DifferentRun, OutOfMemory, train

SMALL = ["d_model=16", "mixers.mlp.d_intermediate=16", "mixers.attention.nheads=2", "layers=attention mlp"]
SETTINGS = {"steps": 8, "batch_size": 4, "save_every": 4, "lr": 1e-2, "seed": 3, "report_to": "none", "device": "cpu"}
MEASURED = ("seconds", "tokens_per_second", "memory_GiB", "mfu")
DRAW = np.random.default_rng(0)
ROWS = DRAW.integers(1, 200, (10, 12))
ROWS[:, :6] = np.where(np.arange(6) < DRAW.integers(1, 6, (10, 1)), ~ROWS[:, :6], ROWS[:, :6])  # unequal targets


def config(name="transformer-tiny", *changes):
    return zoo.config(name, [*(SMALL if name == "transformer-tiny" else []), *changes])


def history(result, *names):
    return [
        {k: v for k, v in entry.items() if k in names or (not names and k not in MEASURED)} for entry in result.history
    ]


def close(a, b, rel=1e-5):
    assert [entry["step"] for entry in a.history] == [entry["step"] for entry in b.history]
    for x, y in zip(a.history, b.history, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=rel) and x["grad_norm"] == pytest.approx(
            y["grad_norm"], rel=10 * rel
        )


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "texts.jsonl"
    words = [f'{{"text": "{"abcdefgh"[i % 8] * (3 + 7 * i % 40)} is document {i}"}}' for i in range(60)]
    file.write_text("\n".join(words))
    return file


@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny", "mamba2-tiny", "jamba-tiny"])
def test_a_step_in_parts_is_the_step(tmp_path, name):
    # an auxiliary loss counts by the targets of a part; here rows have unequal numbers of them
    changes = ["mixers.moe.aux_loss_coef=0"] if name == "jamba-tiny" else []
    settings = SETTINGS | {"steps": 3}
    whole = train(config(name, *changes), ROWS, tmp_path / "whole", **settings)
    parts = train(config(name, *changes), ROWS, tmp_path / "parts", **settings | {"batch_size": 1, "accumulate": 4})
    close(parts, whole)
    assert parts.tokens == whole.tokens == 3 * 4 * 12


@pytest.mark.parametrize("capture", ["off", "auto"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_are_balanced_over_all_parts_of_a_step(tmp_path, recorded, capture, checkpointing):
    rows, change = np.abs(np.where(ROWS < 0, ~ROWS, ROWS)), ["mixers.moe.aux_loss_coef=0.5"]
    # ten rows: the third step has a part less
    settings = SETTINGS | {"steps": 4, "capture": capture, "checkpointing": checkpointing}
    whole = train(config("jamba-tiny", *change), rows, tmp_path / "whole", **settings)
    parts = train(
        config("jamba-tiny", *change), rows, tmp_path / "parts", **settings | {"batch_size": 1, "accumulate": 4}
    )
    close(parts, whole)
    assert parts.model.batch_mean is None and parts.model(torch.from_numpy(rows)).aux_loss > 0.1


def test_packed_documents_in_parts_are_the_step(tmp_path, text):
    settings = SETTINGS | {"steps": 4, "length": 32}
    whole = train(config(), text, tmp_path / "whole", **settings)
    parts = train(config(), text, tmp_path / "parts", **settings | {"batch_size": 2, "accumulate": 2})
    close(parts, whole)


def test_a_run_may_go_on_with_its_steps_split_otherwise(tmp_path, capsys, train_until):
    whole = train(config(), ROWS, tmp_path / "whole", **SETTINGS)
    train_until(5, config(), ROWS, tmp_path / "cut", **SETTINGS)
    with pytest.raises(DifferentRun, match=r"another rows_per_step \(4 there, 2 now\)"):
        train(config(), ROWS, tmp_path / "cut", **SETTINGS | {"batch_size": 2})
    resumed = train(config(), ROWS, tmp_path / "cut", **SETTINGS | {"batch_size": 2, "accumulate": 2})
    assert resumed.resumed_from == 4 and "8 steps of 4 rows in 2 parts, 48 tokens" in capsys.readouterr().err
    close(resumed, whole)


class Recorded:
    """Stands in for a recorded step: takes batches of one shape only, and leaves gradients as a backward does."""

    made: list["Recorded"]

    def __init__(self, model, input_ids, labels=None, *, documents=None, most=None, num_items=False, autocast=None):
        self.model, self.shape, self.packed, self.most, self.calls = (
            model,
            input_ids.shape,
            documents is not None,
            most,
            0,
        )
        assert num_items and model.training
        self.made.append(self)

    def __call__(self, input_ids, labels=None, *, documents=None, num_items=None):
        from hybridzoo.kernels.seq import Seq

        assert input_ids.shape == labels.shape == self.shape and (documents is not None) == self.packed
        seq = None if documents is None else Seq.from_documents(documents, most=self.most)
        out = self.model(input_ids, labels, seq=seq, num_items=num_items)
        out.loss.backward()
        self.calls, self.aux_loss, self.router = self.calls + 1, out.aux_loss, out.router
        return out.loss.detach()


@pytest.fixture
def recorded(monkeypatch):
    Recorded.made = []
    monkeypatch.setattr("hybridzoo.zoo.train.stepping.CapturedStep", Recorded)
    monkeypatch.setattr("hybridzoo.zoo.train.stepping.why_not_captured", lambda model, autocast: None)
    return Recorded.made


# ten rows: the last batch of every pass is short
@pytest.mark.parametrize(("name", "calls"), [("transformer-tiny", 8), ("jamba-tiny", 6)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_recorded_step_is_the_step(tmp_path, recorded, name, calls, accumulate):
    settings = SETTINGS | {"accumulate": accumulate, "batch_size": 4 // accumulate}
    taken = train(config(name), ROWS, tmp_path / "recorded", capture="auto", **settings)
    eager = train(config(name), ROWS, tmp_path / "eager", capture="off", **settings)
    assert len(recorded) == 1 and recorded[0].shape == (4 // accumulate, 12)
    assert recorded[0].calls == {1: calls, 2: 14}[accumulate]  # experts take a short batch by themselves
    close(taken, eager)
    assert history(taken, "aux_loss", "expert_load/3") == [
        {k: pytest.approx(v, rel=1e-4) for k, v in entry.items()}
        for entry in history(eager, "aux_loss", "expert_load/3")
    ]


def test_a_recorded_step_of_packed_rows_is_the_step(tmp_path, recorded, text):
    settings = SETTINGS | {"length": 32}
    taken = train(config(), text, tmp_path / "recorded", **settings)
    eager = train(config(), text, tmp_path / "eager", capture="off", **settings)
    assert len(recorded) == 1 and recorded[0].packed and recorded[0].most > 1 and recorded[0].calls == 8
    close(taken, eager)


def test_what_cannot_be_recorded_is_eager_with_a_reason_or_an_error(tmp_path, recorded, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise ValueError("CapturedStep: it draws random numbers. Do without.\nmore")

    monkeypatch.setattr("hybridzoo.zoo.train.stepping.CapturedStep", refuse)
    plain = train(config(), ROWS, tmp_path / "auto", **SETTINGS)
    assert (
        "step: eager, because it draws random numbers. Do without\n" in capsys.readouterr().err
        and len(plain.history) == 8
    )
    with pytest.raises(
        ValueError, match=r"^train\(capture='on'\): the step cannot be captured: it draws random numbers"
    ):
        train(config(), ROWS, tmp_path / "on", capture="on", **SETTINGS)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    # what a graph keeps may be more than an eager step needs
    monkeypatch.setattr("hybridzoo.zoo.train.stepping.CapturedStep", full)
    assert history(train(config(), ROWS, tmp_path / "full", **SETTINGS)) == history(plain)
    assert "step: eager, because CUDA out of memory" in capsys.readouterr().err
    with pytest.raises(OutOfMemory, match="Use batch_size=2 with accumulate=2"):
        train(config(), ROWS, tmp_path / "must", capture="on", **SETTINGS)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"capture='on'\): the step cannot be captured: the model is on cpu"):
        train(config(), ROWS, tmp_path / "cpu", capture="on", **SETTINGS)


@pytest.mark.parametrize("name", ["transformer-tiny", "mamba2-tiny", "jamba-tiny"])
def test_recomputing_changes_no_bit(tmp_path, name):
    settings = SETTINGS | {"steps": 4}
    plain = train(config(name), ROWS, tmp_path / "plain", **settings)
    again = train(config(name), ROWS, tmp_path / "again", checkpointing=True, **settings)
    assert history(again) == history(plain) and digest_weights(again.model) == digest_weights(plain.model)
    assert again.model.backbone.gradient_checkpointing and not plain.model.backbone.gradient_checkpointing


def test_half_precision_is_autocast_and_weights_stay_as_they_are(tmp_path):
    seen = []

    def on_step(done, loss):
        seen.append(loss)

    full = train(config(), ROWS, tmp_path / "full", precision="float32", **SETTINGS)
    half = train(config(), ROWS, tmp_path / "half", precision="bfloat16", val=ROWS, on_step=on_step, **SETTINGS)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert history(half, "loss") != history(full, "loss")
    close(half, full, rel=2e-2)
    assert half.history[-1]["eval_loss"] == pytest.approx(half.history[-1]["loss"], rel=0.1)
    # auto is what it stands for here, also in the settings
    assert train(config(), ROWS, tmp_path / "full", **SETTINGS).resumed_from == 8
    with pytest.raises(DifferentRun, match=r"another precision \(bfloat16 there, float32 now\)"):
        train(config(), ROWS, tmp_path / "half", val=ROWS, **SETTINGS)


def test_a_gradient_that_is_not_clipped_is_watched_all_the_same(tmp_path):
    settings = SETTINGS | {"lr": 1e-3, "steps": 4}
    # no gradient is as long as that
    loose = train(config(), ROWS, tmp_path / "loose", clip=1e6, **settings)
    none = train(config(), ROWS, tmp_path / "none", clip=0, **settings)
    tight = train(config(), ROWS, tmp_path / "tight", clip=1e-3, **settings)
    assert history(none) == history(loose) and none.history[0]["grad_norm"] > 1e-3
    assert tight.history[0]["grad_norm"] == none.history[0]["grad_norm"]  # before it is clipped
    with pytest.raises(FloatingPointError, match="training diverged at step"):
        train(config(), ROWS, tmp_path / "wild", clip=0, warmup=0, **settings | {"lr": 1e38})


def test_auxiliary_losses_and_the_load_of_experts_are_logged(tmp_path):
    result = train(config("jamba-tiny"), ROWS, tmp_path, **SETTINGS | {"steps": 2})
    layers = [i for i, token in enumerate(zoo.config("jamba-tiny").layers.split()) if "moe" in token]
    loads = {k: v for k, v in result.history[-1].items() if k.startswith("expert_load/")}
    assert len(loads) == len(result.model(torch.ones(1, 4, dtype=torch.long)).router) and layers
    # from all experts alike to one for all
    assert all(1 <= load <= 4 for load in loads.values()) and math.isfinite(result.history[-1]["aux_loss"])


@pytest.mark.parametrize(
    ("error", "settings", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), {}, r"^cpu: out of memory, with batch_size=4 rows of 12 tokens\. Use batch_size=2 with "
         r"accumulate=2 \(the same steps, and this run can go on with them\), checkpointing \(--checkpointing\) or a length below 12\. "
         r"Checkpoint 4 in .*checkpoints is whole\.$"),
        (MemoryError(), {"batch_size": 1, "checkpointing": True}, r"batch_size=1 rows of 12 tokens\. Use a length below 12\. Checkpoint 4"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"), {"batch_size": 6, "accumulate": 3},
         r"batch_size=6 rows of 12 tokens in each of 3 parts\. Use batch_size=3 with accumulate=6"),
    ],
    ids=["device", "python", "host"],
)  # fmt: skip
def test_running_out_of_memory_says_what_to_lower(tmp_path, error, settings, message):
    def on_step(done, loss):
        if done == 5:
            raise error

    with pytest.raises(OutOfMemory, match=message) as e:
        train(config(), ROWS, tmp_path, on_step=on_step, **SETTINGS | settings)
    assert e.value.__cause__ is error and not (tmp_path / "model.safetensors").exists()


def test_other_errors_stay_what_they_are(tmp_path):
    def on_step(done, loss):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"):
        train(config(), ROWS, tmp_path, on_step=on_step, **SETTINGS)


def test_out_of_memory_is_one_line_on_the_command_line(tmp_path, monkeypatch, capsys):
    from hybridzoo.__main__ import main

    np.save(tmp_path / "rows.npy", np.abs(ROWS))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr("hybridzoo.zoo.train.loop.ZooTrainer.training_step", full)
    monkeypatch.setattr(
        "sys.argv",
        [
            "zoo",
            "train",
            "transformer-tiny",
            "--data",
            str(tmp_path / "rows.npy"),
            "--out",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ],
    )
    with pytest.raises(SystemExit) as done:
        main()
    errors = capsys.readouterr().err
    assert (
        done.value.code == 1
        and "error: cpu: out of memory, with batch_size=8 rows" in errors
        and "Traceback" not in errors
    )
    assert "Use batch_size=4 with accumulate=2" in errors and "There is no checkpoint yet." in errors

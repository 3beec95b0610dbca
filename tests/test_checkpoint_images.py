"""Files of VMamba and Vim, which hold no config, against plain re-statements of the published structures. Needs no transformers."""

import argparse
import copy
import os
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from vmamba_reference import VSSM, Vim, drawn

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import CheckpointError, convert, export
from hybridzoo.zoo.checkpoint.families import FILE_FAMILIES
from hybridzoo.zoo.checkpoint.family import Shapes
from hybridzoo.zoo.checkpoint.keys import View
from hybridzoo.zoo.checkpoint.loading import _config_of
from hybridzoo.zoo.checkpoint.reading import shape_of
from hybridzoo.zoo.errors import ConfigError
from hybridzoo.zoo.models.tasks import task_of

VANILLA = {"vanilla": True, "ratio": 2, "n": 16}
# name: structure, family, options
KINDS = {
    "vmamba": (VSSM, {}),
    "vmamba, root file": (VSSM, {"era": "C"}),
    "vmamba, channels first": (VSSM, {"convolution": True}),
    "vmamba, ratio 2": (VSSM, {"ratio": 2.0, "mlp": 2.0, "in_channels": 1, "n_classes": 3}),
    "vmamba, 2 x 2 downsampling": (VSSM, {"downsample": "v2"}),
    "vmamba, two stages": (VSSM, {"depths": (2, 1), "dim": 24}),
    "vanilla, January": (VSSM, VANILLA | {"era": "A"}),
    "vanilla": (VSSM, VANILLA),
    "vanilla, root file": (VSSM, VANILLA | {"era": "C"}),
    "vanilla, channels first": (VSSM, VANILLA | {"convolution": True}),
    "vim": (Vim, {}),
    "vim, grey": (Vim, {"depth": 2, "d": 40, "n": 4, "image": 48, "in_channels": 1}),
}
SHIPPED = {
    "vanilla-vmamba-tiny": (True, 96, (2, 2, 9, 2), 2), "vanilla-vmamba-small": (True, 96, (2, 2, 27, 2), 2),
    "vanilla-vmamba-base": (True, 128, (2, 2, 27, 2), 2), "vmamba-tiny-s2l5": (False, 96, (2, 2, 5, 2), 2),
    "vmamba-small-s2l15": (False, 96, (2, 2, 15, 2), 2), "vmamba-base-s2l15": (False, 128, (2, 2, 15, 2), 2),
    "vmamba-tiny-s1l8": (False, 96, (2, 2, 8, 2), 1), "vmamba-small-s1l20": (False, 96, (2, 2, 20, 2), 1),
    "vmamba-base-s1l20": (False, 128, (2, 2, 20, 2), 1),
}  # fmt: skip


def images(options, dtype=torch.float32):
    size = (64, 96) if "image" not in options and "d" not in options else (options.get("image", 64),) * 2
    return torch.randn(2, options.get("in_channels", 3), *size, dtype=dtype)


def square(cls, options):
    return {"image": 64} | options if cls is Vim else options


def reference(kind, dtype=torch.float32, seed=0):
    cls, options = KINDS[kind]
    return drawn(cls(**options), seed, dtype), square(cls, options)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of the second version, and the model that is in it."""
    model = drawn(VSSM((1, 1), 16), dtype=torch.float32)
    file = tmp_path_factory.mktemp("small") / "small.pth"
    torch.save({"model": model.state_dict()}, file)
    return file, model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, dtype, tmp_path):
    theirs, options = reference(kind, dtype)
    torch.save({"model": theirs.state_dict()}, tmp_path / "x.pth")
    ours, x = zoo.load(tmp_path / "x.pth"), images(options, dtype)
    expected = theirs(x)
    assert expected.std() > 0.3  # flat logits would prove nothing
    error = (ours(x).logits - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-10)
    report = ours.load_report
    assert set(report.matched) == set(theirs.state_dict()) and not report.missing and not report.unexpected
    assert not ours.training and ours.num_params() == sum(p.numel() for p in theirs.parameters())


@torch.no_grad()
def test_maps_of_every_stage(small):
    file, theirs = small
    # values up to 10, in float64: in float32 both are 1e-5 from it, and not on the same side
    x, theirs = images({}, torch.float64), copy.deepcopy(theirs).double()
    maps = zoo.load(file).double().forward_features(x, return_stages=True)
    for got, expected in zip(maps, theirs.stages(x), strict=True):
        torch.testing.assert_close(got, expected.permute(0, 3, 1, 2), atol=1e-9, rtol=1e-9)


def check_shipped(theirs, family, name):
    shapes = Shapes({key: tuple(t.shape) for key, t in theirs.state_dict().items()}, None)
    family = FILE_FAMILIES[family]
    resolved, found = _config_of(family, shapes, None)
    assert found == name and resolved.config == zoo.config(name)
    view = View(task_of(resolved.config)(resolved, device="meta"), shapes)
    pieces = family.pieces(view)
    assert {key: shape_of(view, group) for key, group in pieces.items()} == shapes
    assert {piece.ours for group in pieces.values() for piece in group} == view.shapes.keys()


@pytest.mark.parametrize(("name", "era"), [(n, era) for n in SHIPPED for era in "ABC"[not SHIPPED[n][0] :]])
def test_published_sizes_of_vmamba_are_the_shipped_configs(name, era):
    vanilla, dim, depths, ratio = SHIPPED[name]
    with torch.device("meta"):
        theirs = VSSM(depths, dim, ratio, 16 if vanilla else 1, vanilla=vanilla, era=era, n_classes=1000)
    check_shipped(theirs, "vmamba", name)


@pytest.mark.parametrize(("name", "d"), [("vim-tiny", 192), ("vim-small", 384), ("vim-base", 768)])
def test_published_sizes_of_vim_are_the_shipped_configs(name, d):
    with torch.device("meta"):
        check_shipped(Vim(24, d, image=224, n_classes=1000), "vim", name)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_bit_for_bit(kind, tmp_path):
    theirs, _ = reference(kind)
    family = "vim" if kind.startswith("vim") else "vmamba"
    torch.save(theirs.state_dict(), tmp_path / "x.pth")  # as a state dict alone
    there = convert(tmp_path / "x.pth", tmp_path / "ours")
    back = convert(tmp_path / "ours", tmp_path / "theirs", family)
    assert (there.source, there.target, back.source, back.target) == (family, "hybridzoo", "hybridzoo", family)
    assert not there.left_out and not back.left_out
    content = torch.load(tmp_path / "theirs" / "model.pth", weights_only=True)["model"]
    options = {**KINDS[kind][1], "era": "B", "convolution": False} if family == "vmamba" else KINDS[kind][1]
    again = KINDS[kind][0](**options)
    again.load_state_dict(content, strict=True)
    if options.get("era") == KINDS[kind][1].get("era", options.get("era")):
        before = theirs.state_dict()
        assert list(content) and content.keys() == before.keys()
        assert all(torch.equal(content[name], before[name].reshape(content[name].shape)) for name in before)
    x = images(square(KINDS[kind][0], KINDS[kind][1]))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), theirs(x)) or (again(x) - theirs(x)).abs().max() < 1e-5
        # and a folder that holds such a file alone is one to load
        assert torch.equal(zoo.load(tmp_path / "theirs")(x).logits, zoo.load(tmp_path / "ours")(x).logits)


class CfgNode(dict):
    """As yacs has it: a dict with attributes of its own, which trainings keep their settings in."""

    def __init__(self, values):
        super().__init__(values)
        self.__dict__["__immutable__"] = True


def training(tmp_path, monkeypatch):
    """A training's checkpoint with all that lies around the weights in one."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode, CfgNode.__module__ = CfgNode, "yacs.config"
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    model, mean = (drawn(VSSM((1, 1), 16), seed, torch.float32) for seed in (0, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    model(images({})).sum().backward()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    optimizer.step()
    content = {
        "model": before, "model_ema": mean.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": {"base": [0.1]},
        "scaler": {"scale": 65536.0}, "epoch": 264, "max_accuracy": 82.6, "args": argparse.Namespace(lr=1e-3, output_dir="x"),
        "config": CfgNode({"MODEL": CfgNode({"DEPTHS": [1, 1]})}),
    }  # fmt: skip
    torch.save(content, tmp_path / "ckpt_epoch_264.pth")
    return tmp_path / "ckpt_epoch_264.pth", before, mean.state_dict()


def test_a_trainings_file_and_which_of_its_weights(tmp_path, monkeypatch):
    file, model, mean = training(tmp_path, monkeypatch)
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")  # nobody needs it to read
    for weights, expected in ((None, model), ("model", model), ("model_ema", mean)):
        got = zoo.load(file, weights=weights)
        assert torch.equal(got.head.weight, expected["classifier.head.weight"])
        assert (got.load_report.part, got.load_report.parts) == (weights or "model", ("model", "model_ema"))
    assert "weights of model_ema; beside it: model" in str(got.load_report)
    with pytest.raises(CheckpointError, match=r"has no weights 'model_eam'. Did you mean 'model_ema'\?"):
        zoo.load(file, weights="model_eam")
    report = convert(file, tmp_path / "out", weights="model_ema")
    assert report.part == "model_ema" and "tensors of model_ema matched" in str(report)
    assert torch.equal(zoo.load(tmp_path / "out").head.weight, mean["classifier.head.weight"])


class Trap:
    def __reduce__(self):
        return (os.mkdir, (self.where,))


@pytest.mark.parametrize("place", ["model", "args"])
def test_no_code_is_run(place, small, tmp_path):
    trap = Trap()
    trap.where = str(tmp_path / "ran")
    content = {"model": small[1].state_dict(), "args": None}
    content[place] = {"trap": trap} if place == "model" else trap
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="wants to run code"):
        zoo.load(tmp_path / "x.pth")
    with open(tmp_path / "y.pth", "wb") as f:
        pickle.dump(content, f)
    with pytest.raises(CheckpointError):
        zoo.load(tmp_path / "y.pth")
    assert not (tmp_path / "ran").exists()


def test_a_cut_file_is_refused_wherever_it_is_cut(small, tmp_path):
    content, file = small[0].read_bytes(), tmp_path / "cut.pth"
    for n in [0, 1, 10, 100, *(len(content) * i // 12 for i in range(1, 12)), len(content) - 1]:
        file.write_bytes(content[:n])
        with pytest.raises(CheckpointError, match=r"cut\.pth"):
            zoo.load(file)


BROKEN = {
    "layers.0.blocks.0.op.A_logs": (None, "of no family whose files have no config"),
    "layers.1.blocks.0.norm.weight": (None, "'layers.1.blocks.0.norm.weight' is missing"),
    "layers.1.blocks.0.op.x_proj_weight": (torch.zeros(4, 3, 32), r"has shape \(4, 3, 32\), the config makes it \(4, 4, 32\)"),
    "layers.0.blocks.0.op.in_proj.weight": (torch.zeros(16), "expected 2 dimensions"),
    "layers.0.blocks.0.op.out_proj.weight": (torch.zeros(16, 0), "expected 2 dimensions with something in them"),
    "layers.0.blocks.0.op.Ds": (torch.zeros(64, dtype=torch.int64), "expected floating-point numbers"),
    "layers.0.blocks.2.op.Ds": (torch.zeros(64), "no tensor begins with layers.0.blocks.1"),
    "layers.0.blocks.0.op.conv2d.weight": (torch.zeros(16, 1, 2, 2), "describe no model that works"),
    "patch_embed.0.weight": (None, "'patch_embed.0.weight' is missing"),
    "classifier.head.weight": (None, "'classifier.head.bias' is not part of the model"),
    "more.weight": (torch.zeros(3), "'more.weight' is not part of the model"),
    "layers.0.blocks.0.op.A_logs.x": (3, "is a int, expected a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_mutilated_file_is_refused(name, small, tmp_path):
    value, message = BROKEN[name]
    content = dict(small[1].state_dict())
    content.pop(name, None)
    torch.save({"model": content | ({} if value is None else {name: value})}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        zoo.load(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "x.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_detectors_backbone(tmp_path):
    theirs = drawn(VSSM((1, 1), 16, outnorm=True), dtype=torch.float32)
    backbone = {f"backbone.{name}": p for name, p in theirs.state_dict().items()}
    torch.save(
        {"state_dict": backbone | {"neck.conv.weight": torch.zeros(2, 2)}, "meta": {"epoch": 12}}, tmp_path / "x.pth"
    )
    ours, x = zoo.load(tmp_path / "x.pth").double(), images({}, torch.float64)
    maps = list(theirs.double().stages(x))
    for got, expected in zip(ours.forward_features(x, return_stages=True), maps, strict=True):
        torch.testing.assert_close(got, expected.permute(0, 3, 1, 2), atol=1e-9, rtol=1e-9)
    # the last stage's norm is the final one
    torch.testing.assert_close(ours(x).hidden, theirs.outnorm1(maps[-1]).flatten(1, 2), atol=1e-9, rtol=1e-9)
    assert ours.cfg.n_classes == 0
    assert set(ours.load_report.unexpected) == {"outnorm0.weight", "outnorm0.bias", "neck.conv.weight"}
    assert "unexpected, left out" in str(ours.load_report)


def test_wrapped_files_and_safetensors(small, tmp_path):
    file, theirs = small
    torch.save({"model": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "x.pth")
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    expected = zoo.load(file)
    for name in ("x.pth", "x.safetensors"):
        got = zoo.load(tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(got.parameters(), expected.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="no part 'model_ema'"):
        zoo.load(tmp_path / "x.safetensors", weights="model_ema")


@pytest.mark.parametrize("source", ["theirs", "ours"])
def test_another_head_for_fine_tuning(source, small, tmp_path):
    file, theirs = small
    place = file if source == "theirs" else zoo.save(zoo.load(file), tmp_path)
    whole, other = zoo.load(place), zoo.load(place, n_classes=10)
    assert other.cfg.n_classes == 10 and other.head.weight.shape == (10, 32)
    for (name, a), (_, b) in zip(whole.named_parameters(), other.named_parameters(), strict=True):
        assert name.startswith("head.") or torch.equal(a, b)
    assert other.head.weight.std() > 0 and not other.head.bias.any()
    report, head = other.load_report, "classifier.head" if source == "theirs" else "head"
    assert set(report.missing) == {"head.weight", "head.bias"} and "missing, drawn anew: head" in str(report)
    assert set(report.unexpected) == {f"{head}.weight", f"{head}.bias"}
    same = zoo.load(place, n_classes=7)
    assert torch.equal(same.head.weight, theirs.classifier.head.weight) and not same.load_report.missing


def test_a_head_of_a_language_model_is_not_for_classes(tmp_path):
    zoo.save(zoo.build("mamba-tiny"), tmp_path)
    with pytest.raises(CheckpointError, match="n_classes: a model whose task is 'causal_lm'"):
        zoo.load(tmp_path, n_classes=3)
    for name in ("config", "weights"):
        with pytest.raises(CheckpointError, match=f"{name}: is for a file of weights"):
            zoo.load(tmp_path, **{name: "model"})


def test_a_config_of_the_callers(small, tmp_path):
    file, theirs = small
    cfg = zoo.load(file).cfg
    got = zoo.load(file, config={**cfg, "drop_path": 0.3, "n_classes": 3})
    assert got.cfg.drop_path == 0.3 and torch.equal(
        got.head.weight, theirs.classifier.head.weight
    )  # the file's classes
    assert got.load_report.config == "given"
    with pytest.raises(
        CheckpointError,
        match=r"'patch_embed.0.weight' has shape \(8, 3, 3, 3\), the config makes it \(48, 3, 3, 3\)|missing",
    ):
        zoo.load(file, config="vmamba-tiny-s1l8")
    with pytest.raises(ConfigError):
        zoo.load(file, config="no-such-model")


def test_files_that_are_none(small, tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"no file of weights, which end in .pth"):
        zoo.load(tmp_path / "x.txt")
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="'epoch' is a int, expected a tensor"):
        zoo.load(tmp_path / "x.pth")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"its 1 tensors \('a.weight', ...\) are of no family"):
        zoo.load(tmp_path / "x.pth")
    torch.save([torch.zeros(3)], tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        zoo.load(tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(small[0].read_bytes())
    with pytest.raises(CheckpointError, match="holds 2 files of weights"):
        zoo.load(tmp_path)
    both = small[1].state_dict() | {f"teacher.{name}": p for name, p in small[1].state_dict().items()}
    torch.save({"model": both}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="several models"):
        zoo.load(tmp_path / "x.pth")


def test_vim_in_finer_steps_is_refused(tmp_path):
    state = drawn(Vim(1), dtype=torch.float32).state_dict()
    torch.save(state | {"pos_embed": torch.zeros(1, 27 * 27 + 1, 24)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="27 x 27 positions are those of 224 pixels in steps of 8"):
        zoo.load(tmp_path / "x.pth")
    torch.save(state | {"pos_embed": torch.zeros(1, 12, 24)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="11 positions, which are no square"):
        zoo.load(tmp_path / "x.pth")


UNLIKE = {
    "directions": ({"mixers.ss2d.directions": 2}, "shapes"),
    "activation": ({"mixers.mlp.activation": "relu"}, "activation"),
    "gated": ({"mixers.mlp.gated": True}, "gated"),
    "norm": ({"norm.eps": 1e-6}, "norm"),
    "pattern": ({"stages": [{"layers": "mlp ss2d"}] * 2}, "no such layers|nothing of"),
    "mixer": ({"mixers.mlp2": {"type": "attention", "nheads": 2}, "stages": [{"layers": "ss2d mlp2"}] * 2}, "no such layers"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNLIKE)
def test_what_their_files_cannot_say_is_refused(what, tmp_path):
    changes, message = UNLIKE[what]
    cfg = {
        "task": "image_classification", "d_model": 16, "stages": [{"layers": "ss2d mlp"}] * 2,
        "mixers": {"ss2d": {}, "mlp": {"expand": 4, "gated": False, "activation": "gelu", "bias": True}},
    }  # fmt: skip
    assert export(zoo.build(cfg), tmp_path / "fine", "vmamba") == "vmamba"
    with pytest.raises(CheckpointError, match=message):
        export(zoo.build(cfg, changes), tmp_path / "out", "vmamba")
    assert not (tmp_path / "out").exists()


def test_models_of_other_tasks_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="vim has no such layers"):
        export(zoo.build("mamba-tiny"), tmp_path / "out", "vim")
    with pytest.raises(CheckpointError, match=r"this one's task is 'image_classification'\. Use to='hybridzoo'"):
        export(zoo.build("vmamba-micro"), tmp_path / "out", "hf")


def test_the_command_says_what_matched(small, tmp_path, capsys):
    from typer.testing import CliRunner

    from hybridzoo.__main__ import app

    run = lambda *words: CliRunner().invoke(app, ["convert", *map(str, words)])  # noqa: E731
    done = run(small[0], tmp_path / "ours")
    assert done.exit_code == 0 and "vmamba -> hybridzoo: all 52 tensors of model matched" in done.output.replace(
        "\n", " "
    )
    done = run(tmp_path / "ours", tmp_path / "back", "--to", "vmamba")
    assert done.exit_code == 0 and "wrote model.pth" in done.output
    done = run(small[0], tmp_path / "x", "--weights", "model_ema")
    assert done.exit_code == 1

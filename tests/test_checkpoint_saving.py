"""A folder that is written to: one save decides at one moment, whoever is killed, whoever reads, whatever lay there before."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import CheckpointError, convert, export
from hybridzoo.zoo.checkpoint.publish import write_whole

MAMBA = {"vocab_size": 17, "d_model": 16, "layers": "mamba", "mixers": {"mamba": {}}, "residual_in_fp32": True}
CFG = {"vocab_size": 17, "d_model": 8, "layers": "mlp * 4", "mixers": {"mlp": {"d_intermediate": 8}}}


def filled(value, **changes):
    """A model whose weights and config both say which one it is."""
    model = zoo.build(CFG | {"residual_multiplier": value} | changes)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def seen(folder):
    """What of a loaded model says which one it is."""
    model = zoo.load(folder)
    return {model.cfg.residual_multiplier} | {p.flatten()[0].item() for p in model.parameters()}


def files(folder):
    return {p.name for p in folder.rglob("*")}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    # what is killed here are processes, and not the machine
    monkeypatch.setattr(os, "fsync", lambda fd: None)


CALLS = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")


def killed(action, k):
    """Run in a child that dies before file operation number k; whether it died."""
    if child := os.fork():
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = iter(range(k))

    def counted(real):
        def call(*args, **kwargs):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    try:
        action()
    finally:
        os._exit(0)


def age(folder):
    for p in [folder, *folder.rglob("*")]:
        os.utime(p, (0, 0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
def test_a_save_killed_at_any_operation_leaves_one_whole_model_and_nothing_for_ever(tmp_path):
    models = {1.0: filled(1.0), 2.0: filled(2.0)}
    fresh = zoo.save(models[1.0], tmp_path / "fresh")
    found = []
    for k in range(100):
        folder = tmp_path / str(k)
        shutil.copytree(fresh, folder)
        (folder / "train.json").write_text("{}")
        died = killed(lambda folder=folder: zoo.save(models[2.0], folder), k)
        (which,) = seen(folder)
        found.append(which)
        if not died:
            break
        if k % 4 == 0:
            age(folder)
            zoo.save(models[1.0], folder)
            assert files(folder) == files(fresh) | {"train.json"} and seen(folder) == {1.0}
    assert k > 10 and found == sorted(found) and found[0] == 1.0 and found[-1] == found[-3] == 2.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
@pytest.mark.parametrize("to", ["hf", "mamba_ssm", "hybridzoo"])
def test_an_export_killed_at_any_operation_leaves_no_folder_or_a_whole_one(to, tmp_path):
    model = zoo.build(MAMBA)
    for k in (0, 3, 8, 14, 99):
        folder = tmp_path / str(k) / "m"
        folder.parent.mkdir()
        died = killed(lambda folder=folder: export(model, folder, to), k)
        assert died or folder.exists()
        if folder.exists():
            assert torch.equal(zoo.load(folder).lm_head.weight, model.lm_head.weight)
        age(folder.parent)
        export(model, folder.parent / "again", to)
        assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]
    assert not died


def test_what_a_living_process_prepares_is_not_swept(tmp_path):
    from hybridzoo.zoo.checkpoint.publish import publishing

    with publishing(tmp_path) as place:
        (place / "mine").write_text("1")
        age(place)  # slow, not dead
        zoo.save(filled(1.0), tmp_path)
    assert (tmp_path / "mine").read_text() == "1"


def test_a_small_file_is_written_whole_and_the_halves_of_killed_writers_go(tmp_path):
    for name, when in ((".writing-old", 0), (".writing-new", time.time())):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (when, when))
    write_whole(tmp_path / "train.json", "{}")
    assert files(tmp_path) == {"train.json", ".writing-new"}


def test_loads_beside_saves_are_of_one_save(tmp_path):
    models = [filled(1.0), filled(2.0)]
    zoo.save(models[0], tmp_path)
    stop, got = threading.Event(), []

    def keep_saving():
        k = 0
        while not stop.is_set():
            zoo.save(models[(k := k + 1) % 2], tmp_path)

    saver = threading.Thread(target=keep_saving)
    saver.start()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        got.append(seen(tmp_path))
    stop.set()
    saver.join()
    assert got and all(len(which) == 1 for which in got) and {1.0} in got and {2.0} in got


def test_a_file_that_is_replaced_after_it_was_opened_does_not_mix(tmp_path, monkeypatch):
    from hybridzoo.zoo.checkpoint import reading

    zoo.save(filled(1.0), tmp_path)
    real, other = reading.fill, filled(2.0)

    def saved_in_between(*args):
        zoo.save(other, tmp_path)
        return real(*args)

    monkeypatch.setattr(reading, "fill", saved_in_between)
    assert seen(tmp_path) == {1.0}
    monkeypatch.undo()
    assert seen(tmp_path) == {2.0}


def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from hybridzoo.zoo.checkpoint import reading

    zoo.save(filled(1.0), tmp_path)
    real, file = reading.fill, tmp_path / "model.safetensors"

    def overwritten(*args):
        with open(file, "r+b") as f:  # in place, as other libraries do
            f.seek(-4, 2)
            f.write(b"abcd")
        os.utime(file, (1, 1))
        return real(*args)

    monkeypatch.setattr(reading, "fill", overwritten)
    with pytest.raises(CheckpointError, match=r"model.safetensors: was written to while it was read"):
        zoo.load(tmp_path)


def test_shards_that_change_between_the_index_and_the_files_are_read_again(tmp_path, monkeypatch):
    from hybridzoo.zoo.checkpoint import tensors

    def sharded(model):
        content = {name: p.detach() for name, p in model.named_parameters()}
        names = sorted(content)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: content[name] for name in part}, tmp_path / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        zoo_part = zoo.config(CFG | {"residual_multiplier": model.cfg.residual_multiplier})
        from omegaconf import OmegaConf

        config = {"model_type": "hybridzoo", "zoo": OmegaConf.to_container(zoo_part)}
        (tmp_path / "config.json").write_text(json.dumps(config))

    sharded(filled(1.0))
    assert seen(tmp_path) == {1.0}
    real, once = tensors.open_regular, []

    def changes(file):
        handle = real(file)
        if file.name.startswith("model-00001") and not once:
            once.append(file)
            sharded(filled(2.0))
        return handle

    monkeypatch.setattr(tensors, "open_regular", changes)
    assert seen(tmp_path) == {2.0}


def test_a_decided_save_in_a_folder_that_one_may_not_write_to_is_refused(tmp_path, monkeypatch):
    zoo.save(filled(1.0), tmp_path)
    (tmp_path / ".decided").mkdir()
    (tmp_path / "config.json").rename(tmp_path / ".decided/config.json")

    def refused(*args):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", refused)
        with pytest.raises(CheckpointError, match=r"interrupted and cannot be finished here \(Permission denied\)"):
            zoo.load(tmp_path)
    assert seen(tmp_path) == {1.0} and not (tmp_path / ".decided").exists()


def test_a_hostile_rest_of_a_save_reaches_no_other_folder(tmp_path):
    folder, outside = tmp_path / "m", tmp_path / "outside"
    zoo.save(filled(1.0), folder)
    outside.mkdir()
    (outside / "config.yaml").write_text("mine")
    (folder / ".decided").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"\.decided: is not what a save leaves"):
        zoo.load(folder)
    (folder / ".decided").unlink()
    (folder / ".decided").mkdir()
    (folder / ".decided/.remove.json").write_text('["../outside/config.yaml"]')
    with pytest.raises(CheckpointError, match=r"names files outside the folder"):
        zoo.load(folder)
    assert (outside / "config.yaml").read_text() == "mine"


# ------------------------------------------------------------------------------------------------- what lay there before


def test_saving_over_other_weights_removes_them_and_keeps_the_rest(tmp_path):
    old = {"a": torch.ones(2)}
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file(old, tmp_path / name)
    for name in ("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model-00001-of-00001.bin",
                 "pytorch_model.bin.index.json", "generation_config.json", "chat_template.jinja", "vocab.json"):  # fmt: skip
        (tmp_path / name).write_text("{}")
    kept = {"train.json", "checkpoints", "notes.txt", "training_args.bin", "optimizer.safetensors"}
    (tmp_path / "checkpoints").mkdir()
    for name in kept - {"checkpoints"}:
        (tmp_path / name).write_text("mine")
    zoo.save(filled(1.0), tmp_path)
    ours = {
        "model.safetensors",
        "config.json",
        "config.yaml",
        "modeling_hybridzoo.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files(tmp_path) == kept | ours and seen(tmp_path) == {1.0}


@pytest.mark.parametrize("to", ["hybridzoo", "mamba_ssm", None])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_as_good_as_the_folder(to, there, tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    if there:
        real.mkdir()
    model = zoo.build(MAMBA)
    zoo.save(model, link) if to is None else export(model, link, to=to)
    assert link.is_symlink() and {p.name for p in tmp_path.iterdir()} == {"real", "link"}
    assert torch.equal(zoo.load(real).lm_head.weight, model.lm_head.weight)


def test_a_new_folder_may_be_the_root_of_a_file_system(tmp_path, monkeypatch):
    place, replace = tmp_path / "volume", os.replace
    place.mkdir()

    def busy(source, target):
        if str(target) == str(place):
            raise OSError(16, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(type(place), "is_mount", lambda self: self == place)
    monkeypatch.setattr(os, "replace", busy)
    model = zoo.build(MAMBA)
    export(model, place, to="hybridzoo")
    assert torch.equal(zoo.load(place).lm_head.weight, model.lm_head.weight)
    assert not [p for p in place.iterdir() if p.name.startswith(".")]


def test_an_adapter_in_the_folder_is_neither_removed_nor_put_on_the_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config.json makes transformers put an adapter"):
        zoo.save(filled(1.0), tmp_path)
    assert files(tmp_path) == {"adapter_config.json"}


def test_two_sets_of_weights_in_one_of_our_folders_are_refused(tmp_path):
    zoo.save(filled(1.0), tmp_path)
    shard = "model-00001-of-00001.safetensors"
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(CheckpointError, match=r"beside model.safetensors"):
        zoo.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model.safetensors"}}))
    assert seen(tmp_path) == {1.0}


def test_config_json_decides_and_a_config_yaml_that_differs_is_not_passed_over(tmp_path):
    zoo.save(filled(1.0), tmp_path)
    copy = tmp_path / "config.yaml"
    text = copy.read_text()
    copy.write_text("# mine\n" + text.replace("override: []\n", ""))  # says the same
    assert seen(tmp_path) == {1.0}
    copy.write_text(text.replace("tokenizer: byte", "tokenizer: gpt2"))
    with pytest.raises(CheckpointError, match=r"config.yaml: says tokenizer: 'gpt2', and config.json 'byte'"):
        zoo.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["zoo"]["tokenizer"] = "gpt2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert zoo.load(tmp_path).cfg.tokenizer == "gpt2"
    (tmp_path / "config.json").unlink()
    copy.write_text(text)
    assert zoo.load(tmp_path).cfg.tokenizer == "byte"  # alone, it is all there is


def test_a_config_yaml_of_another_program_says_nothing(tmp_path):
    model = zoo.build(MAMBA)
    export(model, tmp_path / "m")
    (tmp_path / "m/config.yaml").write_text("lr: 1")
    assert torch.equal(zoo.load(tmp_path / "m").lm_head.weight, model.lm_head.weight)


# ------------------------------------------------------------------------------------------------------- the tied head


@pytest.mark.parametrize("to", ["hybridzoo", "hf", "mamba_ssm"])
@torch.no_grad()
def test_a_head_that_was_trained_on_its_own_is_saved_whatever_the_config_says(to, tmp_path):
    model, ids = zoo.build(MAMBA), torch.randint(1, 17, (1, 9))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    want = model(ids).logits
    export(model, tmp_path / "a", to)
    back = zoo.load(tmp_path / "a")
    torch.testing.assert_close(back(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert not back.cfg.tie_embeddings and model.cfg.tie_embeddings  # the caller's config is not ours to change
    model.lm_head.weight.copy_(model.backbone.embedding.weight)  # equal: tied after all
    export(model, tmp_path / "b", to)
    back = zoo.load(tmp_path / "b")
    assert back.lm_head.weight is back.backbone.embedding.weight and back.cfg.tie_embeddings
    model.cfg.tie_embeddings = False
    model.lm_head.weight = model.backbone.embedding.weight  # tied by hand
    export(model, tmp_path / "c", to)
    torch.testing.assert_close(zoo.load(tmp_path / "c")(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", ["hybridzoo", "hf", "mamba_ssm"])
@torch.no_grad()
def test_a_stored_head_that_differs_from_the_embedding_is_the_head(to, tmp_path):
    export(zoo.build(MAMBA), tmp_path / "m", to)
    file = tmp_path / "m" / ("pytorch_model.bin" if to == "mamba_ssm" else "model.safetensors")
    content = torch.load(file) if to == "mamba_ssm" else load_file(file)
    head = torch.randn(zoo.load(tmp_path / "m").lm_head.weight.shape)
    table = next(v for k, v in content.items() if "embedding" in k).clone()
    write = torch.save if to == "mamba_ssm" else save_file
    for stored, tied in ((head, False), (table, True), (table.double(), True)):
        write(content | {"lm_head.weight": stored}, file)
        back = zoo.load(tmp_path / "m")
        assert torch.equal(back.lm_head.weight, stored.float()) and back.cfg.tie_embeddings == tied
    for stored in (head[:-1], head[:, :-1]):
        write(content | {"lm_head.weight": stored.contiguous()}, file)
        with pytest.raises(CheckpointError, match=r"'lm_head.weight' has shape"):
            zoo.load(tmp_path / "m")


# --------------------------------------------------------------------------------------------- what is said about text

IDS = {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": None}
GENERATION = {"eos_token_id": [4, 5], "top_k": 3, "temperature": 0.5, "transformers_version": "4.40.0"}
FILES = {"tokenizer.json": '{"a": 1}', "tokenizer_config.json": "{}", "special_tokens_map.json": "{}", "vocab.json": "{}",
         "merges.txt": "a b", "chat_template.jinja": "{{ x }}"}  # fmt: skip


@pytest.fixture
def theirs(tmp_path):
    folder = tmp_path / "theirs"
    export(zoo.build(MAMBA | {"tokenizer": "somebody/else"}), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | IDS))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def check_text(folder, ids=True):
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in IDS if name in config} == (IDS if ids else {})
    assert json.loads((folder / "generation_config.json").read_text()) == (GENERATION if ids else IDS | GENERATION)
    assert {name: (folder / name).read_text() for name in FILES} == FILES


def test_what_is_said_about_text_comes_along_everywhere(theirs, tmp_path):
    check_text(zoo.save(zoo.load(theirs), tmp_path / "saved"))
    check_text(zoo.save(zoo.load(tmp_path / "saved"), tmp_path / "again"))
    zoo.save(zoo.load(tmp_path / "again"), tmp_path / "again")  # over itself
    check_text(tmp_path / "again")
    export(zoo.load(tmp_path / "again"), tmp_path / "back", "hf")
    check_text(tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "converted", "hybridzoo")
    check_text(tmp_path / "converted")
    convert(tmp_path / "converted", tmp_path / "last", "mamba_ssm")
    check_text(tmp_path / "last", ids=False)  # mamba-ssm's config takes no other fields
    assert zoo.load(tmp_path / "last").metadata["generation_config.json"] == IDS | GENERATION


def test_a_model_over_another_leaves_nothing_of_the_others_tokenizer(theirs, tmp_path):
    folder = zoo.save(zoo.load(theirs), tmp_path / "m")
    zoo.save(filled(1.0), folder)  # speaks bytes
    assert not (files(folder) & {"vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"})
    assert "eos_token_id" not in json.loads((folder / "config.json").read_text())
    folder = zoo.save(filled(1.0, tokenizer="somebody/else"), tmp_path / "theirs")
    assert {name: (folder / name).read_text() for name in FILES} == FILES  # whoever put them there


def test_a_tokenizer_that_is_gone_is_missed_aloud(theirs, tmp_path):
    model = zoo.load(theirs)
    theirs.rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"the folder that the model was loaded from is gone"):
        zoo.save(model, tmp_path / "m")


@pytest.mark.parametrize("stated", [None, 300])
def test_the_window_is_what_the_source_states_and_else_nothing(stated, theirs, tmp_path):
    config = json.loads((theirs / "config.json").read_text())
    assert "max_position_embeddings" not in config
    (theirs / "config.json").write_text(json.dumps(config | ({"max_position_embeddings": stated} if stated else {})))
    assert zoo.load(theirs).cfg.max_length == stated
    convert(theirs, tmp_path / "m", "hybridzoo")
    assert zoo.load(tmp_path / "m").cfg.max_length == stated
    assert zoo.build(MAMBA).cfg.max_length is None


def test_weights_that_cannot_be_loaded_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"has no values \(it is on the meta device\)"):
        zoo.save(zoo.build(CFG, device="meta"), tmp_path / "m")
    model = zoo.build(CFG)
    model.backbone.norm_f.weight = torch.nn.Parameter(torch.ones(8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'backbone.norm_f.weight' holds torch.int8"):
        zoo.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_save_that_fails_leaves_no_folder_behind_that_was_not_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (old := tmp_path / "old").mkdir()
    (old / "notes.txt").write_text("mine")
    with monkeypatch.context() as m:
        m.setattr("hybridzoo.zoo.checkpoint.native.save_file", full)
        for folder in (tmp_path / "new", old):
            with pytest.raises(OSError, match="No space"):
                zoo.save(filled(1.0), folder)
    assert {p.name for p in tmp_path.iterdir()} == {"old"} and files(old) == {"notes.txt"}
    zoo.save(filled(1.0), tmp_path / "new")
    assert seen(tmp_path / "new") == {1.0}

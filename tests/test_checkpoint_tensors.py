"""Stored tensors: what safetensors and torch give, and what a small file may not ask for."""

import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import CheckpointError
from hybridzoo.zoo.checkpoint.tensors import stored_tensors

CFG = {
    "vocab_size": 19,
    "d_model": 8,
    "layers": "mamba",
    "mixers": {"mamba": {"d_state": 4}},
}
KEY = "backbone.embedding.weight"
IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    return zoo.save(zoo.build(CFG), tmp_path_factory.mktemp("saved") / "m")


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "m"))


@pytest.fixture
def tensors(saved):
    return load_file(saved / "model.safetensors")


def as_bin(folder, content, **kwargs):
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin", **kwargs)


def raw(folder, header, data=b"", n=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header) if n is None else n) + header + data)


def read(folder):
    with stored_tensors(folder) as stored:
        return {name: tensor.read() for name, tensor in stored.items()}


def test_our_reader_reads_what_safetensors_reads_and_refuses_what_it_refuses(folder):
    file = folder / "model.safetensors"
    content = {
        "a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.tensor(1.5, dtype=torch.float64), "empty": torch.ones(0, 7),
        "h": torch.randn(2, 1, 3).half(), "i": torch.arange(4), "o": torch.ones(3, dtype=torch.bool),
    }  # fmt: skip
    whole = save(content, {"format": "pt", "x": "é"})
    file.write_bytes(whole)
    got = read(folder)
    assert got.keys() == content.keys() and all(
        torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in content.items()
    )
    end, refused = 8 + int.from_bytes(whole[:8], "little"), 0
    generator = torch.Generator().manual_seed(0)
    for at in [*range(8), *torch.randint(8, end, (150,), generator=generator).tolist()]:
        broken = bytearray(whole)
        broken[at] ^= 1 << (at % 8)
        file.write_bytes(bytes(broken))
        try:
            theirs = load(bytes(broken))
        except SafetensorError:
            refused += 1
            with pytest.raises(CheckpointError, match=r"model.safetensors: is damaged"):
                read(folder)
            continue
        try:
            ours = read(folder)
        except CheckpointError:
            continue  # stricter, about other metadata say
        assert ours.keys() == theirs.keys() and all(
            ours[k].dtype == theirs[k].dtype and ours[k].shape == theirs[k].shape for k in ours
        )
    assert refused > 100


def test_values_have_memory_of_their_own_and_the_files_stay_as_they_are(folder):
    before = (folder / "model.safetensors").read_bytes()
    for p in zoo.load(folder).parameters():
        p.data.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


HEADERS = {
    "longer than the file": (b"{}", b"", 2**62),
    "longer than any": (b"{" + b" " * (2**24 + 1) + b"}", b"", None),
    "nested": (b"[" * 100_000, b"", None),
    "a name twice": (b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"0000", None),
    "one place": ({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}, b"0000", None),
    "a gap": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"00000000", None),
    "more than there is": ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"0000", None),
    "negative": ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000", None),
    "backwards": ({"a": {"dtype": "U3", "shape": [1], "data_offsets": [0, -4]}}, b"", None),
    "no numbers": (b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', b"0000", None),
    "too many digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"0000", None),
    "no object": (b'["a"]', b"", None),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_cannot_be_is_refused_in_one_line(name, folder):
    raw(folder, *HEADERS[name])
    with pytest.raises(CheckpointError, match=r"model.safetensors: is damaged \(.*\)\. Copy it again\.$") as e:
        zoo.load(folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64], ids=str)  # fmt: skip
def test_numbers_that_no_model_computes_with_are_refused_by_name(kind, folder, tensors):
    save_file(tensors | {KEY: tensors[KEY].to(kind)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor '{KEY}' holds {kind}, expected floating-point"):
        zoo.load(folder)
    as_bin(folder, {k: v.to(kind) for k, v in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"tensor '.*' holds {kind}, expected floating-point"):
        zoo.load(folder)


@pytest.mark.parametrize("stated", ["float32", "bfloat16", None, "float16"])
@torch.no_grad()
def test_weights_of_several_precisions_become_what_the_config_states_or_the_widest(stated, folder, tensors):
    mixed = {k: v.bfloat16() if k.endswith("in_proj.weight") or k == KEY else v for k, v in tensors.items()}
    save_file(mixed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"dtype": stated}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    model = zoo.load(folder)
    expected = torch.bfloat16 if stated == "bfloat16" else torch.float32
    assert {p.dtype for n, p in model.named_parameters() if not n.endswith(("A_log", "D", "dt_proj.bias"))} == {
        expected
    }
    assert model(IDS).logits.isfinite().all()
    assert zoo.load(folder, dtype=torch.float64)(IDS).logits.isfinite().all()


def test_a_router_may_be_of_another_precision_and_stays_as_stored(tmp_path):
    mixers = {"moe": {"d_intermediate": 8, "num_experts": 3}}
    model = zoo.build({"vocab_size": 9, "d_model": 8, "layers": "moe", "mixers": mixers}, dtype=torch.bfloat16)
    model.backbone.layers[0].mixer.router.float()
    back = zoo.load(zoo.save(model, tmp_path / "m"))
    assert {n: p.dtype for n, p in back.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert back(IDS).logits.isfinite().all()


ODD = {
    "stride 0": (torch.zeros(1).expand(2**24, 8), r"is not plain numbers in the file"),
    "overlapping rows": (torch.zeros(100).as_strided((50, 50), (1, 1)), r"is not plain numbers in the file"),
    "meta": (torch.empty(19, 8, device="meta"), r"'torch._utils _rebuild_meta_tensor_no_storage'"),
    "sparse": (torch.eye(19, 8).to_sparse(), r"'torch._utils _rebuild_sparse_tensor'"),
    "a list": ([torch.ones(1)], r"is a list, expected a tensor"),
    "transposed": (torch.randn(8, 19).t(), None),
    "a part": (torch.randn(40, 16)[2:21, ::2], None),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("name", ODD)
def test_a_tensor_that_does_not_lie_in_the_file_as_it_is_is_refused(name, zipped, folder, tensors):
    value, message = ODD[name]
    as_bin(folder, tensors | {KEY: value}, _use_new_zipfile_serialization=zipped)
    if message is None:
        assert torch.equal(zoo.load(folder).get_parameter(KEY), value)
        return
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin: .*{message}"):
        zoo.load(folder)


def test_names_of_one_place_are_read_as_far_as_models_have_them(folder, tensors):
    place = torch.randn(19, 8)
    as_bin(folder, tensors | {KEY: place, "lm_head.weight": place})  # a tied head
    assert torch.equal(zoo.load(folder).lm_head.weight, place)
    as_bin(
        folder,
        {f"{KEY}{i}": torch.zeros(10_000) if not i else place for i in range(2)} | {str(i): place for i in range(5000)},
    )
    with pytest.raises(CheckpointError, match=r"at most 8 times that is read"):
        zoo.load(folder)


def test_a_compressed_file_and_one_whose_parts_overlap_are_refused(folder, tensors):
    as_bin(folder, tensors | {KEY: torch.zeros(2**20, 8)})
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    (folder / "new").rename(file)
    assert file.stat().st_size < 200_000
    with pytest.raises(CheckpointError, match=r"is no file that torch.save has written \(.* is compressed\)"):
        zoo.load(folder)


PICKLES = {
    "memory": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "by the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "an instance": b"\x80\x02(ios\nsystem\n.",
    "a storage larger than the file": (
        b"\x80\x02}q\x00X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x8a\x06\x00\x00\x00\x00\x00\x01tQK\x00\x8a\x05\x00\x00\x00\x00\x01\x85K\x01\x85\x89"
        b"ccollections\nOrderedDict\n)RtRs."
    ),
    "no end": b"\x80\x02}",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_anything_but_plain_tensors_is_refused(name, folder):
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        for part, content in {"data.pkl": PICKLES[name], "version": "3", "byteorder": "little"}.items():
            archive.writestr(f"a/{part}", content)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: is damaged") as e:
        zoo.load(folder)
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "config.yaml", "generation_config.json"])
def test_pipes_devices_loops_and_folders_are_no_files(file, folder):
    place, message = folder / file, rf"{file}: (is no regular file|cannot be read|no such file)|holds neither"
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    with pytest.raises(CheckpointError, match=message):
        zoo.load(folder)
    place.unlink()
    place.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=message):
        zoo.load(folder)
    place.unlink()
    place.mkdir()
    with pytest.raises(CheckpointError, match=message):
        zoo.load(folder)
    if file.startswith(("model", "config.json")):
        place.rmdir()
        (folder / "config.yaml").unlink(missing_ok=True)
        place.symlink_to(file)
        with pytest.raises(CheckpointError, match=message):
            zoo.load(folder)


@pytest.mark.parametrize("name", ["a" * 300 + ".safetensors", "a\0b.safetensors", "\x1b[31m.safetensors", "a\\b.safetensors", "\ud800.safetensors"])  # fmt: skip
def test_names_that_no_file_has_are_refused_and_not_printed_raw(name, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {KEY: name}}))
    with pytest.raises(
        CheckpointError, match=r"index.json: names .* as a file, which no file of the folder is called"
    ) as e:
        zoo.load(folder)
    assert str(e.value).isprintable() and len(str(e.value)) < 400


def test_a_json_file_out_of_all_proportion_is_refused_before_it_is_read(folder):
    with open(folder / "config.json", "wb") as f:
        f.truncate(2**40)
    with pytest.raises(
        CheckpointError, match=r"config.json: has 1099511627776 bytes, and no such file needs more than"
    ):
        zoo.load(folder)


def test_a_folder_with_nothing_but_a_config_and_one_without_tensors(folder):
    raw(folder, {})
    with pytest.raises(CheckpointError, match=r"tensor '.*' is missing"):
        zoo.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: no such file, nor pytorch_model.bin"):
        zoo.load(folder)
    with pytest.raises(CheckpointError, match=r"config.json: is no folder and no file of weights"):
        zoo.load(folder / "config.json")

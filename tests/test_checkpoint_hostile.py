"""Broken, hostile and unknown input: one clear error each, no code run, nothing left behind. Needs no transformers."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import CheckpointError, convert, export
from hybridzoo.zoo.checkpoint.families import FAMILIES
from hybridzoo.zoo.checkpoint.fields import Fields
from hybridzoo.zoo.checkpoint.inspect import stored_dtype
from hybridzoo.zoo.models.causal_lm import CausalLM

CFG = {
    "vocab_size": 19, "d_model": 16, "layers": "(attention moe) * 2", "tie_embeddings": False, "norm": {"type": "rmsnorm", "eps": 1e-5},
    "mixers": {"attention": {"nheads": 2}, "moe": {"d_intermediate": 8, "num_experts": 3, "router": "topk_softmax"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole") / "m"
    assert export(zoo.build(CFG), folder) == "mixtral"
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A fresh copy to break."""
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def shard(folder, suffix=".safetensors"):
    """Split into two shards with an index, as large checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        file = f"{stem}-{i + 1:05}-of-00002{suffix}"
        content = {name: tensors[name] for name in part}
        save_file(content, folder / file) if suffix == ".safetensors" else torch.save(content, folder / file)
        index |= dict.fromkeys(part, file)
    place = folder / f"{stem}{suffix}.index.json"
    place.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return place


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_and_old_files_are_read(folder, whole, suffix):
    shard(folder, suffix)
    a, b = zoo.load(folder).state_dict(), zoo.load(whole).state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_one_old_file_is_read_and_its_weights_are_ours(folder, whole):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(zoo.load(folder).lm_head.weight, zoo.load(whole).lm_head.weight)
    torch.save(tensors, folder / "pytorch_model.bin")
    before = (folder / "pytorch_model.bin").read_bytes()
    with torch.no_grad():
        zoo.load(folder).lm_head.weight.add_(1)
    assert (folder / "pytorch_model.bin").read_bytes() == before


def test_experts_fused_as_in_memory_are_read_too(folder, whole):
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        old, new = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
        w1, w2, w3 = (torch.stack([tensors.pop(f"{old}.experts.{e}.w{n}.weight") for e in range(3)]) for n in (1, 2, 3))
        tensors |= {f"{new}.experts.gate_up_proj": torch.cat([w1, w3], 1), f"{new}.experts.down_proj": w2}
        tensors[f"{new}.gate.weight"] = tensors.pop(f"{old}.gate.weight")
    save_file(tensors, folder / "model.safetensors")
    a, b = zoo.load(folder).state_dict(), zoo.load(whole).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_half_precision_keeps_what_must_be_float32(tmp_path):
    model = zoo.build(
        {"vocab_size": 9, "d_model": 16, "layers": "mamba", "mixers": {"mamba": {}}, "residual_in_fp32": True}
    )
    export(model, tmp_path / "a")
    back = zoo.load(tmp_path / "a", dtype=torch.bfloat16)
    assert {n.rsplit(".", 1)[1] for n, p in back.named_parameters() if p.dtype == torch.float32} == {
        "A_log",
        "D",
        "bias",
    }
    assert torch.equal(back.backbone.layers[0].mixer.A_log, model.backbone.layers[0].mixer.A_log)


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_pickle_with_code_is_refused_and_not_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    content = {"w": Evil(tmp_path / "evil-ran")}
    for write in (lambda f: pickle.dump(content, f, protocol=2), lambda f: torch.save(content, f)):
        with open(folder / "pytorch_model.bin", "wb") as f:
            write(f)
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin: is damaged, or wants to run code"):
            zoo.load(folder)
    assert not (tmp_path / "evil-ran").exists()


def test_every_cut_and_many_flipped_bits_are_refused_or_change_nothing_but_values(folder, whole):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for cut in (0, 4, 8, header // 2, header, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=r"model.safetensors"):
            zoo.load(folder)
    generator = torch.Generator().manual_seed(0)
    for at in [*range(8), *torch.randint(8, header, (30,), generator=generator).tolist()]:
        broken = bytearray(content)
        broken[at] ^= 1 << (at % 7)
        file.write_bytes(bytes(broken))
        try:
            zoo.load(folder)  # a flip in the header's metadata, or of its padding, may do no harm
        except CheckpointError:
            pass


def test_every_cut_of_an_old_file_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
        content = file.read_bytes()
        for cut in (0, 1, 100, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:cut])
            with pytest.raises(CheckpointError, match=r"pytorch_model.bin"):
                zoo.load(folder)
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match=r"holds a list"):
        zoo.load(folder)
    torch.save({"a": 1}, file)
    with pytest.raises(CheckpointError, match=r"'a' is a int"):
        zoo.load(folder)


def test_a_missing_shard_and_indices_that_lead_elsewhere(folder, tmp_path_factory):
    index = shard(folder)
    content = json.loads(index.read_text())
    outside = tmp_path_factory.mktemp("outside") / "model-00001-of-00002.safetensors"
    outside.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    first = min(content["weight_map"])
    for name in (str(outside), "../x.safetensors", "a/b.safetensors", "..", "", "./../../etc/passwd"):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {first: name}}))
        with pytest.raises(CheckpointError, match=r"index.json: names"):
            zoo.load(folder)
    for broken in ("[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "null"):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match=r"index.json"):
            zoo.load(folder)
    index.write_text(json.dumps(content))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: no such file"):
        zoo.load(folder)


def test_tensors_that_are_missing_too_many_or_of_another_kind(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, file)
    with pytest.raises(CheckpointError, match=f"'{gone}' is missing"):
        zoo.load(folder)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.weigth": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"q_proj.weigth' is not part of the model. Did you mean"):
        zoo.load(folder)
    save_file(tensors | {"model.norm.weight": torch.ones(17)}, file)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has shape \(17,\), config.json makes it \(16,\)"):
        zoo.load(folder)
    save_file(tensors | {"model.norm.weight": torch.ones(16, dtype=torch.int64)}, file)
    with pytest.raises(CheckpointError, match=r"holds torch.int64"):
        zoo.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtrall"}, r"model_type is 'mixtrall'.*Did you mean 'mixtral'\? Known: hybridzoo, bamba, "),
        ({"model_type": ...}, r"model_type is None"),
        ({"model_type": ["mixtral"]}, r"model_type is \['mixtral'\]"),
        ({"num_key_value_head": 1}, r"unknown field 'num_key_value_head'. Did you mean 'num_key_value_heads'"),
        ({"quantization_config": {"bits": 4}}, r"quantised"),
        ({"hidden_size": "16"}, r"hidden_size is '16', expected int"),
        ({"hidden_size": 2**40}, r"beyond any size"),
        ({"hidden_size": 2**30}, r"hidden_size: is 1073741824, outside"),
        ({"hidden_size": -16}, r"beyond any size"),
        ({"num_hidden_layers": 2**30}, r"num_hidden_layers is 1073741824, beyond any size"),
        ({"num_hidden_layers": 5000}, r"asks for 10000 blocks, and the files hold 2 layers"),
        ({"num_local_experts": 2**29}, r"num_local_experts is 536870912, beyond any size"),
        ({"num_local_experts": 9999}, r"is missing"),
        ({"num_attention_heads": 0}, r"describes no|nheads"),
        ({"tie_word_embeddings": 3}, r"tie_word_embeddings is 3, expected bool"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_type is 'yarn'; only 'default'"),
        ({"rope_parameters": {"rope_theta": "x"}}, r"rope_theta is 'x'"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu'"),
        ({"intermediate_size": 9}, r"has shape"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        zoo.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"a":' * 3000])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"config.json"):
        zoo.load(folder)


def test_a_failed_conversion_leaves_no_folder(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    edit(folder, intermediate_size=9)
    with pytest.raises(CheckpointError):
        convert(folder, place / "out", "hybridzoo")
    assert list(place.iterdir()) == []
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("x")
    edit(folder, intermediate_size=8)
    with pytest.raises(CheckpointError, match="exists already"):
        convert(folder, place / "out")
    assert [p.name for p in place.rglob("*")] == ["out", "mine"]


def test_a_conversion_interrupted_while_writing_leaves_no_folder(folder, tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("place")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hybridzoo.zoo.checkpoint.writing.dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, place / "out")
    assert list(place.iterdir()) == []


def test_a_hub_id_without_a_connection_is_one_error(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"nobody/nothing-at-all: no such folder, and the hub does not give it"):
        zoo.load("nobody/nothing-at-all")


def test_tokenizer_files_travel_along(folder, tmp_path_factory):
    (folder / "tokenizer.json").write_text("{}")
    out = tmp_path_factory.mktemp("out") / "x"
    assert "tokenizer.json" in convert(folder, out, "hf").files and zoo.load(out).cfg.tokenizer == str(out)


def test_a_model_knows_its_folder_and_what_it_says_about_text(folder, tmp_path_factory):
    assert zoo.build(CFG).source is None and zoo.build(CFG).metadata == {}
    edit(folder, bos_token_id=..., eos_token_id=[4, 5], pad_token_id=None)
    (folder / "generation_config.json").write_text('{"eos_token_id": 5, "top_k": 3}')
    model = zoo.load(str(folder))
    ids, generation = {"eos_token_id": [4, 5], "pad_token_id": None}, {"eos_token_id": 5, "top_k": 3}
    assert model.source == folder and model.metadata == {"config.json": ids, "generation_config.json": generation}


def test_large_models_are_written_in_shards(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("hybridzoo.zoo.checkpoint.writing._SHARD", 3000)
    model = zoo.load(whole)
    export(model, tmp_path / "x")
    assert len(list((tmp_path / "x").glob("model-*-of-*.safetensors"))) > 2
    back = zoo.load(tmp_path / "x").state_dict()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


def test_loading_and_exporting_import_no_transformers(folder):
    code = (
        f"import sys, hybridzoo as zoo; from hybridzoo.zoo.checkpoint import export; export(zoo.load({str(folder)!r}), {str(folder / 'o')!r});"
        "print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'huggingface_hub', 'tokenizers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("to", ["hf", "hybridzoo"])
def test_loading_needs_memory_for_the_weights_and_a_tenth(to, tmp_path):
    mamba = {
        "vocab_size": 64,
        "d_model": 512,
        "layers": "mamba * 24",
        "mixers": {"mamba": {}},
        "residual_in_fp32": True,
    }
    model = zoo.build(mamba)
    export(model, tmp_path / "m", to)
    weights = sum(p.nbytes for p in model.parameters())
    code = (
        "import resource, torch, hybridzoo as zoo; from hybridzoo.zoo.checkpoint import load;"
        # one small model first, so that what is imported and cached on the way does not count
        f"zoo.build({mamba | {'layers': 'mamba'}!r}); torch.ones(9, dtype=torch.bfloat16).float();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; before = peak();"
        f"model = zoo.load({str(tmp_path / 'm')!r}); print(peak() - before)"
    )
    used = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert weights > 150e6 and used < 1.1 * weights + 8e6, (used, weights)


# published sizes: configs as their owners describe them, parameters as published or counted in the reference tables
PUBLISHED = {
    "mamba-130m": ({"d_model": 768, "n_layer": 24, "ssm_cfg": {}}, 129_135_360),
    "mamba-370m": ({"d_model": 1024, "n_layer": 48, "ssm_cfg": {}}, 371_516_416),
    "mamba-790m": ({"d_model": 1536, "n_layer": 48, "ssm_cfg": {}}, 793_204_224),
    "mamba-1.4b": ({"d_model": 2048, "n_layer": 48, "ssm_cfg": {}}, 1_372_178_432),
    "mamba-2.8b": ({"d_model": 2560, "n_layer": 64, "ssm_cfg": {}}, 2_768_345_600),
    "mamba2-130m": ({"d_model": 768, "n_layer": 24, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}, 128_989_632),
    "mamba2-370m": ({"d_model": 1024, "n_layer": 48, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}, 368_346_624),
    "mamba2-780m": ({"d_model": 1536, "n_layer": 48, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}, 780_161_280),
    "mamba2-1.3b": ({"d_model": 2048, "n_layer": 48, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}, 1_343_757_312),
    "mamba2-2.7b": ({"d_model": 2560, "n_layer": 64, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}, 2_702_599_680),
    "mamba2attn-2.7b": (
        {"d_model": 2560, "n_layer": 64, "ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16, "attn_layer_idx": [9, 18, 27, 36, 45, 56],
         "attn_cfg": {"causal": True, "d_conv": 4, "head_dim": 128, "num_heads": 30, "out_proj_bias": False, "qkv_proj_bias": False, "rotary_emb_dim": 64}},
        2_697_590_880,
    ),
    "falcon-mamba-7b": (
        {"model_type": "falcon_mamba", "hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024, "tie_word_embeddings": False},
        7_272_665_088,
    ),
    "Mamba-Codestral-7B-v0.1": ({"model_type": "mamba2"}, 7_285_403_648),
    "Jamba-v0.1": ({"model_type": "jamba"}, 51_570_323_328),
    "Mixtral-8x7B-v0.1": ({"model_type": "mixtral"}, 46_702_792_704),
    "Llama-2-7b": ({"model_type": "llama", "rms_norm_eps": 1e-5}, 6_738_415_616),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_exact_parameter_counts(name, tmp_path):
    config, count = PUBLISHED[name]
    family = FAMILIES[config.get("model_type", "mamba_ssm")]
    cfg = family.read(Fields(config, tmp_path / "config.json"))
    assert CausalLM(cfg, device="meta").num_params() == count


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("depth", [65, 900, 100_000])
def test_json_that_nobody_could_copy_is_not_read(tmp_path, name, depth):
    folder = zoo.save(zoo.build("mamba-tiny", d_model=16, layers="mamba"), tmp_path)
    content = json.loads((folder / name).read_text()) if name == "config.json" else {}
    (folder / name).write_text(json.dumps(content | {"other": 0})[:-2] + "[" * depth + "]" * depth + "}")
    with pytest.raises(CheckpointError, match=f"{name}: (has more than 64 levels|is not JSON)"):
        zoo.load(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"1", b"x" * 100, (2**40).to_bytes(8, "little") + b"{}", (9).to_bytes(8, "little") + b"[" * 9],
    ids=["empty", "short", "text", "long header", "no header"],
)
def test_a_damaged_file_of_weights_is_named_by_who_asks_for_its_dtype(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        stored_dtype(tmp_path)


def test_the_stored_dtype_is_one_that_a_model_can_have(tmp_path):
    assert stored_dtype(tmp_path) is None
    save_file(
        {"a": torch.zeros(100, dtype=torch.int64), "b": torch.zeros(3, dtype=torch.bfloat16)},
        tmp_path / "a.safetensors",
    )
    assert stored_dtype(tmp_path) == torch.bfloat16

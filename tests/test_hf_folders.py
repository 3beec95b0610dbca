"""Folders that transformers, PEFT and the zoo write in turn; each is judged by what transformers reads from them."""

import json

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import convert

transformers = pytest.importorskip("transformers")
from hybridzoo.zoo.hf import HybridZooConfig, HybridZooForCausalLM  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
CFG = {
    "vocab_size": 30, "pad_vocab_size_multiple": 8, "d_model": 16, "layers": "attention mlp", "tie_embeddings": True,
    "mixers": {"attention": {"nheads": 2}, "mlp": {"d_intermediate": 16}},
}  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 2, 7, 3, 3, 8]])


def adapter(**changes):
    return HybridZooForCausalLM.wrap(zoo.build(CFG | changes)).eval()


@torch.no_grad()
def both(folder):
    """The logits that transformers and the zoo read from a folder."""
    return AutoModel.from_pretrained(folder).eval()(IDS).logits, zoo.load(folder)(IDS).logits


@pytest.mark.parametrize("shards", ["5GB", "3KB"])
@torch.no_grad()
def test_whoever_saves_last_is_read_by_both(shards, tmp_path):
    first, second = adapter(mixers=CFG["mixers"] | {"attention": {"nheads": 2, "window": 2}}), adapter()
    zoo.save(first, tmp_path)
    (tmp_path / "train.json").write_text("{}")
    second.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()
    for logits in both(tmp_path):
        torch.testing.assert_close(logits, second(IDS).logits)
    zoo.save(first, tmp_path)
    assert not [*tmp_path.glob("model-*"), *tmp_path.glob("*.index.json")]
    for logits in both(tmp_path):
        torch.testing.assert_close(logits, first(IDS).logits)
    assert (tmp_path / "train.json").read_text() == "{}" and not [*tmp_path.glob(".saving*")]


def test_transformers_save_that_dies_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    first, second = adapter(), adapter(residual_multiplier=0.5)
    zoo.save(first, tmp_path)
    want = first(IDS).logits

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(OSError, match="No space left"):
            second.save_pretrained(tmp_path)
    for logits in both(tmp_path):
        torch.testing.assert_close(logits, want)
    assert not [*tmp_path.glob(".saving*")]


def test_the_config_alone_is_saved_with_its_readable_copy(tmp_path):
    zoo.save(adapter(), tmp_path)
    HybridZooConfig(zoo=CFG | {"residual_multiplier": 0.5}).save_pretrained(tmp_path)
    assert zoo.load(tmp_path).cfg.residual_multiplier == 0.5


@pytest.mark.parametrize("rows", [20, 32, 40])
@torch.no_grad()
def test_a_resized_vocabulary_comes_back_from_every_folder(rows, tmp_path):
    zoo.save(adapter(), tmp_path / "a")
    model = AutoModel.from_pretrained(tmp_path / "a").eval()
    model.resize_token_embeddings(rows)
    want = model(IDS).logits
    model.save_pretrained(tmp_path / "a")
    zoo.save(model, tmp_path / "b")
    zoo.save(zoo.load(tmp_path / "a"), tmp_path / "c")
    for name in "abc":
        for logits in both(tmp_path / name):
            torch.testing.assert_close(logits, want)
        assert zoo.load(tmp_path / name).cfg.vocab_size == rows


# ------------------------------------------------------------------------------------------------------- the tied head


def untied(how):
    """A model whose config says tied, and whose head was trained: in place, or by PEFT, merged."""
    model = adapter()
    if how == "by hand":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        return model
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["fc1"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.copy_(torch.randn(32, 16))
    return model.merge_and_unload().eval()


@pytest.mark.parametrize("how", ["by hand", "merged"])
@torch.no_grad()
def test_a_trained_head_survives_every_way_of_saving(how, tmp_path):
    model = untied(how)
    want = model(IDS).logits
    zoo.save(model, tmp_path / "a")
    zoo.save(model.core, tmp_path / "b")
    model.save_pretrained(tmp_path / "c")
    convert(tmp_path / "a", tmp_path / "d", "hf")
    for name in "abcd":
        for logits in both(tmp_path / name):
            torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert not (config["zoo"]["tie_embeddings"] if "zoo" in config else config["tie_word_embeddings"])


@pytest.mark.parametrize("kind", ["Llama", "Mamba", "Mamba2", "Bamba"])
@torch.no_grad()
def test_a_trained_head_in_transformers_own_models_is_read(kind, tmp_path):
    small = {
        "Llama": {"intermediate_size": 16, "num_attention_heads": 2},
        "Mamba": {"state_size": 4},
        "Mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
        "Bamba": {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 8,
                  "mamba_n_groups": 1, "mamba_d_state": 4, "attn_layer_indices": [1]},
    }[kind]  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, tie_word_embeddings=True, **small
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(30, 16))
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back", "hf")
    want = AutoModel.from_pretrained(tmp_path / "theirs")(IDS).logits
    assert torch.equal(want, model(IDS).logits)
    for logits in both(tmp_path / "back"):
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------- what is said about text


def said(folder):
    """What transformers knows of a folder: ids in the config, and how to generate."""
    model = AutoModel.from_pretrained(folder)
    generation = model.generation_config.to_diff_dict()
    for name in ("transformers_version", "_from_model_config"):
        generation.pop(name, None)
    return [getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")], generation


def test_ids_and_generation_settings_survive_every_way_around(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=3, eos_token_id=[4, 5, 7], pad_token_id=6, do_sample=True, top_k=3, temperature=0.5
    )
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer.json").write_text("{}")
    want = said(tmp_path / "theirs")
    zoo.save(zoo.load(tmp_path / "theirs"), tmp_path / "a")
    zoo.save(AutoModel.from_pretrained(tmp_path / "a"), tmp_path / "b")
    zoo.save(AutoModel.from_pretrained(tmp_path / "b").core, tmp_path / "c")
    HybridZooForCausalLM.wrap(zoo.load(tmp_path / "c")).save_pretrained(tmp_path / "d")
    convert(tmp_path / "d", tmp_path / "e", "hf")
    for name in "abcde":
        assert said(tmp_path / name) == want, name
        # transformers leaves the tokenizer to save itself; d still names the folder that has it, for e
        assert (tmp_path / name / "tokenizer.json").exists() == (name in "abce")
    changed = AutoModel.from_pretrained(tmp_path / "a")
    changed.config.eos_token_id = 9
    changed.generation_config.eos_token_id = 9
    zoo.save(changed, tmp_path / "f")
    assert said(tmp_path / "f") == ([3, 9, 6], want[1] | {"eos_token_id": 9})


@pytest.mark.parametrize("stated", [None, 300])
def test_lm_eval_gives_a_converted_model_the_same_window(stated, tmp_path):
    resolve = pytest.importorskip("lm_eval.models.utils").resolve_max_length
    config = transformers.MambaConfig(vocab_size=28, hidden_size=16, num_hidden_layers=1, state_size=4)
    if stated:
        config.max_position_embeddings = stated
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    tokenizer = type("Tokenizer", (), {"model_max_length": 256})
    for to in ("hybridzoo", "hf"):
        convert(tmp_path / "theirs", tmp_path / to, to)
    windows = {
        name: resolve(transformers.AutoConfig.from_pretrained(tmp_path / name), tokenizer)
        for name in ("theirs", "hybridzoo", "hf")
    }
    if stated:
        del windows["hf"]  # their Mamba has no such field; see the report of the conversion
    assert set(windows.values()) == {stated or 256}

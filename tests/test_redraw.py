"""What transformers finds no value for, it asks the model to draw: tensors that a file lacks, and rows of a larger vocabulary."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import hybridzoo as zoo

transformers = pytest.importorskip("transformers")
from hybridzoo.zoo.hf import HybridZooForCausalLM  # noqa: E402


@pytest.fixture
def poisoned():
    """``torch.empty`` gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def lacking(folder, model, kept):
    """The model's folder without what ``kept`` says no to, by name."""
    zoo.save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    some = {name: t for name, t in tensors.items() if kept(name)}
    save_file(some, folder / "model.safetensors", {"format": "pt"})
    return tensors.keys() - some.keys()


KEPT = {
    "half": lambda name: ".layers.0." in name,
    "no table": lambda name: "embedding" not in name,
    "no norm": lambda name: name != "backbone.norm_f.weight",
    "no projection": lambda name: "in_proj" not in name,
}


@pytest.mark.parametrize("name", ["mamba-tiny", "jamba-tiny", "zamba2-tiny"])
@pytest.mark.parametrize("kept", KEPT)
@torch.no_grad()
def test_what_a_file_lacks_is_drawn_as_in_a_new_model(name, kept, poisoned, tmp_path):
    torch.manual_seed(0)
    model, twin = (zoo.build(name) for _ in range(2))
    for part in (model.backbone.norm_f, model.backbone.layers[0].norm):
        part.weight.fill_(3.0)
    missing = lacking(tmp_path, model, KEPT[kept])
    dtype = torch.bfloat16 if kept == "half" else torch.float32
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert missing and missing <= info["missing_keys"]
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight or not model.cfg.tie_embeddings
    for key, p in loaded.core.named_parameters():
        stored, new = model.get_parameter(key), twin.get_parameter(key).float()
        if key not in missing:
            assert torch.equal(p, stored.to(p.dtype))
            continue
        assert p.isfinite().all(), key
        if new.numel() >= 512:
            torch.testing.assert_close(p.float().std(), new.std(), rtol=0.2, atol=1e-6, msg=key)
            torch.testing.assert_close(p.float().mean(), new.mean(), rtol=0.1, atol=0.2 * new.std().item(), msg=key)
        elif not new.std():
            assert torch.equal(p.float(), new), key
    ids = torch.randint(1, 256, (2, 16))
    assert loaded(ids, labels=ids).loss < 6.5


def test_a_tensor_of_another_shape_is_drawn_where_that_was_asked_for(poisoned, tmp_path):
    lacking(tmp_path, zoo.build("mamba-tiny"), lambda name: True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.layers.0.mixer.A_log"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    load = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(RuntimeError, match="size"):
        load(tmp_path)
    drawn = load(tmp_path, ignore_mismatched_sizes=True).core.backbone.layers[0].mixer.A_log
    assert torch.equal(drawn, zoo.build("mamba-tiny").backbone.layers[0].mixer.A_log)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_drawn_as_the_others_were(tied):
    torch.manual_seed(0)
    adapter = HybridZooForCausalLM.wrap(zoo.build("mamba-tiny", [f"tie_embeddings={tied}"]))
    before = adapter.lm_head.weight.clone()
    adapter.resize_token_embeddings(400, mean_resizing=False)
    for part in (adapter.get_input_embeddings(), adapter.lm_head):
        assert part.weight[256:].std().item() == pytest.approx(adapter.core.cfg.initializer_range, rel=0.05)
    assert torch.equal(adapter.lm_head.weight[:256], before)

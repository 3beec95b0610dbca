"""PEFT on zoo models: every adapter has the gradient that the merged weights give it, and merging changes nothing."""

import copy

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import hybridzoo as zoo
from hybridzoo.zoo.hf import HybridZooForCausalLM

EXPERTS = ["experts.w1", "experts.w2"]
RANK, SCALE = 2, 1.5
WITH_EXPERTS = {"target_modules": "all-linear", "target_parameters": EXPERTS}


def lora(**targets):
    # drawn, not zero, so that the first half of every adapter has a gradient, too
    return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK * SCALE, init_lora_weights=False, **targets)


def merged(model, weights):
    """The weights that the adapters make, as a function of the adapters, by the definition of LoRA (arXiv:2106.09685)."""
    out = {}
    for path, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if isinstance(layer, ParamWrapper):
            name = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
            if weights[name].dim() == 3:  # (e, r, in) and (e, out, r)
                A, B = A.unflatten(0, (-1, RANK)), B.unflatten(1, (RANK, -1)).permute(2, 0, 1)
        else:
            name = f"{path}.weight"
        out[name] = weights[name] + SCALE * B @ A
    return out


TARGETS = {
    "in_proj": {"target_modules": ["in_proj"]},
    "x_proj": {"target_modules": ["x_proj", "dt_proj"]},
    "out_proj": {"target_modules": ["out_proj"]},
    "mlp": {"target_modules": ["fc1", "fc2"]},
    "router": {"target_modules": ["router"]},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "decay-rates": {"target_modules": [], "target_parameters": ["A_log"]},
    "head": {"target_modules": ["lm_head"]},
    "all": WITH_EXPERTS,
}
CASES = [("jamba-tiny", target) for target in TARGETS if target != "head"]
CASES += [("mamba2attn-tiny", "all"), ("samba-tiny", "all"), ("nvidia-hybrid-tiny", "all"), ("untied", "head")]


@pytest.mark.parametrize(("name", "target"), CASES, ids=["-".join(case) for case in CASES])
def test_every_adapter_has_the_gradient_of_the_merged_weights(name, target):
    overrides = ["tie_embeddings=false"] if name == "untied" else []
    core = zoo.build("mamba-tiny" if name == "untied" else name, overrides).double()
    whole, weights = copy.deepcopy(core), {n: p.detach() for n, p in core.named_parameters()}
    config = lora(**TARGETS[target])
    if "jamba" not in name:
        config.target_parameters = None  # no experts there
    model = get_peft_model(HybridZooForCausalLM.wrap(core), config, autocast_adapter_dtype=False)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) >= 2
    ids = torch.randint(1, 256, (2, 12))
    loss = model(input_ids=ids, labels=ids).loss
    expected = functional_call(whole, merged(model, weights), (ids, ids)).loss
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for got, want in zip(torch.autograd.grad(loss, adapters), torch.autograd.grad(expected, adapters), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)


def test_saving_loading_and_merging_keep_the_logits(tmp_path):
    zoo.save(zoo.build("jamba-tiny"), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.randint(1, 256, (2, 12))
    with torch.no_grad():
        before = base(ids).logits
        model = get_peft_model(base, lora(**WITH_EXPERTS)).eval()
        logits = model(ids).logits
        assert (logits - before).abs().max() > 0.1
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, before)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        text = model.generate(input_ids=ids, **options)
        assert torch.equal(text, model.generate(input_ids=ids, use_cache=False, **options))
        assert torch.equal(text, base.core.generate(ids, max_new_tokens=5))  # through the adapters, too

        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(again.eval()(ids).logits, logits)
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, logits)

        with pytest.raises(ValueError, match="merge_and_unload"):
            zoo.save(model, tmp_path / "unmerged")
        assert not (tmp_path / "unmerged").exists()
        whole = again.merge_and_unload()
        assert isinstance(whole, HybridZooForCausalLM)
        torch.testing.assert_close(whole(ids).logits, logits, atol=1e-4, rtol=1e-4)
        zoo.save(whole, tmp_path / "ours")
        whole.save_pretrained(tmp_path / "theirs")
        for folder in ("ours", "theirs"):
            assert torch.equal(zoo.load(tmp_path / folder)(ids).logits, whole(ids).logits)


@torch.no_grad()
def test_an_adapter_of_a_shared_part_acts_on_every_use_and_merges():
    """Of one module there is one adapter; with one for each use, each would be merged into the weight of all."""
    model, ids = HybridZooForCausalLM.wrap(zoo.build("zamba2-tiny").double()).eval(), torch.randint(1, 256, (2, 12))
    before, options = model(ids).logits, {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    adapted = get_peft_model(model, lora(target_modules=["out_proj", "fc1"]), autocast_adapter_dtype=False).eval()
    logits, text = adapted(ids).logits, adapted.generate(input_ids=ids, **options)
    first, twin = (adapted.get_base_model().backbone.layers[i].mixer.out_proj for i in (2, 6))
    assert first is twin and isinstance(first, LoraLayer) and (logits - before).abs().max() > 0.1
    whole = adapted.merge_and_unload()
    torch.testing.assert_close(whole(ids).logits, logits, atol=1e-9, rtol=1e-9)
    assert torch.equal(whole.generate(ids, **options), text)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_whole_modules_are_trained_beside_adapters(checkpointing):
    model = HybridZooForCausalLM.wrap(zoo.build("mamba-tiny", ["tie_embeddings=false"]))
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # by its newer name
    model = get_peft_model(model, lora(target_modules=["in_proj"], modules_to_save=["lm_head", "embedding"])).train()
    ids = torch.randint(1, 256, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in gradients) and any("embedding" in n for n in gradients)
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())


def test_what_must_be_float32_stays_so_inside_an_adapted_projection():
    core = zoo.build("jamba-tiny")
    model = get_peft_model(HybridZooForCausalLM.wrap(core), lora(target_modules=["dt_proj"]))
    bias = core.get_parameter("backbone.layers.0.mixer.dt_proj.bias").clone()
    model.to(torch.bfloat16)
    mixer = model.get_base_model().core.backbone.layers[0].mixer
    assert mixer.dt_proj.bias.dtype == torch.float32 and torch.equal(mixer.dt_proj.bias, bias)
    assert mixer.dt_proj.weight.dtype == torch.bfloat16


def test_a_convolution_is_no_target_and_says_so():
    with pytest.raises(ValueError, match=r"CausalConv1d.* is not supported"):
        get_peft_model(HybridZooForCausalLM.wrap(zoo.build("mamba-tiny")), lora(target_modules=["conv1d"]))


def test_prompts_can_be_tuned_and_prefixes_cannot():
    ids = torch.randint(1, 256, (2, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sizes = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_attention_heads": 4}
    model = get_peft_model(HybridZooForCausalLM.wrap(zoo.build("jamba-tiny")), PromptTuningConfig(**sizes))
    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    model(**batch, labels=ids).loss.backward()
    assert prompt.grad.abs().sum(1).min() > 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    model.eval()
    batch["attention_mask"][0, :4] = 0
    got, want = (torch.stack(model.generate(**batch, use_cache=use, **options).scores) for use in (True, False))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(got[0], model(**batch).logits[:, -1], atol=1e-4, rtol=1e-4)
        assert (got[0] - model.get_base_model()(**batch).logits[:, -1]).abs().max() > 1e-2  # the prompt was read
    model = get_peft_model(HybridZooForCausalLM.wrap(zoo.build("jamba-tiny")), PrefixTuningConfig(**sizes))
    with pytest.raises(ValueError, match="no place for recurrent states"):
        model(**batch, labels=ids)

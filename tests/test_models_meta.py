"""Every shipped config on the meta device: parameter counts as published, and what ``zoo show`` says about it."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint.families import FAMILIES
from hybridzoo.zoo.checkpoint.fields import Fields
from hybridzoo.zoo.checkpoint.keys import View
from hybridzoo.zoo.checkpoint.writing import signature
from hybridzoo.zoo.config.shipped import NUMBERS
from hybridzoo.zoo.layout import from_jamba, from_megatron
from hybridzoo.zoo.models.causal_lm import CausalLM
from hybridzoo.zoo.models.stats import numbers, stats
from hybridzoo.zoo.registry import ConfigError

# published: the checkpoints of state-spaces (the counts follow from the shapes in their files) and of ai21labs
PUBLISHED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
    "mamba2attn-2.7b": 2_697_590_880,
    "mamba-2.8b-slimpj": 2_768_345_600,
    "zamba2-1.2b": 1_215_064_704,
    "zamba2-2.7b": 2_662_214_560,
    "zamba2-7b": 7_356_749_648,
    "jamba-mini": 51_570_323_328,
}
# ours: a change here is a change of the model
OURS = {
    "jamba-tiny": 160_228,
    "mamba-tiny": 161_184,
    "mamba2-tiny": 505_056,
    "mamba2attn-tiny": 572_640,
    "mambaformer-130m": 128_254_464,
    "mambaformer-tiny": 514_816,
    "nvidia-hybrid-8b": 8_654_517_248,
    "nvidia-hybrid-tiny": 870_266,
    "samba-421m": 421_793_280,
    "samba-tiny": 530_400,
    "transformer-1.4b": 1_373_947_904,
    "transformer-130m": 130_646_784,
    "transformer-2.8b": 2_760_808_960,
    "transformer-370m": 369_255_424,
    "transformer-790m": 799_249_920,
    "transformer-tiny": 160_488,
    "zamba2-tiny": 306_320,
}
# families whose published models are read and not shipped: what decides their shapes, as in their config.json (Bamba,
# granite-4.0-h-350m, Falcon-H1-0.5B), their model cards (the other Granites), or NVIDIA's Megatron-Bridge; the rest are defaults
GRANITE = {
    "vocab_size": 100352, "tie_word_embeddings": True, "num_local_experts": 0, "num_experts_per_tok": 0, "mamba_d_state": 128,
    "num_hidden_layers": 40, "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(40)],
}  # fmt: skip
FALCON = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "mamba_n_heads": 24}
READ = {
    "Bamba-9B": ("bamba", 9_780_235_392, {
        "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64, "hidden_size": 4096, "intermediate_size": 14336, "mamba_d_head": 64,
        "mamba_d_state": 128, "mamba_dt_rank": 256, "mamba_n_heads": 128, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "vocab_size": 128256}),
    "granite-4.0-h-350m": ("granitemoehybrid", 340_332_224, GRANITE | {
        "hidden_size": 768, "num_hidden_layers": 32, "num_attention_heads": 12, "num_key_value_heads": 4, "mamba_n_heads": 48,
        "shared_intermediate_size": 2048, "layer_types": ["attention" if i in (10, 13, 17, 27) else "mamba" for i in range(32)]}),
    "granite-4.0-h-micro": ("granitemoehybrid", 3_191_396_096, GRANITE | {
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "mamba_n_heads": 64, "shared_intermediate_size": 8192}),
    "granite-4.0-h-tiny": ("granitemoehybrid", 6_939_037_248, GRANITE | {
        "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 4, "mamba_n_heads": 48, "shared_intermediate_size": 1024,
        "num_local_experts": 64, "num_experts_per_tok": 6, "intermediate_size": 512}),
    "granite-4.0-h-small": ("granitemoehybrid", 32_207_337_984, GRANITE | {
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "mamba_n_heads": 128, "shared_intermediate_size": 1536,
        "num_local_experts": 72, "num_experts_per_tok": 10, "intermediate_size": 768}),
    "Nemotron-H-4B": ("nemotron_h", 4_489_223_040, {
        "hidden_size": 3072, "mamba_num_heads": 112, "intermediate_size": 12288,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"}),
    "Nemotron-H-8B": ("nemotron_h", 8_100_852_736, {
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"}),
    "Nemotron-H-47B": ("nemotron_h", 46_791_554_816, {
        "hidden_size": 8192, "mamba_num_heads": 256, "ssm_state_size": 256, "intermediate_size": 30720, "num_attention_heads": 64,
        "hybrid_override_pattern":
            "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"}),
    "NVIDIA-Nemotron-Nano-9B-v2": ("nemotron_h", 8_888_227_328, {
        "hidden_size": 4480, "mamba_head_dim": 80, "intermediate_size": 15680, "num_attention_heads": 40,
        "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"}),
    "NVIDIA-Nemotron-Nano-12B-v2": ("nemotron_h", 12_310_001_152, {
        "hidden_size": 5120, "mamba_head_dim": 80, "intermediate_size": 20480, "num_attention_heads": 40,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"}),
    "NVIDIA-Nemotron-3-Nano-30B-A3B": ("nemotron_h", 31_577_940_288, {
        "hidden_size": 2688, "num_key_value_heads": 2, "mamba_num_heads": 64, "intermediate_size": 1856, "n_routed_experts": 128,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"}),
    "Falcon-H1-0.5B": ("falcon_h1", 521_411_104, FALCON | {
        "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 36, "mamba_d_ssm": 1536, "mamba_d_head": 64,
        "mamba_d_state": 128, "vocab_size": 32784, "tie_word_embeddings": False}),
    "Falcon-H1-Tiny-90M": ("falcon_h1", 91_131_072, FALCON | {
        "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 24, "mamba_d_ssm": 768, "mamba_d_head": 32,
        "mamba_d_state": 64, "vocab_size": 32768, "tie_word_embeddings": True}),
}  # fmt: skip
COUNTS = {**PUBLISHED, **OURS}


@functools.cache
def shipped(name):
    return zoo.build(name, device="meta")


@functools.cache
def counted(name):
    return stats(shipped(name), 2048)


def test_the_sizes_that_list_prints_are_the_models():
    kept = json.loads(NUMBERS.read_text())
    assert sorted(kept) == zoo.list_models(), "run: zoo list --refresh"
    for name in kept:
        assert kept[name] == numbers(shipped(name)), f"{name} has changed; run: zoo list --refresh"


def test_every_shipped_config_is_counted_here():
    assert sorted(COUNTS) == zoo.list_models(task="causal_lm")


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_published(name):
    model = shipped(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_stats_add_up_to_the_model(name):
    model, s = shipped(name), counted(name)
    assert s.params == COUNTS[name]
    assert s.flops == model.flops(2048)
    assert s.state_bytes == model.init_state(1, 2048).nbytes
    assert [row.index for row in s.rows] == [None, *range(len(model.backbone.layers)), None, None]
    assert s.active_params <= s.params and all(row.active_params <= row.params for row in s.rows)
    assert s.layers == model.cfg.layers


def test_names_say_the_size():
    for name, count in COUNTS.items():
        size = name.rsplit("-", 1)[1]
        if size in ("tiny", "mini", "slimpj"):
            continue
        stated = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
        assert abs(count / stated - 1) < 0.09, name  # 8.65 B is called 8B


def test_the_three_demo_models_have_the_same_budget():
    counts = [COUNTS[f"{family}-tiny"] for family in ("mamba", "jamba", "transformer")]
    assert max(counts) / min(counts) < 1.02
    types = {mixer.type for mixer in shipped("jamba-tiny").cfg.mixers.values()}
    assert {"mamba", "attention", "moe"} <= types


@pytest.mark.parametrize("size", ["130m", "370m", "790m", "1.4b", "2.8b"])
def test_transformers_are_peers_of_the_mambas(size):
    assert abs(COUNTS[f"transformer-{size}"] / COUNTS[f"mamba-{size}"] - 1) < 0.02


def test_jamba_mini_has_the_published_active_parameters():
    assert counted("jamba-mini").active_params == 12_110_311_296  # "12B active"
    assert zoo.config("jamba-mini").layers == zoo.config("jamba-mini", [f"layers={from_jamba()}"]).layers


def test_jamba_mini_is_transformers_jamba():
    transformers = pytest.importorskip("transformers")
    config = transformers.JambaConfig()  # whose defaults are Jamba v0.1
    with torch.device("meta"):
        theirs = transformers.JambaForCausalLM(config)
    assert sum(p.numel() for p in theirs.parameters()) == COUNTS["jamba-mini"]


def read(family, config):
    fields = Fields(config, Path("config.json"))
    cfg = FAMILIES[family].read(fields)
    fields.done()
    return CausalLM(cfg, device="meta")


@pytest.mark.parametrize("name", READ)
def test_published_models_of_other_families_have_their_parameters(name):
    transformers = pytest.importorskip("transformers")
    family, count, config = READ[name]
    assert read(family, config).num_params() == count
    cls = getattr(transformers, FAMILIES[family].architecture)
    with torch.device("meta"):
        theirs = cls(cls.config_class(**config))
    theirs.tie_weights()
    # the correction of the experts' choice is stored like a weight, and theirs has it as a buffer
    stored = [b for key, b in theirs.named_buffers() if key.endswith("e_score_correction_bias")]
    assert sum(t.numel() for t in (*theirs.parameters(), *stored)) == count


# fields of published configs, beyond those that transformers' class writes today; none changes what is computed
BESIDES = {
    "mamba": {"d_model": 768, "d_inner": 1536, "n_layer": 32, "rms_norm": True, "fused_add_norm": True, "ssm_cfg": {}},
    "falcon_mamba": {"_name_or_path": "./", "torch_dtype": "bfloat16"},
    "mamba2": {"intermediate_size": 8192, "norm_before_gate": True, "rms_norm": True, "time_step_init_scheme": "random",
               "time_step_rank": 256, "time_step_scale": 1.0},
    "jamba": {"mamba_inner_layernorms": True, "n_ctx": 262144, "sliding_window": None, "calc_logits_for_entire_prompt": False},
    "bamba": {"attn_rotary_emb": 64, "mamba_dt_rank": 256, "num_logits_to_keep": 1, "rope_scaling": None},
    "granitemoehybrid": {"init_method": "mup", "logits_to_keep": 1, "normalization_function": "rmsnorm", "rope_scaling": None},
    "nemotron_h": {"expand": 2, "hidden_dropout": 0.0, "mamba_ssm_cache_dtype": "float32", "moe_shared_expert_overlap": False, "norm_eps": 1e-5,
                   "num_logits_to_keep": 1, "partial_rotary_factor": 1.0, "rope_theta": 10000, "sliding_window": None, "time_step_rank": 256},
    "zamba2": {"ffn_hidden_size": 10240, "kv_channels": 80, "num_logits_to_keep": 1, "num_query_groups": 32, "rope_theta": 10000,
               "sliding_window": None, "time_step_limit": None, "use_mem_eff_path": False},
    "falcon_h1": {"attn_layer_indices": None, "mamba_use_mlp": True, "mlp_expansion_factor": 8, "rope_scaling": None, "rope_theta": 1e11},
    "llama": {"pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0},
    "mixtral": {"rope_theta": 1e6, "sliding_window": None},
    "mistral": {"rope_theta": 10000.0, "sliding_window": 4096},
    "qwen2": {"max_window_layers": 28, "rope_theta": 1e6, "sliding_window": 131072, "use_mrope": False, "use_sliding_window": False},
    "qwen3": {"max_window_layers": 36, "rope_scaling": None, "rope_theta": 1e6, "sliding_window": None, "use_sliding_window": False},
    "qwen3_moe": {"decoder_sparse_step": 1, "max_window_layers": 48, "mlp_only_layers": [], "norm_topk_prob": True, "rope_scaling": None,
                  "rope_theta": 1e6, "sliding_window": None, "use_sliding_window": False},
    "phi3": {"embd_pdrop": 0.0, "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rope_scaling": None, "rope_theta": 10000.0,
             "sliding_window": 2047},
    "smollm3": {"max_window_layers": 28, "no_rope_layer_interval": 4, "pretraining_tp": 2, "rope_scaling": None, "rope_theta": 5e6,
                "sliding_window": None, "use_sliding_window": False},
    "granite": {"rope_scaling": None, "rope_theta": 1e7},
    "granitemoe": {"rope_scaling": None, "rope_theta": 10000},
}  # fmt: skip


def test_fields_of_published_configs_are_known():
    transformers = pytest.importorskip("transformers")
    assert set(BESIDES) == set(FAMILIES) - {"mamba_ssm"}
    for name, besides in BESIDES.items():
        cls = getattr(transformers, FAMILIES[name].architecture).config_class
        fields = Fields(cls().to_dict() | besides, Path(name))
        FAMILIES[name].read(fields)
        fields.done()


@pytest.mark.parametrize(
    ("name", "config", "at"),
    [
        ("zamba2-1.2b", {"hidden_size": 2048, "num_mem_blocks": 1, "mamba_d_state": 128, "use_mem_rope": True, "n_mamba_heads": 64,
                         "use_shared_attention_adapter": True, "num_hidden_layers": 38}, [5, 11, 17, 23, 29, 35]),
        ("zamba2-2.7b", {"num_mem_blocks": 2, "n_mamba_heads": 80, "num_hidden_layers": 54}, [6, 12, 18, 24, 30, 36, 42, 47, 51]),
        ("zamba2-7b", {"hidden_size": 3584, "num_mem_blocks": 2, "mamba_ngroups": 2, "use_mem_rope": True, "n_mamba_heads": 112,
                       "num_hidden_layers": 81}, [6, 11, *range(17, 78, 6)]),
    ],
)  # fmt: skip
def test_zamba2_is_what_the_published_config_says(name, config, at):
    kinds = ["hybrid" if i in at else "mamba" for i in range(config["num_hidden_layers"])]
    theirs = read("zamba2", config | {"layers_block_type": kinds, "time_step_limit": None})
    assert signature(View(shipped(name))) == signature(View(theirs))


def test_nvidia_hybrid_is_the_published_pattern():
    published = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
    tokens = [row.token for row in counted("nvidia-hybrid-8b").rows if row.index is not None]
    assert tokens == from_megatron(published)
    s = counted("nvidia-hybrid-8b")
    assert (s.attention_of_blocks, s.attention_of_mixers) == (4 / 56, 4 / 28)


def test_shared_blocks_are_counted_once_and_work_every_time():
    overrides = ["layers=attention@a mlp attention@a mlp", "d_model=32"]
    shared = stats(zoo.config("transformer-tiny", overrides), 64)
    apart = stats(zoo.config("transformer-tiny", ["layers=(attention mlp) * 2", "d_model=32"]), 64)
    attention = apart.rows[1].params
    assert [row.params for row in shared.rows[1:5]] == [attention, apart.rows[2].params, 0, apart.rows[2].params]
    assert shared.params == apart.params - attention
    assert (shared.flops, shared.state_bytes) == (apart.flops, apart.state_bytes)
    assert shared.params == sum(p.numel() for p in zoo.build("transformer-tiny", overrides).parameters())


def test_parallel_and_expert_blocks_are_counted_by_branch():
    base = {
        "vocab_size": 8,
        "d_model": 16,
        "mixers": {"mamba": {}, "moe": {"d_intermediate": 8, "num_experts": 4, "top_k": 1, "gated": False}},
    }
    both = stats({**base, "layers": "mamba + moe"}, 8)
    apart = stats({**base, "layers": "mamba moe"}, 8)
    norm = 16
    assert both.params == apart.params - norm
    assert both.params - both.active_params == 3 * 2 * 8 * 16  # three of four experts rest
    assert (both.flops, both.state_bytes) == (apart.flops, apart.state_bytes)


def test_longer_sequences_cost_attention_more_and_mamba_the_same():
    short, long = stats(shipped("jamba-tiny"), 64), stats(shipped("jamba-tiny"), 128)
    for a, b in zip(short.rows, long.rows, strict=True):
        grows = a.token == "attention"
        assert (b.flops > a.flops) == grows and (b.state_bytes > a.state_bytes) == grows


def test_half_precision_halves_the_attention_state():
    full, half = stats("transformer-tiny", 64), stats("transformer-tiny", 64, torch.bfloat16)
    assert half.params == full.params and half.state_bytes < 0.6 * full.state_bytes


def test_stats_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="seq_len: is 0"):
        stats("mamba-tiny", 0)
    with pytest.raises(ConfigError, match="unknown model"):
        stats("mamba-tinny")


def test_building_on_meta_does_not_import_the_compiler():
    # arithmetic on meta tensors can pull in torch._dynamo and sympy, which takes longer than all of `zoo show`
    code = (
        "import sys, hybridzoo; hybridzoo.build('jamba-tiny', device='meta'); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0

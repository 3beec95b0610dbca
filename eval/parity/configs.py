"""Small configs of every family that make its specials matter: odd head counts, groups, biases, tied and untied heads, limits.

``zoo bench parity`` and the tests build transformers' own class from each. And the models of each family that are published.
"""

from typing import Any

__all__ = ["CONFIGS", "PUBLISHED", "VOCAB", "ZAMBA2", "config_of"]

VOCAB = 61
MAMBA = {"hidden_size": 36, "state_size": 5, "num_hidden_layers": 3, "vocab_size": VOCAB}
MAMBA2 = {
    "hidden_size": 24,
    "state_size": 6,
    "num_hidden_layers": 3,
    "num_heads": 6,
    "head_dim": 8,
    "n_groups": 3,
    "chunk_size": 16,
}
HEADS = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
JAMBA = HEADS | {
    "num_hidden_layers": 4,
    "num_experts": 4,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_d_state": 5,
}
SSM = {"mamba_n_heads": 6, "mamba_n_groups": 3, "mamba_d_state": 5, "mamba_chunk_size": 16}
FACTORS = {"embedding_multiplier": 3.0, "logits_scaling": 6.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2}
GRANITE = HEADS | SSM | FACTORS | {
    "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 20, "num_local_experts": 4, "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN3_MOE = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
FALCON_H1 = HEADS | SSM | {
    "mamba_d_ssm": 36, "embedding_multiplier": 2.5, "lm_head_multiplier": 0.4, "key_multiplier": 0.7, "attention_in_multiplier": 1.5,
    "attention_out_multiplier": 0.8, "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.6, "mlp_multipliers": [0.9, 0.5],
    "ssm_multipliers": [0.5, 1.5, 0.8, 1.2, 0.7],
}  # fmt: skip
NEMOTRON = {
    "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 40, "ssm_state_size": 6,
    "layers_block_type": ["mamba", "mlp", "attention", "moe", "mamba", "attention"],
    "mamba_num_heads": 6, "mamba_head_dim": 10, "n_groups": 3, "chunk_size": 16, "n_routed_experts": 6,
    "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 28,
}  # fmt: skip
ZAMBA2 = {
    "hidden_size": 24, "intermediate_size": 40, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba"],
    "num_hidden_layers": 6, "num_mem_blocks": 2, "num_attention_heads": 3, "mamba_d_state": 6, "n_mamba_heads": 6, "mamba_ngroups": 3,
    "chunk_size": 16, "adapter_rank": 4, "use_shared_attention_adapter": True, "use_mem_rope": True,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "zamba2": ("Zamba2", ZAMBA2),
    "zamba2-one-block-biases-limits": (
        "Zamba2",
        ZAMBA2
        | {
            "num_mem_blocks": 1,
            "num_key_value_heads": 1,
            "use_shared_attention_adapter": False,
            "use_mem_rope": False,
            "add_bias_linear": True,
            "mamba_ngroups": 1,
            "hidden_act": "silu",
            "time_step_min": 0.05,
        },
    ),
    "nemotron_h": ("NemotronH", NEMOTRON),
    "nemotron_h-latent": (
        "NemotronH",
        NEMOTRON | {"moe_latent_size": 16, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
    ),
    # transformers' class does not tie, whatever its config says
    "nemotron_h-biases-groups": (
        "NemotronH",
        NEMOTRON
        | {
            "use_bias": True,
            "mlp_bias": True,
            "use_conv_bias": False,
            "tie_word_embeddings": True,
            "n_group": 3,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.5,
            "num_experts_per_tok": 3,
            "n_groups": 1,
            "layers_block_type": ["moe", "mamba", "moe", "attention"],
        },
    ),
    "falcon_h1": ("FalconH1", FALCON_H1),
    "falcon_h1-norm-biases-tied": (
        "FalconH1",
        FALCON_H1
        | {
            "mamba_d_ssm": None,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_conv_bias": False,
            "tie_word_embeddings": True,
            "head_dim": 10,
            "mamba_n_groups": 2,
        },
    ),
    "falcon_h1-gate-first": (
        "FalconH1",
        FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "ssm_multipliers": None},
    ),
    "bamba": ("Bamba", HEADS | SSM | {"attn_layer_indices": [1]}),
    "bamba-biases-tied-limits": (
        "Bamba",
        HEADS
        | SSM
        | {
            "num_hidden_layers": 4,
            "attn_layer_indices": [0, 3],
            "hidden_size": 48,
            "mamba_n_groups": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "tie_word_embeddings": True,
            "time_step_limit": (0.02, 0.1),
        },
    ),
    "granite": ("GraniteMoeHybrid", GRANITE),
    "granite-dense-rope-tied": (
        "GraniteMoeHybrid",
        GRANITE
        | {
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "attention_bias": True,
            "mamba_proj_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama": ("Llama", HEADS),
    "llama-biases-tied": (
        "Llama",
        HEADS
        | {
            "num_key_value_heads": 3,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        },
    ),
    "llama-stretched": (
        "Llama",
        HEADS
        | {
            "hidden_size": 48,
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": ("Mistral", HEADS | {"sliding_window": None}),
    "mistral-window": ("Mistral", HEADS | {"sliding_window": 6, "head_dim": 10, "num_key_value_heads": 3}),
    "qwen2": ("Qwen2", HEADS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-windows-tied": (
        "Qwen2",
        HEADS | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", HEADS | {"head_dim": 10, "rms_norm_eps": 1e-3}),
    "qwen3-windows-biases-tied": (
        "Qwen3",
        HEADS
        | {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", HEADS | QWEN3_MOE),
    "qwen3_moe-some-dense-normalised": (
        "Qwen3Moe",
        HEADS
        | QWEN3_MOE
        | {
            "num_hidden_layers": 4,
            "head_dim": 10,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("SmolLM3", HEADS | {"no_rope_layer_interval": 2}),
    "smollm3-windows-untied": (
        "SmolLM3",
        HEADS
        | {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("Phi3", HEADS),
    "phi3-window-partial-rotary-tied": (
        "Phi3",
        HEADS
        | {
            "sliding_window": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
        },
    ),
    "granite-3": ("Granite", HEADS | FACTORS),
    "granite-3-biases-tied": (
        "Granite",
        HEADS | FACTORS | {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "tie_word_embeddings": True},
    ),
    "granitemoe": ("GraniteMoe", HEADS | FACTORS | {"num_local_experts": 5, "num_experts_per_tok": 3}),
    "granitemoe-biases-tied": (
        "GraniteMoe",
        HEADS | FACTORS | {"num_local_experts": 2, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mixtral": ("Mixtral", HEADS | {"num_local_experts": 5, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.0}),
    "mixtral-window": (
        "Mixtral",
        HEADS | {"num_local_experts": 2, "sliding_window": 7, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "jamba": ("Jamba", JAMBA),
    "jamba-dense-biases-tied": (
        "Jamba",
        JAMBA
        | {
            "num_experts": 1,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_dt_rank": 3,
            "tie_word_embeddings": True,
        },
    ),
    "mamba": ("Mamba", MAMBA | {"time_step_rank": 7}),
    "mamba-biases-untied": (
        "Mamba",
        MAMBA | {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 1, "tie_word_embeddings": False},
    ),
    "falcon_mamba": ("FalconMamba", MAMBA | {"mixer_rms_eps": 1e-3}),
    "falcon_mamba-as-published": (
        "FalconMamba",
        MAMBA | {"expand": 16, "intermediate_size": 72, "tie_word_embeddings": False},
    ),
    "mamba2": ("Mamba2", MAMBA2),
    "mamba2-biases-tied": (
        "Mamba2",
        MAMBA2
        | {
            "use_bias": True,
            "use_conv_bias": False,
            "n_groups": 1,
            "tie_word_embeddings": True,
            "time_step_limit": (0.02, 0.1),
        },
    ),
}


# published models of each family, and their sizes
PUBLISHED = {
    "mamba": "state-spaces/mamba-{130m, 370m, 790m, 1.4b, 2.8b}-hf",
    "falcon_mamba": "tiiuae/falcon-mamba-7b, -instruct",
    "mamba2": "mistralai/Mamba-Codestral-7B-v0.1",
    "jamba": "ai21labs/Jamba-v0.1 (52B), 1.5 to 1.7 Mini (52B) and Large (398B), Reasoning-3B, Jamba2",
    "bamba": "ibm-ai-platform/Bamba-9B, -v2",
    "granitemoehybrid": "ibm-granite/granite-4.0-h-{350m, 1b, micro (3B), tiny (7B), small (32B)}",
    "nemotron_h": "nvidia Nemotron-H-{4B, 8B, 47B, 56B}, Nano-{9B, 12B}-v2, Nemotron-3-{Nano-4B, Nano-30B-A3B, Super-120B-A12B}",
    "zamba2": "Zyphra/Zamba2-{1.2B, 2.7B, 7B}",
    "falcon_h1": "tiiuae/Falcon-H1-{0.5B, 1.5B, 1.5B-Deep, 3B, 7B, 34B}, Tiny-90M",
    "llama": "Llama 2, 3, 3.1 and what has their form",
    "mistral": "mistralai/Mistral-7B, and what has its form",
    "mixtral": "mistralai/Mixtral-8x{7B, 22B}",
    "qwen2": "Qwen/Qwen2-*, Qwen2.5-* (text)",
    "qwen3": "Qwen/Qwen3-{0.6B, 1.7B, 4B, 8B, 14B, 32B}",
    "qwen3_moe": "Qwen/Qwen3-{30B-A3B, 235B-A22B}, Qwen3-Coder",
    "phi3": "microsoft/Phi-3-{mini, medium}-4k, phi-4 (no longrope)",
    "smollm3": "HuggingFaceTB/SmolLM3-3B",
    "granite": "ibm-granite/granite-{3.0 to 3.3}-{2b, 8b}",
    "granitemoe": "ibm-granite/granite-3.*-{1b-a400m, 3b-a800m}",
}


def config_of(name: str) -> Any:
    """Return transformers' config of an entry of :data:`CONFIGS`."""
    import transformers

    kind, options = CONFIGS[name]
    return getattr(transformers, f"{kind}Config")(**({"vocab_size": VOCAB, "pad_token_id": 0} | options))

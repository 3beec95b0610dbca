"""transformers' ``nemotron_h`` (NVIDIA Nemotron-H, Nano v2, Nemotron 3): one mixer per layer, by a pattern such as ``M-M*ME``.

MLPs and experts are not gated, and square their ReLU. Experts are chosen by sigmoid scores with a correction, beside one MLP for all
tokens. Attention has no positions. Two oddities of transformers' class, which are followed here: it limits step sizes to at least
``time_step_min``, whatever ``time_step_limit`` says (NVIDIA's own code has the latter, and no limit in the published files), and it never
ties the head.
"""

from collections.abc import Iterator
from typing import Any

from ..family import Family
from ..fields import Fields, lowest, used, written, written_lowest
from ..keys import Part, Piece, View, attention, same

__all__ = ["NemotronH"]

_TOKENS = {"mamba2": "linear_attention", "attention": "full_attention", "mlp": "mlp", "moe+mlp": "moe"}
_KINDS = {
    "linear_attention": "mamba2", "mamba": "mamba2", "M": "mamba2", "full_attention": "attention", "attention": "attention",
    "*": "attention", "mlp": "mlp", "-": "mlp", "moe": "moe + shared", "E": "moe + shared",
}  # fmt: skip

_NO_EFFECT = (
    "hybrid_override_pattern num_hidden_layers expand mamba_expand mamba_ssm_cache_dtype moe_shared_expert_overlap n_shared_experts "
    "mtp_layers_block_type mtp_hybrid_override_pattern num_nextn_predict_layers residual_in_fp32 mamba_proj_bias "
    "tie_word_embeddings time_step_rank rope_theta partial_rotary_factor norm_eps"
).split()
_MAMBA2 = {
    "d_state": ("ssm_state_size", 128), "d_conv": ("conv_kernel", 4, "mamba_d_conv"), "headdim": ("mamba_head_dim", 64),
    "ngroups": ("n_groups", 8, "mamba_n_groups"), "bias": ("use_bias", False), "conv_bias": ("use_conv_bias", True, "mamba_conv_bias"),
    "chunk_size": ("chunk_size", 128, "mamba_chunk_size"), "dt_min": ("time_step_min", 0.001, "mamba_dt_min"),
    "dt_max": ("time_step_max", 0.1, "mamba_dt_max"), "dt_init_floor": ("time_step_floor", 1e-4, "mamba_dt_init_floor"),
}  # fmt: skip
_ATTENTION = {
    "nheads": ("num_attention_heads", 32), "nheads_kv": ("num_key_value_heads", 8), "headdim": ("head_dim", 128, "attention_head_dim"),
}  # fmt: skip
_MOE = {
    "d_intermediate": ("moe_intermediate_size", 7688), "num_experts": ("n_routed_experts", 8, "num_local_experts"),
    "top_k": ("num_experts_per_tok", 2), "renormalize": ("norm_topk_prob", True), "routed_scale": ("routed_scaling_factor", 1.0),
    "d_latent": ("moe_latent_size", None), "num_groups": ("n_group", 1), "top_groups": ("topk_group", 1),
}  # fmt: skip


class NemotronH(Family):
    model_type = "nemotron_h"
    architecture = "NemotronHForCausalLM"
    ignored = r"mtp\..*|.*\.mtp\..*"  # layers for speculative decoding, which nobody loads

    def read(self, fields: Fields) -> dict[str, Any]:
        take, eps = fields.take, fields.take("layer_norm_epsilon", 1e-5, "rms_norm_eps")
        layers = fields.kinds(_KINDS, list("ME*-"), "layers_block_type", "layer_types", "hybrid_override_pattern")
        fields.skip(*_NO_EFFECT)
        fields.expect("mlp_hidden_act", "relu2")
        fields.expect("mamba_hidden_act", "silu")
        fields.expect("attention_bias", False)
        fields.expect("sliding_window", None)
        limit = "mamba_dt_limit" if "mamba_dt_limit" in fields.data else "time_step_limit"
        fields.skip("time_step_limit")
        plain = {"activation": "relu2", "gated": False}
        mlp = {"type": "mlp", "bias": take("mlp_bias", False), **plain}
        mamba2, moe = fields.options(_MAMBA2), fields.options(_MOE)
        mixers = {
            "mamba2": {
                "type": "mamba2", "norm_eps": eps, "d_inner": take("mamba_num_heads", 128) * mamba2["headdim"],
                "dt_limit": lowest(fields, mamba2["dt_min"], limit), **mamba2,
            },
            "attention": {"type": "attention", "rope": None, **fields.options(_ATTENTION)},
            "mlp": mlp | {"d_intermediate": take("intermediate_size", 21504)},
            "shared": mlp | {"d_intermediate": take("moe_shared_expert_intermediate_size", 7688)},
            "moe": {"type": "moe", "router": "sigmoid", "aux_loss_coef": 0.0, **plain, **moe},
        }  # fmt: skip
        if mlp["bias"] and moe["d_latent"]:
            raise fields.error("mlp_bias with moe_latent_size cannot be computed by this version.")
        return {
            "vocab_size": take("vocab_size", 131072), "d_model": take("hidden_size", 4096), "layers": layers,
            "norm": {"type": "rmsnorm", "eps": eps}, "mixers": used(mixers, layers),
            "residual_in_fp32": False, "tie_embeddings": False, "max_length": take("max_position_embeddings", 4096),
        }  # fmt: skip

    def write(self, view: View) -> dict[str, Any]:
        m, cfg = view.whole("mamba2"), view.cfg
        config = written(m, _MAMBA2) | written(view.first("attention"), _ATTENTION) | written(view.first("moe"), _MOE) | {
            "vocab_size": view.shapes["backbone.embedding.weight"][0], "hidden_size": cfg.d_model, "layer_norm_epsilon": cfg.norm.eps,
            "tie_word_embeddings": False, "max_position_embeddings": cfg.max_length,
            "layers_block_type": [_TOKENS[token] for token in view.layout],
        }  # fmt: skip
        if m:
            config |= {"mamba_num_heads": m["d_inner"] // m["headdim"]} | written_lowest(m["dt_limit"])
        for *experts, mlp in (block for block in view.blocks if block[-1].type == "mlp"):
            name = "moe_shared_expert_intermediate_size" if experts else "intermediate_size"
            config |= {name: mlp["d_intermediate"], "mlp_bias": mlp["bias"]}
        return config

    def keys(self, view: View) -> Iterator[Piece]:
        """``backbone`` on disk, ``model`` in memory."""
        root = "model" if "model.norm_f.weight" in view.stored else "backbone"
        yield from view.frame(f"{root}.embeddings.weight", f"{root}.norm_f")
        for i, block in enumerate(view.blocks):
            layer = f"{root}.layers.{i}"
            yield from view.norm(i, f"{layer}.norm")
            for part in block:
                beside = ".shared_experts" if part.type == "mlp" and len(block) > 1 else ""
                yield from self._mixer(view, part, f"{layer}.mixer{beside}")

    def _mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        if part.type == "attention":
            yield from attention(view, part, theirs)
        elif part.type == "mlp":
            yield from same(view, f"{part.key}.fc1", f"{theirs}.up_proj")
            yield from same(view, f"{part.key}.fc2", f"{theirs}.down_proj")
        elif part.type == "mamba2":
            yield from same(view, part.key, theirs)
        else:
            yield Piece(f"{part.key}.correction", f"{theirs}.gate.e_score_correction_bias")
            yield Piece(f"{part.key}.router.weight", f"{theirs}.gate.weight")
            yield from same(view, f"{part.key}.latent_in", f"{theirs}.fc1_latent_proj")
            yield from same(view, f"{part.key}.latent_out", f"{theirs}.fc2_latent_proj")
            fused = f"{theirs}.experts.up_proj" in view.stored
            for ours, name in (("w1", "up_proj"), ("w2", "down_proj")):
                if fused:
                    yield Piece(f"{part.key}.experts.{ours}", f"{theirs}.experts.{name}")
                for e in () if fused else range(part["num_experts"]):
                    yield Piece(f"{part.key}.experts.{ours}", f"{theirs}.experts.{e}.{name}.weight", (e,))

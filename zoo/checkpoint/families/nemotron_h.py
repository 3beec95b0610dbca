"""transformers' ``nemotron_h`` (NVIDIA Nemotron-H, Nano v2, Nemotron 3): one mixer per layer, by a pattern such as ``M-M*ME``.

MLPs and experts are not gated, and square their ReLU. Experts are chosen by sigmoid scores with a correction, beside one MLP for all
tokens. Attention has no positions. Two oddities of transformers' class: it limits step sizes by ``time_step_min`` and not by the limits in
the config, which are the ones kept here, and it never ties the head.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ..family import Family, Fields, register
from ..files import CheckpointError
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
    "tie_word_embeddings time_step_rank"
).split()


@register
class NemotronH(Family):
    """The converter of ``nemotron_h``."""

    model_type = "nemotron_h"
    architecture = "NemotronHForCausalLM"
    ignored = r"mtp\..*|.*\.mtp\..*"  # layers for speculative decoding, which nobody loads

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take, d_model, eps = (
            fields.take,
            fields.take("hidden_size", 4096),
            fields.take("layer_norm_epsilon", 1e-5, "rms_norm_eps"),
        )
        kinds = (
            take("layers_block_type", [], "layer_types")
            or list(take("hybrid_override_pattern", ""))
            or ["M", "E", "*", "-"]
        )
        layers = [_KINDS[kind] for kind in kinds]
        fields.skip(*_NO_EFFECT)
        for name, value in (
            ("mlp_hidden_act", "relu2"),
            ("mamba_hidden_act", "silu"),
            ("attention_bias", False),
        ):
            fields.expect(name, value)
        fields.expect("sliding_window", None)
        bias, mlp_bias = take("use_bias", False), take("mlp_bias", False)
        heads, size = take("mamba_num_heads", 128), take("mamba_head_dim", 64)
        limit = "mamba_dt_limit" if "mamba_dt_limit" in fields.data else "time_step_limit"
        plain = {"activation": "relu2", "gated": False}
        mixers = {
            "mamba2": {
                "type": "mamba2", "d_state": take("ssm_state_size", 128), "d_conv": take("conv_kernel", 4, "mamba_d_conv"), "norm_eps": eps,
                "headdim": size, "d_inner": heads * size, "ngroups": take("n_groups", 8, "mamba_n_groups"), "bias": bias,
                "dt_min": take("time_step_min", 0.001, "mamba_dt_min"), "dt_max": take("time_step_max", 0.1, "mamba_dt_max"),
                "dt_init_floor": take("time_step_floor", 1e-4, "mamba_dt_init_floor"),
                "dt_limit": fields.floats(limit, (0.0, float("inf"))),
                "conv_bias": take("use_conv_bias", True, "mamba_conv_bias"), "chunk_size": take("chunk_size", 128, "mamba_chunk_size"),
            },
            "attention": {
                "type": "attention", "nheads": take("num_attention_heads", 32), "nheads_kv": take("num_key_value_heads", 8),
                "headdim": take("head_dim", 128, "attention_head_dim"), "rope": None,
            },
            "mlp": {"type": "mlp", "d_intermediate": take("intermediate_size", 21504), "bias": mlp_bias, **plain},
            "shared": {"type": "mlp", "d_intermediate": take("moe_shared_expert_intermediate_size", 7688), "bias": mlp_bias, **plain},
            "moe": {
                "type": "moe", "d_intermediate": take("moe_intermediate_size", 7688), "router": "sigmoid", "aux_loss_coef": 0.0, **plain,
                "num_experts": take("n_routed_experts", 8, "num_local_experts"), "top_k": take("num_experts_per_tok", 2),
                "renormalize": take("norm_topk_prob", True), "routed_scale": take("routed_scaling_factor", 1.0),
                "d_latent": take("moe_latent_size", None), "num_groups": take("n_group", 1), "top_groups": take("topk_group", 1),
            },
        }  # fmt: skip
        if mlp_bias and mixers["moe"]["d_latent"]:
            raise CheckpointError(f"{fields.file}: mlp_bias with moe_latent_size cannot be computed by this version.")
        used = " ".join(layers).split()
        return {
            "vocab_size": take("vocab_size", 131072), "d_model": d_model, "layers": layers, "norm": {"type": "rmsnorm", "eps": eps},
            "mixers": {name: spec for name, spec in mixers.items() if name in used}, "residual_in_fp32": False,
            "tie_embeddings": False, "max_length": take("max_position_embeddings", 4096),
        }  # fmt: skip

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        m, a, moe, cfg = view.first("mamba2"), view.first("attention"), view.first("moe"), view.cfg
        alone: Mapping[str, Any] = {}
        beside: Mapping[str, Any] = {}
        for block in view.blocks:
            if block[-1].type == "mlp":
                alone, beside = (block[0].options, beside) if len(block) == 1 else (alone, block[1].options)
        steps = view.training("mamba2")
        config = {
            "vocab_size": view.shapes["backbone.embedding.weight"][0], "hidden_size": cfg.d_model, "layer_norm_epsilon": cfg.norm.eps,
            "tie_word_embeddings": False, "max_position_embeddings": cfg.max_length,
            "layers_block_type": [_TOKENS[token] for token in view.layout],
            "mlp_bias": (alone or beside).get("bias", False), "intermediate_size": alone.get("d_intermediate"),
            "moe_shared_expert_intermediate_size": beside.get("d_intermediate"), "ssm_state_size": m.get("d_state"),
            "mamba_num_heads": m["d_inner"] // m["headdim"] if m else None,
            "mamba_head_dim": m.get("headdim"), "n_groups": m.get("ngroups"),
            "conv_kernel": m.get("d_conv"), "use_bias": m.get("bias"),
            "use_conv_bias": m.get("conv_bias"), "time_step_limit": m.get("dt_limit"),
            "time_step_min": steps.get("dt_min"), "time_step_max": steps.get("dt_max"), "time_step_floor": steps.get("dt_init_floor"),
            "num_attention_heads": a.get("nheads"), "num_key_value_heads": a.get("nheads_kv"), "head_dim": a.get("headdim"),
            "moe_intermediate_size": moe.get("d_intermediate"), "n_routed_experts": moe.get("num_experts"),
            "num_experts_per_tok": moe.get("top_k"), "norm_topk_prob": moe.get("renormalize"), "n_group": moe.get("num_groups"),
            "moe_latent_size": moe.get("d_latent"),
            "topk_group": moe.get("top_groups"), "routed_scaling_factor": moe.get("routed_scale"),
        }  # fmt: skip
        return {key: value for key, value in config.items() if value is not None}

    def keys(self, view: View) -> Iterator[Piece]:
        """``backbone`` on disk, ``model`` in memory."""
        root = "model" if "model.norm_f.weight" in view.stored else "backbone"
        yield from view.frame(f"{root}.embeddings.weight", f"{root}.norm_f")
        for i, block in enumerate(view.blocks):
            layer = f"{root}.layers.{i}"
            yield from view.norm(i, f"{layer}.norm")
            for part in block:
                yield from self._mixer(
                    view, part, f"{layer}.mixer" + (".shared_experts" if part.type == "mlp" and len(block) > 1 else "")
                )

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

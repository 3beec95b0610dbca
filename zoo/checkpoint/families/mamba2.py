"""transformers' ``mamba2`` (mistralai/Mamba-Codestral-7B-v0.1): one Mamba-2 block per layer, our key names but for the embedding's."""

from collections.abc import Iterator
from typing import Any

from ..family import Family, Fields, register
from ..files import CheckpointError
from ..keys import Piece, View, same

__all__ = ["Mamba2"]


@register
class Mamba2(Family):
    """The converter of ``mamba2``."""

    model_type = "mamba2"
    architecture = "Mamba2ForCausalLM"

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take = fields.take
        d_model, expand = take("hidden_size", 4096), take("expand", 2)
        heads, eps = take("num_heads", 128), take("layer_norm_epsilon", 1e-5)
        mamba2 = {
            "type": "mamba2", "d_state": take("state_size", 128), "d_conv": take("conv_kernel", 4), "expand": expand,
            "headdim": take("head_dim", 64), "ngroups": take("n_groups", 8), "norm_eps": eps,
            "dt_min": take("time_step_min", 0.001), "dt_max": take("time_step_max", 0.1), "dt_init_floor": take("time_step_floor", 1e-4),
            "dt_limit": fields.floats("time_step_limit", (0.0, float("inf"))), "chunk_size": take("chunk_size", 256),
            "bias": take("use_bias", False), "conv_bias": take("use_conv_bias", True),
        }  # fmt: skip
        fields.skip("time_step_rank", "time_step_scale", "norm_before_gate", "rms_norm", "intermediate_size")
        fields.expect("hidden_act", "silu")
        fields.expect("rms_norm", True)
        if heads * mamba2["headdim"] != expand * d_model:
            raise CheckpointError(
                f"{fields.file}: num_heads * head_dim = {heads * mamba2['headdim']} differs from expand * hidden_size = {expand * d_model}."
            )
        return {
            "vocab_size": take("vocab_size", 32768), "d_model": d_model, "layers": ["mamba2"] * take("num_hidden_layers", 64),
            "mixers": {"mamba2": mamba2}, "norm": {"type": "rmsnorm", "eps": eps},
            "residual_in_fp32": take("residual_in_fp32", True), "tie_embeddings": take("tie_word_embeddings", False),
        }  # fmt: skip

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        mamba2, cfg = view.first("mamba2"), view.cfg
        return {
            "vocab_size": view.shapes["backbone.embedding.weight"][0], "hidden_size": cfg.d_model, "num_hidden_layers": len(view.blocks),
            "state_size": mamba2["d_state"], "conv_kernel": mamba2["d_conv"], "expand": mamba2["d_inner"] // cfg.d_model,
            "num_heads": mamba2["d_ssm"] // mamba2["headdim"], "head_dim": mamba2["headdim"], "n_groups": mamba2["ngroups"],
            "time_step_limit": mamba2["dt_limit"], "use_bias": mamba2["bias"], "use_conv_bias": mamba2["conv_bias"],
            "layer_norm_epsilon": cfg.norm.eps, "residual_in_fp32": cfg.residual_in_fp32, "tie_word_embeddings": cfg.tie_embeddings,
        }  # fmt: skip

    def keys(self, view: View) -> Iterator[Piece]:
        """Ours, under ``embeddings``."""
        yield from view.frame("backbone.embeddings.weight", "backbone.norm_f")
        for i in range(len(view.blocks)):
            yield from same(view, f"backbone.layers.{i}", f"backbone.layers.{i}")

"""transformers' ``falcon_h1`` (tiiuae/Falcon-H1-*): Mamba-2 and attention side by side on one input, then an MLP, in every layer.

muP's factors stand everywhere: on embeddings and logits, in front of and behind both mixers, on z, x, B, C, dt and the keys, and in the
MLP. The published models have no norm in the Mamba-2 mixer, only the gate.
"""

from typing import Any

from ..family import Fields, register
from ..files import CheckpointError
from ..keys import View
from ..rotary import rotary, written_rotary
from .decoder import Decoder

__all__ = ["FalconH1"]


@register
class FalconH1(Decoder):
    """The converter of ``falcon_h1``."""

    model_type = "falcon_h1"
    architecture = "FalconH1ForCausalLM"
    ignored = r".*\.(rotary_emb\.inv_freq|mup_vector)"

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take, n, bias = fields.take, fields.take("num_hidden_layers", 32), fields.take("attention_bias", False)
        fields.skip("layer_types", "layers_block_type", "attn_layer_indices", "mamba_use_mlp", "mlp_expansion_factor")
        cfg = self.trunk(fields, ["mamba2 + attention", "mlp"] * n, vocab=128000, d_model=4096, eps=1e-5, length=8192)
        inner = fields.nullable("mamba_d_ssm", 1024)
        mamba2 = self.ssm(fields, cfg["d_model"], cfg["norm"]["eps"], inner) | {
            "rmsnorm": take("mamba_rms_norm", False), "norm_before_gate": take("mamba_norm_before_gate", True),
            "in_multiplier": take("ssm_in_multiplier", 1.0), "out_multiplier": take("ssm_out_multiplier", 1.0),
            "multipliers": fields.floats("ssm_multipliers", (1.0,) * 5),
        }  # fmt: skip
        if take("projectors_bias", False) != mamba2["bias"]:
            raise CheckpointError(
                f"{fields.file}: projectors_bias and mamba_proj_bias differ; only equal ones can be computed by this version."
            )
        heads = self.heads(fields, cfg["d_model"], 32, 8)
        attention = heads | rotary(fields, heads["headdim"], length=8192) | {
            "qkv_bias": bias, "out_bias": bias, "key_multiplier": take("key_multiplier", 1.0),
            "in_multiplier": take("attention_in_multiplier", 1.0), "out_multiplier": take("attention_out_multiplier", 1.0),
        }  # fmt: skip
        gate, down = fields.floats("mlp_multipliers", (1.0, 1.0))
        mlp = {
            "type": "mlp", "d_intermediate": take("intermediate_size", 14336), "bias": take("mlp_bias", False),
            "gate_multiplier": gate, "out_multiplier": down,
        }  # fmt: skip
        return cfg | {
            "mixers": {"mamba2": mamba2, "attention": attention, "mlp": mlp},
            "embedding_multiplier": take("embedding_multiplier", 1.0), "logits_multiplier": take("lm_head_multiplier", 1.0),
        }  # fmt: skip

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        m, a, mlp, cfg = view.first("mamba2"), view.first("attention"), view.first("mlp"), view.cfg
        ssm = self.written_ssm(view)
        del ssm["mamba_expand"]  # the width is said outright, and may be less than the model's
        return self.written_trunk(view) | self.written_heads(view) | ssm | written_rotary(a) | {
            "mamba_d_ssm": m["d_ssm"], "mamba_rms_norm": m["rmsnorm"], "mamba_norm_before_gate": bool(m["norm_before_gate"]),
            "ssm_in_multiplier": m["in_multiplier"], "ssm_multipliers": m["multipliers"], "ssm_out_multiplier": m["out_multiplier"],
            "projectors_bias": m["bias"],
            "attention_in_multiplier": a["in_multiplier"], "key_multiplier": a["key_multiplier"],
            "attention_out_multiplier": a["out_multiplier"], "attention_bias": a["qkv_bias"], "mlp_bias": mlp["bias"],
            "intermediate_size": mlp["d_intermediate"], "mlp_multipliers": [mlp["gate_multiplier"], mlp["out_multiplier"]],
            "embedding_multiplier": cfg.embedding_multiplier, "lm_head_multiplier": cfg.logits_multiplier,
        }  # fmt: skip

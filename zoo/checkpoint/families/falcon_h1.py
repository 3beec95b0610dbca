"""transformers' ``falcon_h1`` (tiiuae/Falcon-H1-*): Mamba-2 and attention side by side on one input, then an MLP, in every layer.

muP's factors stand everywhere: on embeddings and logits, in front of and behind both mixers, on z, x, B, C, dt and the keys, and in the
MLP. The published models have no norm in the Mamba-2 mixer, only the gate.
"""

from typing import Any

from ..fields import Fields, Table, written
from ..keys import View
from .decoder import BIASES, SSM, Decoder, Defaults

__all__ = ["FalconH1"]

_FACTORS: Table = {
    "embedding_multiplier": ("embedding_multiplier", 1.0),
    "logits_multiplier": ("lm_head_multiplier", 1.0),
}


class FalconH1(Decoder):
    model_type = "falcon_h1"
    architecture = "FalconH1ForCausalLM"
    ignored = r".*\.(rotary_emb\.inv_freq|mup_vector)"
    defaults = Defaults(vocab_size=128000, nheads_kv=8, eps=1e-5, max_length=8192)
    tables = {
        "mamba2": {
            **SSM, "rmsnorm": ("mamba_rms_norm", False), "norm_before_gate": ("mamba_norm_before_gate", True),
            "in_multiplier": ("ssm_in_multiplier", 1.0), "out_multiplier": ("ssm_out_multiplier", 1.0),
        },
        "attention": {
            **BIASES, "key_multiplier": ("key_multiplier", 1.0),
            "in_multiplier": ("attention_in_multiplier", 1.0), "out_multiplier": ("attention_out_multiplier", 1.0),
        },
        "mlp": {"d_intermediate": ("intermediate_size", 14336), "bias": ("mlp_bias", False)},
    }  # fmt: skip
    unused = ("layer_types", "layers_block_type", "attn_layer_indices", "mamba_use_mlp", "mlp_expansion_factor")

    def read(self, fields: Fields) -> dict[str, Any]:
        cfg = self.trunk(fields, ["mamba2 + attention", "mlp"] * fields.take("num_hidden_layers", 32))
        ssm = self.ssm(fields, cfg["d_model"], cfg["norm"]["eps"], fields.nullable("mamba_d_ssm", 1024))
        ssm |= {"multipliers": fields.floats("ssm_multipliers", (1.0,) * 5)}
        if fields.take("projectors_bias", False) != ssm["bias"]:
            raise fields.error(
                "projectors_bias and mamba_proj_bias differ; only equal ones can be computed by this version."
            )
        attention = self.attention(fields, cfg["d_model"])
        gate, down = fields.floats("mlp_multipliers", (1.0, 1.0))
        mlp = self.options(fields, "mlp") | {"gate_multiplier": gate, "out_multiplier": down}
        return cfg | {"mixers": {"mamba2": ssm, "attention": attention, "mlp": mlp}} | fields.options(_FACTORS)

    def write(self, view: View) -> dict[str, Any]:
        m, mlp, config = view.first("mamba2"), view.first("mlp"), super().write(view) | self.written_ssm(view)
        del config["mamba_expand"]  # the width is said outright, and may be less than the model's
        return config | written(view.cfg, _FACTORS) | {
            "mamba_d_ssm": m["d_ssm"], "mamba_norm_before_gate": bool(m["norm_before_gate"]), "ssm_multipliers": m["multipliers"],
            "projectors_bias": m["bias"], "mlp_multipliers": [mlp["gate_multiplier"], mlp["out_multiplier"]],
        }  # fmt: skip

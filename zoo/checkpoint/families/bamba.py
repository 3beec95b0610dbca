"""transformers' ``bamba`` (ibm-ai-platform/Bamba-9B): Mamba-2, attention in the layers of a list, an MLP in each.

Half of every attention head rotates, whatever the config says: the class fixes it.
"""

from typing import Any

from ..family import Fields, register
from ..keys import View
from .decoder import Decoder, every_second

__all__ = ["Bamba"]


@register
class Bamba(Decoder):
    """The converter of ``bamba``."""

    model_type = "bamba"
    architecture = "BambaForCausalLM"

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take, n, bias = fields.take, fields.take("num_hidden_layers", 32), fields.take("attention_bias", False)
        at = take("attn_layer_indices", [])
        layers = every_second(["attention" if i in at else "mamba2" for i in range(n)], ["mlp"] * n)
        fields.skip("z_loss_coefficient", "layer_types", "layers_block_type", "attn_rotary_emb", "mamba_dt_rank")
        cfg = self.trunk(fields, layers, vocab=128000, d_model=4096, eps=1e-5, length=262144)
        heads = self.heads(fields, 32, 8)
        size = heads["headdim"] or cfg["d_model"] // heads["nheads"]
        mixers = {
            "mamba2": self.ssm(fields, cfg["d_model"], cfg["norm"]["eps"]),
            "attention": heads
            | {"rope": fields.rope()[0], "rotary_dim": size // 2, "qkv_bias": bias, "out_bias": bias},
            "mlp": {"type": "mlp", "d_intermediate": take("intermediate_size", 14336), "bias": take("mlp_bias", False)},
        }
        return cfg | {"mixers": {name: spec for name, spec in mixers.items() if name in layers}}

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a, mlp = view.first("attention"), view.first("mlp")
        at = [i for i, token in enumerate(view.layout[::2]) if token == "attention"]
        rope = (
            {"rope_parameters": {"rope_type": "default", "rope_theta": a["rope"], "partial_rotary_factor": 0.5}}
            if a
            else {}
        )
        heads = self.written_heads(view)
        heads.pop("head_dim", None)
        return self.written_trunk(view) | heads | self.written_ssm(view) | rope | {
            "attn_layer_indices": at, "attention_bias": a.get("qkv_bias", False),
            "intermediate_size": mlp["d_intermediate"], "mlp_bias": mlp["bias"],
        }  # fmt: skip

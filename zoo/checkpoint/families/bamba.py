"""transformers' ``bamba`` (ibm-ai-platform/Bamba-9B): Mamba-2, attention in the layers of a list, an MLP in each.

Half of every attention head rotates, unless ``rope_parameters`` hold a ``partial_rotary_factor``; one beside them does not count.
"""

from typing import Any

from ..family import Fields, register
from ..files import CheckpointError
from ..keys import View
from ..rotary import rotary, written_rotary
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
        at = fields.data.get("attn_layer_indices") or []
        layers = every_second(["attention" if i in at else "mamba2" for i in range(n)], ["mlp"] * n)
        if not isinstance(at, list):
            raise CheckpointError(f"{fields.file}: attn_layer_indices is {at!r}, expected a list. Correct the file.")
        fields.skip(
            "attn_layer_indices",
            "z_loss_coefficient",
            "layer_types",
            "layers_block_type",
            "attn_rotary_emb",
            "mamba_dt_rank",
        )
        cfg = self.trunk(fields, layers, vocab=128000, d_model=4096, eps=1e-5, length=262144)
        heads = self.heads(fields, cfg["d_model"], 32, 8)
        turned = rotary(fields, heads["headdim"], partial=0.5, beside=False, length=262144)
        mixers = {
            "mamba2": self.ssm(fields, cfg["d_model"], cfg["norm"]["eps"]),
            "attention": heads | turned | {"qkv_bias": bias, "out_bias": bias},
            "mlp": {"type": "mlp", "d_intermediate": take("intermediate_size", 14336), "bias": take("mlp_bias", False)},
        }
        return cfg | {"mixers": {name: spec for name, spec in mixers.items() if name in layers}}

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a, mlp = view.first("attention"), view.first("mlp")
        at = [i for i, token in enumerate(view.layout[::2]) if token == "attention"]
        rope = written_rotary(a, partial=True)
        return self.written_trunk(view) | self.written_heads(view) | self.written_ssm(view) | rope | {
            "attn_layer_indices": at, "attention_bias": a.get("qkv_bias", False),
            "intermediate_size": mlp["d_intermediate"], "mlp_bias": mlp["bias"],
        }  # fmt: skip

"""transformers' ``bamba`` (ibm-ai-platform/Bamba-9B): Mamba-2, attention in the layers of a list, an MLP in each.

Half of every attention head rotates, unless ``rope_parameters`` hold a ``partial_rotary_factor``; one beside them does not count.
"""

from typing import Any

from ..fields import Fields, used
from ..keys import View
from .decoder import BIASES, SSM, Decoder, Defaults, every_second

__all__ = ["Bamba"]


class Bamba(Decoder):
    model_type = "bamba"
    architecture = "BambaForCausalLM"
    defaults = Defaults(vocab_size=128000, nheads_kv=8, partial=0.5, eps=1e-5, max_length=262144)
    tables = {
        "mamba2": SSM, "attention": BIASES, "mlp": {"d_intermediate": ("intermediate_size", 14336), "bias": ("mlp_bias", False)},
    }  # fmt: skip
    unused = ("z_loss_coefficient", "layer_types", "layers_block_type", "attn_rotary_emb", "mamba_dt_rank")
    absent = {"mamba2": {}, "attention": {"qkv_bias": False, "out_bias": False}}

    def read(self, fields: Fields) -> dict[str, Any]:
        n, at = fields.take("num_hidden_layers", 32), fields.raw("attn_layer_indices") or []
        layers = every_second(["attention" if i in at else "mamba2" for i in range(n)], ["mlp"] * n)
        if not isinstance(at, list):
            raise fields.wrong("attn_layer_indices", at, "a list")
        cfg = self.trunk(fields, layers)
        attention = self.attention(fields, cfg["d_model"], beside=False)
        ssm = self.ssm(fields, cfg["d_model"], cfg["norm"]["eps"])
        mixers = {"mamba2": ssm, "attention": attention, "mlp": self.options(fields, "mlp")}
        return cfg | {"mixers": used(mixers, layers)}

    def write(self, view: View) -> dict[str, Any]:
        at = [i for i, token in enumerate(view.layout[::2]) if token == "attention"]
        return super().write(view) | self.written_ssm(view) | {"attn_layer_indices": at}

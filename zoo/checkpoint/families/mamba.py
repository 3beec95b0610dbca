"""transformers' ``mamba`` (state-spaces/mamba-130m-hf, ...), ``falcon_mamba`` (tiiuae/falcon-mamba-7b) and ``mamba2`` (Mamba-Codestral).

One mixer per layer. Falcon-Mamba normalises dt, B and C without weights. Key names are ours but for the embedding's.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

from ..family import Family
from ..fields import Fields, Table, written
from ..keys import Piece, View, same

__all__ = ["FalconMamba", "Mamba", "Mamba2"]

_BIASES: Table = {"bias": ("use_bias", False), "conv_bias": ("use_conv_bias", True)}
_TRAINING: Table = {
    "dt_min": ("time_step_min", 0.001), "dt_max": ("time_step_max", 0.1), "dt_init_floor": ("time_step_floor", 1e-4),
}  # fmt: skip


class OneMixer(Family):
    """Base of these converters.

    Attributes:
        kind: The type of the mixer.
        table: Its options that fields say.
    """

    kind: ClassVar[str]
    table: ClassVar[Table]

    def trunk(self, fields: Fields, *, vocab_size: int, d_model: int, n_layer: int, tied: bool) -> dict[str, Any]:
        """Our config; what is not a field's value is the class's default, but for ``d_model``."""
        take = fields.take
        fields.expect("hidden_act", "silu")
        fields.expect("rms_norm", True)
        mixer = {"type": self.kind, **fields.options(self.table), **fields.options(_TRAINING)}
        return {
            "vocab_size": take("vocab_size", vocab_size), "d_model": d_model, "layers": [self.kind] * take("num_hidden_layers", n_layer),
            "mixers": {self.kind: mixer}, "norm": {"type": "rmsnorm", "eps": take("layer_norm_epsilon", 1e-5)},
            "residual_in_fp32": take("residual_in_fp32", True), "tie_embeddings": take("tie_word_embeddings", tied),
        }  # fmt: skip

    def write(self, view: View) -> dict[str, Any]:
        cfg = view.cfg
        return written(view.first(self.kind), self.table) | {
            "vocab_size": view.shapes["backbone.embedding.weight"][0], "hidden_size": cfg.d_model, "num_hidden_layers": len(view.blocks),
            "layer_norm_epsilon": cfg.norm.eps, "residual_in_fp32": cfg.residual_in_fp32, "tie_word_embeddings": cfg.tie_embeddings,
        }  # fmt: skip

    def keys(self, view: View) -> Iterator[Piece]:
        """Ours, under ``embeddings``."""
        yield from view.frame("backbone.embeddings.weight", "backbone.norm_f")
        for i in range(len(view.blocks)):
            yield from same(view, f"backbone.layers.{i}", f"backbone.layers.{i}")


class Mamba(OneMixer):
    model_type = "mamba"
    architecture = "MambaForCausalLM"
    kind = "mamba"
    table = {"d_state": ("state_size", 16), "d_conv": ("conv_kernel", 4), **_BIASES}

    def read(self, fields: Fields) -> dict[str, Any]:
        d_model = fields.take("hidden_size", 768, "d_model")
        # where a file has both and they disagree, transformers' classes take the width
        inner = fields.take("intermediate_size", fields.take("expand", 2) * d_model)
        expand, rest = divmod(inner, d_model)
        if rest:
            raise fields.error(f"intermediate_size is {inner}, which is no multiple of hidden_size {d_model}.")
        # the first checkpoints carry mamba-ssm's fields too
        fields.skip("d_inner", "n_layer", "numb_hidden_layers", "pad_vocab_size_multiple", "ssm_cfg", "fused_add_norm")
        cfg = self.trunk(fields, vocab_size=50280, d_model=d_model, n_layer=32, tied=True)
        cfg["mixers"]["mamba"] |= {
            "expand": expand, "dt_rank": fields.automatic("time_step_rank", math.ceil(d_model / 16)),
            "dt_scale": fields.take("time_step_scale", 1.0),
        }  # fmt: skip
        return cfg

    def write(self, view: View) -> dict[str, Any]:
        mamba = view.first("mamba")
        return super().write(view) | {
            "expand": mamba["expand"], "intermediate_size": mamba["expand"] * view.cfg.d_model, "time_step_rank": mamba["dt_rank"],
        }  # fmt: skip


class FalconMamba(Mamba):
    model_type = "falcon_mamba"
    architecture = "FalconMambaForCausalLM"
    ignored = r".*\.(dt|b|c)_layernorm\.weight"
    table = Mamba.table | {"bcdt_norm_eps": ("mixer_rms_eps", 1e-6)}

    def read(self, fields: Fields) -> dict[str, Any]:
        cfg = super().read(fields)
        cfg["mixers"]["mamba"] |= {"bcdt_norm": True, "bcdt_norm_affine": False}
        return cfg


class Mamba2(OneMixer):
    model_type = "mamba2"
    architecture = "Mamba2ForCausalLM"
    kind = "mamba2"
    table = {
        "d_state": ("state_size", 128), "d_conv": ("conv_kernel", 4), "headdim": ("head_dim", 64), "ngroups": ("n_groups", 8), **_BIASES,
    }  # fmt: skip

    def read(self, fields: Fields) -> dict[str, Any]:
        take, d_model, expand = fields.take, fields.take("hidden_size", 4096), fields.take("expand", 2)
        fields.skip("time_step_rank", "time_step_scale", "norm_before_gate", "intermediate_size")
        cfg = self.trunk(fields, vocab_size=32768, d_model=d_model, n_layer=64, tied=False)
        mamba2 = cfg["mixers"]["mamba2"]
        mamba2 |= {
            "expand": expand, "norm_eps": cfg["norm"]["eps"], "chunk_size": take("chunk_size", 256),
            "dt_limit": fields.floats("time_step_limit", (0.0, float("inf"))),
        }  # fmt: skip
        inner = take("num_heads", 128) * mamba2["headdim"]
        if inner != expand * d_model:
            raise fields.error(
                f"num_heads * head_dim = {inner} differs from expand * hidden_size = {expand * d_model}."
            )
        return cfg

    def write(self, view: View) -> dict[str, Any]:
        mamba2 = view.first("mamba2")
        return super().write(view) | {
            "expand": mamba2["d_inner"] // view.cfg.d_model, "num_heads": mamba2["d_ssm"] // mamba2["headdim"],
            "time_step_limit": mamba2["dt_limit"],
        }  # fmt: skip

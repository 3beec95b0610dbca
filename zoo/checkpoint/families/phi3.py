"""transformers' ``phi3`` (microsoft/Phi-3-*-4k-*, Phi-3.5, Phi-4, Phi-4-mini): llama with fused projections, and perhaps a window.

The long-context variants stretch their positions by ``longrope``, which is refused.
"""

from collections.abc import Iterator
from typing import Any

from ..fields import Fields
from ..keys import Part, Piece, View, halves, same
from .decoder import NO_IDS, Defaults
from .llama import Uniform

__all__ = ["Phi3"]


class Phi3(Uniform):
    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    defaults = Defaults(vocab_size=32064, d_model=3072, partial=1.0, eps=1e-5, max_length=4096)
    tables = {"attention": {"window": ("sliding_window", None)}, "mlp": {"d_intermediate": ("intermediate_size", 8192)}}
    unused = ("resid_pdrop", "embd_pdrop", "original_max_position_embeddings")

    def read(self, fields: Fields) -> dict[str, Any]:
        # published files say these too
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            fields.expect(name, False)
        for name in ("full_attn_mod", "interpolate_factor"):
            fields.expect(name, 1)
        cfg = super().read(fields)
        if cfg["mixers"]["attention"].get("rope_scaling"):
            raise fields.error("rope_scaling or rope_parameters have a rope_type that this class refuses.")
        return cfg

    def write(self, view: View) -> dict[str, Any]:
        return NO_IDS | super().write(view)

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """q, k and v are one tensor, as here; gate and up too, in the other order."""
        if part.type == "attention":
            yield from same(view, f"{part.key}.in_proj", f"{theirs}.qkv_proj")
            yield from same(view, f"{part.key}.out_proj", f"{theirs}.o_proj")
            return
        yield from halves(f"{part.key}.fc1.weight", f"{theirs}.gate_up_proj.weight", part["d_intermediate"])
        yield from same(view, f"{part.key}.fc2", f"{theirs}.down_proj")

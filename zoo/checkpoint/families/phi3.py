"""transformers' ``phi3`` (microsoft/Phi-3-*-4k-*, Phi-3.5, Phi-4, Phi-4-mini): llama with fused projections, and perhaps a window.

The long-context variants stretch their positions by ``longrope``, which is refused.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from ..family import Fields, register
from ..files import CheckpointError
from ..keys import Part, Piece, View, halves, same
from ..rotary import written_rotary
from .llama import NO_IDS, Llama

__all__ = ["Phi3"]


@register
class Phi3(Llama):
    """The converter of ``phi3``."""

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {"vocab": 32064, "d_model": 3072, "eps": 1e-5, "length": 4096}

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        fields.skip("resid_pdrop", "embd_pdrop", "original_max_position_embeddings")
        # published files say these too
        for name, value in {
            "attention_bias": False,
            "mlp_bias": False,
            "lm_head_bias": False,
            "full_attn_mod": 1,
            "interpolate_factor": 1,
        }.items():
            fields.expect(name, value)
        mlp = {"type": "mlp", "d_intermediate": fields.take("intermediate_size", 8192)}
        cfg = self.uniform(fields, {"mlp": mlp}, n=32, heads=32, kv=None, partial=1.0)
        if cfg["mixers"]["attention"].get("rope_scaling"):
            raise CheckpointError(
                f"{fields.file}: rope_scaling or rope_parameters have a rope_type that this class refuses."
            )
        cfg["mixers"]["attention"]["window"] = fields.take("sliding_window", None)
        return cfg

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        a = view.first("attention")
        return NO_IDS | self.written_trunk(view) | self.written_heads(view) | written_rotary(a, partial=True) | {
            "sliding_window": a["window"], "intermediate_size": view.first("mlp")["d_intermediate"],
        }  # fmt: skip

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """q, k and v are one tensor, as here; gate and up too, in the other order."""
        if part.type == "attention":
            yield from same(view, f"{part.key}.in_proj", f"{theirs}.qkv_proj")
            yield from same(view, f"{part.key}.out_proj", f"{theirs}.o_proj")
            return
        yield from halves(f"{part.key}.fc1.weight", f"{theirs}.gate_up_proj.weight", part["d_intermediate"])
        yield from same(view, f"{part.key}.fc2", f"{theirs}.down_proj")

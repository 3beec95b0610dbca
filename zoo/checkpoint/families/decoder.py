"""What the decoders of transformers have in common: two residual blocks per layer, a mixer and a feed-forward, each behind its norm."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from ..family import Family, Fields
from ..files import CheckpointError
from ..keys import Part, Piece, View, attention, gated_mlp, same

__all__ = ["Decoder", "every_second", "period_of"]

_NORMS_OF_DT_B_C = {"dt_norm": "dt_layernorm", "b_norm": "b_layernorm", "c_norm": "c_layernorm"}


class Decoder(Family):
    """Base of converters for such decoders.

    Attributes:
        norms: Names of a layer's two norms.
        last_norm: Name of the norm after the last layer.
        names: Where each type of mixer sits in a layer.
    """

    norms: ClassVar[tuple[str, str]] = ("input_layernorm", "pre_ff_layernorm")
    last_norm: ClassVar[str] = "model.final_layernorm"
    names: ClassVar[Mapping[str, str]] = {
        "attention": "self_attn", "mamba": "mamba", "mamba2": "mamba", "mlp": "feed_forward", "moe": "feed_forward",
    }  # fmt: skip

    def keys(self, view: View) -> Iterator[Piece]:
        """Embedding, head and last norm, then block by block."""
        yield from view.frame("model.embed_tokens.weight", self.last_norm)
        for i, block in enumerate(view.blocks):
            layer = f"model.layers.{i // 2}"
            yield from view.norm(i, f"{layer}.{self.norms[i % 2]}")
            for part in block:
                yield from self.mixer(view, part, f"{layer}.{self.names[part.type]}")

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """The pieces of one mixer."""
        if part.type == "attention":
            return attention(view, part, theirs)
        if part.type == "mlp":
            return gated_mlp(view, part, theirs)
        return same(view, part.key, theirs, _NORMS_OF_DT_B_C)

    def trunk(
        self,
        fields: Fields,
        layers: list[str],
        *,
        vocab: int,
        d_model: int,
        eps: float,
        length: int,
        tied: bool = False,
    ) -> dict[str, Any]:
        """What every decoder's config has besides its mixers; the numbers are the class's defaults."""
        take = fields.take
        fields.expect("hidden_act", "silu")
        return {
            "vocab_size": take("vocab_size", vocab), "d_model": take("hidden_size", d_model), "layers": layers,
            "norm": {"type": "rmsnorm", "eps": take("rms_norm_eps", eps)}, "tie_embeddings": take("tie_word_embeddings", tied),
            "max_length": take("max_position_embeddings", length), "residual_in_fp32": False,
        }  # fmt: skip

    def written_trunk(self, view: View) -> dict[str, Any]:
        """The reverse of :meth:`trunk`."""
        cfg = view.cfg
        return {
            "vocab_size": view.shapes["backbone.embedding.weight"][0], "hidden_size": cfg.d_model,
            "num_hidden_layers": len(view.blocks) // 2, "rms_norm_eps": cfg.norm.eps, "tie_word_embeddings": cfg.tie_embeddings,
            "max_position_embeddings": cfg.max_length, "hidden_act": "silu",
        }  # fmt: skip

    def heads(self, fields: Fields, d_model: int, heads: int, kv: int | None) -> dict[str, Any]:
        """Heads of an attention mixer; the last two numbers are the class's defaults."""
        n = fields.take("num_attention_heads", heads)
        return {
            "type": "attention", "nheads": n, "nheads_kv": fields.nullable("num_key_value_heads", kv) or n,
            "headdim": fields.take("head_dim", None) or d_model // n,
        }  # fmt: skip

    def written_heads(self, view: View) -> dict[str, Any]:
        """The reverse of :meth:`heads`."""
        a = view.first("attention")
        if not a:
            # what a class checks although no layer asks
            return {"num_attention_heads": 1, "num_key_value_heads": 1}
        heads = {"num_attention_heads": a["nheads"], "num_key_value_heads": a["nheads_kv"]}
        # not every class has the field; all take it
        return heads if a["headdim"] == view.cfg.d_model // a["nheads"] else heads | {"head_dim": a["headdim"]}

    def ssm(self, fields: Fields, d_model: int, eps: float, d_ssm: int | None = None) -> dict[str, Any]:
        """A Mamba-2 mixer in the spelling of Bamba, Granite 4 and Falcon-H1; inside it is ``d_ssm`` wide, or ``mamba_expand`` times."""
        take, bias = fields.take, fields.take("mamba_proj_bias", False)
        heads, expand = take("mamba_n_heads", 128), take("mamba_expand", 2)
        inner = d_ssm or expand * d_model
        size = inner // heads if fields.data.get("mamba_d_head", "auto") in ("auto", None) else take("mamba_d_head")
        # transformers 5.13 writes the latter two, and computes nothing with them
        fields.skip("mamba_d_head", "time_step_min", "time_step_max")
        if heads * size != inner:
            raise CheckpointError(
                f"{fields.file}: mamba_n_heads * mamba_d_head = {heads * size} differs from the inner width {inner}."
            )
        return {
            "type": "mamba2", "d_state": take("mamba_d_state", 256), "d_conv": take("mamba_d_conv", 4),
            **({"d_inner": d_ssm} if d_ssm else {"expand": expand}),
            "headdim": size, "ngroups": take("mamba_n_groups", 1), "chunk_size": take("mamba_chunk_size", 256), "norm_eps": eps,
            "dt_limit": fields.floats("time_step_limit", (0.0, float("inf"))), "bias": bias, "conv_bias": take("mamba_conv_bias", True),
        }  # fmt: skip

    def written_ssm(self, view: View) -> dict[str, Any]:
        """The reverse of :meth:`ssm`."""
        m = view.first("mamba2")
        if not m:
            # the class checks that its heads divide the width, although no layer has them
            return {"mamba_n_heads": 1}
        return {
            "mamba_n_heads": m["d_ssm"] // m["headdim"], "mamba_d_head": m["headdim"], "mamba_expand": m["d_inner"] // view.cfg.d_model,
            "mamba_d_state": m["d_state"], "mamba_d_conv": m["d_conv"], "mamba_n_groups": m["ngroups"],
            "time_step_limit": m["dt_limit"], "mamba_proj_bias": m["bias"], "mamba_conv_bias": m["conv_bias"],
        }  # fmt: skip


def every_second(mixers: list[str], feed_forwards: list[str]) -> list[str]:
    """Mixers and feed-forwards in turn; a ``ValueError`` if there are more of one."""
    return [token for pair in zip(mixers, feed_forwards, strict=True) for token in pair]


def period_of(places: list[int], n: int) -> tuple[int, int]:
    """Period and offset of a regular list of places among ``n``; what is irregular shows when the result is read back."""
    if not places:
        return n + 1, n
    return (places[1] - places[0] if len(places) > 1 else n), places[0]

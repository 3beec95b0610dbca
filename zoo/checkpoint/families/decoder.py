"""The common form of the decoders of transformers: two residual blocks per layer, a mixer and a feed-forward, each behind its norm."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from ..family import Family
from ..fields import Fields, Table, written
from ..keys import Part, Piece, View, attention, experts, gated_mlp, same
from ..rotary import rotary, written_rotary

__all__ = ["BIASES", "NO_IDS", "SSM", "Decoder", "Defaults", "every_second", "period_of"]

_NORMS_OF_DT_B_C = {"dt_norm": "dt_layernorm", "b_norm": "b_layernorm", "c_norm": "c_layernorm"}
# both from one field; what is written is the first projection's, and that the other's differs shows when it is read back
BIASES: Table = {"out_bias": ("attention_bias", False), "qkv_bias": ("attention_bias", False)}
# a Mamba-2 mixer in the spelling of Bamba, Granite 4 and Falcon-H1
SSM: Table = {
    "d_state": ("mamba_d_state", 256), "d_conv": ("mamba_d_conv", 4), "ngroups": ("mamba_n_groups", 1),
    "bias": ("mamba_proj_bias", False), "conv_bias": ("mamba_conv_bias", True),
}  # fmt: skip
# the ids of special tokens where a class has defaults that another vocabulary does not hold; what is known is written over these
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


@dataclasses.dataclass(frozen=True)
class Defaults:
    """The values that a class takes where a config says nothing; ``partial`` is None where it reads no such field."""

    vocab_size: int = 32000
    d_model: int = 4096
    n_layer: int = 32
    nheads: int = 32
    nheads_kv: int | None = None
    headdim: int | None = None
    theta: float = 10000.0
    partial: float | None = None
    eps: float = 1e-6
    max_length: int = 2048
    tied: bool = False


class Decoder(Family):
    """Base of converters for such decoders.

    Attributes:
        norms: Names of a layer's two norms.
        last_norm: Name of the norm after the last layer.
        names: Where each type of mixer sits in a layer.
        router: Name of the linear layer that chooses experts.
        expert: Names of an expert's gate, up and down projections.
        defaults: The class's.
        fixed: Options that every model of the class has, by type of mixer.
        tables: Options that fields say, by type of mixer.
        unused: Fields that decide nothing, or follow from others.
        absent: Options to write of a type of mixer that no layer has; without an entry, a model must have one.
    """

    norms: ClassVar[tuple[str, str]] = ("input_layernorm", "pre_ff_layernorm")
    last_norm: ClassVar[str] = "model.final_layernorm"
    names: ClassVar[Mapping[str, str]] = {
        "attention": "self_attn", "mamba": "mamba", "mamba2": "mamba", "mlp": "feed_forward", "moe": "feed_forward",
    }  # fmt: skip
    router: ClassVar[str] = "gate"
    expert: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    defaults: ClassVar[Defaults] = Defaults()
    fixed: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    tables: ClassVar[Mapping[str, Table]] = {}
    unused: ClassVar[tuple[str, ...]] = ()
    absent: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def keys(self, view: View) -> Iterator[Piece]:
        """Embedding, head and last norm, then block by block."""
        yield from view.frame("model.embed_tokens.weight", self.last_norm)
        for i, block in enumerate(view.blocks):
            layer = f"model.layers.{i // 2}"
            yield from view.norm(i, f"{layer}.{self.norms[i % 2]}")
            for part in block:
                yield from self.mixer(view, part, f"{layer}.{self.names[part.type]}")

    def mixer(self, view: View, part: Part, theirs: str) -> Iterator[Piece]:
        """The pieces of one mixer; experts lie one by one on disk, and fused in memory, where Mixtral's have another name too."""
        if part.type == "attention":
            yield from attention(view, part, theirs)
        elif part.type == "mlp":
            yield from gated_mlp(view, part, theirs)
        elif part.type == "moe":
            memory = theirs.replace("block_sparse_moe", "mlp")
            fused = f"{memory}.experts.gate_up_proj" in view.stored
            theirs = memory if fused else theirs
            yield from same(view, f"{part.key}.router", f"{theirs}.{self.router}")
            yield from experts(part, f"{theirs}.experts", *self.expert, fused)
        else:
            yield from same(view, part.key, theirs, _NORMS_OF_DT_B_C)

    def write(self, view: View) -> dict[str, Any]:
        cfg, a, default = view.cfg, view.first("attention"), self.defaults
        config = {
            name: value
            for kind, table in self.tables.items()
            for name, value in written(view.first(kind) or self.absent[kind], table).items()
        } | written_rotary(a, partial=default.partial is not None)
        if a and (default.headdim or a["headdim"] != cfg.d_model // a["nheads"]):
            config |= {"head_dim": a["headdim"]}  # not every class has the field; all take it
        return config | {
            "vocab_size": view.shapes["backbone.embedding.weight"][0], "hidden_size": cfg.d_model,
            "num_hidden_layers": len(view.blocks) // 2, "rms_norm_eps": cfg.norm.eps, "tie_word_embeddings": cfg.tie_embeddings,
            "max_position_embeddings": cfg.max_length, "hidden_act": "silu",
            # a class checks its heads although no layer has them
            "num_attention_heads": a.get("nheads", 1), "num_key_value_heads": a.get("nheads_kv", 1),
        }  # fmt: skip

    def trunk(self, fields: Fields, layers: list[str]) -> dict[str, Any]:
        """Our config without its mixers."""
        take, default = fields.take, self.defaults
        fields.skip(*self.unused)
        fields.expect("hidden_act", "silu")
        return {
            "vocab_size": take("vocab_size", default.vocab_size), "d_model": take("hidden_size", default.d_model), "layers": layers,
            "norm": {"type": "rmsnorm", "eps": take("rms_norm_eps", default.eps)},
            "tie_embeddings": take("tie_word_embeddings", default.tied),
            "max_length": take("max_position_embeddings", default.max_length), "residual_in_fp32": False,
        }  # fmt: skip

    def options(self, fields: Fields, kind: str) -> dict[str, Any]:
        """The options of a type of mixer that are fixed, or that single fields say."""
        loss = {"aux_loss_coef": fields.take("router_aux_loss_coef", 0.001)} if kind == "moe" else {}
        return {"type": kind, **self.fixed.get(kind, {}), **fields.options(self.tables.get(kind, {})), **loss}

    def heads(self, fields: Fields, d_model: int) -> dict[str, Any]:
        """Attention but for its positions."""
        n, default = fields.take("num_attention_heads", self.defaults.nheads), self.defaults
        return self.options(fields, "attention") | {
            "nheads": n, "nheads_kv": fields.nullable("num_key_value_heads", default.nheads_kv) or n,
            "headdim": fields.nullable("head_dim", default.headdim) or d_model // n,
        }  # fmt: skip

    def attention(self, fields: Fields, d_model: int, beside: bool = True) -> dict[str, Any]:
        """Attention with rotary positions; ``beside`` is :func:`rotary`'s."""
        heads, default = self.heads(fields, d_model), self.defaults
        return heads | rotary(
            fields, heads["headdim"], theta=default.theta, partial=default.partial, beside=beside, length=default.max_length
        )  # fmt: skip

    def ssm(self, fields: Fields, d_model: int, eps: float, d_ssm: int | None = None) -> dict[str, Any]:
        """A Mamba-2 mixer by the fields of :data:`SSM`; inside it is ``d_ssm`` wide, or ``mamba_expand`` times."""
        take, heads, expand = fields.take, fields.take("mamba_n_heads", 128), fields.take("mamba_expand", 2)
        inner = d_ssm or expand * d_model
        size = inner // heads if fields.raw("mamba_d_head", "auto") == "auto" else take("mamba_d_head")
        fields.skip("time_step_min", "time_step_max")  # transformers 5.13 writes them, and computes nothing with them
        if heads * size != inner:
            raise fields.error(f"mamba_n_heads * mamba_d_head = {heads * size} differs from the inner width {inner}.")
        return self.options(fields, "mamba2") | {
            **({"d_inner": d_ssm} if d_ssm else {"expand": expand}), "headdim": size, "norm_eps": eps,
            "chunk_size": take("mamba_chunk_size", 256), "dt_limit": fields.floats("time_step_limit", (0.0, float("inf"))),
        }  # fmt: skip

    def written_ssm(self, view: View) -> dict[str, Any]:
        """The reverse of :meth:`ssm`, but for the fields of the table."""
        m = view.first("mamba2")
        if not m:
            return {"mamba_n_heads": 1}  # the class checks that its heads divide the width, although no layer has them
        return {
            "mamba_n_heads": m["d_ssm"] // m["headdim"], "mamba_d_head": m["headdim"], "mamba_expand": m["d_inner"] // view.cfg.d_model,
            "time_step_limit": m["dt_limit"],
        }  # fmt: skip


def every_second(mixers: list[str], feed_forwards: list[str]) -> list[str]:
    """Mixers and feed-forwards in turn; a ``ValueError`` if there are more of one."""
    return [token for pair in zip(mixers, feed_forwards, strict=True) for token in pair]


def period_of(places: list[int], n: int) -> tuple[int, int]:
    """Period and offset of a regular list of places among ``n``; what is irregular shows when the result is read back."""
    if not places:
        return n + 1, n
    return (places[1] - places[0] if len(places) > 1 else n), places[0]

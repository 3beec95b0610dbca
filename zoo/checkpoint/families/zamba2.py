"""transformers' ``zamba2`` (Zyphra/Zamba2-1.2B, 2.7B, 7B): Mamba-2, and before some of its layers a transformer block that they share.

The shared block reads the residual stream and the embedded tokens side by side, attention then MLP, with no addition in between. A linear
layer of each place leads its output into that layer's Mamba-2, and only there. ``num_mem_blocks`` such blocks take turns, and adapters
let every use differ. In our terms: ``attention@a0 mlp@m0 joined``, over the side stream.

transformers' class limits step sizes to at least ``time_step_min``, which is elsewhere about initialisation; Zyphra's own code has no
limit. A file with the older field ``time_step_limit`` was written for that code, and has none; one without it is of that class.
"""

from collections.abc import Iterator
from typing import Any

from ..family import Family
from ..fields import Fields, lowest, used, written, written_lowest
from ..keys import Piece, View, attention, halves, same
from ..rotary import rotary, written_rotary

__all__ = ["Zamba2"]

# what the class takes where a config lists no layers: m for Mamba-2 alone, h with the shared block
_LAYERS = "m" + "mmmmmh" * 7 + "mmmmh" + "mmmh" + "mm"
_HYBRID = {"hybrid": True, "h": True, "mamba": False, "linear_attention": False, "m": False}
_MAMBA2 = {
    "d_state": ("mamba_d_state", 64), "d_conv": ("mamba_d_conv", 4), "expand": ("mamba_expand", 2), "ngroups": ("mamba_ngroups", 1),
    "chunk_size": ("chunk_size", 256), "bias": ("add_bias_linear", False), "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1), "dt_init_floor": ("time_step_floor", 1e-4),
}  # fmt: skip
_UNUSED = "kv_channels num_query_groups use_conv_bias use_mem_eff_path sliding_window ffn_hidden_size".split()


class Zamba2(Family):
    model_type = "zamba2"
    architecture = "Zamba2ForCausalLM"

    def read(self, fields: Fields) -> dict[str, Any]:
        take, d, n = fields.take, fields.take("hidden_size", 2560), fields.take("num_mem_blocks", 1)
        layers: list[str] = []
        hybrids = fields.kinds(_HYBRID, list(_LAYERS), "layers_block_type", "layer_types")
        for hybrid in hybrids:
            use = layers.count("joined") % n
            layers += [f"attention@a{use}", f"mlp@m{use}", "joined"] if hybrid else ["mamba2"]
        fields.skip(*_UNUSED)
        fields.expect("use_long_context", False)
        heads, ssm_heads, ssm = take("num_attention_heads", 32), take("n_mamba_heads", 8), fields.options(_MAMBA2)
        inner = ssm["expand"] * d
        if 2 * d % heads or inner % ssm_heads:
            what = f"num_attention_heads {heads} and n_mamba_heads {ssm_heads}"
            raise fields.error(f"hidden_size {d} does not fit {what}.")
        size, rank = 2 * d // heads, take("adapter_rank", 128)
        # theirs writes these down, and reads them before what they follow from
        for name, value in (
            ("num_hidden_layers", len(hybrids)), ("hybrid_layer_ids", [i for i, hybrid in enumerate(hybrids) if hybrid]),
            ("attention_hidden_size", 2 * d), ("attention_head_dim", size), ("head_dim", size), ("mamba_headdim", inner // ssm_heads),
        ):  # fmt: skip
            fields.follows(name, value)
        kv, adapted = take("num_key_value_heads", None) or heads, take("use_shared_attention_adapter", False)
        if adapted and kv != heads:
            raise fields.error(
                f"num_key_value_heads {kv} is not num_attention_heads {heads}, and use_shared_attention_adapter is on: "
                "its class makes adapters for equally many."
            )
        if rank < 1:
            raise fields.error(
                f"adapter_rank is {rank}. Its class gives every use of a shared MLP an adapter; use 1 or more."
            )
        turned = rotary(fields, size, length=4096)
        limit = lowest(fields, 0.0 if "time_step_limit" in fields.data else ssm["dt_min"])
        mamba2 = {"type": "mamba2", "headdim": inner // ssm_heads, "dt_limit": limit, **ssm}
        mixers = {
            "mamba2": mamba2, "joined": mamba2 | {"reads": "residual_plus_side"},
            "attention": {
                "type": "attention", "nheads": heads, "nheads_kv": kv, "headdim": size,
                **(turned if take("use_mem_rope", False) else {"rope": None}), "softmax_scale": (size / 2) ** -0.5,
                "adapter_rank": rank if adapted else 0,
                "reads": "residual_and_embedding", "writes": "side",
            },
            "mlp": {
                "type": "mlp", "d_intermediate": take("intermediate_size", 4 * d), "adapter_rank": rank, "bias": ssm["bias"],
                "activation": fields.expect("hidden_act", "gelu", "silu", "relu"), "reads": "side", "writes": "side",
            },
        }  # fmt: skip
        return {
            "vocab_size": take("vocab_size", 32000), "d_model": d, "layers": layers, "residual_in_fp32": False,
            "mixers": used(mixers, layers),
            "norm": {"type": "rmsnorm", "eps": take("rms_norm_eps", 1e-5)}, "tie_embeddings": take("tie_word_embeddings", True),
            "max_length": take("max_position_embeddings", 4096),
        }  # fmt: skip

    def write(self, view: View) -> dict[str, Any]:
        m, a, mlp, cfg = view.whole("mamba2"), view.first("attention"), view.first("mlp"), view.cfg
        ends = [i for i, token in enumerate(view.layout) if token == "mamba2"]
        ssm = written(m | {"expand": m["d_inner"] // cfg.d_model}, _MAMBA2) | written_lowest(m["dt_limit"])
        return ssm | written_rotary(a) | {
            "vocab_size": view.shapes["backbone.embedding.weight"][0], "hidden_size": cfg.d_model, "rms_norm_eps": cfg.norm.eps,
            "tie_word_embeddings": cfg.tie_embeddings, "max_position_embeddings": cfg.max_length, "num_hidden_layers": len(ends),
            "layers_block_type": ["hybrid" if view.layout[i - 1] == "mlp" else "linear_attention" for i in ends],
            "n_mamba_heads": m["d_ssm"] // m["headdim"], "num_attention_heads": a["nheads"], "num_key_value_heads": a["nheads_kv"],
            "use_mem_rope": a["rope"] is not None, "use_shared_attention_adapter": a["adapter_rank"] > 0,
            "hidden_act": mlp["activation"], "intermediate_size": mlp["d_intermediate"], "adapter_rank": mlp["adapter_rank"],
            "num_mem_blocks": len({s for s, token in zip(view.source, view.layout, strict=True) if token == "attention"}),
        }  # fmt: skip

    def keys(self, view: View) -> Iterator[Piece]:
        """A shared block is stored in its first layer; in memory, and where the head is not tied, also in the others.

        transformers' class shares blocks only where it ties the head, and would draw what is missing. Copies that differ are refused.
        """
        yield from view.frame("model.embed_tokens.weight", "model.final_layernorm")
        layers = [view.layout[:i].count("mamba2") for i in range(len(view.layout))]
        use = 0
        for i, (part, *_) in enumerate(view.blocks):
            theirs = f"model.layers.{layers[i]}"
            if part.type != "mamba2":
                for j in (j for j, source in enumerate(view.source) if source == view.source[i]):
                    block = f"model.layers.{layers[j]}.shared_transformer"
                    is_stored = f"{block}.pre_ff_layernorm.weight" in view.stored
                    if view.source[j] == j or (is_stored if view.stored else not view.cfg.tie_embeddings):
                        yield from self._shared(view, i, block, use)
                continue
            if view.streams[i][0] == "residual_plus_side":
                yield from same(view, f"backbone.layers.{i}.side_proj", f"{theirs}.linear")
                theirs, use = f"{theirs}.mamba_decoder", use + 1
            yield from view.norm(i, f"{theirs}.input_layernorm")
            yield from same(view, part.key, f"{theirs}.mamba")

    def _shared(self, view: View, i: int, theirs: str, use: int) -> Iterator[Piece]:
        # of a block that shares its weights, the view has only the adapters
        part = view.blocks[i][0]
        rank, down, up = part["adapter_rank"], f"{part.key}.adapter.down.weight", f"{part.key}.adapter.up"
        if part.type == "attention":
            yield from view.norm(i, f"{theirs}.input_layernorm")
            yield from attention(view, part, f"{theirs}.self_attn")
            for j, name in enumerate("qkv" if rank else ""):
                adapter = f"{theirs}.self_attn.linear_{name}_adapter_list.{use}"
                yield Piece(down, f"{adapter}.0.weight", (slice(j * rank, (j + 1) * rank),))
                yield Piece(f"{up}.{j}.weight", f"{adapter}.1.weight")
            return
        h, gate_up = part["d_intermediate"], f"{theirs}.feed_forward.gate_up_proj"
        yield from view.norm(i, f"{theirs}.pre_ff_layernorm")
        yield from same(view, f"{part.key}.fc2", f"{theirs}.feed_forward.down_proj")
        for kind in ("weight", "bias"):
            if f"{part.key}.fc1.{kind}" in view.shapes:
                yield from halves(f"{part.key}.fc1.{kind}", f"{gate_up}.{kind}", h)
        if rank:
            yield Piece(down, f"{gate_up}_adapter_list.{use}.0.weight")
            yield from halves(f"{up}.0.weight", f"{gate_up}_adapter_list.{use}.1.weight", h)

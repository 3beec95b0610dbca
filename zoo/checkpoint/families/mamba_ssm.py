"""mamba-ssm's own format: state-spaces/mamba-*, mamba2-*, mamba2attn-2.7b, transformerpp-2.7b.

A ``config.json`` with ``ssm_cfg`` and ``attn_cfg``, and ``pytorch_model.bin`` under our key names. One layer of theirs is one block of
ours, or with ``d_intermediate`` two, the second an MLP. Attention may have a gated MLP beside it (``mlp_dim``) that shares both of its
projections: that is ``attention + mlp``, and the projections' rows and columns are split.
"""

from collections.abc import Iterator
from typing import Any

from ..family import Family
from ..fields import Fields, used, written
from ..keys import Part, Piece, View, same

__all__ = ["MambaSSM"]

_SSM = {
    "Mamba1": tuple("d_state d_conv expand dt_rank bias conv_bias".split()),
    "Mamba2": tuple(
        "d_state d_conv expand headdim ngroups d_ssm D_has_hdim rmsnorm norm_before_gate dt_limit bias conv_bias".split()
    ),
}
_ATTENTION = {
    "nheads": ("num_heads", None), "nheads_kv": ("num_heads_kv", None), "headdim": ("head_dim", None), "d_conv": ("d_conv", 0),
    "rope_interleaved": ("rotary_emb_interleaved", False), "qkv_bias": ("qkv_proj_bias", True), "out_bias": ("out_proj_bias", True),
    "softmax_scale": ("softmax_scale", None),
}  # fmt: skip
_TRAINING = ("dt_min", "dt_max", "dt_init_floor", "dt_scale", "A_init_range", "chunk_size")
_NO_EFFECT = ("use_fast_path", "use_mem_eff_path", "dt_init", "conv_init", "sequence_parallel", "process_group")


class MambaSSM(Family):
    """The converter of mamba-ssm's format, which has no ``model_type``."""

    model_type = "mamba_ssm"
    architecture = "MambaLMHeadModel"

    def read(self, fields: Fields) -> dict[str, Any]:
        take = fields.take
        d_model, n, width = take("d_model"), take("n_layer"), take("d_intermediate", 0)
        at = set(take("attn_layer_idx", []))
        if not all(isinstance(i, int) and 0 <= i < n for i in at):
            raise fields.error(f"attn_layer_idx is {sorted(at)}, expected layers from 0 to {n - 1}.")
        vocab = take("vocab_size", 50277)
        fields.skip("fused_add_norm")
        ssm_name, ssm = self._ssm(fields, take("ssm_cfg", {}))
        attn_cfg = take("attn_cfg", {})
        attention, mlp = self._attention(fields, attn_cfg) if at else (None, None)
        beside = {"type": "mlp", "d_intermediate": -(-width // 128) * 128}
        mixers = {ssm_name: ssm, "attention": attention, "mlp_in_attention": mlp, "mlp": beside}
        layers = []
        for i in range(n):
            layers.append(ssm_name if i not in at else "attention + mlp_in_attention" if mlp else "attention")
            layers += ["mlp"] if width else []
        cfg = {
            "vocab_size": vocab, "pad_vocab_size_multiple": take("pad_vocab_size_multiple", 8), "d_model": d_model, "layers": layers,
            "mixers": used(mixers, layers), "norm": {"type": "rmsnorm" if take("rms_norm", True) else "layernorm", "eps": 1e-5},
            "residual_in_fp32": take("residual_in_fp32", True), "tie_embeddings": take("tie_embeddings", True),
        }  # fmt: skip
        # the format has no tokenizer files; all models of the Pile have this vocabulary
        return cfg | ({"tokenizer": "EleutherAI/gpt-neox-20b"} if vocab in (50277, 50280) else {})

    def _ssm(self, fields: Fields, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        layer = given.get("layer", "Mamba1")
        if layer == "Mamba3":
            raise fields.error("ssm_cfg.layer is 'Mamba3', whose mixer is not yet part of the zoo.")
        if layer not in _SSM:
            raise fields.error(f"ssm_cfg.layer is {layer!r}. Known: {', '.join(_SSM)}.")
        name = "mamba" if layer == "Mamba1" else "mamba2"
        options = {k: v for k, v in given.items() if k not in ("layer", *_NO_EFFECT)}
        for key in options:
            if key not in _SSM[layer] + _TRAINING:
                raise fields.error(f"unknown field ssm_cfg.{key}. Known: {', '.join(_SSM[layer])}.")
        if options.get("dt_rank") == "auto":
            del options["dt_rank"]
        return name, {"type": name, **options}

    def _attention(self, fields: Fields, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        left = dict(given)
        if not left.pop("causal", False):
            raise fields.error("attn_cfg.causal is not true, as a language model's must be.")
        rotary, base = left.pop("rotary_emb_dim", 0), left.pop("rotary_emb_base", 10000.0)
        # upstream rounds the two halves together
        width = -(-left.pop("mlp_dim", 0) // 256) * 128
        attention = {"type": "attention", "rope": float(base) if rotary else None, "rotary_dim": rotary or None}
        attention |= {option: left.pop(name, default) for option, (name, default) in _ATTENTION.items()}
        if left:
            raise fields.error(f"unknown field attn_cfg.{min(left)}. If it changes nothing, remove it.")
        if width and (attention["qkv_bias"] or attention["out_bias"]):
            raise fields.error("attn_cfg has mlp_dim and biases, which this version cannot read.")
        return attention, {"type": "mlp", "d_intermediate": width} if width else None

    def write(self, view: View) -> dict[str, Any]:
        cfg, layout = view.cfg, view.layout
        width = view.blocks[1][0]["d_intermediate"] if "mlp" in layout else 0
        layers = layout[::2] if width else layout
        layer = "Mamba2" if "mamba2" in layout else "Mamba1"
        ssm = view.first("mamba2" if layer == "Mamba2" else "mamba")
        ssm_cfg = {key: ssm[key] for key in _SSM[layer] if key in ssm}
        if layer == "Mamba2" and ssm:
            ssm_cfg["expand"] = ssm["d_inner"] // cfg.d_model
            ssm_cfg = {k: v for k, v in ssm_cfg.items() if v is not None and not (k == "d_ssm" and v == ssm["d_inner"])}
            if ssm_cfg["dt_limit"] == [0.0, float("inf")]:
                del ssm_cfg["dt_limit"]
        at = [i for i, token in enumerate(layers) if token.startswith("attention")]
        return {
            "d_model": cfg.d_model, "n_layer": len(layers), "d_intermediate": width, "attn_layer_idx": at,
            "vocab_size": cfg.vocab_size, "pad_vocab_size_multiple": cfg.pad_vocab_size_multiple, "tie_embeddings": cfg.tie_embeddings,
            "rms_norm": cfg.norm.type == "rmsnorm", "residual_in_fp32": cfg.residual_in_fp32, "fused_add_norm": True,
            "ssm_cfg": {"layer": layer, **ssm_cfg}, "attn_cfg": self._attn_cfg(view) if at else {},
        }  # fmt: skip

    def _attn_cfg(self, view: View) -> dict[str, Any]:
        a = view.first("attention")
        beside = [part for block in view.blocks if len(block) == 2 for part in block if part.type == "mlp"]
        return written(a, _ATTENTION) | {
            "causal": True, "rotary_emb_dim": a["rotary_dim"] or 0, "rotary_emb_base": a["rope"] or 10000.0,
            "mlp_dim": 2 * beside[0]["d_intermediate"] if beside else 0,
        }  # fmt: skip

    def keys(self, view: View) -> Iterator[Piece]:
        """Ours; blocks that are MLPs belong to the layer before."""
        yield from view.frame("backbone.embedding.weight", "backbone.norm_f")
        double = "mlp" in view.layout
        for i, block in enumerate(view.blocks):
            layer = f"backbone.layers.{i // 2 if double else i}"
            if double and i % 2:
                yield from view.norm(i, f"{layer}.norm2")
                yield from same(view, block[0].key, f"{layer}.mlp")
                continue
            yield from view.norm(i, f"{layer}.norm")
            if len(block) == 1:
                yield from same(view, block[0].key, f"{layer}.mixer")
            else:
                yield from self._attention_and_mlp(view, block, f"{layer}.mixer")

    def _attention_and_mlp(self, view: View, block: list[Part], layer: str) -> Iterator[Piece]:
        attention, mlp = block
        qkv = view.shapes[f"{attention.key}.in_proj.weight"][0]
        mixed = view.shapes[f"{attention.key}.out_proj.weight"][1]
        h, every = mlp["d_intermediate"], slice(None)
        yield Piece(f"{attention.key}.in_proj.weight", f"{layer}.in_proj.weight", of=(slice(0, qkv),))
        yield Piece(f"{mlp.key}.fc1.weight", f"{layer}.in_proj.weight", of=(slice(qkv, qkv + 2 * h),))
        yield from same(view, f"{attention.key}.conv1d", f"{layer}.conv1d")
        yield Piece(f"{attention.key}.out_proj.weight", f"{layer}.out_proj.weight", of=(every, slice(0, mixed)))
        yield Piece(f"{mlp.key}.fc2.weight", f"{layer}.out_proj.weight", of=(every, slice(mixed, mixed + h)))

"""transformers' ``qwen2``, ``qwen3`` and ``qwen3_moe`` (Qwen/Qwen2.5-*, Qwen/Qwen3-*).

Qwen 2 has biases on queries, keys and values, Qwen 3 norms on queries and keys instead. Some layers may look back through a window only;
with ``qwen3_moe`` all or none do.
"""

from typing import Any

from ..fields import Fields, used
from ..keys import View
from .decoder import BIASES, Defaults, every_second
from .llama import Uniform, with_windows, written_windows

__all__ = ["Qwen2", "Qwen3", "Qwen3Moe"]


def _window(fields: Fields) -> int | None:
    window = fields.nullable("sliding_window", 4096)
    return window if fields.take("use_sliding_window", False) else None


class Qwen2(Uniform):
    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults = Defaults(vocab_size=151936, nheads_kv=32, max_length=32768)
    fixed = {"attention": {"qkv_bias": True, "out_bias": False}}
    tables = {"attention": {}, "mlp": {"d_intermediate": ("intermediate_size", 22016)}}

    def read(self, fields: Fields) -> dict[str, Any]:
        fields.expect("use_mrope", False)  # published files say so
        cfg, window, first = super().read(fields), _window(fields), fields.take("max_window_layers", 28)
        n = len(cfg["layers"]) // 2
        return with_windows(fields, cfg, [window if i >= first else None for i in range(n)], window)

    def write(self, view: View) -> dict[str, Any]:
        return super().write(view) | written_windows(view) | {"max_window_layers": 0}


class Qwen3(Qwen2):
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults = Defaults(vocab_size=151936, nheads_kv=32, headdim=128, max_length=32768)
    fixed = {"attention": {"qk_norm": True}}
    tables = Qwen2.tables | {"attention": {**BIASES, "norm_eps": ("rms_norm_eps", 1e-6)}}


class Qwen3Moe(Uniform):
    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    defaults = Defaults(vocab_size=151936, d_model=2048, n_layer=24, nheads_kv=4, max_length=32768)
    fixed = Qwen3.fixed
    tables = {
        "attention": Qwen3.tables["attention"],
        "mlp": {"d_intermediate": ("intermediate_size", 6144)},
        "moe": {
            "d_intermediate": ("moe_intermediate_size", 768), "num_experts": ("num_experts", 128, "num_local_experts"),
            "top_k": ("num_experts_per_tok", 8), "renormalize": ("norm_topk_prob", False),
        },
    }  # fmt: skip
    unused = ("max_window_layers", "shared_expert_intermediate_size")
    absent = {"mlp": {}}

    def read(self, fields: Fields) -> dict[str, Any]:
        cfg, step = super().read(fields), fields.take("decoder_sparse_step", 1)
        mixers, n, dense = cfg["mixers"], len(cfg["layers"]) // len(self.tables), fields.raw("mlp_only_layers") or []
        fields.expect("qkv_bias", False)
        fields.expect("use_qk_norm", True)
        sparse = [mixers["moe"]["num_experts"] > 0 and i not in dense and (i + 1) % step == 0 for i in range(n)]
        mixers["attention"]["window"] = _window(fields)
        layers = every_second(["attention"] * n, ["moe" if is_sparse else "mlp" for is_sparse in sparse])
        return cfg | {"layers": layers, "mixers": used(mixers, layers)}

    def write(self, view: View) -> dict[str, Any]:
        window = view.first("attention")["window"]
        return super().write(view) | {
            "use_sliding_window": window is not None, "sliding_window": window,
            "mlp_only_layers": [i for i, token in enumerate(view.layout[1::2]) if token == "mlp"],
        }  # fmt: skip

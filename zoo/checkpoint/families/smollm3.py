"""transformers' ``smollm3`` (HuggingFaceTB/SmolLM3-3B): llama with no positions in every fourth layer, where there may be a window."""

from typing import Any, ClassVar

from ..family import Fields, register
from ..files import CheckpointError
from ..keys import View
from ..rotary import written_rotary
from .decoder import every_second
from .llama import NO_IDS, Llama
from .windows import kinds_of_attention, written_windows

__all__ = ["SmolLM3"]


@register
class SmolLM3(Llama):
    """The converter of ``smollm3``."""

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    defaults: ClassVar[dict[str, Any]] = {
        "vocab": 128256, "d_model": 2048, "eps": 1e-6, "length": 32768, "tied": True,
    }  # fmt: skip

    def read(self, fields: Fields) -> dict[str, Any]:
        """Our config."""
        take, bias = fields.take, fields.take("attention_bias", False)
        fields.skip("max_window_layers")  # of Qwen's configs, from which the published one was made
        mlp = {"type": "mlp", "d_intermediate": take("intermediate_size", 11008), "bias": take("mlp_bias", False)}
        cfg = self.uniform(fields, {"mlp": mlp}, n=36, heads=16, kv=4, theta=2e6)
        n = len(cfg["layers"]) // 2
        turns = self._turns(fields, n)
        window = take("sliding_window", None) if take("use_sliding_window", False) else None
        if window is None:
            fields.skip("sliding_window")
        layers, attentions = kinds_of_attention(fields, [None if turned else window for turned in turns], window, turns)
        options = cfg["mixers"]["attention"] | {"qkv_bias": bias, "out_bias": bias}
        mixers = {name: options | attentions[name] for name in attentions}
        return cfg | {"layers": every_second(layers, ["mlp"] * n), "mixers": {**mixers, "mlp": mlp}}

    def _turns(self, fields: Fields, n: int) -> list[bool]:
        """Which layers have positions: despite its name, ``no_rope_layers`` holds a 1 for those."""
        every = fields.take("no_rope_layer_interval", 4)
        given = fields.data.get("no_rope_layers")
        fields.skip("no_rope_layers")
        given = [(i + 1) % every != 0 for i in range(n)] if given is None else given
        if not isinstance(given, list) or len(given) != n or not all(isinstance(turned, int) for turned in given):
            raise CheckpointError(
                f"{fields.file}: no_rope_layers is {given!r}, expected {n} numbers, 1 for a layer with positions. Correct the file."
            )
        return [turned != 0 for turned in given]

    def write(self, view: View) -> dict[str, Any]:
        """Their config."""
        attentions = [block[0] for block in view.blocks[::2]]
        a = next((part for part in attentions if part["rope"] is not None), attentions[0])
        mlp = view.first("mlp")
        return NO_IDS | self.written_trunk(view) | self.written_heads(view) | written_rotary(a.options) | written_windows(view) | {
            "attention_bias": a["qkv_bias"], "intermediate_size": mlp["d_intermediate"], "mlp_bias": mlp["bias"],
            "no_rope_layers": [int(part["rope"] is not None) for part in attentions],
        }  # fmt: skip

"""transformers' ``smollm3`` (HuggingFaceTB/SmolLM3-3B): llama with no positions in every fourth layer, where there may be a window."""

from typing import Any

from ..fields import Fields
from ..keys import View
from ..rotary import written_rotary
from .decoder import NO_IDS, Defaults
from .llama import Llama, Uniform, with_windows, written_windows

__all__ = ["SmolLM3"]


class SmolLM3(Uniform):
    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    defaults = Defaults(
        vocab_size=128256, d_model=2048, n_layer=36, nheads=16, nheads_kv=4, theta=2e6, max_length=32768, tied=True
    )
    tables = Llama.tables
    unused = (
        "sliding_window",
        "max_window_layers",
    )  # the latter of Qwen's configs, from which the published one was made

    def read(self, fields: Fields) -> dict[str, Any]:
        cfg = super().read(fields)
        turns = self._turns(fields, len(cfg["layers"]) // 2)
        window = fields.take("sliding_window", None) if fields.take("use_sliding_window", False) else None
        return with_windows(fields, cfg, [None if turned else window for turned in turns], window, turns)

    def _turns(self, fields: Fields, n: int) -> list[bool]:
        """Return whether each layer has positions: despite its name, ``no_rope_layers`` holds a 1 for those that do."""
        every = fields.take("no_rope_layer_interval", 4)
        given = fields.raw("no_rope_layers")
        given = [(i + 1) % every != 0 for i in range(n)] if given is None else given
        if not isinstance(given, list) or len(given) != n or not all(isinstance(turned, int) for turned in given):
            raise fields.wrong("no_rope_layers", given, f"{n} numbers, 1 for a layer with positions")
        return [turned != 0 for turned in given]

    def write(self, view: View) -> dict[str, Any]:
        attentions = [block[0] for block in view.blocks[::2]]
        turning = next((part for part in attentions if part["rope"] is not None), attentions[0])
        return NO_IDS | super().write(view) | written_rotary(turning.options) | written_windows(view) | {
            "no_rope_layers": [int(part["rope"] is not None) for part in attentions],
        }  # fmt: skip

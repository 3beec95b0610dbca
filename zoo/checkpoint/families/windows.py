"""Layers of which some look back through a sliding window only, and some have no positions, as Qwen and SmolLM 3 list them."""

from typing import Any

from ..fields import Fields
from ..keys import View
from .decoder import every_second

__all__ = ["with_windows", "written_windows"]

_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}


def with_windows(
    fields: Fields,
    cfg: dict[str, Any],
    windows: list[int | None],
    window: int | None,
    turns: list[bool] | None = None,
) -> dict[str, Any]:
    """Return a config of attention and MLPs in which every kind of attention has a name of its own.

    Args:
        fields: Their config; its ``layer_types`` come before ``windows``.
        cfg: Ours, with one attention for all layers.
        windows: Of each layer, how far it looks back.
        window: How far layers do that are listed as ``sliding_attention``; None if the config switches windows off.
        turns: Which layers have positions; all by default.
    """
    sliding = fields.kinds(_TYPES, [], "layer_types")
    if sliding and len(sliding) != len(windows):
        raise fields.error(f"layer_types lists {len(sliding)} layers, and there are {len(windows)}. Correct the file.")
    if window is None and any(sliding):
        raise fields.error(
            "layer_types has sliding_attention, but use_sliding_window and sliding_window give it no window."
        )
    windows = [window if slides else None for slides in sliding] if sliding else windows
    names, mixers = [], dict[str, Any]()
    for reach, turned in zip(windows, turns or [True] * len(windows), strict=True):
        name = ("attention" if reach is None else "local") + ("" if turned else "_nope")
        mixers[name] = cfg["mixers"]["attention"] | {"window": reach} | ({} if turned else {"rope": None})
        names.append(name)
    mlp = {"mlp": cfg["mixers"]["mlp"]}
    return cfg | {"layers": every_second(names, ["mlp"] * len(names)), "mixers": mixers | mlp}


def written_windows(view: View) -> dict[str, Any]:
    """The reverse: ``layer_types`` and the window; that there is only one shows when the result is read back."""
    windows = [block[0]["window"] for block in view.blocks[::2]]
    some = next((window for window in windows if window is not None), None)
    return {
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": some, "use_sliding_window": some is not None,
    }  # fmt: skip

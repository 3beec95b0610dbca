"""Layers of which some look back through a sliding window only, and some have no positions, as Qwen and SmolLM 3 list them."""

from typing import Any

from ..family import Fields
from ..files import CheckpointError
from ..keys import View

__all__ = ["kinds_of_attention", "written_windows"]

_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}


def kinds_of_attention(
    fields: Fields, windows: list[int | None], window: int | None, turns: list[bool] | None = None
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The name of every layer's attention, and what is special about each name.

    Args:
        fields: The config; its ``layer_types`` come before what the next argument says.
        windows: Of each layer, how far it looks back.
        window: How far layers do that are listed as ``sliding_attention``; None if the config switches windows off.
        turns: Which layers have positions; all by default.
    """
    sliding = fields.kinds(_TYPES, [], "layer_types")
    if sliding and len(sliding) != len(windows):
        raise CheckpointError(
            f"{fields.file}: layer_types lists {len(sliding)} layers, and there are {len(windows)}. Correct the file."
        )
    if window is None and any(sliding):
        raise CheckpointError(
            f"{fields.file}: layer_types has sliding_attention, but use_sliding_window and sliding_window give it no window."
        )
    windows = [window if slides else None for slides in sliding] if sliding else windows
    names, specials = [], dict[str, dict[str, Any]]()
    for reach, turned in zip(windows, turns or [True] * len(windows), strict=True):
        name = ("attention" if reach is None else "local") + ("" if turned else "_nope")
        specials[name] = {"window": reach} | ({} if turned else {"rope": None})
        names.append(name)
    return names, specials


def written_windows(view: View) -> dict[str, Any]:
    """The reverse: ``layer_types`` and the window; that there is only one shows when the result is read back."""
    windows = [block[0]["window"] for block in view.blocks[::2]]
    some = next((window for window in windows if window is not None), None)
    return {
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": some, "use_sliding_window": some is not None,
    }  # fmt: skip

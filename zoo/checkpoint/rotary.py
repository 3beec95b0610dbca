"""Rotary positions in the words of transformers' configs: what a file says becomes options of our attention, and back.

As transformers' ``RotaryEmbeddingConfigMixin`` reads them: ``rope_scaling``, where it is not empty, replaces all of ``rope_parameters``;
in either, ``rope_type`` comes before the older ``type``; ``rope_theta`` and ``partial_rotary_factor`` beside them fill in what they
lack. Only two classes read ``partial_rotary_factor`` (Bamba, Phi-3), the others would compute with whole heads; there it is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

from .fields import Fields

__all__ = ["rotary", "written_rotary"]

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# a context of one token is shorter than any wavelength: all of them are stretched alike
_LINEAR = (1.0, 4.0, 1.0)
# of other types, which ignore them in a config of these
_IDLE = "attention_factor beta_fast beta_slow short_factor long_factor mscale mscale_all_dim truncate".split()


def rotary(
    fields: Fields,
    size: int,
    *,
    theta: float = 1e4,
    partial: float | None = None,
    beside: bool = True,
    length: int = 2048,
) -> dict[str, Any]:
    """The options of attention that say how positions turn its heads of ``size`` channels.

    The class's defaults are ``theta``, the context ``length``, and the ``partial`` of a head that turns (``None`` where it does not ask).
    ``beside`` tells whether ``partial_rotary_factor`` counts beside ``rope_parameters`` too, and not only in it.
    """
    where, given = _settings(fields)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise fields.error(
            f"rope_type is {kind!r}; only 'default', 'linear' or 'llama3' in {where} can be computed by this version."
        )
    for key, value in given.items():
        if isinstance(value, dict):
            raise fields.error(
                f"{where}.{key} is an object. Positions that differ by type of layer cannot be computed by this version."
            )
        if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_LLAMA3, *_IDLE):
            raise fields.error(
                f"unknown field {where}.{key}. If it does not change what the model computes, remove it."
            )
    # in the object, else beside it, else the class's; a null in the object is no number, but for the part that turns
    theta = _positive(fields, where, given.get("rope_theta", fields.data.get("rope_theta", theta)), "rope_theta")
    part = given.get("partial_rotary_factor", fields.data.get("partial_rotary_factor") if beside else None)
    part = _positive(fields, where, partial or 1.0 if part is None else part, "partial_rotary_factor")
    turning = int(size * part)
    if turning != size and (partial is None or turning % 2 or not 0 < turning < size):
        head = f"{size} channels of a head (head_dim, or hidden_size / num_attention_heads)"
        why = f"{turning} of {head} would turn" if partial is not None else "its class turns whole heads"
        raise fields.error(
            f"partial_rotary_factor is {part} in or beside {where}; {why}, which cannot be computed by this version."
        )
    options = {"rope": theta, "rotary_dim": None if turning == size else turning}
    if kind == "default":
        return options
    context = fields.data.get("max_position_embeddings") or length
    given = {_LLAMA3[-1]: context} | given
    numbers = [_positive(fields, where, given.get(name), name) for name in _LLAMA3[: 4 if kind == "llama3" else 1]]
    return options | {"rope_scaling": numbers if kind == "llama3" else [*numbers, *_LINEAR]}


def written_rotary(a: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """The reverse of :func:`rotary`, nothing without positions; ``partial`` if the class reads ``partial_rotary_factor``."""
    if not a or a["rope"] is None:
        return {}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a["rope"]}
    if a["rope_scaling"]:
        factor, low, high, length = a["rope_scaling"]
        if length <= 2 * math.pi * low:  # all wavelengths are long
            rope |= {"rope_type": "linear", "factor": factor}
        else:
            rope |= {"rope_type": "llama3"} | dict(zip(_LLAMA3, (factor, low, high, int(length)), strict=True))
    if partial:
        part = a["rotary_dim"] / a["headdim"]
        # theirs rounds the product down
        rope["partial_rotary_factor"] = part if int(a["headdim"] * part) == a["rotary_dim"] else math.nextafter(part, 2)
    return {"rope_parameters": rope}


def _settings(fields: Fields) -> tuple[str, dict[str, Any]]:
    names = ("rope_scaling", "rope_parameters")
    fields.skip(*names, "rope_theta", "partial_rotary_factor")
    for name in names:
        if not isinstance(fields.raw(name), dict | None):
            raise fields.wrong(name, fields.raw(name), "an object")
    where = names[0] if fields.raw(names[0]) else names[1]
    return where, fields.raw(where, {})


def _positive(fields: Fields, where: str, value: Any, key: str) -> float:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf:
        raise fields.error(f"{key} is {value!r} in or beside {where}, expected a positive number. Correct the file.")
    return number

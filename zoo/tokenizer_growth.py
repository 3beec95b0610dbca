"""The growth of a text by a ``tokenizer.json``: a few rules that replace a letter by a thousand, one after another, take gigabytes."""

import base64
import math
from typing import Any

__all__ = ["check_growth"]

# published ones reach 9: a space becomes a character of three bytes, perhaps twice
_MOST = 1000
# of what one character becomes in a compiled map; those of Unicode's compatibility forms have 33 bytes
_LONGEST = 1000
_STEPS = ("normalizers", "pretokenizers", "processors", "decoders")


def check_growth(content: dict[str, Any]) -> None:
    """Raise a ``ValueError`` if what a ``tokenizer.json`` says makes a text, or decoded tokens, more than 1,000 times as long."""
    for parts in (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)):
        times = math.prod(_growth(content.get(part)) for part in parts)
        if times > _MOST:
            raise ValueError(
                f"its {' and '.join(parts)} make a text {times:.3g} times as long, more than {_MOST} times"
            )


def _growth(step: Any) -> float:
    if not isinstance(step, dict):
        return 1.0
    times = math.prod(_growth(inner) for name in _STEPS for inner in _items(step.get(name)))
    pattern = step.get("pattern")
    found = pattern.get("String") if isinstance(pattern, dict) else None
    # a regular expression may find single letters
    times *= max(1.0, _size(step.get("content")) / max(1, _size(found)))
    times *= 1 + _size(step.get("prepend"))
    times *= max(1, len(_items(step.get("single"))), len(_items(step.get("pair"))))
    if isinstance(packed := step.get("precompiled_charsmap"), str):
        blob = base64.b64decode(packed)
        # the size of a table of places, the table, and the texts that it points to, each ended by a zero
        texts = blob[4 + int.from_bytes(blob[:4], "little") :].split(b"\0")
        if (longest := max(map(len, texts))) > _LONGEST:
            raise ValueError(f"its normalizer makes a character {longest} bytes long, more than {_LONGEST}")
    return times


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _size(text: Any) -> int:
    return len(text.encode("utf-8", errors="replace")) if isinstance(text, str) else 0

"""Options of how tokens are chosen, checked before anything heavy is imported: the standard library is all that this needs."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from .options import at_least, check_options, option, within

__all__ = ["TEMPERATURES", "SamplingOptions"]

_PANEL = "Sampling"
# of what logits are changed by: beyond it, those of float32 are no numbers any more, and text is chosen by nothing
_LARGEST = 1e30
TEMPERATURES = (f"at least {1 / _LARGEST:g}, or 0", lambda value: value == 0 or value >= 1 / _LARGEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of how a token is chosen from logits; they act in the order of the fields.

    Raises:
        ValueError: A value that no choice can be made with.
    """

    logit_bias: Any = option(  # noqa: RUF009  # a field, as the others
        None, "Added to the logits of tokens, a number by id; -inf forbids one. As a text, JSON: '{\"13\": -1.5}'.", unset="nothing",
        typed=str | None, panel=_PANEL,
    )  # fmt: skip
    repetition_penalty: float = option(
        1.0, "Above 1, tokens that stand in the prompt or were chosen become less likely (arXiv:1909.05858, section 4.1).",
        bound=within(1 / _LARGEST, _LARGEST, closed=True), panel=_PANEL,
    )  # fmt: skip
    frequency_penalty: float = option(
        0.0,
        "Taken off a token's logit for each time that it was chosen.",
        bound=within(-_LARGEST, _LARGEST, closed=True),
        panel=_PANEL,
    )
    presence_penalty: float = option(
        0.0,
        "Taken off the logit of a token that was chosen.",
        bound=within(-_LARGEST, _LARGEST, closed=True),
        panel=_PANEL,
    )
    temperature: float = option(
        0.0, "Logits are divided by it; 0 chooses the likeliest.", bound=TEMPERATURES, panel=_PANEL
    )
    top_k: int = option(0, "Choose among the k likeliest tokens; 0 for all.", bound=at_least(0), panel=_PANEL)
    top_p: float = option(
        1.0, "Choose among the likeliest tokens that make up this probability (arXiv:1904.09751).",
        bound=("above 0, up to 1", lambda x: 0 < x <= 1), panel=_PANEL,
    )  # fmt: skip
    min_p: float = option(
        0.0, "Leave out tokens below this share of the likeliest one's probability (arXiv:2407.01082).",
        bound=within(0, 1), panel=_PANEL,
    )  # fmt: skip
    typical_p: float = option(
        1.0, "Choose among the tokens whose surprise is nearest to the expected one, and that make up this probability (arXiv:2202.00666).",
        bound=("above 0, up to 1", lambda x: 0 < x <= 1), panel=_PANEL,
    )  # fmt: skip
    seed: int = option(
        0,
        "Of the draws: a text follows from it, its prompt and its number among the samples.",
        bound=at_least(0),
        panel=_PANEL,
    )

    def __post_init__(self):
        check_options(self, "generate")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def draws(self) -> bool:
        """Tell whether chance decides; a temperature of 0 leaves it none."""
        return self.temperature > 0

    def values(self) -> dict[str, Any]:
        """Return these options by name, for another call."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingOptions)}


def _biases(given: Any) -> dict[int, float]:
    wanted = f"Give token ids with a number up to {_LARGEST:g} each, or -inf."
    if isinstance(given, str):
        try:
            given = json.loads(given.replace("-inf", "-Infinity"))
        except json.JSONDecodeError as e:
            raise ValueError(f"generate(logit_bias={given!r}): is not JSON ({e}). {wanted}") from e
    if not isinstance(given, Mapping):
        raise ValueError(f"generate(logit_bias={given!r}): is a {type(given).__name__}. {wanted}")
    biases: dict[int, float] = {}
    for token, bias in given.items():
        try:
            number, value = int(token), float(bias)
        except (TypeError, ValueError):
            number, value = -1, math.nan
        whole = isinstance(token, str) or number == token
        if number < 0 or not whole or not (value == -math.inf or abs(value) <= _LARGEST):
            raise ValueError(f"generate(logit_bias={{{token!r}: {bias!r}}}): {wanted}")
        biases[number] = value
    return biases

"""Checks of a mixer's options, each of one option or a few."""

from typing import Any


class OptionError(ValueError):
    """A mixer's option has a value that cannot work. ``field`` names the option, so that a config error can point at it."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


def check(ok: bool, field: str, message: str) -> None:
    """Raise an :class:`OptionError` for ``field`` unless ``ok``."""
    if not ok:
        raise OptionError(field, message)


def check_positive(**sizes: int | float | None) -> None:
    """Every size given is at least 1."""
    for field, value in sizes.items():
        check(value is None or value >= 1, field, f"{value} is not a size. Use 1 or more.")


def check_known(field: str, value: object, known: Any) -> None:
    """``value`` is one of ``known``."""
    check(value in known, field, f"unknown value {value!r}. Known: {', '.join(map(repr, known))}.")


def check_divides(field: str, value: int, name: str, whole: int, instead: str = "") -> None:
    """``value`` divides ``whole``, which the message calls ``name``."""
    check(
        whole % value == 0,
        field,
        f"{name} = {whole} is not a multiple of {field} = {value}. Pick {field} from the divisors of {whole}{instead}.",
    )


def check_dt(dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """The range that step sizes are drawn from is positive and not empty."""
    check(dt_min > 0, "dt_min", f"{dt_min} is not a positive step size. The usual value is 0.001.")
    check(dt_max >= dt_min, "dt_max", f"{dt_max} is below dt_min = {dt_min}. Use dt_max >= dt_min.")
    floor = f"{dt_init_floor} is negative. Use 0 or more; the usual value is 0.0001."
    check(dt_init_floor >= 0, "dt_init_floor", floor)


def check_rank(adapter_rank: int) -> None:
    """A rank may be 0, for no adapter."""
    check(adapter_rank >= 0, "adapter_rank", f"{adapter_rank} is not a rank. Use 0 for no adapter, or 1 or more.")

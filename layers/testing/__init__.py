"""The mixer contract as tests: ``check_mixer(MyMixer)`` holds a class to every promise in :mod:`hybridzoo.layers.base`.

Every promise is a function of a :class:`Case`, so that a test suite can run them one by one: ``PROMISES`` is the table. They
compare a mixer with itself (whole and in pieces, alone and in a batch, compiled and not), in float64, where two ways to the
same number agree to 1e-9 or are two different things. That the number is the right one needs an independent judge, which only
the author knows.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from ..base import Mixer
from . import module, sequence, states  # noqa: F401  they fill the table
from .case import PROMISES, Case
from .faults import Fault, diagnose
from .module import counted_flops

__all__ = ["PROMISES", "Case", "check_mixer", "counted_flops"]


def check_mixer(
    make: Callable[..., Mixer],
    *,
    d_model: int = 32,
    options: dict[str, Any] | None = None,
    name: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    skip: Collection[str] = (),
) -> None:
    """Hold a mixer to the whole contract. Runs on the CPU in some seconds.

    Args:
        make: The class, or a function that builds it from ``d_model`` and ``options``.
        d_model: Channels to test with.
        options: Options to test with; small sizes keep it quick.
        name: For messages; the class's name by default.
        seed: Of parameters and inputs.
        dtype: Of the comparisons; float32 for a mixer that cannot compute in float64, also bfloat16.
        device: Where the mixer runs.
        skip: Names of promises to leave out, from ``PROMISES``.

    Raises:
        AssertionError: A promise is broken: which, and by how much. Of the commonest faults the first line is the name (not causal, state
            ignored, step disagrees with forward, ...) and the second the remedy.
        ValueError: ``skip`` names an unknown promise.
    """
    if unknown := set(skip) - set(PROMISES):
        raise ValueError(f"skip: unknown promise {sorted(unknown)[0]!r}. Known: {', '.join(PROMISES)}.")
    case = Case(make, d_model, options or {}, name, seed, dtype, device)
    try:
        diagnose(case, skip)
    except Fault as e:
        doc = PROMISES[e.promise].__doc__ or ""
        raise AssertionError(
            f"{case}: {e.what}.\n{e.remedy}\n{case} breaks the promise {e.promise!r}: {doc.splitlines()[0]}"
        ) from e
    for promise, test in PROMISES.items():
        if promise in skip:
            continue
        try:
            test(case)
        except Exception as e:
            raise AssertionError(f"{case} breaks the promise {promise!r} ({test.__doc__}): {e}") from e

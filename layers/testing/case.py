"""A mixer under test, and what its tests share."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base import Mixer, Seq, State

# in bfloat16, ways to the same number differ by the roundings of what they store in between
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}

PROMISES: "dict[str, Callable[[Case], None]]" = {}


def promise(fn: "Callable[[Case], None]") -> "Callable[[Case], None]":
    """Enter a test in the table; its docstring is the promise, in a sentence."""
    PROMISES[fn.__name__] = fn
    return fn


@dataclasses.dataclass(frozen=True)
class Case:
    """A mixer under test, and how it is tested: the arguments of :func:`.check_mixer`."""

    make: Callable[..., Mixer]
    d_model: int = 32
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __str__(self) -> str:
        return self.name or str(getattr(self.make, "__name__", self.make))

    def new(self) -> Mixer:
        """The mixer as it is built; one that mixes maps takes the rows that say nothing of themselves as such."""
        mixer = self.make(d_model=self.d_model, **self.options)
        if isinstance(mixer, Mixer) and mixer.can("grid"):
            mixer.register_forward_pre_hook(_on_maps, with_kwargs=True)
        return mixer

    def build(self, dtype: torch.dtype | None = None, seed: int | None = None) -> Mixer:
        """The mixer in ``dtype``, with no parameter left at a value that hides its use (zeros, equal ones)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed if seed is None else seed)
            mixer = self.new()
            with torch.no_grad():
                for p in mixer.parameters():
                    p.mul_(1 + 0.2 * (2 * torch.rand_like(p) - 1))
                    if not p.any():
                        p.normal_(std=0.1)
        return mixer.to(self.device, dtype or self.dtype)

    def x(self, b: int, length: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Random inputs, ``(b, length, d_model)``."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 10 * seed + b)
        x = torch.randn(b, length, self.d_model, generator=generator, dtype=torch.float64)
        return x.to(self.device, dtype or self.dtype)

    def close(self, got: Tensor, want: Tensor, what: str) -> None:
        """Fail unless the two agree to the dtype's tolerance, relative to the larger of 1 and the values."""
        ensure(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        error = (got - want).abs().max().item() if want.numel() else 0.0
        limit = fault_limit(self, want)
        ensure(error <= limit, f"{what}: differs by {error:.2e}, the limit is {limit:.2e}")


def _on_maps(mixer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if len(args) > 2 or kwargs.get("seq") is not None:
        return None
    b, length, _ = args[0].shape
    return args, {**kwargs, "seq": Seq.from_grid(squarish(length), b, length, args[0].device)}


def squarish(length: int) -> tuple[int, int]:
    """The sizes of a map of ``length`` tokens that is nearest to a square, and no higher than wide."""
    h = next(h for h in range(math.isqrt(length), 0, -1) if length % h == 0)
    return h, length // h


def fault_limit(case: Case, want: Tensor) -> float:
    """The difference that is no fault yet: the tolerance of the dtype, relative to the larger of 1 and the values."""
    return _TOLERANCE[case.dtype] * max(1.0, want.abs().max().item() if want.numel() else 0.0)


def ensure(ok: bool, message: str) -> None:
    """Fail with ``message`` unless ``ok``; unlike ``assert``, also under ``python -O``."""
    if not ok:
        raise AssertionError(message)


@torch.no_grad()
def decode(mixer: Mixer, x: Tensor, state: Any) -> Tensor:
    """Feed ``x`` token by token through ``step``."""
    return torch.stack([mixer.step(token, state) for token in x.unbind(1)], 1)


def state_at(mixer: Mixer, x: Tensor) -> Any:
    """The state after ``x``."""
    return mixer(x, return_state=True)[1]


def trained(mixer: Mixer) -> dict[str, Tensor]:
    """The parameters that take a gradient, by name."""
    return {name: p for name, p in mixer.named_parameters() if p.requires_grad}


def tensors_of(state: Any) -> list[tuple[str, Tensor]]:
    """Every tensor of a state or a tuple of states, with its field's name."""
    if isinstance(state, State):
        return list(state.tensors())
    ensure(isinstance(state, tuple), f"a state is a State or a tuple of states, got {type(state).__name__}")
    return [pair for part in state for pair in tensors_of(part)]

"""The CUDA products of few rows: launches of ``few_rows.cu``."""

from torch import Tensor

from ..dispatch import Facts
from ..gpu import nvrtc
from ..gpu.operands import refuse_tensors
from .inputs import StepProduct


def misfit(i: StepProduct) -> str | None:
    """Say what of a call the kernel cannot read, or ``None``."""
    return None


def refuse(facts: Facts) -> str | None:
    """Say why the CUDA kernel cannot do a product, or ``None`` if it can; see :class:`.dispatch.Backend`."""
    return refuse_tensors(facts) or nvrtc.unavailable() or "the CUDA kernel is still to be written"


def step_linear(i: StepProduct) -> Tensor:
    """Norm, product, and what is behind it, in one launch."""
    raise NotImplementedError

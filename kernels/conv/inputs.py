"""The tensors that a causal convolution reads, as one value which all its backends take, and its registered ops' common parts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..derivatives import differentiable_once
from ..numerics import blank
from ..operators import like
from ..torch_private import name_of

SCHEMA = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? doc, bool silu"
FORWARD = f"({SCHEMA}) -> Tensor"
BACKWARD = f"(Tensor gout, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"


class ConvInputs(NamedTuple):
    """The tensors of :func:`.op.causal_conv1d`, and the documents of its ``seq``; their gradients are one of these, too."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    initial_state: Tensor | None = None
    doc: Tensor | None = None  # (b, l) int64, the document of a token


def connect(forward: Any, backward: Any) -> None:
    """Make the op ``forward`` differentiable by the op ``backward``, and give both their fakes."""
    run = getattr(torch.ops.hybridzoo, name_of(backward).removeprefix("hybridzoo::"))

    def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.silu = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx: Any, gout: Tensor) -> tuple:
        # read once: activation checkpointing recomputes them at the first access and refuses a second
        *inputs, doc = ctx.saved_tensors
        grads = run(gout, *inputs, doc, ctx.silu)
        return (*(None if x is None else g for g, x in zip(grads, inputs, strict=True)), None, None)

    forward.register_fake(lambda x, *_: blank(x))
    backward.register_fake(lambda gout, x, weight, bias, state, *_: like(x, x, weight, bias, state))
    differentiable_once(backward)
    forward.register_autograd(gradients, setup_context=setup)

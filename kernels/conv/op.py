"""The public op: what it means, what it accepts, and which backend answers."""

from typing import Any

from torch import Tensor

from .. import checks
from ..dispatch import CHUNKED, KERNELS, LOOP, Backend, choose, facts_of, register
from ..gpu import launch_plans
from ..seq import Seq, clear_padding
from . import chunked, cuda, library, reference
from .inputs import ConvInputs

register(
    "causal_conv1d",
    Backend("cuda", KERNELS, cuda.refuse, cuda.causal_conv1d),
    Backend("causal_conv1d", "causal_conv1d's CUDA kernel", library.refuse, library.causal_conv1d),
    Backend("chunked", CHUNKED, run=chunked.causal_conv1d),
    Backend("reference", LOOP, run=reference.causal_conv1d, plain=True),
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq: Seq | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Any:
    """A causal depthwise convolution: ``y_t = bias + sum_j weight[:, k-1-j] x_{t-j}``, over the inputs of t's own document.

    Args:
        x: ``(b, l, d)``.
        weight: ``(d, k)``, the last column for the current input.
        bias: ``(d,)``.
        activation: ``"silu"``, applied to the result, or ``None``.
        initial_state: ``(b, k-1, d)``, the inputs before the row; zeros if absent. Differentiable.
        seq: Documents and padding: no token reads another document's inputs.
        return_final_state: Also return the last k-1 real inputs of each row's last document, zeros before its start. Differentiable.
        backend: ``"chunked"``, ``"reference"``, ...; chosen automatically if absent.

    Returns:
        ``(b, l, d)`` in x's dtype, or that and the state ``(b, k-1, d)`` in x's dtype. Values at padding mean nothing.

    Raises:
        ValueError: Shapes, dtypes, devices or the activation do not fit.
        BackendError: The backend asked for cannot do this call.
    """
    where, given = "causal_conv1d", ConvInputs(x, weight, bias, initial_state)
    plan = launch_plans.find(where, given, activation, backend) if seq is None else None
    if plan is not None:
        out = cuda.causal_conv1d(given, activation == "silu", plan)
        return (out, chunked.last_inputs(x, weight.shape[1], initial_state, seq)) if return_final_state else out
    checks.floating(where, "x", x, 3, "(b, l, d)")
    checks.floating(where, "weight", weight, 2, "(d, k)")
    (b, l, d), k = x.shape, weight.shape[1]
    checks.shape(where, "weight", weight, (d, k), "(d, k)")
    checks.shape(where, "bias", bias, (d,), "(d,)")
    checks.shape(where, "initial_state", initial_state, (b, k - 1, d), "(b, k-1, d)")
    checks.floats(where, **given._asdict())
    checks.same_device(where, "x", **given._asdict())
    checks.fits(where, seq, x)
    silu = checks.is_silu(where, activation)
    (x,) = clear_padding(seq, x)
    # rows of one document read nothing behind padding, which stands at their end
    i = given._replace(x=x, doc=seq.doc if seq is not None and seq.packed else None)
    facts = facts_of(x, initial_state, seq, return_final_state, width=k, d=d)
    chosen = choose(where, backend=backend if l else "reference", **facts)
    (out,) = clear_padding(seq, chosen.run(i, silu))
    if chosen.name == "cuda" and seq is None:
        launch_plans.keep(where, i, lambda: cuda.plan_of(i, silu), activation, backend)
    return (out, chunked.last_inputs(x, k, initial_state, seq)) if return_final_state else out

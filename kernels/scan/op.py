"""The public op: what it means, what it accepts, and which backend answers.

Dimension letters are those of the package's docstring. ``seq`` says where documents and padding are (:class:`.seq.Seq`); states are
float32, or float64 when the inputs are.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import checks
from ..dispatch import CHUNKED, KERNELS, LOOP, Backend, choose, facts_of, register
from ..gpu import launch_plans
from ..seq import Seq, clear_padding, marks_of
from . import chunked, chunked_paths, cuda, library, low_rank, reference
from .inputs import ScanInputs
from .paths import Path, is_order, over_paths, per_path, walks

register(
    "selective_scan",
    Backend("cuda", KERNELS, cuda.refuse, cuda.selective_scan),
    Backend("mamba_ssm", "mamba_ssm's CUDA scan", library.refuse, library.selective_scan),
    Backend("chunked", CHUNKED, run=chunked.selective_scan),
    Backend("reference", LOOP, run=reference.selective_scan, plain=True),
)
# of a scan by our kernels; PyTorch's operations walk in place too (IN_PLACE), a library scans what was gathered and multiplied before
register(
    "paths",
    Backend("cuda", "our kernels walk over the tokens where they are", cuda.refuse),
    Backend("gather", "one scan per path over gathered tokens", plain=True),
)
register(
    "dt_weight",
    Backend("cuda", "our scan forms the step sizes itself", lambda facts: cuda.refuse(facts) or low_rank.refuse(facts)),
    Backend("product", "a matrix product in front of the scan", plain=True),
)

IN_PLACE = {"chunked": chunked_paths.selective_scan, "reference": reference.over_paths}


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_weight: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    seq: Seq | None = None,
    paths: Sequence[Sequence[int] | Tensor] | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Any:
    """The selective scan of Mamba (arXiv:2312.00752, Algorithm 2), B discretised by Euler's rule as in the authors' code.

    ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t . h_t + D u_t``, ``out = y * silu(z)``.

    Args:
        u: ``(b, l, d)``, the input.
        dt: ``(b, l, d)``, step sizes before bias and softplus; not negative after them.
        A: ``(d, n)``, decay rates, negative.
        B: ``(b, l, g, n)`` or ``(b, l, n)``, how inputs enter the state; channel c belongs to group ``c // (d / g)``.
        C: As B, how the state is read.
        D: ``(d,)``, the skip.
        z: ``(b, l, d)``, the gate.
        dt_bias: ``(d,)``, added to ``dt``.
        dt_weight: ``(d, r)``: ``dt`` is ``(b, l, r)``, and its product with this weight, read in its type, are the step sizes. Our
            CUDA kernels form them as they scan (16 bits, d_state up to 16, r up to 16), and PyTorch's operations those of one
            path or block at a time; other calls, in a product in front.
        dt_softplus: Pass the biased ``dt`` through softplus.
        initial_state: ``(b, d, n)``, what an earlier call left; zeros if absent. Differentiable.
        seq: Documents and padding: the state is dropped where a document starts, and padding leaves it alone.
        paths: Walks ``(n_outer, n_inner, stride_outer, stride_inner, reverse)`` over the same ``l`` tokens: step t visits token
            ``(t // n_inner) * stride_outer + (t % n_inner) * stride_inner``, from the end if reversed. Any other walk is an
            int64 tensor ``(l,)`` of the tokens as they are visited. One scan per path, outputs summed at the tokens. ``dt, A, B, C, D,
            dt_bias, dt_weight, initial_state`` are shared, or have a leading axis of one per path.
        return_final_state: Also return the state after each row's last real token. Differentiable.
        backend: ``"chunked"``, ``"reference"``, ...; chosen automatically if absent (:mod:`hybridzoo.kernels.dispatch`).

    Returns:
        ``(b, l, d)`` in u's dtype, or that and the state ``(b, d, n)``, with paths ``(k, b, d, n)``. Values at padding mean nothing. NaN
        and infinity stay in their own document, gradients included (those of weights add up over all documents).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together.
        BackendError: The backend asked for cannot do this call.
    """
    where, plain = "selective_scan", seq is None and paths is None
    given = ScanInputs(u, dt, A, B, C, D, z, dt_bias, initial_state, None, None, dt_weight)
    plan = launch_plans.find(where, given, dt_softplus, backend) if plain else None
    if plan is not None:
        out, state = cuda.selective_scan(given, dt_softplus, final=return_final_state, plan=plan)
        return (out, state) if return_final_state else out
    checks.floating(where, "u", u, 3, "(b, l, d)")
    b, l, d = u.shape
    checks.shape(where, "z", z, (b, l, d), "(b, l, d) like u")
    checks.floats(where, **given._asdict())
    checks.same_device(where, "u", **given._asdict())
    checks.fits(where, seq, u)
    u, dt, B, C, z = clear_padding(seq, u, dt, B, C, z)
    leaves = (dt, A, B, C, dt_bias, initial_state, dt_weight)
    facts = facts_of(u, initial_state, seq, return_final_state, *leaves, d_state=A.shape[-1])
    # without a token there is nothing for a kernel to do
    backend = backend if l else "reference"
    chosen = choose(where, backend=backend, **facts)
    if chosen.name != "cuda" or paths is not None:
        B, C = (m.unsqueeze(2) if m.dim() == 3 else m for m in (B, C))
    walked = None if paths is None else walks(where, paths, l, seq)
    # an order that is listed token by token is for others than our kernels: what they scan is gathered then
    own = chosen.name == "cuda" and (
        walked is None or (not any(map(is_order, walked)) and choose("paths", backend=backend, **facts).name == "cuda")
    )
    reset, valid = marks_of(seq)
    i = given._replace(u=u, dt=dt, B=B, C=C, z=z, reset=reset, valid=valid)
    for each in [i] if walked is None else per_path(len(walked), i):
        _check_scan(where, each)
    if own:
        out, state = cuda.selective_scan(i, dt_softplus, walked)
        # whether a low-rank form of another rank can be read as it is depends on what lies behind its last row
        if plain and (dt_weight is None or dt_weight.shape[-1] % 8 == 0):
            launch_plans.keep(where, given, lambda: cuda.plan_of(given, out, dt_softplus), dt_softplus, backend)
    else:
        out, state = _run(chosen, i, dt_softplus, walked)
    (out,) = clear_padding(seq, out)
    return (out, state) if return_final_state else out


def _run(chosen: Backend, i: ScanInputs, dt_softplus: bool, walked: list[Path] | None) -> tuple[Tensor, Tensor]:
    if walked is not None and chosen.name in IN_PLACE:
        return IN_PLACE[chosen.name](i, dt_softplus, walked)

    def run(x: ScanInputs) -> tuple[Tensor, Tensor]:
        if x.dt_weight is not None and chosen.name != "cuda":
            x = x._replace(dt=low_rank.step_sizes(x.dt, x.dt_weight), dt_weight=None)
        return chosen.run(x, dt_softplus)

    return run(i) if walked is None else over_paths(run, walked, i)


def _check_scan(where: str, i: ScanInputs) -> None:
    (b, l, d), A, B, C = i.u.shape, i.A, i.B, i.C
    checks.floating(where, "A", A, 2, "(d, n)")
    checks.floating(where, "B", B, 3 if B.dim() == 3 else 4, "(b, l, g, n) or (b, l, n)")
    n, g = A.shape[1], B.shape[2] if B.dim() == 4 else 1

    def rows(m: Tensor) -> tuple[tuple[int, ...], str]:
        return ((b, l, n), "(b, l, n)") if m.dim() == 3 and g == 1 else ((b, l, g, n), "(b, l, g, n)")

    checks.groups(where, d, g, "d")
    if i.dt_weight is None:
        checks.shape(where, "dt", i.dt, (b, l, d), "(b, l, d) like u")
    else:
        r = i.dt.shape[-1]
        checks.shape(where, "dt", i.dt, (b, l, r), "(b, l, r), beside a dt_weight")
        checks.floating(where, "dt_weight", i.dt_weight, 2, "(d, r)")
        checks.shape(where, "dt_weight", i.dt_weight, (d, r), "(d, r), dt being (b, l, r)")
    checks.shape(where, "A", A, (d, n), "(d, n)")
    checks.shape(where, "B", B, *rows(B))
    want, letters = rows(C)
    checks.shape(where, "C", C, want, f"{letters} like B")
    checks.shape(where, "D", i.D, (d,), "(d,)")
    checks.shape(where, "dt_bias", i.dt_bias, (d,), "(d,)")
    checks.shape(where, "initial_state", i.initial_state, (b, d, n), "(b, d, n)")

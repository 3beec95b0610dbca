"""The commonest faults of a new mixer, named as what they are.

A mixer that reads later tokens also steps wrongly, chunks wrongly and pads wrongly, and the first promise that happens to be
tested says so in its own terms. Each function here looks for one fault and says its name and the remedy; :func:`diagnose` runs
them in an order in which none can be mistaken for another: what a plain forward does, then the state, then ``step``, then ``seq``.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ..base import Mixer, Seq, State, map_state
from .case import Case, fault_limit, tensors_of

__all__ = ["Fault", "diagnose"]

_BATCH, _LENGTH, _CUT = 2, 8, 5
_HONOUR = (
    "Honour seq (layers/mamba.py shows how), or declare what you can do, capabilities = frozenset({'state'}), and call "
    "self.require('%s') where seq is given."
)
# by the beginning of the fault
_REMEDIES = {
    "cannot be built": "A mixer takes d_model first, then its options, all with annotations and defaults.",
    "is no hybridzoo.Mixer": "Derive the class from hybridzoo.Mixer.",
    "wrong output: forward": "Without return_state, forward gives one tensor of its input's shape, (b, l, d).",
    "changes its input in place": "Write y = f(x) instead of x.f_() or x += ...; the residual stream still needs x.",
    "parameters re-initialised: forward": "Draw initial values in reset_parameters, which __init__ calls once, and nowhere else.",
    "not reproducible": "A mixer draws no random numbers in forward; it has no dropout of its own.",
    "parameters re-initialised: after": "Everything that forward reads is a parameter or a buffer, and nothing is drawn once it is loaded.",
    "mixes the rows": "Dimension 0 is the batch and dimension 1 the tokens; nothing is averaged or normalised over the batch.",
    "not causal": "Output t may read tokens 0 to t: pad a convolution on the left only, mask attention, and take no mean, "
    "norm or softmax over the tokens.",
    "state not returned: forward(x, return_state=True) gives (), although": "Return what the next token needs to know, as a dataclass "
    "that derives from hybridzoo.layers.State; or, if that cannot be, declare capabilities without 'state'.",
    "state not returned": "Return (y, state) then; without a state, (y, ()).",
    "state of a wrong kind": "A state is a dataclass of tensors, batch first, that derives from hybridzoo.layers.State; () for a mixer "
    "without one.",
    "state forgotten": "Return the state after the last token, not the one that the call began with.",
    "changes the state it is given": "Compute a new state (state = state.map(torch.clone) at the start, or h = a * h + b instead of "
    "h.mul_(a)).",
    "state ignored": "Start from the state that is given; init_state, or zeros, only where it is None.",
    "state wrong": "The state must hold everything that later tokens need: the recurrence, the convolution's last inputs, the position.",
    "no first state": "init_state returns the state before the first token, of the same class as forward's.",
    "wrong output: step": "step takes one token per row, (b, d), gives (b, d), and updates the state in place.",
    "step does not update the state": "step works in place: copy_state(state, new) at its end.",
    "step changes its input": "Write y = f(x) instead of x.f_() or x += ...",
    "step disagrees": "step and forward are two ways to one result; without a step of its own, a mixer has one that calls forward.",
    "ignores seq: a packed": _HONOUR % "packing",
    "ignores seq: padding": _HONOUR % "padding",
    "": "layers/base.py says what every call takes and returns.",
}
_FAULTS: list[tuple[tuple[str, ...], Callable[[Case, Mixer], None]]] = []


class Fault(AssertionError):
    """A fault with a name: what is wrong, in a few words, and the remedy; ``promise`` is the one it breaks."""

    promise = "shapes_and_dtypes"

    def __init__(self, what: str):
        super().__init__(what)
        self.what = what
        self.remedy = next(remedy for start, remedy in _REMEDIES.items() if what.startswith(start))


def diagnose(case: Case, skip: Collection[str]) -> None:
    """Raise :class:`Fault` for the first fault found, unless every promise that it breaks is skipped."""
    mixer = _built(case)
    with torch.no_grad():
        for promises, look in _FAULTS:
            if broken := [p for p in promises if p not in skip]:
                try:
                    look(case, mixer)
                except Fault as e:
                    e.promise = broken[0]
                    raise


def _breaks(*promises: str, needed: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Look for a fault of mixers with the capability ``needed``, given inputs and others."""

    def enter(look: Callable[..., None]) -> Callable[..., None]:
        def with_inputs(case: Case, mixer: Mixer) -> None:
            if needed is None or mixer.can(needed):
                look(case, mixer, case.x(_BATCH, _LENGTH), case.x(_BATCH, _LENGTH, seed=1))

        _FAULTS.append((promises, with_inputs))
        return look

    return enter


def _built(case: Case) -> Mixer:
    try:
        mixer = case.build()
    except Exception as e:
        raise Fault(f"cannot be built: {_first_line(e)}") from e
    if not isinstance(mixer, Mixer):
        raise Fault(f"is no hybridzoo.Mixer but a {type(mixer).__name__}")
    return mixer


def _call(what: str, fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except Exception as e:
        raise Fault(f"{what} raises {_first_line(e)}") from e


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).strip() or 'without a message').splitlines()[0]}"


def _shown(y: Any) -> str:
    return f"{tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"


def _far(case: Case, a: Tensor, b: Tensor) -> float:
    """Return by how much two tensors differ; 0 within the tolerance."""
    error = (a - b).abs().max().item()
    return error if error > fault_limit(case, b) else 0.0


@_breaks("shapes_and_dtypes")
def _shape(case: Case, mixer: Mixer, x: Tensor, other: Tensor) -> None:
    y = _call("forward(x)", lambda: mixer(x.clone()))
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise Fault(f"wrong output: forward of {tuple(x.shape)} gives {_shown(y)}")


@_breaks("shapes_and_dtypes", "batch_invariance", "chunks_equal_whole")
def _input(case: Case, mixer: Mixer, x: Tensor, other: Tensor) -> None:
    mixer(given := x.clone())
    if not torch.equal(given, x):
        raise Fault("changes its input in place")


@_breaks("copies", "initialisation", "batch_invariance")
def _parameters(case: Case, mixer: Mixer, x: Tensor, other: Tensor) -> None:
    before = {name: t.clone() for name, t in mixer.state_dict().items()}
    first = mixer(x.clone())
    for name, t in mixer.state_dict().items():
        if not torch.equal(t, before[name]):
            raise Fault(f"parameters re-initialised: forward changes {name}")
    if far := _far(case, mixer(x.clone()), first):
        raise Fault(f"not reproducible: the same call twice differs by {far:.1e}")
    loaded = case.build(seed=case.seed + 1)
    loaded.load_state_dict(before)
    if far := _far(case, loaded(x.clone()), first):
        raise Fault(f"parameters re-initialised: after load_state_dict the output differs by {far:.1e}")


@_breaks("batch_invariance")
def _rows(case: Case, mixer: Mixer, x: Tensor, other: Tensor) -> None:
    if far := _far(case, mixer(torch.cat([x[:1], other[1:]]))[0], mixer(x)[0]):
        raise Fault(f"mixes the rows of the batch: row 0 changes by {far:.1e} when only row 1 does")


@_breaks("causality", needed="causal")
def _causal(case: Case, mixer: Mixer, x: Tensor, other: Tensor) -> None:
    for t in (_CUT, 1):
        changed = torch.cat([x[:, :t], other[:, t:]], 1)
        if far := _far(case, mixer(changed)[:, :t], mixer(x)[:, :t]):
            raise Fault(f"not causal: outputs before token {t} change by {far:.1e} when only later tokens do")


def _after(case: Case, mixer: Mixer, x: Tensor, *state: Any) -> tuple[Tensor, Any]:
    """Output and state of a call that asks for the state, checked to be that."""
    call = "forward(x, state, return_state=True)" if state else "forward(x, return_state=True)"
    out = _call(call, lambda: mixer(x.clone(), *state, return_state=True))
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], Tensor)):
        raise Fault(f"state not returned: {call} gives {_shown(out)}")
    if not _is_state(out[1]):
        raise Fault(f"state of a wrong kind: {call} gives {_shown(out[1])} as the state")
    return out


def _is_state(state: Any) -> bool:
    return isinstance(state, State) or (isinstance(state, tuple) and all(_is_state(s) for s in state))


def _mixes_tokens(case: Case, mixer: Mixer) -> bool:
    x = case.x(_BATCH, _LENGTH)
    return bool(_far(case, mixer(x[:, _CUT:].clone()), mixer(x.clone())[:, _CUT:]))


@_breaks("chunks_equal_whole", "steps_equal_forward", "state_size", needed="state")
def _state(case: Case, mixer: Mixer, x: Tensor, other: Tensor) -> None:
    whole = mixer(x.clone())
    _, state = _after(case, mixer, x[:, :_CUT])
    if not _mixes_tokens(case, mixer):
        return
    if not tensors_of(state):
        raise Fault(
            "state not returned: forward(x, return_state=True) gives (), although outputs depend on earlier tokens"
        )
    if _same(state, _after(case, mixer, other[:, :_CUT])[1]):
        raise Fault("state forgotten: the returned state is the same after other tokens")
    kept = map_state(state, torch.clone)
    y, _ = _after(case, mixer, x[:, _CUT:], state)
    if not _same(state, kept):
        raise Fault("changes the state it is given: forward is functional, and only step works in place")
    far, ignored = _far(case, y, whole[:, _CUT:]), not _far(case, y, mixer(x[:, _CUT:].clone()))
    if far and ignored:
        raise Fault("state ignored: forward gives the same with the state of earlier tokens and without")
    if far:
        pieces = f"{_CUT} tokens and then {_LENGTH - _CUT}"
        raise Fault(f"state wrong: {pieces} differ by {far:.1e} from all {_LENGTH} at once")


@_breaks("steps_equal_forward", needed="state")
def _step(case: Case, mixer: Mixer, x: Tensor, other: Tensor) -> None:
    whole, (_, left) = mixer(x.clone()), _after(case, mixer, x)
    state = _call("init_state(batch, max_len)", lambda: mixer.init_state(_BATCH, _LENGTH))
    if bool(tensors_of(left)) != (_is_state(state) and bool(tensors_of(state))):
        raise Fault(f"no first state: init_state gives {_shown(state)}, and forward leaves a {type(left).__name__}")
    before = map_state(state, torch.clone)
    for t in range(_LENGTH):
        token = x[:, t].clone()
        y = _call("step(x, state)", functools.partial(mixer.step, token, state))
        if not isinstance(y, Tensor) or y.shape != token.shape:
            raise Fault(f"wrong output: step of {tuple(token.shape)} gives {_shown(y)}")
        if t == 0 and tensors_of(state) and _same(state, before) and _mixes_tokens(case, mixer):
            raise Fault("step does not update the state")
        if not torch.equal(token, x[:, t]):
            raise Fault("step changes its input in place")
        if far := _far(case, y, whole[:, t]):
            raise Fault(f"step disagrees with forward: token {t} differs by {far:.1e}")


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(s, t) for (_, s), (_, t) in zip(tensors_of(a), tensors_of(b), strict=True))


@_breaks("packing", needed="packing")
def _documents(case: Case, mixer: Mixer, x: Tensor, other: Tensor) -> None:
    seq = Seq.from_cu_seqlens(torch.tensor([0, _CUT, _LENGTH], device=x.device), 1, _LENGTH)
    _honours(case, mixer, x[:1], seq, _CUT, "packing", "a packed document sees the one before it, which changes it")


@_breaks("padding", needed="padding")
def _pads(case: Case, mixer: Mixer, x: Tensor, other: Tensor) -> None:
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.long, device=x.device)
    mask[0, : _LENGTH - _CUT] = 0
    seq: Any = Seq.from_mask(mask)
    _honours(case, mixer, x, seq, _LENGTH - _CUT, "padding", "padding changes the tokens after it")


def _honours(case: Case, mixer: Mixer, x: Tensor, seq: Seq, start: int, capability: str, what: str) -> None:
    """Compare what stands from ``start`` on in the first row with the same tokens alone."""
    aligned = seq.align(x)
    y = _call(f"forward(x, seq=...) with {capability}", lambda: seq.restore(mixer(aligned.clone(), seq=seq)))
    far = _far(case, y[:1, start:], mixer(x[:1, start:].clone()))
    if far and not _far(case, y, seq.restore(mixer(aligned))):
        raise Fault(f"ignores seq: {what} by {far:.1e}")

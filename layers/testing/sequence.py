"""The promises about sequences: one meaning, whole or in pieces, alone or in company."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ..base import Mixer, Seq, map_state, nbytes_of
from .case import Case, decode, ensure, promise, squarish, state_at, tensors_of, trained

_LENGTHS = (1, 2, 5, 13)


def _run_in_pieces(mixer: Mixer, x: Tensor, lengths: Collection[int], state: Any = None) -> tuple[Tensor, Any]:
    """Feed ``x`` in pieces of these lengths, carrying the state."""
    ys = []
    for piece in x.split(list(lengths), dim=1):
        y, state = mixer(piece, state, return_state=True)
        ys.append(y)
    return torch.cat(ys, 1), state


def _refuses(mixer: Mixer, capability: str, call: Callable[[], Any]) -> bool:
    """Return whether the mixer lacks the capability; if so, asking for it must raise."""
    if mixer.can(capability):
        return False
    try:
        call()
    except NotImplementedError:
        return True
    raise AssertionError(f"{capability!r} is not declared, but asking for it did not raise NotImplementedError")


def _row_of(state: Any, row: int) -> Any:
    """One row of a state, as a state of batch 1."""
    return map_state(state, lambda t: t[row : row + 1].clone())


def _same_future(case: Case, mixer: Mixer, a: Any, b: Any, what: str) -> None:
    """Two states lead to the same outputs, through forward and through step."""
    x = case.x(1, 4, seed=7)
    case.close(mixer(x, a), mixer(x, b), f"forward {what}")
    case.close(decode(mixer, x, a), decode(mixer, x, b), f"steps {what}")


@promise
def batch_invariance(case: Case) -> None:
    """A row's output does not depend on the rows beside it."""
    mixer, x = case.build(), case.x(4, 9)
    for row in range(4):
        case.close(mixer(x[row : row + 1]), mixer(x)[row : row + 1], f"row {row} alone and in a batch")


@promise
def causality(case: Case) -> None:
    """The gradient of an output reaches its own row's inputs up to its position, and nothing else."""
    mixer, x = case.build(), case.x(2, 9).requires_grad_()
    for t in (0, 4, 8) if mixer.can("causal") else ():
        grad = _gradient(mixer, x, t)
        ensure(bool(grad[0, t].any()), f"output {t} does not depend on input {t}")
        late = grad[0, t + 1 :].abs().max().item() if t < 8 else 0.0
        ensure(late == 0, f"output {t} depends on later inputs: gradient {late:.2e}")
        ensure(not grad[1].any(), f"output {t} of row 0 depends on row 1")


def _gradient(mixer: Mixer, x: Tensor, t: int) -> Tensor:
    y = mixer(x)
    return torch.autograd.grad((y[0, t] * torch.linspace(1, 2, y.shape[-1]).to(y)).sum(), x)[0]


@promise
def reach(case: Case) -> None:
    """An output depends on every input of its own row, or on those that reach says, and no other, where causality is not promised."""
    mixer, length = case.build(), 15
    if mixer.can("causal"):
        return
    x, all_of_them = case.x(2, length).requires_grad_(), torch.ones(length, length, dtype=torch.bool)
    reached = mixer.reach(length, squarish(length) if mixer.can("grid") else None)
    for t, want in enumerate(all_of_them if reached is None else reached.cpu()):
        grad = _gradient(mixer, x, t)
        got = (grad[0] != 0).any(-1).cpu()
        for s in (got != want).nonzero().flatten().tolist()[:1]:
            how = "does not depend" if want[s] else "depends"
            ensure(False, f"output {t} {how} on input {s}, and reach says otherwise")
        ensure(not grad[1].any(), f"output {t} of row 0 depends on row 1")


@promise
def grid(case: Case) -> None:
    """Maps of any shape are mixed as such, each by itself; without that capability, as rows of the same tokens, or they are refused."""
    mixer = case.build()
    with torch.no_grad():
        for h, w in ((1, 1), (1, 7), (7, 1), (3, 5), (5, 3), (4, 4)):
            x, what = case.x(2, h * w), f"maps of {h} x {w}"
            maps, one = (Seq.from_grid((h, w), b, h * w, case.device) for b in (2, 1))
            if not mixer.can("grid"):
                try:
                    case.close(mixer(x, seq=maps), mixer(x), f"{what} and rows of the same tokens")
                except NotImplementedError:
                    return
                continue
            y = mixer(x, seq=maps)
            ensure(y.shape == x.shape and bool(y.isfinite().all()), f"{what}: {tuple(y.shape)}, or not finite")
            case.close(mixer(x[1:], seq=one), y[1:], f"one of two {what}")
            if h * w == 15 and h > w:
                same = torch.equal(mixer(x, seq=Seq.from_grid((w, h), 2, 15, case.device)), y)
                ensure(not same, f"{what} and of {w} x {h} give the same: neighbours above and below do not count")


@promise
def steps_equal_forward(case: Case) -> None:
    """Token by token through step, from init_state with and without room, gives what forward gives; in place."""
    mixer, x = case.build(), case.x(3, 13)
    if _refuses(mixer, "state", lambda: mixer.step(x[:, 0], mixer.init_state(3, 13))):
        return
    with torch.no_grad():
        want = mixer(x)
    state = mixer.init_state(3, 13)
    before = [t.data_ptr() for _, t in tensors_of(state)]
    case.close(decode(mixer, x, state), want, "steps from init_state(3, 13)")
    in_place = before == [t.data_ptr() for _, t in tensors_of(state)]
    ensure(in_place, "step replaced the state's tensors: a CUDA graph would miss it")
    case.close(decode(mixer, x, mixer.init_state(3)), want, "steps from init_state(3)")
    with torch.no_grad():
        _, state = mixer(x[:, :6], return_state=True)
        case.close(decode(mixer, x[:, 6:], state), want[:, 6:], "steps after a prefill")
        _, state = mixer(x[:, :6], mixer.init_state(3, 13), return_state=True)
        case.close(decode(mixer, x[:, 6:], state), want[:, 6:], "steps after a prefill into init_state")
        case.close(mixer(x[:, 12:], state_at(mixer, x[:, :12])), want[:, 12:], "forward of one token")


@promise
def chunks_equal_whole(case: Case) -> None:
    """A sequence in chunks of any lengths, with the state carried over, gives what it gives in one; states stay as they are."""
    mixer, x = case.build(), case.x(2, 23)
    if _refuses(mixer, "state", lambda: mixer(x, return_state=True)):
        return
    with torch.no_grad():
        want = mixer(x)
        for lengths in ([1, 2, 1, 3, 16], [11, 12], [5, 1, 17], [7, 7, 9]):
            for start in (None, mixer.init_state(2), mixer.init_state(2, 23)):
                case.close(_run_in_pieces(mixer, x, lengths, start)[0], want, f"chunks of {lengths}")
        state = state_at(mixer, x[:, :9])
        kept = map_state(state, torch.clone)
        mixer(x[:, 9:], state, return_state=True)
        for (field, a), (_, b) in zip(tensors_of(state), tensors_of(kept), strict=True):
            ensure(torch.equal(a, b), f"forward modified the state it was given ({field})")


@promise
def packing(case: Case) -> None:
    """Documents packed into a row give what each gives alone; the state is the last document's; a state is refused."""
    mixer, lengths = case.build(), [1, 4, 2, 1, 7]
    x, cu = case.x(1, 15), torch.tensor([0, 1, 5, 7, 8, 15], device=case.device)
    seq = Seq.from_cu_seqlens(cu, 1, 15)
    if _refuses(mixer, "packing", lambda: mixer(x, seq=seq)):
        return
    with torch.no_grad():
        case.close(mixer(x, seq=seq), torch.cat([mixer(doc) for doc in x.split(lengths, 1)], 1), "packed documents")
        # two rows, other documents, padding at the end of one
        rows, doc = case.x(2, 8), torch.tensor([[0, 0, 0, 0, 1, 1, -1, -1], [0, 1, 1, 2, 2, 2, 2, 2]])
        doc = doc.to(case.device)
        pieces = [[(0, 4), (4, 6)], [(0, 1), (1, 3), (3, 8)]]
        y = mixer(rows, seq=Seq.from_documents(doc))
        for row, spans in enumerate(pieces):
            for i, j in spans:
                case.close(y[row : row + 1, i:j], mixer(rows[row : row + 1, i:j]), f"document {i}:{j} of row {row}")
        if not mixer.can("state"):
            return
        _, state = mixer(rows, seq=Seq.from_documents(doc), return_state=True)
        for row, spans in enumerate(pieces):
            i, j = spans[-1]
            alone = state_at(mixer, rows[row : row + 1, i:j])
            _same_future(case, mixer, _row_of(state, row), alone, f"after the last document of row {row}")
    try:
        mixer(x, mixer.init_state(1), seq)
    except ValueError:
        return
    ensure(mixer.init_state(1) == (), "a packed row with a state did not raise ValueError")


@promise
def padding(case: Case) -> None:
    """Padding on the left, on the right or in between changes nothing, also in what is decoded afterwards."""
    mixer, length = case.build(), 11
    mask = torch.ones(5, length, dtype=torch.long)
    mask[0, :4], mask[1, 5:], mask[2, [0, 3, 4, 9]], mask[3, :10] = 0, 0, 0, 0
    mask = mask.to(case.device)
    x, other = case.x(5, length), case.x(5, length, seed=1)
    seq = Seq.from_mask(mask)
    assert seq is not None
    if _refuses(mixer, "padding", lambda: mixer(seq.align(x), seq=seq)):
        return
    x, noisy = (torch.where(mask[..., None] > 0, x, 100 * pads) for pads in (other, -other))
    stateful = mixer.can("state")
    with torch.no_grad():
        y = seq.restore(mixer(seq.align(x), seq=seq))
        real = mask > 0
        case.close(seq.restore(mixer(seq.align(noisy), seq=seq))[real], y[real], "other values in the padding")
        past = case.x(5, 6, seed=2)
        for row in range(5):
            alone = x[row : row + 1, real[row]]
            case.close(y[row : row + 1, real[row]], mixer(alone), f"mask {mask[row].tolist()}")
        if not stateful:
            return
        state = mixer(seq.align(x), seq=seq, return_state=True)[1]
        again = mixer(seq.align(x), state_at(mixer, past), seq, return_state=True)
        for row in range(5):
            alone = x[row : row + 1, real[row]]
            what = f"after mask {mask[row].tolist()}"
            _same_future(case, mixer, _row_of(state, row), state_at(mixer, alone), what)
            y_alone, s_alone = mixer(alone, state_at(mixer, past[row : row + 1]), return_state=True)
            case.close(seq.restore(again[0])[row : row + 1, real[row]], y_alone, f"{what}, with a state")
            _same_future(case, mixer, _row_of(again[1], row), s_alone, f"{what}, with a state")
        # a row that is all padding keeps its state
        empty = Seq.from_mask(torch.tensor([[1, 1, 1], [0, 0, 0]], device=case.device))
        before = state_at(mixer, past[:2])
        after = mixer(x[:2, :3], before, empty, return_state=True)[1]
        _same_future(case, mixer, _row_of(after, 1), _row_of(before, 1), "after a row of padding only")


@promise
def state_gradient(case: Case) -> None:
    """The gradient through a carried state is the gradient of the whole sequence."""
    mixer = case.build()
    if not mixer.can("state"):
        return
    x, weight = case.x(2, 12), case.x(2, 12, seed=1)
    grads = []
    for lengths in ([12], [5, 1, 6]):
        leaf = x.clone().requires_grad_()
        y, _ = _run_in_pieces(mixer, leaf, lengths)
        grads.append(torch.autograd.grad((y * weight).sum(), [leaf, *trained(mixer).values()], allow_unused=True))
    for name, a, b in zip(["x", *trained(mixer)], *grads, strict=True):
        ensure(a is not None and b is not None, f"{name} gets no gradient")
        case.close(b, a, f"gradient of {name}")


@promise
def gradcheck(case: Case) -> None:
    """Analytic gradients are those of finite differences, for inputs, parameters and the state (float64)."""
    if case.dtype != torch.float64:
        return
    mixer, x = case.build(), case.x(1, 5).requires_grad_()
    names = list(trained(mixer))
    values = [p.detach().clone().requires_grad_() for p in trained(mixer).values()]
    stateful = mixer.can("state")
    state = map_state(state_at(mixer, case.x(1, 4, seed=1)), torch.detach) if stateful else None
    fields = [t.requires_grad_() for _, t in tensors_of(state) if t.is_floating_point()] if stateful else []

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, tensors, strict=False))
        if not stateful:
            return (torch.func.functional_call(mixer, parameters, (x,)),)
        given = iter(tensors[len(names) :])
        start = map_state(state, lambda t: next(given) if t.is_floating_point() else t)
        y, after = torch.func.functional_call(mixer, parameters, (x, start), {"return_state": True})
        return (y, *(t for _, t in tensors_of(after) if t.is_floating_point()))

    torch.autograd.gradcheck(run, (x, *values, *fields), fast_mode=True)


@promise
def state_size(case: Case) -> None:
    """A state is a dataclass of tensors, batch first; state_bytes is what forward leaves and init_state allocates."""
    mixer = case.build()
    if not mixer.can("state"):
        return
    for length in _LENGTHS:
        state = state_at(mixer, case.x(3, length))
        for field, t in tensors_of(state):
            ensure(t.shape[0] == 3, f"the state's {field} has shape {tuple(t.shape)}, not batch first")
        want = mixer.state_bytes(length)
        for what, got in (("forward", _row_of(state, 1)), ("init_state", mixer.init_state(1, length))):
            ensure(nbytes_of(got) == want, f"state_bytes({length}) = {want}, {what} gave {nbytes_of(got)}")

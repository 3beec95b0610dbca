"""The promises about states as values: they are copied, kept in files, put into slots, and go back to where they were."""

import json
from typing import Any

import torch
from torch import Tensor

from ..base import Mixer, State, each_state, map_state, paired, put_together, take_apart
from .case import Case, decode, ensure, promise, state_at


def _marked(state: Any) -> Any:
    return each_state(state, lambda layer: layer.mark())


def _back(state: Any, mark: Any, rows: Tensor | None = None) -> None:
    for mine, theirs in paired(state, mark):
        mine.back(theirs, rows)


def _rows_of(state: Any, rows: Tensor) -> Any:
    return map_state(state, lambda t: t[rows])


def _same(got: Tensor, want: Tensor, what: str) -> None:
    ensure(
        torch.equal(got, want), f"{what}: differs by {(got - want).abs().max().item():.2e}, and may not differ by a bit"
    )


def _starts(case: Case, mixer: Mixer, x: Tensor) -> dict[str, Any]:
    """States of some rows, by where they come from."""
    b = len(x)
    return {
        "init_state without room": mixer.init_state(b),
        "init_state with room": mixer.init_state(b, 40),
        "a forward": state_at(mixer, x),
    }


@promise
@torch.no_grad()
def marks(case: Case) -> None:
    """A state goes back to a mark bit for bit, however many steps later and more than once."""
    mixer, x = case.build(), case.x(3, 24)
    if not mixer.can("state"):
        return
    for origin, state in _starts(case, mixer, case.x(3, 4, seed=1)).items():
        first = _marked(state)
        begin = decode(mixer, x[:, :7], state)
        second = _marked(state)
        rest = decode(mixer, x[:, 7:], state)
        for _ in range(2):
            _back(state, second)
            _same(decode(mixer, x[:, 7:], state), rest, f"from {origin}, after going back over 17 steps")
        _back(state, first)
        _same(decode(mixer, x[:, :7], state), begin, f"from {origin}, after going back over 24 steps")
        _, after = mixer(x[:, 7:], state, return_state=True)
        _back(after, second)
        _same(mixer(x[:, 7:], after), mixer(x[:, 7:], state), f"from {origin}, after going back over a forward")


@promise
@torch.no_grad()
def marks_of_rows(case: Case) -> None:
    """Some rows of a state go back to a mark, and the others go on."""
    mixer, x = case.build(), case.x(3, 24)
    if not mixer.can("state"):
        return
    rows = torch.tensor([True, False, True], device=case.device)
    for origin, state in _starts(case, mixer, case.x(3, 4, seed=1)).items():
        decode(mixer, x[:, :5], state)
        mark, alone = _marked(state), map_state(state, torch.clone)
        decode(mixer, x[:, 5:18], state)
        _back(state, mark, rows)
        tokens = torch.where(rows[:, None, None], x[:, 5:11], x[:, 18:])
        got, want = decode(mixer, tokens, state), decode(mixer, x[:, 5:], alone)
        want = torch.where(rows[:, None, None], want[:, :6], want[:, 13:])
        case.close(got, want, f"from {origin}, rows 0 and 2 of 3 taken back over 13 steps")


@promise
@torch.no_grad()
def forks(case: Case) -> None:
    """Copies of a state go on without each other, and so do rows of it in another order."""
    mixer, x = case.build(), case.x(3, 9)
    if not mixer.can("state"):
        return
    for origin, state in _starts(case, mixer, case.x(3, 4, seed=1)).items():
        fork, rows = map_state(state, torch.clone), torch.tensor([2, 0, 0], device=case.device)
        mixed = _rows_of(state, rows)
        decode(mixer, x.flip(1), fork)
        want = decode(mixer, x, state)
        case.close(decode(mixer, x[rows], mixed), want[rows], f"from {origin}, rows [2, 0, 0]")
        if origin != "a forward":
            again = decode(mixer, x, mixer.init_state(3, 40 if "with room" in origin else 0))
            _same(want, again, f"from {origin}, beside steps on a copy")


@promise
@torch.no_grad()
def slots(case: Case) -> None:
    """A row that is put into a slot of a state goes on as alone, and those beside it as if nothing had happened."""
    mixer, x = case.build(), case.x(3, 16)
    if not mixer.can("state"):
        return
    state, prompt = mixer.init_state(3, 40), case.x(1, 7, seed=1)
    want = decode(mixer, x, map_state(state, torch.clone))
    decode(mixer, x[:, :9], state)
    new = mixer(prompt, mixer.init_state(1, 40), return_state=True)[1]
    for mine, theirs in paired(state, new):
        mine.put(torch.tensor([1], device=case.device), theirs)
    got = decode(mixer, x[:, 9:], state)
    case.close(got[[0, 2]], want[[0, 2], 9:], "rows beside one that was put into a slot")
    case.close(got[1:2], decode(mixer, x[1:2, 9:], new), "a row that was put into a slot")


@promise
@torch.no_grad()
def saved(case: Case) -> None:
    """A state is tensors and plain values, so that it can be kept in a file, and goes on from there bit for bit."""
    mixer, x = case.build(), case.x(3, 9)
    if not mixer.can("state"):
        return
    for origin, state in _starts(case, mixer, case.x(3, 4, seed=1)).items():
        tensors: dict[str, Tensor] = {}
        about = json.loads(json.dumps(take_apart(state, "layer", tensors)))
        again = put_together(about, "layer", {name: t.clone() for name, t in tensors.items()})
        kinds = [(type(a), type(b)) for a, b in paired(state, again)]
        ensure(all(a is b and issubclass(a, State) for a, b in kinds), f"from {origin}: {kinds}")
        _same(decode(mixer, x, again), decode(mixer, x, state), f"from {origin}, taken apart and put together")

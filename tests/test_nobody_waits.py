"""A training step of packed rows asks the device for no number: what a CUDA graph needs, seen here without a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hybridzoo as zoo
from hybridzoo.kernels import Seq
from hybridzoo.zoo.models import verify

MODELS = zoo.list_models("*-tiny", task="causal_lm")
DOC = torch.tensor([[0] * 31 + [1] * 2 + [2] * 30 + [-1] * 7, [0] * 1 + [1] * 69])
# of numbers that the host reads, and of sizes that depend on numbers
ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class Deaf(TorchDispatchMode):
    """Answers nobody who asks for a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        assert not by_mask and not name.startswith(("unique", "_unique")) and name not in ASKS, f"{func} is asked for"
        return func(*args, **(kwargs or {}))


def trained(model, ids, seq, mode):
    model.zero_grad()
    num_items = torch.tensor(100, device=ids.device)
    with mode:
        out = model(ids, labels=ids, seq=seq, num_items=num_items)
        out.loss.backward()
    return [out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_read(name, checkpointing):
    """Tensors of the meta device hold no numbers to be read."""
    model = zoo.build(name, device="meta").train()
    model.gradient_checkpointing_enable(checkpointing)
    ids = DOC.clamp(min=0).to("meta")
    loss, *grads = trained(model, ids, Seq.from_documents(DOC.to("meta"), most=4), torch.enable_grad())
    assert loss.shape == () and len(grads) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_asked_for(name, monkeypatch):
    """As a GPU's tensors are handled: the host looks at none, and the numbers come out the same."""
    model = zoo.build(name).train()
    ids = torch.randint(1, 256, DOC.shape)
    want = trained(model, ids, Seq.from_documents(DOC), torch.enable_grad())
    monkeypatch.setattr("hybridzoo.kernels.seq.readable", lambda x: False)
    monkeypatch.setattr("hybridzoo.kernels.contain.finite", lambda *tensors: False)
    with Deaf():
        seq = Seq.from_documents(DOC, most=4)
    assert seq.side_by_side is None
    got = trained(model, ids, seq, Deaf())
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_guesses_are_checked_without_asking_and_in_place(name, monkeypatch):
    torch.manual_seed(0)
    model, text = zoo.build(name).eval(), torch.randint(1, 256, (3, 60))
    state = model(text[:, :40], state=model.init_state(3, 60)).state
    checks, want = (verify.Verifier(model, s, 8) for s in (state, state.clone()))
    ids, known, lengths = text[:, 40:48].clone(), torch.tensor([3, 1, 0]), torch.tensor([5, 1, 0])
    ids[0, 3:5] = want(ids[:, :3], torch.tensor([3, 1, 0]), torch.tensor([3, 1, 0])).tokens[
        0, 2
    ]  # one right guess, or two
    want = verify.Verifier(model, state.clone(), 8)
    answer = want(ids, known, lengths)
    monkeypatch.setattr("hybridzoo.kernels.seq.readable", lambda x: False)
    monkeypatch.setattr("hybridzoo.kernels.contain.finite", lambda *tensors: False)
    monkeypatch.setattr("hybridzoo.layers.kv.is_captured", lambda x: True)
    checks._sent.put(ids, known, lengths)
    places = []
    state.map(lambda t: places.append(t.data_ptr()) or t)
    with Deaf():
        checks._read_once()
    again = []
    state.map(lambda t: again.append(t.data_ptr()) or t)
    tokens, logprobs, whole, broken = checks._found[False]
    assert again == places and not broken.any() and whole.tolist() == answer.whole.tolist()
    for row, columns in ((0, slice(2, 5)), (1, slice(0, 1))):
        assert torch.equal(tokens[row, columns], answer.tokens[row, columns])
        torch.testing.assert_close(logprobs[row, columns], answer.logprobs[row, columns])
    assert state.tokens.tolist() == want.state.tokens.tolist() == [40 + 5 * int(whole[0]), 41, 40]
    torch.testing.assert_close(
        model.step(text[:, 50], state), model.step(text[:, 50], want.state), rtol=1e-4, atol=1e-5
    )


def test_who_asks_is_noticed():
    x = torch.ones(3)
    for asks in (lambda: bool(x.any()), lambda: x[x > 0], lambda: x.nonzero(), lambda: x[0].item(), lambda: x.unique()):
        with pytest.raises(AssertionError, match="is asked for"), Deaf():
            asks()

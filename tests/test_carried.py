"""A row in pieces: states that restart, are saved and read, and the loss of a piece whose next token is known."""

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.layers import State
from hybridzoo.layers.base import map_state
from hybridzoo.zoo.errors import CheckpointError
from hybridzoo.zoo.models.state import ModelState

NAMES = ["mamba-tiny", "mamba2-tiny", "transformer-tiny", "jamba-tiny", "zamba2-tiny"]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    if request.param not in zoo.list_models():
        pytest.skip("not shipped")
    torch.manual_seed(0)
    return zoo.build(request.param, {"vocab_size": 64}, dtype=torch.float64).eval()


def ids(*shape, seed=0):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


def leaves(state):
    found = []
    map_state(state.layers, lambda t: found.append(t) or t)
    return [*found, state.tokens]


def test_the_loss_of_two_pieces_is_that_of_the_whole(model):
    whole = ids(2, 21)
    first = model(whole[:, :9], labels=whole[:, :10], return_state=True)
    rest = model(whole[:, 9:], labels=whole[:, 9:], state=first.state)
    # 9 and 11 of each row's 20 targets
    parts = [first.loss - (first.aux_loss or 0), rest.loss - (rest.aux_loss or 0)]
    out = model(whole, labels=whole)
    want = out.loss - (out.aux_loss or 0)
    torch.testing.assert_close((9 * parts[0] + 11 * parts[1]) / 20, want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_token_after_a_padded_row_follows_its_last_real_one(model, side):
    text, after = ids(1, 7), 5
    pad = torch.zeros(1, 3, dtype=torch.long)
    row = torch.cat([pad, text] if side == "left" else [text, pad], 1)
    labels = torch.cat([row, torch.tensor([[after]])], 1)
    got = model(row, labels=labels, attention_mask=(row > 0).long()).loss
    want = model(text, labels=torch.cat([text, torch.tensor([[after]])], 1)).loss
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


def test_a_row_of_padding_has_no_target_after_it(model):
    row = torch.cat([ids(1, 6), torch.zeros(1, 6, dtype=torch.long)])
    labels = torch.cat([row, torch.tensor([[3], [4]])], 1)
    alone = model(row[:1], labels=labels[:1])
    got = model(row, labels=labels, attention_mask=(row > 0).long())
    torch.testing.assert_close(got.loss - (got.aux_loss or 0), alone.loss - (alone.aux_loss or 0), rtol=1e-10, atol=0)


def test_a_row_that_restarts_knows_nothing_of_before(model):
    before, after = ids(2, 11), ids(2, 8, seed=1)
    state = model(before).state.restarted(torch.tensor([True, False]))
    got = model(after, state=state)
    torch.testing.assert_close(got.logits[:1], model(after[:1]).logits, rtol=1e-8, atol=1e-10)
    both = torch.cat([before[1:], after[1:]], 1)
    torch.testing.assert_close(got.logits[1:], model(both).logits[:, 11:], rtol=1e-8, atol=1e-10)
    assert got.state.tokens.tolist() == [8, 19]
    # and what comes out can be stepped on
    token = ids(2, seed=2)
    stepped = model.step(token, got.state)
    torch.testing.assert_close(
        stepped[:1], model(torch.cat([after[:1], token[:1, None]], 1)).logits[:, -1], rtol=1e-8, atol=1e-10
    )


def test_a_state_read_from_a_file_goes_on_to_the_bit(model, tmp_path):
    state = model(ids(2, 9)).state
    state.save(tmp_path / "s.safetensors")
    read = ModelState.load(tmp_path / "s.safetensors")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves(state), leaves(read), strict=True))
    more = ids(2, 5, seed=3)
    assert torch.equal(model(more, state=state).logits, model(more, state=read).logits)
    assert torch.equal(model.step(more[:, 0], state), model.step(more[:, 0], read))


def test_a_file_that_is_no_state_is_named(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "s.safetensors"
    save_file({"tokens": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="is no saved state"):
        ModelState.load(file)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as a state"):
        ModelState.load(file)
    with pytest.raises(FileNotFoundError):
        ModelState.load(tmp_path / "none.safetensors")


def test_a_state_of_an_unknown_mixer_is_refused(model, tmp_path, monkeypatch):
    model(ids(1, 3)).state.save(tmp_path / "s.safetensors")
    monkeypatch.setattr(State, "kinds", {})
    with pytest.raises(CheckpointError, match="KeyError"):
        ModelState.load(tmp_path / "s.safetensors")


def test_labels_of_another_length_are_refused(model):
    with pytest.raises(ValueError, match="labels"):
        model(ids(1, 5), labels=ids(1, 7))

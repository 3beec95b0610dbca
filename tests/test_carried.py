"""A row in pieces: states that restart, are saved and read, and the loss of a piece whose next token is known."""

import errno
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
from hybridzoo.layers import State
from hybridzoo.layers.base import map_state
from hybridzoo.zoo.errors import CheckpointError
from hybridzoo.zoo.train.examples import lanes_from
from hybridzoo.zoo.train.options import TrainOptions

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
    read = zoo.ModelState.load(tmp_path / "s.safetensors")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves(state), leaves(read), strict=True))
    more = ids(2, 5, seed=3)
    assert torch.equal(model(more, state=state).logits, model(more, state=read).logits)
    assert torch.equal(model.step(more[:, 0], state), model.step(more[:, 0], read))


def test_a_file_that_is_no_state_is_named(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "s.safetensors"
    save_file({"tokens": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="is no saved state"):
        zoo.ModelState.load(file)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as a state"):
        zoo.ModelState.load(file)
    with pytest.raises(FileNotFoundError):
        zoo.ModelState.load(tmp_path / "none.safetensors")


def test_a_state_of_another_config_is_told_from_this_ones(model, tmp_path):
    file, other = tmp_path / "s.safetensors", zoo.build("mamba-tiny")
    state = model(ids(1, 3)).state
    state.save(file, model)
    again = zoo.ModelState.load(file, model=model)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(again), strict=True))
    with pytest.raises(CheckpointError, match=r"another config \(.*; this one is mamba"):
        zoo.ModelState.load(file, model=other)
    state.save(file)  # of nobody in particular
    zoo.ModelState.load(file, model=other)


def test_a_state_that_cannot_be_written_leaves_the_old_one(model, tmp_path, monkeypatch):
    file, state = tmp_path / "s.safetensors", model(ids(1, 3)).state
    state.save(file)
    before = file.read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hybridzoo.zoo.models.state.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot be written there .*No space left"):
        state.save(file)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_state_of_an_unknown_mixer_is_refused(model, tmp_path, monkeypatch):
    model(ids(1, 3)).state.save(tmp_path / "s.safetensors")
    monkeypatch.setattr(State, "kinds", {})
    with pytest.raises(CheckpointError, match="KeyError"):
        zoo.ModelState.load(tmp_path / "s.safetensors")


def test_labels_of_another_length_are_refused(model):
    with pytest.raises(ValueError, match="labels"):
        model(ids(1, 5), labels=ids(1, 7))


def documents(tmp_path, sizes=(200, 45, 130)):
    """JSON Lines of texts of so many letters, and each as the tokens that are read: the end of a text, then its bytes."""
    drawn = torch.Generator().manual_seed(4)
    texts = ["".join(chr(97 + i) for i in torch.randint(0, 26, (n,), generator=drawn)) for n in sizes]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, [[0, *text.encode()] for text in texts]


def carried(path, out, **options):
    options = {"steps": 6, "batch_size": 2, "length": 32, "lr": 1e-3, "save_every": 2, "report_to": "none"} | options
    return zoo.train("samba-tiny", data=path, out=out, carry_state=True, device="cpu", **options)


def nats_of(model, tokens):
    """Of every target of a document, read at once."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    return F.cross_entropy(logits.double(), ids[0, 1:], reduction="none")


def test_a_document_longer_than_a_row_is_read_as_one(tmp_path):
    """A rate of nearly zero leaves the weights as they are, and with them what the whole document would cost, row by row."""
    path, (tokens,) = documents(tmp_path, (200,))
    options = {"batch_size": 1, "lr": 1e-12, "steps": 9, "val": path, "eval_every": 3}
    result = carried(path, tmp_path / "run", **options)
    nats = nats_of(result.model, tokens)
    rows = [part.mean().item() for part in nats.split(32)]
    losses = [e["loss"] for e in result.history if "loss" in e]
    # the second pass begins with an empty state
    assert losses == pytest.approx([*rows, *rows][:9], rel=1e-5)
    assert [e["eval_loss"] for e in result.history if "eval_loss" in e] == pytest.approx(
        [nats.mean().item()] * 3, rel=1e-5
    )


def test_documents_are_evaluated_one_after_another(tmp_path):
    path, texts = documents(tmp_path)
    result = carried(path, tmp_path / "run", val=path, steps=2, eval_every=2, batch_size=1)
    nats = torch.cat([nats_of(result.model, tokens) for tokens in texts])
    (found,) = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    assert found == pytest.approx(nats.mean().item(), rel=1e-5)


@pytest.mark.parametrize("lanes", [1, 2, 3, 5, 7])
def test_every_target_is_evaluated_once(tmp_path, lanes):
    path, texts = documents(tmp_path)
    model = zoo.build("samba-tiny", device="meta")
    rows = lanes_from(path, model, TrainOptions(length=32), lanes, out=tmp_path, once=True)
    items = [rows[i] for i in range(len(rows))]
    assert sum(int((item["labels"][1:] >= 0).sum()) for item in items) == sum(len(t) - 1 for t in texts)
    assert len({int(item["row"]) for item in items if (item["labels"][1:] >= 0).any()}) == 7 + 2 + 5


def test_a_resumed_run_goes_on_with_the_state(tmp_path):
    path, _ = documents(tmp_path)
    whole = carried(path, tmp_path / "whole", steps=8)

    def stop(step, loss):
        if step == 5:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        carried(path, tmp_path / "run", steps=8, on_step=stop)
    rest = carried(path, tmp_path / "run", steps=8)
    assert rest.resumed_from == 4
    assert [e["loss"] for e in rest.history] == [e["loss"] for e in whole.history]
    assert all(torch.equal(a, b) for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True))


def test_a_table_has_no_documents_to_carry_a_state_along(tmp_path):
    with pytest.raises(ValueError, match="rows of a table do not continue each other"):
        carried(ids(8, 32).numpy(), tmp_path / "run")


def test_too_few_rows_for_the_streams(tmp_path):
    path, _ = documents(tmp_path, (40,))
    with pytest.raises(ValueError, match="too few for 64 streams side by side"):
        carried(path, tmp_path / "run", batch_size=64)

"""States that go back: marks, the last steps, rows by different numbers of tokens, and random ways through all of it."""

import copy
import os

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.models.prefix_tree import PrefixTree

exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
MIXERS = {
    "mamba": {"type": "mamba", "d_state": 4}, "mamba2": {"type": "mamba2", "d_state": 8, "headdim": 8},
    "attention": {"type": "attention", "nheads": 2}, "window": {"type": "attention", "nheads": 2, "window": 5},
    "moe": {"type": "moe", "d_intermediate": 16, "num_experts": 4},
}  # fmt: skip
HYBRIDS = ["mamba attention moe mamba2", "window mamba2 + attention", "mamba window + mamba"]


@pytest.fixture(scope="module", params=HYBRIDS)
def model(request):
    torch.manual_seed(0)
    used = {name: MIXERS[name] for name in request.param.replace("+", " ").split()}
    return zoo.build({"vocab_size": 12, "d_model": 16, "layers": request.param, "mixers": used}).eval()


def steps(model, tokens, state):
    return torch.stack([model.step(t, state) for t in tokens.unbind(1)], 1)


def ids(b, length, seed=0):
    return torch.randint(0, 12, (b, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_state_goes_back_to_any_of_its_marks(model):
    text = ids(2, 40)
    state = model(text[:, :6], return_state=True).state
    marks, found = [], []
    for start in range(6, 40, 8):
        marks.append(state.mark())
        found.append(steps(model, text[:, start : start + 8], state))
    for i in (4, 2, 2, 0):
        state.back(marks[i])
        assert state.tokens.tolist() == [6 + 8 * i] * 2
        assert torch.equal(steps(model, text[:, 6 + 8 * i : 14 + 8 * i], state), found[i])
    with pytest.raises(ValueError, match="row 0 has gone back to before it"):
        state.back(marks[1])
    with pytest.raises(ValueError, match="was taken of another state"):
        state.clone().back(marks[0])


@torch.no_grad()
@pytest.mark.parametrize("reserved", [0, 64])
def test_the_last_steps_are_taken_back(model, reserved):
    text, other = ids(3, 30), ids(3, 30, 1)
    state = model.init_state(3, reserved)
    state.keep(6)
    logits = steps(model, text[:, :20], state)
    state.roll_back(6)
    assert state.tokens.tolist() == [14] * 3
    assert torch.equal(steps(model, text[:, 14:20], state), logits[:, 14:])
    state.roll_back(torch.tensor([0, 2, 5]))
    assert state.tokens.tolist() == [20, 18, 15]
    new = steps(model, other[:, :2], state)
    state.roll_back(torch.tensor([1, 2, 3]))  # of row 2 one of those before
    assert state.tokens.tolist() == [21, 18, 14]
    new = torch.cat([new[:, :1], steps(model, other[:, 1:4], state)], 1)
    ways = [
        torch.cat([text[0, :20], other[0, :4]]),
        torch.cat([text[1, :18], other[1, 1:4]]),
        torch.cat([text[2, :14], other[2, 1:4]]),
    ]
    for row, (way, skip) in enumerate(zip(ways, (0, 1, 1), strict=True)):
        alone = steps(model, way[None], model.init_state(1, reserved))[0]
        torch.testing.assert_close(new[row, skip:], alone[-len(new[row, skip:]) :], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="steps: 7 of row 0, which can take 6 back"):
        state.roll_back(torch.tensor([7, 0, 0]))
    with pytest.raises(ValueError, match="steps: -1 of row 1"):
        state.roll_back(torch.tensor([0, -1, 0]))
    with pytest.raises(ValueError, match=r"keep\(-1\)"):
        state.keep(-1)
    before = state.clone()
    for wrong in (torch.tensor([True, False, True]), torch.tensor([1, 1]), torch.tensor([[1], [0], [1]])):
        with pytest.raises(ValueError, match=r"steps: expected a number, or \(3,\) integers, got"):
            state.roll_back(wrong)
    left, right = [], []
    state.map(lambda t: left.append(t.clone()) or t)
    before.map(lambda t: right.append(t) or t)
    assert all(map(torch.equal, left, right))  # none of it was taken back


@torch.no_grad()
def test_a_slot_that_another_row_takes_has_no_marks(model):
    text = ids(2, 20)
    state = model.init_state(2, 40)
    state.keep(4)
    steps(model, text[:, :6], state)
    mark, alone = state.mark(), state.clone()
    state.put(torch.tensor([1]), model(text[1:, :3], state=model.init_state(1, 40)).state)
    steps(model, text[:, 6:9], state)
    with pytest.raises(ValueError, match="steps: 4 of row 1, which can take 3 back"):
        state.roll_back(4)
    with pytest.raises(ValueError, match="row 1 has gone back to before it, or is another's"):
        state.back(mark)
    state.back(mark, torch.tensor([True, False]))
    # experts get rows of both texts together, so sums may be rounded otherwise
    got, want = steps(model, text[:, 6:], state)[0], steps(model, text[:, 6:], alone)[0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"rows: expected \(2,\) bool, got \(1,\)"):
        state.back(mark, torch.tensor([True]))


@torch.no_grad()
def test_what_wrong_numbers_have_left_behind_is_gone(model):
    text = ids(1, 20)
    state = model.init_state(1, 40)
    steps(model, text[:, :5], state)
    mark, alone = state.mark(), state.clone()
    weight = model.backbone.embedding.weight
    before = weight[0].clone()
    weight[0] = float("nan")
    assert model.step(torch.tensor([0]), state).isnan().all()
    weight[0] = before
    state.back(mark)
    assert torch.equal(steps(model, text[:, 5:], state), steps(model, text[:, 5:], alone))


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.list_models("*-tiny", task="causal_lm"))
def test_a_state_of_any_model_is_a_value(name, tmp_path):
    """Saved and loaded, forked, rolled back and put into a slot, it goes on as it did; a fork that does not, goes its own way."""
    torch.manual_seed(0)
    model, text = zoo.build(name).eval(), torch.randint(1, 256, (2, 40))
    state = model(text[:, :20], state=model.init_state(2, 48)).state
    state.save(tmp_path / "state.safetensors", model)
    fork, mark = state.clone(), state.mark()
    want = steps(model, text[:, 20:], state)
    loaded = zoo.ModelState.load(tmp_path / "state.safetensors", model=model)
    assert torch.equal(steps(model, text[:, 20:], loaded), want)
    assert not torch.equal(steps(model, text[:, 20:].flip(1), fork), want)
    state.back(mark)
    assert torch.equal(steps(model, text[:, 20:], state), want)
    slots = model.init_state(3, 48)
    steps(model, torch.randint(1, 256, (3, 7)), slots)
    slots.put(torch.tensor([2, 0]), zoo.ModelState.load(tmp_path / "state.safetensors"))
    got = steps(model, text[[1, 0, 0], 20:], slots)
    torch.testing.assert_close(got[[2, 0]], want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_graph_keeps_no_marks(model, monkeypatch):
    state = model.init_state(1, 20)
    state.keep(4)
    monkeypatch.setattr("hybridzoo.zoo.models.marks.is_captured", lambda x: True)
    with pytest.raises(RuntimeError, match=r"keep\(4\): a CUDA graph does not keep marks"):
        model.step(torch.tensor([1]), state)
    state.keep(0)
    model.step(torch.tensor([1]), state)


def test_a_mark_of_attention_is_its_length():
    used = {"attention": MIXERS["attention"]}
    model = zoo.build({"vocab_size": 12, "d_model": 16, "layers": "attention attention", "mixers": used}).eval()
    short, long = (model.init_state(1, n).mark() for n in (10, 1000))
    assert short.nbytes == long.nbytes == 16


@torch.no_grad()
def test_hooks_change_no_mark(model):
    text = ids(1, 12)
    state = model.init_state(1, 20)
    state.keep(4)
    handle = model.backbone.layers[0].register_forward_hook(lambda *_: None)
    try:
        logits = steps(model, text, state)
        state.roll_back(3)
        assert torch.equal(steps(model, text[:, -3:], state), logits[:, -3:])
    finally:
        handle.remove()


class Walker:
    """A state on its way, and the beginnings that it can go back to: bits are those of the prompt read by a tree and then steps."""

    def __init__(self, model, prompt, state):
        self.model, self.text, self.read = model, list(prompt), len(prompt)
        self.state, self.marks, self.last = state, [], None
        state.keep(5)
        self.steps = 0  # that can be taken back

    def step(self, token):
        self.last = self.model.step(torch.tensor([token]), self.state)
        self.text.append(token)
        self.steps = min(self.steps + 1, 5)

    def mark(self):
        self.marks.append((self.state.mark(), len(self.text)))

    def back(self, which):
        mark, length = self.marks[which]
        self.state.back(mark)
        self.text, self.marks, self.steps = self.text[:length], self.marks[: which + 1], 0

    def roll_back(self, n):
        self.state.roll_back(n)
        self.text, self.steps = self.text[: len(self.text) - n], self.steps - n
        self.marks = [(mark, length) for mark, length in self.marks if length <= len(self.text)]

    def fork(self):
        new = Walker(self.model, self.text[: self.read], self.state.clone())
        new.text = list(self.text)
        return new


class Fresh:
    """Logits of texts that are read and stepped through from their beginning, nothing taken back; each beginning once."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def after(self, text, read):
        key = (tuple(text), read)
        if key not in self.known:
            if len(text) == read:
                self.known[key] = None, PrefixTree(self.model, chunk=4).read(text).state
            else:
                state = copy.deepcopy(self.after(text[:-1], read)[1])
                self.known[key] = self.model.step(torch.tensor([text[-1]]), state), state
        return self.known[key]


class Counting(PrefixTree):
    """Counts the chunks that it has kept."""

    made = 0

    def _keep(self, *args):
        self.made += 1
        return super()._keep(*args)


@torch.no_grad()
@pytest.mark.parametrize("times", [200, pytest.param(10_000, marks=exhaustive)])
def test_extending_forking_going_back_and_evicting_in_any_order_change_no_bit(model, times):
    rng = torch.Generator().manual_seed(1)
    tree, fresh, compared = Counting(model, max_bytes=12_000, chunk=4), Fresh(model), 0

    def draw(n):
        return int(torch.randint(0, n, (1,), generator=rng))

    def opened():
        prompt = [draw(2) for _ in range(1 + draw(14))]
        return Walker(model, prompt, tree.read(prompt).state)

    walkers = [opened()]
    for _ in range(times):
        walker, what = walkers[draw(len(walkers))], draw(10)
        if what < 4 and len(walker.text) < 40:
            for _ in range(1 + draw(6)):
                walker.step(draw(2))
                assert torch.equal(walker.last, fresh.after(walker.text, walker.read)[0])
                compared += 1
        elif what == 4:
            walker.mark()
        elif what == 5 and walker.marks:
            walker.back(draw(len(walker.marks)))
        elif what == 6:
            walker.roll_back(draw(walker.steps + 1))
        elif what == 7:
            walkers = [*walkers[-7:], walker.fork()]
        elif what == 8:
            walkers = [*walkers[-7:], opened()]
        else:  # the state that it stands on is the tree's, which may have forgotten its prompt
            tree.read([draw(2) for _ in range(20)])
        assert int(walker.state.tokens) == len(walker.text) and tree.nbytes <= 12_000
    assert compared > times and tree.made > len(tree)

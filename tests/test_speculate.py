"""Speculative decoding: the tokens of greedy decoding, for every kind of layer, whatever is guessed."""

import os

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.models import verify
from hybridzoo.zoo.models.prefill import prefill
from hybridzoo.zoo.models.rows import rectangle
from hybridzoo.zoo.models.speculate import DraftModel, PromptLookup, Speculator

exhaustive = pytest.mark.skipif(
    "HYBRIDZOO_EXHAUSTIVE" not in os.environ, reason="minutes; HYBRIDZOO_EXHAUSTIVE=1 runs it"
)
MIXERS = {
    "mamba": {"type": "mamba", "d_state": 4}, "mamba2": {"type": "mamba2", "d_state": 8, "headdim": 8},
    "attention": {"type": "attention", "nheads": 4}, "window": {"type": "attention", "nheads": 4, "window": 5},
    "moe": {"type": "moe", "d_intermediate": 16, "num_experts": 4},
}  # fmt: skip
LAYERS = ["mamba window", "mamba2 moe", "window mamba2 + attention moe mamba"]


def built(layers, seed=0, d_model=32):
    torch.manual_seed(seed)
    cfg = {
        "vocab_size": 40,
        "d_model": d_model,
        "layers": layers,
        "tie_embeddings": False,  # a tied head says the last token again
        "mixers": {k: MIXERS[k] for k in dict.fromkeys(layers.replace("+", " ").split())},
    }
    model = zoo.build(cfg, dtype=torch.float64).eval()
    model.lm_head.weight.data.mul_(40)
    return model


@pytest.fixture(scope="module", params=LAYERS)
def model(request):
    return built(request.param)


class Oracle:
    """Knows what greedy decoding gives, and is wrong at random."""

    most = 5

    def __init__(self, texts, wrong):
        self.texts, self.wrong, self.rng = texts, wrong, torch.Generator().manual_seed(0)

    def __call__(self, row, tokens, most):
        guesses = self.texts[row][len(tokens) : len(tokens) + most]
        swaps = torch.rand(len(guesses), generator=self.rng) < self.wrong
        return [(g + 1) % 40 if swap else g for g, swap in zip(guesses, swaps.tolist(), strict=True)]


class Silent:
    """Guesses nothing."""

    most = 4

    def __call__(self, row, tokens, most):
        return []


@pytest.fixture(params=["as-wide-as-needed", "of-one-width", "in-few-launches"])
def width(request, monkeypatch):
    """Forwards as a CPU runs them, and as a GPU records them: all of one width, over all rows; in the end by its operations."""
    if request.param == "in-few-launches":
        monkeypatch.setenv("HYBRIDZOO_BACKEND", "torch")
    if request.param != "as-wide-as-needed":
        monkeypatch.setattr(verify, "how_taken", lambda *_: ("of one width", True))
        monkeypatch.setattr(verify, "_gathers", lambda model: False)


@torch.no_grad()
@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("assistant", ["lookup", "model", "itself"])
def test_the_text_is_that_of_greedy_decoding(model, assistant):
    helper = {"lookup": "lookup", "model": built("mamba", 1, 16), "itself": model}[assistant]
    ids = torch.randint(0, 40, (6, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) >= torch.tensor([0, 3, 8, 1, 0, 5])[:, None]).long()
    want = model.generate(ids, 30, attention_mask=mask, eos_token_id=7, details=True)
    got = model.generate(ids, 30, attention_mask=mask, eos_token_id=7, details=True, assistant=helper, draft=5)
    assert torch.equal(got.sequences, want.sequences) and torch.equal(got.counts, want.counts)
    assert got.reasons == want.reasons
    torch.testing.assert_close(got.logprobs, want.logprobs, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("wrong", [0.0, 0.2, 1.0])
def test_guesses_that_are_wrong_cost_forwards_and_no_token(model, wrong, monkeypatch):
    ids = torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(2))
    want = model.generate(ids, 61)
    texts = [row.tolist() for row in want]
    monkeypatch.setattr("hybridzoo.zoo.models.generate.PromptLookup", lambda most: Oracle(texts, wrong))
    got = model.generate(ids, 61, assistant="lookup", draft=5, details=True)
    assert torch.equal(got.sequences, want)
    forwards = int(got.how.split()[-2])
    # the first token comes of the prompt; then six at a time, or one by one
    assert forwards == {0.0: 10, 1.0: 60}.get(wrong, forwards) and forwards <= 60


@torch.no_grad()
@pytest.mark.usefixtures("width")
def test_numbers_that_are_none_are_an_error_with_the_row():
    model, ids = built("mamba attention"), torch.randint(1, 40, (3, 6), generator=torch.Generator().manual_seed(4))
    logits, state = prefill(model, ids, None, None, 20, None)
    ends = logits.argmax(-1)[:1].tolist()  # row 0 is over at once, and the others keep their numbers
    state.layers[0].ssm[2] = torch.nan
    checks = verify.Verifier(model, state, 8)
    speculator = Speculator(checks, logits, ids.tolist(), PromptLookup(4), ends, 0, 20)
    assert speculator.advance().finished.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="logits: those of row 2 are not finite"):
        speculator.advance()
    model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits: those of row 0 are not finite"):
        model.generate(ids, 12, assistant="lookup")


@torch.no_grad()
def test_text_that_repeats_takes_few_forwards():
    model = built("mamba attention mamba")
    ids = torch.randint(0, 40, (1, 5))
    text = model.generate(ids, 300)  # of an untrained model, soon a circle
    got = model.generate(ids, 300, assistant="lookup", details=True)
    assert torch.equal(got.sequences, text) and int(got.how.split()[-2]) < 60
    assert got.blocks == "the model is called: there are hooks, or nothing is recorded"


@torch.no_grad()
@pytest.mark.usefixtures("width")
def test_where_nothing_is_guessed_a_token_costs_a_step(monkeypatch):
    model, steps = built("mamba attention"), []
    step = type(model).step
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(4))
    want = model.generate(ids, 20)
    monkeypatch.setattr(type(model), "step", lambda self, *a: steps.append(1) or step(self, *a))
    logits, state = prefill(model, ids, None, None, 20, None)
    speculator = Speculator(verify.Verifier(model, state, 8), logits, ids.tolist(), Silent(), [], 0, 20)
    while not speculator.advance().finished.all():
        pass
    assert torch.equal(torch.tensor(speculator.texts), want) and len(steps) == 19


def test_lookup_takes_the_longest_match_and_of_these_the_latest():
    look = PromptLookup()
    assert look(0, [1, 2, 3, 9, 2, 3, 8, 5, 3, 7, 1, 2, 3], 2) == [9, 2]
    assert look(1, [4, 2, 3, 8, 5, 2, 3, 7, 9, 2, 3], 3) == [7, 9, 2]
    assert look(1, [4, 2, 3, 8, 5, 2, 3, 7, 9, 2, 3, 6], 3) == []
    assert look(1, [4, 2, 3, 8, 5, 2, 3, 7, 9, 2, 3, 6, 8], 3) == [5, 2, 3]
    assert look(2, [1], 4) == [] and look(3, [5, 5], 4) == [5, 5, 5, 5]
    assert look(4, [1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


@torch.no_grad()
@pytest.mark.usefixtures("width")
def test_a_state_has_read_what_was_whole_and_no_row_else(model):
    ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(3))
    state = prefill(model, ids[:, :4], None, None, 40, None)[1]
    checks, before = verify.Verifier(model, state, 8), state.clone()
    after = model(ids[:, 4:6], state=before.clone()).logits.argmax(-1)
    guess = [*ids[0, 4:6].tolist(), int(after[0, 1])], [*ids[1, 4:6].tolist(), (int(after[1, 1]) + 1) % 40], []
    found = checks(rectangle(list(guess), 39), torch.tensor([2, 2, 0]), torch.tensor([3, 3, 0]))
    assert found.whole.tolist() == [True, False, False] and checks.state.tokens.tolist() == [7, 4, 4]
    assert found.tokens[0, 1] == after[0, 1] and found.tokens[1, 1] == after[1, 1]
    next_ = torch.tensor([3, 5, 7])
    got = model.step(next_, checks.state)
    read = model(torch.tensor([guess[0]]), state=before.reorder(torch.tensor([0]))).state
    torch.testing.assert_close(got[0], model.step(next_[:1], read)[0])
    torch.testing.assert_close(got[1:], model.step(next_, before)[1:])


@pytest.mark.parametrize(
    ("dtype", "capability", "fixed"),
    [("bfloat16", (9, 0), True), ("bfloat16", (8, 0), False), ("float32", (9, 0), False)],
)
def test_experts_that_would_copy_their_weights_are_not_recorded_unasked(dtype, capability, fixed, monkeypatch):
    model = built("attention moe").to(getattr(torch, dtype))
    monkeypatch.setattr(verify, "how_taken", lambda *_: ("recorded", True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    checks = verify.Verifier(model, model.init_state(1, 8), 4)
    assert checks.fixed is fixed and checks.how.startswith(
        "recorded" if fixed else "one operation after the other (experts"
    )
    assert verify.Verifier(model, model.init_state(1, 8), 4, True).fixed


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_smaller_model_takes_wrong_guesses_back(model, length, monkeypatch):
    steps, forwards, step, forward = [], [], type(model).step, type(model).forward
    monkeypatch.setattr(type(model), "step", lambda self, *a: steps.append(1) or step(self, *a))
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **kw: forwards.append(1) or forward(self, *a, **kw))
    drafter, text = DraftModel(model, torch.device("cpu"), 6, 40), torch.randint(0, 40, (length,)).tolist()
    for right in (6, 0, 3, 5, 1):
        want = model.generate(torch.tensor([text]), 6)[0, len(text) :].tolist()
        steps.clear(), forwards.clear()
        assert drafter(0, text, 6) == want
        # what was accepted has been read, but the last of all guesses and what the model says behind it
        assert (len(forwards), len(steps)) in ((1, 5), (0, 6), (0, 7))
        text += [*want[:right], (want[right] + 1) % 40 if right < 6 else 1]
    assert drafter(0, [*text, 1, 2, 3, 4], 2) == model.generate(torch.tensor([[*text, 1, 2, 3, 4]]), 2)[0, -2:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.list_models("*-tiny", task="causal_lm"))
@pytest.mark.parametrize("prompts", [8, pytest.param(1000, marks=exhaustive)])
def test_many_prompts_are_continued_as_without_guesses(name, prompts, monkeypatch):
    """In float32, where a forward and steps are rounded differently: two tokens that are equally likely may be taken for each other."""
    torch.manual_seed(0)
    model, rng = zoo.build(name).eval(), torch.Generator().manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(
        torch.randn_like(model.lm_head.weight)
    )  # a tied one says the last token again
    vocab, ties, rows = model.cfg.vocab_size, 0, min(prompts, 50)
    for start in range(0, prompts, rows):
        ids = torch.randint(1, vocab, (rows, 12), generator=rng)
        ids[::2, 6:] = ids[::2, :6]
        want = model.generate(ids, 24)
        texts = [row.tolist() for row in want]
        helper = PromptLookup if start % 100 else lambda most, texts=texts: Oracle(texts, 0.2)
        monkeypatch.setattr("hybridzoo.zoo.models.generate.PromptLookup", helper)
        got = model.generate(ids, 24, assistant="lookup", draft=5)
        for row in (got != want).any(1).nonzero().flatten().tolist():
            at = int((got[row] != want[row]).nonzero()[0])
            logits = model(got[row : row + 1, :at]).logits[0, -1].double()
            gap = (logits[got[row, at]] - logits[want[row, at]]).abs() / logits.abs().max()
            assert gap < 1e-5 and logits.argmax() in (got[row, at], want[row, at]), (row, at, float(gap))
            ties += 1
    assert ties <= max(1, prompts // 100)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"assistant": "lookups"}, "expected a language model, or 'lookup'"), ({"assistant": "lookup", "temperature": 1.0}, "temperature=1.0"),
        ({"assistant": "lookup", "repetition_penalty": 1.1}, "repetition_penalty=1.1"), ({"assistant": "lookup", "draft": 0}, "draft=0"),
        ({"assistant": "lookup", "return_state": True}, "return_state=True"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        built("mamba").generate(torch.ones(1, 3, dtype=torch.long), 4, **options)
    other = zoo.build("mamba-tiny")
    with pytest.raises(ValueError, match="vocabulary of 256, and the model one of 40"):
        built("mamba").generate(torch.ones(1, 3, dtype=torch.long), 4, assistant=other)

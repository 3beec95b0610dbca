"""Generation: the step path against full forwards, padded batches against single rows, and every sampling option."""

import copy

import numpy as np
import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.models.decoder import Decoder
from hybridzoo.zoo.models.prefill import prefill
from hybridzoo.zoo.models.sampling import Sampler, uniforms
from hybridzoo.zoo.sampling_options import SamplingOptions

CFG = {
    "task": "causal_lm", "vocab_size": 50, "pad_vocab_size_multiple": 16, "d_model": 32, "layers": "mamba attention mamba2 moe", "tie_embeddings": False,
    "mixers": {
        "mamba": {"type": "mamba", "d_state": 4}, "mamba2": {"type": "mamba2", "d_state": 8, "headdim": 8},
        "attention": {"type": "attention", "nheads": 4}, "moe": {"type": "moe", "d_intermediate": 16, "num_experts": 4},
    },
    "norm": {"type": "rmsnorm", "eps": 1e-6},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = zoo.build(CFG, dtype=torch.float64).eval()
    model.lm_head.weight.data.mul_(40)  # decided enough that a greedy choice does not hang on rounding
    return model


def by_full_forwards(model, row, n, eos=None):
    for _ in range(n):
        token = model(row[None]).logits[0, -1, :50].argmax()
        row = torch.cat([row, token[None]])
        if eos is not None and token == eos:
            break
    return row


@torch.no_grad()
def test_greedy_equals_repeated_full_forwards(model):
    ids = torch.randint(0, 50, (2, 7))
    got = model.generate(ids, max_new_tokens=12)
    for row in range(2):
        assert got[row].tolist() == by_full_forwards(model, ids[row], 12).tolist()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_continue_as_they_would_alone(model, side):
    rows = [torch.randint(0, 50, (n,)) for n in (3, 9, 1)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    got = model.generate(ids, max_new_tokens=10, attention_mask=mask)
    for i, row in enumerate(rows):
        assert got[i, 9:].tolist() == by_full_forwards(model, row, 10)[len(row) :].tolist()


@torch.no_grad()
def test_a_row_that_ended_is_padded_while_the_others_go_on(model):
    ids = torch.randint(0, 50, (4, 6))
    free = model.generate(ids, max_new_tokens=15)
    eos = int(free[0, 8])
    got = model.generate(ids, max_new_tokens=15, eos_token_id=eos, pad_token_id=49)
    for row in range(4):
        expected = by_full_forwards(model, ids[row], 15, eos)
        assert got[row, : len(expected)].tolist() == expected.tolist()
        assert set(got[row, len(expected) :].tolist()) <= {49}
    assert model.generate(ids[:1], max_new_tokens=15, eos_token_id=[eos]).shape[1] <= free.shape[1]


@torch.no_grad()
def test_sampling_is_reproducible_and_stays_inside_the_vocabulary(model):
    ids = torch.randint(0, 50, (8, 4))
    draws = [model.generate(ids, max_new_tokens=20, temperature=5.0, seed=s) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    # the table is padded to 64 rows; none of the 14 is ever produced
    assert int(draws[0].max()) < 50


@torch.no_grad()
def test_a_sample_follows_from_seed_and_prompt_alone(model):
    prompts = [torch.randint(0, 50, (n,)) for n in (3, 7, 3)]
    ids, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for i, row in enumerate(prompts):
        ids[i, 7 - len(row) :], mask[i, 7 - len(row) :] = row, 1
    options = {
        "temperature": 3.0,
        "top_p": 0.95,
        "seed": 5,
        "n": 3,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
    }
    together = model.generate(ids, 12, attention_mask=mask, **options)
    assert together.shape == (9, 19)
    for i, row in enumerate(prompts):
        alone = model.generate(row[None], 12, **options)
        assert torch.equal(together[3 * i : 3 * i + 3, 7:], alone[:, len(row) :])
        assert len({tuple(text.tolist()) for text in alone}) == 3


def padded_prompts(*lengths):
    rows = [torch.randint(0, 50, (n,)) for n in lengths]
    ids, mask = (
        torch.zeros(len(rows), max(lengths), dtype=torch.long),
        torch.zeros(len(rows), max(lengths), dtype=torch.long),
    )
    for i, row in enumerate(rows):
        ids[i, ids.shape[1] - len(row) :], mask[i, ids.shape[1] - len(row) :] = row, 1
    return rows, ids, mask


@torch.no_grad()
def test_details_say_how_likely_tokens_were_and_why_rows_ended(model):
    ids = torch.randint(0, 50, (3, 6))
    free = model.generate(ids, 12)
    eos = int(free[1, 10])
    found = model.generate(ids, 12, eos_token_id=eos, details=True)
    assert torch.equal(found.sequences, model.generate(ids, 12, eos_token_id=eos)) and found.state is None
    logprobs = (
        model(found.sequences).logits[:, 5:-1, :50].log_softmax(-1).gather(2, found.sequences[:, 6:, None]).squeeze(2)
    )
    for row, count in enumerate(found.counts.tolist()):
        assert count == (free[row, 6:].tolist() + [eos]).index(eos) + (eos in free[row, 6:])
        torch.testing.assert_close(found.logprobs[row, :count].double(), logprobs[row, :count], atol=1e-5, rtol=0)
        assert not found.logprobs[row, count:].any()
        assert found.reasons[row] == ("eos" if eos in free[row, 6:] else "length")
    assert found.how.startswith("one operation after the other")
    assert (
        found.blocks.startswith("0 of 4 blocks in a few launches each; 3 part by part (") and "got cpu" in found.blocks
    )


@torch.no_grad()
@pytest.mark.parametrize("rows", [(0, 1, 2), (2,), (1, 1, 0, 2)])
def test_a_state_goes_on_where_each_row_ended(model, rows):
    prompts, ids, mask = padded_prompts(5, 2, 7)
    free = model.generate(ids, 20, attention_mask=mask)
    eos = int(free[0, 10])
    found = model.generate(ids, 8, attention_mask=mask, eos_token_id=eos, return_state=True)
    before = found.state.clone()
    at = torch.tensor(rows)
    last = found.sequences[at, 6 + found.counts[at]]
    more = model.generate(last[:, None], 9, state=found.state.reorder(at))
    for i, row in enumerate(rows):
        text = torch.cat([prompts[row], found.sequences[row, 7 : 7 + found.counts[row]]])
        assert more[i, 1:].tolist() == by_full_forwards(model, text, 9)[len(text) :].tolist()
    assert all(torch.equal(a, b) for a, b in zip(*map(leaves, (before, found.state)), strict=True))
    with pytest.raises(ValueError, match="state: is of 3 rows, and there are 1"):
        model.generate(ids[:1], 2, state=found.state)


def leaves(state):
    found = []
    state.map(lambda t: found.append(t) or t)
    return found


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_prompts_are_read_in_chunks(model, chunk):
    _, ids, mask = padded_prompts(11, 4, 1)
    assert torch.equal(
        model.generate(ids, 9, attention_mask=mask, prefill_chunk=chunk), model.generate(ids, 9, attention_mask=mask)
    )
    right = ids.flip(1), mask.flip(1)
    assert torch.equal(
        model.generate(right[0], 9, attention_mask=right[1], prefill_chunk=chunk),
        model.generate(right[0], 9, attention_mask=right[1]),
    )


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 3, 9, 40])
@pytest.mark.parametrize("chunk", [3, None])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_begins_without_a_state_and_leaves_what_a_state_of_zeros_leaves(window, chunk, padded):
    model = zoo.build(CFG, {"mixers.attention.window": window}, dtype=torch.float64).eval()
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5]) if padded else None
    want, zeros = prefill(model, ids, mask, model.init_state(2, 7 + 9), 9, chunk)
    got, state = prefill(model, ids, mask, None, 9, chunk)
    for _ in range(12):
        assert torch.allclose(got, want)
        assert [(t.shape, t.dtype) for t in leaves(state)] == [(t.shape, t.dtype) for t in leaves(zeros)]
        assert all(map(torch.allclose, leaves(state), leaves(zeros)))
        token = want.argmax(-1) % 50
        got, want = model.step(token, state), model.step(token, zeros)


@torch.no_grad()
def test_texts_end_rows_where_they_are_spelled(model, monkeypatch):
    class Letters:
        def decode(self, ids):
            return "".join("abcdefghij"[i % 10] for i in ids)

    monkeypatch.setattr(type(model), "tokenizer", Letters())
    ids = torch.randint(0, 50, (4, 5))
    free = model.generate(ids, 20)[:, 5:]
    texts = [Letters().decode(row.tolist()) for row in free]
    stop = [texts[0][6:9], texts[2][2:4]]
    found = model.generate(ids, 20, stop=stop, pad_token_id=49, details=True)
    for row, text in enumerate(texts):
        at = [text.find(word) + len(word) for word in stop if word in text]
        count = min(at, default=20)
        assert int(found.counts[row]) == count and found.reasons[row] == ("stop" if at else "length")
        assert found.sequences[row, 5 : 5 + count].tolist() == free[row, :count].tolist()
        assert set(found.sequences[row, 5 + count :].tolist()) <= {49}


@torch.no_grad()
def test_a_stream_gives_the_tokens_as_they_come(model):
    ids = torch.randint(0, 50, (2, 5))
    looks = list(model.stream(ids, 7, temperature=2.0, seed=4))
    want = model.generate(ids, 7, temperature=2.0, seed=4)[:, 5:]
    assert torch.equal(torch.cat([look.tokens for look in looks], 1), want) and len(looks) == 7
    assert [look.counts.tolist() for look in looks] == [[i, i] for i in range(1, 8)]
    first = next(model.stream(ids, 7, temperature=2.0, seed=4))
    assert torch.equal(first.tokens, want[:, :1])


@torch.no_grad()
def test_looking_less_often_changes_nothing(model, monkeypatch):
    ids = torch.randint(0, 50, (4, 5))
    eos = int(model.generate(ids, 40)[1, 12])
    options = {"eos_token_id": eos, "temperature": 1.5, "seed": 2, "details": True}
    want, init = model.generate(ids, 40, **options), Decoder.__init__

    def seldom(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.ahead = 16

    monkeypatch.setattr(Decoder, "__init__", seldom)
    got = model.generate(ids, 40, **options)
    assert torch.equal(got.sequences, want.sequences) and torch.equal(got.counts, want.counts)
    assert torch.equal(got.logprobs, want.logprobs) and got.reasons == want.reasons
    assert [look.tokens.shape[1] for look in model.stream(ids, 40)] == [16, 16, 8]


@torch.no_grad()
def test_slots_are_given_to_new_rows_while_others_go_on(model):
    prompts = [torch.randint(0, 50, (n,)) for n in (4, 9, 2, 6)]
    options = SamplingOptions(temperature=2.0, frequency_penalty=0.4, seed=1)
    decoder = Decoder(model, model.init_state(2, 40), Sampler(options, 2, 50, torch.device("cpu")), [], 0, 12)
    texts, waiting, slots = {}, list(range(4)), [None, None]
    while waiting or any(row is not None for row in slots):
        for slot in range(2):
            if slots[slot] is None and waiting:
                row = slots[slot] = waiting.pop(0)
                at = torch.tensor([slot])
                logits, state = prefill(model, prompts[row][None], None, None, 31, None)
                decoder.sampler.forget(at)
                decoder.put(at, logits, uniforms(1, 0, 5 + row)[None], 5 + row, state)
        look = decoder.advance(1)
        for slot, row in enumerate(slots):
            if row is not None:
                texts.setdefault(row, []).append(int(look.tokens[slot, 0]))
                slots[slot] = None if look.finished[slot] else row
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], 5 + row, **options.values())
        assert texts[row] == alone[0, len(prompt) :].tolist()


@torch.no_grad()
def test_the_penalty_does_not_count_padding(model):
    ids = torch.randint(1, 50, (1, 5))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    alone = model.generate(ids, max_new_tokens=10, repetition_penalty=1.5)
    assert (
        model.generate(padded, max_new_tokens=10, repetition_penalty=1.5, attention_mask=mask)[0, 8:].tolist()
        == alone[0, 5:].tolist()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature=-1"), ({"top_p": 0.0}, "top_p=0.0"), ({"top_p": 1.5}, "top_p=1.5"), ({"top_k": -1}, "top_k=-1"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3"), ({"repetition_penalty": 0}, "repetition_penalty=0"), ({"n": 2}, "n=2.*temperature"),
        ({"max_new_tokens": 3, "max_length": 9}, "give one of them"), ({"max_length": 3}, "have 4 columns"), ({"stop": [""]}, "not empty"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"), ({"record": True}, "a cpu records nothing"),
        ({"min_p": 1.0}, "min_p=1.0"), ({"typical_p": 0}, "typical_p=0"), ({"seed": -1}, "seed=-1"), ({"top_k": 2.5}, "top_k=2.5"),
        ({"frequency_penalty": torch.nan}, "frequency_penalty=nan"), ({"logit_bias": {50: 1.0}}, "ids 0 to 49"),
        ({"logit_bias": dict.fromkeys(range(50), -torch.inf)}, "forbids all 50"), ({"logit_bias": [1]}, "is a list"),
        ({"temperature": 1e-42}, "temperature=1e-42.*at least 1e-30, or 0"), ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40"),
        ({"frequency_penalty": -1e39}, r"frequency_penalty=-1e\+39"), ({"presence_penalty": -1e39}, r"presence_penalty=-1e\+39"),
        ({"logit_bias": {3: 1e39}}, r"3: 1e\+39.*up to 1e\+30"), ({"logit_bias": {1.5: 1.0}}, r"1\.5: 1\.0"),
        ({"logit_bias": {"x": 1}}, "'x'"), ({"logit_bias": "{"}, "is not JSON"), ({"logit_bias": {3: torch.inf}}, "3: inf"),
        ({"pad_token_id": -100}, r"pad_token_id=-100.*ids 0 to 63"), ({"pad_token_id": 64, "assistant": "lookup"}, "pad_token_id=64"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"), ({"eos_token_id": 1.5}, r"eos_token_id=1\.5"), ({"stop": 5}, "stop=5"),
        ({"state": (torch.zeros(2),)}, r"state=.*got a tuple.*out\.state"), ({"attention_mask": [[1] * 4] * 2}, "attention_mask.*a list"),
        ({"assistant": "mamba-tiny"}, "got 'mamba-tiny'"), ({"assistant": torch.nn.Linear(2, 2)}, "got a Linear, expected a language model"),
        ({"attention_mask": torch.ones(1, 3)}, r"\(1, 3\)"), ({"attention_mask": torch.zeros(2, 4)}, "row 0 has no real token"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(model, options, words):
    with pytest.raises(ValueError, match=words):
        model.generate(torch.ones(2, 4, dtype=torch.long), **options)


def test_nothing_to_add_returns_the_prompts(model):
    ids = torch.randint(0, 50, (2, 4))
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(ids[:, :0])
    with pytest.raises(ValueError, match="got a list"):
        model.generate([[1, 2]])
    with pytest.raises(TypeError, match="input_ids"):
        model.generate()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_of_one_line(model, value, temperature):
    broken, ids = copy.deepcopy(model), torch.randint(0, 50, (3, 4))
    with torch.no_grad():
        broken.backbone.norm_f.weight[5] = value
    with pytest.raises(ValueError, match=r"logits: those of row 0 are not finite.*diverged") as e:
        broken.generate(ids, 3, temperature=temperature)
    assert "\n" not in str(e.value)


def test_a_row_that_breaks_on_the_way_is_named_unless_it_has_ended(model):
    ids, broken = torch.randint(0, 50, (3, 4)), copy.deepcopy(model)
    want = model.generate(ids, 6)
    with torch.no_grad():
        broken.backbone.embedding.weight[want[1, 5]] = torch.nan
    with pytest.raises(ValueError, match=r"logits: those of row \d are not finite"):
        broken.generate(ids, 6)
    ended = broken.generate(ids[1:2], 6, eos_token_id=int(want[1, 5]))
    assert ended.tolist() == want[1:2, :6].tolist()


def test_minus_infinity_forbids_a_token(model):
    kept = copy.deepcopy(model)
    kept.lm_head.register_forward_hook(lambda m, args, out: out.index_fill(-1, torch.arange(25), -torch.inf))
    assert kept.generate(torch.randint(0, 50, (2, 4)), 8)[:, 4:].min() >= 25


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"temperature": 1e-30}, [2, 2, 2]), ({"repetition_penalty": 1e30}, [2, 3, 1]), ({"repetition_penalty": 1e-30}, [2, 2, 2]),
        ({"frequency_penalty": -1e30}, [2, 2, 2]), ({"presence_penalty": 1e30}, [2, 3, 1]), ({"logit_bias": {4: 1e30, 2: -1e30}}, [4, 4, 4]),
    ],
)  # fmt: skip
def test_the_largest_options_leave_a_choice(options, chosen):
    sampler = Sampler(SamplingOptions(**({"temperature": 1e-2} | options)), 2, 5, torch.device("cpu"))
    logits, chance = torch.tensor([[-2e4, 1.0, 3e4, 2.0, 0.0]]).repeat(2, 1), torch.tensor([0.99, 0.5]).double()
    assert [sampler(logits, chance).tolist() for _ in chosen] == [[token, token] for token in chosen]


def test_tokens_of_every_kind_that_people_have_are_taken(model):
    ids = torch.randint(0, 50, (2, 4))
    eos = int(model.generate(ids, 6)[0, 6])
    want = model.generate(ids, 6, eos_token_id=eos, repetition_penalty=1.2)
    for given in (np.int64(eos), np.array([eos]), torch.tensor(eos), torch.tensor([eos]), (eos,), {eos}):
        assert torch.equal(model.generate(ids, 6, eos_token_id=given, repetition_penalty=1.2), want)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model.generate(ids.to(dtype), 6, eos_token_id=eos, repetition_penalty=1.2), want)
    # an end of text that the model has no row for ends nothing, and is not read behind the end of a row
    assert torch.equal(model.generate(ids, 6, eos_token_id=[999, eos], pad_token_id=eos, repetition_penalty=1.2), want)
    assert model.generate(ids, 6, eos_token_id=[999, eos], repetition_penalty=1.2).max() < 64


def test_a_stream_says_what_is_wrong_before_the_first_token_is_asked_for(model):
    with pytest.raises(ValueError, match="ids 0 to 49"):
        model.stream(torch.ones(2, 4, dtype=torch.long), 3, logit_bias={50: 1.0})


def test_what_cannot_be_read_is_refused_before_anything_is(monkeypatch):
    model, other = (zoo.build(name).eval() for name in ("transformer-tiny", "jamba-tiny"))
    ids, wide = (
        torch.zeros(2, 3, dtype=torch.long),
        zoo.build("transformer-tiny", ["layers=(attention mlp) * 3"]).eval(),
    )
    for call, words in {
        lambda: model.generate(ids + 256, 2): r"input_ids: holds 256, and the model knows the ids 0 to 255",
        lambda: model.generate(ids - 1, 2): r"input_ids: holds -1, and",
        lambda: model.generate(
            ids, 2, state=other(ids).state
        ): r"state: block 0 has MambaState\(conv \(128,\), .*model's leaves AttentionState",
        lambda: model.generate(ids, 2, state=wide(ids).state): r"state: is of 6 blocks, and the model has 4",
        lambda: model.generate(ids, 0, return_state=True): r"generate\(return_state=True\): without a new token",
        lambda: next(model.stream(ids + 300, 2)): r"input_ids: holds 300",
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    assert torch.equal(model.generate(ids, 0), ids)

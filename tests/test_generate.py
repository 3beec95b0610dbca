"""Generation: the step path against full forwards, padded batches against single rows, and every sampling option."""

import copy

import pytest
import torch

import hybridzoo as zoo

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
        ({"min_p": 1.0}, "min_p=1.0"), ({"typical_p": 0}, "typical_p=0"), ({"seed": -1}, "seed=-1"), ({"top_k": 2.5}, "top_k=2.5"),
        ({"frequency_penalty": torch.nan}, "frequency_penalty=nan"), ({"logit_bias": {50: 1.0}}, "ids 0 to 49"),
        ({"logit_bias": dict.fromkeys(range(50), -torch.inf)}, "forbids all 50"), ({"logit_bias": [1]}, "is a list"),
        ({"logit_bias": {"x": 1}}, "'x'"), ({"logit_bias": "{"}, "is not JSON"), ({"logit_bias": {3: torch.inf}}, "3: inf"),
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

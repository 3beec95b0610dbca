"""The choice of a token: beside transformers' processors, plain definitions, and the frequencies of many draws."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers.generation import logits_process as theirs

from hybridzoo.zoo.models.sampling import Sampler, uniforms
from hybridzoo.zoo.sampling_options import SamplingOptions

CPU = torch.device("cpu")
ROWS, VOCAB = 32, 300
SAME = {
    "temperature": (lambda x: theirs.TemperatureLogitsWarper(x), 0.7),
    "top_k": (lambda x: theirs.TopKLogitsWarper(x), 7),
    "top_p": (lambda x: theirs.TopPLogitsWarper(x), 0.8),
    "min_p": (lambda x: theirs.MinPLogitsWarper(x), 0.1),
    "typical_p": (lambda x: theirs.TypicalLogitsWarper(x), 0.7),
}


def processed(logits, ids, **options):
    sampler = Sampler(SamplingOptions(**{"temperature": 1.0} | options), *logits.shape, CPU)
    sampler.read(ids)
    return sampler._warped(sampler._penalised(logits))


@pytest.mark.parametrize("chosen", [*([name] for name in SAME), list(SAME)], ids=lambda names: "+".join(names))
@pytest.mark.parametrize("penalised", [False, True])
def test_options_mean_what_they_mean_in_transformers(chosen, penalised):
    rng = torch.Generator().manual_seed(0)
    logits, ids = 3 * torch.randn(ROWS, VOCAB, generator=rng), torch.randint(0, VOCAB, (ROWS, 20), generator=rng)
    options, expected = {name: SAME[name][1] for name in chosen}, logits
    if penalised:
        options |= {"repetition_penalty": 1.3, "logit_bias": {3: 2.5, 7: -1.0}}
        expected = theirs.SequenceBiasLogitsProcessor({(3,): 2.5, (7,): -1.0})(ids, expected)
        expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(ids, expected)
    for name in chosen:
        expected = SAME[name][0](SAME[name][1])(ids, expected)
    assert torch.equal(processed(logits, ids, **options), expected)


def plain(logits, counts, o, apart=0.0):
    """The probabilities of every token of one row, one by one."""
    z = [x - o["frequency_penalty"] * c - o["presence_penalty"] * (c > 0) for x, c in zip(logits, counts, strict=True)]
    z = [x / o["temperature"] for x in z]
    alive = set(range(len(z)))

    def probabilities():
        total = math.fsum(math.exp(z[i]) for i in alive)
        return {i: math.exp(z[i]) / total for i in alive}

    if o["top_k"]:
        least = sorted(z, reverse=True)[: o["top_k"]][-1]
        alive = {i for i in alive if z[i] >= least}
    for name in ("top_p", "min_p", "typical_p"):
        p, reached, kept = probabilities(), 0.0, set()
        if name == "min_p":
            alive = {i for i in alive if p[i] >= o["min_p"] * max(p.values())}
            continue
        entropy = -math.fsum(q * math.log(q) for q in p.values())
        order = {i: (-q if name == "top_p" else abs(-math.log(q) - entropy)) + apart * i for i, q in p.items()}
        for i in sorted(alive, key=order.__getitem__):
            if reached < o[name]:
                kept.add(i)
            reached += p[i]
        alive = kept
    return [probabilities().get(i, 0.0) for i in range(len(z))]


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.3, 3), "top_k": st.integers(0, 12), "top_p": st.floats(0.05, 1), "min_p": st.floats(0, 0.5),
        "typical_p": st.floats(0.05, 1), "frequency_penalty": st.floats(-1, 2), "presence_penalty": st.floats(-1, 2),
    }
)  # fmt: skip


@given(OPTIONS, st.integers(0, 2**16))
@settings(max_examples=150, deadline=None)
def test_probabilities_are_those_of_the_definitions(options, seed):
    rng = torch.Generator().manual_seed(seed)
    logits, counts = 2 * torch.randn(1, 12, generator=rng), torch.randint(0, 3, (1, 12), generator=rng)
    sampler = Sampler(SamplingOptions(**options), 1, 12, CPU)
    if sampler.counts is not None:
        sampler.counts += counts
    got = sampler._warped(sampler._penalised(logits)).softmax(-1)[0]
    want = torch.tensor(plain(logits[0].tolist(), counts[0].tolist(), options))
    # float32 may fall on the other side of a bound
    near = (got - want).abs().max() < 1e-5
    assert near or _at_a_bound(logits, counts, options)


def _at_a_bound(logits, counts, options):
    def moved(by):
        o = {name: value if name == "top_k" else value * (1 + by) for name, value in options.items()}
        # nor is it known who comes first of two that are as likely, or as typical
        return [p > 0 for p in plain(logits[0].tolist(), counts[0].tolist(), o, by)]

    return moved(1e-6) != moved(-1e-6)


def test_draws_have_the_frequencies_of_their_probabilities():
    n, logits = 20000, torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    chance = torch.stack([uniforms(3, i, 1)[0] for i in range(n)])
    for options in (
        {"temperature": 1.0},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 2},
        {"temperature": 1.0, "top_p": 0.7},
    ):
        sampler = Sampler(SamplingOptions(**options), n, 5, CPU)
        found = sampler(logits.expand(n, 5), chance).bincount(minlength=5)
        p = processed(logits[None], torch.zeros(1, 1, dtype=torch.long), **options).softmax(-1)[0].double()
        spread = (n * p * (1 - p)).sqrt()
        assert ((found - n * p).abs() <= 4 * spread).all()


def test_chance_decides_by_the_sum_of_what_stands_in_front():
    logits = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log().expand(6, 4)
    chance = torch.tensor([0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert Sampler(SamplingOptions(temperature=1.0), 6, 4, CPU)(logits, chance).tolist() == [0, 0, 2, 2, 3, 3]


def test_penalties_count_what_was_chosen_and_the_repetition_penalty_what_was_read():
    logits = torch.tensor([[2.0, 1.9, -1.0], [-1.0, -1.1, -3.0]])
    greedy = Sampler(SamplingOptions(repetition_penalty=1.2), 2, 3, CPU)
    assert greedy(logits).tolist() == [0, 0] and greedy(logits).tolist() == [1, 1]
    read = Sampler(SamplingOptions(repetition_penalty=1.2), 2, 3, CPU)
    read.read(torch.tensor([[0, 2], [0, 2]]), torch.tensor([[True, False], [False, True]]))
    assert read(logits).tolist() == [1, 0]
    counted = Sampler(SamplingOptions(frequency_penalty=0.06), 1, 3, CPU)
    assert [int(counted(logits[:1])) for _ in range(4)] == [0, 0, 1, 0]
    once = Sampler(SamplingOptions(presence_penalty=0.06), 1, 3, CPU)
    assert [int(once(logits[:1])) for _ in range(4)] == [0, 0, 0, 0]
    assert int(Sampler(SamplingOptions(logit_bias={0: -math.inf}), 1, 3, CPU)(logits[:1])) == 1


def test_uniforms_differ_by_seed_and_sample_and_go_on_alike():
    assert torch.equal(uniforms(1, 2, 5), uniforms(1, 2, 9)[:5])
    rows = [tuple(uniforms(seed, sample, 3).tolist()) for seed in range(4) for sample in range(4)]
    assert len(set(rows)) == 16 and uniforms(0, 0, 4).dtype == torch.float64

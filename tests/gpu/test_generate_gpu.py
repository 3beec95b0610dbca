"""Decoding on a GPU: a recorded step gives the tokens of one that is not, in batches, slots and half precision."""

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.models.decoder import AHEAD, Decoder
from hybridzoo.zoo.models.prefill import prefill
from hybridzoo.zoo.models.sampling import Sampler, uniforms
from hybridzoo.zoo.sampling_options import SamplingOptions

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
NAMES = ["mamba-tiny", "mamba2-tiny", "transformer-tiny", "jamba-tiny", "samba-tiny", "zamba2-tiny", "mambaformer-tiny"]
SAMPLED = {
    "temperature": 1.5,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.2,
    "seed": 3,
}


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    torch.manual_seed(0)
    return zoo.build(request.param, device="cuda", dtype=torch.bfloat16).eval()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_recorded_step_chooses_what_the_others_do(model, options):
    ids = torch.randint(1, 256, (3, 20), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :19] = 0, 0
    found = [
        model.generate(ids, 3 * AHEAD + 5, attention_mask=mask, record=record, details=True, eos_token_id=7, **options)
        for record in (True, False)
    ]
    assert found[0].how == "recorded as a CUDA graph" and found[1].how.startswith("one operation")
    assert torch.equal(found[0].sequences, found[1].sequences) and torch.equal(found[0].counts, found[1].counts)
    assert torch.equal(found[0].logprobs, found[1].logprobs) and found[0].reasons == found[1].reasons


@torch.no_grad()
def test_a_sample_is_the_same_alone_and_among_others(model):
    model = model.float()
    ids = torch.randint(1, 256, (3, 9), device="cuda")
    together = model.generate(ids, 24, n=2, **SAMPLED)
    for row in range(3):
        assert torch.equal(together[2 * row : 2 * row + 2], model.generate(ids[row : row + 1], 24, n=2, **SAMPLED))


@torch.no_grad()
def test_an_assistant_changes_no_token(model):
    model = model.double()
    ids = torch.randint(1, 256, (2, 9), device="cuda")
    found = model.generate(ids, 3 * AHEAD, assistant="lookup", details=True)
    assert torch.equal(found.sequences, model.generate(ids, 3 * AHEAD, record=False))
    assert found.counts.tolist() == [3 * AHEAD] * 2


@torch.no_grad()
def test_slots_change_under_a_recorded_step():
    torch.manual_seed(0)
    model = zoo.build("jamba-tiny", device="cuda").eval()
    prompts = [torch.randint(1, 256, (1, n), device="cuda") for n in (4, 9, 2)]
    options = SamplingOptions(temperature=2.0, seed=1)
    decoder = Decoder(model, model.init_state(2, 100, device="cuda"), Sampler(options, 2, 256, CUDA), [], 0, 40)

    def begin(slot, prompt):
        logits, state = prefill(model, prompt, None, None, 90, None)
        decoder.put(torch.tensor([slot]), logits, uniforms(1, 0, 40)[None], 40, state)

    begin(0, prompts[0])
    first = decoder.advance(8).tokens[0].tolist()
    begin(1, prompts[1])
    both = decoder.advance(AHEAD).tokens
    decoder.drop(torch.tensor([0]))
    begin(0, prompts[2])
    last = decoder.advance(8).tokens[0].tolist()
    wanted = [model.generate(p, 40, record=False, **options.values())[0, p.shape[1] :].tolist() for p in prompts]
    assert first + both[0].tolist() == wanted[0][: 8 + AHEAD]
    assert both[1].tolist() == wanted[1][:AHEAD] and last == wanted[2][:8]

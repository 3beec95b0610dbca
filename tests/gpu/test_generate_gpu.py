"""Decoding on a GPU: a recorded step gives the tokens of one that is not, in batches, slots and half precision."""

import copy

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.kernels.dispatch import ENV
from hybridzoo.kernels.few.cuda import SURE_ROWS
from hybridzoo.layers import fused
from hybridzoo.layers.reading import Reading
from hybridzoo.zoo.models import decoder as decoding
from hybridzoo.zoo.models.decoder import AHEAD, Decoder
from hybridzoo.zoo.models.prefill import prefill
from hybridzoo.zoo.models.sampling import Sampler, uniforms
from hybridzoo.zoo.models.verify import Verifier
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
@pytest.mark.parametrize("assistant", ["lookup", "model"])
@pytest.mark.parametrize("record", [True, False])
def test_an_assistant_changes_no_token(model, assistant, record):
    model = model.double()
    ids = torch.randint(1, 256, (3, 12), device="cuda")
    ids[:, 6:] = ids[:, :6].clone()
    helper = assistant if assistant == "lookup" else zoo.build("mamba-tiny", device="cuda").eval()
    options = {"eos_token_id": 7, "assistant": helper, "record": record, "details": True}
    want = model.generate(ids, 3 * AHEAD, record=False, eos_token_id=7, details=True)
    found = model.generate(ids, 3 * AHEAD, **options)
    assert torch.equal(found.sequences, want.sequences) and found.reasons == want.reasons
    assert found.how.startswith("recorded as a CUDA graph: guesses" if record else "one operation")
    torch.testing.assert_close(found.logprobs, want.logprobs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_recorded_check_takes_over_the_rows_that_are_right(model):
    """Beside the same forwards one by one: what is chosen, which rows are right, and the state, over rounds of other tokens."""
    model = model.float()
    text = torch.randint(1, 256, (3, 120), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    start = model(text[:, :20], state=model.init_state(3, 140)).state
    recorded, eager = Verifier(model, start.clone(), 16, True), Verifier(model, start.clone(), 16, False)
    for turn in range(8):
        ids, known = text[:, 20 + 9 * turn : 29 + 9 * turn].cpu(), torch.tensor([1, 2 + turn % 3, 5])
        lengths = torch.tensor([1 + turn % 2, 6, 9])
        first, second = eager(ids, known, lengths), recorded(ids, known, lengths)
        assert first.whole.tolist() == second.whole.tolist() and not second.broken.any()
        for row, (begin, end) in enumerate(zip(known.tolist(), lengths.tolist(), strict=True)):
            assert torch.equal(first.tokens[row, begin - 1 : end], second.tokens[row, begin - 1 : end])
        assert torch.equal(eager.state.tokens, recorded.state.tokens)
    assert recorded._run.recorded and recorded.state.tokens.max() > 20
    last = text[:, 100]
    torch.testing.assert_close(model.step(last, recorded.state), model.step(last, eager.state), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("b", "w"), [(1, 8), (4, 16)])  # norms with and without the products behind them
def test_tokens_are_read_in_few_launches_as_rightly_as_by_a_forward(name, b, w):
    """Beside float64: logits of a few tokens in bfloat16, and of those behind the states that they leave."""
    torch.manual_seed(0)
    model = zoo.build(name, device="cuda", dtype=torch.bfloat16).eval()
    exact = zoo.build(name, device="cuda", dtype=torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    ids, lengths = torch.randint(1, 256, (b, 60), device="cuda"), torch.tensor([w, 9, 1, 12][:b], device="cuda")
    state = model(ids[:, :20], state=model.init_state(b, 60)).state
    start = exact(ids[:, :20], state=exact.init_state(b, 60)).state
    reading, go_on = Reading(lengths, w, {}), torch.tensor([True, True, True, False][:b], device="cuda")
    together = [
        block.why_not_read(model.backbone.embed(ids[:, :w]), s) is None
        for block, s in zip(model.backbone.blocks, state.layers, strict=True)
    ]
    # the others have experts, windows, shared adapters, or heads of 12 channels
    assert any(together) and (all(together) or name in ("jamba-tiny", "samba-tiny", "zamba2-tiny", "transformer-tiny"))
    before = state.clone()
    found = {"read": model.read(ids[:, 20 : 20 + w], state, reading)}
    state.read_on(reading, go_on)
    assert state.tokens.tolist() == (20 + lengths * go_on).tolist()
    for row in range(b):
        n, own = int(lengths[row]), torch.tensor([row])
        out, want = (
            m(ids[row : row + 1, 20 : 20 + n], state=s.reorder(own)) for m, s in ((model, before), (exact, start))
        )
        found["forward"] = out.logits[0]
        ends = (want.state, out.state) if go_on[row] else (start.reorder(own), before.reorder(own))
        pairs = [(want.logits[0], found["read"][row, :n], found["forward"])]
        last = ids[row : row + 1, 50:53]
        pairs.append(
            (
                exact(last, state=ends[0]).logits[0],
                model(last, state=state.reorder(own)).logits[0],
                model(last, state=ends[1]).logits[0],
            )
        )
        for right, read, forward in pairs:
            errors = [(x.double() - right).norm() / right.norm() for x in (read, forward)]
            assert errors[0] <= 2 * errors[1] + 2e-3, (row, errors)


@torch.no_grad()
def test_a_state_goes_back_between_replays(model):
    text = torch.randint(1, 256, (2, 60), device="cuda")
    state, token = model.init_state(2, 80), text[:, 0].clone()
    for _ in range(2):
        model.step(token, state)
    start = state.mark()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model.step(token, state)
    state.back(start)  # capturing has run nothing, but the host counts

    def steps(columns):
        found = []
        for column in columns.unbind(1):
            token.copy_(column)
            graph.replay()
            found.append(logits.clone())
        return torch.stack(found, 1)

    steps(text[:, :20])
    mark = state.mark()
    want = steps(text[:, 20:])
    for _ in range(2):
        state.back(mark)
        assert state.tokens.tolist() == [22, 22]
        assert torch.equal(steps(text[:, 20:]), want)
    state.back(mark, torch.tensor([True, False]))
    assert state.tokens.tolist() == [22, 62]
    assert torch.equal(steps(text[:, 20:30])[0], want[0, :10])
    state.keep(2)
    model.step(token, state)
    state.roll_back(1)
    with (
        pytest.raises(RuntimeError, match="a CUDA graph does not keep marks"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        model.step(token, state)


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


@pytest.fixture
def recorded(monkeypatch):
    """Counts the steps that are recorded."""
    made, record = [], decoding._recorded
    monkeypatch.setattr(decoding, "_recorded", lambda work: made.append(record(work)) or made[-1])
    return made


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_second_call_records_nothing(model, recorded, options):
    model = copy.deepcopy(model).bfloat16()
    for l, new in ((20, 40), (9, 48), (31, 33)):
        ids = torch.randint(1, 256, (2, l), device="cuda")
        got = model.generate(ids, new, details=True, **options)
        assert len(recorded) == 1 and len(model.recordings) == 1
        want = model.generate(ids, new, details=True, record=False, **options)
        assert torch.equal(got.sequences, want.sequences) and torch.equal(got.logprobs, want.logprobs)
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert torch.equal(model.generate(ids, 12), model.generate(ids, 12, record=False)) and len(recorded) == 2


@torch.no_grad()
def test_a_state_without_room_has_some_before_a_step_is_recorded(model):
    model = copy.deepcopy(model).double()
    ids = torch.randint(1, 256, (2, 30), device="cuda")
    state = model(ids[:, :20]).state
    got = model.generate(ids[:, 20:], 120, state=state)
    assert torch.equal(got[:, 10:], model.generate(ids, 120, record=False)[:, 30:])


@torch.no_grad()
@pytest.mark.parametrize("b", [1, 3, 9, 16, 17, 32])
def test_blocks_in_a_few_launches_do_what_their_parts_do(model, b, monkeypatch):
    model, exact = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).double()
    ids = torch.randint(1, 256, (b, 24), device="cuda")

    def run(model):
        state = model.init_state(b, 32)
        logits = torch.stack([model.step(column, state) for column in ids.unbind(1)], 1)
        return [logits.double(), *(t.double() for t in leaves(state))], model.backbone.steps_taken(state)

    want, _ = run(exact)
    with monkeypatch.context() as patch:
        if b > SURE_ROWS:  # by small weights cuBLAS is faster
            patch.setenv(ENV, "cuda")
        together, said = run(model)
    monkeypatch.setattr(fused, "fits", lambda *call: "asked for")
    apart, otherwise = run(model)
    assert not said.startswith("0 of") and otherwise.startswith("0 of")
    for x, y, z in zip(together, apart, want, strict=True):
        assert (x - z).norm() <= 1.5 * (y - z).norm() + 1e-3 * z.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny", "jamba-tiny"])
def test_recurrent_states_in_bfloat16(name):
    torch.manual_seed(0)
    model = zoo.build(name, device="cuda", dtype=torch.bfloat16).eval()
    ids = torch.randint(1, 256, (2, 40), device="cuda")
    states = [model.init_state(2, 48, state_dtype=dtype) for dtype in (None, torch.bfloat16)]
    wide, small = (torch.stack([model.step(c, s) for c in ids.unbind(1)], 1).float() for s in states)
    assert not torch.equal(small, wide)
    if name == "jamba-tiny":
        # of most tokens: where a rounded state changes a router's choice, the rest of that token is another
        assert ((small - wide).norm(dim=-1) / wide.norm(dim=-1)).median() < 2e-2
    else:
        assert (small - wide).norm() < 2e-2 * wide.norm()
    halved = [s for s in states[1].layers if getattr(s, "recurrent", ())]
    assert halved and all(s.ssm.dtype == torch.bfloat16 for s in halved) and states[1].nbytes < states[0].nbytes
    found = [
        model.generate(ids, 40, record=record, state_dtype=torch.bfloat16, details=True) for record in (None, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences) and found[0].how == "recorded as a CUDA graph"
    more = model.generate(ids, 20, state=states[1], state_dtype=torch.bfloat16)  # a prompt behind a rounded state
    assert more.shape == (2, 60)


def leaves(state):
    found = []
    state.map(lambda t: found.append(t) or t)
    return found

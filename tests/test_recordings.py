"""Recorded steps are kept from one generation to the next, seen without a GPU: a tape stands in for a CUDA graph."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tape import Tape

import hybridzoo as zoo
from hybridzoo.zoo.models import decoder, recordings
from hybridzoo.zoo.models.decoder import Decoder
from hybridzoo.zoo.models.prefill import prefill
from hybridzoo.zoo.models.sampling import Sampler
from hybridzoo.zoo.sampling_options import SamplingOptions

CFG = {
    "task": "causal_lm", "vocab_size": 50, "d_model": 32, "layers": "mamba attention mamba2 mlp", "tie_embeddings": False,
    "mixers": {
        "mamba": {"type": "mamba", "d_state": 4}, "mamba2": {"type": "mamba2", "d_state": 8, "headdim": 8},
        "attention": {"type": "attention", "nheads": 4}, "mlp": {"type": "mlp", "d_intermediate": 24},
    },
    "norm": {"type": "rmsnorm", "eps": 1e-6},
}  # fmt: skip


@pytest.fixture
def tapes(monkeypatch):
    made = []
    monkeypatch.setattr(decoder, "_RECORD", ("cpu",))
    monkeypatch.setattr(decoder, "_recorded", lambda work: made.append(Tape(work)) or made[-1])
    return made


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = zoo.build(CFG, dtype=torch.float64).eval()
    model.lm_head.weight.data.mul_(40)
    return model


def prompts(b=2, l=7, seed=1):
    return torch.randint(1, 50, (b, l), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3}], ids=["greedy", "sampled"]
)  # fmt: skip
def test_a_second_generation_replays_what_the_first_has_recorded(model, tapes, options):
    for at, (l, new) in enumerate([(7, 30), (12, 20), (3, 24)]):
        ids = prompts(l=l, seed=at)
        options = options | {"seed": at} if options else {}
        got = model.generate(ids, new, details=True, eos_token_id=7, **options)
        assert got.how == "recorded as a CUDA graph" and len(tapes) == 1
        want = model.generate(ids, new, details=True, eos_token_id=7, record=False, **options)
        assert want.how.startswith("one operation") and torch.equal(got.sequences, want.sequences)
        assert torch.equal(got.logprobs, want.logprobs) and got.reasons == want.reasons
    assert tapes[0].replays > 50 and len(model.recordings) == 1


class Mine(torch.nn.Identity):
    """A module that nobody knows: steps are recorded with it, and not kept."""


@torch.no_grad()
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("window", [None, 40])
def test_a_generation_goes_on_from_a_state_that_had_no_room(model, tapes, kept, window):
    model.lm_head = model.lm_head if kept else torch.nn.Sequential(model.lm_head, Mine())
    model.backbone.layers[1].mixer.window = window
    ids = prompts(l=9)
    first = model(ids[:, :5])
    got = model.generate(ids[:, 5:], 60, state=first.state, return_state=True)
    assert torch.equal(got.sequences[:, 4:], model.generate(ids, 60, record=False)[:, 9:])
    last = got.sequences[:, -1:]
    more = model.generate(last, 70, state=got.state)
    assert torch.equal(more[:, 1:], model.generate(ids, 130, record=False)[:, 69:])


@torch.no_grad()
def test_another_form_is_recorded_anew(model, tapes):
    ids = prompts()
    calls = [
        {}, {"temperature": 1.0}, {"temperature": 2.0}, {"eos_token_id": 3}, {"details": True}, {"state_dtype": torch.bfloat16},
        {"max_new_tokens": 100},
    ]  # fmt: skip
    for count, call in enumerate(calls, 1):
        model.generate(ids, **{"max_new_tokens": 6} | call)
        assert len(tapes) == count
    assert len(model.recordings) == 4
    model.generate(ids, **{"max_new_tokens": 6} | calls[-2])
    assert len(tapes) == len(calls)
    model.generate(prompts(b=1), 6)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(prompts(b=1), 6)
    assert len(tapes) == len(calls) + 1  # of what a GPU is asked to do, autocast on the CPU says nothing
    model.generate(ids, 2)
    assert len(tapes) == len(calls) + 1  # two steps prepare, and the last one is not read


@torch.no_grad()
def test_nothing_is_replayed_of_other_weights(model, tapes):
    ids = prompts()

    def generated():
        found = model.generate(ids, 12)
        assert torch.equal(found, model.generate(ids, 12, record=False))
        return len(tapes)

    assert generated() == generated() == 1
    model.backbone.layers[0].mixer.D.mul_(0.5)  # in place, it is what the recorded step reads
    assert generated() == 1
    model.load_state_dict({name: x.clone().mul(1.1) for name, x in model.state_dict().items()}, assign=True)
    assert generated() == 2 and len(model.recordings) == 1
    assert model.float() is model and generated() == 3
    model.backbone.logits_multiplier = 0.5
    assert generated() == 4
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
    assert generated() == 5

    model.lm_head[1] = Mine()
    assert generated() == 6 and generated() == 7 and len(model.recordings) == 1  # nobody knows what else it looks at


@torch.no_grad()
def test_a_stream_that_nobody_listens_to_gives_its_step_back(model, tapes):
    ids = prompts()
    looks = model.stream(ids, 40)
    for _ in range(4):
        next(looks)
    other = model.stream(ids, 40)  # while the first is on its way
    texts = torch.cat([look.tokens for look in other], 1)
    assert len(tapes) == 2
    looks.close()
    again = model.generate(ids, 40, details=True)
    assert torch.equal(again.sequences[:, 7:], texts) and len(tapes) == 2 and len(model.recordings) == 1


@torch.no_grad()
def test_recordings_keep_no_model_alive_and_are_not_copied(tapes):
    model = zoo.build(CFG).eval()
    model.generate(prompts(), 6)
    assert len(model.recordings) == 1 and len(copy.deepcopy(model).recordings) == 0
    assert len(pickle.loads(pickle.dumps(model.recordings))) == 0
    tapes.clear()
    gone = weakref.ref(model.backbone.layers[0].mixer.in_proj.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None  # at once: a GPU's memory is not to wait for the collector
    finally:
        gc.enable()


@torch.no_grad()
def test_what_is_too_large_is_not_kept(model, tapes, monkeypatch):
    monkeypatch.setattr(recordings, "_BYTES", 10)
    assert torch.equal(model.generate(prompts(), 9), model.generate(prompts(), 9))
    assert len(tapes) == 2 and len(model.recordings) == 0


def test_room_is_an_eighth_at_most_too_large():
    for tokens in (*range(1, 3000), 16_400, 131_072):
        room = recordings.room_for(tokens)
        assert tokens <= room <= max(tokens + 63, tokens * 9 / 8) and recordings.room_for(room) == room


@torch.no_grad()
def test_slots_that_grow_are_recorded_anew(model, tapes):
    texts, prompts_ = {}, [prompts(b=1, l=l, seed=l) for l in (4, 9, 60)]
    slots = Decoder(model, model.init_state(2, 40), Sampler(SamplingOptions(), 2, 50, torch.device("cpu")), [], 0, 20)
    for at, ids in enumerate(prompts_):
        logits, state = prefill(model, ids, None, None, 30 if at < 2 else 4, None)
        slots.put(torch.tensor([at % 2]), logits, torch.zeros(1, 0, dtype=torch.float64), 20, state)
        for _ in range(20 if at == 2 else 5):
            look = slots.advance(1)
            for slot, row in ((at % 2, at), *(((at - 1) % 2, at - 1),) * (at > 0)):
                texts.setdefault(row, []).append(int(look.tokens[slot, 0]))
        assert len(tapes) == (1 if at < 2 else 2)
    for at, ids in enumerate(prompts_):
        want = model.generate(ids, 20, record=False)[0, ids.shape[1] :].tolist()
        assert texts[at][: len(want)] == want[: len(texts[at])]


@torch.no_grad()
def test_recordings_can_be_let_go_of(model, tapes):
    model.generate(prompts(), 6)
    model.recordings.clear()
    assert len(model.recordings) == 0
    model.generate(prompts(), 6)
    assert len(tapes) == 2

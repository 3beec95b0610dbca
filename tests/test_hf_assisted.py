"""Assisted decoding of transformers on our states: the tokens of its greedy decoding, whoever guesses, and nothing read twice that need not be."""

import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import convert

transformers = pytest.importorskip("transformers")
from hybridzoo.zoo.hf import HybridZooForCausalLM, StateCache  # noqa: E402

NAMES = ["jamba-tiny", "samba-tiny", "mamba2attn-tiny"]
OPTIONS = {"max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")


def adapted(name, seed=0):
    torch.manual_seed(seed)
    model = zoo.build(name, ["tie_embeddings=false"]).double().eval()  # a tied head says the last token again
    model.lm_head.weight.data.mul_(20)
    return HybridZooForCausalLM.wrap(model).eval()


@pytest.fixture(scope="module", params=NAMES)
def adapter(request):
    return adapted(request.param)


def prompt(length=60):
    ids = torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(1))
    ids[:, length // 2 :] = ids[:, : length - length // 2].clone()
    return ids


def same(got, want):
    """Older versions of transformers (5.13, say) may write more tokens than they are asked for when they look guesses up."""
    return torch.equal(got[:, : want.shape[1]], want)


class Columns:
    """Counts the columns that a model reads, and its forwards."""

    def __init__(self, core):
        self.read = []
        self.handle = core.register_forward_pre_hook(lambda _, args: self.read.append(args[0].shape[1]))

    def __enter__(self):
        return self.read

    def __exit__(self, *error):
        self.handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 60, 200])
def test_what_stood_there_before_is_guessed(adapter, length):
    ids = prompt(length)
    want = adapter.generate(ids, **OPTIONS)
    with Columns(adapter.core) as read:
        got = adapter.generate(ids, prompt_lookup_num_tokens=6, **OPTIONS)
    assert same(got, want)
    # a round reads its guesses, a token, and at most what is waiting; the prompt once, but for its end
    assert sum(read) <= length + 32 + len(read) * 40 and max(read[2:], default=0) <= 32 + 7


@torch.no_grad()
@pytest.mark.parametrize("helper", ["smaller", "itself", "llama"])
def test_another_model_guesses(adapter, helper, monkeypatch):
    ids = prompt(50)
    want = adapter.generate(ids, **OPTIONS)
    assistant = {"smaller": lambda: adapted("mamba-tiny", 1), "itself": lambda: adapter, "llama": llama}[helper]()
    monkeypatch.setattr(assistant.generation_config, "assistant_confidence_threshold", 0.0)
    monkeypatch.setattr(assistant.generation_config, "num_assistant_tokens", 4)
    with Columns(adapter.core) as read:
        got = adapter.generate(ids, assistant_model=assistant, **OPTIONS)
    assert torch.equal(got, want)
    if helper == "itself":  # as one that guesses well: more than a token for a forward of the checking model
        assert len([n for n in read if n > 2]) < 20
    sampled = {"do_sample": True, "max_new_tokens": 12}
    torch.manual_seed(0)
    assert adapter.generate(ids, assistant_model=assistant, **{**OPTIONS, **sampled}).shape == (1, 62)


def llama():
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, **sizes)).eval()


@torch.no_grad()
def test_it_guesses_for_a_model_of_transformers(adapter):
    model = llama().double()
    model.lm_head.weight.data.mul_(50)
    options = OPTIONS | {"max_new_tokens": 12}
    want = model.generate(prompt(), **options)
    assert torch.equal(model.generate(prompt(), assistant_model=adapter, **options), want)


@torch.no_grad()
def test_tokens_are_those_of_transformers_own_model(tmp_path):
    """The same weights, there and here, assisted in both."""
    ours = adapted("transformer-tiny")
    zoo.save(ours.core, tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "theirs", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float64).eval()
    assert not isinstance(theirs, HybridZooForCausalLM)
    for options in ({}, {"prompt_lookup_num_tokens": 6}):
        assert same(ours.generate(prompt(), **options, **OPTIONS), theirs.generate(prompt(), **options, **OPTIONS))


@torch.no_grad()
def test_padding_and_the_next_turn(adapter):
    ids = prompt()
    padded, mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1), torch.ones(1, 65, dtype=torch.long)
    mask[:, :5] = 0
    want = adapter.generate(ids, **OPTIONS)
    lookup = {"prompt_lookup_num_tokens": 6, "return_dict_in_generate": True}
    got = adapter.generate(padded, attention_mask=mask, **lookup, **OPTIONS)
    assert same(got.sequences[:, 5:], want)
    cache = got["cache" if "cache" in got else "past_key_values"]
    assert cache.get_seq_length() == got.sequences.shape[1] - 1
    more = torch.cat([got.sequences, prompt(8)], 1)
    mask = torch.nn.functional.pad(mask, (0, more.shape[1] - 65), value=1)
    fresh = adapter.generate(more, attention_mask=mask, **OPTIONS)
    length, before = cache.get_seq_length(), cache.state.clone()
    for columns, rows in ((8, {}), (length + 2, {"attention_mask": torch.ones(1, length + 9)})):
        with pytest.raises(
            ValueError, match=rf"input_ids: {columns} columns, and the cache has read {length}. Assisted"
        ):
            adapter.generate(more[:, -columns:], cache=cache, prompt_lookup_num_tokens=6, **rows, **OPTIONS)
    for options in ({}, {"prompt_lookup_num_tokens": 6}):
        again = adapter.generate(more, attention_mask=mask, cache=cache, **OPTIONS, **options)
        assert same(again, fresh)
    assert cache.get_seq_length() == length and torch.equal(cache.state.tokens, before.tokens)
    # whoever asks for more than logits gets it of the new columns alone
    out = adapter(more[:, length:], cache=cache, attention_mask=mask, output_hidden_states=True)
    assert out.hidden_states[0].shape[1] == out.logits.shape[1] == more.shape[1] - length
    torch.testing.assert_close(out.logits, adapter(more, attention_mask=mask).logits[:, length:])


@torch.no_grad()
def test_columns_are_taken_back(adapter):
    ids = prompt()
    cache = adapter(ids[:, :20], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"crop\(-1\): of 20 columns, the last 0 can be taken back"):
        cache.crop(-1)
    cache.activate_past_recording()
    for crop, stays in ((-7, 28), (25, 25)):  # as transformers says it now, and as it did
        read = adapter(ids[:, 20:35], cache=cache).past_key_values
        read.crop(crop)
        assert read.get_seq_length() == stays and read.tokens.tolist() == [stays]
        read.batch_repeat_interleave(2)
        got = adapter(ids[:, stays:].expand(2, -1), cache=read)
        torch.testing.assert_close(got.logits[1:], adapter(ids).logits[:, stays:])
        torch.testing.assert_close(adapter(ids[:, 20:], cache=cache).logits, adapter(ids).logits[:, 20:])
    with pytest.raises(ValueError, match=r"crop\(-9\): of 20 columns, the last 0"):
        cache.crop(-9)


def test_a_cache_says_what_it_holds():
    assert StateCache().tokens is None and not StateCache().is_croppable

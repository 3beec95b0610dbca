"""The transformers adapter: Auto classes, generate, padding, saving; each against the core model."""

import copy
import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hybridzoo as zoo

transformers = pytest.importorskip("transformers")
from hybridzoo.zoo.hf import HybridZooConfig, HybridZooForCausalLM, StateCache, byte_tokenizer  # noqa: E402
from hybridzoo.zoo.tokenizer import ByteTokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")
NAMES = ["mamba-tiny", "jamba-tiny"]
CACHE = list(transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__)[
    2
]  # the installed version's name


@pytest.fixture(scope="module", params=NAMES)
def adapter(request):
    torch.manual_seed(0)
    model = zoo.build(request.param).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(1.5)
    return HybridZooForCausalLM.wrap(model).eval()


@torch.no_grad()
def test_wrapping_shares_the_weights_and_the_keys(adapter):
    core = adapter.core
    assert set(adapter.state_dict()) == set(core.state_dict())
    assert adapter.lm_head.weight is core.lm_head.weight
    ids = torch.randint(1, 256, (2, 9))
    assert torch.equal(adapter(ids).logits, core(ids).logits)


@torch.no_grad()
def test_a_replica_computes_with_its_own_parts(adapter):
    """As nn.DataParallel makes one: a shallow copy, whose parts are then replaced."""
    ids = torch.randint(1, 256, (2, 9))
    expected = adapter(ids).logits
    replica = adapter._replicate_for_data_parallel()
    for name in ("backbone", "lm_head"):
        part = copy.deepcopy(replica._modules[name])
        for p in part.parameters():
            p.zero_()
        setattr(replica, name, part)
    assert torch.equal(replica(ids).logits, torch.zeros_like(expected))
    assert torch.equal(adapter(ids).logits, expected)


def prompts(padded=True):
    ids = torch.randint(1, 256, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, : 4 * padded] = 0
    return ids, mask


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
    "beam-sampling": {"num_beams": 3, "do_sample": True},
    "chunks": {"do_sample": False, "prefill_chunk_size": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [True, False], ids=["left-padded", "plain"])
def test_generate_of_transformers_equals_itself_without_state(adapter, mode, padded):
    ids, mask = prompts(padded)
    options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "attention_mask": mask} | MODES[mode]
    torch.manual_seed(1)
    with_state = adapter.generate(ids, **options)
    torch.manual_seed(1)
    options.pop("prefill_chunk_size", None)
    assert torch.equal(with_state, adapter.generate(ids, use_cache=False, **options))
    if mode == "greedy":
        ours = adapter.core.generate(ids, max_new_tokens=12, attention_mask=mask)
        assert with_state[:, 9:].tolist() == ours[:, 9:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
def test_rows_that_pad_the_table_are_never_produced(mode):
    model = zoo.build("mamba-tiny", ["vocab_size=250", "pad_vocab_size_multiple=16"]).eval()
    model.lm_head.weight[250:] *= 40  # and would be, most of the time
    ids = torch.randint(1, 250, (2, 9))
    out = HybridZooForCausalLM.wrap(model).generate(ids, max_new_tokens=20, eos_token_id=None, **MODES[mode])
    assert out.max() < 250
    if mode == "greedy":
        assert torch.equal(out, model.generate(ids, max_new_tokens=20))


@torch.no_grad()
def test_beams_are_the_best_continuations(adapter):
    """Three beams, written down without transformers and without any state."""
    prompt, new, beams = torch.randint(1, 256, (1, 9)), 6, 3
    rows, scores = prompt, torch.zeros(1)
    for _ in range(new):
        total = scores[:, None] + adapter.core(rows).logits[:, -1].log_softmax(-1)
        scores, best = total.flatten().topk(beams)
        rows = torch.cat([rows[best // 256], best[:, None] % 256], 1)
    out = adapter.generate(
        prompt, num_beams=beams, num_return_sequences=beams, max_new_tokens=new, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert out.sequences.tolist() == rows.tolist()
    torch.testing.assert_close(out.sequences_scores, scores / new, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_state_is_continued_by_the_next_turn_and_by_several(adapter, name):
    ids, mask = prompts()
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    first = adapter.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)[CACHE]
    asked = torch.cat([adapter.generate(ids, attention_mask=mask, **options), torch.randint(1, 256, (2, 4))], 1)
    mask = torch.cat([mask, torch.ones(2, 9, dtype=torch.long)], 1)
    fresh = adapter.generate(asked, attention_mask=mask, **options)
    for columns in (slice(None), slice(13, None)):  # the state that was handed in is left as it is
        again = adapter.generate(asked[:, columns], attention_mask=mask, **{name: first}, **options)
        assert torch.equal(again, fresh[:, columns])
    chunks = options | {"attention_mask": mask, "prefill_chunk_size": 3, name: first}
    if CACHE == "cache":
        assert torch.equal(adapter.generate(asked, **chunks), fresh)
    else:
        with pytest.raises(ValueError, match="read again, in chunks"):
            adapter.generate(asked, **chunks)
    read = adapter(ids[1:], use_cache=True)[CACHE]
    read.batch_repeat_interleave(3)
    ways = torch.cat([ids[1:].expand(3, -1), torch.randint(1, 256, (3, 2))], 1)
    assert torch.equal(adapter.generate(ways, **{name: read}, **options), adapter.generate(ways, **options))
    with pytest.raises(ValueError, match="input_ids: 2 columns, but the cache has read 9"):
        adapter.generate(ways[:, -2:], **{name: read}, **options)
    torch.testing.assert_close(
        adapter(ways[:, 9:], **{name: read}).logits, adapter(ways).logits[:, 9:], atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_an_output_has_the_names_and_the_order_of_transformers(adapter):
    ids, _ = prompts()
    out = adapter(ids, labels=ids, use_cache=True)
    assert list(out) == ["loss", "logits", CACHE] and out.past_key_values is out[CACHE]
    loss, logits, cache = adapter(ids, labels=ids, use_cache=True, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits) and cache.get_seq_length() == 9
    third = adapter(ids, None, cache, use_cache=True, return_dict=False)[1]
    assert third.get_seq_length() == 18 and cache.get_seq_length() == 9


@torch.no_grad()
@pytest.mark.parametrize("kept", [False, True], ids=["text", "text-and-state"])
def test_stopping_a_step_late_changes_nothing(adapter, kept, monkeypatch):
    """As transformers does on Apple's devices: one token too many is read, and dropped."""
    check = getattr(transformers.generation.utils, "DeferredStopCheck", None) or pytest.skip("not in this version")
    ids, mask = prompts()
    options = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False, "attention_mask": mask}
    options["eos_token_id"] = adapter.generate(ids, eos_token_id=None, **options)[:, 12].tolist()
    read = adapter(ids[:, :5], mask[:, :5], use_cache=True)[CACHE]
    before = read.state.clone()
    expected = adapter.generate(ids, return_dict_in_generate=True, **options)
    supported, answers = check.is_supported, []
    monkeypatch.setattr(torch, "Event", lambda **_: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    monkeypatch.setattr(
        check,
        "is_supported",
        lambda _, *a, **kw: answers.append(supported(torch.device("mps"), *a, **kw)) or answers[-1],
    )
    got = adapter.generate(ids, return_dict_in_generate=kept, **{CACHE: read}, **options)
    assert answers == [not kept]  # a state that is handed out cannot be taken back, and so is never a token ahead
    assert torch.equal(got.sequences if kept else got, expected.sequences)
    assert not kept or got[CACHE].get_seq_length() == expected[CACHE].get_seq_length()
    assert torch.equal(read.state.tokens, before.tokens) and read.get_seq_length() == 5


@torch.no_grad()
def test_texts_end_where_a_string_stands(adapter):
    ids, mask = prompts(padded=False)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = adapter.generate(
        ids, stop_strings=["qq"], tokenizer=byte_tokenizer(), sequence_bias={(ord("q"),): 1e4}, **options
    )
    assert got[:, 9:].tolist() == [[ord("q")] * 2] * 2


@torch.no_grad()
def test_embeddings_can_stand_for_the_prompt(adapter):
    ids, mask = prompts()
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, "attention_mask": mask}
    out = adapter.generate(inputs_embeds=adapter.get_input_embeddings()(ids), **options)
    assert torch.equal(out, adapter.generate(ids, **options)[:, 9:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_early_exit": 1}, "assistant_early_exit: the model guesses nothing by a part of itself"),
        ({"cache_implementation": "static"}, "'static' is a cache for keys and values alone"),
        ({"cache_implementation": "paged"}, "continuous batching keeps keys and values in pages"),
        (
            {"past_key_values": transformers.DynamicCache()},
            "^past_key_values: .*got DynamicCache, which has no place for",
        ),
        ({"cache": transformers.DynamicCache()}, "^cache: .*got DynamicCache, which has no place for recurrent states"),
        ({"cache": StateCache(), "past_key_values": StateCache()}, "^cache: and past_key_values are two names of one"),
        ({"cache": StateCache(), "use_cache": False}, "use_cache: False reads everything again"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires"),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
def test_what_cannot_be_generated_is_refused_with_the_reason(adapter, options, message):
    with pytest.raises(ValueError, match=message):
        adapter.generate(torch.randint(1, 256, (1, 9)), max_new_tokens=3, **options)


def test_it_takes_no_mask_of_pairs(adapter):
    with pytest.raises(ValueError, match="expected shape"):
        adapter(torch.randint(1, 256, (1, 9)), attention_mask=torch.ones(1, 1, 9, 9))


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_pipelines_continue_texts_and_chats(adapter, tmp_path):
    zoo.save(adapter.core, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path)
    pipe = transformers.pipeline("text-generation", str(tmp_path), device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [pipe(text, **options)[0]["generated_text"] for text in ("Hello", "a longer prompt")]
    together = pipe(["Hello", "a longer prompt"], batch_size=2, **options)  # padded on the left
    assert [row[0]["generated_text"] for row in together] == alone
    said = pipe([{"role": "user", "content": "Hello"}], **options)[0]["generated_text"]
    assert said == pipe("<user>Hello\n<assistant>", **options)[0]["generated_text"]
    ours = adapter.core.generate(torch.tensor([list(b"Hello")]), max_new_tokens=6, eos_token_id=0)[0, 5:].tolist()
    assert alone[0] == ByteTokenizer().decode(ours)


def test_the_folder_is_readable_by_both_sides(adapter, tmp_path):
    ids = torch.randint(1, 256, (2, 9))
    expected = adapter.core(ids).logits
    zoo.save(adapter.core, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")

    assert isinstance(theirs, HybridZooForCausalLM)
    assert torch.equal(theirs.eval()(ids).logits, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(zoo.load(tmp_path / "theirs")(ids).logits, expected)
    assert "lm_head.weight" not in _stored_keys(tmp_path / "theirs")  # tied: written once


@pytest.mark.parametrize("name", zoo.list_models("*-tiny", task="causal_lm"))
@torch.no_grad()
def test_every_model_goes_there_and_back(name, tmp_path):
    model = HybridZooForCausalLM.wrap(zoo.build(name)).eval()
    ids = torch.randint(1, 256, (2, 9))
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "theirs")
    zoo.save(model, tmp_path / "ours")
    for folder in ("ours", "theirs"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(theirs(ids).logits, expected) and torch.equal(
            zoo.load(tmp_path / folder)(ids).logits, expected
        )
        assert theirs.num_parameters() == model.core.num_params()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_shards_and_placement_change_nothing(tied, tmp_path):
    model = HybridZooForCausalLM.wrap(zoo.build("jamba-tiny", [f"tie_embeddings={str(tied).lower()}"])).eval()
    ids = torch.randint(1, 256, (2, 9))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    placed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype="auto")
    for back in (placed, zoo.load(tmp_path)):
        assert torch.equal(back(ids).logits, model(ids).logits)
        assert (back.lm_head.weight is back.get_parameter("backbone.embedding.weight")) == tied
    assert placed.num_parameters() == model.core.num_params()


class Draws(TorchDispatchMode):
    """Counts the random numbers that are drawn, and the floating-point ones that are made room for, where there is memory."""

    def __init__(self):
        super().__init__()
        self.drawn = self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type != "meta" and out.is_floating_point():
            self.drawn += out.numel() * (torch.Tag.nondeterministic_seeded in func.tags)
            self.made += out.numel() * func.name().startswith(
                ("aten::empty", "aten::zeros", "aten::full", "aten::clone", "aten::_to_copy")
            )
        return out


def test_loading_draws_nothing_and_holds_the_weights_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads would not be counted
    size = zoo.save(zoo.build("jamba-tiny"), tmp_path) and zoo.load(tmp_path).num_params()
    with Draws() as count:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert count.drawn == 0 and 0.5 * size < count.made <= 1.1 * size
    with Draws() as count:
        zoo.build("jamba-tiny")
    assert count.drawn > 0.9 * size and count.made > 0.9 * size  # it does count


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_new_vocabulary_is_used_and_saved(tied, tmp_path):
    model = HybridZooForCausalLM.wrap(zoo.build("mamba-tiny", [f"tie_embeddings={str(tied).lower()}"])).eval()
    ids = torch.randint(1, 256, (2, 9))
    before = model(ids).logits
    model.resize_token_embeddings(300, pad_to_multiple_of=64)
    after = model(torch.cat([ids, torch.full((2, 1), 319)], 1)).logits
    assert after.shape == (2, 10, 320)
    torch.testing.assert_close(after[:, :9, :256], before)
    zoo.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert torch.equal(zoo.load(tmp_path / folder)(ids).logits, model(ids).logits)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert theirs.config.vocab_size == 320 and torch.equal(theirs(ids).logits, model(ids).logits)


def test_packed_rows_of_transformers_keep_documents_apart(adapter):
    documents = [torch.randint(1, 256, (n,)).tolist() for n in (5, 1, 8)]
    alone = torch.cat([adapter(torch.tensor([d])).logits[0] for d in documents])
    for flash in (False, True):
        collator = transformers.DataCollatorWithFlattening(
            return_flash_attn_kwargs=flash, return_position_ids=not flash
        )
        batch = collator([{"input_ids": d} for d in documents])
        labels = batch.pop("labels")
        torch.testing.assert_close(adapter(**batch).logits[0], alone, atol=1e-4, rtol=1e-4)
        core = adapter.core(batch["input_ids"], labels, cu_seqlens=torch.tensor([0, 5, 6, 14]))
        torch.testing.assert_close(adapter(**batch, labels=labels).loss, core.loss, atol=0, rtol=0)
    with pytest.raises(ValueError, match="start again inside a row of a batch of 2"):
        adapter(torch.ones(2, 4, dtype=torch.long), position_ids=torch.tensor([[0, 1, 0, 1]] * 2))


@torch.no_grad()
def test_packed_rows_are_told_apart_in_whichever_words(adapter):
    documents = [torch.randint(1, 256, (n,)).tolist() for n in (5, 1, 8)]
    ids = torch.tensor([[token for d in documents for token in d]])
    alone = torch.cat([adapter(torch.tensor([d])).logits[0] for d in documents])
    said = {
        "cu_seqlens": torch.tensor([0, 5, 6, 14]),
        "seq_idx": torch.tensor([[7] * 5 + [3] + [7] * 8]),
        "position_ids": torch.tensor([[*range(5), 0, *range(8)]]),
        "cu_seq_lens_k": torch.tensor([0, 5, 6, 14], dtype=torch.int32),
        "cu_seq_lens_q": [0, 5, 6, 14],
    }
    for words in ([name] for name in said), [list(said)]:
        for names in words:
            for mask in (None, torch.ones_like(ids)):  # a mask of ones says nothing
                got = adapter(ids, attention_mask=mask, **{name: said[name] for name in names}).logits[0]
                torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    got = adapter(ids, attention_mask=mask, seq_idx=said["seq_idx"]).logits[0, :12]
    torch.testing.assert_close(got, alone[:12], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="position_ids: and seq_idx describe different documents"):
        adapter(ids, seq_idx=said["seq_idx"], position_ids=torch.tensor([[*range(7), *range(7)]]))


@torch.no_grad()
def test_positions_that_the_layers_count_anyway_change_nothing_and_others_are_refused(adapter):
    ids, mask = prompts()
    options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, "attention_mask": mask}
    want, logits = adapter.generate(ids, **options), adapter(ids, mask).logits
    columns = torch.arange(9).expand(2, 9)
    for positions in (
        (mask.cumsum(1) - 1).clamp(min=0),
        (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
        columns,
        columns[:1] + 7,
    ):
        assert torch.equal(adapter(ids, mask, position_ids=positions).logits, logits)
        if positions.max() < 9:
            assert torch.equal(adapter.generate(ids, position_ids=positions, **options), want)
    cache = adapter(ids, mask, use_cache=True)[CACHE]
    for wrong, given, message in (
        (2 * columns, {"attention_mask": mask}, "position_ids: 10 at row 0, token 1 is not the position that follows"),
        (columns.flip(1), {}, "position_ids: 7 at row 0, token 1"),
        (columns, {CACHE: cache}, "position_ids: 0 at row 0, token 0"),
        (columns[None], {}, r"position_ids: expected shape \(2, 9\), got \(1, 2, 9\)"),
        (columns[:, 1:], {}, r"position_ids: expected shape \(2, 9\), got \(2, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter(ids, position_ids=wrong, **given)


NOTHING = [
    {"token_type_ids": torch.zeros(2, 9)}, {"cache_position": torch.arange(9)}, {"is_causal": True}, {"output_attentions": False},
    {"output_router_logits": None}, {"head_mask": None}, {"pixel_values": None}, {"max_length_q": 9, "max_length_k": 9},
]  # fmt: skip
SOMETHING = [
    ("output_attentions", True), ("output_router_logits", True), ("head_mask", torch.ones(2)), ("token_type_ids", torch.ones(2, 9)),
    ("cache_position", torch.arange(1, 10)), ("is_causal", False), ("encoder_hidden_states", torch.ones(2, 9, 64)),
    ("atention_mask", torch.ones(2, 9)), ("shift_labels", torch.ones(2, 9)), ("pixel_values", torch.ones(1)), ("use_cach", True),
]  # fmt: skip


@torch.no_grad()
def test_no_argument_is_swallowed(adapter):
    ids, _ = prompts()
    want = adapter(ids).logits
    for given in NOTHING:
        assert torch.equal(adapter(ids, **given).logits, want)
    for name, value in SOMETHING:
        with pytest.raises(ValueError, match=f"^{name}: "):
            adapter(ids, **{name: value})
    with pytest.raises(ValueError, match=r"^atention_mask: .*Did you mean 'attention_mask'"):
        adapter(ids, atention_mask=torch.ones(2, 9))


@torch.no_grad()
def test_hidden_states_and_caches_come_as_from_transformers_models(adapter):
    ids, mask = prompts()
    out = adapter(ids, mask, output_hidden_states=True)
    n = adapter.config.num_hidden_layers
    assert list(out) == ["logits", CACHE, "hidden_states"] and len(out.hidden_states) == n + 1
    torch.testing.assert_close(adapter.lm_head(out.hidden_states[-1]), out.logits)
    # what stands at padding reaches no layer
    embedded = adapter.get_input_embeddings()(ids).masked_fill(mask.unsqueeze(-1) == 0, 0.0)
    assert torch.equal(out.hidden_states[0], embedded)
    # a loop that somebody writes by hand follows on what comes back
    token = out.logits[:, -1:].argmax(-1)
    longer = adapter(torch.cat([ids, token], 1), torch.cat([mask, mask[:, -1:]], 1)).logits[:, -1:]
    torch.testing.assert_close(adapter(token, past_key_values=out[CACHE]).logits, longer, atol=1e-4, rtol=1e-4)
    assert CACHE not in adapter(ids, labels=ids) and CACHE not in adapter(ids, use_cache=False)
    options = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    text = adapter.generate(ids, attention_mask=mask, output_hidden_states=True, **options)
    assert [len(states) for states in text.hidden_states] == [n + 1] * 3
    assert [states[1].shape[1] for states in text.hidden_states] == [9, 1, 1]


def test_loading_takes_the_fields_of_the_config_and_obeys_them(adapter, tmp_path):
    ids, _ = prompts()
    adapter.save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert CACHE not in load(tmp_path, use_cache=False)(ids) and CACHE in load(
        tmp_path, use_cache=True, use_safetensors=True
    )(ids)
    got = load(tmp_path, output_hidden_states=True, attn_implementation="sdpa", low_cpu_mem_usage=True)(ids)
    assert len(got.hidden_states) == adapter.config.num_hidden_layers + 1
    assert isinstance(load(tmp_path, return_dict=False)(ids), tuple)
    longer = load(tmp_path, max_position_embeddings=99)
    assert longer.core.cfg.max_length == longer.config.zoo["max_length"] == 99
    tied = not adapter.config.tie_word_embeddings
    for name, value in (
        ("vocab_size", 300),
        ("hidden_size", 3),
        ("num_hidden_layers", 99),
        ("tie_word_embeddings", tied),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {value}, but the config's zoo part makes it"):
            load(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=r"^output_attentions: "):
        load(tmp_path, output_attentions=True)(ids)


def test_a_prompt_without_a_token_is_refused(adapter):
    for ids in (torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)):
        for call in (lambda ids=ids: adapter.generate(ids), lambda ids=ids: adapter.generate(input_ids=ids)):
            with pytest.raises(ValueError, match=r"input_ids: shape \(\d, \d\) holds no token"):
                call()


@torch.no_grad()
def test_hooks_act_on_every_token_of_transformers_generate(adapter):
    ids, mask = prompts()
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False, "attention_mask": mask}
    calls, plain = [], adapter.generate(ids, **options)
    push = torch.linspace(-1, 1, adapter.config.hidden_size).roll(5)
    block = adapter.backbone.layers[1]
    handle = block.mixer.register_forward_hook(
        lambda m, args, out: (
            calls.append(args[0].shape[1]) or (out[0] + push, out[1]) if isinstance(out, tuple) else out + push
        )
    )
    with_cache = adapter.generate(ids, **options)
    assert calls == [9, 1, 1, 1, 1]
    assert torch.equal(with_cache, adapter.generate(ids, use_cache=False, **options)) and not torch.equal(
        with_cache, plain
    )
    assert torch.equal(with_cache, adapter.core.generate(ids, 5, attention_mask=mask))
    handle.remove()
    assert torch.equal(adapter.generate(ids, **options), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["jamba-tiny", "zamba2-tiny"])
def test_weights_that_come_when_a_module_is_called_are_there_for_every_token(name):
    from accelerate import cpu_offload

    model, ids = HybridZooForCausalLM.wrap(zoo.build(name)).eval(), torch.randint(1, 256, (2, 9))
    core, options = model.core, {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    want, step = core.generate(ids, 4), core.step(ids[:, 0], core.init_state(2))
    cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.is_meta
    assert torch.equal(core.generate(ids, 4), want) and torch.equal(model.generate(ids, **options), want)
    state = core.init_state(2, device="cpu")
    torch.testing.assert_close(core.step(ids[:, 0], state), step, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("sampling", [False, True])
def test_generating_from_numbers_that_are_none_says_so(sampling):
    model = HybridZooForCausalLM.wrap(zoo.build("mamba-tiny"))
    model.core.backbone.norm_f.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits: those of row 0 are not finite"):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=sampling)


SIZES = {  # tokens, multiple -> rows, and how the config says it
    "inside": ((253, None), 253, (253, 1)),
    "all-rows": ((256, None), 256, (256, 16)),
    "padded-again": ((251, 16), 256, (251, 16)),
    "more": ((300, 64), 320, (300, 64)),
    "fewer": ((100, None), 100, (100, 1)),
    "fewer-padded": ((100, 32), 128, (100, 32)),
    "only-padded": ((None, 128), 256, (250, 128)),
}


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", SIZES)
def test_the_vocabulary_follows_the_tokenizer_not_the_rows(case, tied, tmp_path):
    (tokens, multiple), rows, says = SIZES[case]
    overrides = ["vocab_size=250", "pad_vocab_size_multiple=16", f"tie_embeddings={str(tied).lower()}"]
    model = HybridZooForCausalLM.wrap(zoo.build("mamba-tiny", overrides)).eval()
    ids = torch.randint(1, 100, (2, 9))
    before = model(ids).logits
    model.resize_token_embeddings(tokens, pad_to_multiple_of=multiple, mean_resizing=False)
    after, cfg = model(ids).logits, model.core.cfg
    assert after.shape[-1] == rows == model.config.vocab_size and (cfg.vocab_size, cfg.pad_vocab_size_multiple) == says
    assert {k: model.config.zoo[k] for k in ("vocab_size", "pad_vocab_size_multiple")} == dict(
        zip(("vocab_size", "pad_vocab_size_multiple"), says, strict=True)
    )
    torch.testing.assert_close(after[..., :100], before[..., :100])
    # every token that the tokenizer has may be produced, and no other
    weight = model.lm_head.weight
    for best, produced in ((says[0] - 1, True), (says[0], False)):
        if best < rows:
            favoured = copy.deepcopy(model)
            favoured.lm_head.register_forward_hook(
                lambda m, args, out, best=best: out.index_fill(-1, torch.tensor([best]), 1e4)
            )
            options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
            for text in (favoured.generate(ids, **options), favoured.core.generate(ids, 2)):
                assert (text[:, 9:] == best).all() == produced and text.max() < says[0]
    assert (weight is model.get_input_embeddings().weight) == tied
    zoo.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back = zoo.load(tmp_path / folder)
        assert back.cfg == cfg and torch.equal(back(ids).logits, after)
        assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)(ids).logits, after)


def _stored_keys(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as f:
        return set(f.keys())


def test_shared_blocks_survive_transformers_saving(tmp_path):
    cfg = {
        "vocab_size": 64, "d_model": 32, "layers": "mamba attention@a mamba attention@a", "tie_embeddings": False,
        "mixers": {"mamba": {"type": "mamba"}, "attention": {"type": "attention", "nheads": 4}},
    }  # fmt: skip
    model = HybridZooForCausalLM.wrap(zoo.build(cfg)).eval()
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 64, (1, 7))
    torch.testing.assert_close(back(ids).logits, model(ids).logits, atol=0, rtol=0)
    assert back.backbone.layers[1].mixer.in_proj.weight is back.backbone.layers[3].mixer.in_proj.weight


def test_loading_in_bf16_keeps_what_must_be_float32(tmp_path, adapter):
    zoo.save(adapter.core, tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {n.rsplit(".", 1)[-1]: p.dtype for n, p in back.named_parameters()}
    assert dtypes["A_log"] == torch.float32 and back.lm_head.weight.dtype == torch.bfloat16


def test_a_config_without_a_model_and_a_bad_one_are_refused():
    with pytest.raises(ValueError, match=r"HybridZooConfig.zoo: is missing"):
        HybridZooForCausalLM(HybridZooConfig())
    with pytest.raises(zoo.ConfigError, match="d_modell"):
        HybridZooConfig(zoo={"d_modell": 3})


def test_special_tokens_are_those_of_the_tokenizer(adapter):
    assert (adapter.config.eos_token_id, adapter.config.pad_token_id) == (0, 0)
    other = HybridZooForCausalLM.wrap(zoo.build("mamba-tiny", ["tokenizer=somebody/else"]))
    assert other.config.eos_token_id is None and other.generation_config.eos_token_id is None


def test_the_byte_tokenizers_agree_and_know_their_folder(tmp_path):
    ours, theirs = ByteTokenizer(), byte_tokenizer()
    zoo.save(zoo.build("mamba-tiny"), tmp_path)
    stored = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["plain", " two  spaces \n\ttab ", "naïve Ā € 漢字 🦓", "a\x01b\x7f", "don't 12.5%"]:
        ids = ours.encode(text)
        assert ids == list(text.encode()) and theirs(text)["input_ids"] == ids and stored(text)["input_ids"] == ids
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert (stored.eos_token_id, stored.pad_token_id, len(stored)) == (0, 0, 256)
    assert theirs("a<|endoftext|>b")["input_ids"] == [97, 0, 98]


def type_of_what_is_loaded(code, folder, cwd, **env):
    check = f"import sys\nfolder = {str(folder)!r}\n{code}\nprint(type(model).__name__)"
    run = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=cwd, env=os.environ | env, timeout=200
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        # nothing of the zoo's modelling is loaded until its folder is opened
        "import hybridzoo\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, MambaForCausalLM\n"
        "assert 'hybridzoo.zoo.hf' not in sys.modules\n"
        "AutoConfig.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        # in a program that knows nothing of the zoo, by the folder's own code; from then on without
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "assert 'hybridzoo' not in sys.modules\n"
        "config = AutoConfig.from_pretrained(folder, trust_remote_code=True)\n"
        "assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).encode('a\\0b') == [97, 98]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "assert type(model.config) is type(config)\n"
        "assert type(model) is type(AutoModelForCausalLM.from_pretrained(folder))",
    ],
    ids=["imported", "remote-code"],
)
def test_auto_classes_know_the_zoo(code, tmp_path):
    folder = zoo.save(zoo.build("mamba-tiny", ["d_model=16"]), tmp_path / "m")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "hybridzoo"
    kind = type_of_what_is_loaded(code, folder, tmp_path, HF_HOME=str(tmp_path / "home"))
    assert kind.endswith("HybridZooForCausalLM")


def test_what_transformers_says_of_activation_checkpointing_is_done():
    model = HybridZooForCausalLM.wrap(zoo.build("mamba-tiny")).train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    if "every_n_layers" not in inspect.signature(enable).parameters:
        pytest.skip("this transformers checkpoints every layer or none")
    every, ids = 3, torch.randint(0, 256, (2, 9))
    want = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    enable(every_n_layers=every)
    ran, real = [], model.backbone._gradient_checkpointing_func
    model.backbone._gradient_checkpointing_func = lambda block, *args, **kwargs: (
        ran.append(block) or real(block, *args, **kwargs)
    )
    got = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    assert ran == list(model.backbone.layers)[::every]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

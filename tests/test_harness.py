"""The lm-eval adapter: the same scores as lm-eval's own HFLM on the same weights, and every way in."""

import copy
import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

import hybridzoo as zoo
from hybridzoo.eval.evaluate import evaluate
from hybridzoo.eval.harness import HybridZooLM
from hybridzoo.eval.run import lm_eval_main, table, task_manager
from hybridzoo.eval.tasks import FOLDER
from hybridzoo.zoo.checkpoint import CheckpointError
from hybridzoo.zoo.models.causal_lm import CausalLM
from hybridzoo.zoo.train.data import topics

VOCAB, LENGTH = 384, 96
EOS = "<|endoftext|>"
HYBRID = {
    "vocab_size": VOCAB, "d_model": 32, "max_length": LENGTH, "layers": "mamba attention mamba2 attention mlp",
    "mixers": {
        "mamba": {"type": "mamba", "d_state": 8},
        "mamba2": {"type": "mamba2", "d_state": 16, "headdim": 16, "chunk_size": 16},
        "attention": {"type": "attention", "nheads": 4, "nheads_kv": 2, "window": 24},
        "mlp": {"type": "mlp", "d_intermediate": 48},
    },
}  # fmt: skip


def redraw(model):
    """Values far from the near-flat logits of a fresh model, so that a mistake shows."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(("A_log", "D")) or "norm" in name:
            continue
        if name.endswith(("dt_proj.bias", "dt_bias")):
            p.data.uniform_(-4, -1, generator=generator)
        else:
            p.data.normal_(0, 1.0 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.5, generator=generator)
        if "embedding" in name:
            p.data.mul_(2)
    return model.eval()


@pytest.fixture(scope="module")
def text():
    return topics()["validation"]


@pytest.fixture(scope="module")
def tokenizer(text):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        text[:4], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token=EOS, eos_token=EOS, pad_token=EOS, model_max_length=LENGTH
    )


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """The reference: a transformers Mamba and its tokenizer on disk."""
    path = tmp_path_factory.mktemp("reference")
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)  # fmt: skip
    redraw(MambaForCausalLM(config)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    return HFLM(pretrained=str(folder), device="cpu", batch_size=1)


@pytest.fixture(scope="module")
def core(reference):
    model = zoo.build({
        "vocab_size": VOCAB, "d_model": 32, "layers": "mamba * 2", "mixers": {"mamba": {"type": "mamba", "d_state": 8}},
        "norm": {"type": "rmsnorm", "eps": 1e-5}, "tie_embeddings": True, "max_length": LENGTH,
    })  # fmt: skip
    weights = {
        k.replace("backbone.embeddings", "backbone.embedding"): v for k, v in reference.model.state_dict().items()
    }
    model.load_state_dict(weights)
    return model.eval()


@pytest.fixture(scope="module")
def saved(core, tokenizer, tmp_path_factory):
    """The same weights in the zoo's own folder."""
    path = zoo.save(core, tmp_path_factory.mktemp("zoo"))
    tokenizer.save_pretrained(path)
    return path


def requests(kind, arguments):
    return [Instance(kind, {}, args, i, metadata=("t", i, 1)) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def questions(text, reference):
    """Contexts and continuations of every kind that lm-eval sends."""
    words = text[0].split()
    short, long = " ".join(words[:9]), " ".join(words[:150])
    pairs = [(c, f" {letter}") for c in (short, long, "Answer:") for letter in "ABCD"]  # one token, shared contexts
    pairs += [(c, " " + " ".join(words[20 : 20 + n])) for c in (short, long) for n in (1, 5, 17)]  # unequal, over-long
    pairs += [(c + " " * n, "the end") for c in (short, long) for n in (1, 3)]  # trailing spaces
    pairs += [("", c) for c in ("The", " word", EOS + "The", "\n")]  # empty contexts
    for n in (3, 11, 40):  # what the model itself would say
        context = " ".join(words[n : 2 * n])
        ids = torch.tensor([reference.tok_encode(context)])
        with torch.no_grad():
            out = reference.model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        pairs.append((context, reference.tok_decode(out[0, ids.shape[1] :], skip_special_tokens=False)))
    return pairs


@pytest.fixture(scope="module")
def documents(text):
    return [(d,) for d in (text[1][:700], text[2][:90], "x", "  both ends \n", "", text[3][:260])]


@pytest.fixture(scope="module")
def prompts(text):
    words = text[4].split()
    starts = [" ".join(words[: 3**i]) for i in range(5)] + ["if", "import os\n", "  indented", "é ü"]
    return [(s, {"until": ["\n\n", ". "], "max_gen_toks": 12}) for s in starts] + [
        ("a", {"until": [" "], "max_gen_toks": 3, "do_sample": False})
    ]


@pytest.fixture(scope="module")
def expected(reference, questions, documents, prompts):
    return (
        reference.loglikelihood(requests("loglikelihood", questions), disable_tqdm=True),
        reference.loglikelihood_rolling(requests("loglikelihood_rolling", documents), disable_tqdm=True),
        reference.generate_until(requests("generate_until", prompts), disable_tqdm=True),
    )


def test_the_reference_is_worth_comparing_with(expected):
    scores, _, texts = expected
    assert {greedy for _, greedy in scores} == {True, False}
    assert len({round(s, 2) for s, _ in scores}) > len(scores) // 2
    assert len(set(texts)) > len(texts) // 2


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_scores_equal_those_of_hflm(saved, expected, questions, documents, prompts, batch_size):
    lm = HybridZooLM(saved, batch_size=batch_size, device="cuda:0")
    scores, rolling, texts = expected
    ours = lm.loglikelihood(requests("loglikelihood", questions), disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(ours, scores, strict=True)) < 1e-3
    assert [g for _, g in ours] == [g for _, g in scores]
    ours = lm.loglikelihood_rolling(requests("loglikelihood_rolling", documents), disable_tqdm=True)
    assert max(abs(a - b) for a, b in zip(ours, rolling, strict=True)) < 1e-3
    assert lm.generate_until(requests("generate_until", prompts), disable_tqdm=True) == texts


def by_hand(model, ids, scored):
    """Log-likelihood of the last ``scored`` of ``ids``, and whether each is the likeliest, from one unpadded forward."""
    with torch.no_grad():
        logp = model(torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)[-scored:]
    target = torch.tensor(ids[-scored:])
    return float(logp.gather(1, target[:, None]).sum()), bool((logp.argmax(-1) == target).all())


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_a_hybrid_scores_and_writes_as_alone_whatever_the_batch(tokenizer, questions, prompts, batch_size):
    model = redraw(zoo.build(HYBRID))
    lm = HybridZooLM(model, tokenizer, batch_size=batch_size)
    scores = lm.loglikelihood(requests("loglikelihood", questions), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(questions, scores, strict=True):
        context_ids, ids = ([0], lm.tok_encode(continuation)) if not context else lm._encode_pair(context, continuation)
        if not context and ids[0] == 0:
            context_ids, ids = ids[:1], ids[1:]
        expected, expected_greedy = by_hand(model, (context_ids + ids)[-LENGTH - 1 :], len(ids))
        assert abs(score - expected) < 1e-3
        assert greedy == expected_greedy
    texts = lm.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    for (prompt, settings), text in zip(prompts, texts, strict=True):
        room = LENGTH - settings["max_gen_toks"]
        ids = torch.tensor([lm.tok_encode(prompt)[-room:]])
        out = model.generate(ids, settings["max_gen_toks"], eos_token_id=0)[0, ids.shape[1] :]
        whole = tokenizer.decode(out, skip_special_tokens=True)
        assert text == min((whole.split(stop)[0] for stop in settings["until"]), key=len)


def test_rolling_gives_each_byte_once_after_the_separator():
    model = redraw(zoo.build("mamba-tiny", ["d_model=32", "layers=mamba", "max_length=40"]))
    lm = HybridZooLM(model)
    document = "Bytes, not words: é ü, once each."
    ids = list(document.encode())
    assert lm.tok_encode(document) == ids
    (score,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(document,)]), disable_tqdm=True)
    assert abs(score - by_hand(model, [0, *ids], len(ids))[0]) < 1e-3
    # with a BOS token before every prompt there is still one at the start of a document
    with_bos = HybridZooLM(model, add_bos_token=True)
    assert with_bos.tok_encode("ab") == [0, 97, 98]
    assert with_bos.tok_encode(EOS + "ab") == [0, 97, 98]
    (again,) = with_bos.loglikelihood_rolling(requests("loglikelihood_rolling", [(document,)]), disable_tqdm=True)
    assert again == score


def test_a_tokenizer_that_appends_eos_does_not_cut_off_the_continuation():
    from transformers import ByT5Tokenizer

    model = redraw(zoo.build(HYBRID))
    lm = HybridZooLM(model, ByT5Tokenizer())
    ids = [b + 3 for b in b"The end"]
    assert ByT5Tokenizer().encode("The end") == [*ids, 1]
    ((score, _),) = lm.loglikelihood(requests("loglikelihood", [("The", " end")]), disable_tqdm=True)
    assert abs(score - by_hand(model, ids, 4)[0]) < 1e-3
    tokens, mask = lm.tok_batch_encode(["The end", "a"])
    assert tokens.tolist() == [ids, [0] * 6 + [100]]
    assert mask.tolist() == [[1] * 7, [0] * 6 + [1]]


def test_an_empty_prompt_starts_from_the_prefix_token(tokenizer):
    model = redraw(zoo.build(HYBRID))
    lm = HybridZooLM(model, tokenizer, batch_size=4)
    prompts = [("", {"until": ["|"], "max_gen_toks": 5}), ("four words of text", {"until": ["|"], "max_gen_toks": 5})]
    texts = lm.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    alone = model.generate(torch.zeros(1, 1, dtype=torch.long), 5, eos_token_id=0)[0, 1:]
    assert texts[0] == tokenizer.decode(alone, skip_special_tokens=True).split("|")[0]


def test_half_precision_scores_are_normalised_in_float32(saved, questions):
    lm = HybridZooLM(saved, dtype="bfloat16", batch_size=1)
    assert next(lm.model.parameters()).dtype == torch.bfloat16
    pairs = questions[:12]
    for (context, continuation), (score, _) in zip(
        pairs, lm.loglikelihood(requests("loglikelihood", pairs)), strict=True
    ):
        context_ids, ids = lm._encode_pair(context, continuation)
        assert abs(score - by_hand(lm.model.core, (context_ids + ids)[-LENGTH - 1 :], len(ids))[0]) < 1e-5


def test_a_folder_of_transformers_is_read_by_the_zoo_where_it_can(folder, expected, questions, documents, prompts):
    lm = HybridZooLM(folder, batch_size=4)
    assert isinstance(lm.model.core, CausalLM)
    assert lm.max_length == LENGTH  # stated by the tokenizer alone; HFLM takes it from there
    ours = lm.loglikelihood(requests("loglikelihood", questions), disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(ours, expected[0], strict=True)) < 1e-3
    ours = lm.loglikelihood_rolling(requests("loglikelihood_rolling", documents), disable_tqdm=True)
    assert max(abs(a - b) for a, b in zip(ours, expected[1], strict=True)) < 1e-3
    assert lm.generate_until(requests("generate_until", prompts), disable_tqdm=True) == expected[2]


def test_other_folders_are_left_to_transformers(folder, tokenizer, expected, questions, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = HybridZooLM(tmp_path)
    assert type(lm.model) is GPT2LMHeadModel
    assert lm.max_length == 64
    # what only transformers can do when it loads a model
    lm = HybridZooLM(folder, batch_size=4, revision="main")
    assert type(lm.model) is MambaForCausalLM
    ours = lm.loglikelihood(requests("loglikelihood", questions), disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(ours, expected[0], strict=True)) < 1e-3
    with pytest.raises(
        ValueError, match=r"^peft: cannot be applied to a model that exists\. Pass its folder or name\.$"
    ):
        HybridZooLM(lm.model, tokenizer, peft="x")


def test_a_text_ends_where_the_tokenizer_says():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>")
    model = zoo.build("mamba-tiny", ["d_model=32", "layers=mamba", "vocab_size=3", "tie_embeddings=false"])
    model.lm_head.weight.data.zero_()  # greedy decoding gives token 0, an ordinary one here
    (text,) = HybridZooLM(model, tokenizer).generate_until(requests("generate_until", [("b", {"max_gen_toks": 4})]))
    assert text.split() == ["a"] * 4


def test_a_config_is_built_untrained_and_says_so():
    with pytest.warns(UserWarning, match=r"pretrained=mamba-tiny: is a config, so its model is built untrained"):
        lm = HybridZooLM("mamba-tiny", seed=3)
    torch.manual_seed(3)
    assert torch.equal(lm.model.core.lm_head.weight, zoo.build("mamba-tiny").lm_head.weight)
    assert lm.tokenizer_name == "byte"


def test_a_name_that_does_not_exist_is_one_sentence():
    with pytest.raises(ValueError, match=r"pretrained=mamba-tinny: .*Did you mean 'mamba-tiny'\?"):
        HybridZooLM("mamba-tinny")


def test_scores_that_are_no_numbers_are_an_error_though_the_weights_are(core, tokenizer, questions, prompts):
    broken = copy.deepcopy(core)
    with torch.no_grad():
        broken.backbone.norm_f.weight.fill_(3e38)
    lm = HybridZooLM(broken, tokenizer=tokenizer, batch_size=2)
    with pytest.raises(ValueError, match="logits: those of row 0 are not finite"):
        lm.loglikelihood(requests("loglikelihood", questions[:2]), disable_tqdm=True)
    with pytest.raises(ValueError, match="logits: those of row 0 are not finite"):
        lm.generate_until(requests("generate_until", prompts[:1]), disable_tqdm=True)


def test_an_object_stays_where_and_as_it_is(core, tokenizer):
    core.train()
    result = evaluate(core, ["hybridzoo_mqar"], tokenizer=tokenizer, metadata=SMALL, max_length=48)
    assert core.training
    assert result["max_length"] == 48
    core.eval()


SMALL = {"docs": 2, "length": 32, "pairs": 4, "vocab": 40}


@pytest.mark.parametrize("arguments", [dict, str, "object"])
def test_simple_evaluate_takes_a_name_or_an_object(saved, arguments):
    manager, tasks = task_manager(["hybridzoo_mqar"], SMALL)
    common = {"tasks": tasks, "task_manager": manager, "bootstrap_iters": 0}
    if arguments == "object":
        out = simple_evaluate(model=HybridZooLM(saved), **common)
    else:
        given = {"pretrained": str(saved), "max_length": LENGTH}
        given = given if arguments is dict else ",".join(f"{k}={v}" for k, v in given.items())
        out = simple_evaluate(model="hybridzoo", model_args=given, batch_size=4, device="cuda:0", **common)
    assert out["results"]["hybridzoo_mqar"]["sample_len"] == 8
    assert out["configs"]["hybridzoo_mqar"]["metadata"]["chance"] == {"acc": 0.25}


def test_prompts_that_do_not_fit_are_counted_and_said(saved, questions, prompts):
    lm = HybridZooLM(saved, batch_size=4)
    lm.loglikelihood(requests("loglikelihood", questions), disable_tqdm=True)
    lm.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    lengths = [(sum(map(len, lm._encode_pair(c, t))), LENGTH + 1) for c, t in questions if c]
    lengths += [(len(lm.tok_encode(p)), LENGTH - settings["max_gen_toks"]) for p, settings in prompts]
    assert lm.truncated == sum(n > room for n, room in lengths) > 0
    with pytest.warns(
        UserWarning, match=r"evaluate: 16 requests exceed the window of 6 tokens and lost their beginning"
    ):
        evaluate(str(saved), ["hybridzoo_mqar"], metadata=SMALL | {"docs": 1}, max_length=6)  # 4 queries, 4 choices
    with pytest.raises(ValueError, match=r"a continuation of \d+ tokens exceeds the window of 6\. Raise max_length"):
        HybridZooLM(saved, max_length=6).loglikelihood(
            requests("loglikelihood", [("a", " continuation of some length")])
        )


def test_no_hub_is_asked_about_a_model(saved, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("asked a hub")

    monkeypatch.setattr("lm_eval.models.huggingface.HfApi", fail)
    info = HybridZooLM(saved).get_model_info()
    assert info["model_num_parameters"] == sum(p.numel() for p in zoo.load(saved).parameters())
    assert info["model_dtype"] == "float32"


@pytest.mark.filterwarnings("ignore:evaluate. .* exceed the window")
def test_cached_answers_belong_to_one_model_and_its_settings(core, tokenizer, tmp_path, monkeypatch):
    calls = []
    forward = HybridZooLM._model_call
    monkeypatch.setattr(HybridZooLM, "_model_call", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1])

    def run(model, cache=None, **kwargs):
        lm = HybridZooLM(model, tokenizer, **kwargs)
        out = evaluate(lm, ["hybridzoo_mqar"], metadata=SMALL, use_cache=cache and tmp_path / cache, log_samples=True)
        return [s["resps"] for s in out["samples"]["hybridzoo_mqar"]]

    other = redraw(zoo.build(HYBRID))
    mine, theirs, short = run(core), run(other), run(core, max_length=16)
    assert mine != theirs and mine != short
    assert (run(core, "answers"), run(other, "answers"), run(core, "answers", max_length=16)) == (mine, theirs, short)
    calls.clear()
    assert (run(core, "answers"), run(other, "answers")) == (mine, theirs)
    assert not calls
    # training it on makes it another model
    with torch.no_grad():
        other.lm_head.weight[3] += 0.1
    assert run(other, "answers") != theirs
    assert calls


def test_chat_templates_reach_the_prompts(core, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    out = evaluate(
        core, ["hybridzoo_mqar"], tokenizer=str(tmp_path), metadata=SMALL, apply_chat_template=True, log_samples=True
    )
    prompt, _ = out["samples"]["hybridzoo_mqar"][0]["arguments"][0]
    assert prompt.startswith("<user>") and prompt.endswith("<assistant>")


def test_progress_is_reported_to_its_end(saved, documents, questions, prompts):
    lm = HybridZooLM(saved, batch_size=4)
    seen = []
    lm.report = lambda *step: seen.append(step)
    lm.loglikelihood(requests("loglikelihood", questions))
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", documents))
    lm.generate_until(requests("generate_until", prompts))
    kinds = {kind: [(done, total) for k, done, total in seen if k == kind] for kind, _, _ in seen}
    assert set(kinds) == {"loglikelihood", "loglikelihood_rolling", "generate_until"}
    for steps in kinds.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_evaluate_writes_and_tabulates(saved, tmp_path, capfd):
    path = tmp_path / "sub" / "results.json"
    out = evaluate(str(saved), ["hybridzoo_mq*", str(FOLDER / "hybridzoo_passkey.yaml")], metadata=SMALL | {"hybridzoo_passkey": {"length": 400}}, output=path, max_length=512)  # fmt: skip
    assert capfd.readouterr() == ("", "")
    assert json.loads(path.read_text())["results"] == out["results"]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    rows = {(r["task"], r["metric"]): r for r in table(out)}
    assert set(rows) == {(t, m) for t in ("hybridzoo_mqar", "hybridzoo_passkey") for m in ("acc", "exact_match")}
    row = rows["hybridzoo_mqar", "acc"]
    assert (row["chance"], row["n"], row["higher_is_better"]) == (0.25, 8, True)
    assert row["stderr"] is not None
    assert rows["hybridzoo_passkey", "acc"]["chance"] == 0.1


@pytest.mark.parametrize("name", ["hybridzoo_mqarr", "hybridzoo_mcar"])
def test_a_misspelt_local_task_is_named_at_once(name):
    with pytest.raises(ValueError, match=rf"unknown task '{name}'. Did you mean 'hybridzoo_mqar'\?"):
        evaluate("mamba-tiny", [name])


@pytest.fixture
def small_index(monkeypatch):
    """lm-eval's own tasks, of which only RULER's are looked at: reading all 14 000 takes a quarter of a minute."""

    def files(root):
        ruler = root / "ruler"
        return sorted((ruler if ruler.is_dir() else root).glob("*.yaml"))

    monkeypatch.setattr("lm_eval.tasks._index.TaskIndex._iter_yaml_files", staticmethod(files))


def test_an_unknown_task_of_lm_eval_is_named(small_index):
    with pytest.raises(ValueError, match=r"unknown task 'mqar'. Did you mean 'hybridzoo_mqar'\?"):
        evaluate("mamba-tiny", ["mqar"])


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"limit": 0}, "limit: is 0"), ({"limit": -1}, "limit: is -1"), ({"limit": "few"}, "limit: is 'few'"),
        ({"limit": float("nan")}, "limit: is nan"), ({"batch_size": 0}, "batch_size: is 0"), ({"batch_size": "many"}, "is 'many'"),
    ],
)  # fmt: skip
def test_amounts_of_nothing_are_refused(amounts, message):
    with pytest.raises(ValueError, match=message):
        evaluate("mamba-tiny", ["hybridzoo_mqar"], **amounts)


def test_an_option_that_there_is_not_is_named():
    with pytest.raises(TypeError, match=r"evaluate\(\) got an unexpected keyword argument 'batchsize'"):
        evaluate("mamba-tiny", ["hybridzoo_mqar"], batchsize=4)


def test_a_folder_that_holds_no_model_is_told_as_everywhere(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds neither config\.yaml nor config\.json"):
        evaluate(str(tmp_path), ["hybridzoo_mqar"], limit=1)


def test_ruler_measures_its_prompts_with_our_tokenizer(small_index, monkeypatch):
    # RULER sorts all pairs of an adjective and a noun when it is imported, for tens of seconds
    import wonderwords

    class FewWords(wonderwords.RandomWord):
        def __init__(self):
            super().__init__()
            self._categories = {name: words[:40] for name, words in self._categories.items()}

    monkeypatch.setattr(wonderwords, "RandomWord", FewWords)
    model = zoo.build("mamba-tiny", ["d_model=32", "layers=mamba", "max_length=1024"])
    out = evaluate(model, ["niah_single_1"], metadata={"max_seq_lengths": [512]}, limit=2, gen_kwargs={"max_gen_toks": 8}, log_samples=True)  # fmt: skip
    prompt, _ = out["samples"]["niah_single_1"][0]["arguments"][0]
    assert 300 < len(prompt.encode()) <= 512  # bytes are this model's tokens
    assert out["results"]["niah_single_1"]["512,none"] == 0.0


def test_the_command_line_of_lm_eval_knows_our_model_and_tasks(small_index, saved, tmp_path, capsys):
    metadata = json.dumps(SMALL)
    lm_eval_main([
        "--model", "hybridzoo", "--model_args", f"pretrained={saved},max_length=64", "--tasks", "hybridzoo_mqar",
        "--metadata", metadata, "--batch_size", "4", "--output_path", str(tmp_path), "--log_samples",
    ])  # fmt: skip
    assert "|hybridzoo_mqar|" in capsys.readouterr().out
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["max_length"] == 64


def launch(code, *args, **env):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(*processes):
    for process in processes:
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out


def test_two_ranks_share_the_work_and_give_the_same_result(saved, tmp_path):
    tasks, sizes = ["hybridzoo_mqar", "hybridzoo_bpb"], SMALL | {"docs": 3, "pairs": 1}  # one question per document
    whole = evaluate(str(saved), tasks, metadata=sizes, limit=3, log_samples=True)
    code = """
        import json, sys
        from hybridzoo.eval.evaluate import evaluate
        folder, output, tasks, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
        evaluate(folder, tasks, metadata=sizes, limit=3, log_samples=True, output=output)
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    args = (saved, tmp_path / "shared.json", json.dumps(tasks), json.dumps(sizes))
    finish(*(launch(code, *args, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)))
    shared = json.loads((tmp_path / "shared.json").read_text())
    for task in tasks:
        mine, theirs = whole["samples"][task], shared["samples"][task]
        assert [s["doc_id"] for s in theirs] == [s["doc_id"] for s in mine] == [0, 1, 2]
        assert [s["target"] for s in theirs] == [s["target"] for s in mine]
    assert shared["results"]["hybridzoo_mqar"]["acc,none"] == whole["results"]["hybridzoo_mqar"]["acc,none"]
    bits = [r["results"]["hybridzoo_bpb"]["bits_per_byte,none"] for r in (shared, whole)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)


def test_unmodified_lm_eval_reads_a_saved_folder(saved, expected, questions, prompts, tmp_path):
    """``--model hf`` and ``--model hybridzoo`` answer alike, sample by sample; the program knows nothing of the zoo but the folder's code."""
    code = """
        import json, sys
        from lm_eval import evaluator, simple_evaluate
        from lm_eval.api.instance import Instance
        from lm_eval.tasks import TaskManager
        folder, output, questions, prompts, where, tasks, sizes = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
        evaluator.add_env_info = lambda results: None  # asks pip and the machine, for seconds
        from lm_eval.models.huggingface import HFLM
        assert "hybridzoo" not in sys.modules
        lm = HFLM(pretrained=folder, device="cpu", batch_size=4, trust_remote_code=True)
        assert [m for m in sys.modules if m.startswith("transformers_modules")]
        ask = lambda kind, rows: getattr(lm, kind)([Instance(kind, {}, tuple(a), i) for i, a in enumerate(rows)])
        answers = [ask("loglikelihood", questions), ask("generate_until", prompts)]
        manager = TaskManager(include_path=where, include_defaults=False, metadata=sizes)
        found = simple_evaluate(
            model="hf", model_args=f"pretrained={folder},trust_remote_code=True", tasks=tasks, task_manager=manager, device="cpu",
            batch_size=4, limit=3,
        )
        json.dump([answers, found["results"], found["samples"]], open(output, "w"), default=str)
    """
    output, tasks, sizes = tmp_path / "answers.json", ["hybridzoo_mqar", "hybridzoo_bpb"], SMALL | {"docs": 3}
    finish(
        launch(
            code,
            saved,
            output,
            *map(json.dumps, (questions, prompts, str(FOLDER), tasks, sizes)),
            HF_HOME=str(tmp_path),
        )
    )
    (scores, texts), results, samples = json.loads(output.read_text())
    assert max(abs(a - b) for (a, _), (b, _) in zip(scores, expected[0], strict=True)) < 1e-3
    assert texts == expected[2]
    ours = evaluate(str(saved), tasks, metadata=sizes, limit=3, log_samples=True, batch_size=4)
    for task in tasks:
        assert {k: v for k, v in results[task].items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in ours["results"][task].items() if isinstance(v, float)}, rel=1e-6
        )
        theirs = sorted(samples[task], key=lambda sample: sample["doc_id"])
        for mine, other in zip(ours["samples"][task], theirs, strict=True):
            assert [mine["doc_id"], mine["prompt_hash"], mine["target"]] == [
                other["doc_id"],
                other["prompt_hash"],
                other["target"],
            ]
            assert json.loads(json.dumps(mine["resps"], default=str)) == other["resps"]


def test_the_declared_entry_point_is_our_class():
    from importlib.metadata import entry_points

    (point,) = (p for p in entry_points(group="lm_eval.models") if p.name == "hybridzoo")
    assert point.load() is HybridZooLM
    # other models of lm-eval are still there after ours was registered first
    from lm_eval.api.registry import get_model

    assert get_model("hybridzoo") is HybridZooLM
    assert get_model("hf") is HFLM

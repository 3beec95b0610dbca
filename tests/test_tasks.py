"""The offline tasks against independent statements of their definitions, and as tasks of lm-eval."""

import collections
import re
import string

import numpy as np
import pytest
import yaml

from hybridzoo.eval.run import task_manager
from hybridzoo.eval.tasks import FOLDER, generators, names, render
from hybridzoo.zoo.train.data import fingerprint, topics

RECALL = sorted(set(names()) - {"hybridzoo_bpb", "hybridzoo_mmlu_dev"})


def rng(seed=0):
    return generators.evaluation_rng(seed)


# multi-query associative recall


@pytest.mark.parametrize(
    ("length", "pairs", "vocab", "passes"), [(64, 4, 8192, 1), (64, 16, 80, 1), (40, 6, 41, 2), (8, 2, 9, 1)]
)
def test_mqar_is_zoologys(length, pairs, vocab, passes):
    inputs, labels = generators.mqar(rng(), 50, length, pairs, vocab, passes=passes, random_non_queries=False)
    context = 2 * pairs * passes
    assert inputs.shape == labels.shape == (50, length)
    for row, label in zip(inputs.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert row[:context] == row[: 2 * pairs] * passes
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= k < vocab // 2 for k in keys)
        assert all(vocab // 2 <= v < vocab for v in values)
        # every key is asked for once, in the first place of a slot of two; its value is the label at that very index
        asked = [i for i in range(length) if label[i] != -100]
        assert all(i >= context and (i - context) % 2 == 0 for i in asked)
        assert sorted(row[i] for i in asked) == sorted(keys)
        assert all(label[i] == dict(zip(keys, values, strict=True))[row[i]] for i in asked)
        assert all(row[i] == 0 for i in range(context, length) if i not in asked)


def test_mqar_distances_follow_the_power_law():
    # with one pair the slot is drawn straight from p(g) ~ (g + 1)^(a - 1); published: p(0) = 0.25 at L=64, P=4 and 0.21 at 256, 64
    n, slots = 4000, 31
    _, labels = generators.mqar(rng(), n, 64, 1, 80)
    slot = ((labels != -100).argmax(1) - 2) // 2
    share = np.bincount(slot, minlength=slots) / n
    p = np.array([g ** (0.01 - 1) for g in range(1, slots + 1)])
    p /= p.sum()
    assert (np.abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / n)).all()
    _, labels = generators.mqar(rng(), n, 64, 1, 80, power=1.0)
    share = np.bincount(((labels != -100).argmax(1) - 2) // 2, minlength=slots) / n
    assert (np.abs(share - 1 / slots) < 4.5 * np.sqrt(1 / slots / n)).all()
    for length, pairs, published in ((64, 4, 0.25), (256, 64, 0.21)):
        weight = np.arange(1, (length - 2 * pairs) // 2 + 1) ** (0.01 - 1)
        assert weight[0] / weight.sum() == pytest.approx(published, abs=0.005)


def test_mqar_slots_are_drawn_without_replacement():
    # as many queries as slots: each is used
    _, labels = generators.mqar(rng(), 20, 32, 8, 40)
    assert ((labels != -100).nonzero()[1].reshape(20, 8) == np.arange(16, 32, 2)).all()


def test_mqar_fills_what_is_left_at_random():
    plain, labels = generators.mqar(rng(), 300, 64, 4, 80, random_non_queries=False)
    filled, same = generators.mqar(rng(), 300, 64, 4, 80)
    assert (labels == same).all()
    assert (filled[plain != 0] == plain[plain != 0]).all()
    share = np.bincount(filled[plain == 0], minlength=80) / (plain == 0).sum()
    assert share.shape == (80,)
    assert (np.abs(share - 1 / 80) < 4.5 * np.sqrt(1 / 80 / (plain == 0).sum())).all()


@pytest.mark.parametrize("sizes", [{"length": 63}, {"length": 64, "pairs": 17}, {"vocab": 64}, {"pairs": 0}])
def test_mqar_says_what_does_not_fit(sizes):
    with pytest.raises(ValueError, match=r"^mqar\(.*\d.*\. \w.*\.$"):
        generators.mqar(rng(), 1, **({"length": 64, "pairs": 4, "vocab": 80} | sizes))


# induction heads, selective copying, n-gram lookup


def test_induction_repeats_the_special_token_at_the_end():
    n, length, vocab = 3000, 12, 16
    inputs, answers = generators.induction(rng(), n, length, vocab)
    assert inputs.shape == (n, length + 1)
    first = (inputs == vocab).argmax(1)
    assert ((inputs == vocab).sum(1) == 2).all() and (inputs[:, -1] == vocab).all()
    assert (answers == inputs[np.arange(n), first + 1]).all()
    assert answers.max() < vocab and inputs.min() == 0
    # the place is uniform over those that leave room for an ordinary token and one more
    share = np.bincount(first, minlength=length) / n
    assert (share[length - 2 :] == 0).all()
    assert (np.abs(share[: length - 2] - 1 / (length - 2)) < 4.5 * np.sqrt(0.1 / n)).all()


def test_selective_copying_keeps_the_order():
    n, length, tokens, vocab = 400, 20, 5, 16  # as many tokens as symbols would hide a transposed answer
    inputs, targets = generators.selective_copying(rng(), n, length, tokens, vocab)
    assert inputs.shape == (n, length + 2 * tokens) and targets.shape == (n, tokens)
    assert (inputs[:, length + tokens :] == vocab - 1).all()
    for row, target in zip(inputs[:, : length + tokens].tolist(), targets.tolist(), strict=True):
        assert [t for t in row if t] == target
    assert set(np.unique(targets)) == set(range(1, vocab - 1))
    # any place is as likely to hold data as any other
    share = (inputs[:, : length + tokens] > 0).mean(0)
    expected = tokens / (length + tokens)
    assert (np.abs(share - expected) < 4.5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_keys_occur_once_and_leave_room_for_the_answer():
    strings = generators.keyed_strings(rng(), 300, length=30, min_length=10, ngram=2, answer=4, vocab=6)
    assert {len(s) for s, _ in strings} == set(range(10, 31))
    for s, at in strings:
        s = "".join(string.ascii_lowercase[i] for i in s)
        assert len(re.findall(f"(?={s[at : at + 2]})", s)) == 1
        assert len(s[at + 2 : at + 6]) == 4
    with pytest.raises(ValueError, match=r"hardly any string of 30 symbols has a unique key\. Lengthen the key\."):
        generators.keyed_strings(rng(), 5, length=30, ngram=1, answer=1, vocab=1)


def test_training_and_evaluation_never_share_a_seed():
    for seed in (0, 1, 2**31 - 1):
        drawn = [
            g.integers(0, 2**62) for g in (generators.training_rng(seed), rng(seed), generators.evaluation_rng(seed, 1))
        ]
        assert len(set(drawn)) == 3
        for make in (generators.training_rng, generators.evaluation_rng):
            assert make(seed).integers(0, 2**62) == make(seed).integers(0, 2**62)
    for bad in (-1, 2**31):
        for make in (generators.training_rng, generators.evaluation_rng):
            with pytest.raises(ValueError, match=r"seed: -?\d+ is outside \[0, 2\*\*31\)"):
                make(bad)


# documents: what is trained on and what is asked


def solve(task, prompt):
    """The answer, found from the text alone."""
    if task == "mqar":
        return prompt[prompt[:-1].index(prompt[-1]) + 1]
    if task == "induction":
        return prompt[prompt.index(">") + 1]
    if task == "selective_copying":
        body, done = prompt.split("|")
        return body.replace(".", "")[len(done)]
    if task == "copy_prefix":
        key, body, done = prompt[1:].split("|")
        return body[body.index(key) + len(key) + len(done)]
    if task == "copy_suffix":
        body, found = prompt[1:].split("|")
        return body[body.index(found[:2]) + len(found)]
    return re.search(r"The pass key is( \d{5})\. Remember it\.\1 is", prompt)[1]


DOCUMENTS = {
    "mqar": lambda r, n: render.mqar_documents(r, n, length=32, pairs=6, vocab=40),
    "induction": lambda r, n: render.induction_documents(r, n, length=20),
    "selective_copying": lambda r, n: render.selective_copying_documents(r, n, length=20, tokens=5),
    "copy_prefix": lambda r, n: render.copy_documents(r, n, prefix=True),
    "copy_suffix": lambda r, n: render.copy_documents(r, n, prefix=False),
    "passkey": lambda r, n: render.passkey_documents(r, n, length=400),
}


@pytest.mark.parametrize("task", DOCUMENTS)
def test_every_answer_can_be_read_off_and_stands_next_in_the_document(task):
    gold = collections.Counter()
    for document in DOCUMENTS[task](rng(), 60):
        assert len(document.questions) == {"mqar": 6, "selective_copying": 5, "copy_prefix": 4, "copy_suffix": 4}.get(
            task, 1
        )
        for example in document.examples():
            assert document.text.startswith(example.prompt + example.answer)
            assert solve(task, example.prompt) == example.answer
            assert len(set(example.choices)) == len(example.choices)
            gold[example.gold] += 1
    assert len(gold) == len(example.choices)  # no choice is never right


def test_mqar_without_answers_is_the_input_letter_for_letter():
    inputs, labels = generators.mqar(rng(), 10, 64, 4, 80)
    characters = "." + string.ascii_letters + string.digits + string.punctuation.replace(".", "")
    for ids, label, document in zip(
        inputs, labels, render.mqar_documents(rng(), 10, 64, 4, 80, reveal=False), strict=True
    ):
        assert document.text == "".join(characters[i] for i in ids)
        ends = [int(i) + 1 for i in np.flatnonzero(label != -100)]
        assert [q.end for q in document.questions] == ends
        assert [e.answer for e in document.examples()] == [characters[label[end - 1]] for end in ends]


def test_mqar_document_is_the_input_with_each_value_behind_its_query():
    (hidden,) = render.mqar_documents(rng(), 1, 64, 4, 80, reveal=False)
    (shown,) = render.mqar_documents(rng(), 1, 64, 4, 80)
    expected = list(hidden.text)
    for question in hidden.questions:
        expected[question.end] = question.choices[question.gold]
    assert shown.text == "".join(expected)


def test_passkey_fills_up_to_its_length():
    depths = []
    for document in render.passkey_documents(rng(), 200, length=500, choices=4):
        (example,) = document.examples()
        assert 500 - 25 <= len(example.prompt) <= 500
        depths.append(example.prompt.index("The pass key is ") / len(example.prompt))
    assert min(depths) < 0.35 and max(depths) > 0.75
    with pytest.raises(
        ValueError, match=r"passkey\(length=100\): the question alone takes \d+ characters\. Lengthen it\."
    ):
        render.passkey_documents(rng(), 1, length=100)


def test_words_are_one_per_token_and_all_different():
    (document,) = render.mqar_documents(rng(), 1, 256, 64, 8192, style="words")
    words = document.text.split(" ")
    assert len(words) == 256
    assert all(re.fullmatch(r"(\w\w){2}|\.", w) for w in words)
    for example in document.examples():
        context = example.prompt.split(" ")
        assert " " + context[context.index(context[-1]) + 1] == example.answer
    assert len(set(render._names(8192, "words"))) == 8192


@pytest.mark.parametrize(
    ("sizes", "message"), [({"vocab": 95}, "95 tokens exceed the 94 printable"), ({"style": "bytes"}, "'bytes'")]
)
def test_a_style_that_cannot_write_it_says_so(sizes, message):
    with pytest.raises(ValueError, match=message):
        render.mqar_documents(rng(), 1, **sizes)


# as tasks of lm-eval


def test_every_file_is_listed_and_names_itself():
    assert names() == sorted(p.stem for p in FOLDER.glob("hybridzoo_*.yaml"))
    assert len(names()) == 8


@pytest.fixture(scope="module")
def loaded():
    manager, chosen = task_manager(["hybridzoo_*"], {"docs": 5, "pretrained": object()})
    return manager.load(chosen)["tasks"]


def test_tasks_load_by_name_without_lm_evals_index(loaded):
    assert sorted(loaded) == names()
    manager, chosen = task_manager(["hybridzoo_recall"])
    assert sorted(manager.load(chosen)["tasks"]) == RECALL
    assert "arc_easy" not in manager.all_tasks


@pytest.mark.parametrize("name", RECALL)
def test_questions_and_chance_reach_lm_eval(loaded, name):
    task = loaded[name]
    docs = list(task.eval_docs)
    assert len({d["document"] for d in docs}) == 5
    assert task.config.metadata["chance"] == {"acc": pytest.approx(1 / len(docs[0]["choices"]))}
    assert "pretrained" not in task.config.metadata  # a model is no metadata
    for doc in docs:
        assert solve(name.removeprefix("hybridzoo_"), doc["prompt"]) == doc["choices"][doc["gold"]]
    task.build_all_requests(limit=3)
    arguments = [i.arguments for i in task.instances[: len(docs[0]["choices"])]]
    assert arguments == [(docs[0]["prompt"], c) for c in docs[0]["choices"]]


def test_few_shot_examples_are_others(loaded):
    task = loaded["hybridzoo_induction"]
    task.set_fewshot_seed(0)
    text = task.fewshot_context(task.eval_docs[0], num_fewshot=2)
    first, second, prompt = text.split("\n\n")
    assert prompt == task.eval_docs[0]["prompt"]
    for shot in (first, second):
        assert solve("induction", shot[:-1]) == shot[-1]
        assert shot[:-1] not in task.eval_docs["prompt"]


def test_metadata_sets_sizes_for_all_tasks_or_for_one():
    manager, chosen = task_manager(["hybridzoo_mqar", "hybridzoo_induction"], {"length": 32, "docs": 3, "hybridzoo_mqar": {"pairs": 2, "vocab": 34}})  # fmt: skip
    tasks = manager.load(chosen)["tasks"]
    mqar, induction = tasks["hybridzoo_mqar"], tasks["hybridzoo_induction"]
    assert len(mqar.eval_docs) == 6 and len(mqar.eval_docs[0]["choices"]) == 2
    assert mqar.config.dataset_kwargs["length"] == 32
    assert {len(p) for p in induction.eval_docs["prompt"]} == {33}
    assert mqar.config.metadata["chance"] == {"acc": 0.5}


def test_a_yaml_that_includes_ours_sets_its_own_sizes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump({"include": str(FOLDER / "hybridzoo_mqar.yaml"), "task": "mine", "dataset_kwargs": {"pairs": 3}})
    )
    manager, chosen = task_manager([str(path)])
    (task,) = manager.load(chosen)["tasks"].values()
    assert task.config.task == "mine"
    assert len(task.eval_docs[0]["choices"]) == 3


def test_documents_change_with_the_seed_and_with_nothing_else():
    def prompts(seed):
        manager, chosen = task_manager(["hybridzoo_mqar"], {"docs": 2, "data_seed": seed, "seed": 5})
        return manager.load(chosen)["tasks"]["hybridzoo_mqar"].eval_docs["prompt"][:]

    assert prompts(0) == prompts(0) != prompts(1)


def test_bits_per_byte_are_of_the_held_out_documents(loaded):
    task = loaded["hybridzoo_bpb"]
    held_out = topics()["validation"]
    assert [task.doc_to_target(d) for d in task.eval_docs] == held_out
    assert task.config.metadata["text_sha256"] == fingerprint(held_out)
    assert task.OUTPUT_TYPE == "loglikelihood_rolling"


def test_mmlu_dev_holds_the_281_questions_with_four_answers(loaded):
    task = loaded["hybridzoo_mmlu_dev"]
    docs = list(task.eval_docs)
    assert len(docs) == task.config.metadata["questions"] == 281
    assert len({d["subject"] for d in docs}) == 57
    for doc in docs:
        assert re.fullmatch(r".+ about .+\.\n\n.+\nA\. .+\nB\. .+\nC\. .+\nD\. .+\nAnswer:", doc["prompt"], re.DOTALL)
        assert not re.search(r"\([A-E]\) ", doc["prompt"].split("\nA. ")[1])
    assert {d["gold"] for d in docs} == {0, 1, 2, 3}
    # x^2 + c has no root modulo 3 for c = 1 alone
    (field,) = (d for d in docs if "Find all c in Z_3" in d["prompt"])
    assert field["prompt"].endswith("\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:")
    assert field["gold"] == 1
    arguments = task.construct_requests(field, field["prompt"], metadata=("t", 0, 1))
    assert [i.arguments for i in arguments] == [(field["prompt"], f" {letter}") for letter in "ABCD"]

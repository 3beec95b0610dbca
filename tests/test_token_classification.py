"""A class for every token: the loss against numpy, rows of every kind, configs, and what is asked of a language model alone."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import CheckpointError, convert, export
from hybridzoo.zoo.models.stats import stats
from hybridzoo.zoo.models.tasks import task_of
from hybridzoo.zoo.models.token_classification import TokenClassifier
from hybridzoo.zoo.registry import ConfigError

CONFIG = {
    "task": "token_classification", "vocab_size": 130, "d_model": 16, "n_classes": 5, "tokenizer": "ascii",
    "layers": "mamba mlp attention moe", "norm": {"type": "layernorm", "eps": 1e-6},
    "mixers": {
        "mamba": {"d_state": 4}, "mlp": {"d_intermediate": 24}, "attention": {"nheads": 2},
        "moe": {"d_intermediate": 8, "num_experts": 3, "aux_loss_coef": 0.5},
    },
}  # fmt: skip
DENSE = CONFIG | {"layers": "mamba mlp attention"}


@pytest.fixture
def model():
    return zoo.build(DENSE)


def cross_entropy(logits, labels):
    """In nats, from the definition, in float64."""
    logits, labels = logits.detach().double().numpy(), labels.numpy()
    losses = [
        np.log(np.exp(x - x.max()).sum()) + x.max() - x[k]
        for x, k in zip(logits.reshape(-1, logits.shape[-1]), labels.ravel(), strict=True)
        if k != -100
    ]
    return sum(losses), len(losses)


def test_the_loss_is_the_mean_cross_entropy_of_the_labelled_tokens(model):
    ids, labels = torch.randint(130, (3, 7)), torch.randint(5, (3, 7))
    labels[0, 2:4] = labels[2] = -100
    out = model(ids, labels)
    total, n = cross_entropy(out.logits, labels)
    assert out.logits.shape == (3, 7, 5) and out.hidden.shape == (3, 7, 16) and n == 12 and out.aux_loss is None
    assert out.loss.item() == pytest.approx(total / n, rel=1e-6)
    assert model(ids, labels, num_items=48).loss.item() == pytest.approx(total / 48, rel=1e-6)
    assert model(ids, torch.full_like(labels, -100)).loss.item() == 0
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_experts_losses_are_added_by_the_share_of_the_items():
    model = zoo.build(CONFIG)
    ids, labels = torch.randint(130, (2, 6)), torch.randint(5, (2, 6))
    out = model(ids, labels)
    total, n = cross_entropy(out.logits, labels)
    assert out.aux_loss > 0 and len(out.router) == 1
    assert out.loss.item() == pytest.approx(total / n + out.aux_loss.item(), rel=1e-6)
    part = model(ids, labels, num_items=2 * n)
    assert part.loss.item() == pytest.approx((total / n + out.aux_loss.item()) / 2, rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing_and_is_no_target(model, side):
    before, behind = {"left": (3, 0), "right": (0, 3), "both": (1, 2)}[side]
    short, long = torch.randint(130, (1, 4)), torch.randint(130, (1, 7))
    ids = torch.cat([torch.nn.functional.pad(short, (before, behind), value=129), long])
    real = torch.arange(7)[None]
    mask = torch.cat([(real >= before) & (real < 7 - behind), torch.ones(1, 7, dtype=torch.bool)])
    labels = torch.randint(5, (2, 7))
    out = model(ids, labels, mask, output_hidden_states=True)
    alone = model(short), model(long)
    torch.testing.assert_close(out.logits[0, before : 7 - behind], alone[0].logits[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logits[1], alone[1].logits[0], rtol=1e-5, atol=1e-6)
    sums = [
        cross_entropy(alone[0].logits, labels[:1, before : 7 - behind]),
        cross_entropy(alone[1].logits, labels[1:]),
    ]
    assert out.loss.item() == pytest.approx(sum(s for s, _ in sums) / 11, rel=1e-5)
    assert len(out.hidden_states) == 4 and torch.equal(out.hidden_states[-1], out.hidden)


@pytest.mark.parametrize("how", ["cu_seqlens", "seq_idx"])
def test_packed_documents_are_as_they_are_alone(model, how):
    parts = [torch.randint(130, (1, n)) for n in (1, 5, 3)]
    rows = {"cu_seqlens": [0, 1, 6, 9], "seq_idx": torch.tensor([[0] + [1] * 5 + [2] * 3])}
    labels = torch.randint(5, (1, 9))
    out = model(torch.cat(parts, 1), labels, **{how: rows[how]})
    apart = torch.cat([model(part).logits for part in parts], 1)
    torch.testing.assert_close(out.logits, apart, rtol=1e-5, atol=1e-6)
    # unlike a language model's, the last token of a document has a label too
    total, n = cross_entropy(apart, labels)
    assert n == 9 and out.loss.item() == pytest.approx(total / 9, rel=1e-5)


def test_what_does_not_fit_is_refused(model):
    ids = torch.randint(130, (2, 4))
    with pytest.raises(ValueError, match=r"labels: shape \(2, 5\) differs from the tokens' \(2, 4\)"):
        model(ids, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="labels: expected integers, got"):
        model(ids, torch.zeros(2, 4))
    with pytest.raises(IndexError):
        model(ids, torch.full((2, 4), 5))
    with pytest.raises(ValueError, match="give exactly one of them"):
        model(ids, inputs_embeds=torch.zeros(2, 4, 16))
    with pytest.raises(ValueError, match="a packed row has no padding"):
        model(ids[:1], attention_mask=torch.ones(1, 4), cu_seqlens=[0, 4])
    assert not hasattr(model, "generate") and not hasattr(model, "step")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_classes": None}, "n_classes: is missing"),
        ({"n_classes": 0}, "n_classes: is 0, and every token has a class"),
        ({"labels": ["a", "b"]}, "labels: names 2 classes, and n_classes is 5"),
        ({"labels": ["a", "b", "c", "d", False]}, "labels: Value False of type 'bool' is no text. Write it in quotes"),
        ({"tie_embeddings": True}, "tie_embeddings: is true"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        zoo.config(DENSE | change)


def test_it_is_built_counted_saved_and_loaded_like_any_model(tmp_path):
    torch.manual_seed(0)
    model = zoo.build(DENSE, labels=list("abcde"))
    assert type(model) is TokenClassifier is task_of(model.cfg)
    assert model.head.bias.eq(0).all() and 0.01 < model.head.weight.std() < 0.04
    counted = stats(model, 8)
    assert counted.params == model.num_params() and counted.flops == model.flops(8)
    assert counted.rows[-1].token == "head" and counted.rows[-1].flops == 2 * 16 * 5
    decayed, rest = zoo.param_groups(model)
    assert any(p is model.head.weight for p in decayed["params"]) and any(p is model.head.bias for p in rest["params"])
    with torch.no_grad():
        model.head.bias.uniform_(-1, 1)
    again, ids = zoo.load(zoo.save(model, tmp_path / "m")), torch.randint(130, (2, 6))
    assert again.cfg.labels == list("abcde") and torch.equal(again(ids).logits, model.eval()(ids).logits)
    names = set(model.state_dict())
    assert {"head.weight", "head.bias", "backbone.embedding.weight", "backbone.norm_f.bias"} <= names
    again.train().gradient_checkpointing_enable()
    labels = torch.randint(5, (2, 6))
    again(ids, labels).loss.backward()
    model.train()(ids, labels).loss.backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_it_learns_a_class_that_follows_from_the_token():
    torch.manual_seed(0)
    model = zoo.build(DENSE)
    optimiser = torch.optim.AdamW(zoo.param_groups(model), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(130, (8, 16))
        optimiser.zero_grad()
        loss = model(ids, ids % 5).loss
        loss.backward()
        optimiser.step()
    ids = torch.arange(130)[None]
    assert loss < 0.1 and (model(ids).logits.argmax(-1) == ids % 5).float().mean() > 0.95


def test_other_formats_have_no_place_for_it(model, tmp_path):
    folder = zoo.save(model, tmp_path / "m")
    for to in ("hf", "mamba_ssm"):
        with pytest.raises(
            CheckpointError, match="is for language models, and this one's task is 'token_classification'"
        ):
            export(model, tmp_path / to, to)
        assert not (tmp_path / to).exists()
    assert convert(folder, tmp_path / "again", "hybridzoo").parameters == model.num_params()


def test_who_wants_a_language_model_is_told_that_it_is_none(model, tmp_path):
    from hybridzoo.__main__ import app

    folder = zoo.save(model, tmp_path / "m")
    done = CliRunner().invoke(app, ["generate", str(folder), "--prompt", "x"])
    assert done.exit_code == 1 and "is no language model, its task is 'token_classification'" in done.stderr
    pytest.importorskip("lm_eval")
    for named in (model, folder):
        with pytest.raises(ValueError, match=r"is no language model, its task is 'token_classification'"):
            zoo.evaluate(named, tasks=["hybridzoo_induction"])


# in transformers' hands


def test_transformers_loads_calls_and_saves_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = zoo.build(CONFIG, labels=list("abcde")).eval()
    folder = zoo.save(model, tmp_path / "m")
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    assert type(loaded).__name__ == "HybridZooForTokenClassification" and not loaded.training
    assert loaded.config.id2label == dict(enumerate("abcde")) and loaded.config.pad_token_id == 129
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["def f(x):", "a"], padding=True, return_tensors="pt")
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 5, -100)
    ours = model(batch["input_ids"], labels, batch["attention_mask"], output_hidden_states=True)
    out = loaded(**batch, labels=labels, output_hidden_states=True)
    assert torch.equal(out.logits, ours.logits) and torch.equal(out.loss, ours.loss)
    assert all(map(torch.equal, out.hidden_states, ours.hidden_states)) and torch.equal(
        loaded.reported[0], ours.aux_loss
    )
    # two documents in a row, by positions that start again
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = loaded(batch["input_ids"][:1], position_ids=positions)
    assert torch.equal(packed.logits, model(batch["input_ids"][:1], cu_seqlens=[0, 4, 9]).logits)
    with pytest.raises(ValueError, match="use_cache: is not an argument of HybridZooForTokenClassification"):
        loaded(**batch, use_cache=True)
    loaded.save_pretrained(tmp_path / "again")
    again = zoo.load(tmp_path / "again")
    assert type(again) is TokenClassifier and again.cfg == model.cfg
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    with pytest.raises(ValueError, match="HybridZooForTokenClassification: cannot be around a model whose task is"):
        type(loaded).wrap(zoo.build("mamba-tiny"))


def test_transformers_pipeline_names_what_it_finds(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = zoo.save(zoo.build(DENSE, labels=list("abcde")).eval(), tmp_path / "m")
    found = transformers.pipeline("token-classification", model=str(folder), device="cpu")("SELECT 1;")
    with torch.no_grad():
        ids = zoo.load(folder)(torch.tensor([list(b"SELECT 1;")])).logits[0].argmax(-1)
    assert [entry["entity"] for entry in found] == ["abcde"[i] for i in ids]


def test_transformers_trains_it_for_other_classes(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    folder = zoo.save(zoo.build(DENSE), tmp_path / "m")
    load = transformers.AutoModelForTokenClassification.from_pretrained
    model = load(folder, id2label={0: "even", 1: "odd"}, ignore_mismatched_sizes=True)
    assert model.core.cfg.n_classes == 2 and list(model.core.cfg.labels) == ["even", "odd"]
    rows = [{"input_ids": x.tolist(), "labels": (x % 2).tolist()} for x in torch.randint(128, (64, 12)).split(1)]
    rows = [{key: value[0][: 6 + i % 6] for key, value in row.items()} for i, row in enumerate(rows)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=60, per_device_train_batch_size=16, learning_rate=2e-2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    collator = transformers.DataCollatorForTokenClassification(tokenizer)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    ids = torch.arange(128)[None]
    assert (zoo.load(zoo.save(model, tmp_path / "new"))(ids).logits.argmax(-1) == ids % 2).float().mean() > 0.9

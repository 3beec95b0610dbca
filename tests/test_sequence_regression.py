"""Vectors in, vectors out: the loss against numpy, rows of every kind, states, configs, transformers, and training with exact resumption."""

import numpy as np
import pytest
import torch

import hybridzoo as zoo
from hybridzoo.zoo.config.shipped import list_models
from hybridzoo.zoo.hf import HybridZooForSequenceRegression
from hybridzoo.zoo.models.redraw import redraw
from hybridzoo.zoo.models.sequence_regression import SequenceRegressor
from hybridzoo.zoo.models.stats import stats
from hybridzoo.zoo.registry import ConfigError
from hybridzoo.zoo.train.batches import filled
from hybridzoo.zoo.train.vector_rows import vectors_from

CONFIG = {
    "task": "sequence_regression", "inputs": 3, "outputs": 2, "d_model": 16, "layers": "mamba mlp attention",
    "norm": {"type": "layernorm", "eps": 1e-6},
    "mixers": {
        "mamba": {"d_state": 4}, "mlp": {"d_intermediate": 24}, "attention": {"nheads": 2, "rope": None},
        "moe": {"d_intermediate": 8, "num_experts": 3, "aux_loss_coef": 0.5},
    },
}  # fmt: skip
NAN = float("nan")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return zoo.build(CONFIG)


def rows(b=2, l=7, seed=1):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randn(b, l, 2, generator=draw)
    labels[0, 2:4], labels[-1, 0, 1] = NAN, NAN
    return torch.randn(b, l, 3, generator=draw), labels


def test_the_loss_is_the_mean_square_over_the_numbers_that_have_a_target(model):
    x, y = rows()
    out = model(x, y)
    error = out.logits.detach().double().numpy() - y.numpy()
    n = np.isfinite(error).sum()
    assert out.logits.shape == (2, 7, 2) and n == 23 and out.aux_loss is None and out.state is None
    assert out.loss.item() == pytest.approx(np.nansum(error**2) / n, rel=1e-6)
    assert model(x, y, num_items=92).loss.item() == pytest.approx(np.nansum(error**2) / 92, rel=1e-6)
    assert model(x, torch.full_like(y, NAN)).loss.item() == 0
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_experts_losses_are_added_by_the_share_of_the_items():
    model, (x, y) = zoo.build(CONFIG, layers="mamba moe"), rows()
    out, part = model(x, y), model(x, y, num_items=46)
    error = (out.logits - y).nan_to_num().square().sum().item()
    assert out.aux_loss > 0 and out.loss.item() == pytest.approx(error / 23 + out.aux_loss.item(), rel=1e-6)
    assert part.loss.item() == pytest.approx(out.loss.item() / 2, rel=1e-6)


def test_padding_changes_nothing_and_is_no_target(model):
    x, y = rows()
    short = torch.nn.functional.pad(x[:1, :4], (0, 0, 2, 1), value=NAN)
    out = model(torch.cat([short, x[1:]]), y, torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1] * 7]))
    alone = model(x[:1, :4]).logits, model(x[1:]).logits
    torch.testing.assert_close(out.logits[:1, 2:6], alone[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.logits[1:], alone[1], rtol=1e-5, atol=1e-6)
    errors = torch.cat([(alone[0] - y[:1, 2:6]).flatten(), (alone[1] - y[1:]).flatten()])
    known = errors[~errors.isnan()]
    assert len(known) == 17 and out.loss.item() == pytest.approx(known.square().mean().item(), rel=1e-5)


def test_packed_rows_are_as_they_are_alone(model):
    x, _ = rows(1, 9)
    apart = torch.cat([model(part).logits for part in (x[:, :1], x[:, 1:6], x[:, 6:])], 1)
    for how in ({"cu_seqlens": [0, 1, 6, 9]}, {"seq_idx": torch.tensor([[0] + [1] * 5 + [2] * 3])}):
        torch.testing.assert_close(model(x, **how).logits, apart, rtol=1e-5, atol=1e-6)


def test_pieces_and_single_steps_continue_a_row(model):
    x, _ = rows()
    whole = model(x).logits
    first = model(x[:, :3], return_state=True)
    rest = model(x[:, 3:], state=first.state)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-5, atol=1e-6)
    state = model.init_state(2)
    steps = torch.stack([model.step(x[:, t], state) for t in range(7)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-6)
    seen = []
    model.backbone.embedding.register_forward_hook(lambda m, args, out: seen.append(out))
    hooked = model.step(x[:, 0], state)
    assert len(seen) == 1 and hooked.shape == (2, 2) and state.tokens.tolist() == [8, 8]


def test_what_does_not_fit_is_refused(model):
    x, y = rows()
    for inputs, labels, message in (
        (x[..., :2], None, r"inputs: expected floating-point numbers of shape \(any, any, 3\)"),
        (x.long(), None, "inputs: expected floating-point"),
        (x[:, :0], None, "inputs: expected"),
        (x, y[:, :6], r"labels: expected floating-point numbers of shape \(2, 7, 2\), got torch.float32 of shape \(2, 6, 2\)"),
        (x, y.nan_to_num().long(), "labels: expected"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(inputs, labels)
    with pytest.raises(ValueError, match=r"inputs: expected floating-point numbers of shape \(2, 3\)"):
        model.step(x[:1, 0], model.init_state(2))
    for change, message in (({"inputs": None}, "inputs: is missing"), ({"outputs": 0}, "outputs: is 0, outside 1 to")):
        with pytest.raises(ConfigError, match=message):
            zoo.config(CONFIG | change)


def test_it_is_built_counted_saved_and_loaded_like_any_model(model, tmp_path):
    assert type(model) is SequenceRegressor and list_models(task="sequence_regression") == ["mambaformer-icl-micro"]
    counted = stats(model, 8)
    assert counted.params == model.num_params() and counted.flops == model.flops(8)
    assert counted.rows[0].flops == 2 * 3 * 16 and counted.rows[-1].flops == 2 * 16 * 2
    assert model.head.bias.eq(0).all() and model.backbone.embedding.weight.abs().max() <= 3**-0.5
    x, _ = rows()
    again = zoo.load(zoo.save(model, tmp_path / "m"))
    assert torch.equal(again(x).logits, model.eval()(x).logits)
    adapter = HybridZooForSequenceRegression.from_pretrained(tmp_path / "m")
    assert torch.equal(adapter(x).logits, again(x).logits)
    adapter.save_pretrained(tmp_path / "theirs")
    assert torch.equal(zoo.load(tmp_path / "theirs")(x).logits, again(x).logits)
    with pytest.raises(ValueError, match="output_attentions"):
        adapter(x, output_attentions=True)
    before = model.head.weight.clone()
    redraw(model, ["head.weight", "backbone.embedding.weight"])
    assert not torch.equal(model.head.weight, before) and model.head.weight.abs().max() <= 0.25


def test_half_precision_reads_any_floats(model):
    x, y = rows()
    half = zoo.build(CONFIG, dtype=torch.bfloat16)
    assert half(x.double(), y).loss.dtype == torch.float32 and half(x).logits.dtype == torch.bfloat16


def test_a_batch_is_filled_with_rows_that_have_no_target():
    x, y = rows()
    batch = filled({"inputs": x, "labels": y, "row": torch.arange(2)}, 5)
    assert batch["inputs"].shape[0] == 5 and batch["labels"][2:].isnan().all() and torch.equal(batch["inputs"][4], x[0])
    soft = filled({"pixel_values": x, "labels": torch.rand(2, 4)}, 3)
    assert soft["labels"][2].eq(0).all()


class Made:
    """Rows that are drawn from their number."""

    digest = "made 1"

    def __len__(self):
        return 40

    def __getitem__(self, number):
        draw = np.random.default_rng([7, number])
        x = draw.standard_normal((6, 3))
        return x, np.where(np.arange(6)[:, None] % 2 == 0, x[:, :2].cumsum(0), np.nan)


def test_training_learns_evaluates_and_goes_on_exactly(tmp_path):
    options = {"steps": 30, "batch_size": 8, "lr": 1e-2, "report_to": "none", "device": "cpu", "save_every": 10}
    val = tuple(np.stack(part).astype("float32") for part in zip(*(Made()[i] for i in range(21)), strict=True))
    whole = zoo.train(CONFIG, Made(), tmp_path / "whole", val=val, **options)
    first, last = whole.history[0], whole.history[-1]
    assert whole.unit == "vectors" and whole.tokens == 30 * 8 * 6 and last["eval_loss"] < 0.5 * first["loss"]
    model, (x, y) = whole.model, map(torch.from_numpy, val)
    error = (model(x).logits - y)[~y.isnan()].square().mean().item()
    assert whole.best["eval_loss"] == pytest.approx(error, rel=1e-5)

    def stop(step, loss):
        if step == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.train(CONFIG, Made(), tmp_path / "parts", val=val, on_step=stop, **options)
    parts = zoo.train(CONFIG, Made(), tmp_path / "parts", val=val, **options)
    assert 0 < parts.resumed_from < 30
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, parts.model.state_dict()[name]), name
    other = Made()
    other.digest = "made 2"
    with pytest.raises(zoo.zoo.train.run.DifferentRun, match="data"):
        zoo.train(CONFIG, other, tmp_path / "parts", val=val, **options)
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "squared error" in page and "nats" not in page and "perplexity" not in page


def test_signs_are_right_or_wrong_and_end_a_training(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((256, 4, 3)).astype("float32")
    y = np.where(x[..., :2] > 0, 1.0, -1.0)
    y[:, 0] = np.nan
    options = {"steps": 200, "batch_size": 32, "lr": 1e-2, "report_to": "none", "device": "cpu", "eval_every": 10}
    result = zoo.train(CONFIG | {"layers": "mlp"}, (x, y), tmp_path, val=(x[:32], y[:32]), until=0.95, **options)
    said = result.model(torch.from_numpy(x[:32])).logits.detach().numpy()[:, 1:]
    assert result.best["eval_accuracy"] == ((said > 0) == (y[:32, 1:] > 0)).mean() >= 0.95
    assert result.history[-1]["step"] < 200 and result.history[-1]["step"] == result.best["step"]
    assert (
        vectors_from((x, y), zoo.config(CONFIG)).signs and not vectors_from((x, x[..., :2]), zoo.config(CONFIG)).signs
    )


def test_data_that_cannot_be_learned_from_are_refused(tmp_path):
    cfg, (x, y) = zoo.config(CONFIG), (m.numpy() for m in rows())
    nothing = y.copy()
    nothing[0] = NAN
    found = vectors_from((x, nothing), cfg)
    assert len(found) == 1 and found[0]["row"] == 1 and found.about[1] == "without a target, left out: 1"
    assert found.digest != vectors_from((x, y), cfg).digest
    infinite, empty = x.copy(), np.full_like(y, NAN)
    infinite[1, 2] = np.inf
    for data, message in (
        ("rows.txt", "expected a pair of arrays"),
        ((x, y[:, :3]), "got float32 of shape"),
        ((x[..., :2], y), "Say inputs=2 outputs=2"),
        ((infinite, y), "row 1 has an input or a target that is infinite"),
        ((x, empty), "no row holds a target"),
        ((x.astype(int), y), "expected floating-point arrays"),
    ):
        with pytest.raises(ValueError, match=message):
            vectors_from(data, cfg)
    with pytest.raises(ValueError, match="is for images, and this model reads vectors"):
        zoo.train(CONFIG, (x, y), "unused", flip=0.5, device="cpu")
    with pytest.raises(ValueError, match=r"until=0\.9\): predicted numbers are not right or wrong"):
        zoo.train(CONFIG, (x, y), tmp_path / "unused", val=(x, y), until=0.9, device="cpu")

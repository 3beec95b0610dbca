"""Where transformers' classes are wrong, ours are right: one case of every family, and a record of what is wrong with theirs."""

import inspect
import json

import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
from hybridzoo.eval.parity.configs import CONFIGS
from hybridzoo.eval.parity.configs import VOCAB as V
from hybridzoo.eval.parity.run import Pair, ratio, tensors_of
from hybridzoo.zoo.checkpoint import convert, export

transformers = pytest.importorskip("transformers")
FAMILIES = [name for name in CONFIGS if "-" not in name]
ATTENTION_ONLY = {"granitemoe", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"}
ON_RECORD = ("5.23.", "5.24.")
LIMITED = ["bamba-biases-tied-limits", "mamba2-biases-tied", "zamba2-one-block-biases-limits"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory, judged):
    judged(CONFIGS[request.param][0])
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def test_gradients_through_the_state_are_those_of_one_pass(pair):
    model, ids = pair.ours, torch.randint(1, V, (2, 17))
    weight = torch.randn(2, 8, V)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(logits):
        return torch.autograd.grad((logits * weight).sum(), parameters.values())

    whole = model(ids).logits[:, 9:]
    parts = model(ids[:, 9:], state=model(ids[:, :9]).state).logits
    assert ratio(parts, whole) < 1e-4
    for name, a, b in zip(parameters, gradients(parts), gradients(whole), strict=True):
        assert b.any() and ratio(a, b) < 1e-3, name


@torch.no_grad()
def test_a_second_turn_continues_the_state_of_the_first(pair):
    # prompt, answer, next prompt, answer: on one state, and the judge is one full forward of theirs over all of it
    prompt, more = torch.randint(1, V, (2, 9)), torch.randint(1, V, (2, 6))
    out = pair.ours(prompt)
    text, state, logits = prompt, out.state, out.logits[:, -1]
    got = [logits]
    for turn in (more, None):
        for _ in range(4):
            token = logits.argmax(-1)
            text = torch.cat([text, token[:, None]], 1)
            logits = pair.ours.step(token, state)
            got.append(logits)
        if turn is not None:
            out = pair.ours(turn, state=state)
            text, state, logits = torch.cat([text, turn], 1), out.state, out.logits[:, -1]
            got += out.logits.unbind(1)
    assert ratio(torch.stack(got, 1), pair.theirs(text, use_cache=False).logits[:, 8:]) < 1e-4


def test_a_half_precision_checkpoint_comes_back_bitwise(pair, tmp_path):
    half = pair.cls.from_pretrained(pair.folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    a, b = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    # what was trained on in float32 keeps its digits
    ours = zoo.load(tmp_path / "in")
    pinned = [p for p in ours.parameters() if p.dtype == torch.float32 and p.requires_grad]
    for p in pinned:
        p.data.add_(1e-4)
    export(ours, tmp_path / "trained")
    again = [p for p in zoo.load(tmp_path / "trained").parameters() if p.dtype == torch.float32 and p.requires_grad]
    assert bool(pinned) != (pair.family in ATTENTION_ONLY)
    assert all(torch.equal(p, q) for p, q in zip(pinned, again, strict=True))


def test_special_tokens_are_taken_along(tmp_path):
    Pair("mamba2", tmp_path / "in")
    file = tmp_path / "in/config.json"
    ids = {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | ids))
    convert(tmp_path / "in", tmp_path / "ours", "hybridzoo")
    convert(tmp_path / "ours", tmp_path / "theirs", "hf")
    for folder in ("ours", "theirs"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert {name: written[name] for name in ids} == ids
    export(zoo.build("mamba2-tiny"), tmp_path / "bytes")
    assert json.loads((tmp_path / "bytes/config.json").read_text())["eos_token_id"] == 0  # the byte tokenizer's


# ------------------------------------------------------------------------------------- what is wrong with transformers 5.24


def cache_name(theirs):
    return next(
        n for n in inspect.signature(theirs.forward).parameters if n in ("cache", "cache_params", "past_key_values")
    )


def with_cache(theirs, ids, cache=None, **kwargs):
    out = theirs(ids, use_cache=True, **{cache_name(theirs): cache}, **kwargs)
    return out.logits, getattr(out, cache_name(theirs))


def several_tokens_after_a_cache(theirs, ids):
    return ratio(
        with_cache(theirs, ids[:, 9:], with_cache(theirs, ids[:, :9])[1])[0], theirs(ids, use_cache=False).logits[:, 9:]
    )


def right_padded_prefill_then_decode(theirs, ids):
    mask = torch.ones_like(ids[:, :9])
    mask[:, 6:] = 0
    cache = with_cache(theirs, ids[:, :9] * mask, attention_mask=mask)[1]
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    got = with_cache(theirs, ids[:, 6:7], cache, attention_mask=mask, position_ids=torch.full((2, 1), 6))[0]
    return ratio(got, theirs(ids[:, :7], use_cache=False).logits[:, 6:])


def packed_documents(theirs, ids):
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None].expand(2, -1)
    return ratio(
        theirs(ids, position_ids=positions, use_cache=False).logits[:, 9:], theirs(ids[:, 9:], use_cache=False).logits
    )


def gradient_through_a_cache(theirs, ids):
    embedding = theirs.get_input_embeddings().weight.requires_grad_()
    with torch.enable_grad():
        whole = torch.autograd.grad(theirs(ids[:, :10], use_cache=False).logits[:, 9].sum(), embedding)[0]
        logits, _ = with_cache(theirs, ids[:, 9:10], with_cache(theirs, ids[:, :9])[1])
        return ratio(torch.autograd.grad(logits.sum(), embedding)[0], whole)


CELLS = (several_tokens_after_a_cache, right_padded_prefill_then_decode, packed_documents, gradient_through_a_cache)


@torch.no_grad()
def test_the_defects_of_transformers_are_those_on_record(pair):
    """Tells when a newer version has repaired one, and that the tests of our side are not vacuous."""
    if not transformers.__version__.startswith(ON_RECORD):
        pytest.skip(f"on record are transformers 5.23 and 5.24, this is {transformers.__version__}")
    ids, wrong = torch.randint(1, V, (2, 17)), set()
    for cell in CELLS:
        try:
            error = cell(pair.theirs, ids)
        except (RuntimeError, TypeError):
            error = float("inf")
        assert not 1e-4 < error < 1e-3, (cell.__name__, error)  # neither right nor wrong
        wrong |= {cell.__name__} if error > 1e-3 else set()
    expected = set() if pair.family in ATTENTION_ONLY else {cell.__name__ for cell in CELLS}
    if pair.family in ("mamba2", "granitemoehybrid", "nemotron_h", "zamba2", "falcon_h1"):
        expected.remove("several_tokens_after_a_cache")
    assert wrong == expected


@pytest.mark.parametrize("name", LIMITED)
@torch.no_grad()
def test_step_size_limits_hold_in_decoding_too(name, tmp_path, judged):
    judged(CONFIGS[name][0])
    pair, ids = Pair(name, tmp_path), torch.randint(1, V, (2, 12))
    expected = pair.theirs(ids, use_cache=False).logits[:, 9:]
    state = pair.ours(ids[:, :9]).state
    assert ratio(torch.stack([pair.ours.step(ids[:, t], state) for t in range(9, 12)], 1), expected) < 1e-4
    cache, steps = with_cache(pair.theirs, ids[:, :9])[1], []
    for t in range(9, 12):
        logits, cache = with_cache(pair.theirs, ids[:, t : t + 1], cache, position_ids=torch.full((2, 1), t))
        steps.append(logits)
    if transformers.__version__.startswith(ON_RECORD):
        assert ratio(torch.cat(steps, 1), expected) > 1e-2  # theirs forgets the limits


# ------------------------------------------------------------------------------------------------ training from scratch

HEADS = {"mamba_n_heads": 48, "mamba_d_head": 1}
MANY_STEP_SIZES = {
    "mamba": {}, "falcon_mamba": {}, "jamba": {}, "mamba2": {"num_heads": 48, "head_dim": 1}, "zamba2": {"n_mamba_heads": 48},
    "nemotron_h": {"mamba_num_heads": 48, "mamba_head_dim": 1, "time_step_min": 0.001}, "bamba": HEADS, "granite": HEADS,
    "falcon_h1": HEADS | {"mamba_d_ssm": 48},
}  # fmt: skip
CONSTANT_STEP_SIZE = {"jamba": 0.693, "bamba": 1.313, "granite": 1.313, "falcon_h1": 1.313}


@pytest.mark.parametrize("name", MANY_STEP_SIZES)
def test_training_from_scratch_starts_as_the_papers_do(name, tmp_path, judged):
    kind, options = CONFIGS[name]
    judged(kind)
    config = getattr(transformers, f"{kind}Config")(**({"vocab_size": V} | options | MANY_STEP_SIZES[name]))
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    theirs.save_pretrained(tmp_path)
    ours = zoo.build(zoo.load(tmp_path).cfg)

    def step_sizes(model):
        names = ("dt_bias", "dt_proj.bias")
        return torch.cat([F.softplus(p.detach()) for key, p in model.named_parameters() if key.endswith(names)])

    def rates(model):
        return [p.detach().exp() for key, p in model.named_parameters() if key.endswith("A_log")]

    dt, judge = step_sizes(ours), step_sizes(theirs)
    assert dt.shape == judge.shape and dt.min() > 0.99e-3 and dt.max() < 0.101
    if name in CONSTANT_STEP_SIZE:  # every channel of theirs starts with one step size, out of the range
        torch.testing.assert_close(judge, torch.full_like(judge, CONSTANT_STEP_SIZE[name]), atol=1e-3, rtol=0)
    else:  # log-uniform both: the means of about 100 draws and more, and their spread, whose standard error is below 0.14
        assert abs(dt.log().mean() - judge.log().mean()) < 0.5 and abs(dt.log().std() - judge.log().std()) < 0.3
    for a, b in zip(rates(ours), rates(theirs), strict=True):
        if a.dim() == 2:  # Mamba: 1 to n in every channel
            torch.testing.assert_close(a, b)
        else:  # Mamba-2: uniform in 1 to 16; theirs grow with the number of heads
            assert 1 <= a.min() and a.max() <= 16 and a.unique().numel() > 40
            torch.testing.assert_close(b, torch.arange(1.0, 49.0))

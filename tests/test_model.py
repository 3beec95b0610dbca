"""The language model's promises: one path for every way of reading tokens, rows that do not see each other, honest losses."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import hybridzoo as zoo
from hybridzoo.layers.base import Mixer
from hybridzoo.zoo.models.loss import IGNORE, next_token_loss, shift_labels

BASE = {
    "task": "causal_lm",
    "vocab_size": 67,
    "d_model": 32,
    "norm": {"type": "rmsnorm", "eps": 1e-6},
    "tie_embeddings": True,
}
MIXERS = {
    "mamba": {"type": "mamba", "d_state": 4},
    "mamba2": {"type": "mamba2", "d_state": 8, "headdim": 8, "chunk_size": 8},
    "attention": {"type": "attention", "nheads": 4, "nheads_kv": 2},
    "window": {"type": "attention", "nheads": 4, "window": 5},
    "mlp": {"type": "mlp", "d_intermediate": 48},
    "moe": {"type": "moe", "d_intermediate": 24, "num_experts": 4, "top_k": 2},
}
PATTERNS = {
    "mamba": "mamba * 2",
    "mamba2": "mamba2 * 2",
    "jamba": "mamba mlp mamba moe attention mlp",
    "samba": "mamba mlp window mlp",
    "parallel": "mamba2 + attention mlp",
    "shared": "mamba attention@a mamba attention@a",
}


def build(pattern, **changes):
    used = {t for t in MIXERS if t in pattern.replace("@a", "").replace("+", " ").split()}
    cfg = BASE | {"layers": pattern, "mixers": {name: MIXERS[name] for name in sorted(used)}} | changes
    model = zoo.build(cfg, dtype=torch.float64)
    for name, p in model.named_parameters():
        # larger than the training initialisation, so that mistakes are visible
        if p.dim() == 2 and not name.endswith("A_log"):
            p.data.mul_(3)
    return model


@pytest.fixture(params=PATTERNS)
def model(request):
    torch.manual_seed(0)
    return build(PATTERNS[request.param]).eval()


def tokens(*shape):
    return torch.randint(1, 67, shape)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


@torch.no_grad()
def test_chunks_and_steps_equal_one_forward(model):
    ids = tokens(2, 23)
    whole = model(ids).logits
    state, got = model.init_state(2, max_len=23), []
    for chunk in ids.split([1, 2, 9, 4, 7], dim=1):
        out = model(chunk, state=state)
        state = out.state
        got.append(out.logits)
    close(torch.cat(got, 1), whole)
    state = model.init_state(2, max_len=23)
    close(torch.stack([model.step(ids[:, t], state) for t in range(23)], 1), whole)
    assert state.tokens.tolist() == [23, 23]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_nothing(model, side):
    rows = [tokens(n) for n in (3, 11, 1)]
    l = 11 if side != "holes" else 15
    ids, mask = torch.zeros(3, l, dtype=torch.long), torch.zeros(3, l, dtype=torch.long)
    for i, row in enumerate(rows):
        at = {
            "left": torch.arange(l - len(row), l),
            "right": torch.arange(len(row)),
            "holes": torch.randperm(l)[: len(row)].sort().values,
        }[side]
        ids[i, at], mask[i, at] = row, 1
    out = model(ids, attention_mask=mask)
    follow = tokens(3, 4)
    after = torch.stack([model.step(follow[:, t], out.state) for t in range(4)], 1)
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, follow[i]])[None]).logits[0]
        close(out.logits[i][mask[i].bool()], alone[: len(row)])
        close(after[i], alone[len(row) :])


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model):
    docs = [tokens(n) for n in (7, 1, 12, 3)]
    cu = torch.tensor([0, 7, 8, 20, 23])
    packed = model(torch.cat(docs)[None], cu_seqlens=cu).logits[0]
    close(packed, torch.cat([model(d[None]).logits[0] for d in docs]))


def test_the_loss_of_a_packed_row_is_that_of_its_documents(model):
    docs = [tokens(n) for n in (7, 2, 12)]
    row = torch.cat(docs)[None]
    out = model(row, labels=row, cu_seqlens=torch.tensor([0, 7, 9, 21]))
    packed = out.loss - (out.aux_loss if out.aux_loss is not None else 0)
    parts = [F.cross_entropy(model(d[None]).logits[0, :-1], d[1:], reduction="sum") for d in docs]
    close(packed, sum(parts) / (6 + 1 + 11))


def test_padding_is_no_target_and_ignored_labels_count_for_nothing(model):
    ids = tokens(2, 9)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    labels = ids.clone()
    labels[1, 4] = IGNORE
    out = model(ids, labels=labels, attention_mask=mask)
    logits, aux = out.logits, 0 if out.aux_loss is None else out.aux_loss
    keep = (mask[:, 1:] * mask[:, :-1]).bool() & (labels[:, 1:] != IGNORE)
    expected = F.cross_entropy(logits[:, :-1][keep], labels[:, 1:][keep])
    close(out.loss - aux, expected)


def test_gradients_flow_through_the_state(model):
    ids = tokens(2, 12)
    whole = torch.autograd.grad(model(ids).logits[:, 8:].square().sum(), model.backbone.embedding.weight)[0]
    first = model(ids[:, :8])
    parts = torch.autograd.grad(
        model(ids[:, 8:], state=first.state).logits.square().sum(), model.backbone.embedding.weight
    )[0]
    close(parts, whole)


def test_a_forward_leaves_the_given_state_as_it_was(model):
    ids = tokens(1, 6)
    with torch.no_grad():
        state = model(ids).state
        before = state.clone()
        model(ids, state=state)
        one, two = model.step(ids[:, 0], state), model.step(ids[:, 0], before)
    close(one, two)


def test_gradient_checkpointing_changes_no_gradient(model):
    model.train()
    ids = tokens(2, 9)
    names = [n for n, _ in model.named_parameters()]

    def gradients():
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        return out.loss.detach(), len(out.router), [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    close(recomputed[0], plain[0])
    assert recomputed[1] == plain[1]
    for name, a, b in zip(names, recomputed[2], plain[2], strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_the_residual_stream_stays_in_fp32_when_asked(norm):
    model = build("mamba attention mlp", residual_in_fp32=True, norm={"type": norm, "eps": 1e-5}).to(torch.bfloat16)
    seen = []
    for block in model.backbone.layers:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].sum().dtype))
    out = model(tokens(1, 5))
    assert seen == [torch.float32] * 3 and out.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("every", [1, 2])
def test_a_checkpointed_block_gets_one_tensor_to_keep(every):
    model, ids = build("mamba mlp attention mlp").train(), tokens(2, 6)
    added = []
    for block in model.backbone.layers:
        block.register_forward_pre_hook(lambda _, args: added.append(args[0].add is not None))
    want = model(ids, labels=ids).loss
    want.backward()
    grads = [p.grad for p in model.parameters()]
    assert added == [False, True, True, True]
    model.zero_grad()
    added.clear()
    model.gradient_checkpointing_enable()
    model.backbone.checkpoint_every = every
    got = model(ids, labels=ids).loss
    assert added == ([False] * 4 if every == 1 else [False, True] * 2)
    got.backward()
    assert torch.equal(got, want) and all(
        torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True)
    )


def test_half_precision_keeps_what_must_be_float32():
    for model in (
        build("mamba mamba2 attention").float().to(torch.bfloat16),
        zoo.build("jamba-tiny", dtype=torch.bfloat16),
    ):
        pinned = {
            f"{m}.{n}" for m, mixer in model.named_modules() if isinstance(mixer, Mixer) for n in mixer.fp32_parameters
        }
        dtypes = {n: p.dtype for n, p in model.named_parameters()}
        assert {n for n, d in dtypes.items() if d == torch.float32} == pinned & set(dtypes)
        assert any(n.endswith("A_log") for n in pinned & set(dtypes))
        model(tokens(2, 6), labels=tokens(2, 6)).loss.backward()


def test_shared_blocks_are_one_module_and_their_states_are_not():
    model = build(PATTERNS["shared"])
    assert model.backbone.layers[1] is model.backbone.layers[3]
    state = model(tokens(1, 4)).state
    assert not torch.equal(state.layers[1].k, state.layers[3].k)
    assert model.num_params() == sum(p.numel() for p in set(model.parameters()))


def test_the_sliced_loss_equals_the_whole_one_and_holds_only_slices(monkeypatch):
    import hybridzoo.zoo.models.loss as loss_module

    head = torch.nn.Linear(16, 50, bias=False)
    hidden = torch.randn(3, 41, 16, requires_grad=True)
    targets = torch.randint(0, 50, (3, 41))
    targets[0, :7] = IGNORE
    whole = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    expected = torch.autograd.grad(whole, [hidden, head.weight])
    monkeypatch.setattr(loss_module, "_SLICE_BYTES", 50 * 10 * 4)
    sizes = []
    head.register_forward_hook(lambda m, args, out: sizes.append(out.shape[0]))
    sliced = next_token_loss(hidden, head, targets)
    got = torch.autograd.grad(sliced, [hidden, head.weight])
    torch.testing.assert_close(sliced, whole)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert max(sizes) <= 10


def test_a_batch_without_targets_has_loss_zero_and_no_nan():
    model = build("mamba")
    ids = tokens(2, 5)
    out = model(ids, labels=torch.full_like(ids, IGNORE))
    out.loss.backward()
    assert out.loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), 7])
def test_a_batch_without_targets_adds_nothing_to_any_gradient(num_items):
    """Not even the auxiliary loss of its experts, and whatever it is a part of."""
    model = build("mamba moe")
    ids = tokens(2, 5)
    out = model(ids, labels=torch.full_like(ids, IGNORE), num_items=num_items)
    out.loss.backward()
    assert out.loss.item() == 0 and out.aux_loss > 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with torch.no_grad():  # and what is not finite is not hidden
        model.backbone.norm_f.weight[3] = torch.nan
    assert model(ids, labels=ids).loss.isnan()


def test_documents_numbered_per_token_are_those_of_the_offsets(model):
    ids = tokens(1, 9)
    want = model(ids, labels=ids, cu_seqlens=torch.tensor([0, 4, 6, 9]))
    for numbers in ([0, 0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 2, 2, 5, 5, 5]):  # a number may come again
        got = model(ids, labels=ids, seq_idx=torch.tensor([numbers]))
        close(got.logits, want.logits)
        close(got.loss, want.loss)
        for form in ([numbers], np.array([numbers], dtype=np.int32)):
            assert torch.equal(model(ids, seq_idx=form).logits, got.logits)
    with pytest.raises(ValueError, match=r"seq_idx: str is not \(b, l\) integers"):
        model(ids, seq_idx="0 0 1")
    # several rows, each with padding of its own
    rows = torch.cat([ids, tokens(1, 9)])
    numbers = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, -1, -1, -1, -1]])
    got = model(rows, seq_idx=numbers).logits
    close(got[:1], want.logits)
    for at in (slice(0, 3), slice(3, 5)):
        close(got[1:, at], model(rows[1:, at]).logits)


def test_logits_are_formed_where_they_are_wanted(model):
    ids, mask = tokens(2, 7), torch.ones(2, 7)
    mask[0, :3] = 0
    want = model(ids, attention_mask=mask)
    for keep, at in ((2, slice(-2, None)), (torch.tensor([1, 5]), [1, 5])):
        for labels in (None, ids):
            got = model(ids, labels, mask, logits_to_keep=keep)
            assert got.logits.shape[1] == 2 and got.hidden.shape[1] == 7
            close(got.logits, want.logits[:, at])


def test_hidden_states_are_those_between_the_blocks(model):
    ids, mask, blocks = tokens(2, 7), torch.ones(2, 7), model.backbone.layers
    mask[0, :3] = 0
    assert model(ids).hidden_states is None
    seen = []
    for block in dict.fromkeys(blocks):
        block.register_forward_pre_hook(lambda m, args: seen.append(args[0].sum()))
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(out.hidden_states) == len(blocks) + 1
    assert torch.equal(out.hidden_states[-1], out.hidden)
    for state, stream in zip(out.hidden_states[:-1], seen, strict=True):
        assert torch.equal(state[1], stream[1])  # the row that is not padded, and so not turned


def test_outputs_and_states_are_trees_of_their_tensors(model):
    ids = tokens(2, 5)
    out = model(ids, labels=ids, return_state=True)
    parts, spec = tree_flatten(out)
    assert all(any(x is y for y in parts) for x in (out.loss, out.hidden, out.state.tokens))
    assert len([x for x in parts if isinstance(x, torch.Tensor)]) > 3
    again = tree_unflatten([x.detach().clone() if isinstance(x, torch.Tensor) else x for x in parts], spec)
    assert type(again) is type(out) and again.hidden is not out.hidden
    close(again.logits, out.logits)
    state = tree_map(lambda x: x.detach().clone(), out.state)
    assert not any(x.requires_grad for x in tree_flatten(state)[0])
    close(model.step(ids[:, 0], state), model.step(ids[:, 0], out.state.detach()))


def test_an_output_is_printed_in_short_and_forms_nothing(model):
    ids = tokens(2, 5)
    out = model(ids, labels=ids, return_state=True)
    text = repr(out)
    assert out._logits is None and len(text) < 600
    assert "loss=float64()" in text and "hidden=float64(2, 5, 32)" in text and "tokens=int64(2,)" in text
    assert all(len(repr(layer)) < 200 for layer in out.state.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_idx": torch.zeros(2, 5), "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens, seq_idx: say the same in two ways"),
        ({"seq_idx": torch.zeros(2, 5), "attention_mask": torch.ones(2, 5)}, "attention_mask, seq_idx: give one of them"),
        ({"seq_idx": torch.zeros(2, 4)}, r"seq_idx: shape \(2, 4\) differs from the tokens' \(2, 5\)"),
        ({"seq_idx": torch.tensor([[-1, 0, 0, 0, 0]] * 2)}, "seq_idx: has padding .* before a token"),
    ],
)  # fmt: skip
def test_descriptions_of_rows_that_disagree_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build("mamba")(tokens(2, 5), **options)


def test_an_empty_batch_is_answered_and_an_empty_row_refused(model):
    none = torch.zeros(0, 5, dtype=torch.long)
    out = model(none, labels=none, return_state=True)
    out.loss.backward()
    assert (
        out.loss == 0 and out.logits.shape == (0, 5, 67) and model.step(none[:, 0], out.state.detach()).shape == (0, 67)
    )
    assert model.generate(none, 3, eos_token_id=1).shape[0] == 0
    state, vectors = model.init_state(2), torch.zeros(2, 0, 32)
    for call, message in (
        (lambda: model(tokens(2, 0)), r"input_ids: expected shape \(b, l\) with l >= 1, got \(2, 0\)"),
        (
            lambda: model(inputs_embeds=vectors),
            r"inputs_embeds: expected shape \(b, l, 32\) with l >= 1, got \(2, 0, 32\)",
        ),
        (lambda: model(inputs_embeds=torch.zeros(2, 3, 8)), r"inputs_embeds: .* got \(2, 3, 8\)"),
        (lambda: model(torch.zeros(2, 3)), "input_ids: expected integers, got torch.float32"),
        (lambda: model.step(tokens(2, 1), state), r"input_ids: expected shape \(b,\), .* state's 2 rows, got \(2, 1\)"),
        (lambda: model.step(tokens(3), state), r"state's 2 rows, got \(3,\)"),
        (lambda: model.generate(tokens(2, 0), 3), "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_labels_shift_inside_documents_only():
    from hybridzoo.layers.base import Seq

    seq = Seq.from_documents(torch.tensor([[0, 0, 1, 1, -1]]))
    assert shift_labels(torch.tensor([[5, 6, 7, 8, 9]]), seq).tolist() == [[6, IGNORE, 8, IGNORE, IGNORE]]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"attention_mask": torch.ones(2, 4)}, ["attention_mask", "(2, 4)", "(2, 5)"]),
        ({"cu_seqlens": torch.tensor([0, 5])}, ["cu_seqlens", "batch of 2"]),
        ({"labels": torch.ones(2, 3, dtype=torch.long)}, ["labels", "(2, 3)", "(2, 5)"]),
        ({"cu_seqlens": torch.tensor([0, 5]), "attention_mask": torch.ones(2, 5)}, ["attention_mask, cu_seqlens"]),
        ({"inputs_embeds": torch.ones(2, 5, 32)}, ["exactly one"]),
    ],
)
def test_arguments_that_disagree_are_named_with_both_numbers(kwargs, words):
    model = build("mamba")
    with pytest.raises(ValueError) as error:
        model(tokens(2, 5), **kwargs)
    assert all(w in str(error.value) for w in words), error.value


def test_packed_offsets_that_do_not_cover_the_row_are_refused():
    model = build("mamba")
    for cu, what in (([0, 4], "0 to 4,"), ([1, 5], "1 to 5,"), ([0, 3, 2, 5], "0 to 5, falls from 3 to 2,")):
        with pytest.raises(ValueError, match=f"cu_seqlens: runs from {what} the row has 5 tokens"):
            model(tokens(1, 5), cu_seqlens=torch.tensor(cu))
    with pytest.raises(ValueError, match="state, cu_seqlens"):
        model(tokens(1, 5), cu_seqlens=torch.tensor([0, 5]), state=model.init_state(1))
    with pytest.raises(ValueError, match="holds 3 rows, the tokens have 1"):
        model(tokens(1, 5), state=model.init_state(3))


def test_weight_decay_spares_vectors_and_what_mixers_name():
    model = build("mamba mamba2 attention mlp")
    decayed, rest = zoo.param_groups(model, 0.3)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    assert not [
        n for n in (names[id(p)] for p in decayed["params"]) if n.endswith(("A_log", "D", "bias", "norm.weight"))
    ]
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["mamba mamba2", "mamba moe attention"])
def test_compiled_without_graph_breaks_equals_eager(pattern):
    model = build(pattern).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens(2, 9)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    a, b = compiled(ids, labels=ids), model(ids, labels=ids)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=1e-5)


def test_save_and_load_give_the_same_model(tmp_path, model):
    folder = zoo.save(model, tmp_path / "m")
    back = zoo.load(folder)
    ids = tokens(2, 8)
    assert torch.equal(back(ids).logits, model(ids).logits) and not back.training
    assert back.cfg == model.cfg
    assert zoo.load(folder, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    assert [p.name for p in folder.iterdir() if p.name.startswith(".saving")] == []


def test_saving_again_replaces_the_files_and_leaves_others_alone(tmp_path):
    folder = zoo.save(build("mamba"), tmp_path)
    (folder / "notes.txt").write_text("mine")
    second = build("mamba")
    second.lm_head.weight.data.add_(1)
    zoo.save(second, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert torch.equal(zoo.load(folder).lm_head.weight, second.lm_head.weight)


def test_broken_folders_are_refused_with_the_file_and_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder.*zoo.build"):
        zoo.load(tmp_path / "nothing")
    folder = zoo.save(build("mamba"), tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors: is damaged"):
        zoo.load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: no such file"):
        zoo.load(folder)
    weights.write_bytes(whole)
    config = folder / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("d_model: 32", "d_model: 48"))
    with pytest.raises(
        ValueError, match=r"config.yaml: says d_model: 48, and config.json 32. The latter \(zoo\) is what counts"
    ):
        zoo.load(folder)
    twin = folder / "config.json"
    twin.write_text(twin.read_text().replace('"d_model": 32', '"d_model": 48'))
    with pytest.raises(ValueError, match=r"\(67, 32\), the config makes it \(67, 48\)"):
        zoo.load(folder)
    config.write_text(text.replace("mamba", "mamba mamba", 1) if "layers: mamba\n" in text else text)
    (folder / "config.yaml").unlink()
    (folder / "config.json").write_text('{"model_type": "gpt5"}')
    with pytest.raises(ValueError, match=r"model_type is 'gpt5'"):
        zoo.load(folder)


def test_saved_files_are_readable_by_whom_the_umask_lets(tmp_path):
    zoo.save(zoo.build("mamba-tiny"), tmp_path / "m")
    mask = os.umask(0)
    os.umask(mask)
    modes = {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "m").iterdir()}
    assert len(modes) >= 3 and set(modes.values()) == {0o666 & ~mask}, modes


def test_a_step_is_captured_on_a_gpu_only():
    model = zoo.build("mamba-tiny")
    with pytest.raises(ValueError, match="CapturedStep: the model is on cpu, and only a GPU has CUDA graphs"):
        zoo.CapturedStep(model, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        zoo.CapturedStep(model.requires_grad_(False), torch.zeros(1, 4, dtype=torch.long))


def test_a_captured_step_of_packed_rows_wants_both_or_neither():
    model, ids = zoo.build("mamba-tiny"), torch.zeros(1, 4, dtype=torch.long)
    for half in ({"documents": ids}, {"most": 2}):
        with pytest.raises(ValueError, match="CapturedStep: documents, most: one says nothing without the other"):
            zoo.CapturedStep(model, ids, **half)
    with pytest.raises(ValueError, match="most: a row holds 2 documents"):
        zoo.CapturedStep(model, ids, documents=torch.tensor([[0, 0, 1, 1]]), most=1)


def test_why_a_step_is_not_captured():
    from hybridzoo.zoo.train.captured_step import why_not_captured

    model = zoo.build("mamba-tiny")
    assert why_not_captured(model) == "the model is on cpu, and only a GPU has CUDA graphs. Call the model itself."
    assert "no parameter that requires a gradient" in why_not_captured(model.requires_grad_(False))

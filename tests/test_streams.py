"""What blocks may do besides adding to the residual stream: read the embedded tokens again, write beside it, differ where they share."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import hybridzoo as zoo
from hybridzoo.zoo.checkpoint import CheckpointError, export
from hybridzoo.zoo.models.block import Stream
from hybridzoo.zoo.models.stats import stats
from hybridzoo.zoo.registry import ConfigError

CONFIG = {
    "vocab_size": 64,
    "d_model": 16,
    "layers": "mamba attention@a mlp@m joined mamba attention@a mlp@m joined",
    "mixers": {
        "mamba": {"d_state": 4},
        "joined": {"type": "mamba", "d_state": 4, "reads": "residual_plus_side"},
        "attention": {"nheads": 2, "headdim": 16, "adapter_rank": 2, "reads": "residual_and_embedding", "writes": "side"},
        "mlp": {"d_intermediate": 24, "adapter_rank": 3, "reads": "side", "writes": "side"},
    },
}  # fmt: skip
IDS = torch.arange(1, 41).view(2, 20)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = zoo.build(CONFIG).eval()
    with torch.no_grad():  # at first an adapter adds nothing, which would hide it
        for name, p in model.named_parameters():
            if "adapter.up" in name:
                p.normal_(std=0.3)
    return model


def with_mixer(name, **options):
    return CONFIG | {"mixers": CONFIG["mixers"] | {name: CONFIG["mixers"].get(name, {}) | options}}


def test_uses_of_a_shared_block_differ_in_their_adapters_only(model):
    names = {name for name, _ in model.named_parameters() if ".layers.5." in name or ".layers.6." in name}
    assert names == {
        "backbone.layers.5.mixer.adapter.down.weight",
        *(f"backbone.layers.5.mixer.adapter.up.{i}.weight" for i in range(3)),
        "backbone.layers.6.mixer.adapter.down.weight",
        "backbone.layers.6.mixer.adapter.up.0.weight",
    }
    first, second = model.backbone.layers[1], model.backbone.layers[5]
    assert first.mixer.in_proj.weight is second.mixer.in_proj.weight and first.norm.weight is second.norm.weight
    assert not torch.equal(first.mixer.adapter.down.weight, second.mixer.adapter.down.weight)
    assert first.norm.weight.shape == (32,) and first.mixer.in_proj.weight.shape[1] == 32


def test_the_side_stream_is_what_the_formula_says():
    # x1 = x0 + mamba(norm(x0)); t = mlp(norm(attention(norm([x1, x0])))); x2 = x1 + mamba(norm(x1 + W t)), and half of each addition
    model = zoo.build(CONFIG | {"residual_multiplier": 0.5})
    mamba, attention, mlp, joined = model.backbone.layers[:4]
    with torch.no_grad():
        x0 = model.backbone.embed(IDS)
        x1 = x0 + 0.5 * mamba.mixer(mamba.norm(x0))
        t = attention.mixer(attention.norm(torch.cat([x1, x0], -1)))
        t = mlp.mixer(mlp.norm(t))
        x2 = x1 + 0.5 * joined.mixer(joined.norm(x1 + t @ joined.side_proj.weight.T))
        model.backbone.layers = model.backbone.layers[:4]
        torch.testing.assert_close(model(IDS).hidden, model.backbone.norm_f(x2))


@torch.no_grad()
def test_decoding_chunks_padding_and_packing_are_one_full_pass(model):
    whole = model(IDS).logits
    out = model(IDS[:, :7])
    rest = model(IDS[:, 7:15], state=out.state)
    steps = [model.step(IDS[:, t], rest.state) for t in range(15, 20)]
    torch.testing.assert_close(torch.cat([out.logits, rest.logits, torch.stack(steps, 1)], 1), whole)
    packed = model(IDS.view(1, -1), cu_seqlens=torch.tensor([0, 20, 40])).logits
    torch.testing.assert_close(packed.view_as(whole), whole)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits[1, 4:], model(IDS[1:, 4:]).logits[0])


def test_training_copies_casts_and_files_keep_what_is_shared(model, tmp_path):
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.any() for grad in grads.values())
    model.zero_grad()
    model.train().gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])
    count = model.num_params()
    zoo.save(model, tmp_path)
    for other in (copy.deepcopy(model), zoo.load(tmp_path), copy.deepcopy(model).to(torch.bfloat16)):
        assert other.num_params() == count == stats(other, 8).params
    assert torch.equal(zoo.load(tmp_path)(IDS).logits, model.eval()(IDS).logits)
    assert stats(model, 8).flops == model.flops(8)


def test_transformers_saves_it_and_both_read_it(model, tmp_path):
    hf = pytest.importorskip("hybridzoo.zoo.hf")
    # Mamba-2's limits of step sizes end in infinity, which transformers writes in a way of its own
    model = zoo.build("zamba2-tiny").eval()
    hf.HybridZooForCausalLM.wrap(model).save_pretrained(tmp_path)
    again, info = hf.HybridZooForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.core.num_params() == model.num_params() == zoo.load(tmp_path).num_params()
    assert torch.equal(again(IDS).logits, model(IDS).logits) and torch.equal(
        zoo.load(tmp_path)(IDS).logits, model(IDS).logits
    )


def test_what_shares_weights_is_not_exported_to_a_format_that_cannot():
    shared = zoo.build("transformer-tiny", ["layers=(attention@a mlp) * 2"])
    with pytest.raises(CheckpointError, match="no family of"):
        export(shared, "nowhere")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_mixer("mlp", reads="sied"), r"mixers.mlp.reads: unknown value 'sied'. Did you mean 'side'"),
        (with_mixer("mlp", writes="embedding"), r"mixers.mlp.writes: unknown value 'embedding'"),
        (with_mixer("mlp", reads="residual_and_embedding"), r"mixers.mlp.reads \(mlp\): reads 32 channels, and mlp takes"),
        (CONFIG | {"layers": "mamba joined"}, r"mixers.joined.reads: block 1 \(joined\) reads the side stream"),
        (CONFIG | {"layers": "attention mamba + mlp"}, r"mamba\+mlp stand side by side, but mixers.mamba.reads = residual"),
        (with_mixer("mlp", adapter_rank=-1), r"mixers.mlp.adapter_rank \(mlp\): -1 is not a rank"),
        (CONFIG | {"override": [{"at": 3, "set": {"reads": "residual"}}]}, r"set.reads: is no option of block 3"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said(config, message):
    with pytest.raises(ConfigError, match=message):
        zoo.config(config)


class Valued(zoo.Mixer):
    """Adds a share of the values that the first of its kind has seen, as RWKV-7 does (arXiv:2503.14456, section 4)."""

    capabilities = frozenset({"state", "packing", "padding", "causal"})
    shares = ("v_first",)

    def __init__(self, d_model: int, share: float = 0.5, device=None, dtype=None):
        super().__init__()
        self.share, self.value = share, torch.nn.Linear(d_model, d_model, device=device, dtype=dtype)

    def forward(self, x, state=None, seq=None, aux=None, *, return_state=False, shared=None):
        y = self.step(x, (), shared)
        y = y if seq is None else seq.clear(y)
        return (y, ()) if return_state else y

    def step(self, x, state, shared=None):
        shared = {} if shared is None else shared
        v = self.value(x)
        first = shared.setdefault("v_first", v)
        return torch.tanh(v + self.share * (first - v))


@pytest.fixture
def valued():
    zoo.register_mixer("test_valued")(Valued)
    mixers = {"v": {"type": "test_valued"}, "mamba": {"d_state": 4}, "mlp": {"d_intermediate": 24}}
    return zoo.build({"vocab_size": 64, "d_model": 16, "layers": "mamba v mamba v + mlp v", "mixers": mixers}).eval()


def first_values(model):
    """What later blocks get: noted by hooks on the mixers, which are given it by keyword."""
    seen = []
    hook = lambda m, args, kwargs, out: seen.append(kwargs["shared"]["v_first"])  # noqa: E731
    for i in (1, 3, 4):
        model.backbone.layers[i].mixer.register_forward_hook(hook, with_kwargs=True)
    return seen


@torch.no_grad()
def test_what_a_block_shares_reaches_all_later_ones_in_every_way_of_reading(valued):
    test_decoding_chunks_padding_and_packing_are_one_full_pass(valued)
    seen = first_values(valued)
    valued(IDS)
    assert seen[0] is seen[1] is seen[2] and seen[0].shape == (2, 20, 16)
    seen.clear()
    valued(IDS)
    assert len(seen) == 3  # nothing is left over from the call before
    assert Valued(16)(torch.randn(1, 3, 16)).shape == (1, 3, 16)  # and outside a model


def test_what_blocks_share_is_recomputed_differentiated_and_compiled(valued):
    valued(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad.clone() for name, p in valued.named_parameters()}
    assert grads["backbone.layers.1.mixer.value.weight"].any()
    seen: list = []
    valued.train().gradient_checkpointing_enable()
    for hooked in (False, True):
        valued.zero_grad()
        if hooked:
            valued.backbone.layers[3].register_full_backward_hook(lambda m, given, got: seen.append(got[0].shape))
        valued(IDS, labels=IDS).loss.backward()
        for name, p in valued.named_parameters():
            torch.testing.assert_close(p.grad, grads[name])
    assert seen == [(2, 20, 16)]


@pytest.mark.slow
def test_what_blocks_share_is_compiled(valued):
    compiled = torch.compile(valued, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, valued(IDS).logits)


def test_a_stream_is_a_tree_and_goes_on_where_a_hook_gives_its_value_alone(model, valued):
    x, e, v = torch.zeros(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 3)
    stream = Stream(x, x, e, None, {"v": v})
    leaves, spec = tree_flatten(stream)
    assert [t for t in leaves if t is not None][-1] is v and type(tree_unflatten(leaves, spec)) is Stream
    for after in (Stream(e), e):
        assert stream.replaced_by(after)[2:] == stream[2:] and stream.replaced_by(after).sum() is e
    for m in (model, valued):
        want = m(IDS).logits
        for block in m.backbone.layers:
            block.register_forward_hook(lambda b, args, out: (Stream(out[0].sum()), *out[1:]))
        torch.testing.assert_close(m(IDS).logits, want)

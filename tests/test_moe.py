"""The mixture of experts against transformers' blocks and losses, and what it promises beyond the mixer contract."""

import sys
import types

import pytest
import torch
from torch.library import opcheck

import hybridzoo as zoo
from hybridzoo.kernels import BackendError, Seq
from hybridzoo.layers import MLP, MoE
from hybridzoo.layers.experts import grouped_linear

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 8}


def worst(a, b):
    return (a - b).abs().max().item() / b.abs().max().item()


def copy_into(theirs, router, ours):
    value, gate = ours.experts.w1.detach().chunk(2, 1)
    router.weight.data = ours.router.weight.detach() * 4
    ours.router.weight.data = router.weight.data.clone()
    theirs.experts.gate_up_proj.data = torch.cat([gate, value], 1)
    theirs.experts.down_proj.data = ours.experts.w2.detach()


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_softmax_topk_equals_transformers_jamba(top_k, backend):
    from transformers.models.jamba.modeling_jamba import JambaConfig, JambaSparseMoeBlock

    theirs = JambaSparseMoeBlock(JambaConfig(**SIZES, num_experts=4, num_experts_per_tok=top_k))
    ours = MoE(32, 48, num_experts=4, top_k=top_k, backend=backend)
    copy_into(theirs, theirs.router, ours)
    x = torch.randn(3, 7, 32)
    assert worst(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("options", [{"router": "topk_softmax"}, {"renormalize": True}], ids=["topk", "renormalized"])
def test_topk_softmax_and_renormalized_equal_transformers_mixtral(options):
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    theirs = MixtralSparseMoeBlock(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    ours = MoE(32, 48, num_experts=4, top_k=2, **options)
    copy_into(theirs, theirs.gate, ours)
    x = torch.randn(3, 7, 32)
    assert worst(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("padded", [False, True])
def test_balancing_loss_equals_transformers(padded):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    moe, x, aux = MoE(32, 48, num_experts=4, top_k=2, aux_loss_coef=0.5), torch.randn(3, 7, 32), {}
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [1, 0, 1, 0, 1, 0, 1]]) if padded else torch.ones(3, 7)
    seq = Seq.from_mask(mask)
    moe(x if seq is None else seq.align(x), seq=seq, aux=aux)
    want = load_balancing_loss_func((moe.router(x.flatten(0, 1)),), 4, 2, mask)
    assert aux["loss"][0].item() == pytest.approx(0.5 * want.item(), rel=1e-5)


def test_z_loss_is_the_mean_squared_logsumexp_of_real_tokens():
    moe, x, aux = MoE(32, 48, aux_loss_coef=0.0, z_loss_coef=0.1), torch.randn(2, 5, 32), {}
    seq = Seq.from_mask(torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    moe(x, seq=seq, aux=aux)
    real = torch.cat([x[0, :3], x[1]])
    want = 0.1 * (real @ moe.router.weight.t()).exp().sum(-1).log().square().mean()
    assert aux["loss"][0].item() == pytest.approx(want.item(), rel=1e-5)


def test_statistics_describe_the_routing():
    moe, x, aux = MoE(32, 48, num_experts=4, top_k=2, layer_idx=5), torch.randn(3, 7, 32), {}
    moe(x, aux=aux)
    (stats,) = aux["router"]
    prob = (x.flatten(0, 1) @ moe.router.weight.t()).softmax(-1)
    chosen = torch.bincount(prob.topk(2).indices.flatten(), minlength=4) / 42
    assert stats["layer_idx"] == 5
    torch.testing.assert_close(stats["load"], chosen)
    torch.testing.assert_close(stats["prob"], prob.mean(0).detach())
    torch.testing.assert_close(stats["entropy"], torch.distributions.Categorical(probs=prob).entropy().mean().detach())
    assert not any(t.requires_grad for t in (stats["load"], stats["prob"], stats["entropy"]))


def test_two_layers_add_to_one_aux_and_no_coefficient_means_no_loss():
    x, aux = torch.randn(2, 3, 32), {}
    MoE(32, 48)(x, aux=aux)
    MoE(32, 48, aux_loss_coef=0.0)(x, aux=aux)
    assert len(aux["loss"]) == 1 and len(aux["router"]) == 2


def test_the_loss_pushes_towards_balance():
    moe, x = MoE(32, 48, num_experts=4, top_k=1, aux_loss_coef=1.0), torch.randn(1, 256, 32) + 1
    moe.router.weight.data[0] += 0.05  # everybody's favourite
    optimizer = torch.optim.SGD([moe.router.weight], lr=0.1)
    loads = []
    for _ in range(20):
        aux = {}
        moe(x, aux=aux)
        optimizer.zero_grad()
        aux["loss"][0].backward()
        optimizer.step()
        loads.append(aux["router"][0]["load"].max().item())
    assert loads[0] > 0.7 and loads[-1] < 0.4


def test_all_experts_with_weight_one_are_one_mlp():
    shared = MoE(32, 24, num_experts=1, top_k=1, num_shared_experts=2)
    mlp, one = MLP(32, 48), MLP(32, 24)
    mlp.load_state_dict(shared.shared.state_dict())
    one.load_state_dict({"fc1.weight": shared.experts.w1[0], "fc2.weight": shared.experts.w2[0]})
    x = torch.randn(2, 5, 32)
    assert worst(shared(x), mlp(x) + one(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [[2, 0, 5, 1], [0, 0, 8, 0], [1, 1, 1, 1]], ids=str)
def test_grouped_mm_equals_the_loop(counts, dtype):
    x = torch.randn(sum(counts), 16).to(dtype)
    weight, offsets = torch.randn(4, 24, 16).to(dtype), torch.tensor(counts).cumsum(0).int()
    results = []
    for backend in ("grouped_mm", "loop"):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = grouped_linear(leaves[0], leaves[1], offsets, backend)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])  # a gradient of stride 0
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for got, want in zip(*results, strict=True):
        assert worst(got, want) <= tolerance
    exact = torch.cat([rows.double() @ w.double().t() for rows, w in zip(x.split(counts), weight, strict=True)])
    assert worst(results[0][0].double(), exact) <= tolerance


def test_gathering_matrices_equals_the_loop():
    x, weight, offsets = torch.randn(6, 16), torch.randn(4, 8, 16), torch.tensor([2, 2, 5, 6]).int()
    assert worst(grouped_linear(x, weight, offsets, "gather"), grouped_linear(x, weight, offsets, "loop")) < 1e-6


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_grouped_linear_is_a_proper_operator(backend):
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True)
    opcheck(torch.ops.hybridzoo.grouped_linear.default, (x, weight, torch.tensor([2, 2, 6]).int(), backend))


def test_an_expert_without_tokens_gets_a_zero_gradient():
    moe = MoE(32, 48, num_experts=4, top_k=1)
    moe.router.weight.data.zero_()
    moe.router.weight.data[2] = 1.0
    moe(torch.rand(2, 5, 32)).sum().backward()
    for grad in (moe.experts.w1.grad, moe.experts.w2.grad):
        assert grad[2].any() and not grad[[0, 1, 3]].any()


def test_explain_gives_the_reasons():
    moe = MoE(32, 48)
    assert [(name, chosen) for name, chosen, _ in moe.explain()] == [
        ("grouped_mm", True), ("megablocks", False), ("loop", False),
    ]  # fmt: skip
    grouped, megablocks, loop = moe.explain(dtype=torch.float64)
    assert "got float64" in grouped[2] and "megablocks" in megablocks[2] and loop[1]
    assert "36 x 2 = 72" in MoE(32, 36, dtype=torch.bfloat16).explain()[0][2]
    assert [chosen for _, chosen, _ in MoE(32, 48, backend="loop").explain()] == [False, False, True]


def test_a_backend_that_cannot_is_an_error_with_the_reason():
    moe = MoE(30, 48, backend="grouped_mm")
    with pytest.raises(BackendError, match=r"30 x 4 = 120"):
        moe(torch.randn(1, 2, 30))
    with pytest.raises(BackendError, match=r"megablocks is not installed"):
        MoE(32, 48, backend="megablocks")(torch.randn(1, 2, 32))
    MoE(30, 48)(torch.randn(1, 2, 30)).sum().backward()


def test_megablocks_is_called_by_its_conventions(monkeypatch):
    """As grouped_gemm 0.3.0's ``backend.gmm`` checks them; its ``ops.gmm``, with autograd, has no ``trans_a``."""

    def gmm(a, b, sizes, trans_a=False, trans_b=False, c=None):
        assert sizes.device.type == "cpu" and sizes.dtype == torch.int64 and not (trans_a and trans_b)
        assert a.is_contiguous() and b.is_contiguous() and c is None
        if trans_a:
            return torch.stack(
                [m.t() @ n for m, n in zip(a.split(sizes.tolist()), b.split(sizes.tolist()), strict=True)]
            )
        runs = zip(a.split(sizes.tolist()), b, strict=True)
        return torch.cat([m @ (n.t() if trans_b else n) for m, n in runs])

    library = types.ModuleType("megablocks")
    library.grouped_gemm_util = types.SimpleNamespace(backend=types.SimpleNamespace(gmm=gmm))
    monkeypatch.setitem(sys.modules, "megablocks", library)
    offsets, results = torch.tensor([2, 2, 6]).int(), []
    x, weight = torch.randn(6, 16), torch.randn(3, 8, 16)
    for backend in ("megablocks", "loop"):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = grouped_linear(*leaves, offsets, backend)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert worst(got, want) < 1e-6


def test_active_parameters_are_those_of_the_chosen_experts():
    moe = MoE(32, 48, num_experts=8, top_k=2, num_shared_experts=1)
    assert moe.active_parameters == 8 * 32 + 2 * 3 * 32 * 48 + 3 * 32 * 48


@pytest.mark.parametrize(
    ("family", "checkpointed"),
    [
        ("Mixtral", True),
        *((family, False) for family in ("Mixtral", "Jamba", "GraniteMoe", "GraniteMoeHybrid", "Qwen3Moe")),
    ],
)
def test_a_model_has_one_balancing_loss_over_all_layers_as_transformers(tmp_path, judged, family, checkpointed):
    import transformers

    from hybridzoo.eval.parity.configs import SHARED
    from hybridzoo.eval.parity.run import redraw

    judged(family)
    options = {
        "Mixtral": SHARED["heads"] | {"num_local_experts": 5, "num_experts_per_tok": 3},
        "Jamba": SHARED["jamba"] | {"expert_layer_period": 1, "expert_layer_offset": 0},
        "GraniteMoe": SHARED["heads"] | {"num_local_experts": 5},
        "GraniteMoeHybrid": SHARED["granite"],
        "Qwen3Moe": SHARED["heads"] | SHARED["qwen3_moe"] | {"mlp_only_layers": [1]},
    }[family]
    config = getattr(transformers, f"{family}Config")(
        **options, vocab_size=61, pad_token_id=0, router_aux_loss_coef=0.3, output_router_logits=True
    )
    theirs = redraw(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path)
    ours = zoo.load(tmp_path)
    if checkpointed:
        ours.gradient_checkpointing_enable()
        ours.train()
    ids, mask = torch.randint(1, 61, (3, 14)), torch.ones(3, 14, dtype=torch.long)
    mask[1, 9:] = 0
    expected = theirs(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    got = ours(ids, attention_mask=mask, labels=ids)
    assert got.aux_loss.item() == pytest.approx(0.3 * expected.aux_loss.item(), rel=1e-5)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    got.loss.backward(), expected.loss.backward()
    torch.testing.assert_close(
        ours.backbone.embedding.weight.grad, theirs.get_input_embeddings().weight.grad, atol=1e-4, rtol=1e-3
    )
    assert len(got.router) == sum(isinstance(module, MoE) for module in ours.modules())

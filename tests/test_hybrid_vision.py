"""Image hybrids of convolutions, scans and attention: compiled, checkpointed, adapted, saved, at odd sizes; and a text without causality."""

import copy
import itertools

import pytest
import torch

import hybridzoo as zoo

MICRO = ["hybrid-vision-micro", "vmamba-micro"]
ODD = [(1, 1), (1, 9), (13, 2), (27, 31)]


def made(name, *overrides):
    torch.manual_seed(0)
    model = zoo.build(name, [*overrides, "n_classes=4"])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def images(*size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, *size, generator=generator), torch.tensor([3, 0, 2])


def trained(model, x, labels, seed=0):
    """Loss, logits and the gradients of all parameters, which are there."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(x, labels)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    return {"loss": out.loss.detach(), "logits": out.logits.detach()} | grads


def close(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_the_hybrid_is_of_vmambas_size():
    hybrid, vmamba = (zoo.build(name, device="meta") for name in ("hybrid-vision-tiny", "vmamba-tiny-s1l8"))
    d, n = (96, 192, 384, 576), (3, 3, 8, 3)
    gated = [c * (2 * (8 * c // 3) + 2 * (8 * c // 3) // 2) + 3 * (8 * c // 3) - (8 * c // 3) + 51 * c for c in d[:2]]
    scan = 2 * 384 * 384 + 9 * 384 + 4 * (24 + 2) * 384 + 4 * 384 * 24 + 3 * 4 * 384 + 2 * 384
    seen, mlp = 4 * 576 * 576 + 4 * 576, [8 * c * c + 5 * c + 2 * c for c in d[2:]]
    blocks = [gated[0] + 192, gated[1] + 384, scan + 768 + mlp[0], seen + 1152 + mlp[1]]
    stem = 27 * 48 + 48 + 96 + 9 * 48 * 96 + 96 + 192
    down = sum(9 * a * b + b + 2 * b for a, b in itertools.pairwise(d))
    head = 2 * 576 + 576 * 1000 + 1000
    assert hybrid.num_params() == sum(a * b for a, b in zip(n, blocks, strict=True)) + stem + down + head == 29_076_808
    assert 0.9 < hybrid.num_params() / vmamba.num_params() < 1
    assert hybrid.feature_info.channels() == list(d) and hybrid.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize("name", MICRO)
def test_compiled_whole(name):
    model = made(name)
    x, labels = images(28, 28)
    want = trained(model, x, labels)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    out = compiled(x, labels)
    out.loss.backward()
    got = {"loss": out.loss.detach(), "logits": out.logits.detach()} | {n: p.grad for n, p in twin.named_parameters()}
    close(got, want, rtol=1e-4, atol=1e-5)
    other, _ = images(27, 31)
    torch.testing.assert_close(compiled(other).logits, model(other).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MICRO)
def test_recomputing_blocks_changes_no_gradient(name):
    model = made(name, "drop_path=0.4").train()
    x, labels = images(15, 28)
    want = trained(model, x, labels)
    model.gradient_checkpointing_enable()
    close(trained(model, x, labels), want, rtol=1e-6, atol=1e-7)
    # stochastic depth is on, and drawn again as it was
    assert not torch.equal(trained(model, x, labels, seed=5)["logits"], want["logits"])


@pytest.mark.parametrize("name", MICRO)
def test_lora_on_every_linear_layer(name):
    peft = pytest.importorskip("peft")
    model, (x, labels) = made(name).double().eval(), images(28, 28)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    x, plain = x.double(), copy.deepcopy(model)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=linears, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    out = adapted(x, labels=labels)
    out.loss.backward()
    # by the definition (arXiv:2106.09685): W + alpha / r B A
    weights = dict(plain.named_parameters())
    lora = {n: m for n, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert len(lora) == len(linears) >= 5
    with torch.no_grad():
        for path, layer in lora.items():
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            weights[path.removeprefix("base_model.model.") + ".weight"] += 1.5 * delta
    want = plain(x, labels)
    torch.testing.assert_close(out.logits, want.logits)
    want.loss.backward()
    for path, layer in lora.items():
        g = weights[path.removeprefix("base_model.model.") + ".weight"].grad
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(A.grad, 1.5 * B.t() @ g)
        torch.testing.assert_close(B.grad, 1.5 * g @ A.t())
    torch.testing.assert_close(adapted.merge_and_unload()(x).logits, want.logits)


@pytest.mark.parametrize("name", MICRO)
def test_saved_and_loaded(name, tmp_path):
    model, (x, _) = made(name).eval(), images(28, 28)
    zoo.save(model, tmp_path / "it")
    again = zoo.load(tmp_path / "it").eval()
    assert again.cfg == model.cfg
    close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("size", ODD, ids=str)
def test_odd_sizes(name, size):
    model, x = made(name).double().eval(), images(*size)[0].double()
    out = model(x)
    assert out.logits.shape == (3, 4) and out.logits.isfinite().all()
    for i in range(3):  # images are alone
        torch.testing.assert_close(model(x[i : i + 1]).logits[0], out.logits[i])
    maps = model.forward_features(x, return_stages=True)
    info, (h, w) = model.feature_info, size
    for i, (m, stride) in enumerate(zip(maps, info.reduction(), strict=True)):
        assert m.shape == (3, info.channels()[i], -(-h // stride), -(-w // stride))
    trained(model.train(), x, images(*size)[1])


def test_the_last_stage_sees_all_of_a_map():
    model, (x, _) = made("hybrid-vision-micro").double().eval(), images(28, 28)
    x = x.double().requires_grad_()
    *_, last = model.forward_features(x, return_stages=True)
    assert last.shape[2:] == (4, 4)
    for row, column in ((0, 0), (3, 1)):
        (g,) = torch.autograd.grad(last[0, :, row, column].sin().sum(), x, retain_graph=True)
        assert (g[0, 0] != 0).all() and not g[1:].any()

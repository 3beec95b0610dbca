"""Image models on a GPU: the CPU's numbers, also of odd and large maps, under autocast, and recorded as a graph; and the published structure."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
from hybridzoo.eval.bench import vision, vision_peers

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
# every kind of stem and downsampling, gates, one state and sixteen; odd sizes
MODELS = {
    "vmamba-micro": ([], (9, 13)),
    "vmamba-tiny-s1l8": (["n_classes=10"], (61, 95)),
    "vmamba-tiny-s2l5": (["n_classes=10", "drop_path=0"], (64, 64)),
    "vanilla-vmamba-tiny": (["n_classes=10"], (67, 36)),
}


@contextlib.contextmanager
def exact_convolutions():
    """cuDNN takes TF32 for convolutions in float32 where it may."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def made(name, batch=2, size=None, **changes):
    torch.manual_seed(0)
    overrides, odd = MODELS[name]
    model = zoo.build(name, overrides, **changes)
    images = torch.randn(batch, model.cfg.in_channels, *(size or odd))
    return model, images, torch.randint(model.cfg.n_classes, (batch,))


def off(a, b):
    return ((a.cpu().double() - b.cpu().double()).norm() / b.cpu().double().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_maps_are_the_cpus(name):
    model, images, _ = made(name)
    model.eval()
    with torch.no_grad(), exact_convolutions():
        want, maps = model(images).logits, model.forward_features(images, return_stages=True)
        model.cuda()
        assert off(model(images.cuda()).logits, want) < 1e-4
        for got, there in zip(model.forward_features(images.cuda(), return_stages=True), maps, strict=True):
            assert got.shape == there.shape and off(got, there) < 1e-4


@pytest.mark.parametrize(("name", "limit"), [("vmamba-micro", 1e-4), ("vanilla-vmamba-tiny", 1e-3)])
def test_gradients_are_the_cpus(name, limit):
    model, images, labels = made(name, drop_path=0.0)
    twin = copy.deepcopy(model).cuda()
    model(images, labels=labels).loss.backward()
    with exact_convolutions():
        twin(images.cuda(), labels=labels.cuda()).loss.backward()
    grads = {key: off(p.grad, q.grad) for (key, q), p in zip(model.named_parameters(), twin.parameters(), strict=True)}
    assert max(grads.values()) < limit, grads


@pytest.mark.parametrize("name", MODELS)
def test_under_autocast(name):
    model, images, labels = made(name, batch=4, drop_path=0.0)
    want = model(images, labels=labels)
    model, images = model.cuda(), images.cuda()
    with torch.autocast("cuda", BF16):
        out = model(images, labels=labels.cuda())
    out.loss.backward()
    assert abs(out.loss.item() - want.loss.item()) < 0.02 * want.loss.item()
    assert off(out.logits, want.logits) < 0.06
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_recorded_as_a_graph(name):
    model, images, labels = made(name, batch=4, drop_path=0.0)
    model = model.cuda().train()
    twin = copy.deepcopy(model)
    step = zoo.CapturedStep(model, torch.zeros_like(images), torch.zeros_like(labels), autocast=BF16)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        images, labels = torch.randn_like(images), torch.randint_like(labels, model.cfg.n_classes)
        loss = step(images.cuda(), labels.cuda())
        with torch.autocast("cuda", BF16):
            want = twin(images.cuda(), labels=labels.cuda()).loss
        want.backward()
        losses.append(loss.item())
        assert off(loss, want.detach()) < 1e-3
        # cuDNN's backward of a convolution may add up in another order
        assert max(off(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)) < 2e-2
        model.zero_grad()
        twin.zero_grad()
    assert len(set(losses)) == 3


def test_stochastic_depth_draws_anew_in_every_replay():
    model, images, labels = made("vmamba-tiny-s1l8", batch=4, size=(32, 32), drop_path=0.9)
    step = zoo.CapturedStep(model.cuda().train(), images, labels, autocast=BF16)
    losses = {step(images.cuda(), labels.cuda()).item() for _ in range(4)}
    assert len(losses) > 1


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["vmamba-tiny-s1l8", "vanilla-vmamba-tiny"])
def test_images_of_800_by_1333_run(name, batch):
    model, images, labels = made(name, batch=batch, size=(800, 1333))
    model, images = model.cuda().eval(), images.cuda()
    with torch.no_grad(), torch.autocast("cuda", BF16):
        maps = model.forward_features(images, return_stages=True)
        logits = model(images).logits
    assert maps[0].shape[2] == 200 and torch.isfinite(logits).all()
    # a row alone gives what it gives in the batch
    with torch.no_grad(), torch.autocast("cuda", BF16):
        assert off(model(images[:1]).logits, logits[:1]) < 0.02
    with torch.autocast("cuda", BF16):
        model(images, labels=labels.cuda()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_published_structure_has_the_same_logits_and_gradients(name):
    pytest.importorskip("mamba_ssm", reason="mamba_ssm is not installed")
    model, images, labels = made(name, drop_path=0.0)
    model, images, labels = model.cuda(), images.cuda(), labels.cuda()
    net = vision_peers.published(model, vision_peers.library_parts())
    assert vision.difference(model, net, images) < 1e-3
    with exact_convolutions():
        model.train()(images, labels=labels).loss.backward()
        F.cross_entropy(net.train()(images), labels).backward()
    theirs = dict(net.named_parameters())
    assert max(off(p.grad, theirs[key].grad) for key, p in model.named_parameters()) < 1e-2
    with torch.autocast("cuda", BF16):
        assert off(model(images).logits, net(images)) < 0.06


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 2, 40, 33), (2, 5, 1, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_copies_by_triton_are_those_by_torch(shape, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    from hybridzoo.eval.bench.vision_copies import Merge, Spread

    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda", dtype=dtype)
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = Spread.apply(x), vision_peers.spread(y)
    assert torch.equal(got, want)
    gradient = torch.randn_like(got)
    got.backward(gradient)
    want.backward(gradient)
    assert off(x.grad, y.grad) < (1e-6 if dtype is torch.float32 else 1e-2)
    rows = torch.randn(*want.shape, device="cuda", dtype=dtype)
    rows, twin = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    got, want = Merge.apply(rows, *shape[2:]), vision_peers.merge(twin, *shape[2:])
    torch.testing.assert_close(got, want)
    gradient = torch.randn_like(got)
    got.backward(gradient)
    want.backward(gradient)
    torch.testing.assert_close(rows.grad, twin.grad)

"""The next-token loss: values and gradients of plain cross-entropy, from logits that are formed once, a slice at a time."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import hybridzoo as zoo
import hybridzoo.zoo.models.loss as loss_module
from hybridzoo.zoo.models.loss import IGNORE, next_token_loss

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
V, D = 50, 16
# tokens in a slice of 123: all of them, several slices, one
SLICES = [200, 40, 1]


@pytest.fixture
def slices(monkeypatch):
    """Set the number of tokens whose float64 logits fit a slice."""
    return lambda tokens, itemsize=8: monkeypatch.setattr(loss_module, "_SLICE_BYTES", tokens * V * itemsize)


def problem(dtype=F64, bias=True):
    head = nn.Linear(D, V, bias=bias).to(dtype)
    hidden = torch.randn(3, 41, D).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (3, 41))
    targets[0, :7] = IGNORE
    return hidden, head, targets


def plain(hidden, head, targets, num_items=None):
    logits = head(hidden).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss / ((targets != IGNORE).sum() if num_items is None else num_items)


def close(got, want, rtol=1e-9):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


def gradients(loss, inputs):
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("called", [False, True], ids=["products", "called"])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(300)])
@pytest.mark.parametrize("tokens", SLICES)
def test_the_loss_and_all_gradients(slices, tokens, num_items, called):
    slices(tokens)
    hidden, head, targets = problem()
    if called:
        head.register_forward_hook(lambda *_: None)
    assert loss_module._is_linear(hidden, head, head) != called
    inputs = [hidden, *head.parameters()]
    close(*(gradients(f(hidden, head, targets, num_items), inputs) for f in (next_token_loss, plain)))


@pytest.mark.parametrize("tokens", SLICES)
def test_logits_are_formed_once_and_in_slices(slices, tokens):
    slices(tokens)
    hidden, head, targets = problem()
    sizes = []
    head.register_forward_hook(lambda m, args, out: sizes.append(out.shape[0]))
    next_token_loss(hidden, head, targets).backward()
    assert sum(sizes) == 123 and max(sizes) <= tokens and max(sizes) - min(sizes) <= len(sizes)


def test_slices_are_whole_tiles_and_keep_to_the_budget(slices):
    slices(2670, 2)
    assert loss_module._slice_tokens(torch.empty(16384, D, dtype=BF16), V) == 2432
    slices(1 << 20, 2)
    assert loss_module._slice_tokens(torch.empty(1000, D, dtype=BF16), V) == 1024
    slices(100, 2)
    assert loss_module._slice_tokens(torch.empty(350, D, dtype=BF16), V) == 88


def errors(got, exact):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("tokens", [200, 40])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_errs_no_more_than_twice_as_much(slices, autocast, dtype, tokens):
    slices(tokens, 2)
    hidden, head, targets = problem(F32 if autocast else dtype)
    exact = copy.deepcopy(head).double()
    wide = hidden.detach().double().requires_grad_()
    want = gradients(plain(wide, exact, targets), [wide, *exact.parameters()])
    seen = []
    head.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    inputs = [hidden, *head.parameters()]
    with torch.autocast("cpu", dtype, enabled=autocast):
        ours = next_token_loss(hidden, head, targets)
        theirs = F.cross_entropy(head(hidden).flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)
    assert ours.dtype == F32 and set(seen) == {dtype}
    got, same = (gradients(loss, inputs) for loss in (ours, theirs))
    assert [g.dtype for g in got[1:]] == [x.dtype for x in inputs]
    for mine, usual in zip(errors(got, want), errors(same, want), strict=True):
        assert mine <= 2 * usual + 1e-7


def test_bfloat16_slices_are_added_in_float32(slices):
    hidden, head, targets = problem(BF16)
    slices(1, 2)
    one_by_one = gradients(next_token_loss(hidden, head, targets), list(head.parameters()))
    wide = copy.deepcopy(head).double()
    exact = gradients(plain(hidden.double(), wide, targets), list(wide.parameters()))
    assert max(errors(one_by_one, exact)) < 6e-3


def test_float16_gradients_do_not_overflow():
    # a byte-level vocabulary, and one byte everywhere: every token adds 20 to the gradient of the same weights
    head = nn.Linear(4, 8, bias=False).half()
    hidden, targets = torch.full((1, 9000, 4), 20.0, dtype=F16), torch.zeros(1, 9000, dtype=torch.int64)
    wide = copy.deepcopy(head).double()
    (got,) = torch.autograd.grad(next_token_loss(hidden, head, targets), [head.weight])
    (want,) = torch.autograd.grad(plain(hidden.double(), wide, targets), [wide.weight])
    assert want.abs().max() > 10
    torch.testing.assert_close(got.double(), want, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("tokens", [200, 40])
def test_only_what_needs_a_gradient_has_one(slices, tokens):
    slices(tokens)
    hidden, head, targets = problem()
    want = gradients(plain(hidden, head, targets), [hidden, head.weight, head.bias])
    head.bias.requires_grad_(False)
    close(gradients(next_token_loss(hidden, head, targets), [hidden, head.weight]), want[:3])
    close(gradients(next_token_loss(hidden.detach(), head, targets), [head.weight]), [want[0], want[2]])
    head.weight.requires_grad_(False)
    close(gradients(next_token_loss(hidden, head, targets), [hidden]), want[:2])
    assert not next_token_loss(hidden.detach(), head, targets).requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = next_token_loss(hidden, head, targets)
        assert not loss.requires_grad
        close([loss], want[:1])


def test_on_a_device_without_numbers():
    model = zoo.build("mamba-tiny", device="meta")
    ids = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.shape == () and model.lm_head.weight.grad.is_meta


def test_rows_that_are_not_in_one_piece():
    hidden, head, targets = problem()
    turned = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    close(
        gradients(next_token_loss(turned, head, targets), [turned]), gradients(plain(hidden, head, targets), [hidden])
    )


def test_tied_embeddings_get_both_gradients(slices):
    cfg = ["d_model=32", "vocab_size=50"]
    model = zoo.build("mamba-tiny", cfg).double()
    assert model.lm_head.weight is model.backbone.embedding.weight
    slices(3)
    ids = torch.randint(0, V, (2, 9))
    parameters = list(model.parameters())
    logits = model(ids).logits[:, :-1]
    want = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    close(gradients(model(ids, labels=ids).loss, parameters), gradients(want, parameters))


@pytest.mark.parametrize("tokens", [200, 40])
def test_hooks_bring_in_weights_of_their_own(slices, tokens):
    slices(tokens)
    hidden, head, targets = problem()
    factor, shift = (torch.randn(shape, dtype=F64, requires_grad=True) for shape in ((), (V,)))
    head.register_forward_hook(lambda m, args, out: torch.tanh(out * factor) * 3 + shift)
    inputs = [hidden, factor, shift, *head.parameters()]
    close(*(gradients(f(hidden, head, targets), inputs) for f in (next_token_loss, plain)))


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.more = nn.Parameter(torch.randn(V, D, dtype=F64))

    def forward(self, weight):
        return weight + self.more


@pytest.mark.parametrize("tokens", [200, 40])
def test_weights_that_share_a_gradient(slices, tokens):
    slices(tokens)
    hidden, head, targets = problem()
    nn.utils.parametrize.register_parametrization(head, "weight", Sum())
    inputs = [hidden, *head.parameters()]
    assert len(inputs) == 4
    close(*(gradients(f(hidden, head, targets), inputs) for f in (next_token_loss, plain)))


@pytest.mark.parametrize("tokens", [200, 40])
def test_a_hook_of_a_weight_sees_its_gradient_once(slices, tokens):
    slices(tokens)
    hidden, head, targets = problem()
    want = torch.autograd.grad(plain(hidden, head, targets), [hidden, head.weight])
    calls = []
    head.weight.register_hook(lambda g: calls.append(g) or 2 * g)
    after = []
    head.weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    next_token_loss(hidden, head, targets).backward()
    # the checkpointed slices of a plain graph are summed by autograd before the hook
    assert len(calls) == len(after) == 1
    close([hidden.grad, head.weight.grad, after[0]], [want[0], 2 * want[1], 2 * want[1]])


def test_weights_that_are_functions_of_others(slices):
    slices(40)
    hidden, head, targets = problem()
    low = torch.randn(V, 2, dtype=F64, requires_grad=True)
    high = torch.randn(2, D, dtype=F64)

    def loss(f):
        weights = {"head.weight": low @ high, "head.bias": head.bias.detach()}
        return torch.func.functional_call(Wrapped(head, f), weights, (hidden, targets))

    close(*(gradients(loss(f), [hidden, low]) for f in (plain, next_token_loss)))


class Wrapped(nn.Module):
    def __init__(self, head, loss, norm=None):
        super().__init__()
        self.head, self.loss, self.norm = head, loss, norm

    def forward(self, hidden, targets):
        return self.loss(hidden if self.norm is None else self.norm(hidden), self.head, targets)


def test_backward_more_than_once():
    hidden, head, targets = problem()
    loss = next_token_loss(hidden, head, targets)
    first, second = (torch.autograd.grad(c * loss, [hidden, head.weight], retain_graph=True) for c in (1, 3))
    close(second, [3 * g for g in first])
    with pytest.raises(RuntimeError, match=r"create_graph=True.*Form the loss from out\.logits"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    torch.autograd.grad(loss, hidden)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("tokens", [200, 40])
def test_inside_a_checkpoint_and_with_saved_tensors_moved_away(slices, tokens):
    slices(tokens)
    hidden, head, targets = problem()
    inputs = [hidden, *head.parameters()]
    want = gradients(plain(hidden, head, targets), inputs)
    close(gradients(checkpoint(next_token_loss, hidden, head, targets, use_reentrant=False), inputs), want)
    with torch.autograd.graph.save_on_cpu():
        loss = next_token_loss(hidden, head, targets)
    close(gradients(loss, inputs), want)


@pytest.mark.parametrize("tokens", [200, 40])
@pytest.mark.slow
def test_compiled_without_graph_breaks(slices, tokens):
    slices(tokens)
    hidden, head, targets = problem()
    torch.compiler.reset()
    compiled = torch.compile(next_token_loss, fullgraph=True, backend="aot_eager")
    inputs = [hidden, *head.parameters()]
    close(*(gradients(f(hidden, head, targets), inputs) for f in (compiled, plain)))


def test_transforms_of_functions():
    hidden, head, targets = problem()
    got = torch.func.grad(lambda h: next_token_loss(h, head, targets))(hidden)
    close([got], torch.autograd.grad(plain(hidden, head, targets), [hidden]))


def test_forward_mode_derivatives_are_those_of_the_plain_loss():
    hidden, head, targets = problem()
    tangent = torch.randn_like(hidden)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden.detach(), tangent)
        got, want = (forward_ad.unpack_dual(f(dual, head, targets)).tangent for f in (next_token_loss, plain))
        # through the weights alone, too
        parts = {
            "weight": forward_ad.make_dual(head.weight.detach(), torch.randn_like(head.weight)),
            "bias": head.bias.detach(),
        }
        call = [
            torch.func.functional_call(
                Wrapped(head, f), {f"head.{k}": v for k, v in parts.items()}, (hidden.detach(), targets)
            )
            for f in (next_token_loss, plain)
        ]
        by_weight = [forward_ad.unpack_dual(x).tangent for x in call]
    close([got, by_weight[0]], [want, by_weight[1]])


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("tokens", [200, 40])
@pytest.mark.parametrize("how", ["head", "root", "norm and head", "hooked", "columns"])
def test_sharded_heads(slices, process_group, monkeypatch, how, tokens):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    slices(tokens)
    hidden, head, targets = problem()
    model = Wrapped(head, next_token_loss, nn.LayerNorm(D, dtype=F64))
    want = gradients(plain(model.norm(hidden), head, targets), [hidden, *head.parameters()])
    scattered, seen, before = [], [], FSDPParamGroup.post_backward
    if how == "columns":
        from torch.distributed.tensor import Replicate

        parallelize_module(head, process_group, ColwiseParallel(output_layouts=Replicate()))
    else:
        options = {"mesh": process_group, "reshard_after_forward": True}
        if how != "root":
            # a group gathers its weights with its first module, and is done with its last one
            fully_shard([model.norm, head] if how == "norm and head" else head, **options)
        fully_shard(model, **options)
        if how == "hooked":
            head.register_forward_hook(lambda module, args, out: seen.append(out.shape))

        def post_backward(group, *unused):
            scattered.append(any(getattr(p, "_unsharded_param", head.bias).grad is not None for p in group.fsdp_params))
            before(group, *unused)

        monkeypatch.setattr(FSDPParamGroup, "post_backward", post_backward)
    for _ in range(2):
        hidden.grad = None
        scattered.clear()
        model.zero_grad()
        loss = model(hidden, targets)
        loss.backward()
        got = [loss.detach(), hidden.grad, *(p.grad.full_tensor() for p in head.parameters())]
        close(got, want)
        assert how == "columns" or sum(scattered) <= 2  # the head's, once, and the norm's
    assert seen == ([(123, V)] * 2 if how == "hooked" else [])
    assert "forward" not in vars(head)


def test_a_sharded_head_that_rounds_what_it_returns_rounds_no_loss(slices, process_group):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    slices(40, itemsize=2)
    hidden, head, targets = problem(F32)
    rounded, inputs = copy.deepcopy(head).to(BF16), hidden.detach().to(BF16).requires_grad_()
    want = gradients(next_token_loss(inputs, rounded, targets, 300), [inputs, *rounded.parameters()])
    # as accelerate shards under bf16
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=BF16, output_dtype=BF16)
    fully_shard(head, mesh=process_group, mp_policy=policy)
    loss = next_token_loss(hidden, head, targets, 300)
    assert loss.dtype == F32 and torch.equal(loss.detach(), want[0])
    loss.backward()
    got = [loss.detach(), hidden.grad, *(p.grad.full_tensor() for p in head.parameters())]
    close(got, [x.float() for x in want], rtol=1e-2)

"""The norm of a residual branch: the op on PyTorch operations, the layers, and the block around them."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import hybridzoo as zoo
from hybridzoo.kernels import BackendError, branch_layer_norm, branch_rms_norm, layer_norm, rms_norm
from hybridzoo.kernels.dispatch import TABLES, explain
from hybridzoo.layers import RMSNorm, make_norm
from hybridzoo.layers.common import dtype_read, scaled
from hybridzoo.layers.norm import LayerNorm
from hybridzoo.zoo.models.block import Stream

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MIXERS = {
    "mamba": {"d_state": 4},
    "scaled": {"type": "mamba2", "d_state": 8, "headdim": 8, "in_multiplier": 0.3},
    "attention": {"nheads": 2},
    "mlp": {"d_intermediate": 24},
    "moe": {"d_intermediate": 24, "num_experts": 4, "top_k": 2},
    "embedding": {"type": "attention", "nheads": 2, "headdim": 16, "reads": "residual_and_embedding", "writes": "side"},
    "side": {"type": "mlp", "d_intermediate": 24, "reads": "side", "writes": "side"},
    "joined": {"type": "mamba", "d_state": 4, "reads": "residual_plus_side"},
}
IDS = torch.arange(1, 41).view(2, 20)


@pytest.mark.parametrize(
    "types", list(itertools.product((F32, BF16, F16), (F32, BF16, F16), (F32, BF16, F16, None))), ids=str
)
@pytest.mark.parametrize("d", [1, 3, 8, 24, 768])
def test_values_in_every_combination_of_types(d, types):
    dtype, out, wide = types
    x, weight = torch.randn(3, 5, d).to(dtype), None if wide is None else torch.randn(d).to(wide)
    h, same = branch_rms_norm(x, weight, 1e-5, out, backend="torch")
    want = F.rms_norm(x.double(), (d,), None if weight is None else weight.double(), 1e-5)
    assert h.dtype == out and same is x
    # the coarsest of the types decides
    tolerance = {F32: 1e-6, F16: 2e-3, BF16: 2e-2}
    rough = max(tolerance[m] for m in types if m is not None)
    torch.testing.assert_close(h.double(), want, atol=rough, rtol=rough)


def test_gradients_of_both_results():
    x, weight = torch.randn(2, 3, 7, dtype=F64, requires_grad=True), torch.randn(7, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: branch_rms_norm(x * 1, w, 1e-5, backend="torch"), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, 0.0, backend="torch"), x)
    add = torch.randn_like(x).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, add: branch_rms_norm(x, w, 1e-5, add=add, backend="torch"), (x, weight, add)
    )


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize(("dtype", "add"), [(F32, None), (F32, BF16), (BF16, BF16), (BF16, F32), (F64, F16)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_norm_gives_the_bits_of_torchs(dtype, add, autocast, affine):
    norm = LayerNorm(24, elementwise_affine=affine[0], bias=affine[1])
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, 5, 24, dtype=F64).to(dtype).requires_grad_()
    more = None if add is None else torch.randn(3, 5, 24).to(add).requires_grad_()
    leaves = [m for m in (x, more, *norm.parameters()) if m is not None]

    def written_out():
        total = x if more is None else x + more
        wide = total.float() if autocast and total.dtype == BF16 else total
        gains = [None if p is None else p.to(wide.dtype) for p in (norm.weight, norm.bias)]
        return F.layer_norm(wide, (24,), *gains, norm.eps).to(BF16), total

    def run(f):
        with torch.autocast("cpu", BF16, enabled=autocast):
            h, past = f()
        return h, past, *torch.autograd.grad(h.float().sin().sum() + past.float().cos().sum(), leaves)

    got = run(lambda: norm(x, BF16, branch=True, add=more))
    for a, b in zip(got, run(written_out), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_layer_norm_by_its_definition():
    x, weight, bias = torch.randn(2, 3, 7, dtype=F64), torch.randn(7, dtype=F64), torch.randn(7, dtype=F64)
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    want = (x - mean) / (variance + 1e-3).sqrt()
    torch.testing.assert_close(layer_norm(x, None, None, 1e-3), want)
    h, past = branch_layer_norm(x, weight, bias, 1e-3, F32)
    assert past is x and h.dtype == F32
    torch.testing.assert_close(h, (want * weight + bias).float())
    with pytest.raises(ValueError, match=r"layer_norm: bias is given without a weight. Pass weight=torch.ones\(7\)"):
        layer_norm(x, None, bias, 1e-3)
    with pytest.raises(ValueError, match=r"layer_norm: bias has shape \(6,\), expected \(7,\) \(d,\)"):
        layer_norm(x, weight, bias[1:], 1e-3)
    with pytest.raises(
        BackendError, match=r"layer_norm\(backend='cuda'\): the CUDA kernels need CUDA tensors, got cpu"
    ):
        layer_norm(x, weight, bias, 1e-3, backend="cuda")


@pytest.mark.parametrize("types", list(itertools.product((F64, F32, BF16, F16), repeat=2)), ids=str)
def test_what_is_added_first_has_the_type_that_pytorch_gives_a_sum(types):
    x, add = (torch.randn(3, 5, 8).to(m) for m in types)
    weight = torch.randn(8)
    for out in (None, BF16):
        h, past = branch_rms_norm(x, weight, 1e-5, out, add=add)
        assert past.dtype == (x + add).dtype and torch.equal(past, x + add)
        assert torch.equal(h, rms_norm(x + add, weight, 1e-5, out))
    for kind in ("rmsnorm", "layernorm"):
        norm = make_norm(kind, 8, 1e-5)
        assert torch.equal(norm(x, F32, add=add), norm(x + add, F32))
        h, past = norm(x, F32, branch=True, add=add)
        assert torch.equal(h, norm(x + add, F32)) and torch.equal(past, x + add)


def test_mistakes_are_named():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \(4,\), expected \(3,\) \(d,\)"):
        rms_norm(x, torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match=r"rms_norm: x has dtype torch.int64"):
        rms_norm(torch.ones(2, 3, dtype=torch.long), None, 1e-5)
    with pytest.raises(ValueError, match="rms_norm: x has no dimensions"):
        rms_norm(torch.ones(()), None, 1e-5)
    with pytest.raises(ValueError, match="rms_norm: weight is on meta, x on cpu"):
        rms_norm(x, torch.ones(3, device="meta"), 1e-5)
    with pytest.raises(ValueError, match=r"rms_norm: add has shape \(2, 4\), expected \(2, 3\) \(..., d\)"):
        branch_rms_norm(x, None, 1e-5, add=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"rms_norm: add has dtype torch.bool"):
        branch_rms_norm(x, None, 1e-5, add=x > 0)
    with pytest.raises(ValueError, match="rms_norm: add is on meta, x on cpu"):
        branch_rms_norm(x, None, 1e-5, add=x.to("meta"))
    with pytest.raises(BackendError, match=r"rms_norm\(backend='cuda'\): the CUDA kernels need CUDA tensors, got cpu"):
        rms_norm(x, None, 1e-5, backend="cuda")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"d": 8193}, "the CUDA kernels normalise 1 to 8192 channels, got 8193"),
        ({"dtypes": (F64,)}, "the CUDA kernels take float32, float16 and bfloat16, got float64"),
        ({"dtype": F64}, "the CUDA kernels take float32, float16 and bfloat16, got float64"),
    ],
)
def test_what_the_kernels_refuse_runs_on_torchs_operations(facts, reason):
    rows = explain("rms_norm", **{"device": "cuda", "dtype": F32, "d": 768} | facts)
    assert rows[0] == ("cuda", False, reason) and rows[1][:2] == ("torch", True)
    assert list(TABLES["rms_norm"]) == ["cuda", "torch"]


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_layers_give_the_dtype_that_is_asked_for(kind):
    norm, x = make_norm(kind, 8, 1e-5), torch.randn(2, 8)
    assert norm(x).dtype == F32 and norm(x.bfloat16()).dtype == BF16
    h, same = norm(x, BF16, branch=True)
    assert same is x and torch.equal(h, norm(x).bfloat16())
    assert torch.equal(norm(x, F16), norm(x).half())


def test_the_dtype_that_linear_layers_read():
    weight = torch.ones(3)
    assert dtype_read(weight) == F32 and dtype_read(weight.half()) == F16
    with torch.autocast("cpu", BF16):
        assert dtype_read(weight) == BF16 == torch.nn.Linear(3, 3)(weight).dtype
        assert dtype_read(weight.double()) == F64 == torch.nn.Linear(3, 3).double()(weight.double()).dtype
        assert dtype_read(weight.to("meta")) == F32


def previously(block, stream, state, seq, return_state):
    """A block as a sum of modules, its input in the norm's dtype, which adds up at its end."""
    assert stream.add is None
    read = x = stream.x
    if block.reads == "residual_and_embedding":
        read = torch.cat([x, stream.embedding], -1)
    elif block.reads == "side":
        read = stream.side
    elif block.side_proj is not None:
        read = x + block.side_proj(stream.side)
    weight = block.norm.weight.to(read.dtype)
    h = F.rms_norm(read, weight.shape, weight, block.norm.eps).to(read.dtype).to(block.norm.weight.dtype)
    aux: dict = {"balance": []}
    y = block.mixer(h, state, seq, aux)
    if block.writes == "side":
        after = stream._replace(side=y)
    else:
        after = stream._replace(x=x + scaled(y, block.multiplier))
    return after, None, aux, after


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layers", ["mamba moe attention mlp scaled embedding side joined mlp", "mamba+attention moe"])
def test_a_model_gives_what_it_gave_bit_for_bit(layers, dtype, autocast, monkeypatch):
    config = {"vocab_size": 64, "d_model": 16, "layers": layers, "mixers": MIXERS, "residual_in_fp32": True}
    model = zoo.build(config, dtype=dtype)

    def run():
        model.zero_grad()
        with torch.autocast("cpu", BF16, enabled=autocast):
            out = model(IDS, labels=IDS)
        out.loss.backward()
        return out, [p.grad for p in model.parameters() if p.grad is not None]

    out, grads = run()
    monkeypatch.setattr(type(model.backbone.layers[0]), "forward", previously)
    was, old = run()
    assert torch.equal(out.loss, was.loss) and torch.equal(out.aux_loss, was.aux_loss)
    assert torch.equal(out.hidden, was.hidden) and len(grads) == len(old)
    for a, b in zip(grads, old, strict=True):
        # where two mixers read one rounded input, their gradients meet rounded
        rounded = autocast and "+" in layers
        torch.testing.assert_close(a, b, atol=2**-7 * b.abs().max().item() if rounded else 0, rtol=0)


def test_the_head_reads_what_autocast_reads():
    model = zoo.build({"vocab_size": 64, "d_model": 16, "layers": "mlp", "mixers": MIXERS})
    x = torch.randn(2, 5, 16)
    with torch.autocast("cpu", BF16):
        h = model.backbone._final(Stream(x))[1]
    assert h.dtype == BF16 and torch.equal(h, model.backbone.norm_f(x).bfloat16())
    model.backbone.logits_multiplier = 0.3
    with torch.autocast("cpu", BF16):
        assert torch.equal(model.backbone._final(Stream(x))[1], model.backbone.norm_f(x) * 0.3)


@pytest.mark.parametrize("name", ["mamba", "attention", "mlp", "moe", "scaled"])
def test_mixers_that_only_project_their_input_get_it_rounded(name):
    block = zoo.build({"vocab_size": 64, "d_model": 16, "layers": name, "mixers": MIXERS}).backbone.layers[0]
    seen = []
    block.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    x = torch.randn(1, 4, 16)
    with torch.autocast("cpu", BF16):
        block(Stream(x), None, None, False)
    # a router compares scores, a factor would be applied to rounded numbers
    assert seen == [F32 if name in ("moe", "scaled") else BF16]
    block(Stream(x), None, None, False)
    assert seen[1] == F32


def test_compiled_blocks_have_no_graph_breaks():
    block = zoo.build({"vocab_size": 64, "d_model": 16, "layers": "mlp", "mixers": MIXERS}).backbone.layers[0]
    x = torch.randn(2, 5, 16, requires_grad=True)

    def run(f):
        with torch.autocast("cpu", BF16):
            y = f(Stream(x, 2 * x), None, None, False)[0].sum()
        return y, torch.autograd.grad(y.sum(), x)[0]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(block), run(compiled), strict=True):
        torch.testing.assert_close(a, b)


def test_a_norm_without_weight():
    x = torch.randn(3, 8)
    torch.testing.assert_close(RMSNorm(8, affine=False)(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())

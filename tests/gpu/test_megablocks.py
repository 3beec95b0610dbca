"""megablocks' grouped matmuls as experts call them: against one matmul per expert, values and gradients."""

import pytest
import torch

from hybridzoo.kernels.dispatch import TABLES
from hybridzoo.layers import MoE
from hybridzoo.layers.experts import grouped_linear

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _there():
    reason = TABLES["moe"]["megablocks"].refuse({"device": "cuda", "dtype": BF16})
    if reason is not None:
        pytest.skip(reason)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize(
    "offsets", [[100, 300, 301, 512], [0, 512, 512, 512], [0, 0, 0, 512], [128, 256, 384, 512]], ids=str
)
@pytest.mark.parametrize("sizes", [(64, 96), (256, 1024), (1024, 256)], ids=str)
def test_no_further_from_float64_than_the_loop(offsets, sizes):
    torch.manual_seed(0)
    ends = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    x, weight = torch.randn(512, sizes[0], device="cuda"), torch.randn(4, sizes[1], sizes[0], device="cuda")
    g = torch.randn(512, sizes[1], device="cuda")
    results = {}
    for backend, dtype in (("megablocks", BF16), ("loop", BF16), ("loop", torch.float64)):
        leaves = [t.to(BF16).to(dtype).requires_grad_() for t in (x, weight)]
        y = grouped_linear(*leaves, ends, backend)
        results[backend, dtype] = [y, *torch.autograd.grad(y, leaves, g.to(BF16).to(dtype))]
    exact = results["loop", torch.float64]
    for got, loop, want in zip(results["megablocks", BF16], results["loop", BF16], exact, strict=True):
        assert got.dtype == BF16 and relative(got, want) < 2 * relative(loop, want) + 1e-4


def test_a_layer_by_name():
    torch.manual_seed(0)
    layers = [
        MoE(128, 256, num_experts=8, top_k=2, backend=name, device="cuda", dtype=BF16)
        for name in ("megablocks", "loop")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 300, 128, device="cuda", dtype=BF16)
    results = []
    for layer in layers:
        rows = x.clone().requires_grad_()
        y = layer(rows)
        results.append([y, *torch.autograd.grad(y.square().sum(), [rows, layer.experts.w1, layer.experts.w2])])
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 1e-2

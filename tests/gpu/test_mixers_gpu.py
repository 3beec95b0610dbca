"""Every registered mixer keeps the promises of the contract on a GPU too, in float32 and in bfloat16."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from hybridzoo.layers.testing import PROMISES, Case

pytestmark = pytest.mark.gpu

# the same matrix as on the CPU; tests are no package, so the file is loaded by its path
_spec = importlib.util.spec_from_file_location("matrix", Path(__file__).parents[1] / "test_mixers.py")
matrix = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(matrix)

# of these, bfloat16 is part of the promise itself, or the dtype plays no role
ONCE = {"autocast", "compiles", "copies", "flops_cover_matmuls", "half_precision", "initialisation", "meta_device", "state_size"}  # fmt: skip


def cases():
    for dtype in (torch.float32, torch.bfloat16):
        for param in matrix.cases():
            name, options, promise = param.values
            # finite differences need float64, which the CPU's matrix has
            if promise == "gradcheck" or (dtype == torch.bfloat16 and (promise in ONCE or name in ROUTED)):
                continue
            yield pytest.param(name, options, promise, dtype, id=f"{str(dtype).removeprefix('torch.')}-{param.id}")


# a rounding may send a token to another expert
ROUTED = {"moe"}


@pytest.mark.parametrize(("name", "options", "promise", "dtype"), list(cases()))
def test_mixer_keeps_its_promise_on_the_gpu(name, options, promise, dtype):
    PROMISES[promise](
        Case(functools.partial(matrix.make, name), options=options, name=name, dtype=dtype, device="cuda")
    )

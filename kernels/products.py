"""Matrix products whose sums stay in float32: the gradient of a weight, of operands in 16 bits."""

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def _keeps_sums(a: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's product of 16-bit operands can give out the sums as they are."""
    return a.is_cuda and torch.version.hip is None and a.dtype in _HALF and dtype == torch.float32


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b``, (m, k) by (k, n) of one type, in ``dtype``; on an NVIDIA GPU, float32 is not rounded to the operands' type on the way."""
    if _keeps_sums(a, dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out += a @ b`` in place; see :func:`product`."""
    if _keeps_sums(a, out.dtype):
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    return out.add_(torch.mm(a, b))

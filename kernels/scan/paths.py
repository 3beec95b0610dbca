"""Scans that walk over the tokens in another order: rows, columns, back to front, without a flipped or transposed copy in the caller.

A path is five integers, ``(n_outer, n_inner, stride_outer, stride_inner, reverse)``: step t visits token ``(t // n_inner) *
stride_outer + (t % n_inner) * stride_inner``, from the end if reversed. Text is ``(1, l, 0, 1, 0)``; an H x W image in row-major order
has its rows as ``(H, W, W, 1, 0)`` and its columns as ``(W, H, 1, W, 0)``. Any other order (windows, say) is a tensor of the ``l`` tokens
as they are visited.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..seq import Seq, readable
from .inputs import ScanInputs

Path = tuple[int, int, int, int, bool] | Tensor
# what may be given per path, and its dimensions where it is shared
PER_PATH = {"dt": 3, "A": 2, "B": 4, "C": 4, "D": 1, "dt_bias": 1, "initial_state": 3, "dt_weight": 2}


def walks(where: str, paths: Sequence[Sequence[int] | Tensor], l: int, seq: Seq | None) -> list[Path]:
    """The paths as tuples, or as the orders that they are; raises unless each visits every one of ``l`` tokens once."""
    if seq is not None:
        raise ValueError(
            f"{where}: paths and seq exclude each other: padding and packing are those of text, read in one direction."
        )
    if len(paths) == 0:
        raise ValueError(
            f"{where}: paths is empty, expected at least one (n_outer, n_inner, stride_outer, stride_inner, reverse)."
        )
    out: list[Path] = []
    for k, path in enumerate(paths):
        if isinstance(path, Tensor):
            out.append(_order(f"{where}: paths[{k}]", path, l))
            continue
        if len(path) != 5:
            raise ValueError(
                f"{where}: paths[{k}] has {len(path)} entries, expected 5: (n_outer, n_inner, stride_outer, stride_inner, reverse)."
            )
        outer, inner, far, near, reverse = path
        if outer * inner != l:
            raise ValueError(
                f"{where}: paths[{k}] walks {outer} * {inner} = {outer * inner} tokens, the input has {l}."
            )
        # one digit must count single tokens, and the other whole runs of it
        rows = (near == 1 or inner == 1) and (far == inner or outer == 1)
        columns = (far == 1 or outer == 1) and (near == outer or inner == 1)
        if not (rows or columns):
            raise ValueError(
                f"{where}: paths[{k}] with strides ({far}, {near}) over ({outer}, {inner}) does not visit every token once. "
                f"Rows are ({outer}, {inner}, {inner}, 1), columns ({outer}, {inner}, 1, {outer})."
            )
        out.append((outer, inner, far, near, bool(reverse)))
    return out


def _order(name: str, order: Tensor, l: int) -> Tensor:
    if order.shape != (l,) or order.dtype != torch.int64:
        raise ValueError(
            f"{name} is an order of shape {tuple(order.shape)} {order.dtype}, expected ({l},) int64: the {l} tokens as they are visited."
        )
    # a device is not asked, and nothing is known of what is traced
    if readable(order) and not torch.equal(order.sort().values, torch.arange(l)):
        raise ValueError(f"{name} does not visit every one of the {l} tokens once.")
    return order


def is_order(path: Path) -> bool:
    """Tell whether a path has its tokens listed."""
    return isinstance(path, Tensor)


def path_index(path: Path, device: torch.device) -> Tensor:
    """The token visited at each step, ``(l,)`` int64."""
    if isinstance(path, Tensor):
        return path.to(device)
    outer, inner, far, near, reverse = path
    t = torch.arange(outer * inner, device=device)
    if reverse:
        t = t.flip(0)
    return (t // inner) * far + (t % inner) * near


def per_path(k: int, i: ScanInputs) -> list[ScanInputs]:
    """The inputs of each of k paths; what is not shared has a leading axis of one per path."""
    each = {}
    for name, dims in PER_PATH.items():
        x = getattr(i, name)
        own = x is not None and x.dim() == dims + 1
        if own and x.shape[0] != k:
            raise ValueError(f"selective_scan: {name} is given for {x.shape[0]} paths, paths has {k}.")
        each[name] = x.unbind(0) if own else [x] * k
    return [i._replace(**{name: parts[j] for name, parts in each.items()}) for j in range(k)]


def steps_of(path: Path) -> list[int]:
    """The token visited at each step, as numbers."""
    if isinstance(path, Tensor):
        return path.tolist()
    outer, inner, far, near, reverse = path
    at = [(t // inner) * far + (t % inner) * near for t in range(outer * inner)]
    return at[::-1] if reverse else at


def over_paths(scan: Callable[[ScanInputs], tuple], paths: list[Path], i: ScanInputs) -> tuple[Tensor, Tensor]:
    """One scan per path over gathered tokens, outputs summed where the tokens are."""
    # float32 until the sum is complete: one rounding, not one per path
    total, last, x = torch.zeros_like(i.u, dtype=i.acc), [], i.u.to(i.acc)
    for path, own in zip(paths, per_path(len(paths), i), strict=True):
        order = path_index(path, x.device)
        y, h = scan(own._replace(u=x[:, order], dt=own.dt[:, order], B=own.B[:, order], C=own.C[:, order], z=None))
        total = total.index_add(1, order, y)
        last.append(h)
    if i.z is not None:
        total = total * F.silu(i.z.to(i.acc))
    return total.to(i.u.dtype), torch.stack(last)

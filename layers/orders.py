"""Orders in which a scan visits the tokens of a map, by name: data for ``selective_scan(..., paths=)``, and nothing else.

``rows`` goes along the rows, top row first, ``columns`` along the columns, left column first; the state goes on from the end of one line to
the start of the next. ``-back`` is the same from the last token to the first. ``window7-`` in front goes through windows of 7 x 7 one after
another, row of windows by row of windows or column by column, and through each of them in that way (LocalMamba, arXiv:2403.09338); those at
the right and lower border are as small as what is left there.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.scan.paths import path_index, walks
from .common import Device
from .options import check

__all__ = ["names_of", "orders_of", "paths_of", "ranks_of"]

# by their number: as VMamba stacks the weights of its four
DIRECTIONS: dict[int, tuple[str, ...]] = {
    1: ("rows",),
    2: ("rows", "rows-back"),
    4: ("rows", "columns", "rows-back", "columns-back"),
}
_NAME = re.compile(r"(?:window([1-9][0-9]{0,8})-)?(rows|columns)(-back)?")


def names_of(field: str, directions: Any) -> tuple[str, ...]:
    """The names of the orders that an option asks for, by their number or one by one.

    Raises:
        OptionError: It names none, or one that is unknown.
    """
    known = "'rows', 'columns', 'rows-back', 'columns-back', and 'window7-' (any size) in front of one of them"
    if isinstance(directions, int) and not isinstance(directions, bool):
        numbers = ", ".join(map(str, DIRECTIONS))
        check(directions in DIRECTIONS, field, f"{directions} is none of {numbers}. Or list the orders: {known}.")
        return DIRECTIONS[directions]
    listed = isinstance(directions, list | tuple) and len(directions) > 0
    check(listed, field, f"{directions!r} is neither a number nor a list of orders. Known: {known}.")
    for name in directions:
        named = isinstance(name, str) and _NAME.fullmatch(name) is not None
        check(named, field, f"unknown order {name!r}. Known: {known}.")
    return tuple(directions)


def paths_of(names: Sequence[str], grid: tuple[int, int], device: Device = "cpu") -> list[tuple[int, ...] | Tensor]:
    """The walks over a map of ``(h, w)`` tokens, as ``selective_scan`` takes them; ``device`` is where those that it reads would be."""
    return [_path(name, *grid, device) for name in names]


def orders_of(names: Sequence[str], grid: tuple[int, int], device: Device = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Of every walk over a map, the tokens as it visits them, and the step at which it visits each of them, ``(h * w,)`` int64 both."""
    at = torch.arange(grid[0] * grid[1], device=device)
    orders = (path_index(path, at.device) for path in walks("orders_of", paths_of(names, grid, device), len(at), None))
    return [(order, torch.empty_like(at).scatter_(0, order, at)) for order in orders]


def ranks_of(names: Sequence[str], grid: tuple[int, int]) -> list[Tensor]:
    """Of every walk, the step at which it visits each token of a map, ``(h * w,)``."""
    return [rank for _, rank in orders_of(names, grid)]


def _path(name: str, h: int, w: int, device: Device) -> tuple[int, ...] | Tensor:
    match = _NAME.fullmatch(name)
    assert match is not None
    size, way, back = match.groups()
    if size is None:
        return (h, w, w, 1, int(bool(back))) if way == "rows" else (w, h, 1, w, int(bool(back)))
    order = _windows(h, w, int(size), way == "columns", device)
    return order.flip(0) if back else order


def _windows(h: int, w: int, size: int, columns: bool, device: Device) -> Tensor:
    t = torch.arange(h * w, device=device)
    i, j = t // w, t % w
    if columns:
        (i, j), (h, w) = (j, i), (w, h)
    size = min(size, max(h, w))
    across = -(-w // size)
    window, inside = i // size * across + j // size, i % size * size + j % size
    return torch.argsort(window * size * size + inside)

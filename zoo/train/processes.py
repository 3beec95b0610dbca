"""Processes that train one model together, as torchrun starts them."""

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainingArguments

__all__ = ["anywhere", "batch_mean", "devices_in_one", "in_first"]


def in_first(args: TrainingArguments, work: Callable[[], Any]) -> Any:
    """Do something once, where torchrun has started several processes, and give all of them the result or the error."""
    if args.world_size == 1:
        return work()
    answer: list[Any] = [None]
    if args.process_index == 0:
        try:
            answer = [work()]
        except Exception as e:  # raised below, in every process
            answer = [e]
    broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def anywhere(found: str | None) -> str | None:
    """Return what one of the processes has found, the same in all of them: none may stop alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return found
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, found)
    return next((one for one in told if one is not None), None)


def devices_in_one() -> bool:
    """Return whether one process has all devices: torchrun has started none."""
    return "WORLD_SIZE" not in os.environ


def batch_mean(part: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, without a gradient; each has to ask for it."""
    total = part.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()

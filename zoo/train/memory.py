"""The error of a training that does not fit into memory."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from .options import TrainOptions

__all__ = ["OutOfMemory", "naming_memory"]


class OutOfMemory(MemoryError):
    """A step does not fit into memory; the message says what to lower, and which checkpoint is kept."""


@contextlib.contextmanager
def naming_memory(
    options: TrainOptions, sizes: tuple[str, str], device: torch.device, kept: Callable[[], str]
) -> Iterator[None]:
    """Turn what PyTorch and Python raise where memory runs out into an :class:`OutOfMemory`.

    Args:
        options: Of the training.
        sizes: Words for what a batch holds, and for what makes that smaller.
        device: The device that trains.
        kept: Says what has been saved.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not _is_memory(e):
            raise
        why = f"{device}: out of memory{_used(device)}"
        raise OutOfMemory(f"{why}, with {_sizes(options, sizes[0])}. {_remedy(options, sizes[1])} {kept()}") from e


def _is_memory(error: Exception) -> bool:
    # the CPU's allocator has no class of its own
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _used(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    held, there = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    return f" ({held / 2**30:.1f} of {there / 2**30:.1f} GiB held)"


def _sizes(options: TrainOptions, rows: str) -> str:
    parts = f" in each of {options.accumulate} parts" if options.accumulate > 1 else ""
    return f"batch_size={options.batch_size} {rows}{parts}"


def _remedy(options: TrainOptions, smaller: str) -> str:
    ways = []
    if options.batch_size is not None and options.batch_size > 1:
        least = next(k for k in range(2, options.batch_size + 1) if options.batch_size % k == 0)
        parts = f"batch_size={options.batch_size // least} with accumulate={options.accumulate * least}"
        ways.append(f"{parts} (the same steps, and this run can go on with them)")
    if not options.checkpointing:
        ways.append("checkpointing (--checkpointing)")
    ways.append(smaller)
    return f"Use {', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}."
